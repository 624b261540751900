//! Steps as they were decided, and what became of their candidates: how much better a choice among the
//! same candidates could have been. Only `bench` records. Pure.

use std::collections::HashMap;

use serde::Serialize;

use super::Tree;
use super::cost::Cost;
use super::policy::Step;
use crate::llama::Token;
use crate::request::Source;

/// Steps of a run.
#[derive(Debug, Default)]
pub struct Recording {
    decisions: Vec<Decision>,
    /// The last of them is the step that goes on.
    is_open: bool,
    /// By request, its answer.
    texts: HashMap<u64, Vec<Token>>,
}

/// A step that only decoded.
#[derive(Debug)]
struct Decision {
    n_decode: usize,
    /// Seconds of the step by the number of candidates that it verifies, drafting included.
    seconds: Vec<f64>,
    trees: Vec<Offered>,
}

/// A sequence's candidates.
#[derive(Debug)]
struct Offered {
    request: u64,
    /// Tokens of its answer before them.
    n_before: usize,
    tree: Tree,
}

/// Tokens in so much time, by the predicted times of steps, so that noise of the clock does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rate {
    tokens: f64,
    seconds: f64,
}

impl Rate {
    /// Tokens per second.
    #[must_use]
    pub fn per_second(self) -> f64 {
        self.tokens / self.seconds.max(f64::MIN_POSITIVE)
    }
}

/// What choices among the same candidates reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Hindsight {
    /// What was chosen.
    pub chosen: Rate,
    /// The best choice by how often candidates of the same source, depth and estimate were right in
    /// this run: what estimates without error would reach.
    pub calibrated: Rate,
    /// The choice that knows which candidates are right: no rule can reach it.
    pub oracle: Rate,
}

impl Hindsight {
    /// The share of speed that the choices lose against calibrated ones.
    #[must_use]
    pub fn regret(&self) -> f64 {
        1.0 - self.chosen.per_second() / self.calibrated.per_second().max(f64::MIN_POSITIVE)
    }
}

/// A candidate in hindsight.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    parent: Option<usize>,
    kind: Kind,
    q: f32,
    is_right: bool,
    is_verified: bool,
}

/// Candidates that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    source: Source,
    depth: usize,
    range: u8,
}

/// Ranges of estimates: so many for each time that they halve.
const RANGES_PER_HALVING: f32 = 2.0;
/// Estimates below 2 to the power of minus this share a range.
const LOWEST: f32 = 8.0;
/// Depths from here on are counted together.
const DEEPEST: usize = 8;
/// Right candidates, as many as were expected, that each kind begins with: few of a kind say little.
const FIRMNESS: f64 = 2.0;
/// Rounds in which the rate that a choice aims at is improved.
const ROUNDS: usize = 4;

impl Recording {
    /// Begins a step, if it only decodes; without candidates so far.
    pub fn begin(&mut self, step: Step, cost: &Cost) {
        self.is_open = step.n_rows == step.n_decode;
        if self.is_open {
            let seconds = vec![step.seconds(cost, 0)];
            self.decisions.push(Decision { n_decode: step.n_decode, seconds, trees: vec![] });
        }
    }

    /// Records what the step that was begun takes with any number of its `n` candidates.
    pub fn offer(&mut self, step: Step, cost: &Cost, n: usize) {
        if let Some(decision) = self.decisions.last_mut().filter(|_| self.is_open) {
            decision.seconds = (0..=n.min(step.room)).map(|n| step.seconds(cost, n)).collect();
        }
    }

    /// Records a sequence's candidates, and the tokens that it got in the step.
    pub fn follow(&mut self, request: u64, tree: &Tree, tokens: impl Iterator<Item = Token>) {
        let text = self.texts.entry(request).or_default();
        let decision = self.decisions.last_mut().filter(|_| self.is_open);
        if let Some(decision) = decision.filter(|_| !tree.proposed().is_empty()) {
            decision.trees.push(Offered { request, n_before: text.len(), tree: tree.clone() });
        }
        text.extend(tokens);
    }

    /// Adds the steps of another one, of other requests.
    pub fn append(&mut self, other: Self) {
        self.decisions.extend(other.decisions);
        self.texts.extend(other.texts);
    }

    /// What the choices reached, and what others would have.
    #[must_use]
    pub fn hindsight(&self) -> Hindsight {
        let steps: Vec<Vec<Vec<Candidate>>> = self
            .decisions
            .iter()
            .map(|d| d.trees.iter().map(|offered| self.candidates(offered)).collect())
            .collect();
        let mut counts: HashMap<Kind, (f64, f64)> = HashMap::new();
        for c in steps.iter().flatten().flatten() {
            let (expected, right) = counts.entry(c.kind).or_default();
            *expected += f64::from(c.q);
            *right += f64::from(u8::from(c.is_right));
        }
        let by_counts = |c: &Candidate| {
            let (expected, right) = counts[&c.kind];
            f64::from(c.q) * (right + FIRMNESS) / (expected + FIRMNESS)
        };
        let by_truth = |c: &Candidate| f64::from(u8::from(c.is_right));
        let chosen = self.decisions.iter().zip(&steps).fold(Rate::default(), |sum, (d, trees)| {
            let verified = || trees.iter().flatten().filter(|c| c.is_verified);
            sum.with(d, verified().count(), verified().filter(|c| c.is_right).count())
        });
        let calibrated = self.best(&steps, chosen, by_counts);
        Hindsight { chosen, calibrated, oracle: self.best(&steps, chosen, by_truth) }
    }

