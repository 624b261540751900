//! The bodies of requests and answers, each the type that is read or written and that
//! `/openapi.json` documents.
//!
//! A request's new field is declared in `request_body!` if all dialects have it, else in [`generate`],
//! [`openai`], [`responses`] or [`messages`]. Its doc comment documents it; [`Reader`] takes its default and range from its
//! `schema` attribute. The format `tokens` limits it to the context's size. What other servers know
//! and no body declares is in `foreign`.

pub(crate) mod answers;
pub mod embeddings;
mod fields;
mod foreign;
pub mod generate;
mod history;
pub(crate) mod information;
pub(crate) mod json;
pub(crate) mod message_answers;
pub mod message_blocks;
pub mod messages;
pub mod openai;
pub(crate) mod response_answers;
pub mod response_items;
pub mod responses;
mod shape;
pub(crate) mod usage;
pub mod vocabulary;

use std::collections::BTreeSet;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde_json::{Number, Value, json};
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayItems, Schema, SchemaFormat, SchemaType, Type,
};
use utoipa::openapi::{Object, RefOr};
use utoipa::{Number as Bound, ToSchema};

use crate::error::{Invalid, InvalidKind, shortened};
use embeddings::EmbeddingRequest;
use generate::GenerateRequest;
use messages::{CountRequest, MessagesRequest};
use openai::{ChatRequest, CompletionRequest, TemplateRequest};
use responses::ResponsesRequest;
use shape::Shape;
pub use shape::Unknown;
use vocabulary::{DetokenizeRequest, TokenizeRequest};

/// Paths of ignored fields that are kept of one body.
const MAX_IGNORED: usize = 16;

/// What reads each body.
#[allow(missing_docs)] // their types say it
pub struct Readers {
    pub generate: Reader<GenerateRequest>,
    pub completion: Reader<CompletionRequest>,
    pub chat: Reader<ChatRequest>,
    pub responses: Reader<ResponsesRequest>,
    pub messages: Reader<MessagesRequest>,
    pub count: Reader<CountRequest>,
    pub template: Reader<TemplateRequest>,
    pub embedding: Reader<EmbeddingRequest>,
    pub tokenize: Reader<TokenizeRequest>,
    pub detokenize: Reader<DetokenizeRequest>,
}

impl Readers {
    /// Of a server with contexts of `n_ctx` tokens. Clients of OpenAI and Anthropic may send fields
    /// that nobody knows.
    pub fn new(n_ctx: usize) -> Self {
        Self::with_policy(n_ctx, Unknown::Ignored)
    }

    /// The same; `unknown` is what becomes of fields that nobody knows in the dialects of others.
    /// This server's own refuses them.
    pub fn with_policy(n_ctx: usize, unknown: Unknown) -> Self {
        Self {
            generate: Reader::new(n_ctx, Unknown::Refused),
            completion: Reader::new(n_ctx, unknown),
            chat: Reader::new(n_ctx, unknown),
            responses: Reader::new(n_ctx, unknown),
            messages: Reader::new(n_ctx, unknown),
            count: Reader::new(n_ctx, unknown),
            template: Reader::new(n_ctx, unknown),
            embedding: Reader::new(n_ctx, unknown),
            tokenize: Reader::new(n_ctx, Unknown::Refused),
            detokenize: Reader::new(n_ctx, Unknown::Refused),
        }
    }
}

/// Reads bodies of one type as they are documented.
pub struct Reader<B> {
    /// What is documented, and checked.
    pub schema: Object,
    shape: Shape,
    unknown: Unknown,
    body: PhantomData<fn() -> B>,
}

impl<B: DeserializeOwned + ToSchema> Reader<B> {
    /// A field that has a default may be absent or null; `n_ctx` limits fields that count tokens.
    fn new(n_ctx: usize, unknown: Unknown) -> Self {
        let RefOr::T(Schema::Object(mut schema)) = B::schema() else {
            panic!("a body is a struct")
        };
        for (name, field) in &mut schema.properties {
            let RefOr::T(Schema::Object(field)) = field else { continue };
            if counts_tokens(field) {
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
        let mut parts = Vec::new();
        B::schemas(&mut parts);
        let shape = Shape::of(&schema, &parts);
        if unknown == Unknown::Ignored {
            schema.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(true)));
        }
        Self { schema, shape, unknown, body: PhantomData }
    }

