//! Random heads for a model of random weights, streamed to a safetensors file: as Vicuna's
//! published heads have them (Medusa v1, an output matrix for each head, F16), or conditioned, with
//! a draft vocabulary.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use super::values::Values;
use super::vocab::N_SPECIAL;
use super::weights::{Fill, Weights};
use super::{Shape, SynthError, with_suffix};
use crate::config::HeadKind;
use crate::llama::TensorType;

/// Tokens that conditioned heads know, as many as `medusa-llama train` gives them.
const DRAFT_VOCAB: usize = 16_384;

/// Heads for a model of this shape.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// The model's.
    pub shape: &'a Shape,
    /// What the heads see.
    pub kind: HeadKind,
    /// How many.
    pub n_heads: usize,
    /// Decides all values.
    pub seed: u64,
}

/// A tensor of the file.
struct Entry {
    key: String,
    dtype: &'static str,
    shape: Vec<usize>,
    source: Source,
}

/// Where its values come from.
enum Source {
    /// Drawn, in F16.
    Weights(Weights),
    Bytes(Vec<u8>),
}

impl Entry {
    fn matrix(weights: Weights) -> Self {
        let shape = vec![weights.n_out, weights.n_in];
        Self { key: weights.name.clone(), dtype: "F16", shape, source: Source::Weights(weights) }
    }

    fn zeros(name: String, n: usize) -> Self {
        let weights = Weights { name, n_in: n, n_out: 1, fill: Fill::Zeros };
        Self { shape: vec![n], ..Self::matrix(weights) }
    }

    fn bytes(key: &str, dtype: &'static str, n: usize, bytes: Vec<u8>) -> Self {
        Self { key: key.into(), dtype, shape: vec![n], source: Source::Bytes(bytes) }
    }

    fn n_bytes(&self) -> usize {
        match &self.source {
            Source::Weights(w) => w.n_out * TensorType::F16.bytes(w.n_in),
            Source::Bytes(bytes) => bytes.len(),
        }
    }
}

/// The file that heads of a kind stand in.
#[must_use]
pub fn file(folder: &Path, kind: HeadKind) -> PathBuf {
    folder.join(match kind {
        HeadKind::Medusa => "medusa_lm_head.safetensors",
        HeadKind::Conditioned => "conditioned_heads.safetensors",
    })
}

/// Writes heads and their `config.json` to a folder, which is made if need be. Returns the size of
/// the heads' file in bytes.
///
/// # Errors
/// [`SynthError`] when a file cannot be written.
pub fn write(folder: &Path, spec: Spec<'_>) -> Result<u64, SynthError> {
    std::fs::create_dir_all(folder).map_err(|e| SynthError::file(folder, e))?;
    let path = file(folder, spec.kind);
    let part = with_suffix(&path, ".part");
    let entries = match spec.kind {
        HeadKind::Medusa => medusa(spec.shape, spec.n_heads),
        HeadKind::Conditioned => conditioned(spec.shape, spec.n_heads),
    };
    let n_bytes = stream(&part, &entries, spec.seed)?;
    std::fs::rename(&part, &path).map_err(|e| SynthError::file(&path, e))?;
    let config = folder.join("config.json");
    let text = json!({
        "medusa_num_heads": spec.n_heads, "medusa_num_layers": 1, "random_weights_like": spec.shape.name, "seed": spec.seed,
    });
    std::fs::write(&config, format!("{text:#}\n")).map_err(|e| SynthError::file(&config, e))?;
    Ok(n_bytes)
}

/// Medusa v1, with a block and an output matrix for each head.
fn medusa(shape: &Shape, n_heads: usize) -> Vec<Entry> {
    let (d, n_vocab) = (shape.n_embd, shape.n_vocab);
    let head = |h: usize| {
        [
            Entry::matrix(Weights::matrix(format!("{h}.0.linear.weight"), d, d)),
            Entry::zeros(format!("{h}.0.linear.bias"), d),
            Entry::matrix(Weights::output(format!("{h}.1.weight"), d, n_vocab)),
        ]
    };
    (0..n_heads).flat_map(head).collect()
}

/// Our own layout, with blocks as wide as the model and a draft vocabulary of words. How often each
/// was met follows Zipf's law.
fn conditioned(shape: &Shape, n_heads: usize) -> Vec<Entry> {
    let d = shape.n_embd;
    let head = |h: usize| {
        let matrix = |name: &str| Entry::matrix(Weights::matrix(format!("{h}.{name}"), d, d));
        [matrix("w"), matrix("u"), matrix("v"), Entry::zeros(format!("{h}.b"), d)]
    };
    let mut entries: Vec<Entry> = (0..n_heads).flat_map(head).collect();
    let n = DRAFT_VOCAB.min(shape.n_vocab - N_SPECIAL);
    let map = (N_SPECIAL..N_SPECIAL + n).flat_map(|t| (t as i32).to_le_bytes()).collect();
    let counts = (1..=n).flat_map(|rank| (1e6 / rank as f32).to_le_bytes()).collect();
    entries.push(Entry::bytes("token_map", "I32", n, map));
    entries.push(Entry::bytes("token_counts", "F32", n, counts));
    entries
}

/// Writes a safetensors file: the length of the header, the header, and values in its order.
/// Returns the file's size.
fn stream(path: &Path, entries: &[Entry], seed: u64) -> Result<u64, SynthError> {
    let fail = |e: std::io::Error| SynthError::file(path, e);
    let mut header = Map::new();
    let mut end = 0;
    for entry in entries {
        let start = end;
        end += entry.n_bytes();
        let tensor =
            json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end] });
        header.insert(entry.key.clone(), tensor);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));

    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(fail)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(fail)?;
    out.write_all(header.as_bytes()).map_err(fail)?;
    // Not the model's values once more.
    let mut values = Values::new(!seed);
    for entry in entries {
        match &entry.source {
            Source::Weights(weights) => {
                values.write(weights, TensorType::F16, &mut out, &mut |_| ()).map_err(fail)?
            }
            Source::Bytes(bytes) => out.write_all(bytes).map_err(fail)?,
        }
    }
    out.flush().map_err(fail)?;
    Ok((8 + header.len() + end) as u64)
}
