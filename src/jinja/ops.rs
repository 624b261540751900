//! Python's operators on values.

use super::ast::{Comparison, Operator};
use super::error::{Error, MAX_ITEMS, MAX_TEXT_BYTES};
use super::format::percent;
use super::text::{Builder, Text};
use super::value::Value;

/// `a operator b`.
pub fn binary(operator: Operator, a: &Value, b: &Value) -> Result<Value, Error> {
    match (operator, a, b) {
        (Operator::Add, Value::Text(x), Value::Text(y)) => {
            Text::joined(&[x.clone(), y.clone()]).map(Value::Text)
        }
        (Operator::Add, Value::List(x), Value::List(y)) => {
            Value::list([&x.items[..], &y.items[..]].concat())
        }
        (Operator::Add, Value::Tuple(x), Value::Tuple(y)) => {
            Value::tuple([&x.items[..], &y.items[..]].concat())
        }
        (Operator::Mul, Value::Text(_) | Value::List(_) | Value::Tuple(_), _) => repeat(a, b),
        (Operator::Mul, _, Value::Text(_) | Value::List(_) | Value::Tuple(_)) => repeat(b, a),
        (Operator::Rem, Value::Text(text), value) => {
            let value = if text.is_html() { escaped(value)? } else { value.clone() };
            let made = percent(text, &value)?;
            Ok(Value::Text(if text.is_html() { made.into_html() } else { made }))
        }
        _ => {
            let result = match (a.as_int(), b.as_int()) {
                (Some(x), Some(y)) => integers(operator, x, y)?,
                _ => match (a.as_float(), b.as_float()) {
                    (Some(x), Some(y)) => Some(floats(operator, x, y)?),
                    _ => None,
                },
            };
            result.ok_or_else(|| {
                let (a, b, operator) = (a.kind(), b.kind(), operator.symbol());
                Error::new(format!("unsupported operand type(s) for {operator}: '{a}' and '{b}'"))
            })
        }
    }
}

/// The texts in a value to format, escaped.
fn escaped(value: &Value) -> Result<Value, Error> {
    match value {
        Value::Text(text) => text.escaped().map(Value::Text),
        Value::Tuple(list) => {
            Value::tuple(list.items.iter().map(escaped).collect::<Result<_, _>>()?)
        }
        value => Ok(value.clone()),
    }
}

fn repeat(value: &Value, n: &Value) -> Result<Value, Error> {
    let n = n.as_int().ok_or_else(|| {
        Error::new(format!("can't multiply sequence by non-int of type '{}'", n.kind()))
    })?;
    let n = usize::try_from(n.max(0)).unwrap_or(usize::MAX);
    match value {
        Value::Text(text) => {
            if text.len().saturating_mul(n) > MAX_TEXT_BYTES {
                return Err(Error::new("a repeated text is too long"));
            }
            text.repeated(n).map(Value::Text)
        }
        Value::List(list) | Value::Tuple(list) => {
            if list.items.len().saturating_mul(n) > MAX_ITEMS {
                return Err(Error::new("a repeated list is too long"));
            }
            let items: Vec<Value> =
                list.items.iter().cycle().take(list.items.len() * n).cloned().collect();
            if matches!(value, Value::List(_)) { Value::list(items) } else { Value::tuple(items) }
        }
        _ => Err(Error::new("this cannot be repeated")),
    }
}

fn zero() -> Error {
    Error::new("division by zero")
}

fn integers(operator: Operator, a: i128, b: i128) -> Result<Option<Value>, Error> {
    let result = match operator {
        Operator::Add => a.checked_add(b),
        Operator::Sub => a.checked_sub(b),
        Operator::Mul => a.checked_mul(b),
        Operator::Div | Operator::FloorDiv | Operator::Rem if b == 0 => return Err(zero()),
        Operator::Div => return Ok(Some(Value::Float(a as f64 / b as f64))),
        // Rounded down; the remainder has the divisor's sign.
        Operator::FloorDiv => {
            a.checked_div(b).map(|q| if a % b != 0 && (a < 0) != (b < 0) { q - 1 } else { q })
        }
        Operator::Rem => {
            a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r })
        }
        Operator::Pow if b < 0 => return floats(operator, a as f64, b as f64).map(Some),
        Operator::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
    };
    result.map(|n| Some(Value::Int(n))).ok_or_else(|| Error::new("an integer is too large"))
}

