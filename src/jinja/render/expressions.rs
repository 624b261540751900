//! Expressions.

use std::sync::Arc;

use indexmap::IndexMap;

use super::super::args::Args;
use super::super::ast::{Comparison, Expr, Postfix};
use super::super::error::Error;
use super::super::print::print;
use super::super::text::Builder;
use super::super::value::{Key, Value, item};
use super::super::{checks, filters, methods, ops};
use super::{Renderer, Result};

impl<'t> Renderer<'t> {
    pub(super) fn value(&mut self, expr: &'t Expr, scope: usize) -> Result<Value> {
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
                    if !ops::compare(*comparison, &left, &right)? {
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

    pub(super) fn postfix(
        &mut self,
        mut value: Value,
        chain: &'t [Postfix],
        scope: usize,
    ) -> Result<Value> {
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
        if let Some(found) = item(value, key)? {
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
}
