//! What a request can be refused with, or can fail with: one status, type and message each.

use std::error::Error;

use hyper::StatusCode;
use hyper::header::{
    ACCEPT_ENCODING, ALLOW, CONNECTION, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE,
};

use super::api::answers::{
    AnyErrorBody, ErrorBody, ErrorDetails, MessagesErrorBody, MessagesErrorDetails,
};
use crate::engine::{Failed, SubmitError};
use crate::error::{Invalid, InvalidKind};
use crate::models::Unavailable;

#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("there is no {0:.100}")]
    NotFound(String),
    #[error("there is no {path:.100}; there are {known}")]
    UnknownPath { path: String, known: String },
    #[error("{path} takes {allow}")]
    MethodNotAllowed { path: &'static str, allow: &'static str },
    #[error("this server does not serve the model {0:.100}")]
    ModelNotFound(String),
    #[error("the model could not be loaded: {0}")]
    ModelFailed(String),
    #[error("this server has its metrics off")]
    MetricsOff,
    #[error("the Host header {0}: HTTP/1.1 asks for one that names this server")]
    InvalidHost(&'static str),
    #[error(
        "this server does not answer to the name {0:.100}: if it is one of its names, set --allowed-hosts (ALLOWED_HOSTS)"
    )]
    HostNotAllowed(String),
    #[error("this needs an API key: send `Authorization: Bearer KEY`")]
    KeyMissing,
    #[error("the API key in Authorization is not known here")]
    KeyUnknown,
    #[error("this key may read /metrics and nothing else")]
    MetricsKey,
    #[error("the body is not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error("the body is compressed, but this server takes only what is not")]
    CompressedBody,
    #[error("the body is larger than {0} bytes")]
    BodyTooLarge(usize),
    #[error("the body could not be read: {0}")]
    BrokenBody(Box<dyn Error + Send + Sync>),
    #[error("the body took too long to arrive")]
    BodyTimeout,
    #[error(
        "this server gives no embeddings: its model's GGUF does not say how they are pooled; start it with --pooling mean, cls or last"
    )]
    NoEmbeddings,
    #[error(transparent)]
    Refused(#[from] SubmitError),
    #[error(
        "the request timed out before its first token; the server may be busy, or timeout_s too short"
    )]
    Deadline,
    #[error("the server is shutting down and takes no new requests")]
    Draining,
    #[error("the model is still loading; GET /ready says when requests are taken")]
    Loading,
    #[error(transparent)]
    Failed(#[from] Failed),
}

impl From<Invalid> for Problem {
    fn from(error: Invalid) -> Self {
        Self::Refused(error.into())
    }
}

impl From<Unavailable> for Problem {
    fn from(why: Unavailable) -> Self {
        match why {
            Unavailable::Unnamed(names) => {
                let message = format!("model is missing; this server has {names}");
                Invalid::new("model", message).into()
            }
            Unavailable::Unknown(name) => Self::ModelNotFound(name),
            Unavailable::Loading => Self::Loading,
            Unavailable::Failed(why) => Self::ModelFailed(why),
            Unavailable::Stopped => SubmitError::Stopped.into(),
            Unavailable::Draining => Self::Draining,
        }
    }
}

/// Whose errors a path answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorShape {
    /// This server's own.
    Own,
    /// OpenAI's.
    OpenAi,
    /// Anthropic's, with the id of the request.
    Anthropic,
}

impl ErrorShape {
    /// Of a path that is no route's.
    pub fn of_unknown(path: &str) -> Self {
        match path {
            _ if path.starts_with("/v1/messages") => Self::Anthropic,
            _ if path.starts_with("/v1") => Self::OpenAi,
            _ => Self::Own,
        }
    }
}