    fn candidates(&self, offered: &Offered) -> Vec<Candidate> {
        let text = &self.texts[&offered.request][offered.n_before..];
        let mut found: Vec<Candidate> = vec![];
        for (i, node) in offered.tree.proposed().iter().enumerate() {
            let range = (-node.q.log2()).clamp(0.0, LOWEST) * RANGES_PER_HALVING;
            let kind =
                Kind { source: node.source(), depth: node.depth.min(DEEPEST), range: range as u8 };
            found.push(Candidate {
                parent: node.parent,
                kind,
                q: node.q,
                is_right: node.parent.is_none_or(|i| found[i].is_right)
                    && text.get(node.depth - 1) == Some(&node.token),
                is_verified: i < offered.tree.len(),
            });
        }
        found
    }

    /// What the choices reach that are best by these estimates: those that give the most tokens beyond
    /// the ones that the same time is worth at the rate of all steps.
    fn best(
        &self,
        steps: &[Vec<Vec<Candidate>>],
        first: Rate,
        estimate: impl Fn(&Candidate) -> f64,
    ) -> Rate {
        let mut best = first;
        for _ in 0..ROUNDS {
            let aim = best.per_second();
            let mut rate = Rate::default();
            for (decision, trees) in self.decisions.iter().zip(steps) {
                let mut all: Vec<(f64, bool)> = vec![];
                for tree in trees {
                    let from = all.len();
                    for c in tree {
                        let above = c.parent.map_or(1.0, |i| all[from + i].0);
                        all.push((estimate(c).min(above), c.is_right));
                    }
                }
                all.sort_by(|a, b| b.0.total_cmp(&a.0));
                let (mut n, mut most, mut sum) = (0, -aim * decision.seconds[0], 0.0);
                for (i, (q, _)) in all.iter().enumerate().take(decision.seconds.len() - 1) {
                    sum += q;
                    let gain = sum - aim * decision.seconds[i + 1];
                    if gain > most {
                        (n, most) = (i + 1, gain);
                    }
                }
                let n_right = all[..n].iter().filter(|(_, is_right)| *is_right).count();
                rate = rate.with(decision, n, n_right);
            }
            if rate.per_second() <= best.per_second() {
                break;
            }
            best = rate;
        }
        best
    }
}

impl Rate {
    /// With a step more, of `n` candidates.
    fn with(self, step: &Decision, n: usize, n_right: usize) -> Self {
        Self {
            tokens: self.tokens + (step.n_decode + n_right) as f64,
            seconds: self.seconds + step.seconds[n.min(step.seconds.len() - 1)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One sequence that verifies the first `n` of these candidates, each the chain's next token, in
    /// every step, where `right` of them come true and a row costs `row` of a step.
    fn recorded(q: &[f32], n: usize, right: impl Fn(usize) -> usize, row: f64) -> Hindsight {
        let cost = Cost::from_points(&[(1, 1.0), (65, 1.0 + 64.0 * row)]);
        let mut recording = Recording::default();
        for i in 0..100 {
            let mut tree = Tree::default();
            let chain = (0..).zip(q);
            chain.fold(None, |at, (t, &q)| Some(tree.push(at, Token(t), q, q)));
            tree.cut(n);
            let step = Step { n_rows: 1, n_before: 1, n_decode: 1, draft_s: 0.0, room: 64 };
            recording.begin(step, &cost);
            recording.offer(step, &cost, q.len());
            let tokens = (0..right(i)).map(|t| Token(t as i32)).chain([Token(99)]);
            recording.follow(i as u64, &tree, tokens);
            recording.begin(Step { n_rows: 9, ..step }, &cost);
            recording.follow(i as u64, &tree, [Token(0)].into_iter());
        }
        recording.hindsight()
    }

    fn rates(of: Hindsight) -> [f64; 3] {
        [of.chosen, of.calibrated, of.oracle].map(|rate| (1e3 * rate.per_second()).round() / 1e3)
    }

    #[test]
    fn estimates_that_hold_leave_nothing_to_regret() {
        let found = recorded(&[0.5, 0.05], 1, |i| i % 2, 0.25);
        assert_eq!(rates(found), [1.2, 1.2, 1.333], "who knows what is right saves the other rows");
        assert_eq!(found.regret(), 0.0);
    }

    #[test]
    fn what_is_always_right_and_was_not_verified_is_regretted() {
        let found = recorded(&[0.1, 0.05], 0, |_| 2, 0.25);
        assert_eq!(rates(found), [1.0, 2.0, 2.0]);
        assert!((found.regret() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn what_is_never_right_and_was_verified_is_regretted() {
        assert_eq!(rates(recorded(&[0.9, 0.8], 2, |_| 0, 0.25)), [0.667, 1.0, 1.0]);
    }
}
