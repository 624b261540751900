//! From rows of a shard to a network's inputs and labels.

use ndarray::{Array2, s};

use crate::train::fit::loss::{NONE, Targets};
use crate::train::fit::shards::{ModelMatrices, Shard};

/// Looks up the embeddings and output rows of tokens.
pub struct Lookup<'a> {
    matrices: &'a ModelMatrices,
    /// The row of each token in the output matrix.
    output_rows: Vec<u32>,
}

impl<'a> Lookup<'a> {
    pub fn new(matrices: &'a ModelMatrices) -> Self {
        let mut output_rows = vec![NONE; matrices.embedding.nrows()];
        for (row, &token) in matrices.token_map.iter().enumerate() {
            output_rows[token as usize] = row as u32;
        }
        Self { matrices, output_rows }
    }

    /// The output matrix [n, d].
    pub fn output(&self) -> ndarray::ArrayView2<'a, f32> {
        self.matrices.output.view()
    }

    /// The row of a token in the output matrix, if the draft vocabulary has it.
    pub fn output_row(&self, token: u32) -> Option<usize> {
        self.output_rows.get(token as usize).filter(|row| **row != NONE).map(|row| *row as usize)
    }

    /// Hidden states, and for each head the embeddings of the paths' tokens that it sees; tokens that
    /// do not exist have embedding zero.
    pub fn inputs(
        &self,
        shard: &Shard,
        rows: &[u32],
        n_heads: usize,
    ) -> (Array2<f32>, Vec<Array2<f32>>) {
        let (n, d) = (rows.len(), shard.n_embd);
        let mut x = Array2::zeros((n, d));
        let mut e = vec![Array2::zeros((n, d)); n_heads];
        for (i, &row) in rows.iter().enumerate() {
            shard.hidden(row as usize, x.row_mut(i).into_slice().expect("a whole row"));
            for (head, e) in e.iter_mut().enumerate() {
                let token = shard.path(row as usize, 1 + head).map(|token| token as usize);
                if let Some(token) = token.filter(|token| *token < self.output_rows.len()) {
                    e.slice_mut(s![i, ..]).assign(&self.matrices.embedding.row(token));
                }
            }
        }
        (x, e)
    }

    /// The labels of head 0 for all rows, then those of head 1, and so on: the model's distribution
    /// over the draft vocabulary, scaled to a sum of one.
    pub fn labels(&self, shard: &Shard, rows: &[u32], n_heads: usize) -> Targets {
        let mut labels = Targets::default();
        let mut list: Vec<(u32, f32)> = Vec::new();
        for head in 0..n_heads {
            for &row in rows {
                list.clear();
                if shard.n_targets(row as usize) > head {
                    let likely = shard.likely(row as usize + 1 + head);
                    list.extend(
                        likely.filter_map(|(token, p)| Some((self.output_row(token)? as u32, p))),
                    );
                }
                let mass: f32 = list.iter().map(|(_, p)| p).sum();
                let scale = if mass > 0.0 { 1.0 / mass } else { 1.0 };
                labels.push(list.iter().map(|&(row, p)| (row, p * scale)));
            }
        }
        labels
    }
}
