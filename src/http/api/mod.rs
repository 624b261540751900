//! The bodies of requests and answers, each the type that is read or written and that
//! `/openapi.json` documents.
//!
//! A request's new field is declared in `request_body!` if all dialects have it, else in [`generate`]
//! or [`openai`]. Its doc comment documents it; [`Reader`] takes its default and range from its
//! `schema` attribute. The format `tokens` limits it to the context's size.

pub(crate) mod answers;
mod fields;
pub mod generate;
pub mod openai;
pub mod vocabulary;

use std::borrow::Cow;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde_json::{Number, Value, json};
use utoipa::openapi::schema::{Schema, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{Object, RefOr};
use utoipa::{Number as Bound, ToSchema};

use crate::error::Invalid;
use generate::GenerateRequest;
use openai::{ChatRequest, CompletionRequest};
use vocabulary::{DetokenizeRequest, TokenizeRequest};

/// Integers that JSON numbers hold exactly.
const MAX_SAFE: f64 = ((1u64 << 53) - 1) as f64;

/// What reads each body.
#[allow(missing_docs)] // their types say it
pub struct Readers {
    pub generate: Reader<GenerateRequest>,
    pub completion: Reader<CompletionRequest>,
    pub chat: Reader<ChatRequest>,
    pub tokenize: Reader<TokenizeRequest>,
    pub detokenize: Reader<DetokenizeRequest>,
}

impl Readers {
    /// Of a server with contexts of `n_ctx` tokens.
    pub fn new(n_ctx: usize) -> Self {
        Self {
            generate: Reader::new(n_ctx),
            completion: Reader::new(n_ctx),
            chat: Reader::new(n_ctx),
            tokenize: Reader::new(n_ctx),
            detokenize: Reader::new(n_ctx),
        }
    }
}

/// Reads bodies of one type as they are documented.
pub struct Reader<B> {
    /// What is documented, and checked.
    pub schema: Object,
    body: PhantomData<fn() -> B>,
}

impl<B: DeserializeOwned + ToSchema> Reader<B> {
    /// A field that has a default may be absent or null; `n_ctx` limits fields that count tokens.
    fn new(n_ctx: usize) -> Self {
        let RefOr::T(Schema::Object(mut schema)) = B::schema() else {
            panic!("a body is a struct")
        };
        for (name, field) in &mut schema.properties {
            let RefOr::T(Schema::Object(field)) = field else { continue };
            if matches!(&field.format, Some(SchemaFormat::Custom(format)) if format == "tokens") {
                field.maximum = Some(n_ctx.into());
                let shown = [&mut field.default, &mut field.example].into_iter().flatten();
                shown.for_each(|n| *n = n.as_u64().map_or(n_ctx, |n| n_ctx.min(n as usize)).into());
            }
            if field.default.is_some() {
                schema.required.retain(|required| required != name);
                if let SchemaType::Type(kind) = &field.schema_type {
                    field.schema_type = SchemaType::Array(vec![kind.clone(), Type::Null]);
                }
            }
        }
        Self { schema, body: PhantomData }
    }

    /// Reads a body. Null counts as absent, 128.0 as an integer. The error names the first field
    /// that is unknown, missing, of the wrong type or out of range.
    pub fn read(&self, body: Value) -> Result<B, Invalid> {
        let Value::Object(mut body) = body else {
            return Err(Invalid { param: None, message: "the body must be a JSON object".into() });
        };
        body.retain(|_, value| !value.is_null());
        let fields = &self.schema.properties;
        if let Some(name) = body.keys().find(|name| !fields.contains_key(*name)) {
            let known: Vec<&str> = fields.keys().map(String::as_str).collect();
            let (name, known) = (shortened(name, 64), known.join(", "));
            return Err(Invalid::new(&name, format!("unknown field `{name}`; known are {known}")));
        }
        if let Some(name) = self.schema.required.iter().find(|name| !body.contains_key(*name)) {
            return Err(Invalid::new(name, format!("{name} is missing")));
        }
        for (name, field) in fields {
            let RefOr::T(field) = field else { continue };
            if let Some(value) = body.get_mut(name) {
                check(field, value).map_err(|wanted| {
                    let shown = shortened(&value.to_string(), 60).into_owned();
                    Invalid::new(name, format!("{name} is {shown}; it must be {wanted}"))
                })?;
            } else if let Schema::Object(Object { default: Some(default), .. }) = field {
                body.insert(name.clone(), default.clone());
            }
        }
        serde_path_to_error::deserialize(Value::Object(body)).map_err(|error| {
            let (name, why) = (error.path().to_string(), error.inner().to_string());
            let (name, why) = (shortened(&name, 64), shortened(&why, 400));
            Invalid::new(&name, format!("{name} is invalid: {why}"))
        })
    }
}

/// A text's beginning, with dots if there is more.
fn shortened(text: &str, n: usize) -> Cow<'_, str> {
    match text.char_indices().nth(n) {
        Some((end, _)) => format!("{}...", &text[..end]).into(),
        None => text.into(),
    }
}

/// Checks a value's range or length, and makes an integer of one like 128.0. The deserializer checks
/// types. The error is what the value must be.
fn check(field: &Schema, value: &mut Value) -> Result<(), String> {
    let unsupported = "empty: it is not supported";
    match (field, value) {
        (Schema::Object(field), Value::Number(number)) => {
            let n = number.as_f64().unwrap_or(f64::NAN);
            let bound = |n: &Option<Bound>| json!(n).as_f64();
            let min = bound(&field.minimum).unwrap_or(f64::MIN);
            let max = bound(&field.maximum).unwrap_or(f64::MAX);
            if !(min..=max).contains(&n) {
                let end = if max < f64::MAX { format!(" to {max}") } else { String::new() };
                return Err(format!("a number from {min}{end}"));
            }
            let is_whole = match &field.schema_type {
                SchemaType::Type(kind) => *kind == Type::Integer,
                SchemaType::Array(kinds) => kinds.contains(&Type::Integer),
                SchemaType::AnyValue => false,
            };
            if is_whole && number.is_f64() && n.fract() == 0.0 && n.abs() <= MAX_SAFE {
                *number = Number::from(n as i64);
            }
        }
        (Schema::Object(field), Value::String(text)) => match field.max_length {
            Some(0) if !text.is_empty() => return Err(unsupported.into()),
            Some(max) if text.len() > max => return Err(format!("of at most {max} bytes")),
            _ if text.len() < field.min_length.unwrap_or(0) => return Err("not empty".into()),
            _ => {}
        },
        (Schema::Array(field), Value::Array(list)) => {
            let (min, max) = (field.min_items.unwrap_or(0), field.max_items.unwrap_or(usize::MAX));
            match list.len() {
                n if n < min => return Err(format!("a list of at least {min}")),
                n if n > max && max == 0 => return Err(unsupported.into()),
                n if n > max => return Err(format!("a list of at most {max}")),
                _ => {}
            }
        }
        _ => {}
    }
    Ok(())
}
