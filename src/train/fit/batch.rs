//! From rows of a shard to a network's inputs and labels.

use candle_core::{Device, Result, Tensor};

use crate::request::Trace;
use crate::train::fit::loss::{NONE, Targets};
use crate::train::fit::shards::{ModelMatrices, Shard};

/// Looks up the embeddings and output rows of tokens.
pub struct Lookup {
    /// [V + 1, d], times `scale`: the last row is zero, for tokens that do not exist.
    embedding: Tensor,
    /// What brings embeddings to a mean square of one. They can be far smaller than states, and a head
    /// that begins with weights of the same size for both would learn of tokens last.
    pub scale: f32,
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
        let squares: f64 = embedding.iter().map(|v| f64::from(*v).powi(2)).sum();
        let scale =
            if squares > 0.0 { (embedding.len() as f64 / squares).sqrt() as f32 } else { 1.0 };
        embedding.iter_mut().for_each(|v| *v *= scale);
        embedding.resize((n_vocab + 1) * n_embd, 0.0);
        let n_output = matrices.token_map.len();
        Ok(Self {
            embedding: Tensor::from_vec(embedding, (n_vocab + 1, n_embd), device)?,
            output: Tensor::from_vec(matrices.output, (n_output, n_embd), device)?,
            output_rows,
            scale,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_of_any_size_weigh_the_same() {
        let lookup = |size: f32| {
            let embedding = [1.0, -2.0, 0.5, 3.0, 0.0, 1.0].map(|v| v * size).to_vec();
            let matrices =
                ModelMatrices { n_embd: 2, embedding, output: vec![1.0; 4], token_map: vec![2, 0] };
            Lookup::new(matrices, &Device::Cpu).unwrap()
        };
        let [small, large] = [0.01, 100.0].map(lookup);
        let rows = |lookup: &Lookup| lookup.embedding.to_vec2::<f32>().unwrap();
        let squares: f32 = rows(&small).iter().flatten().map(|v| v * v).sum();
        assert!((squares / 6.0 - 1.0).abs() < 1e-5 && rows(&small)[3] == [0.0, 0.0]);
        for (a, b) in rows(&small).concat().iter().zip(rows(&large).concat()) {
            assert!((a - b).abs() < 1e-5, "{a}, not {b}");
        }
        assert!((small.scale / large.scale / 1e4 - 1.0).abs() < 1e-5);
        let none = lookup(0.0);
        assert!(rows(&none).iter().flatten().all(|&v| v == 0.0) && none.scale == 1.0);
        assert_eq!(small.output_row(2), Some(0));
        assert_eq!(small.output_row(1), None);
    }
}
