//! Random heads for a model of random weights, streamed to a safetensors file: in the layout of
//! Vicuna's published heads (Medusa v1, an output matrix for each head, F16), or conditioned with a
//! draft vocabulary.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, json};

use super::shape::ModelShape;
use super::values::Values;
use super::vocab::N_SPECIAL;
use super::weights::{Fill, TensorSpec};
use crate::files::{FileError, write_whole};
use crate::llama::TensorType;
use crate::train::kind::HeadKind;

/// Draft vocabulary of conditioned heads, the default of `medusa-llama train`.
const DRAFT_VOCAB: usize = 16_384;

/// Heads for a model of this shape.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// The model's shape.
    pub shape: &'a ModelShape,
    /// The heads' inputs.
    pub kind: HeadKind,
    /// Number of heads.
    pub n_heads: usize,
    /// Seeds all values.
    pub seed: u64,
}

/// A tensor of the file.
struct Entry {
    key: String,
    dtype: &'static str,
    shape: Vec<usize>,
    source: EntryData,
}

/// Where its values come from.
enum EntryData {
    /// Random, in F16.
    TensorSpec(TensorSpec),
    Bytes(Vec<u8>),
}

impl Entry {
    fn matrix(weights: TensorSpec) -> Self {
        let shape = vec![weights.n_out, weights.n_in];
        Self {
            key: weights.name.clone(),
            dtype: "F16",
            shape,
            source: EntryData::TensorSpec(weights),
        }
    }

    fn zeros(name: String, n: usize) -> Self {
        let weights = TensorSpec { name, n_in: n, n_out: 1, fill: Fill::Constant(0.0) };
        Self { shape: vec![n], ..Self::matrix(weights) }
    }

    fn bytes(key: &str, dtype: &'static str, n: usize, bytes: Vec<u8>) -> Self {
        Self { key: key.into(), dtype, shape: vec![n], source: EntryData::Bytes(bytes) }
    }

    fn n_bytes(&self) -> usize {
        match &self.source {
            EntryData::TensorSpec(w) => w.n_out * TensorType::F16.bytes(w.n_in),
            EntryData::Bytes(bytes) => bytes.len(),
        }
    }
}

/// Writes heads and their `config.json` to a folder, which is created if needed. Returns the size of
/// the heads' file in bytes.
///
/// # Errors
/// [`FileError`]: a file cannot be written.
pub fn write(folder: &Path, spec: Spec<'_>) -> Result<u64, FileError> {
    std::fs::create_dir_all(folder).map_err(|e| FileError::new(folder, e))?;
    let path = spec.kind.file(folder);
    let entries = match spec.kind {
        HeadKind::Medusa => medusa(spec.shape, spec.n_heads),
        HeadKind::Conditioned => conditioned(spec.shape, spec.n_heads),
    };
    let n_bytes = write_whole(&path, |part| stream(part, &entries, spec.seed))?;
    let config = folder.join("config.json");
    let text = json!({
        "medusa_num_heads": spec.n_heads, "medusa_num_layers": 1, "random_weights_like": spec.shape.name, "seed": spec.seed,
    });
    std::fs::write(&config, format!("{text:#}\n")).map_err(|e| FileError::new(&config, e))?;
    Ok(n_bytes)
}

/// Medusa v1, with a block and an output matrix for each head.
fn medusa(shape: &ModelShape, n_heads: usize) -> Vec<Entry> {
    let (d, n_vocab) = (shape.n_embd, shape.n_vocab);
    let head = |h: usize| {
        [
            Entry::matrix(TensorSpec::matrix(format!("{h}.0.linear.weight"), d, d)),
            Entry::zeros(format!("{h}.0.linear.bias"), d),
            Entry::matrix(TensorSpec::output(format!("{h}.1.weight"), d, n_vocab)),
        ]
    };
    (0..n_heads).flat_map(head).collect()
}

/// Our own layout, with blocks as wide as the model and a draft vocabulary of words. Token counts
/// follow Zipf's law.
fn conditioned(shape: &ModelShape, n_heads: usize) -> Vec<Entry> {
    let d = shape.n_embd;
    let head = |h: usize| {
        let matrix = |name: &str| Entry::matrix(TensorSpec::matrix(format!("{h}.{name}"), d, d));
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
fn stream(path: &Path, entries: &[Entry], seed: u64) -> Result<u64, FileError> {
    let fail = |e: std::io::Error| FileError::new(path, e);
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
    // Other values than the model's.
    let mut values = Values::new(!seed);
    for entry in entries {
        match &entry.source {
            EntryData::TensorSpec(weights) => {
                values.write(weights, TensorType::F16, &mut out, &mut |_| ()).map_err(fail)?
            }
            EntryData::Bytes(bytes) => out.write_all(bytes).map_err(fail)?,
        }
    }
    out.flush().map_err(fail)?;
    Ok((8 + header.len() + end) as u64)
}
