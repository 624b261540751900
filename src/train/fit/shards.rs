//! Training data in files: hidden states and distributions of a model along its own answers. Reads
//! the shards that `features` describes, one at a time; knows nothing of networks.

use std::path::{Path, PathBuf};

use crate::files::FileError;
use crate::llama::{LlamaError, Model};
use crate::train::{read_header, read_tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::{Dtype, SafeTensors};

/// The shards of one kind in a folder.
pub struct Shards {
    /// Each with its number of rows.
    files: Vec<(PathBuf, usize)>,
}

/// One shard in memory.
pub struct Shard {
    pub n_embd: usize,
    k: usize,
    hidden: Vec<f16>,
    next: Vec<u32>,
    remaining: Vec<u32>,
    top: Vec<u32>,
    top_p: Vec<f16>,
}

/// The model's matrices that fitting reads.
pub struct ModelMatrices {
    /// Width, d.
    pub n_embd: usize,
    /// Embeddings [V, d].
    pub embedding: Vec<f32>,
    /// Output rows of the draft vocabulary [n, d].
    pub output: Vec<f32>,
    /// The token of each output row.
    pub token_map: Vec<u32>,
}

impl Shards {
    /// Finds the shards named `{prefix}*.safetensors`, in order of their names, and reads how many
    /// rows each has.
    pub fn open(folder: &Path, prefix: &str) -> Result<Self, FileError> {
        let fail = |e: std::io::Error| FileError::new(folder, e);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with(prefix) && name.ends_with(".safetensors") {
                let n =
                    read_header(&path)?.info("next").and_then(|next| next.shape.first().copied());
                let n = n.ok_or_else(|| FileError::new(&path, "has no list `next`"))?;
                files.push((path, n));
            }
        }
        files.sort();
        Ok(Self { files })
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// The name of each file and its number of rows: they identify the data.
    pub fn files(&self) -> impl Iterator<Item = (String, usize)> {
        self.files.iter().map(|(path, n)| {
            (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), *n)
        })
    }

    /// Rows of all shards.
    pub fn n_rows(&self) -> usize {
        self.files.iter().map(|(_, n)| n).sum()
    }

    pub fn n_rows_of(&self, shard: usize) -> usize {
        self.files[shard].1
    }

    pub fn load(&self, shard: usize) -> Result<Shard, FileError> {
        Shard::read(&self.files[shard].0)
    }

    /// The draft vocabulary: the `n` most frequent tokens of the answers with their counts, the most
    /// frequent first. Tokens that the model found likely count by their probability, so that a
    /// small sample of text suffices.
    pub fn frequent_tokens(&self, n: usize, n_vocab: usize) -> Result<Vec<(u32, f64)>, FileError> {
        let mut counts = vec![0.0f64; n_vocab];
        for i in 0..self.len() {
            let shard = self.load(i)?;
            let likely =
                shard.top.iter().zip(&shard.top_p).map(|(t, p)| (*t, f64::from(p.to_f32())));
            for (token, count) in likely.chain(shard.next.iter().map(|t| (*t, 1.0))) {
                if let Some(sum) = counts.get_mut(token as usize) {
                    *sum += count;
                }
            }
        }
        let mut tokens: Vec<u32> = (0..n_vocab as u32).collect();
        tokens.sort_by(|a, b| counts[*b as usize].total_cmp(&counts[*a as usize]).then(a.cmp(b)));
        tokens.truncate(n);
        Ok(tokens.into_iter().map(|t| (t, counts[t as usize])).collect())
    }
}