impl Problem {
    /// Status, and `type` of the body or `code` of OpenAI's, whose status of what is invalid is 400,
    /// as it is Anthropic's.
    pub fn status_and_kind(&self, shape: ErrorShape) -> (StatusCode, &'static str) {
        let (status, kind) = match self {
            Self::NotFound(_) | Self::UnknownPath { .. } | Self::MetricsOff => (404, "not_found"),
            Self::MethodNotAllowed { .. } => (405, "method_not_allowed"),
            Self::ModelNotFound(_) => (404, "model_not_found"),
            Self::ModelFailed(_) => (503, "model_failed"),
            Self::KeyMissing | Self::KeyUnknown => (401, "invalid_api_key"),
            Self::InvalidHost(_) => (400, "invalid_host"),
            Self::HostNotAllowed(_) => (403, "host_not_allowed"),
            Self::MetricsKey => (403, "forbidden"),
            Self::CompressedBody => (415, "compressed_body"),
            Self::NotJson(_) => (400, "invalid_json"),
            Self::BodyTooLarge(_) => (413, "body_too_large"),
            Self::BrokenBody(_) => (400, "broken_body"),
            Self::NoEmbeddings => (400, "not_supported"),
            Self::BodyTimeout => (408, "timeout"),
            Self::Refused(SubmitError::Invalid(Invalid { kind, .. }))
                if shape != ErrorShape::Own =>
            {
                match kind {
                    InvalidKind::Field => (400, "invalid_request"),
                    InvalidKind::ContextLength { .. } => (400, "context_length_exceeded"),
                }
            }
            Self::Refused(SubmitError::Invalid(_)) => (422, "invalid_request"),
            Self::Refused(SubmitError::QueueFull { .. }) => (429, "queue_full"),
            Self::Refused(SubmitError::Stopped) => (503, "stopped"),
            Self::Deadline => (408, "deadline"),
            Self::Draining => (503, "draining"),
            Self::Loading => (503, "loading"),
            Self::Failed(_) => (500, "internal_error"),
        };
        (StatusCode::from_u16(status).expect("a status"), kind)
    }

    /// Blames the fields that the body has in place of others: pairs of both names, the engine's or
    /// the chat's first.
    pub fn with_fields_as(mut self, names: &[(&str, &str)]) -> Self {
        if let Self::Refused(SubmitError::Invalid(Invalid { param: Some(param), .. })) = &mut self
            && let Some((_, name)) = names.iter().find(|(other, _)| param == other)
        {
            (*name).clone_into(param);
        }
        self
    }

    pub fn header(&self) -> Option<(HeaderName, &'static str)> {
        match self {
            Self::MethodNotAllowed { allow, .. } => Some((ALLOW, allow)),
            Self::CompressedBody => Some((ACCEPT_ENCODING, "identity")),
            Self::KeyMissing | Self::KeyUnknown => Some((WWW_AUTHENTICATE, "Bearer")),
            // The rest of the body will not come.
            Self::BodyTimeout => Some((CONNECTION, "close")),
            Self::Refused(SubmitError::QueueFull { .. } | SubmitError::Stopped)
            | Self::Draining
            | Self::ModelFailed(_)
            | Self::Loading => Some((RETRY_AFTER, "1")),
            _ => None,
        }
    }

    /// The error as `shape` has it; `id` is the request's.
    pub fn body<'a>(&'a self, shape: ErrorShape, id: &'a str) -> AnyErrorBody<'a> {
        let (status, kind) = self.status_and_kind(shape);
        let invalid = match self {
            Self::Refused(SubmitError::Invalid(error)) => Some(error),
            _ => None,
        };
        if shape == ErrorShape::Anthropic {
            let r#type = anthropic_type(status);
            let message = invalid.map_or_else(|| self.to_string(), anthropic_message);
            let error = MessagesErrorDetails { r#type, message };
            let body = MessagesErrorBody { r#type: "error", error, request_id: id };
            return AnyErrorBody::Anthropic(body);
        }
        let param = invalid.and_then(|error| error.param.as_deref());
        let (n_prompt_tokens, n_ctx) = match invalid.map(|error| error.kind) {
            Some(InvalidKind::ContextLength { n_prompt, n_ctx }) => (Some(n_prompt), Some(n_ctx)),
            _ => (None, None),
        };
        let family = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let (r#type, param, code) = match shape {
            ErrorShape::Own => (kind, param.map(Some), None),
            _ => (family, Some(param), Some(kind)),
        };
        let message = self.to_string();
        let error = ErrorDetails { r#type, message, param, code, n_prompt_tokens, n_ctx };
        AnyErrorBody::Plain(ErrorBody { error })
    }
}

/// Anthropic's name of what a status says.
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        408 | 500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// What is wrong, with the field's name, which has no other place. Claude Code shortens a
/// conversation when it reads "prompt is too long".
fn anthropic_message(error: &Invalid) -> String {
    match (error.kind, &error.param) {
        (InvalidKind::ContextLength { n_prompt, n_ctx }, _) => {
            let most = n_ctx - 1;
            format!("prompt is too long: {n_prompt} tokens > {most} maximum")
        }
        (InvalidKind::Field, Some(param)) if !error.message.contains(param.as_str()) => {
            format!("{param}: {}", error.message)
        }
        (InvalidKind::Field, _) => error.message.clone(),
    }
}
