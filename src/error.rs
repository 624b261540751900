//! Errors by who must act: the client ([`Invalid`]), the client later (busy, loading, draining: see
//! [`SubmitError`](crate::engine::SubmitError)), or the operator ([`incident_id`] leads from an
//! answer to the log).

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};

/// An invalid field of a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// The field's name, if the error is about one field.
    pub param: Option<String>,
    /// What is wrong, with the value and the limit.
    pub message: String,
    /// What clients tell apart.
    pub kind: InvalidKind,
}

/// The kinds of invalid fields that clients handle differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidKind {
    /// A value, or its absence.
    Field,
    /// A prompt that is longer than the context: clients shorten it and try again.
    ContextLength {
        /// The prompt's tokens, or as many as it has at least.
        n_prompt: usize,
        /// Tokens of the context.
        n_ctx: usize,
    },
}

impl Invalid {
    /// Blames `param`.
    pub fn new(param: &str, message: impl Into<String>) -> Self {
        let param = Some(param.to_owned());
        Self { param, message: message.into(), kind: InvalidKind::Field }
    }

    /// A prompt of `n_prompt` tokens, or at least as many, that a context of `n_ctx` cannot hold with
    /// room for an answer. Clients look for the words "maximum context length".
    pub fn too_long(n_ctx: usize, n_prompt: usize, is_exact: bool) -> Self {
        let (most, at_least) = (n_ctx - 1, if is_exact { "" } else { "at least " });
        let message = format!(
            "this model's maximum context length is {n_ctx} tokens, but the prompt has {at_least}{n_prompt} \
             tokens; shorten it to {most} tokens or fewer"
        );
        Self {
            kind: InvalidKind::ContextLength { n_prompt, n_ctx },
            ..Self::new("prompt", message)
        }
    }
}

/// A new id, unique in this process, that names a failure in the answer and in the log.
pub fn incident_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("err-{:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// For messages: a text's beginning, of `n` characters, with dots if there is more.
#[must_use]
pub fn shortened(text: &str, n: usize) -> Cow<'_, str> {
    match text.char_indices().nth(n) {
        Some((end, _)) => format!("{}...", &text[..end]).into(),
        None => text.into(),
    }
}
