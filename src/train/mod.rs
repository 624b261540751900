//! Training of heads, from a GGUF and a file of prompts and nothing else.
//!
//! 1. [`answers`]: the model answers the prompts, in the batched engine.
//! 2. [`features`]: what it thought at each token, hidden states and distributions, goes to the
//!    disk.
//! 3. [`fit`]: heads learn from them; [`save`] writes them down.
//!
//! A killed run goes on where it was, in the same work folder.

pub mod answers;
pub mod features;
pub mod fit;
pub mod prompts;
pub mod save;

use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::llama::LlamaError;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file of the work folder, or of the result.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The prompts.
    #[error("prompts: {0}")]
    Prompts(String),
    /// The engine that answers.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The model.
    #[error("{0}")]
    Llama(#[from] LlamaError),
    /// Fitting.
    #[error("{0}")]
    Fit(#[from] fit::FitError),
}

impl TrainError {
    fn file(path: &Path, reason: impl Display) -> Self {
        Self::File { path: path.to_owned(), reason: reason.to_string() }
    }
}

/// A number that depends on all bits of `x` (the finaliser of `SplitMix64`).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A tensor to write: name, type, shape, bytes.
type Raw<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

/// Writes a safetensors file, which appears under its name when it is whole.
fn write_tensors(
    path: &Path,
    tensors: &[Raw<'_>],
    meta: Option<HashMap<String, String>>,
) -> Result<(), TrainError> {
    let fail = |e: &dyn Display| TrainError::file(path, e);
    let mut views = vec![];
    for (name, dtype, shape, bytes) in tensors {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| fail(&e))?));
    }
    let part = path.with_extension("part");
    safetensors::serialize_to_file(views, meta, &part).map_err(|e| fail(&e))?;
    std::fs::rename(&part, path).map_err(|e| fail(&e))
}