impl Shard {
    fn read(path: &Path) -> Result<Self, FileError> {
        let fail = |reason: String| Err(FileError::new(path, reason));
        let bytes = std::fs::read(path).map_err(|e| FileError::new(path, e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| FileError::new(path, e))?;
        let u32s = |name| read_tensor(path, &file, name, Dtype::U32, u32::from_le_bytes);
        let f16s = |name| read_tensor(path, &file, name, Dtype::F16, f16::from_le_bytes);
        let (hidden_shape, hidden) = f16s("hidden")?;
        let (next_shape, next) = u32s("next")?;
        let (remaining_shape, remaining) = u32s("remaining")?;
        let (top_shape, top) = u32s("top")?;
        let (top_p_shape, top_p) = f16s("top_p")?;
        let (&[n, n_embd], &[n_top, k]) = (&hidden_shape[..], &top_shape[..]) else {
            return fail(format!("hidden is {hidden_shape:?} and top {top_shape:?}: not matrices"));
        };
        if next_shape != [n] || remaining_shape != [n] || n_top != n || top_p_shape != top_shape {
            let all =
                format!("{next_shape:?}, {remaining_shape:?}, {top_shape:?}, {top_p_shape:?}");
            return fail(format!("next, remaining, top, top_p are {all} for {n} rows"));
        }
        if let Some(row) = (0..n).find(|&i| remaining[i] as usize >= n - i) {
            return fail(format!("row {row} of {n} says that {} follow", remaining[row]));
        }
        Ok(Self { n_embd, k, hidden, next, remaining, top, top_p })
    }

    pub fn n_rows(&self) -> usize {
        self.next.len()
    }

    /// The rows from which some head has a token to predict.
    pub fn rows_to_predict_from(&self) -> impl Iterator<Item = u32> {
        (0..self.n_rows() as u32).filter(|&row| self.n_targets(row as usize) > 0)
    }

    /// Writes the hidden state of a row.
    pub fn hidden(&self, row: usize, to: &mut [f32]) {
        self.hidden[row * self.n_embd..(row + 1) * self.n_embd].convert_to_f32_slice(to);
    }

    /// The number of heads that have a token to predict from this row.
    pub fn n_targets(&self, row: usize) -> usize {
        self.remaining[row] as usize
    }

    /// The path's token in column `column` of this row: 0 is the token at the row's own position
    /// (the first row of an answer does not know it), 1 the one that follows, and so on; `None`
    /// past the answer's end.
    pub fn path(&self, row: usize, column: usize) -> Option<u32> {
        if column == 0 {
            let before = row.checked_sub(1)?;
            return (self.remaining[before] == self.remaining[row] + 1).then(|| self.next[before]);
        }
        (self.remaining[row] as usize >= column - 1).then(|| self.next[row + column - 1])
    }

    /// The model's distribution of the token after this row: likely tokens with probabilities.
    pub fn likely(&self, row: usize) -> impl Iterator<Item = (u32, f32)> {
        let range = row * self.k..(row + 1) * self.k;
        self.top[range.clone()].iter().copied().zip(self.top_p[range].iter().map(|p| p.to_f32()))
    }
}

impl ModelMatrices {
    /// A model's own, with the output rows of `token_map`.
    pub fn of(model: &Model, token_map: Vec<u32>) -> Result<Self, LlamaError> {
        let whole = model.embedding_rows()?.matrix()?;
        let rows = model.output_rows()?;
        let mut values = Vec::with_capacity(token_map.len() * rows.n_in());
        token_map.iter().try_for_each(|&t| rows.read(t as usize, 1, &mut values))?;
        Ok(Self { n_embd: whole.n_in, embedding: whole.values, output: values, token_map })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::write_tensors;

    /// Writes a shard of sequences of `(hidden, next, top)`, with one likely token per row.
    fn write(path: &Path, d: usize, sequences: &[Vec<(Vec<f32>, u32, u32)>]) {
        let rows: Vec<_> = sequences.iter().flatten().collect();
        let n = rows.len();
        let halves =
            |v: &[f32]| v.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect::<Vec<u8>>();
        let hidden: Vec<f32> = rows.iter().flat_map(|r| r.0.clone()).collect();
        let remaining = sequences.iter().flat_map(|s| (0..s.len() as u32).rev());
        let tensors = [
            ("hidden", Dtype::F16, vec![n, d], halves(&hidden)),
            ("next", Dtype::U32, vec![n], rows.iter().flat_map(|r| r.1.to_le_bytes()).collect()),
            ("remaining", Dtype::U32, vec![n], remaining.flat_map(u32::to_le_bytes).collect()),
            ("top", Dtype::U32, vec![n, 1], rows.iter().flat_map(|r| r.2.to_le_bytes()).collect()),
            ("top_p", Dtype::F16, vec![n, 1], halves(&vec![1.0; n])),
        ];
        write_tensors(path, &tensors, None).expect("writable");
    }

    #[test]
    fn paths_end_with_the_answer() {
        let folder = tempfile::tempdir().expect("a folder");
        let row = |t: u32| (vec![t as f32, 0.5], t, t + 10);
        write(
            &folder.path().join("train-0.safetensors"),
            2,
            &[vec![row(1), row(2), row(3)], vec![row(4)]],
        );
        let shards = Shards::open(folder.path(), "train-").expect("opens");
        assert_eq!((shards.len(), shards.n_rows()), (1, 4));
        let shard = shards.load(0).expect("loads");
        let path = |row: usize| (0..4).map(|c| shard.path(row, c)).collect::<Vec<_>>();
        assert_eq!(path(0), [None, Some(1), Some(2), Some(3)]);
        assert_eq!(path(2), [Some(2), Some(3), None, None]);
        assert_eq!(path(3), [None, Some(4), None, None]);
        assert_eq!(shard.likely(1).collect::<Vec<_>>(), [(12, 1.0)]);
        let mut hidden = [0.0; 2];
        shard.hidden(1, &mut hidden);
        assert_eq!(hidden, [2.0, 0.5]);
        let counted = shards.frequent_tokens(2, 20).expect("counts");
        assert_eq!(counted.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 2]);
        assert!(counted[0].1 >= counted[1].1);
    }

    #[test]
    fn an_invalid_shard_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("train-0.safetensors"), b"no tensors").expect("writable");
        assert!(Shards::open(folder.path(), "train-").is_err());
        assert_eq!(Shards::open(folder.path(), "held-").expect("none of these").len(), 0);
    }
}
