//! Head files: detects a folder's layout and checks its tensors against the model. No file is
//! trusted: heads are counted from the keys, since published configurations are often wrong, and
//! every shape is checked.
//!
//! | layout | keys |
//! |---|---|
//! | v1 | `{h}.{l}.linear.weight`, `.bias`; the head's own output matrix `{h}.{L}.weight` |
//! | v2 | the same without output matrices: all heads share the model's |
//! | full model | v1 or v2 under `medusa_head.`, among the model's own tensors, in shards |
//! | vLLM | `blocks.{h}.layers.{l}.weight`, optional `.bias`; `lm_heads.{h}.weight` |
//! | conditioned | `{h}.w`, `{h}.u`, `{h}.v`, `{h}.b`: ours, see [`ConditionedWeights`]; all heads share the model's output matrix |
//!
//! Files are safetensors, or for v1 and v2 PyTorch's own (see `pickle`). In ours a matrix may be I8
//! with `{key}.scale`, a factor per row. Each layout may have `token_map`, the vocabulary ids of the
//! output rows, if heads know only the most frequent tokens; ours may have `token_counts` too, how
//! often each occurred in training, descending.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::Draft;
use super::conditioned::Conditioned;
pub use super::error::HeadsError;
use super::medusa::Medusa;
use super::nets::{ConditionedHead, ConditionedWeights, MedusaWeights, ResidualBlock};
use super::pickle;
use crate::llama::{Model, Threads, Token};
use crate::matrix::Matrix;

/// The model's sizes, which heads must fit.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Width of the hidden state.
    pub n_embd: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
}

/// The heads of a folder, checked.
#[derive(Debug, PartialEq)]
pub struct Heads {
    /// One network for each head.
    pub nets: HeadNets,
    /// The token of each output row; `None`: the vocabulary itself.
    pub token_map: Option<Vec<Token>>,
    /// How often each of them occurred in training, descending.
    pub token_counts: Option<Vec<f64>>,
}

/// The networks of heads. Those without output matrices use the model's own.
#[derive(Debug, PartialEq)]
pub enum HeadNets {
    /// Each head sees the hidden state only.
    Plain(MedusaWeights),
    /// Each head sees the path that it continues, too.
    Conditioned(ConditionedWeights),
}

/// File names of heads, in the order they are looked for.
pub const FILES: [&str; 5] = [
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
    "conditioned_heads.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
];
/// Prefix of the heads' keys in a full model.
const FULL_MODEL: &str = "medusa_head.";
/// More heads or blocks than any published file has.
const MAX_HEADS: usize = 16;

impl Heads {
    /// Reads the first `n_heads` heads of a folder.
    ///
    /// # Errors
    /// [`HeadsError`] names the file, and the tensor if one is invalid.
    pub fn load(folder: &Path, shape: Shape, n_heads: usize) -> Result<Self, HeadsError> {
        let file = FILES.iter().map(|name| folder.join(name)).find(|path| path.is_file());
        let file = file.ok_or_else(|| HeadsError::File {
            path: folder.to_owned(),
            reason: format!("no heads here; looked for {}", FILES.join(", ")),
        })?;
        let shards = if file.extension() == Some("json".as_ref()) {
            shards(&file)?
        } else {
            vec![file.clone()]
        };
        let mut tensors = Tensors { file, map: BTreeMap::new() };
        for shard in &shards {
            tensors.read(shard)?;
        }
        tensors.into_heads(shape, n_heads.min(MAX_HEADS))
    }

    /// Prepares heads for drafting on the CPU, with the matrices of their model that they need.
    ///
    /// # Errors
    /// [`HeadsError::Llama`] when the model's matrices cannot be read, or without memory;
    /// [`HeadsError::Shape`] for weights that do not match.
    pub fn drafter(self, model: &Model, threads: &Threads) -> Result<Box<dyn Draft>, HeadsError> {
        let output = model.output_rows()?;
        Ok(match self.nets {
            HeadNets::Plain(weights) => {
                Box::new(Medusa::new(weights, self.token_map, &output, threads)?)
            }
            HeadNets::Conditioned(weights) => Box::new(Conditioned::new(
                &weights,
                self.token_map,
                self.token_counts,
                &output,
                model.embedding_rows()?,
                threads,
            )?),
        })
    }
}

/// The shards of a full model that contain heads, by its index.
///
/// # Errors
/// [`HeadsError::File`] for an index that cannot be read or names none.
pub fn shards(index: &Path) -> Result<Vec<PathBuf>, HeadsError> {
    let fail = |reason: String| HeadsError::File { path: index.to_owned(), reason };
    let text = std::fs::read_to_string(index).map_err(|e| fail(e.to_string()))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    let map = value["weight_map"].as_object().ok_or_else(|| fail("no weight_map".into()))?;
    let mut names: Vec<&str> = map
        .iter()
        .filter(|(key, _)| key.starts_with(FULL_MODEL))
        .filter_map(|(_, file)| file.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref()))
    {
        return Err(fail(format!("{name} is not the name of a file in this folder")));
    }
    if names.is_empty() {
        return Err(fail(format!("no key begins with {FULL_MODEL}")));
    }
    Ok(names.into_iter().map(|name| index.with_file_name(name)).collect())
}

