//! How many candidates a step verifies: those that make tokens per second highest. Pure.
//!
//! With `S` sequences, `c(n)` the seconds of a step of `n` rows and `d` those that drafting took, a
//! step that verifies a set of candidates gives `S + sum of their q` tokens in `c(rows +
//! candidates) + d` seconds, and slightly more after a step of another number of rows. The best `n`
//! candidates are those with the highest `q` of all sequences; a parent's `q` is never below its
//! child's, so they form whole trees. One sort and one scan find the best step.

use std::borrow::BorrowMut;

use super::cost::Cost;
use super::tree::Tree;

/// What a step has without candidates.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Rows of it: one for each decoding sequence, and those of prompts.
    pub n_rows: usize,
    /// Rows of the step before it.
    pub n_before: usize,
    /// Decoding sequences; each gives a token in any case.
    pub n_decode: usize,
    /// Seconds that drafting took, spent whatever is chosen.
    pub draft_s: f64,
    /// Most candidates that the batch and the cache have room for.
    pub room: usize,
}

impl Step {
    /// Seconds to give the decoding sequences what they get with `n` candidates. What a prompt's
    /// rows take is not counted, since they must be computed in some step: a token is worth what it
    /// takes in a step without them.
    #[must_use]
    pub fn seconds(&self, cost: &Cost, n: usize) -> f64 {
        let n_rows = self.n_rows + n;
        if self.n_rows == self.n_decode {
            return cost.seconds_after(self.n_before, n_rows) + self.draft_s;
        }
        cost.seconds(self.n_decode) + cost.seconds(n_rows) - cost.seconds(self.n_rows)
            + self.draft_s
    }
}

/// How many candidates with these `q` give the most tokens per second, and how many those are.
/// Leaves `q` in `sorted`, best first.
pub fn best(
    q: impl Iterator<Item = f32>,
    step: Step,
    cost: &Cost,
    sorted: &mut Vec<f32>,
) -> (usize, f64) {
    sorted.clear();
    sorted.extend(q);
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut tokens = step.n_decode as f64;
    let (mut best_n, mut best) = (0, tokens / step.seconds(cost, 0));
    for (i, q) in sorted.iter().take(step.room).enumerate() {
        tokens += f64::from(*q);
        let rate = tokens / step.seconds(cost, i + 1);
        if rate > best {
            (best_n, best) = (i + 1, rate);
        }
    }
    (best_n, best)
}

