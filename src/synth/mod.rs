//! Models and heads of random weights in the shape of known ones: the time of a step depends on
//! shapes and types alone, so speed can be measured at real sizes without the real weights.
//!
//! 1. [`ModelShape`] names the sizes and the architecture; `architectures` is a table of small models
//!    of many, for tests. `weights` lists the tensors, which it asks of llama.cpp's loader for
//!    architectures besides llama, each with how its values are distributed, so that activations
//!    stay finite and no token has all the probability.
//! 2. llama.cpp's own quantizer decides how to store each tensor: it quantizes a file of the same
//!    tensors with two rows each.
//! 3. `values` draws random pieces once for each type and deviation, and builds rows from them, so a
//!    file is written at the disk's speed and with memory for one row.
//! 4. `vocab` makes up a vocabulary; [`heads`] writes matching heads.
//!
//! The same arguments give the same bytes.

mod architectures;
pub mod heads;
mod shape;
mod values;
mod vocab;
mod weights;

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::files::{FileError, with_suffix, write_whole};
use crate::llama::{self, ALIGNMENT, LlamaError, Meta, Quantization, TensorInfo, TensorType};
pub use shape::ModelShape;
use values::Values;
use weights::TensorSpec;

/// Why a file could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// It cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// ggml or llama.cpp rejected it.
    #[error("{0}")]
    Llama(#[from] LlamaError),
}

/// Writes a model to a GGUF file, which appears under its name when it is whole. `progress` gets
/// bytes written and bytes in all.
///
/// # Errors
/// [`SynthError`] when the file, or a temporary one beside it, cannot be written.
pub fn model(
    path: &Path,
    shape: &ModelShape,
    quantization: Quantization,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    write_whole(path, |path| {
        let meta = metadata(shape, quantization);
        let weights = weights::of(shape, &meta)?;
        let types = stored_types(path, &weights, &meta, quantization)?;
        let info = |w: &TensorSpec| w.info(types[&w.name]);
        let tensors: Vec<TensorInfo> = weights.iter().map(info).collect();
        llama::write_header(path, &meta, &tensors)?;

        let fail = |e: std::io::Error| FileError::new(path, e);
        let file = OpenOptions::new().append(true).open(path).map_err(fail)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut values = Values::new(seed);
        let (mut n_done, n_all) = (0, tensors.iter().map(|t| t.bytes() as u64).sum());
        for (weights, info) in weights.iter().zip(&tensors) {
            let mut wrote = |n: usize| {
                n_done += n as u64;
                progress(n_done, n_all);
            };
            values.write(weights, info.kind, &mut out, &mut wrote).map_err(fail)?;
            let padding = info.bytes().next_multiple_of(ALIGNMENT) - info.bytes();
            out.write_all(&[0; ALIGNMENT][..padding]).map_err(fail)?;
        }
        Ok(out.flush().map_err(fail)?)
    })
}

/// How llama.cpp stores each tensor of such a file. Its choice depends on metadata, names, row lengths
/// and numbers of dimensions alone, so it quantizes a file with two rows of zeros for each matrix. It
/// leaves tensors in F32 that kernels need so.
fn stored_types(
    beside: &Path,
    weights: &[TensorSpec],
    meta: &[(String, Meta)],
    quantization: Quantization,
) -> Result<HashMap<String, TensorType>, SynthError> {
    let before = |w: &TensorSpec| {
        let [n_in, n_out, n, m] = w.shape;
        TensorInfo { shape: [n_in, n_out.min(2), n, m], ..w.info(TensorType::F32) }
    };
    let tensors: Vec<TensorInfo> = weights.iter().map(before).collect();
    let (from, to) = (with_suffix(beside, ".from"), with_suffix(beside, ".to"));
    let fail = |e: std::io::Error| FileError::new(&from, e);
    let look = || {
        llama::write_header(&from, meta, &tensors)?;
        let n_bytes: usize = tensors.iter().map(|t| t.bytes().next_multiple_of(ALIGNMENT)).sum();
        let file = OpenOptions::new().append(true).open(&from).map_err(fail)?;
        let n_header = file.metadata().map_err(fail)?.len();
        file.set_len(n_header + n_bytes as u64).map_err(fail)?;
        llama::quantize(&from, &to, quantization, 1)?;
        Ok(llama::tensor_types(&to)?.into_iter().collect())
    };
    let types = look();
    [from, to].iter().for_each(|path| drop(std::fs::remove_file(path)));
    types
}

/// The metadata that llama.cpp needs for a model.
fn metadata(shape: &ModelShape, quantization: Quantization) -> Vec<(String, Meta)> {
    let (arch, keys) = shape.metadata();
    let general = [
        ("general.architecture", Meta::Text(arch.into())),
        // llama.cpp expects tokens of a family whose name is in this one.
        ("general.name", Meta::Text("random weights".into())),
        ("general.description", Meta::Text(format!("like {}", shape.name))),
        ("general.file_type", Meta::Number(quantization.file_type)),
        ("general.quantization_version", Meta::Number(2)),
    ];
    let general = general.map(|(key, value)| (key.to_owned(), value));
    let keys = keys.into_iter().map(|(key, value)| (format!("{arch}.{key}"), value));
    let vocabulary = vocab::metadata(shape.n_vocab).map(|(key, value)| (key.to_owned(), value));
    general.into_iter().chain(keys).chain(vocabulary).collect()
}