/// Tensors of all files, by key: shape and values.
struct Tensors {
    /// Named in errors.
    file: PathBuf,
    map: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Tensors {
    /// Reads the tensors of one file; of a full model, those of the heads.
    fn read(&mut self, path: &Path) -> Result<(), HeadsError> {
        let refuse = |(key, reason)| match key {
            Some(key) => HeadsError::Tensor { path: path.to_owned(), key, reason },
            None => HeadsError::File { path: path.to_owned(), reason },
        };
        let is_pickle = path.extension() == Some("pt".as_ref());
        let tensors = if is_pickle { pickle::read(path) } else { read_safetensors(path) };
        for (name, shape, values) in tensors.map_err(refuse)? {
            if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
                return Err(refuse((Some(name), format!("holds {bad}"))));
            }
            let key = name.strip_prefix(FULL_MODEL).filter(|_| !is_pickle).unwrap_or(&name);
            self.map.insert(key.to_owned(), (shape, values));
        }
        Ok(())
    }

    fn error(&self, key: &str, reason: impl Into<String>) -> HeadsError {
        HeadsError::Tensor { path: self.file.clone(), key: key.to_owned(), reason: reason.into() }
    }

    fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Removes and returns a matrix; `n_out` of `None` accepts any.
    fn matrix(
        &mut self,
        key: &str,
        n_out: Option<usize>,
        n_in: usize,
    ) -> Result<Matrix, HeadsError> {
        let (shape, values) = self.map.remove(key).ok_or_else(|| self.error(key, "is missing"))?;
        match shape[..] {
            [rows, columns] if columns == n_in && rows > 0 && n_out.is_none_or(|n| n == rows) => {
                Ok(Matrix { n_out: rows, n_in, values })
            }
            _ => {
                let rows = n_out.map_or("any".to_owned(), |n| n.to_string());
                Err(self.error(
                    key,
                    format!("its shape is {shape:?}; this model needs [{rows}, {n_in}]"),
                ))
            }
        }
    }

    fn vector(&mut self, key: &str, n: usize) -> Result<Vec<f32>, HeadsError> {
        let (shape, values) = self.map.remove(key).ok_or_else(|| self.error(key, "is missing"))?;
        if shape == [n] {
            Ok(values)
        } else {
            Err(self.error(key, format!("its shape is {shape:?}; this model needs [{n}]")))
        }
    }

    fn into_heads(mut self, shape: Shape, n_heads: usize) -> Result<Heads, HeadsError> {
        let token_map = self.token_map(shape.n_vocab)?;
        if self.has("0.w") {
            let token_counts = self.token_counts(token_map.as_ref().map_or(0, Vec::len))?;
            let nets = HeadNets::Conditioned(self.conditioned(shape, n_heads)?);
            return Ok(Heads { nets, token_map, token_counts });
        }
        let n_out = token_map.as_ref().map_or(shape.n_vocab, Vec::len);
        let vllm = self.map.keys().any(|key| key.starts_with("blocks."));
        let name = |h: usize, l: usize| {
            if vllm { format!("blocks.{h}.layers.{l}") } else { format!("{h}.{l}.linear") }
        };
        let n_found =
            (0..MAX_HEADS).take_while(|&h| self.has(&format!("{}.weight", name(h, 0)))).count();
        if n_found == 0 {
            return Err(
                self.error(&format!("{}.weight", name(0, 0)), "is missing: there is no head")
            );
        }
        let n_blocks =
            (0..MAX_HEADS).take_while(|&l| self.has(&format!("{}.weight", name(0, l)))).count();
        let output = |h: usize| {
            if vllm { format!("lm_heads.{h}.weight") } else { format!("{h}.{n_blocks}.weight") }
        };
        let own_outputs = vllm || self.has(&output(0));
        let biases = !vllm || self.has(&format!("{}.bias", name(0, 0)));

        let (mut blocks, mut outputs) = (vec![], vec![]);
        for h in 0..n_found {
            let mut of_head = vec![];
            for l in 0..n_blocks {
                let weight = self.matrix(
                    &format!("{}.weight", name(h, l)),
                    Some(shape.n_embd),
                    shape.n_embd,
                )?;
                let bias = biases
                    .then(|| self.vector(&format!("{}.bias", name(h, l)), shape.n_embd))
                    .transpose()?;
                of_head.push(ResidualBlock { weight, bias });
            }
            blocks.push(of_head);
            if own_outputs {
                outputs.push(self.matrix(&output(h), Some(n_out), shape.n_embd)?);
            }
        }
        if let Some(key) = self.map.keys().next() {
            return Err(self.error(key, "is a key that no layout has here"));
        }
        blocks.truncate(n_heads);
        outputs.truncate(n_heads);
        let nets = HeadNets::Plain(MedusaWeights { n_embd: shape.n_embd, blocks, outputs });
        Ok(Heads { nets, token_map, token_counts: None })
    }

