//! Errors of heads: their files, their weights, and the devices they are computed on.

use std::path::PathBuf;

use crate::gpu::GpuError;
use crate::llama::LlamaError;

/// Why heads cannot be loaded or computed.
#[derive(Debug, thiserror::Error)]
pub enum HeadsError {
    /// A file could not be read, or a folder has none of a known name.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tensor is missing, unknown or does not fit.
    #[error("{}: {key}: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        key: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// Weights or inputs whose shapes do not match.
    #[error("heads: {0}")]
    Shape(String),
    /// The model's matrices could not be read, or ggml failed.
    #[error(transparent)]
    Llama(#[from] LlamaError),
    /// The GPU failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}