fn floats(operator: Operator, a: f64, b: f64) -> Result<Value, Error> {
    let rem = |a: f64, b: f64| {
        let r = a % b;
        if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
    };
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Sub => a - b,
        Operator::Mul => a * b,
        Operator::Div | Operator::FloorDiv | Operator::Rem if b == 0.0 => return Err(zero()),
        Operator::Pow if a == 0.0 && b < 0.0 => return Err(zero()),
        Operator::Div => a / b,
        Operator::FloorDiv => ((a - rem(a, b)) / b).round(),
        Operator::Rem => rem(a, b),
        Operator::Pow => a.powf(b),
    }))
}

/// Whether a comparison holds.
pub fn compare(comparison: Comparison, a: &Value, b: &Value) -> Result<bool, Error> {
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

/// `-value` or `+value`.
pub fn signed(value: &Value, minus: bool) -> Result<Value, Error> {
    match (value.as_int(), value.as_float()) {
        (Some(n), _) => Ok(Value::Int(if minus { n.wrapping_neg() } else { n })),
        (None, Some(x)) => Ok(Value::Float(if minus { -x } else { x })),
        (None, None) => {
            Err(Error::new(format!("bad operand type for unary -: '{}'", value.kind())))
        }
    }
}

/// `value[from:to:step]`.
pub fn slice(value: &Value, bounds: [Option<Value>; 3]) -> Result<Value, Error> {
    let mut numbers = [None; 3];
    for (number, bound) in numbers.iter_mut().zip(&bounds) {
        *number = match bound {
            None | Some(Value::None) => None,
            Some(value) => Some(value.as_int().ok_or_else(|| {
                Error::new("slice indices must be integers or None or have an __index__ method")
            })?),
        };
    }
    match value {
        Value::List(list) => Value::list(picked(&list.items, numbers)?),
        Value::Tuple(list) => Value::tuple(picked(&list.items, numbers)?),
        Value::Text(text) if matches!(numbers[2], None | Some(1)) => {
            let n = text.chars().count();
            let (from, to, _) = span(numbers, n)?;
            let byte =
                |i: i128| text.char_indices().nth(i as usize).map_or(text.len(), |(at, _)| at);
            let (from, to) = (byte(from), byte(to));
            Ok(Value::Text(text.slice(from..to.max(from))))
        }
        Value::Text(text) => {
            let mut out = Builder::default();
            picked(&text.chars_of(), numbers)?.iter().for_each(|c| out.push(c));
            out.finish().map(Value::Text)
        }
        Value::Undefined(name) => Err(Error::new(format!("'{name}' is undefined"))),
        value => Err(Error::new(format!("'{}' object is not subscriptable", value.kind()))),
    }
}

fn picked<T: Clone>(items: &[T], numbers: [Option<i128>; 3]) -> Result<Vec<T>, Error> {
    let (from, to, step) = span(numbers, items.len())?;
    let mut out = Vec::new();
    let mut i = from;
    while if step > 0 { i < to } else { i > to } {
        out.push(items[i as usize].clone());
        i = i.saturating_add(step);
    }
    Ok(out)
}

/// Where a slice of `n` items begins and ends, and its step.
fn span(numbers: [Option<i128>; 3], n: usize) -> Result<(i128, i128, i128), Error> {
    let n = n as i128;
    let step = numbers[2].unwrap_or(1);
    if step == 0 {
        return Err(Error::new("slice step cannot be zero"));
    }
    let (least, most) = if step > 0 { (0, n) } else { (-1, n - 1) };
    let bound = |given: Option<i128>, default| match given {
        None => default,
        Some(i) if i < 0 => i.saturating_add(n).max(least),
        Some(i) => i.min(most),
    };
    let (first, last) = if step > 0 { (least, most) } else { (most, least) };
    Ok((bound(numbers[0], first), bound(numbers[1], last), step))
}
