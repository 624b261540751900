//! Parses tokens by Jinja2's grammar.

use std::sync::Arc;

use super::ast::{
    Arguments, Comparison, Expr, Filter, For, Macro, Node, Operator, Parameter, Postfix, Target,
};
use super::error::{Error, MAX_NESTING};
use super::lexer::{Token, tokens};
use super::value::Value;

/// Parses a template's source.
pub fn parse(source: &str) -> Result<Vec<Node>, Error> {
    let mut parser = Parser { tokens: tokens(source)?, at: 0, nesting: 0, n_loops: 0 };
    let nodes = parser.nodes(&[])?;
    Ok(nodes)
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    /// Brackets and blocks around the token.
    nesting: usize,
    /// Loops around it.
    n_loops: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    /// The token, and goes on to the next one.
    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn fail<T>(&self, why: &str) -> Result<T, Error> {
        Err(Error::new(format!("line {}: {why}", self.tokens[self.at].1)))
    }

    fn is_symbol(&self, symbol: &str) -> bool {
        matches!(self.peek(), Token::Symbol(found) if *found == symbol)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(found) if found == name)
    }

    fn take_symbol(&mut self, symbol: &str) -> bool {
        let is = self.is_symbol(symbol);
        if is {
            self.next();
        }
        is
    }

    fn take_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        if is {
            self.next();
        }
        is
    }

    fn expect_symbol(&mut self, symbol: &str) -> Result<(), Error> {
        if self.take_symbol(symbol) { Ok(()) } else { self.fail(&format!("expected '{symbol}'")) }
    }

    fn expect_name(&mut self, name: &str) -> Result<(), Error> {
        if self.take_name(name) { Ok(()) } else { self.fail(&format!("expected '{name}'")) }
    }

    fn expect(&mut self, token: &Token) -> Result<(), Error> {
        if self.peek() == token {
            self.next();
            return Ok(());
        }
        self.fail("a tag has too much in it, or is not closed")
    }

    fn name(&mut self) -> Result<Arc<str>, Error> {
        match self.next() {
            Token::Name(name) => Ok(name.into()),
            _ => self.fail("expected a name"),
        }
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return self.fail(&format!("it is nested over {MAX_NESTING} levels deep"));
        }
        let result = parse(self);
        self.nesting -= 1;
        result
    }
}

/// Statements.
impl Parser {
    /// Nodes up to a block that begins with one of `ends`, whose name is the next token then; up to
    /// the source's end if there are none.
    fn nodes(&mut self, ends: &[&str]) -> Result<Vec<Node>, Error> {
        let mut nodes = Vec::new();
        loop {
            match self.next() {
                Token::Data(text) => nodes.push(Node::Data(Value::own(&text))),
                Token::PrintBegin => {
                    nodes.push(Node::Print(self.tuple(true)?));
                    self.expect(&Token::PrintEnd)?;
                }
                Token::BlockBegin => match self.peek() {
                    Token::Name(name) if ends.contains(&name.as_str()) => return Ok(nodes),
                    _ => nodes.push(self.nested(Self::statement)?),
                },
                Token::End if ends.is_empty() => return Ok(nodes),
                Token::End => return self.fail(&format!("'{}' is missing", ends[ends.len() - 1])),
                _ => return self.fail("unexpected token"),
            }
        }
    }

    /// A block's body and its end.
    fn body(&mut self, end: &str) -> Result<Vec<Node>, Error> {
        self.expect(&Token::BlockEnd)?;
        let nodes = self.nodes(&[end])?;
        self.expect_name(end)?;
        self.expect(&Token::BlockEnd)?;
        Ok(nodes)
    }

