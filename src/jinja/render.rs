//! Runs a template's syntax tree.

use std::collections::HashMap;
use std::sync::Arc;

use indexmap::IndexMap;
use jiff::Zoned;
use jiff::fmt::strtime;

use super::ast::{Arguments, Comparison, Expr, Filter, For, Macro, Node, Postfix, Target};
use super::print::{print, text_of};
use super::text::{Builder, Text};
use super::value::{Key, Value};
use super::{Args, Error, MAX_NESTING, checks, filters, methods, ops};

/// Nodes, expressions and calls of one rendering.
const MAX_STEPS: u64 = 4_000_000;
/// Bytes that one rendering may write, compare and search, for each byte of its variables.
const BYTES_PER_BYTE: usize = 256;
/// And beside those.
const MIN_BYTES: usize = 512 << 20;
/// The most numbers of a range, as in Jinja2's sandbox.
const MAX_RANGE: i128 = 100_000;

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

/// Whether a comparison holds.
pub fn compare(comparison: Comparison, a: &Value, b: &Value) -> Result<bool> {
    Ok(match comparison {
        Comparison::Eq => a == b,
        Comparison::Ne => a != b,
        Comparison::In => b.contains(a)?,
        Comparison::NotIn => !b.contains(a)?,
        ordered => {
            let order = a.compare(b)?;
            match ordered {
                Comparison::Lt => order.is_lt(),
                Comparison::Le => order.is_le(),
                Comparison::Gt => order.is_gt(),
                _ => order.is_ge(),
            }
        }
    })
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

/// Macros and calls.
impl<'t> Renderer<'t> {
    fn new_macro(&mut self, of: &'t Macro, scope: usize) -> Value {
        self.keeps_scopes |= scope > 0;
        self.macros.push((of, scope));
        Value::Macro(self.macros.len() - 1)
    }

    /// Calls what the last part of `call` calls, with `caller` among its arguments.
    fn call_with(&mut self, call: &'t Expr, caller: Value, scope: usize) -> Result<Value> {
        let Expr::Postfix(first, chain) = call else { return Err(Error::new("this is no call")) };
        let Some((Postfix::Call(arguments), before)) = chain.split_last() else {
            return Err(Error::new("this is no call"));
        };
        let value = self.value(first, scope)?;
        let callee = self.postfix(value, before, scope)?;
        let mut args = self.arguments(arguments, scope)?;
        args.named.push(("caller".into(), caller));
        self.call(&callee, args)
    }

    fn arguments(&mut self, arguments: &'t Arguments, scope: usize) -> Result<Args> {
        let mut args = Args::default();
        for expr in &arguments.positional {
            args.positional.push(self.value(expr, scope)?);
        }
        for (name, expr) in &arguments.named {
            args.named.push((Arc::clone(name), self.value(expr, scope)?));
        }
        if let Some(expr) = &arguments.list {
            args.positional.extend(self.value(expr, scope)?.iterate()?);
        }
        if let Some(expr) = &arguments.dict {
            let Value::Dict(dict) = self.value(expr, scope)? else {
                return Err(Error::new("argument after ** must be a mapping"));
            };
            for (key, value) in &dict.items {
                let name =
                    key.value().as_text().ok_or_else(|| Error::new("keywords must be strings"))?;
                args.named.push(((**name).into(), value.clone()));
            }
        }
        Ok(args)
    }

    fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
        self.nested(|this| {
            let value = match callee {
                Value::Macro(i) => this.call_macro(*i, args)?,
                Value::Function(name) => this.call_function(name, args)?,
                Value::Method(method) => match method.0 {
                    Value::Loop(i) => this.call_loop_method(i, &method.1, args)?,
                    // `get` looks a key up; all else walks over the value.
                    _ => {
                        this.spend(if *method.1 == *"get" { 0 } else { method.0.weight() })?;
                        methods::call(&method.0, &method.1, args)?
                    }
                },
                Value::Loop(i) => this.call_loop(*i, args)?,
                Value::Undefined(name) => return Err(Error::new(format!("'{name}' is undefined"))),
                value => {
                    return Err(Error::new(format!("'{}' object is not callable", value.kind())));
                }
            };
            this.made(value)
        })
    }

    fn call_macro(&mut self, number: usize, mut args: Args) -> Result<Value> {
        let (of, defined_in) = self.macros[number];
        let scope = self.open(defined_in)?;
        let mut positional = std::mem::take(&mut args.positional).into_iter();
        for (name, default) in &of.parameters {
            let named = args.named.iter().position(|(given, _)| given == name);
            let value = match (positional.next(), named, default) {
                (Some(_), Some(_), _) => {
                    return Err(Error::new(format!("got multiple values for argument '{name}'")));
                }
                (Some(value), None, _) => value,
                (None, Some(i), _) => args.named.swap_remove(i).1,
                (None, None, Some(default)) => self.value(default, scope)?,
                (None, None, None) => Value::undefined(name),
            };
            self.set(scope, name, value);
        }
        if let Some(i) = args.named.iter().position(|(name, _)| **name == *"caller") {
            let caller = args.named.swap_remove(i).1;
            self.set(scope, &"caller".into(), caller);
        }
        self.set(scope, &"varargs".into(), Value::tuple(positional.collect())?);
        let kwargs =
            args.named.into_iter().map(|(name, value)| Ok((Key::new(Value::own(&name))?, value)));
        self.set(scope, &"kwargs".into(), Value::dict(kwargs.collect::<Result<_>>()?)?);
        let mut out = Builder::default();
        self.run(&of.body, scope, &mut out)?;
        self.close(scope);
        out.finish().map(Value::Text)
    }

    /// A loop's call of itself with the items of the next level.
    fn call_loop(&mut self, number: usize, args: Args) -> Result<Value> {
        let [over] = args.bind(["iterable"])?;
        let state = self.loops.get(number).ok_or_else(|| Error::new("the loop is over"))?;
        let (of, scope, depth) = (state.of, state.scope, state.depth + 1);
        let mut out = Builder::default();
        self.run_loop(of, &over.unwrap_or(Value::None), scope, depth, &mut out)?;
        out.finish().map(Value::Text)
    }

    fn call_function(&mut self, name: &str, args: Args) -> Result<Value> {
        match name {
            "range" => range(&args.positional),
            "dict" | "namespace" => {
                let mut items = IndexMap::new();
                for value in args.positional {
                    match value {
                        Value::Dict(dict) => items.extend(dict.items.clone()),
                        pairs => {
                            for pair in pairs.iterate()? {
                                let [key, value] = <[Value; 2]>::try_from(pair.iterate()?)
                                    .map_err(|_| {
                                        Error::new("dict takes pairs of keys and values")
                                    })?;
                                items.insert(Key::new(key)?, value);
                            }
                        }
                    }
                }
                for (name, value) in args.named {
                    items.insert(Key::new(Value::own(&name))?, value);
                }
                if name == "dict" {
                    return Value::dict(items);
                }
                self.spend(1024)?;
                let named = |(key, value): (Key, Value)| {
                    Some((Arc::from(&**key.value().as_text()?), value))
                };
                self.namespaces.push(items.into_iter().filter_map(named).collect());
                Ok(Value::Namespace(self.namespaces.len() - 1))
            }
            "raise_exception" => {
                let [message] = args.bind(["message"])?;
                Err(Error::new(text_of(&message.unwrap_or(Value::None))?.to_string()))
            }
            _ => {
                let [format] = args.bind(["format"])?;
                let format = text_of(&format.unwrap_or(Value::None))?;
                let time = strtime::format(&*format, self.now);
                let time = time.map_err(|error| Error::new(format!("strftime_now: {error}")))?;
                Ok(Value::own(&time))
            }
        }
    }
}