    fn conditioned(
        &mut self,
        shape: Shape,
        n_heads: usize,
    ) -> Result<ConditionedWeights, HeadsError> {
        self.apply_scales()?;
        let d = shape.n_embd;
        let n_found = (0..MAX_HEADS).take_while(|&h| self.has(&format!("{h}.w"))).count();
        let mut steps = vec![];
        for h in 0..n_found {
            let w = self.matrix(&format!("{h}.w"), None, d)?;
            let width = w.n_out;
            steps.push(ConditionedHead {
                u: self.matrix(&format!("{h}.u"), Some(width), d)?,
                v: self.matrix(&format!("{h}.v"), Some(d), width)?,
                b: self.vector(&format!("{h}.b"), width)?,
                w,
            });
        }
        if let Some(key) = self.map.keys().next() {
            return Err(self.error(key, "is a key that this layout does not have"));
        }
        if let Some(h) = steps.iter().position(|s| s.b.len() != steps[0].b.len()) {
            return Err(self.error(&format!("{h}.w"), "is not as wide as the first head's"));
        }
        steps.truncate(n_heads);
        Ok(ConditionedWeights { n_embd: d, steps })
    }

    /// Multiplies the rows of matrices by their scales.
    fn apply_scales(&mut self) -> Result<(), HeadsError> {
        let suffix = ".scale";
        let keys: Vec<String> =
            self.map.keys().filter(|key| key.ends_with(suffix)).cloned().collect();
        for key in keys {
            let of = key.trim_end_matches(suffix);
            let n_rows = self.map.get(of).and_then(|(shape, _)| shape.first().copied());
            let n_rows = n_rows
                .filter(|&n| n > 0)
                .ok_or_else(|| self.error(&key, format!("scales {of}, which is missing")))?;
            let scales = self.vector(&key, n_rows)?;
            let (_, values) = self.map.get_mut(of).expect("it was just there");
            let n_in = values.len() / n_rows;
            values
                .chunks_mut(n_in.max(1))
                .zip(scales)
                .for_each(|(row, s)| row.iter_mut().for_each(|v| *v *= s));
        }
        Ok(())
    }

    fn token_counts(&mut self, n: usize) -> Result<Option<Vec<f64>>, HeadsError> {
        let key = "token_counts";
        if !self.has(key) {
            return Ok(None);
        }
        let counts = self.vector(key, n)?;
        if counts[0] <= 0.0 || counts[n - 1] < 0.0 || !counts.is_sorted_by(|a, b| a >= b) {
            return Err(
                self.error(key, "must descend from a number above zero, and none may be below it")
            );
        }
        Ok(Some(counts.into_iter().map(f64::from).collect()))
    }

    fn token_map(&mut self, n_vocab: usize) -> Result<Option<Vec<Token>>, HeadsError> {
        let key = "token_map";
        let Some((shape, values)) = self.map.remove(key) else { return Ok(None) };
        if shape.len() != 1 || values.is_empty() {
            return Err(
                self.error(key, format!("its shape is {shape:?}; it must be a list of tokens"))
            );
        }
        let id = |v: &f32| {
            (v.fract() == 0.0 && (0.0..n_vocab as f32).contains(v)).then_some(Token(*v as i32))
        };
        let tokens: Option<Vec<Token>> = values.iter().map(id).collect();
        let tokens = tokens.ok_or_else(|| {
            self.error(key, format!("holds something else than tokens below {n_vocab}"))
        })?;
        let mut seen = HashSet::new();
        if !tokens.iter().all(|token| seen.insert(token)) {
            return Err(self.error(key, "names a token twice"));
        }
        Ok(Some(tokens))
    }
}

/// Reads the tensors of a safetensors file; of a full model, those of the heads. Errors are those of
/// [`pickle::read`].
fn read_safetensors(path: &Path) -> Result<Vec<pickle::Named>, (Option<String>, String)> {
    let bytes = std::fs::read(path).map_err(|e| (None, e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| (None, format!("not a whole safetensors file: {e}")))?;
    let full = file.names().iter().any(|name| name.starts_with(FULL_MODEL));
    let tensors = file.tensors().into_iter();
    let of_heads = tensors.filter(|(name, _)| !full || name.starts_with(FULL_MODEL));
    of_heads
        .map(|(name, view)| match floats(view.dtype(), view.data()) {
            Ok(values) => Ok((name, view.shape().to_vec(), values)),
            Err(reason) => Err((Some(name), reason)),
        })
        .collect()
}

/// A tensor's bytes as floats. Token ids are exact: vocabularies are far below 2^24.
fn floats(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    Ok(match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::BF16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| half::bf16::from_le_bytes(*b).to_f32())
            .collect(),
        Dtype::I64 => {
            bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect()
        }
        Dtype::I8 => bytes.iter().map(|&b| f32::from(b.cast_signed())).collect(),
        Dtype::U32 => {
            bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as f32).collect()
        }
        Dtype::I32 => {
            bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect()
        }
        other => return Err(format!("is of type {other:?}; F32, F16 and BF16 can be read")),
    })
}
