//! Jinja2's tests: what may follow `is`.

use super::args::Args;
use super::ast::Comparison;
use super::error::Error;
use super::ops::compare;
use super::text::Text;
use super::value::Value;

/// `value is name(args)`, but for the tests that ask the renderer.
pub fn check(name: &str, value: &Value, args: Args) -> Result<bool, Error> {
    let comparison = match name {
        "eq" | "==" | "equalto" => Some(Comparison::Eq),
        "ne" | "!=" => Some(Comparison::Ne),
        "lt" | "<" | "lessthan" => Some(Comparison::Lt),
        "le" | "<=" => Some(Comparison::Le),
        "gt" | ">" | "greaterthan" => Some(Comparison::Gt),
        "ge" | ">=" => Some(Comparison::Ge),
        "in" => Some(Comparison::In),
        _ => None,
    };
    if let Some(comparison) = comparison {
        let [other] = args.bind(["other"])?;
        return compare(comparison, value, &other.unwrap_or(Value::None));
    }
    let int = || {
        let n = value.as_int();
        n.ok_or_else(|| Error::new(format!("{name} takes an integer, not {}", value.kind())))
    };
    Ok(match name {
        "boolean" => matches!(value, Value::Bool(_)),
        "callable" => matches!(
            value,
            Value::Function(_)
                | Value::Method(_)
                | Value::Macro(_)
                | Value::Loop(_)
                | Value::Undefined(_)
        ),
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "divisibleby" => {
            let [num] = args.bind(["num"])?;
            let num = num.and_then(|num| num.as_int()).filter(|&num| num != 0);
            int()?.checked_rem(num.ok_or_else(|| Error::new("divisibleby takes a number"))?)
                == Some(0)
        }
        "escaped" => value.as_text().is_some_and(Text::is_html),
        "even" => int()? % 2 == 0,
        "odd" => int()? % 2 != 0,
        "false" => matches!(value, Value::Bool(false)),
        "true" => matches!(value, Value::Bool(true)),
        "float" => matches!(value, Value::Float(_)),
        "integer" => matches!(value, Value::Int(_)),
        "number" => value.as_float().is_some(),
        // Undefined values are empty sequences; a dictionary has a length and items.
        "iterable" | "sequence" => matches!(
            value,
            Value::Undefined(_)
                | Value::Text(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
        ),
        "lower" | "upper" => {
            let text = super::print::text_of(value)?;
            let cased = text.chars().any(|c| c.is_lowercase() || c.is_uppercase());
            let other = if name == "lower" { char::is_uppercase } else { char::is_lowercase };
            cased && !text.chars().any(other)
        }
        "mapping" => matches!(value, Value::Dict(_)),
        "none" => matches!(value, Value::None),
        "sameas" => {
            let [other] = args.bind(["other"])?;
            let other = other.unwrap_or(Value::None);
            value.kind() == other.kind() && *value == other
        }
        "string" => matches!(value, Value::Text(_)),
        _ => return Err(Error::new(format!("No test named '{name}'."))),
    })
}
