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
use super::weights::TensorSpec;
use crate::files::{self, FileError, write_whole};
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
enum Entry {
    /// Random values in F16; a vector if it has one row.
    Random(TensorSpec),
    /// A vector: its name, type, length and bytes.
    Bytes(&'static str, &'static str, usize, Vec<u8>),
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
    let text = json!({
        "medusa_num_heads": spec.n_heads, "medusa_num_layers": 1, "random_weights_like": spec.shape.name, "seed": spec.seed,
    });
    files::write(&folder.join("config.json"), format!("{text:#}\n"))?;
    Ok(n_bytes)
}

/// Medusa v1, with a block and an output matrix for each head.
fn medusa(shape: &ModelShape, n_heads: usize) -> Vec<Entry> {
    let (d, n_vocab) = (shape.n_embd, shape.n_vocab);
    let head = |h: usize| {
        [
            Entry::Random(TensorSpec::matrix(format!("{h}.0.linear.weight"), d, d)),
            Entry::Random(TensorSpec::vector(format!("{h}.0.linear.bias"), d, 0.0)),
            Entry::Random(TensorSpec::output(format!("{h}.1.weight"), d, n_vocab)),
        ]
    };
    (0..n_heads).flat_map(head).collect()
}

/// Our own layout, with blocks as wide as the model and a draft vocabulary of words. Token counts
/// follow Zipf's law.
fn conditioned(shape: &ModelShape, n_heads: usize) -> Vec<Entry> {
    let d = shape.n_embd;
    let head = |h: usize| {
        let matrix = |name: &str| Entry::Random(TensorSpec::matrix(format!("{h}.{name}"), d, d));
        let bias = Entry::Random(TensorSpec::vector(format!("{h}.b"), d, 0.0));
        [matrix("w"), matrix("u"), matrix("v"), bias]
    };
    let mut entries: Vec<Entry> = (0..n_heads).flat_map(head).collect();
    let n = DRAFT_VOCAB.min(shape.n_vocab - N_SPECIAL);
    let map = (N_SPECIAL..N_SPECIAL + n).flat_map(|t| (t as i32).to_le_bytes()).collect();
    let counts = (1..=n).flat_map(|rank| (1e6 / rank as f32).to_le_bytes()).collect();
    entries.push(Entry::Bytes("token_map", "I32", n, map));
    entries.push(Entry::Bytes("token_counts", "F32", n, counts));
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
        let (name, dtype, shape) = match entry {
            Entry::Random(w) => {
                end += w.info(TensorType::F16).bytes();
                let (n_in, n_out) = (w.n_in(), w.n_rows());
                (&*w.name, "F16", if n_out == 1 { vec![n_in] } else { vec![n_out, n_in] })
            }
            Entry::Bytes(name, dtype, n, bytes) => {
                end += bytes.len();
                (*name, *dtype, vec![*n])
            }
        };
        let tensor = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        header.insert(name.to_owned(), tensor);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));

    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(fail)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(fail)?;
    out.write_all(header.as_bytes()).map_err(fail)?;
    // Other values than the model's.
    let mut values = Values::new(!seed);
    for entry in entries {
        match entry {
            Entry::Random(w) => values.write(w, TensorType::F16, &mut out, &mut |_| ()),
            Entry::Bytes(.., bytes) => out.write_all(bytes),
        }
        .map_err(fail)?;
    }
    out.flush().map_err(fail)?;
    Ok((8 + header.len() + end) as u64)
}
