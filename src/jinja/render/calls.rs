//! Calls: of macros, functions, methods and loops.

use std::sync::Arc;

use indexmap::IndexMap;
use jiff::fmt::strtime;

use super::super::args::Args;
use super::super::ast::{Arguments, Expr, Macro, Postfix};
use super::super::error::Error;
use super::super::methods;
use super::super::print::text_of;
use super::super::text::Builder;
use super::super::value::{Key, Value};
use super::{Renderer, Result};

/// The most numbers of a range, as in Jinja2's sandbox.
const MAX_RANGE: i128 = 100_000;

impl<'t> Renderer<'t> {
    pub(super) fn new_macro(&mut self, of: &'t Macro, scope: usize) -> Value {
        self.keeps_scopes |= scope > 0;
        self.macros.push((of, scope));
        Value::Macro(self.macros.len() - 1)
    }

    /// Calls what the last part of `call` calls, with `caller` among its arguments.
    pub(super) fn call_with(
        &mut self,
        call: &'t Expr,
        caller: Value,
        scope: usize,
    ) -> Result<Value> {
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

    pub(super) fn arguments(&mut self, arguments: &'t Arguments, scope: usize) -> Result<Args> {
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

    pub(super) fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
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
