//! Accuracy of heads on held-out text: the rank of the token that followed, among all draft tokens,
//! given the true path before it.

use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::train::fit::batch::Lookup;
use crate::train::fit::error::FitError;
use crate::train::fit::net::FitNet;
use crate::train::fit::parts::in_parts;
use crate::train::fit::shards::{Shard, Shards};

/// Ranks that are counted one by one.
const N_RANKS: usize = 16;
/// Rows at a time, per part.
const ROWS: usize = 128;

/// The accuracy of one head.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct HeadScore {
    /// Tokens to predict.
    pub n: usize,
    /// How often the token was the most likely one, the second most likely, and so on.
    pub ranks: [usize; N_RANKS],
    /// Tokens outside the draft vocabulary, which count as missed.
    pub n_outside: usize,
    /// Sum of the cross entropy of the tokens in the draft vocabulary.
    pub loss: f64,
}

impl HeadScore {
    /// The share of tokens among the `k` most likely, `k` up to 16.
    pub fn top(&self, k: usize) -> f64 {
        self.ranks[..k].iter().sum::<usize>() as f64 / self.n.max(1) as f64
    }

    /// Mean cross entropy of the tokens in the draft vocabulary.
    pub fn mean_loss(&self) -> f64 {
        self.loss / (self.n - self.n_outside).max(1) as f64
    }

    fn add(&mut self, other: &Self) {
        self.n += other.n;
        self.n_outside += other.n_outside;
        self.loss += other.loss;
        for (sum, n) in self.ranks.iter_mut().zip(other.ranks) {
            *sum += n;
        }
    }
}

/// Scores each head on up to `max_rows` rows of the shards, in `n_parts` parts at once.
pub fn evaluate(
    net: &FitNet,
    shards: &Shards,
    lookup: &Lookup,
    max_rows: usize,
    n_parts: usize,
) -> Result<Vec<HeadScore>, FitError> {
    let mut scores = vec![HeadScore::default(); net.n_heads()];
    let mut left = max_rows;
    for i in 0..shards.len() {
        let shard = shards.load(i)?;
        let rows: Vec<u32> = shard.rows_to_predict_from().take(left).collect();
        left -= rows.len();
        for part in in_parts(&rows, n_parts, |_, rows| part(net, &shard, lookup, rows))? {
            scores.iter_mut().zip(&part).for_each(|(sum, score)| sum.add(score));
        }
    }
    Ok(scores)
}

/// Scores some rows of a shard.
fn part(
    net: &FitNet,
    shard: &Shard,
    lookup: &Lookup,
    rows: &[u32],
) -> candle_core::Result<Vec<HeadScore>> {
    let mut scores = vec![HeadScore::default(); net.n_heads()];
    for rows in rows.chunks(ROWS) {
        let (x, e) = lookup.inputs(shard, rows, net.n_heads())?;
        let states = net.forward(&x, &e)?;
        for (head, (score, states)) in scores.iter_mut().zip(&states).enumerate() {
            // The examples with a token to predict, and its row in the output matrix.
            let mut known: Vec<(u32, u32)> = vec![];
            for (i, &row) in rows.iter().enumerate() {
                let Some(token) = shard.path(row as usize, 2 + head) else { continue };
                score.n += 1;
                match lookup.output_row(token) {
                    Some(target) => known.push((i as u32, target)),
                    None => score.n_outside += 1,
                }
            }
            if known.is_empty() {
                continue;
            }
            let (examples, targets): (Vec<u32>, Vec<u32>) = known.into_iter().unzip();
            let device = net.device();
            let states = states.detach().index_select(&Tensor::new(examples, device)?, 0)?;
            let logits = states.matmul(&lookup.output.t()?)?;
            let target = logits.gather(&Tensor::new(targets, device)?.unsqueeze(1)?, D::Minus1)?;
            let above = logits.broadcast_gt(&target)?.to_dtype(DType::F32)?.sum(D::Minus1)?;
            for rank in above.to_vec1::<f32>()? {
                if let Some(count) = score.ranks.get_mut(rank as usize) {
                    *count += 1;
                }
            }
            let loss = (logits.log_sum_exp(D::Minus1)?.sum_all()? - target.sum_all()?)?;
            score.loss += f64::from(loss.to_scalar::<f32>()?);
        }
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_summed_up() {
        let mut score = HeadScore { n: 10, ..HeadScore::default() };
        (score.ranks[0], score.ranks[4], score.ranks[5]) = (4, 2, 3);
        assert!((score.top(1) - 0.4).abs() < 1e-9 && (score.top(5) - 0.6).abs() < 1e-9);
    }
}
