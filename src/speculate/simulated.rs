//! Acceptance at given rates, to measure what steps cost where heads that are worth something are
//! not at hand. Heads are computed and trees verified as ever; only what the model is taken to have
//! chosen comes from outside. Pure.
//!
//! Rate `h` is the probability that the first candidate at depth `h + 1` is right, given that the
//! path before it is. Tables of heads' top-1 accuracy are used as such rates: they count a head as
//! right whatever the heads before it said, which is near. No other candidate is ever right, so a
//! policy that knows the rates verifies chains.

use super::tree::Tree;
use crate::llama::Token;
use crate::vector::largest_k;

/// Rates by depth.
#[derive(Clone, Debug, PartialEq)]
pub struct Acceptance {
    rates: Vec<f32>,
}

impl Acceptance {
    /// From rates of the heads in order; `None` without a rate, or for one that is no probability.
    #[must_use]
    pub fn new(rates: Vec<f32>) -> Option<Self> {
        (!rates.is_empty() && rates.iter().all(|rate| (0.0..=1.0).contains(rate)))
            .then_some(Self { rates })
    }

    /// The rates.
    #[must_use]
    pub fn rates(&self) -> &[f32] {
        &self.rates
    }

    /// Probability that a candidate at `depth` (1: behind the root) is right if its parent is,
    /// where `rank` of its siblings are better.
    #[must_use]
    pub fn rate(&self, depth: usize, rank: usize) -> f32 {
        if rank > 0 {
            return 0.0;
        }
        self.rates.get(depth - 1).copied().unwrap_or(0.0)
    }

    /// The candidate behind node `at` that is taken to be right, if one is: the best one, where
    /// `chance`, below 1, is below its rate.
    #[must_use]
    pub fn right(&self, tree: &Tree, at: Option<usize>, chance: f64) -> Option<Token> {
        let best = tree.nodes().iter().find(|n| n.parent == at)?;
        (chance < f64::from(self.rate(best.depth, 0))).then_some(best.token)
    }

    /// What the model is taken to choose behind node `at` of `tree` (`None`: behind the root), all
    /// candidates that were drafted. `own` is its real choice by `logits`, and `chance`, below 1,
    /// decides: at the rate the best candidate, else the real choice, or the likeliest token that
    /// is no candidate where that is one. Without candidates the real choice.
    #[must_use]
    pub fn choose(
        &self,
        tree: &Tree,
        at: Option<usize>,
        own: Token,
        logits: &[f32],
        chance: f64,
    ) -> Token {
        if let Some(right) = self.right(tree, at, chance) {
            return right;
        }
        if tree.child(at, own).is_none() {
            return own;
        }
        let mut likely = vec![];
        let n_children = tree.nodes().iter().filter(|n| n.parent == at).count();
        largest_k(logits, n_children + 1, &mut likely);
        likely
            .into_iter()
            .map(|(token, _)| token)
            .find(|&token| tree.child(at, token).is_none())
            .unwrap_or(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculate::calibration::Calibration;

    #[test]
    fn the_best_candidate_is_right_at_the_rate_and_no_other_ever() {
        let acceptance = Acceptance::new(vec![0.6, 0.25]).unwrap();
        let mut tree = Tree::default();
        let levels =
            [vec![(Token(3), 0.5), (Token(1), 0.4)], vec![(Token(2), 0.5)], vec![(Token(4), 0.5)]];
        tree.fill(&levels, &Calibration::given(acceptance.clone()), 1.0, 64);
        let logits = [0.0, 3.0, 1.0, 2.0, 0.5];
        let choose = |at, chance| acceptance.choose(&tree, at, Token(1), &logits, chance);
        assert_eq!(
            [choose(None, 0.0), choose(None, 0.59), choose(None, 0.61)],
            [Token(3), Token(3), Token(2)]
        );
        let first = tree.child(None, Token(3));
        assert_eq!(
            [choose(first, 0.24), choose(first, 0.26)],
            [Token(2), Token(1)],
            "what is no candidate is left alone"
        );
        let second = tree.child(first, Token(2));
        assert_eq!(choose(second, 0.0), Token(1), "beyond the rates nothing is right");
        assert_eq!(
            choose(tree.child(second, Token(4)), 0.0),
            Token(1),
            "nor where nothing was drafted"
        );
        let q: Vec<f32> = tree.nodes().iter().map(|n| n.q).collect();
        assert!(
            (q[0] - 0.6).abs() < 1e-6
                && (q[1] - 0.15).abs() < 1e-6
                && q[2..].iter().all(|&q| q == 0.0),
            "{q:?}"
        );
    }

    #[test]
    fn rates_are_probabilities() {
        for rates in [vec![], vec![0.5, -0.1], vec![1.1], vec![f32::NAN]] {
            assert_eq!(Acceptance::new(rates), None);
        }
        assert!(Acceptance::new(vec![0.0, 1.0]).is_some());
    }
}
