//! `/openapi.json`: what each path takes and answers, as one document that is derived from types.
//!
//! [`requests`] and [`answers`] describe bodies, `paths` the paths, `REFUSALS` the errors of all of
//! them. Nothing of it is used to read or write: tests keep both sides the same, here for requests
//! and in `tests/openapi.rs` for answers.

pub mod answers;
mod paths;
pub mod requests;

use answers::{OpenAiProblem, Problem};
use bytes::Bytes;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, Schema};
use utoipa::{Modify, OpenApi as _};

/// The document of a server with contexts of `n_ctx` tokens, as JSON.
#[must_use]
pub fn json(n_ctx: usize) -> Bytes {
    let mut document = Document::openapi();
    limit(&mut document, n_ctx);
    document.to_json().expect("utoipa's types have string keys and no failing parts").into()
}

/// Fields of requests that the context's size bounds.
const BOUNDED: [&str; 3] = ["max_tokens", "max_completion_tokens", "repeat_last_n"];

/// Writes the context's size down as the maximum of what it bounds.
fn limit(document: &mut OpenApi, n_ctx: usize) {
    for schema in
        document.components.iter_mut().flat_map(|components| components.schemas.values_mut())
    {
        let RefOr::T(Schema::Object(body)) = schema else { continue };
        for (_, field) in
            body.properties.iter_mut().filter(|(name, _)| BOUNDED.contains(&name.as_str()))
        {
            let RefOr::T(Schema::Object(field)) = field else { continue };
            field.maximum = Some(n_ctx.into());
            for shown in [&mut field.default, &mut field.example].into_iter().flatten() {
                if shown.as_u64().is_some_and(|n| n > n_ctx as u64) {
                    *shown = n_ctx.into();
                }
            }
        }
    }
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "medusa-llama",
        description = "Text from a GGUF model. `/generate` is this server's own dialect, `/v1/...` OpenAI's. A field that is not \
                       documented is refused, null is a field's default."
    ),
    paths(paths::information, paths::health, paths::ready, paths::metrics, paths::generate, paths::models, paths::complete, paths::chat, paths::document_path, paths::docs, paths::docs_file, paths::page_file),
    components(schemas(Problem, OpenAiProblem)),
    modifiers(&Refusals, &Keys)
)]
struct Document;

/// Which operations.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    /// All.
    All,
    /// Those that need the engine.
    Engine,
    /// Those of them that have a body.
    Posts,
    /// Those of these in this server's own dialect.
    Own,
}

/// Errors: status, where they come from, and why.
const REFUSALS: [(u16, Of, &str); 12] = [
    (
        400,
        Of::Posts,
        "The body is not JSON, or could not be read; in OpenAI's dialect also: a field or prompt cannot be served",
    ),
    (401, Of::Engine, "The server asks for a key, and there is none or a wrong one"),
    (403, Of::Engine, "The key does not allow this"),
    (405, Of::All, "The path takes other methods, which `Allow` names"),
    (
        408,
        Of::Posts,
        "The body took too long to arrive, or the request's time was over before its first token",
    ),
    (413, Of::Posts, "The body is too large"),
    (414, Of::All, "The path is too long"),
    (422, Of::Own, "A field or prompt cannot be served; `param` names it"),
    (
        429,
        Of::Posts,
        "As many requests as may run or wait do so already; `Retry-After` says when to try again",
    ),
    (431, Of::All, "The request's head is too large"),
    (
        500,
        Of::Posts,
        "The engine failed on this request; the log has the cause under the id in the message",
    ),
    (503, Of::Engine, "The model still loads, or the server shuts down"),
];

/// Adds [`REFUSALS`] to every operation that they can come from.
struct Refusals;

impl Modify for Refusals {
    fn modify(&self, document: &mut OpenApi) {
        for (path, item) in &mut document.paths.paths {
            let is_openai = path.starts_with("/v1");
            for operation in operations(item) {
                let has_body = operation.request_body.is_some();
                for (status, of, why) in REFUSALS {
                    let applies = match of {
                        Of::All => true,
                        Of::Engine => has_body || is_openai,
                        Of::Posts => has_body,
                        Of::Own => has_body && !is_openai,
                    };
                    if applies {
                        let known = &mut operation.responses.responses;
                        known
                            .entry(status.to_string())
                            .or_insert_with(|| refusal(status, why, is_openai).into());
                    }
                }
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post].into_iter().flatten()
}

/// What the network's library refuses by itself has no body.
fn refusal(status: u16, why: &str, is_openai: bool) -> Response {
    let response = ResponseBuilder::new().description(why);
    if matches!(status, 414 | 431) {
        return response.build();
    }
    let schema = Ref::from_schema_name(if is_openai { "OpenAiProblem" } else { "Problem" });
    response.content("application/json", ContentBuilder::new().schema(Some(schema)).build()).build()
}

/// A key as a bearer token, for servers that ask for one.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("Where the server asks for keys"));
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(scheme.build()));
        let nothing: [&str; 0] = [];
        document.security =
            Some(vec![SecurityRequirement::default(), SecurityRequirement::new("key", nothing)]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Map, Value, json};

