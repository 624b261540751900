//! Errors by who must act: the client ([`Invalid`]), the client later (busy, loading, draining: see
//! [`SubmitError`](crate::engine::SubmitError)), or the operator ([`IncidentId`] leads from an answer
//! to the log).

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

/// Identifies a failure in the answer and in the log.
#[derive(Clone, Copy, Debug)]
pub struct IncidentId(u64, u64);

impl IncidentId {
    /// A new id, unique in this process.
    #[allow(clippy::new_without_default)]
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(u64::from(std::process::id()), NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl std::fmt::Display for IncidentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "err-{:x}-{}", self.0, self.1)
    }
}
