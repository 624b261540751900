//! Runs a template's syntax tree: its statements here.

mod calls;
mod expressions;

use std::collections::HashMap;
use std::sync::Arc;

use indexmap::IndexMap;
use jiff::Zoned;

use super::ast::{Filter, For, Macro, Node, Target};
use super::error::{Error, MAX_NESTING};
use super::print::print;
use super::text::{Builder, Text};
use super::value::Value;

/// Nodes, expressions and calls of one rendering.
const MAX_STEPS: u64 = 4_000_000;
/// Bytes that one rendering may write, compare and search, for each byte of its variables.
const BYTES_PER_BYTE: usize = 256;
/// And beside those.
const MIN_BYTES: usize = 512 << 20;

const FUNCTIONS: [&str; 5] = ["range", "dict", "namespace", "raise_exception", "strftime_now"];

type Result<T> = std::result::Result<T, Error>;

/// One rendering. Scopes, macros, namespaces and loops are kept here and known by their numbers, so
/// that no value can hold itself.
pub struct Renderer<'t> {
    scopes: Vec<Scope>,
    macros: Vec<(&'t Macro, usize)>,
    namespaces: Vec<IndexMap<Arc<str>, Value>>,
    loops: Vec<LoopState<'t>>,
    /// Some macro remembers a scope, so scopes stay.
    keeps_scopes: bool,
    nesting: usize,
    steps: u64,
    bytes: usize,
    now: &'t Zoned,
}

struct Scope {
    /// The scope around it; the first one's is itself.
    parent: usize,
    variables: HashMap<Arc<str>, Value>,
}

struct LoopState<'t> {
    of: &'t For,
    scope: usize,
    items: Arc<Vec<Value>>,
    index: usize,
    depth: usize,
    /// The arguments of `changed`'s last call.
    changed: Option<Vec<Value>>,
}

/// What follows a node.
#[derive(PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

impl<'t> Renderer<'t> {
    pub fn new(variables: Vec<(Arc<str>, Value)>, now: &'t Zoned) -> Self {
        let weight: usize = variables.iter().map(|(_, value)| value.weight()).sum();
        let functions = FUNCTIONS.map(|name| (name.into(), Value::Function(name)));
        let root = Scope { parent: 0, variables: functions.into_iter().chain(variables).collect() };
        Self {
            scopes: vec![root],
            macros: Vec::new(),
            namespaces: Vec::new(),
            loops: Vec::new(),
            keeps_scopes: false,
            nesting: 0,
            steps: MAX_STEPS,
            bytes: MIN_BYTES.saturating_add(BYTES_PER_BYTE.saturating_mul(weight)),
            now,
        }
    }

    /// What the template prints.
    pub fn render(mut self, nodes: &'t [Node]) -> Result<Text> {
        let mut out = Builder::default();
        self.run(nodes, 0, &mut out)?;
        out.finish()
    }

    fn step(&mut self) -> Result<()> {
        let left = self.steps.checked_sub(1).ok_or_else(|| Error::new("it takes too many steps"));
        self.steps = left?;
        Ok(())
    }

    /// Counts bytes that are written or walked over.
    fn spend(&mut self, bytes: usize) -> Result<()> {
        let left =
            self.bytes.checked_sub(bytes).ok_or_else(|| Error::new("it handles too much text"));
        self.bytes = left?;
        Ok(())
    }

    /// Counts what a new value takes: a list shares its items.
    fn made(&mut self, value: Value) -> Result<Value> {
        self.spend(match &value {
            Value::Text(text) => text.len(),
            Value::List(list) | Value::Tuple(list) => list.items.len() * size_of::<Value>(),
            Value::Dict(dict) => dict.items.len() * 3 * size_of::<Value>(),
            _ => 0,
        })?;
        Ok(value)
    }

    fn nested<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.step()?;
        self.nesting += 1;
        if self.nesting > 4 * MAX_NESTING {
            return Err(Error::new("it is nested too deeply"));
        }
        let result = work(self)?;
        self.nesting -= 1;
        Ok(result)
    }
}

/// Scopes.
impl Renderer<'_> {
    fn open(&mut self, parent: usize) -> Result<usize> {
        if self.keeps_scopes {
            self.spend(1024)?;
        }
        self.scopes.push(Scope { parent, variables: HashMap::new() });
        Ok(self.scopes.len() - 1)
    }

    fn close(&mut self, scope: usize) {
        if !self.keeps_scopes {
            self.scopes.truncate(scope);
        }
    }

    fn set(&mut self, scope: usize, name: &Arc<str>, value: Value) {
        self.scopes[scope].variables.insert(Arc::clone(name), value);
    }

    fn lookup(&self, mut scope: usize, name: &str) -> Value {
        loop {
            if let Some(value) = self.scopes[scope].variables.get(name) {
                return value.clone();
            }
            if scope == 0 {
                return Value::undefined(name);
            }
            scope = self.scopes[scope].parent;
        }
    }

    fn assign(&mut self, target: &Target, value: Value, scope: usize) -> Result<()> {
        match target {
            Target::Name(name) => self.set(scope, name, value),
            Target::Attribute(name, attribute) => match self.lookup(scope, name) {
                Value::Namespace(i) => {
                    self.namespaces[i].insert(Arc::clone(attribute), value);
                }
                _ => return Err(Error::new("cannot assign attribute on non-namespace object")),
            },
            Target::Tuple(targets) => {
                let values = value.iterate()?;
                if values.len() != targets.len() {
                    let (n, wanted) = (values.len(), targets.len());
                    return Err(Error::new(format!("{n} values to unpack, expected {wanted}")));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
            }
        }
        Ok(())
    }
}

