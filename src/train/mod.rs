//! Training of heads, from a GGUF file and nothing else, or with prompts.
//!
//! 1. `own`: the model writes prompts, unless there are some.
//! 2. `answers`: it answers them, in the batched engine.
//! 3. `features`: hidden states and distributions at each token go to the disk.
//! 4. `fit`: heads learn from them; `save` writes them.
//!
//! A killed run resumes in the same work folder.

pub(crate) mod answers;
pub(crate) mod features;
pub(crate) mod fit;
pub mod kind;
pub(crate) mod own;
pub mod prompts;
pub(crate) mod save;

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensors};

use crate::files::{FileError, write_whole};
use crate::llama::LlamaError;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrainError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("prompts: {0}")]
    Prompts(String),
    #[error("the engine failed: {0}")]
    Engine(String),
    #[error("{0}")]
    Llama(#[from] LlamaError),
}

/// A tensor to write: name, type, shape, bytes.
type RawTensor<S> = (S, Dtype, Vec<usize>, Vec<u8>);

/// Writes a safetensors file, which appears under its name when it is whole.
fn write_tensors<S: AsRef<str> + Ord + Display>(
    path: &Path,
    tensors: &[RawTensor<S>],
    meta: Option<HashMap<String, String>>,
) -> Result<(), FileError> {
    write_whole(path, |part| {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name, view))
        });
        let views = views.collect::<Result<Vec<_>, _>>();
        let written = views.and_then(|views| safetensors::serialize_to_file(views, meta, part));
        written.map_err(|e| FileError::new(path, e))
    })
}

/// The header of a safetensors file, without reading its tensors.
fn read_header(path: &Path) -> Result<Metadata, FileError> {
    let read = || {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let header = file.take(u64::from_le_bytes(length).min(1 << 24));
        std::io::Result::Ok(serde_json::from_reader(header)?)
    };
    read().map_err(|e| FileError::new(path, e))
}

/// A tensor of the file at `path`: its shape and its values.
fn read_tensor<T, const N: usize>(
    path: &Path,
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    from_le_bytes: fn([u8; N]) -> T,
) -> Result<(Vec<usize>, Vec<T>), FileError> {
    let view = file.tensor(name).map_err(|e| FileError::new(path, format!("{name}: {e}")))?;
    if view.dtype() != dtype {
        let reason = format!("{name} is {:?}, not {dtype:?}", view.dtype());
        return Err(FileError::new(path, reason));
    }
    let values = view.data().as_chunks().0.iter().map(|b| from_le_bytes(*b)).collect();
    Ok((view.shape().to_vec(), values))
}

/// The bytes of values as a safetensors file has them.
macro_rules! le_bytes {
    ($values:expr) => {
        $values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()
    };
}
use le_bytes;
