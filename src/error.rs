//! Errors by who must act: the client ([`Invalid`]), the client later (busy, loading, draining: see
//! [`SubmitError`](crate::engine::SubmitError)), or the operator ([`incident_id`] leads from an
//! answer to the log).

use std::sync::atomic::{AtomicU64, Ordering};

/// An invalid field of a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// The field's name, if the error is about one field.
    pub param: Option<String>,
    /// What is wrong, with the value and the limit.
    pub message: String,
}

impl Invalid {
    /// Blames `param`.
    pub fn new(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), message: message.into() }
    }
}

/// A new id, unique in this process, that names a failure in the answer and in the log.
pub fn incident_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("err-{:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
