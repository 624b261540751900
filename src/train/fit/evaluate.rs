//! How well heads draft text they have not seen: by rank of the token that did follow, among all
//! draft tokens, given the true path before it.

use ndarray::Axis;
use serde::{Deserialize, Serialize};

use crate::train::fit::batch::Lookup;
use crate::train::fit::lanes;
use crate::train::fit::net::Net;
use crate::train::fit::shards::{DataError, Shard, Shards};
use crate::vector::largest;

/// Ranks that are counted one by one.
const N_RANKS: usize = 16;
/// Rows at a time, per thread.
const ROWS: usize = 128;

/// What one head got right.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadScore {
    /// Tokens that were to be predicted.
    pub n: usize,
    /// How often the token was the most likely one, the second, and so on.
    pub ranks: [usize; N_RANKS],
    /// Tokens that are not in the draft vocabulary: never right.
    pub n_outside: usize,
    /// Sum of the cross entropy of the tokens in the draft vocabulary.
    pub loss: f64,
}

impl HeadScore {
    /// Part of the tokens that were among the `k` most likely, `k` up to 16.
    #[must_use]
    pub fn top(&self, k: usize) -> f64 {
        self.ranks[..k].iter().sum::<usize>() as f64 / self.n.max(1) as f64
    }

    /// Mean cross entropy of the tokens in the draft vocabulary.
    #[must_use]
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
///
/// # Errors
/// When a shard cannot be read.
pub fn evaluate(
    net: &Net,
    params: &[f32],
    shards: &Shards,
    lookup: &Lookup<'_>,
    max_rows: usize,
    n_threads: usize,
) -> Result<Vec<HeadScore>, DataError> {
    let mut scores = vec![HeadScore::default(); net.n_heads()];
    let mut left = max_rows;
    for i in 0..shards.len() {
        let shard = shards.load(i)?;
        let rows: Vec<u32> = (0..shard.n_rows() as u32)
            .filter(|r| shard.n_targets(*r as usize) > 0)
            .take(left)
            .collect();
        left -= rows.len();
        let parts = std::thread::scope(|scope| {
            let workers: Vec<_> = rows
                .chunks(rows.len().div_ceil(n_threads).max(1))
                .map(|rows| scope.spawn(|| part(net, params, &shard, lookup, rows)))
                .collect();
            workers
                .into_iter()
                .map(|w| w.join().expect("a worker does not panic"))
                .collect::<Vec<_>>()
        });
        for part in parts {
            for (sum, score) in scores.iter_mut().zip(&part) {
                sum.add(score);
            }
        }
    }
    Ok(scores)
}

/// Scores some rows of a shard.
fn part(
    net: &Net,
    params: &[f32],
    shard: &Shard,
    lookup: &Lookup<'_>,
    rows: &[u32],
) -> Vec<HeadScore> {
    let mut scores = vec![HeadScore::default(); net.n_heads()];
    for rows in rows.chunks(ROWS) {
        let (x, e) = lookup.inputs(shard, rows, net.n_heads());
        let trace = net.forward(params, &x, &e);
        for (head, score) in scores.iter_mut().enumerate() {
            let mut logits = net.state(&trace, head).dot(&lookup.output().t());
            for (mut logits, &row) in logits.axis_iter_mut(Axis(0)).zip(rows) {
                let Some(token) = shard.path(row as usize, 2 + head) else { continue };
                score.n += 1;
                let Some(target) = lookup.row(token) else {
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

/// Tokens per step that a fixed tree of `n_nodes` would give, root included: the tree takes the
/// ranks that are right most often, as if each depth's ranks were right independently of the
/// others. A tree chosen per step does better.
#[must_use]
pub fn tokens_per_step(scores: &[HeadScore], n_nodes: usize) -> f64 {
    let p = |depth: usize, rank: usize| -> f64 {
        scores.get(depth).map_or(0.0, |score| score.ranks[rank] as f64 / score.n.max(1) as f64)
    };
    // Leaves that could be added: the chance to be right, the chance of the parent, depth and rank.
    let mut open = vec![(p(0, 0), 1.0, 0, 0)];
    let mut tokens = 1.0;
    for _ in 1..n_nodes {
        let best = (0..open.len()).max_by(|&a, &b| open[a].0.total_cmp(&open[b].0));
        let Some((chance, parent, depth, rank)) = best.map(|best| open.swap_remove(best)) else {
            break;
        };
        tokens += chance;
        open.push((chance * p(depth + 1, 0), chance, depth + 1, 0));
        if rank + 1 < N_RANKS {
            open.push((parent * p(depth, rank + 1), parent, depth, rank + 1));
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_certain_heads_is_a_chain() {
        let mut score = HeadScore { n: 10, ..HeadScore::default() };
        score.ranks[0] = 10;
        let scores = vec![score; 3];
        assert!((tokens_per_step(&scores, 64) - 4.0).abs() < 1e-9);
        assert!((tokens_per_step(&scores, 3) - 3.0).abs() < 1e-9);
        assert!((scores[0].top(5) - 1.0).abs() < 1e-9);
    }
}
