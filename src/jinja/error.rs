//! Errors, and the limits that all parts keep.

/// Brackets and blocks in each other; lists and dictionaries in each other; a macro's calls of
/// itself, and all that they nest.
pub(super) const MAX_NESTING: usize = 200;
/// Bytes of one text.
pub(super) const MAX_TEXT_BYTES: usize = 64 << 20;
/// Items of one list that the template makes.
pub(super) const MAX_ITEMS: usize = 1 << 20;

/// Why a template cannot be read, or rendered with some values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}
