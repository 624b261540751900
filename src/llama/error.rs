//! What can go wrong behind the fence, with C's own codes kept.

use std::path::PathBuf;

/// An error from llama.cpp, or an argument that the fence refused before it reached llama.cpp.
#[derive(Debug, thiserror::Error)]
pub enum LlamaError {
    /// The GGUF file could not be loaded.
    #[error("could not load {}: {reason}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What llama.cpp logged last, or what the fence found.
        reason: String,
    },
    /// The GGUF file could not be quantized.
    #[error("could not quantize {}: {reason}", path.display())]
    Quantize {
        /// The file.
        path: PathBuf,
        /// What llama.cpp logged last, or what the fence found.
        reason: String,
    },
    /// A GGUF file could not be written.
    #[error("could not write {}: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What ggml logged last, or what the fence found.
        reason: String,
    },
    /// No context could be made for the model, usually for want of memory.
    #[error("could not create a context: {0}")]
    Context(String),
    /// The text could not be tokenised.
    #[error("could not tokenise {bytes} bytes of text")]
    Tokenize {
        /// Length of the text.
        bytes: usize,
    },
    /// A batch row that the context could not take.
    #[error("invalid batch row: {0}")]
    Batch(String),
    /// The KV cache has no room for the batch; the context is as it was before the call.
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
        /// What llama.cpp logged last.
        reason: String,
    },
    /// A row that has no output, a sequence id out of range, or a KV operation this cache cannot
    /// do.
    #[error("invalid use of the context: {0}")]
    Misuse(String),
    /// A sampler parameter that llama.cpp refuses.
    #[error("llama.cpp refused the sampler {0}")]
    Sampler(&'static str),
}