    use crate::chat::Template;
    use crate::error::Invalid;
    use crate::http::openai::Endpoint;
    use crate::http::{generate, openai};

    /// A documented body, a request with the fields that must be there, and what reads it: to
    /// something that tells requests apart.
    struct Dialect {
        schema: &'static str,
        base: Value,
        read: fn(Value) -> Result<String, Invalid>,
    }

    const N_CTX: usize = 2048;

    fn read_openai(endpoint: Endpoint, body: Value) -> Result<String, Invalid> {
        let template = Template::new("{{ messages }}".into(), String::new(), String::new(), false);
        openai::read::read(endpoint, body, N_CTX, 1, &template).map(|asked| format!("{asked:?}"))
    }

    fn dialects() -> [Dialect; 3] {
        let read = |body| generate::read(body, N_CTX, 1).map(|read| format!("{read:?}"));
        let message = json!({ "role": "user", "content": "x" });
        [
            Dialect { schema: "GenerateRequest", base: json!({ "prompt": "x" }), read },
            Dialect {
                schema: "CompletionRequest",
                base: json!({ "prompt": "x" }),
                read: |b| read_openai(Endpoint::Text, b),
            },
            Dialect {
                schema: "ChatRequest",
                base: json!({ "messages": [message] }),
                read: |b| read_openai(Endpoint::Chat, b),
            },
        ]
    }

    fn schema(name: &str) -> Value {
        serde_json::from_slice::<Value>(&super::json(N_CTX)).unwrap()["components"]["schemas"][name]
            .clone()
    }

    fn with(base: &Value, name: &str, value: &Value) -> Value {
        let mut body = base.clone();
        body[name] = value.clone();
        body
    }

    /// A field's example, or its type's.
    fn example(about: &Map<String, Value>) -> Option<Value> {
        let own = about.get("$ref").or_else(|| about.get("oneOf")?.get(0)?.get("$ref"));
        let of_type = || {
            Some(schema(own?.as_str()?.rsplit('/').next()?)["example"].clone())
                .filter(|v| !v.is_null())
        };
        about.get("example").or_else(|| about.get("examples")?.get(0)).cloned().or_else(of_type)
    }

    /// The error about an unknown field names those that were asked for.
    #[test]
    fn the_readers_know_the_documented_fields_and_no_others() {
        for Dialect { schema: name, base, read } in dialects() {
            let error = read(with(&base, "surely_unknown", &json!(1))).unwrap_err().message;
            let known: BTreeSet<&str> =
                error.split_once("known are ").unwrap().1.split(", ").collect();
            let schema = schema(name);
            let documented: BTreeSet<&str> =
                schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(documented, known, "{name}");
            assert_eq!(schema["additionalProperties"], false, "{name}");
        }
    }

    #[test]
    fn documented_defaults_examples_and_ranges_are_the_readers() {
        for Dialect { schema: name, base, read } in dialects() {
            let schema = schema(name);
            let required: Vec<&str> =
                schema["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
            for (field, about) in schema["properties"].as_object().unwrap() {
                let about: &Map<String, Value> = about.as_object().unwrap();
                let read_one =
                    |value: &Value| read(with(&with(&base, "stream", &json!(true)), field, value));
                if required.contains(&field.as_str()) {
                    read(with(&base, field, &Value::Null)).expect_err(field);
                } else {
                    assert_eq!(
                        read(with(&base, field, &Value::Null)).unwrap(),
                        read(base.clone()).unwrap(),
                        "{name}.{field}"
                    );
                }
                match (about.get("default"), example(about)) {
                    (Some(default), _) => {
                        assert_eq!(
                            read(with(&base, field, default)).unwrap(),
                            read(base.clone()).unwrap(),
                            "{name}.{field}"
                        )
                    }
                    (None, Some(example)) => assert!(read_one(&example).is_ok(), "{name}.{field}"),
                    (None, None) => panic!("{name}.{field} has neither default nor example"),
                }
                if about.get("type").is_some_and(|kinds| !kinds.to_string().contains("object")) {
                    assert!(
                        read_one(&json!({})).is_err(),
                        "{name}.{field} takes more than its type"
                    );
                }
                if about.get("format").is_some_and(|format| format == "int64")
                    && !about.contains_key("maximum")
                {
                    assert!(
                        read_one(&json!(u64::MAX)).is_err(),
                        "{name}.{field} takes more than its format"
                    );
                }
                for (end, beyond) in [("minimum", -1.0), ("maximum", 1.0)] {
                    let Some(at) = about.get(end) else {
                        continue;
                    };
                    // What else these ask of the body no range says.
                    let is_free = !["n", "top_logprobs"].contains(&field.as_str());
                    assert!(read_one(at).is_ok() || !is_free, "{name}.{field} {end}");
                    assert!(
                        read_one(&json!(at.as_f64().unwrap() + beyond)).is_err(),
                        "{name}.{field} beyond {end}"
                    );
                }
            }
        }
    }

    #[test]
    fn drafts_have_their_documented_names() {
        let documented = schema("Speculation")["enum"].clone();
        assert_eq!(documented, json!(crate::request::Speculation::NAMES.map(|(name, _)| name)));
    }
}