    fn statement(&mut self) -> Result<Node, Error> {
        let tag = self.name()?;
        match &*tag {
            "if" => self.branches(),
            "for" => self.run_of(),
            "set" => self.set(),
            "macro" => {
                let name = self.name()?;
                let parameters = self.parameters()?;
                Ok(Node::Macro(name, Macro { parameters, body: self.outside_loops("endmacro")? }))
            }
            "call" => {
                let parameters = if self.is_symbol("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(&call, Expr::Postfix(_, chain) if matches!(chain.last(), Some(Postfix::Call(_))))
                {
                    return self.fail("expected a call");
                }
                let body = self.outside_loops("endcall")?;
                Ok(Node::Call { caller: Macro { parameters, body }, call })
            }
            "filter" => {
                let filters = self.filters()?;
                Ok(Node::FilterBlock { filters, body: self.body("endfilter")? })
            }
            "with" => self.with(),
            "generation" => Ok(Node::Scope(self.outside_loops("endgeneration")?)),
            "break" | "continue" if self.n_loops == 0 => {
                self.fail(&format!("'{tag}' outside loop"))
            }
            "break" | "continue" => {
                self.expect(&Token::BlockEnd)?;
                Ok(if &*tag == "break" { Node::Break } else { Node::Continue })
            }
            _ => self.fail(&format!("unknown tag '{tag}'")),
        }
    }

    /// The body of what is called: loops around it are not its own.
    fn outside_loops(&mut self, end: &str) -> Result<Vec<Node>, Error> {
        let n_loops = std::mem::take(&mut self.n_loops);
        let body = self.body(end)?;
        self.n_loops = n_loops;
        Ok(body)
    }

    fn branches(&mut self) -> Result<Node, Error> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(true)?;
            self.expect(&Token::BlockEnd)?;
            branches.push((test, self.nodes(&["elif", "else", "endif"])?));
            match &*self.name()? {
                "elif" => {}
                "else" => {
                    let otherwise = self.body("endif")?;
                    return Ok(Node::If { branches, otherwise });
                }
                _ => {
                    self.expect(&Token::BlockEnd)?;
                    return Ok(Node::If { branches, otherwise: Vec::new() });
                }
            }
        }
    }

    fn run_of(&mut self) -> Result<Node, Error> {
        let target = self.targets()?;
        self.expect_name("in")?;
        let over = self.tuple(false)?;
        let only_if = if self.take_name("if") { Some(self.expression()?) } else { None };
        self.take_name("recursive");
        self.expect(&Token::BlockEnd)?;
        self.n_loops += 1;
        let body = self.nodes(&["else", "endfor"])?;
        self.n_loops -= 1;
        let otherwise = if self.take_name("else") {
            self.body("endfor")?
        } else {
            self.expect_name("endfor")?;
            self.expect(&Token::BlockEnd)?;
            Vec::new()
        };
        Ok(Node::For(For { target, over, only_if, body, otherwise }))
    }

    fn set(&mut self) -> Result<Node, Error> {
        let target = self.targets()?;
        if self.take_symbol("=") {
            let value = self.tuple(true)?;
            self.expect(&Token::BlockEnd)?;
            return Ok(Node::Set(target, value));
        }
        let filters = if self.take_symbol("|") { self.filters()? } else { Vec::new() };
        Ok(Node::SetBlock { target, filters, body: self.body("endset")? })
    }

    fn with(&mut self) -> Result<Node, Error> {
        let mut values = Vec::new();
        while *self.peek() != Token::BlockEnd {
            if !values.is_empty() {
                self.expect_symbol(",")?;
            }
            let target = self.target()?;
            self.expect_symbol("=")?;
            values.push((target, self.expression()?));
        }
        Ok(Node::With { values, body: self.body("endwith")? })
    }

    fn target(&mut self) -> Result<Target, Error> {
        if self.take_symbol("(") {
            let target = self.nested(Self::targets)?;
            self.expect_symbol(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        if self.take_symbol(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        match &*name {
            "true" | "false" | "none" | "True" | "False" | "None" => {
                self.fail(&format!("cannot assign to '{name}'"))
            }
            _ => Ok(Target::Name(name)),
        }
    }

    fn targets(&mut self) -> Result<Target, Error> {
        let first = self.target()?;
        if !self.is_symbol(",") {
            return Ok(first);
        }
        let mut targets = vec![first];
        while self.take_symbol(",") {
            if self.is_name("in") || self.is_symbol("=") || self.is_symbol(")") {
                break;
            }
            targets.push(self.target()?);
        }
        Ok(Target::Tuple(targets))
    }

    fn parameters(&mut self) -> Result<Vec<Parameter>, Error> {
        self.expect_symbol("(")?;
        let mut parameters = Vec::new();
        while !self.take_symbol(")") {
            if !parameters.is_empty() {
                self.expect_symbol(",")?;
            }
            let name = self.name()?;
            let default = if self.take_symbol("=") { Some(self.expression()?) } else { None };
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    /// `name(arguments) | ...`.
    fn filters(&mut self) -> Result<Vec<Filter>, Error> {
        let mut filters = vec![self.filter()?];
        while self.take_symbol("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }
}

/// Expressions, from the loosest to the tightest.
impl Parser {
    /// Several with commas between them are a tuple; with `conditional`, `a if b else c` is one.
    fn tuple(&mut self, conditional: bool) -> Result<Expr, Error> {
        let one =
            |this: &mut Self| if conditional { this.expression() } else { this.nested(Self::or) };
        let first = one(self)?;
        if !self.is_symbol(",") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.take_symbol(",") {
            let ends =
                matches!(self.peek(), Token::BlockEnd | Token::PrintEnd | Token::Symbol(")"));
            if ends || self.is_name("if") || self.is_name("recursive") {
                break;
            }
            items.push(one(self)?);
        }
        Ok(Expr::Tuple(items))
    }

    fn expression(&mut self) -> Result<Expr, Error> {
        self.nested(|this| {
            let mut value = this.or()?;
            // `a if b if c` nests to the left.
            let mut n_conditions = 0;
            while this.take_name("if") {
                n_conditions += 1;
                if n_conditions > 1 {
                    return this.fail("a condition follows a condition");
                }
                let test = this.or()?;
                let otherwise =
                    if this.take_name("else") { Some(Box::new(this.expression()?)) } else { None };
                value = Expr::If { test: Box::new(test), then: Box::new(value), otherwise };
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Result<Expr, Error> {
        let first = self.and()?;
        if !self.is_name("or") {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.take_name("or") {
            all.push(self.and()?);
        }
        Ok(Expr::Or(all))
    }

    fn and(&mut self) -> Result<Expr, Error> {
        let first = self.not()?;
        if !self.is_name("and") {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.take_name("and") {
            all.push(self.not()?);
        }
        Ok(Expr::And(all))
    }

    fn not(&mut self) -> Result<Expr, Error> {
        if self.take_name("not") {
            return Ok(Expr::Not(Box::new(self.nested(Self::not)?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Result<Expr, Error> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Token::Symbol("==") => Comparison::Eq,
                Token::Symbol("!=") => Comparison::Ne,
                Token::Symbol("<") => Comparison::Lt,
                Token::Symbol("<=") => Comparison::Le,
                Token::Symbol(">") => Comparison::Gt,
                Token::Symbol(">=") => Comparison::Ge,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not"
                        && matches!(&self.tokens[self.at + 1].0, Token::Name(name) if name == "in") =>
                {
                    self.next();
                    Comparison::NotIn
                }
                _ if rest.is_empty() => return Ok(first),
                _ => return Ok(Expr::Compare(Box::new(first), rest)),
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
    }

    /// Operators of one rank, between what `operand` parses.
    fn binary(
        &mut self,
        operators: &[Operator],
        operand: fn(&mut Self) -> Result<Expr, Error>,
    ) -> Result<Expr, Error> {
        let first = operand(self)?;
        let mut rest = Vec::new();
        while let Some(&operator) =
            operators.iter().find(|operator| self.is_symbol(operator.symbol()))
        {
            self.next();
            rest.push((operator, operand(self)?));
        }
        Ok(if rest.is_empty() { first } else { Expr::Binary(Box::new(first), rest) })
    }

    fn sum(&mut self) -> Result<Expr, Error> {
        self.binary(&[Operator::Add, Operator::Sub], Self::concat)
    }

    fn concat(&mut self) -> Result<Expr, Error> {
        let first = self.product()?;
        if !self.is_symbol("~") {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.take_symbol("~") {
            all.push(self.product()?);
        }
        Ok(Expr::Concat(all))
    }

    fn product(&mut self) -> Result<Expr, Error> {
        let operators = [Operator::Mul, Operator::Div, Operator::FloorDiv, Operator::Rem];
        self.binary(&operators, |this| this.binary(&[Operator::Pow], |this| this.unary(true)))
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr, Error> {
        let value = match self.peek() {
            Token::Symbol(sign @ ("-" | "+")) => {
                let minus = *sign == "-";
                self.next();
                let of = Box::new(self.nested(|this| this.unary(false))?);
                Expr::Signed { minus, of }
            }
            _ => self.primary()?,
        };
        let mut chain = self.postfixes()?;
        if with_filters {
            self.filters_and_tests(&mut chain)?;
        }
        Ok(if chain.is_empty() { value } else { Expr::Postfix(Box::new(value), chain) })
    }

    /// What may stand right behind a value, as often as it does.
    fn postfixes(&mut self) -> Result<Vec<Postfix>, Error> {
        let mut chain = Vec::new();
        while self.is_symbol(".") || self.is_symbol("[") || self.is_symbol("(") {
            chain.push(self.postfix()?);
        }
        Ok(chain)
    }

    fn filters_and_tests(&mut self, chain: &mut Vec<Postfix>) -> Result<(), Error> {
        loop {
            chain.push(if self.take_symbol("|") {
                Postfix::Filter(self.filter()?)
            } else if self.take_name("is") {
                self.test()?
            } else if self.is_symbol("(") {
                Postfix::Call(self.arguments()?)
            } else {
                return Ok(());
            });
        }
    }

    fn primary(&mut self) -> Result<Expr, Error> {
        Ok(match self.next() {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Expr::Const(Value::Bool(true)),
                "false" | "False" => Expr::Const(Value::Bool(false)),
                "none" | "None" => Expr::Const(Value::None),
                "and" | "or" | "if" | "else" | "elif" | "in" | "is" | "not" => {
                    return self.fail(&format!("unexpected '{name}'"));
                }
                name => Expr::Name(name.into()),
            },
            Token::Text(mut text) => {
                while let Token::Text(more) = self.peek() {
                    text.push_str(more);
                    self.next();
                }
                Expr::Const(Value::own(&text))
            }
            Token::Int(n) => Expr::Const(Value::Int(n)),
            Token::Float(x) => Expr::Const(Value::Float(x)),
            Token::Symbol("(") if self.take_symbol(")") => Expr::Tuple(Vec::new()),
            Token::Symbol("(") => {
                let value = self.tuple(true)?;
                self.expect_symbol(")")?;
                value
            }
            Token::Symbol("[") => {
                let mut items = Vec::new();
                while !self.take_symbol("]") {
                    if !items.is_empty() {
                        self.expect_symbol(",")?;
                        if self.take_symbol("]") {
                            break;
                        }
                    }
                    items.push(self.expression()?);
                }
                Expr::List(items)
            }
            Token::Symbol("{") => {
                let mut items = Vec::new();
                while !self.take_symbol("}") {
                    if !items.is_empty() {
                        self.expect_symbol(",")?;
                        if self.take_symbol("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.expect_symbol(":")?;
                    items.push((key, self.expression()?));
                }
                Expr::Dict(items)
            }
            _ => return self.fail("expected a value"),
        })
    }

    /// `.name`, `[...]` or `(...)`.
    fn postfix(&mut self) -> Result<Postfix, Error> {
        if self.is_symbol("(") {
            return Ok(Postfix::Call(self.arguments()?));
        }
        if self.take_symbol(".") {
            return match self.next() {
                Token::Name(name) => Ok(Postfix::Attribute(name.into())),
                Token::Int(n) => Ok(Postfix::Item(Expr::Const(Value::Int(n)))),
                _ => self.fail("expected a name or a number"),
            };
        }
        self.expect_symbol("[")?;
        let mut bounds = [None, None, None];
        let mut n_colons = 0;
        loop {
            if self.take_symbol("]") {
                break;
            } else if self.take_symbol(":") {
                n_colons += 1;
                if n_colons > 2 {
                    return self.fail("a slice has too many parts");
                }
            } else if bounds[n_colons].is_some() {
                return self.fail("expected ']'");
            } else {
                bounds[n_colons] = Some(self.tuple(true)?);
            }
        }
        match (n_colons, bounds) {
            (0, [Some(item), ..]) => Ok(Postfix::Item(item)),
            (0, _) => self.fail("expected a subscript"),
            (_, bounds) => Ok(Postfix::Slice(bounds)),
        }
    }

    fn filter(&mut self) -> Result<Filter, Error> {
        let name = self.dotted()?;
        let arguments = if self.is_symbol("(") { self.arguments()? } else { Arguments::default() };
        Ok(Filter { name, arguments })
    }

    fn dotted(&mut self) -> Result<Arc<str>, Error> {
        let mut name = self.name()?.to_string();
        while self.take_symbol(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name.into())
    }

    fn test(&mut self) -> Result<Postfix, Error> {
        let negated = self.take_name("not");
        let name = self.dotted()?;
        let takes_value = match self.peek() {
            Token::Name(name) => {
                !matches!(name.as_str(), "else" | "or" | "and" | "if" | "in" | "is" | "not")
            }
            Token::Text(_) | Token::Int(_) | Token::Float(_) => true,
            Token::Symbol(symbol) => matches!(*symbol, "[" | "{"),
            _ => false,
        };
        let arguments = if self.is_symbol("(") {
            self.arguments()?
        } else if takes_value {
            let value = self.nested(Self::primary)?;
            let chain = self.postfixes()?;
            let value =
                if chain.is_empty() { value } else { Expr::Postfix(Box::new(value), chain) };
            Arguments { positional: vec![value], ..Arguments::default() }
        } else {
            Arguments::default()
        };
        Ok(Postfix::Test { name, arguments, negated })
    }

    fn arguments(&mut self) -> Result<Arguments, Error> {
        self.expect_symbol("(")?;
        let mut arguments = Arguments::default();
        let mut is_first = true;
        while !self.take_symbol(")") {
            if !std::mem::take(&mut is_first) {
                self.expect_symbol(",")?;
                if self.take_symbol(")") {
                    break;
                }
            }
            if self.take_symbol("**") {
                arguments.dict = Some(Box::new(self.expression()?));
            } else if self.take_symbol("*") {
                arguments.list = Some(Box::new(self.expression()?));
            } else if matches!(self.peek(), Token::Name(_))
                && matches!(self.tokens[self.at + 1].0, Token::Symbol("="))
            {
                let name = self.name()?;
                self.next();
                arguments.named.push((name, self.expression()?));
            } else if arguments.named.is_empty() && arguments.dict.is_none() {
                arguments.positional.push(self.expression()?);
            } else {
                return self.fail("a positional argument follows a named one");
            }
        }
        Ok(arguments)
    }
}
