//! The bodies of requests and answers. Each field is declared once: its type is what is read or
//! written, and what `/openapi.json` documents.
//!
//! A new field of a request is one field of its body: in `request_body!` if all dialects have it,
//! else in [`generate`] or [`openai`]. Its doc comment is its documentation; [`read`] takes its
//! default and its range from its `schema` attribute. The format `tokens` makes the context's size
//! its maximum. Each body turns itself into the engine's [`Request`](crate::request::Request)s.

pub mod answers;
mod fields;
pub mod generate;
pub mod openai;

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::{Number, Value};
use utoipa::openapi::schema::{Schema, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{Object, RefOr};
use utoipa::{Number as Bound, ToSchema};

use crate::error::Invalid;

/// Integers that JSON numbers hold exactly.
const MAX_SAFE: f64 = ((1u64 << 53) - 1) as f64;

/// The body of a request.
pub trait Body: DeserializeOwned + ToSchema {
    /// Its schema, made once: [`describe`] of the type.
    fn described() -> &'static Object;
}

/// Reads a body as it is documented: null counts as absent, 128.0 as a whole number. `n_ctx` is the
/// maximum of fields that count tokens.
///
/// # Errors
/// [`Invalid`] names the first field that is unknown, missing, of the wrong type or out of range.
pub fn read<B: Body>(body: Value, n_ctx: usize) -> Result<B, Invalid> {
    let Value::Object(mut body) = body else {
        return Err(Invalid { param: None, message: "the body must be a JSON object".into() });
    };
    body.retain(|_, value| !value.is_null());
    let schema = B::described();
    if let Some(name) = body.keys().find(|name| !schema.properties.contains_key(*name)) {
        let known: Vec<&str> = schema.properties.keys().map(String::as_str).collect();
        let (name, known) = (shortened(name, 64), known.join(", "));
        return Err(Invalid::new(&name, format!("unknown field `{name}`; known are {known}")));
    }
    if let Some(name) = schema.required.iter().find(|name| !body.contains_key(*name)) {
        return Err(Invalid::new(name, format!("{name} is missing")));
    }
    for (name, field) in &schema.properties {
        let RefOr::T(field) = field else { continue };
        if let Some(value) = body.get_mut(name) {
            check(field, value, n_ctx).map_err(|wanted| {
                let shown = shortened(&value.to_string(), 60).into_owned();
                Invalid::new(name, format!("{name} is {shown}; it must be {wanted}"))
            })?;
        } else if let Schema::Object(Object { default: Some(default), .. }) = field {
            let mut default = default.clone();
            limit(field, &mut default, n_ctx);
            body.insert(name.clone(), default);
        }
    }
    serde_path_to_error::deserialize(Value::Object(body)).map_err(|error| {
        let (name, why) = (error.path().to_string(), error.inner().to_string());
        let (name, why) = (shortened(&name, 64), shortened(&why, 400));
        Invalid::new(&name, format!("{name} is invalid: {why}"))
    })
}

/// A text's beginning, with dots if there is more.
fn shortened(text: &str, n: usize) -> Cow<'_, str> {
    text.char_indices()
        .nth(n)
        .map_or_else(|| text.into(), |(end, _)| format!("{}...", &text[..end]).into())
}

/// Checks a value's range, or its number of characters or items, and makes a whole number of one
/// like 128.0. Types are left to the deserializer. The error is what the value must be.
fn check(field: &Schema, value: &mut Value, n_ctx: usize) -> Result<(), String> {
    match (field, value) {
        (Schema::Object(field), Value::Number(number)) => {
            let n = number.as_f64().unwrap_or(f64::NAN);
            let (min, max) = range(field, n_ctx);
            if !(min..=max).contains(&n) {
                return Err(if max.is_finite() {
                    format!("a number from {min} to {max}")
                } else {
                    format!("a number of at least {min}")
                });
            }
            if is_whole(field) && number.is_f64() && n.fract() == 0.0 && n.abs() <= MAX_SAFE {
                *number = Number::from(n as i64);
            }
        }
        (Schema::Object(Object { max_length: Some(max), .. }), Value::String(text))
            if text.len() > *max =>
        {
            return Err(at_most(*max, "characters"));
        }
        (Schema::Array(field), Value::Array(list)) => {
            if field.max_items.is_some_and(|max| list.len() > max) {
                return Err(at_most(field.max_items.unwrap_or(0), "items"));
            }
            if field.min_items.is_some_and(|min| list.len() < min) {
                return Err(format!("a list of at least {}", field.min_items.unwrap_or(0)));
            }
        }
        _ => {}
    }
    Ok(())
}

fn at_most(max: usize, of: &str) -> String {
    match max {
        0 => "empty: it is not supported".into(),
        max => format!("of at most {max} {of}"),
    }
}

fn is_whole(field: &Object) -> bool {
    match &field.schema_type {
        SchemaType::Type(kind) => *kind == Type::Integer,
        SchemaType::Array(kinds) => kinds.contains(&Type::Integer),
        SchemaType::AnyValue => false,
    }
}

/// The least and the greatest number that a field takes.
fn range(field: &Object, n_ctx: usize) -> (f64, f64) {
    let number = |bound: &Bound| match *bound {
        Bound::Int(n) => n as f64,
        Bound::UInt(n) => n as f64,
        Bound::Float(n) => n,
    };
    let max = if counts_tokens(field) {
        n_ctx as f64
    } else {
        field.maximum.as_ref().map_or(f64::INFINITY, number)
    };
    (field.minimum.as_ref().map_or(f64::NEG_INFINITY, number), max)
}

fn counts_tokens(field: &Object) -> bool {
    matches!(&field.format, Some(SchemaFormat::Custom(format)) if format == "tokens")
}

/// Lowers a number of tokens to the context's size.
fn limit(field: &Schema, shown: &mut Value, n_ctx: usize) {
    let Schema::Object(field) = field else { return };
    if counts_tokens(field) && shown.as_u64().is_some_and(|n| n > n_ctx as u64) {
        *shown = n_ctx.into();
    }
}

/// The schema of a body: a field that has a default may be absent or null.
///
/// # Panics
/// If the type is no struct.
#[must_use]
pub fn describe<B: ToSchema>() -> Object {
    let RefOr::T(Schema::Object(mut body)) = B::schema() else { panic!("a body is a struct") };
    for (name, field) in &mut body.properties {
        let RefOr::T(Schema::Object(field)) = field else { continue };
        if field.default.is_some() {
            body.required.retain(|required| required != name);
            if let SchemaType::Type(kind) = &field.schema_type {
                field.schema_type = SchemaType::Array(vec![kind.clone(), Type::Null]);
            }
        }
    }
    body
}

/// The schema of a body with the context's size written down, as it is published.
#[must_use]
pub fn published<B: Body>(n_ctx: usize) -> Object {
    let mut body = B::described().clone();
    for field in body.properties.values_mut() {
        let RefOr::T(schema) = field else { continue };
        let whole = schema.clone();
        let Schema::Object(field) = schema else { continue };
        if counts_tokens(field) {
            field.maximum = Some(n_ctx.into());
            for shown in [&mut field.default, &mut field.example].into_iter().flatten() {
                limit(&whole, shown, n_ctx);
            }
        }
    }
    body
}
