//! Errors of llama.cpp and ggml, with C's own codes kept.

use std::path::PathBuf;

use super::hello::Endpoint;

/// An error from llama.cpp, or an argument that the fence refused before it reached llama.cpp.
#[derive(Debug, thiserror::Error)]
pub enum LlamaError {
    /// A GGUF file could not be loaded, quantized or written.
    #[error("could not {action} {}: {reason}", path.display())]
    File {
        /// "load", "quantize" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What llama.cpp logged, or what was checked here.
        reason: String,
    },
    /// A worker cannot be used.
    #[error("the worker {endpoint} {reason}")]
    Worker {
        /// Its address.
        endpoint: Endpoint,
        /// Why, to follow the address.
        reason: String,
    },
    /// llama.cpp can make no model of metadata; what it logged.
    #[error("no model has this metadata: {0}")]
    Metadata(String),
    /// `common/chat` refused a template, messages or an answer; what it said.
    #[error("{0}")]
    Chat(String),
    /// A context could not be created, usually for lack of memory.
    #[error("could not create a context: {0}")]
    Context(String),
    /// The text could not be tokenised.
    #[error("could not tokenise {bytes} bytes of text")]
    Tokenize {
        /// Length of the text.
        bytes: usize,
    },
    /// A batch row is invalid for the context.
    #[error("invalid batch row: {0}")]
    Batch(String),
    /// The batch does not fit the KV cache; the context is unchanged.
    #[error("the KV cache has no room for {rows} rows")]
    NoRoom {
        /// Rows in the batch.
        rows: usize,
    },
    /// The forward pass failed; the cache may hold part of the batch.
    #[error("forward pass failed with code {code}: {reason}")]
    Decode {
        /// What `llama_decode` returned.
        code: i32,
        /// What llama.cpp logged.
        reason: String,
    },
    /// ggml could not compute a graph.
    #[error("a graph was not computed: ggml's status is {code}")]
    Compute {
        /// What `ggml_graph_compute` returned.
        code: i32,
    },
    /// An argument that C would not check: a row without output, a sequence id out of range, shapes
    /// that do not match.
    #[error("invalid use of llama.cpp: {0}")]
    Misuse(String),
    /// llama.cpp refused a sampler's parameters.
    #[error("llama.cpp refused the sampler {0}")]
    Sampler(&'static str),
}
