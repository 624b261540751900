//! A template's syntax tree. Chains are lists, so that a tree is only as deep as its brackets and
//! blocks, which the parser limits.

use std::sync::Arc;

use super::value::Value;

#[derive(Debug)]
pub enum Expr {
    Const(Value),
    Name(Arc<str>),
    List(Vec<Self>),
    Tuple(Vec<Self>),
    Dict(Vec<(Self, Self)>),
    /// Operators of one rank, from left to right.
    Binary(Box<Self>, Vec<(Operator, Self)>),
    Concat(Vec<Self>),
    Compare(Box<Self>, Vec<(Comparison, Self)>),
    And(Vec<Self>),
    Or(Vec<Self>),
    Not(Box<Self>),
    Signed {
        minus: bool,
        of: Box<Self>,
    },
    If {
        test: Box<Self>,
        then: Box<Self>,
        otherwise: Option<Box<Self>>,
    },
    /// What stands behind a value, from left to right.
    Postfix(Box<Self>, Vec<Postfix>),
}

#[derive(Debug)]
pub enum Postfix {
    Attribute(Arc<str>),
    Item(Expr),
    Slice([Option<Expr>; 3]),
    Call(Arguments),
    Filter(Filter),
    Test { name: Arc<str>, arguments: Arguments, negated: bool },
}

#[derive(Debug)]
pub struct Filter {
    pub name: Arc<str>,
    pub arguments: Arguments,
}

#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(Arc<str>, Expr)>,
    /// `*expr`.
    pub list: Option<Box<Expr>>,
    /// `**expr`.
    pub dict: Option<Box<Expr>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

impl Operator {
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Sub => "-",
            Self::Mul => "*",
            Self::Div => "/",
            Self::FloorDiv => "//",
            Self::Rem => "%",
            Self::Pow => "**",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug)]
pub enum Node {
    Data(Value),
    Print(Expr),
    If {
        branches: Vec<(Expr, Vec<Self>)>,
        otherwise: Vec<Self>,
    },
    For(For),
    Set(Target, Expr),
    /// What `body` prints, after `filters`.
    SetBlock {
        target: Target,
        filters: Vec<Filter>,
        body: Vec<Self>,
    },
    Macro(Arc<str>, Macro),
    /// `caller` is what the called macro may call.
    Call {
        caller: Macro,
        call: Expr,
    },
    FilterBlock {
        filters: Vec<Filter>,
        body: Vec<Self>,
    },
    With {
        values: Vec<(Target, Expr)>,
        body: Vec<Self>,
    },
    /// A scope without values: transformers' `generation`.
    Scope(Vec<Self>),
    Break,
    Continue,
}

#[derive(Debug)]
pub struct For {
    pub target: Target,
    pub over: Expr,
    pub only_if: Option<Expr>,
    pub body: Vec<Node>,
    pub otherwise: Vec<Node>,
}

#[derive(Debug)]
pub struct Macro {
    pub parameters: Vec<Parameter>,
    pub body: Vec<Node>,
}

/// A name and its default.
pub type Parameter = (Arc<str>, Option<Expr>);

/// What is set.
#[derive(Debug)]
pub enum Target {
    Name(Arc<str>),
    Attribute(Arc<str>, Arc<str>),
    Tuple(Vec<Self>),
}