fn range(args: &[Value]) -> Result<Value> {
    let int = |value: &Value| {
        value
            .as_int()
            .ok_or_else(|| Error::new(format!("range takes integers, not {}", value.kind())))
    };
    let (from, to, step) = match args {
        [to] => (0, int(to)?, 1),
        [from, to] => (int(from)?, int(to)?, 1),
        [from, to, step] => (int(from)?, int(to)?, int(step)?),
        _ => return Err(Error::new("range takes one to three integers")),
    };
    if step == 0 {
        return Err(Error::new("range() arg 3 must not be zero"));
    }
    let span = if step > 0 { to.saturating_sub(from) } else { from.saturating_sub(to) };
    let n =
        span.max(0) / step.saturating_abs() + i128::from(span.max(0) % step.saturating_abs() > 0);
    if n > MAX_RANGE {
        return Err(Error::new(format!(
            "Range too big. The sandbox blocks ranges larger than {MAX_RANGE}"
        )));
    }
    Value::list((0..n).map(|i| Value::Int(from + i * step)).collect())
}

/// Expressions.
impl<'t> Renderer<'t> {
    fn value(&mut self, expr: &'t Expr, scope: usize) -> Result<Value> {
        match expr {
            Expr::Const(value) => Ok(value.clone()),
            Expr::Name(name) => {
                self.step()?;
                Ok(self.lookup(scope, name))
            }
            expr => self.nested(|this| this.compound(expr, scope)),
        }
    }

