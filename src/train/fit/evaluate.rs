//! Accuracy of heads on held-out text: the rank of the token that followed, among all draft tokens,
//! given the true path before it.

use std::thread::ScopedJoinHandle;

use ndarray::Axis;
use serde::{Deserialize, Serialize};

use crate::files::FileError;
use crate::train::fit::batch::Lookup;
use crate::train::fit::lanes;
use crate::train::fit::net::FitNet;
use crate::train::fit::shards::{Shard, Shards};
use crate::vector::largest;

/// Ranks that are counted one by one.
const N_RANKS: usize = 16;
/// Rows at a time, per thread.
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

/// Scores each head on up to `max_rows` rows of the shards.
pub fn evaluate(
    net: &FitNet,
    params: &[f32],
    shards: &Shards,
    lookup: &Lookup<'_>,
    max_rows: usize,
    n_threads: usize,
) -> Result<Vec<HeadScore>, FileError> {
    let mut scores = vec![HeadScore::default(); net.n_heads()];
    let mut left = max_rows;
    for i in 0..shards.len() {
        let shard = shards.load(i)?;
        let rows: Vec<u32> = shard.rows_to_predict_from().take(left).collect();
        left -= rows.len();
        let parts = std::thread::scope(|scope| {
            let workers: Vec<_> = rows
                .chunks(rows.len().div_ceil(n_threads).max(1))
                .map(|rows| scope.spawn(|| part(net, params, &shard, lookup, rows)))
                .collect();
            let joined = |w: ScopedJoinHandle<'_, _>| w.join().expect("a worker does not panic");
            workers.into_iter().map(joined).collect::<Vec<_>>()
        });
        for part in parts {
            scores.iter_mut().zip(&part).for_each(|(sum, score)| sum.add(score));
        }
    }
    Ok(scores)
}

/// Scores some rows of a shard.
fn part(
    net: &FitNet,
    params: &[f32],
    shard: &Shard,
    lookup: &Lookup<'_>,
    rows: &[u32],
) -> Vec<HeadScore> {
    let mut scores = vec![HeadScore::default(); net.n_heads()];
    for rows in rows.chunks(ROWS) {
        let (x, e) = lookup.inputs(shard, rows, net.n_heads());
        let done = net.forward(params, &x, &e);
        for (head, score) in scores.iter_mut().enumerate() {
            let mut logits = net.state(&done, head).dot(&lookup.output().t());
            for (mut logits, &row) in logits.axis_iter_mut(Axis(0)).zip(rows) {
                let Some(token) = shard.path(row as usize, 2 + head) else { continue };
                score.n += 1;
                let Some(target) = lookup.output_row(token) else {
                    score.n_outside += 1;
                    continue;
                };
                let logits = logits.as_slice_mut().expect("a row");
                let logit = logits[target];
                if let Some(count) = score.ranks.get_mut(lanes::count_above(logits, logit)) {
                    *count += 1;
                }
                let max = largest(logits);
                score.loss += f64::from(max + lanes::exp_minus(logits, max).ln() - logit);
            }
        }
    }
    scores
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