    /// What becomes of fields that nobody knows.
    pub fn unknown(&self) -> Unknown {
        self.unknown
    }

    /// As [`read_noting`](Self::read_noting), and forgets what was ignored.
    pub fn read(&self, body: Value) -> Result<B, Invalid> {
        self.read_noting(body).map(|(body, _)| body)
    }

    /// Reads a body; beside it the paths of fields that nobody knows, which were ignored. Null counts
    /// as absent, 128.0 as an integer. The error names the first field that is unknown, missing, of
    /// the wrong type or out of range.
    pub fn read_noting(&self, mut body: Value) -> Result<(B, BTreeSet<String>), Invalid> {
        if let Value::Object(body) = &mut body {
            body.retain(|_, value| !value.is_null());
        }
        let ignored = self.screen(&mut body)?;
        self.read_known(body).map(|body| (body, ignored))
    }

    /// Takes fields out that the body does not have, and returns the paths of those that nobody
    /// knows; an error where one is not to be ignored.
    fn screen(&self, body: &mut Value) -> Result<BTreeSet<String>, Invalid> {
        let mut ignored = BTreeSet::new();
        self.shape.strip(body, "", &mut |path, value| {
            if foreign::is_ignored(path, value)? {
                return Ok(());
            }
            let path = shortened(path, 64);
            if self.unknown == Unknown::Refused {
                let known: Vec<&str> = self.schema.properties.keys().map(String::as_str).collect();
                let message = format!("unknown field `{path}`; known are {}", known.join(", "));
                return Err(Invalid::new(&path, message));
            }
            if ignored.len() < MAX_IGNORED {
                ignored.insert(path.into_owned());
            }
            Ok(())
        })?;
        Ok(ignored)
    }

    fn read_known(&self, body: Value) -> Result<B, Invalid> {
        let Value::Object(mut body) = body else {
            let message = "the body must be a JSON object".into();
            return Err(Invalid { param: None, message, kind: InvalidKind::Field });
        };
        let fields = &self.schema.properties;
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

/// Whether a field counts tokens, up to the context's size.
fn counts_tokens(field: &Object) -> bool {
    matches!(&field.format, Some(SchemaFormat::Custom(format)) if format == "tokens")
}

fn is_integer(field: &Object) -> bool {
    match &field.schema_type {
        SchemaType::Type(kind) => *kind == Type::Integer,
        SchemaType::Array(kinds) => kinds.contains(&Type::Integer),
        SchemaType::AnyValue => false,
    }
}

/// The integer of 64 bits that a float is, if it is one.
fn whole(number: &Number) -> Option<Number> {
    let n = number.as_f64().filter(|n| number.is_f64() && n.fract() == 0.0)?;
    let end = 2f64.powi(64);
    match n {
        _ if (0.0..end).contains(&n) => Some((n as u64).into()),
        _ if (-end / 2.0..0.0).contains(&n) => Some((n as i64).into()),
        _ => None,
    }
}

/// Checks a value's range or length, and makes an integer of one like 128.0, also in a list. -1, where
/// a count of tokens may be that, becomes the most that there may be. The deserializer checks types.
/// The error is what the value must be.
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
            if n == -1.0 && counts_tokens(field) {
                *number = Number::from(max as u64);
            } else if is_integer(field)
                && let Some(whole) = whole(number)
            {
                *number = whole;
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
            if let ArrayItems::RefOrSchema(item) = &field.items
                && let RefOr::T(item) = &**item
            {
                list.iter_mut().try_for_each(|value| {
                    check(item, value).map_err(|wanted| format!("a list of values, each {wanted}"))
                })?;
            }
        }
        _ => {}
    }
    Ok(())
}