    fn all(&mut self, exprs: &'t [Expr], scope: usize) -> Result<Vec<Value>> {
        exprs.iter().map(|expr| self.value(expr, scope)).collect()
    }

    fn compound(&mut self, expr: &'t Expr, scope: usize) -> Result<Value> {
        match expr {
            Expr::Const(_) | Expr::Name(_) => self.value(expr, scope),
            Expr::List(items) => {
                let items = self.all(items, scope)?;
                self.made(Value::list(items)?)
            }
            Expr::Tuple(items) => {
                let items = self.all(items, scope)?;
                self.made(Value::tuple(items)?)
            }
            Expr::Dict(items) => {
                let mut dict = IndexMap::new();
                for (key, value) in items {
                    dict.insert(Key::new(self.value(key, scope)?)?, self.value(value, scope)?);
                }
                self.made(Value::dict(dict)?)
            }
            Expr::Binary(first, rest) => {
                let mut value = self.value(first, scope)?;
                for (operator, operand) in rest {
                    let operand = self.value(operand, scope)?;
                    let made = ops::binary(*operator, &value, &operand)?;
                    value = self.made(made)?;
                }
                Ok(value)
            }
            Expr::Concat(exprs) => {
                let mut out = Builder::default();
                for value in self.all(exprs, scope)? {
                    print(&value, &mut out);
                }
                let text = out.finish()?;
                self.made(Value::Text(text))
            }
            Expr::Compare(first, rest) => {
                let mut left = self.value(first, scope)?;
                for (comparison, right) in rest {
                    let right = self.value(right, scope)?;
                    self.spend(left.weight().min(right.weight()))?;
                    if matches!(comparison, Comparison::In | Comparison::NotIn) {
                        self.spend(right.weight())?;
                    }
                    if !compare(*comparison, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::And(exprs) | Expr::Or(exprs) => {
                let decides = matches!(expr, Expr::Or(_));
                let (last, before) =
                    exprs.split_last().ok_or_else(|| Error::new("nothing to decide"))?;
                for expr in before {
                    let value = self.value(expr, scope)?;
                    if value.is_true() == decides {
                        return Ok(value);
                    }
                }
                self.value(last, scope)
            }
            Expr::Not(of) => Ok(Value::Bool(!self.value(of, scope)?.is_true())),
            Expr::Signed { minus, of } => ops::signed(&self.value(of, scope)?, *minus),
            Expr::If { test, then, otherwise } => {
                if self.value(test, scope)?.is_true() {
                    return self.value(then, scope);
                }
                match otherwise {
                    Some(expr) => self.value(expr, scope),
                    None => Ok(Value::undefined("the value of a condition without else")),
                }
            }
            Expr::Postfix(first, chain) => {
                let value = self.value(first, scope)?;
                self.postfix(value, chain, scope)
            }
        }
    }

    fn postfix(&mut self, mut value: Value, chain: &'t [Postfix], scope: usize) -> Result<Value> {
        for part in chain {
            self.step()?;
            value = match part {
                Postfix::Attribute(name) => self.attribute(&value, name)?,
                Postfix::Item(expr) => {
                    let key = self.value(expr, scope)?;
                    self.item(&value, &key)?
                }
                Postfix::Slice(exprs) => {
                    let mut bounds = [const { None }; 3];
                    for (bound, expr) in bounds.iter_mut().zip(exprs) {
                        *bound = expr.as_ref().map(|expr| self.value(expr, scope)).transpose()?;
                    }
                    let slice = ops::slice(&value, bounds)?;
                    self.made(slice)?
                }
                Postfix::Call(arguments) => {
                    let args = self.arguments(arguments, scope)?;
                    self.call(&value, args)?
                }
                Postfix::Filter(filter) => {
                    let args = self.arguments(&filter.arguments, scope)?;
                    self.filter(&filter.name, &value, args)?
                }
                Postfix::Test { name, arguments, negated } => {
                    let args = self.arguments(arguments, scope)?;
                    Value::Bool(self.test(name, &value, args)? != *negated)
                }
            };
        }
        Ok(value)
    }

    /// `value | name(args)`.
    pub fn filter(&mut self, name: &str, value: &Value, args: Args) -> Result<Value> {
        self.nested(|this| {
            // Some only look at a value, but the most walk over all of it.
            if !matches!(
                name,
                "default" | "d" | "length" | "count" | "first" | "last" | "items" | "list"
            ) {
                this.spend(value.weight())?;
            }
            let made = filters::filter(this, name, value, args)?;
            this.made(made)
        })
    }

    /// `value is name(args)`.
    pub fn test(&mut self, name: &str, value: &Value, args: Args) -> Result<bool> {
        self.step()?;
        self.spend(args.positional.iter().map(Value::weight).sum())?;
        checks::check(name, value, args)
    }

    /// `value.name`: a method, or else an item.
    pub fn attribute(&mut self, value: &Value, name: &str) -> Result<Value> {
        let found = match value {
            Value::Undefined(of) => return Err(Error::new(format!("'{of}' is undefined"))),
            Value::Namespace(i) => self.namespaces[*i].get(name).cloned(),
            Value::Loop(i) => self.of_loop(*i, name),
            Value::Dict(dict) => {
                methods::method(value, name).or_else(|| dict.items.get(name).cloned())
            }
            value => methods::method(value, name),
        };
        Ok(found.unwrap_or_else(|| Value::undefined(name)))
    }

    /// `value[key]`: an item, or else a method.
    pub fn item(&mut self, value: &Value, key: &Value) -> Result<Value> {
        if let Some(found) = ops::item(value, key)? {
            return Ok(found);
        }
        match key {
            Value::Text(name) => self.attribute(value, name),
            _ => Ok(Value::undefined("an item")),
        }
    }

    fn of_loop(&self, number: usize, name: &str) -> Option<Value> {
        let state = self.loops.get(number)?;
        let (i, n) = (state.index, state.items.len());
        let int = |n: usize| Some(Value::Int(n as i128));
        match name {
            "index" => int(i + 1),
            "index0" => int(i),
            "revindex" => int(n - i),
            "revindex0" => int(n - 1 - i),
            "first" => Some(Value::Bool(i == 0)),
            "last" => Some(Value::Bool(i + 1 == n)),
            "length" => int(n),
            "depth" => int(state.depth + 1),
            "depth0" => int(state.depth),
            "previtem" => i.checked_sub(1).map(|i| state.items[i].clone()),
            "nextitem" => state.items.get(i + 1).cloned(),
            "cycle" | "changed" => {
                Some(Value::Method(Arc::new((Value::Loop(number), name.into()))))
            }
            _ => None,
        }
    }

    /// `loop.cycle(...)` and `loop.changed(...)`.
    fn call_loop_method(&mut self, number: usize, name: &str, args: Args) -> Result<Value> {
        let state = self.loops.get_mut(number).ok_or_else(|| Error::new("the loop is over"))?;
        if name == "changed" {
            let has_changed = state.changed.as_ref() != Some(&args.positional);
            state.changed = Some(args.positional);
            return Ok(Value::Bool(has_changed));
        }
        let n = args.positional.len().max(1);
        let chosen = args.positional.into_iter().nth(state.index % n);
        chosen.ok_or_else(|| Error::new("no items for cycling given"))
    }
}