/// Cuts every tree to the nodes that pay. Returns how many are left in all.
pub fn choose<T: BorrowMut<Tree>>(
    trees: &mut [T],
    step: Step,
    cost: &Cost,
    scratch: &mut Vec<f32>,
) -> usize {
    let all = trees.iter().flat_map(|t| t.borrow().nodes().iter().map(|n| n.q));
    let (best_n, _) = best(all, step, cost, scratch);
    // Nodes above the last one's q are in; of those that equal it, as many as there is room for.
    let last = best_n.checked_sub(1).map_or(f32::INFINITY, |i| scratch[i]);
    let mut equal = best_n - scratch.partition_point(|&q| q > last);
    for tree in trees {
        let tree: &mut Tree = tree.borrow_mut();
        let above = tree.nodes().partition_point(|n| n.q > last);
        let ties = tree.nodes()[above..].iter().take_while(|n| n.q == last).count().min(equal);
        equal -= ties;
        tree.cut(above + ties);
    }
    best_n
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::Token;
    use crate::speculate::calibration::Calibration;
    use crate::speculate::paths::fill;
    use proptest::prelude::*;

    fn tree(probabilities: &[f32], n: usize) -> Tree {
        let level: Vec<(Token, f32)> =
            (0..).zip(probabilities).map(|(t, &p)| (Token(t), p)).collect();
        let mut tree = Tree::default();
        fill(&mut tree, &[level.clone(), level], &Calibration::exact(), 1.0, n);
        tree
    }

    fn step(n_decode: usize) -> Step {
        Step { n_rows: n_decode, n_before: 0, n_decode, draft_s: 0.0, room: usize::MAX }
    }

    #[test]
    fn where_rows_are_free_all_are_taken_and_where_they_cost_as_much_as_a_step_none() {
        let free = Cost::from_points(&[(1, 1.0), (64, 1.0)]);
        let expensive = Cost::from_points(&[(1, 1.0), (2, 2.0), (64, 64.0)]);
        let mut trees = [tree(&[0.6, 0.3], 4), tree(&[0.2, 0.1], 4)];
        assert_eq!(choose(&mut trees, step(2), &free, &mut vec![]), 8);
        assert_eq!(choose(&mut trees, step(2), &expensive, &mut vec![]), 0);
        assert!(trees.iter().all(Tree::is_empty));
    }

    #[test]
    fn the_sure_sequence_gets_the_rows() {
        // A row costs a third of a step: only candidates above about that pay.
        let cost = Cost::from_points(&[(1, 1.0), (64, 1.0 + 63.0 / 3.0)]);
        let mut trees = [tree(&[0.9, 0.05], 6), tree(&[0.1, 0.05], 6)];
        choose(&mut trees, Step { n_rows: 2, ..step(2) }, &cost, &mut vec![]);
        assert_eq!((trees[0].len(), trees[1].len()), (2, 0));
    }

    #[test]
    fn a_prompts_rows_make_no_token_more_expensive() {
        let cost = Cost::from_points(&[(1, 1.0), (64, 1.0 + 63.0 * 0.2)]);
        for (p, n) in [(0.15, 0), (0.25, 1)] {
            for n_prompt in [0, 40] {
                let step = Step { n_rows: 1 + n_prompt, n_before: 1, ..step(1) };
                assert_eq!(
                    choose(&mut [tree(&[p], 1)], step, &cost, &mut vec![]),
                    n,
                    "{p} beside {n_prompt} rows"
                );
            }
        }
    }

    #[test]
    fn as_many_rows_as_before_are_kept_for_a_candidate_more_or_less() {
        let cost = Cost::from_points(&[(1, 1.0), (64, 1.0 + 63.0 * 0.2)]).with_change(0.3);
        let best = |n_before: usize, p: &[f32]| {
            choose(&mut [tree(p, 3)], Step { n_before, ..step(1) }, &cost, &mut vec![])
        };
        assert_eq!(
            [best(1, &[0.4]), best(2, &[0.4]), best(2, &[0.05]), best(1, &[0.9])],
            [0, 1, 1, 2]
        );
    }

    proptest! {
        /// No other choice of prefixes gives a higher rate.
        #[test]
        fn nothing_beats_the_choice(
            a in prop::collection::vec(0.0f32..1.0, 1..4),
            b in prop::collection::vec(0.0f32..1.0, 1..4),
            slope in 0.0f64..1.0,
            draft_s in 0.0f64..0.5,
            room in 0usize..12,
        ) {
            let cost = Cost::from_points(&[(1, 1.0), (64, 1.0 + 63.0 * slope)]);
            let full = [a, b].map(|mut p| { p.sort_by(|x, y| y.total_cmp(x)); tree(&p, 6) });
            let step = Step { draft_s, room, ..step(2) };
            let rate = |trees: &[Tree]| {
                let n: usize = trees.iter().map(Tree::len).sum();
                let q: f64 = trees.iter().flat_map(|t| t.nodes()).map(|n| f64::from(n.q)).sum();
                (2.0 + q) / (cost.seconds(2 + n) + draft_s)
            };
            let mut chosen = full.clone();
            let n = choose(&mut chosen, step, &cost, &mut vec![]);
            prop_assert_eq!(n, chosen.iter().map(Tree::len).sum::<usize>());
            prop_assert!(n <= room);
            for i in 0..=full[0].len() {
                for j in 0..=full[1].len().min(room.saturating_sub(i)) {
                    if i + j <= room {
                        let mut other = full.clone();
                        other[0].cut(i);
                        other[1].cut(j);
                        prop_assert!(rate(&other) <= rate(&chosen) + 1e-6);
                    }
                }
            }
        }
    }
}
