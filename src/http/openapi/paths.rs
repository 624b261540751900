//! The paths, as documented: each function stands for one, and nobody calls it.
//! [`routes`](crate::http::routes) does the work.
#![allow(dead_code)]

use crate::http::api::answers::{
    GenerateAnswer, Health, Information, Models, OpenAiAnswer, Problem, StreamEvent,
};
use crate::http::api::generate::GenerateRequest;
use crate::http::api::openai::{ChatRequest, CompletionRequest};

/// What is served
///
/// Version, model, sizes and load; for browsers, which prefer HTML, a page.
#[utoipa::path(get, path = "/", tag = "server", responses(
    (status = 200, description = "What is served", content((Information = "application/json"), (String = "text/html; charset=utf-8"))),
    (status = 304, description = "The page is as the client has it"),
    (status = 401, description = "The server asks for a key, and there is none or a wrong one", body = Problem),
    (status = 403, description = "The key does not allow this", body = Problem),
))]
pub fn information() {}

/// Whether the server is alive
#[utoipa::path(get, path = "/health", tag = "server", responses(
    (status = 200, description = "It is: `ok`, `loading` or `draining`", body = Health),
    (status = 503, description = "Its engine has `failed`", body = Health),
))]
pub fn health() {}

/// Whether requests are taken
#[utoipa::path(get, path = "/ready", tag = "server", responses(
    (status = 200, description = "They are", body = Health),
    (status = 503, description = "Not yet, or no more: `loading`, `draining` or `failed`; `Retry-After` says when to ask again", body = Health),
))]
pub fn ready() {}

/// Metrics for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "server", responses(
    (status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8"),
    (status = 401, description = "The server asks for a key, and there is none or a wrong one", body = Problem),
    (status = 404, description = "Metrics are off", body = Problem),
))]
pub fn metrics() {}

/// Text from a prompt
#[utoipa::path(post, path = "/generate", tag = "text", request_body = GenerateRequest, responses(
    (status = 200, description = "The text. A stream has events `{\"generated_text\": piece}`, and a last one like the whole answer; an \
     error behind the first piece is an `event: error`", content(
        (GenerateAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub fn generate() {}

/// The served model
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, description = "A list of one", body = Models)))]
pub fn models() {}

/// Text from prompts, as OpenAI has it
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest, responses(
    (status = 200, description = "The texts, or a stream of chunks that ends with `data: [DONE]`", content(
        (OpenAiAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub fn complete() {}

/// Answers to messages, as OpenAI has it
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest, responses(
    (status = 200, description = "The answers, or a stream of chunks that ends with `data: [DONE]`", content(
        (OpenAiAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub fn chat() {}

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "server", responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub fn document_path() {}

/// This document as a page to read and try
#[utoipa::path(get, path = "/docs", tag = "server", responses((status = 200, description = "Swagger UI", body = String, content_type = "text/html")))]
pub fn docs() {}

/// What the page loads
#[utoipa::path(get, path = "/docs/{file}", tag = "server", params(("file" = String, Path, example = "swagger-ui.css")), responses(
    (status = 200, description = "The file", content((String = "text/css"), (String = "text/javascript"), (String = "text/html"), (String = "image/png"))),
    (status = 404, description = "There is no such file", body = Problem),
))]
pub fn docs_file() {}

/// What the page for browsers loads
#[utoipa::path(get, path = "/page/{file}", tag = "server", params(("file" = String, Path, example = "page.css")), responses(
    (status = 200, description = "The file", content((String = "text/css; charset=utf-8"), (String = "text/javascript; charset=utf-8"), (String = "image/svg+xml"))),
    (status = 304, description = "The file is as the client has it"),
    (status = 401, description = "There is no such file, and no key to be told so", body = Problem),
    (status = 404, description = "There is no such file", body = Problem),
))]
pub fn page_file() {}
