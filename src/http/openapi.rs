//! `/openapi.json`: what each path takes and answers, as one document that is derived from types.
//!
//! [`api`](super::api) has the bodies, [`routes`] the paths, `REFUSALS` the errors of all of them.

use bytes::Bytes;
use utoipa::OpenApi as _;
use utoipa::openapi::path::Parameter;
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, Schema};

use super::api::Readers;
use super::api::answers::{
    ErrorBody, GenerateAnswer, MessagesErrorBody, OpenAiAnswer, StreamEvent,
};
use super::api::embeddings::{EmbeddingAnswer, EmbeddingRequest};
use super::api::generate::GenerateRequest;
use super::api::information::{
    Health, Information, Loads, ModelEntry, ModelList, ModelLoad, ModelStatus, Props,
};
use super::api::message_answers::{MessageAnswer, TokenCount};
use super::api::message_blocks::SystemBlock;
use super::api::messages::{CountRequest, MessagesRequest};
use super::api::openai::{ChatRequest, CompletionRequest, TemplateRequest};
use super::api::response_answers::ResponseAnswer;
use super::api::responses::ResponsesRequest;
use super::api::vocabulary::{
    DetokenizeAnswer, DetokenizeRequest, TemplateAnswer, TokenizeAnswer, TokenizeRequest,
    TokenizerInformation,
};
use super::auth::Access;
use super::problem::ErrorShape;
use super::routes::ROUTES;

/// The document of a server that reads bodies with `readers`, as JSON.
pub fn json(readers: &Readers) -> Bytes {
    let mut document = Document::openapi();
    add_paths(&mut document);
    let components = document.components.get_or_insert_default();
    let key = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("Where the server asks for keys"));
    components.add_security_scheme("key", SecurityScheme::Http(key.build()));
    for (name, schema) in [
        ("GenerateRequest", &readers.generate.schema),
        ("CompletionRequest", &readers.completion.schema),
        ("ChatRequest", &readers.chat.schema),
        ("ResponsesRequest", &readers.responses.schema),
        ("MessagesRequest", &readers.messages.schema),
        ("CountRequest", &readers.count.schema),
        ("TemplateRequest", &readers.template.schema),
        ("EmbeddingRequest", &readers.embedding.schema),
        ("TokenizeRequest", &readers.tokenize.schema),
        ("DetokenizeRequest", &readers.detokenize.schema),
    ] {
        components.schemas.insert(name.into(), RefOr::T(Schema::Object(schema.clone())));
    }
    document.to_json().expect("utoipa's types have string keys and no failing parts").into()
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "medusa-llama",
        description = "Text from a GGUF model. `/generate` is this server's own dialect, `/v1/messages` Anthropic's, `/v1/...` OpenAI's. Null is a field's \
                       default. `/generate` refuses a field that is not documented; the other dialects refuse one of other servers that \
                       would change the answer, and name others in `x-ignored-fields`."
    ),
    security((), ("key" = [])), // a bearer token, for servers that ask for one
    components(schemas(
        ChatRequest,
        CompletionRequest,
        CountRequest,
        DetokenizeAnswer,
        DetokenizeRequest,
        EmbeddingAnswer,
        EmbeddingRequest,
        ErrorBody,
        GenerateAnswer,
        GenerateRequest,
        Health,
        Information,
        Loads,
        MessageAnswer,
        MessagesErrorBody,
        MessagesRequest,
        ModelEntry,
        ModelList,
        ModelLoad,
        ModelStatus,
        OpenAiAnswer,
        Props,
        ResponseAnswer,
        ResponsesRequest,
        StreamEvent,
        SystemBlock,
        TemplateAnswer,
        TemplateRequest,
        TokenCount,
        TokenizeAnswer,
        TokenizeRequest,
        TokenizerInformation,
    ))
)]
struct Document;

/// Which operations: `Keyed` where keys are set, `Posts` have a body, `Models` are about one of several
/// models, `Own` are that in this server's dialect.
enum Of {
    All,
    Keyed,
    Posts,
    Models,
    Own,
}

/// Errors: status, the operations that can answer with it, and why.
const REFUSALS: [(u16, Of, &str); 17] = [
    (
        400,
        Of::Posts,
        "The body is not JSON, or could not be read, or `Host` is missing or invalid; in OpenAI's and Anthropic's dialects also: a field or \
         prompt cannot be served",
    ),
    (400, Of::All, "`Host` is missing or invalid"),
    (401, Of::Keyed, "The server asks for a key, and there is none or a wrong one"),
    (
        403,
        Of::Keyed,
        "The key does not allow this, or the server does not answer to the name in `Host`",
    ),
    (403, Of::All, "The server does not answer to the name in `Host`"),
    (404, Of::Models, "The server has several models, and none of this name"),
    (405, Of::All, "The path takes other methods, which `Allow` names"),
    (
        408,
        Of::Posts,
        "The body took too long to arrive, or the request's time was over before its first token",
    ),
    (408, Of::Models, "The request's time was over before its model was loaded"),
    (413, Of::Posts, "The body is too large"),
    (414, Of::All, "The path is too long"),
    (415, Of::Posts, "The body is compressed"),
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
    (503, Of::Keyed, "The model still loads or could not be loaded, or the server shuts down"),
];

