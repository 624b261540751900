//! From rows of a shard to a network's inputs and labels.

use candle_core::{Device, Result, Tensor};

use crate::request::Trace;
use crate::train::fit::loss::{NONE, Targets};
use crate::train::fit::shards::{ModelMatrices, Shard};

/// Looks up the embeddings and output rows of tokens.
pub struct Lookup {
    /// [V + 1, d]: the last row is zero, for tokens that do not exist.
    embedding: Tensor,
    /// The output matrix [n, d].
    pub output: Tensor,
    /// The row of each token in the output matrix.
    output_rows: Vec<u32>,
}

impl Lookup {
    pub fn new(matrices: ModelMatrices, device: &Device) -> Result<Self> {
        let n_embd = matrices.n_embd;
        let n_vocab = matrices.embedding.len() / n_embd;
        let mut output_rows = vec![NONE; n_vocab];
        for (row, &token) in matrices.token_map.iter().enumerate() {
            output_rows[token as usize] = row as u32;
        }
        let mut embedding = matrices.embedding;
        embedding.resize((n_vocab + 1) * n_embd, 0.0);
        let n_output = matrices.token_map.len();
        Ok(Self {
            embedding: Tensor::from_vec(embedding, (n_vocab + 1, n_embd), device)?,
            output: Tensor::from_vec(matrices.output, (n_output, n_embd), device)?,
            output_rows,
        })
    }

    /// The row of a token in the output matrix, if the draft vocabulary has it.
    pub fn output_row(&self, token: u32) -> Option<u32> {
        self.output_rows.get(token as usize).copied().filter(|row| *row != NONE)
    }

    /// Hidden states, and for each head the embeddings of the paths' tokens that it sees; tokens that
    /// do not exist have embedding zero.
    pub fn inputs(
        &self,
        shard: &Shard,
        rows: &[u32],
        n_heads: usize,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let (d, n_vocab, device) =
            (shard.n_embd, self.output_rows.len() as u32, self.output.device());
        let mut x = vec![0.0; rows.len() * d];
        for (x, &row) in x.chunks_mut(d).zip(rows) {
            shard.hidden(row as usize, x);
        }
        let embeddings = |head: usize| {
            let token = |&row: &u32| shard.path(row as usize, 1 + head).unwrap_or(n_vocab);
            let tokens: Vec<u32> = rows.iter().map(|row| token(row).min(n_vocab)).collect();
            self.embedding.index_select(&Tensor::new(tokens, device)?, 0)
        };
        let e = (0..n_heads).map(embeddings).collect::<Result<_>>()?;
        Ok((Tensor::from_vec(x, (rows.len(), d), device)?, e))
    }

    /// The labels of head 0 for all rows, then those of head 1, and so on: the model's distribution
    /// over the draft vocabulary, scaled to a sum of one.
    pub fn labels(&self, shard: &Shard, rows: &[u32], n_heads: usize) -> Targets {
        let mut labels = Targets::new(Trace::TOP);
        let mut list: Vec<(u32, f32)> = Vec::new();
        for head in 0..n_heads {
            for &row in rows {
                list.clear();
                if shard.n_targets(row as usize) > head {
                    let likely = shard.likely(row as usize + 1 + head);
                    list.extend(likely.filter_map(|(token, p)| Some((self.output_row(token)?, p))));
                }
                let mass: f32 = list.iter().map(|(_, p)| p).sum();
                let scale = if mass > 0.0 { 1.0 / mass } else { 1.0 };
                labels.push(list.iter().map(|&(row, p)| (row, p * scale)));
            }
        }
        labels
    }
}
