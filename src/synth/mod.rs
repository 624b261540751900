//! Models and heads of random weights in the shape of known ones: what a step takes depends on
//! shapes and types alone, so speed can be measured at real sizes where the real weights are not at
//! hand.
//!
//! 1. [`Shape`] names the sizes; `weights` lists its tensors, each with how its values are
//!    distributed, so that activations stay finite and no token has all the probability.
//! 2. llama.cpp's own quantizer says how each tensor is to be stored: it is given a file of the
//!    same tensors with two rows each.
//! 3. `values` draws random pieces once for each type and spread, and puts rows together of them.
//!    So a file grows as fast as the disk takes it, and takes memory for one row.
//! 4. `vocab` makes up a vocabulary; [`heads`] matching heads.
//!
//! The same arguments give the same bytes.

pub mod heads;
mod values;
mod vocab;
mod weights;

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::llama::{self, ALIGNMENT, LlamaError, Meta, Quantization, TensorInfo, TensorType};
use values::Values;
use weights::Weights;

/// Sizes of a model of the llama architecture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// What it goes by here.
    pub name: &'static str,
    /// Layers.
    pub n_layer: usize,
    /// Width of the hidden state.
    pub n_embd: usize,
    /// Width of the feed-forward network.
    pub n_ff: usize,
    /// Attention heads.
    pub n_head: usize,
    /// Those that have keys and values of their own.
    pub n_head_kv: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Longest context, in tokens.
    pub n_ctx: usize,
    /// Base of the rotary positions' frequencies.
    pub rope_base: f32,
    /// Input embeddings serve as the output matrix.
    pub tied: bool,
}

/// As the models' configurations have them, and one of less than a megabyte for tests.
const SHAPES: [Shape; 4] = [
    Shape {
        name: "vicuna-7b",
        n_layer: 32,
        n_embd: 4096,
        n_ff: 11_008,
        n_head: 32,
        n_head_kv: 32,
        n_vocab: 32_000,
        n_ctx: 4096,
        rope_base: 10_000.0,
        tied: false,
    },
    Shape {
        name: "llama-3-8b",
        n_layer: 32,
        n_embd: 4096,
        n_ff: 14_336,
        n_head: 32,
        n_head_kv: 8,
        n_vocab: 128_256,
        n_ctx: 8192,
        rope_base: 500_000.0,
        tied: false,
    },
    Shape {
        name: "smollm2-135m",
        n_layer: 30,
        n_embd: 576,
        n_ff: 1536,
        n_head: 9,
        n_head_kv: 3,
        n_vocab: 49_152,
        n_ctx: 8192,
        rope_base: 100_000.0,
        tied: true,
    },
    Shape {
        name: "tiny",
        n_layer: 2,
        n_embd: 64,
        n_ff: 128,
        n_head: 4,
        n_head_kv: 2,
        n_vocab: 512,
        n_ctx: 2048,
        rope_base: 10_000.0,
        tied: false,
    },
];

/// Why a file could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// It cannot be written.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// ggml or llama.cpp refused.
    #[error("{0}")]
    Llama(#[from] LlamaError),
}

impl SynthError {
    fn file(path: &Path, reason: impl Display) -> Self {
        Self::File { path: path.to_owned(), reason: reason.to_string() }
    }
}

impl Shape {
    /// By its name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|s| s.name == name)
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|s| s.name)
    }
}

/// Writes a model to a GGUF file, which appears under its name when it is whole. `progress` gets
/// bytes written and bytes in all.
///
/// # Errors
/// [`SynthError`] when the file, or one beside it for a moment, cannot be written.
pub fn model(
    path: &Path,
    shape: &Shape,
    quantization: Quantization,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    let part = with_suffix(path, ".part");
    let written = write_model(&part, shape, quantization, seed, progress)
        .and_then(|()| std::fs::rename(&part, path).map_err(|e| SynthError::file(path, e)));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

fn write_model(
    path: &Path,
    shape: &Shape,
    quantization: Quantization,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    let weights = weights::of(shape);
    let meta = metadata(shape, quantization);
    let types = stored_types(path, &weights, &meta, quantization)?;
    let info = |w: &Weights| TensorInfo {
        name: w.name.clone(),
        n_in: w.n_in,
        n_out: w.n_out,
        kind: types[&w.name],
    };
    let tensors: Vec<TensorInfo> = weights.iter().map(info).collect();
    llama::write_header(path, &meta, &tensors)?;

    let fail = |e: std::io::Error| SynthError::file(path, e);
    let mut out = BufWriter::with_capacity(
        1 << 20,
        OpenOptions::new().append(true).open(path).map_err(fail)?,
    );
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
    out.flush().map_err(fail)
}

/// How llama.cpp stores each tensor of such a file: its choice depends on the metadata, names and
/// rows' length alone, so two rows of each, all zero, are quantized, and the result is looked at.
fn stored_types(
    beside: &Path,
    weights: &[Weights],
    meta: &[(&str, Meta)],
    quantization: Quantization,
) -> Result<HashMap<String, TensorType>, SynthError> {
    let before = |w: &Weights| {
        let (n_out, kind) = if w.n_out == 1 { (1, TensorType::F32) } else { (2, TensorType::F16) };
        TensorInfo { name: w.name.clone(), n_in: w.n_in, n_out, kind }
    };
    let tensors: Vec<TensorInfo> = weights.iter().map(before).collect();
    let (from, to) = (with_suffix(beside, ".from"), with_suffix(beside, ".to"));
    let look = || {
        llama::write_header(&from, meta, &tensors)?;
        let n_bytes: usize = tensors.iter().map(|t| t.bytes().next_multiple_of(ALIGNMENT)).sum();
        let file: File =
            OpenOptions::new().append(true).open(&from).map_err(|e| SynthError::file(&from, e))?;
        let n_header = file.metadata().map_err(|e| SynthError::file(&from, e))?.len();
        file.set_len(n_header + n_bytes as u64).map_err(|e| SynthError::file(&from, e))?;
        llama::quantize(&from, &to, quantization, 1)?;
        Ok(llama::tensor_types(&to)?.into_iter().collect())
    };
    let types = look();
    [from, to].iter().for_each(|path| drop(std::fs::remove_file(path)));
    types
}

/// What llama.cpp asks a file of this architecture for.
fn metadata(shape: &Shape, quantization: Quantization) -> Vec<(&'static str, Meta)> {
    let number = |n: usize| Meta::Number(n as u32);
    let mut meta = vec![
        ("general.architecture", Meta::Text("llama".into())),
        ("general.name", Meta::Text(format!("random weights like {}", shape.name))),
        ("general.file_type", Meta::Number(quantization.file_type())),
        ("general.quantization_version", number(2)),
        ("llama.vocab_size", number(shape.n_vocab)),
        ("llama.context_length", number(shape.n_ctx)),
        ("llama.embedding_length", number(shape.n_embd)),
        ("llama.block_count", number(shape.n_layer)),
        ("llama.feed_forward_length", number(shape.n_ff)),
        ("llama.attention.head_count", number(shape.n_head)),
        ("llama.attention.head_count_kv", number(shape.n_head_kv)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::Float(1e-5)),
        ("llama.rope.dimension_count", number(shape.n_embd / shape.n_head)),
        ("llama.rope.freq_base", Meta::Float(shape.rope_base)),
    ];
    meta.extend(vocab::metadata(shape.n_vocab));
    meta
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