/// Statements.
impl<'t> Renderer<'t> {
    fn run(&mut self, nodes: &'t [Node], scope: usize, out: &mut Builder) -> Result<Flow> {
        for node in nodes {
            let flow = self.nested(|this| this.run_node(node, scope, out))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    /// Runs nodes in a scope of their own.
    fn run_inside(&mut self, nodes: &'t [Node], parent: usize, out: &mut Builder) -> Result<Flow> {
        let scope = self.open(parent)?;
        let flow = self.run(nodes, scope, out)?;
        self.close(scope);
        Ok(flow)
    }

    /// What nodes print, after filters.
    fn captured(
        &mut self,
        nodes: &'t [Node],
        filters: &'t [Filter],
        scope: usize,
    ) -> Result<Value> {
        let mut out = Builder::default();
        self.run_inside(nodes, scope, &mut out)?;
        let mut value = self.made(Value::Text(out.finish()?))?;
        for filter in filters {
            let args = self.arguments(&filter.arguments, scope)?;
            value = self.filter(&filter.name, &value, args)?;
        }
        Ok(value)
    }

    fn run_node(&mut self, node: &'t Node, scope: usize, out: &mut Builder) -> Result<Flow> {
        match node {
            Node::Data(text) => print(text, out),
            Node::Print(expr) => {
                let value = self.value(expr, scope)?;
                print(&value, out);
            }
            Node::If { branches, otherwise } => {
                for (test, body) in branches {
                    if self.value(test, scope)?.is_true() {
                        return self.run(body, scope, out);
                    }
                }
                return self.run(otherwise, scope, out);
            }
            Node::For(of) => return self.run_for(of, scope, out),
            Node::Set(target, expr) => {
                let value = self.value(expr, scope)?;
                self.assign(target, value, scope)?;
            }
            Node::SetBlock { target, filters, body } => {
                let value = self.captured(body, filters, scope)?;
                self.assign(target, value, scope)?;
            }
            Node::Macro(name, of) => {
                let value = self.new_macro(of, scope);
                self.set(scope, name, value);
            }
            Node::Call { caller, call } => {
                let caller = self.new_macro(caller, scope);
                let value = self.call_with(call, caller, scope)?;
                print(&value, out);
            }
            Node::FilterBlock { filters, body } => {
                let value = self.captured(body, filters, scope)?;
                print(&value, out);
            }
            Node::With { values, body } => {
                let mut set = Vec::with_capacity(values.len());
                for (target, expr) in values {
                    set.push((target, self.value(expr, scope)?));
                }
                let inner = self.open(scope)?;
                for (target, value) in set {
                    self.assign(target, value, inner)?;
                }
                let flow = self.run(body, inner, out)?;
                self.close(inner);
                return Ok(flow);
            }
            Node::Scope(body) => return self.run_inside(body, scope, out),
            Node::Break => return Ok(Flow::Break),
            Node::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn run_for(&mut self, of: &'t For, scope: usize, out: &mut Builder) -> Result<Flow> {
        let over = self.value(&of.over, scope)?;
        self.run_loop(of, &over, scope, 0, out)
    }

    fn run_loop(
        &mut self,
        of: &'t For,
        over: &Value,
        scope: usize,
        depth: usize,
        out: &mut Builder,
    ) -> Result<Flow> {
        let mut items = over.iterate()?;
        self.spend(items.len() * size_of::<Value>())?;
        if let Some(test) = &of.only_if {
            let mut chosen = Vec::new();
            for item in items {
                let inner = self.open(scope)?;
                self.assign(&of.target, item.clone(), inner)?;
                if self.value(test, inner)?.is_true() {
                    chosen.push(item);
                }
                self.close(inner);
            }
            items = chosen;
        }
        if items.is_empty() {
            return self.run_inside(&of.otherwise, scope, out);
        }
        let items = Arc::new(items);
        let number = self.loops.len();
        self.loops.push(LoopState {
            of,
            scope,
            items: Arc::clone(&items),
            index: 0,
            depth,
            changed: None,
        });
        let name: Arc<str> = "loop".into();
        for (i, item) in items.iter().enumerate() {
            self.loops[number].index = i;
            let inner = self.open(scope)?;
            self.set(inner, &name, Value::Loop(number));
            self.assign(&of.target, item.clone(), inner)?;
            let flow = self.nested(|this| this.run(&of.body, inner, out))?;
            self.close(inner);
            if flow == Flow::Break {
                break;
            }
        }
        self.loops.truncate(number);
        Ok(Flow::Next)
    }
}