/// Adds each route's operation, with the [`REFUSALS`] that it can answer with.
fn add_paths(document: &mut OpenApi) {
    for route in ROUTES.iter() {
        let (methods, mut operation) = (route.operation)();
        let has_body = operation.request_body.is_some();
        let is_model = |of: &RefOr<Parameter>| matches!(of, RefOr::T(Parameter { name, .. }) if name == "model");
        let is_of_model = has_body || operation.parameters.iter().flatten().any(is_model);
        for (status, of, why) in REFUSALS {
            let applies = match of {
                Of::All => true,
                Of::Keyed => {
                    route.access == Access::Key && (is_of_model || route.errors != ErrorShape::Own)
                }
                Of::Posts => has_body,
                Of::Models => is_of_model,
                Of::Own => is_of_model && route.errors == ErrorShape::Own,
            };
            if applies {
                let known = &mut operation.responses.responses;
                known
                    .entry(status.to_string())
                    .or_insert_with(|| refusal(status, why, route.errors).into());
            }
        }
        document.paths.add_path_operation(&route.path, methods, operation);
    }
}

fn refusal(status: u16, why: &str, errors: ErrorShape) -> Response {
    let response = ResponseBuilder::new().description(why);
    if matches!(status, 414 | 431) {
        return response.build(); // hyper's own answers have no body
    }
    let schema = Ref::from_schema_name(match errors {
        ErrorShape::Own | ErrorShape::OpenAi => "ErrorBody",
        ErrorShape::Anthropic => "MessagesErrorBody",
    });
    response.content("application/json", ContentBuilder::new().schema(Some(schema)).build()).build()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::chat::{Template, Vocabulary};
    use crate::error::Invalid;
    use crate::http::api::Readers;

    const N_CTX: usize = 2048;

    fn read_one(schema: &str, body: Value) -> Result<String, Invalid> {
        let readers = Readers::new(N_CTX);
        let template = Template::new("{{ messages }}".into(), Vocabulary::default());
        let choices = match schema {
            "GenerateRequest" => {
                let request = readers.generate.read(body)?.into_request(1, &template)?;
                return Ok(format!("{request:?}"));
            }
            "CompletionRequest" => readers.completion.read(body)?.into_choices(N_CTX, 1)?,
            "MessagesRequest" => readers.messages.read(body)?.into_choices(N_CTX, 1, &template)?,
            "ResponsesRequest" => {
                readers.responses.read(body)?.into_choices(N_CTX, 1, &template)?
            }
            _ => readers.chat.read(body)?.into_choices(N_CTX, 1, &template)?,
        };
        Ok(format!("{choices:?}"))
    }

    /// Code generators stop at a reference to what is not there.
    #[test]
    fn references_lead_somewhere() {
        fn check(value: &Value, document: &Value) {
            if let Some(to) = value.get("$ref").and_then(Value::as_str) {
                assert!(document.pointer(to.trim_start_matches('#')).is_some(), "{to}");
            }
            let parts = value.as_object().into_iter().flat_map(|object| object.values());
            let parts = parts.chain(value.as_array().into_iter().flatten());
            parts.for_each(|part| check(part, document));
        }
        let document = serde_json::from_slice(&super::json(&Readers::new(N_CTX))).unwrap();
        check(&document, &document);
    }

    /// Each field's example and default can be sent, its null is its absence, and what is beyond
    /// its range or no field is refused by name.
    #[test]
    fn bodies_are_read_as_documented() {
        let document: Value = serde_json::from_slice(&super::json(&Readers::new(N_CTX))).unwrap();
        let schemas = &document["components"]["schemas"];
        let message = json!({ "role": "user", "content": "x" });
        for (name, base) in [
            ("GenerateRequest", json!({ "prompt": "x" })),
            ("CompletionRequest", json!({ "prompt": "x" })),
            ("ChatRequest", json!({ "messages": [message] })),
            ("MessagesRequest", json!({ "messages": [message], "max_tokens": 9 })),
            ("ResponsesRequest", json!({ "input": "x" })),
        ] {
            let with = |field: &str, value: &Value| {
                let mut body = base.clone();
                body[field] = value.clone();
                read_one(name, body)
            };
            let plain = read_one(name, base.clone()).unwrap();
            let schema = &schemas[name];
            let is_open = name != "GenerateRequest";
            assert_eq!(schema["additionalProperties"], is_open, "{name}");
            match with("zzz", &json!(1)) {
                Ok(found) => assert!(is_open && found == plain, "{name}"),
                Err(error) => assert!(!is_open && error.param.as_deref() == Some("zzz"), "{name}"),
            }
            let required = schema["required"].as_array().unwrap();
            let n_required = base.as_object().unwrap().len();
            assert_eq!(required.len(), n_required, "{name}: {required:?}");
            for (field, about) in schema["properties"].as_object().unwrap() {
                let at = format!("{name}.{field}");
                assert!(about["description"].is_string() || about.get("oneOf").is_some(), "{at}");
                if required.contains(&json!(field)) {
                    assert_eq!(
                        with(field, &Value::Null).unwrap_err().param.as_deref(),
                        Some(field.as_str())
                    );
                } else {
                    assert_eq!(with(field, &Value::Null).unwrap(), plain, "{at}");
                }
                if let Some(default) = about.get("default") {
                    assert_eq!(with(field, default).unwrap(), plain, "{at}");
                }
                if let Some(example) = about.get("example").or(about["examples"].get(0)) {
                    assert!(with(field, example).is_ok(), "{at}: {example}");
                }
                for (end, beyond) in [("minimum", -1.0), ("maximum", 1.0)] {
                    let Some(at_end) = about[end].as_f64() else { continue };
                    // What else these ask of the body no range says.
                    let is_free = !["n", "top_logprobs", "min_tokens"].contains(&field.as_str());
                    assert!(with(field, &about[end]).is_ok() || !is_free, "{at} {end}");
                    let error = with(field, &json!(at_end + beyond)).unwrap_err();
                    assert_eq!(error.param.as_deref(), Some(field.as_str()), "{at} {end}");
                }
            }
        }
    }
}
