//! OpenAI's dialect: `/v1/completions` and `/v1/chat/completions`, to checked requests and back.
//!
//! Field names, defaults, object names and the order of chunks are those of OpenAI's API reference.
//! Fields of its that change an answer in a way that is not built here are refused by name; those
//! that do not change it (`user`, `metadata`) are ignored. What `/generate` has beyond them is an
//! extension: `top_k`, `min_p`, `repetition_penalty`, `repeat_last_n`, `ignore_eos`,
//! `cache_prompt`, `speculation`, `share_text`, `grammar`, `details`, `timeout_s`.

//!
//! [`read`] takes a body apart, [`mod@write`] puts an answer together.

pub mod read;
pub mod write;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Text,
    /// `/v1/chat/completions`.
    Chat,
}
