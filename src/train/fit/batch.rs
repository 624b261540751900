//! From rows of a shard to what a network reads and what it should say.

use ndarray::{Array2, s};

use crate::train::fit::loss::{Labels, NONE};
use crate::train::fit::shards::{Matrices, Shard};

/// How labels are made of what the model thought.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Teaching {
    /// The part of the label that is the token which did follow; the rest is the model's
    /// distribution.
    pub hard: f32,
    /// Scale the likely tokens' probabilities to a sum of one, instead of leaving out what the
    /// others have.
    pub renormalise: bool,
    /// Likely tokens that are used.
    pub n_likely: usize,
    /// Likely tokens below this probability are not used.
    pub min_p: f32,
}

/// Looks tokens up.
pub struct Lookup<'a> {
    matrices: &'a Matrices,
    /// The output row of each token.
    rows: Vec<u32>,
}

impl<'a> Lookup<'a> {
    /// Inverts the token map.
    #[must_use]
    pub fn new(matrices: &'a Matrices) -> Self {
        let mut rows = vec![NONE; matrices.embedding.nrows()];
        for (row, &token) in matrices.token_map.iter().enumerate() {
            rows[token as usize] = row as u32;
        }
        Self { matrices, rows }
    }

    /// The output matrix [n, d].
    #[must_use]
    pub fn output(&self) -> ndarray::ArrayView2<'a, f32> {
        self.matrices.output.view()
    }

    /// The output row of a token, if it is in the draft vocabulary.
    #[must_use]
    pub fn row(&self, token: u32) -> Option<usize> {
        self.rows.get(token as usize).filter(|row| **row != NONE).map(|row| *row as usize)
    }

    /// Hidden states and the embeddings of the paths' tokens, a matrix per column (columns 0 to
    /// `n_heads`); tokens that do not exist have embedding zero.
    #[must_use]
    pub fn inputs(
        &self,
        shard: &Shard,
        rows: &[u32],
        n_heads: usize,
    ) -> (Array2<f32>, Vec<Array2<f32>>) {
        let (n, d) = (rows.len(), shard.n_embd());
        let mut x = Array2::zeros((n, d));
        let mut e = vec![Array2::zeros((n, d)); 1 + n_heads];
        for (i, &row) in rows.iter().enumerate() {
            shard.hidden(row as usize, x.row_mut(i).into_slice().expect("a whole row"));
            for (column, e) in e.iter_mut().enumerate() {
                let token = shard.path(row as usize, column).map(|token| token as usize);
                if let Some(token) = token.filter(|token| *token < self.rows.len()) {
                    e.slice_mut(s![i, ..]).assign(&self.matrices.embedding.row(token));
                }
            }
        }
        (x, e)
    }

    /// The labels of head 0 for all rows, then those of head 1, and so on.
    #[must_use]
    pub fn labels(
        &self,
        shard: &Shard,
        rows: &[u32],
        n_heads: usize,
        teaching: Teaching,
    ) -> Labels {
        let mut labels = Labels::default();
        let mut list: Vec<(u32, f32)> = Vec::new();
        for head in 0..n_heads {
            for &row in rows {
                list.clear();
                if shard.n_targets(row as usize) > head {
                    let at = row as usize + 1 + head;
                    let likely = shard
                        .likely(at)
                        .take(teaching.n_likely)
                        .filter(|(_, p)| *p >= teaching.min_p);
                    list.extend(likely.filter_map(|(token, p)| Some((self.row(token)? as u32, p))));
                    let mass: f32 = list.iter().map(|(_, p)| p).sum();
                    let scale = if teaching.renormalise && mass > 0.0 { 1.0 / mass } else { 1.0 };
                    for (_, p) in &mut list {
                        *p *= scale * (1.0 - teaching.hard);
                    }
                    if teaching.hard > 0.0 {
                        let target = shard.path(at, 1).and_then(|token| self.row(token));
                        list.extend(target.map(|row| (row as u32, teaching.hard)));
                        list.retain(|(_, p)| *p > 0.0);
                    }
                }
                labels.push(list.iter().copied());
            }
        }
        labels
    }
}
