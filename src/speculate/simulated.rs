//! Acceptance at given rates, to measure what steps cost without good heads. [`Simulated`] wraps a
//! model and changes the logits that candidates follow. Pure.
//!
//! Rate `h` is the probability that the best candidate at depth `h + 1` is right, given that the
//! path before it is; heads' top-1 accuracies come close. No other candidate is ever right, so a
//! policy that knows the rates ([`Acceptance::calibration`]) verifies chains.
//!
//! Changed logits are on the host, so the host chooses for sequences with candidates even where the
//! device could: on a GPU simulated speeds are lower bounds.

use super::calibration::Calibration;
use super::device::{Ask, OutputRow};
use crate::engine::slots::KvOp;
use crate::engine::{Forward, Row, Rows, StepError};
use crate::llama::Token;
use crate::vector::largest;

/// Rates by depth.
#[derive(Clone, Debug, PartialEq)]
pub struct Acceptance(Vec<f32>);

impl Acceptance {
    /// From rates of the heads in order; `None` without a rate, or for one that is no probability.
    #[must_use]
    pub fn new(rates: Vec<f32>) -> Option<Self> {
        (!rates.is_empty() && rates.iter().all(|rate| (0.0..=1.0).contains(rate)))
            .then_some(Self(rates))
    }

    /// Estimates that equal the rates.
    #[must_use]
    pub fn calibration(&self) -> Calibration {
        Calibration::given(self.0.clone())
    }
}

/// Logits above the largest that make a token certain at any temperature.
const CERTAIN: f32 = 1e3;

/// A model that makes candidates right at given rates.
pub struct Simulated<F> {
    model: F,
    acceptance: Acceptance,
    rng: fastrand::Rng,
    /// By row of the last pass its changed logits; empty where they are the model's own.
    changed: Vec<Vec<f32>>,
    asked: Vec<OutputRow>,
}

impl<F: Forward> Simulated<F> {
    /// Wraps a model. What is right is drawn from a generator with a fixed seed.
    #[must_use]
    pub fn new(model: F, acceptance: Acceptance) -> Self {
        let rng = fastrand::Rng::with_seed(0);
        Self { model, acceptance, rng, changed: vec![], asked: vec![] }
    }

    /// Changes the logits of every row that candidates follow.
    fn change(&mut self, rows: &Rows) -> Result<(), StepError> {
        self.changed.iter_mut().for_each(Vec::clear);
        self.changed.resize_with(rows.len().max(self.changed.len()), Vec::new);
        for (row, (depth, candidates)) in followers(rows).into_iter().enumerate() {
            let Some(&best) = candidates.first() else { continue };
            let logits = &mut self.changed[row];
            logits.extend_from_slice(self.model.logits(row)?);
            let top = largest(logits);
            candidates.iter().for_each(|token| logits[token.0 as usize] = f32::NEG_INFINITY);
            let rate = self.acceptance.0.get(depth).copied().unwrap_or(0.0);
            if self.rng.f64() < f64::from(rate) {
                logits[best.0 as usize] = top + CERTAIN;
            }
        }
        Ok(())
    }
}

/// For each row how deep in its tree it is (0: the root), and the candidates directly after it, best
/// first.
fn followers(rows: &Rows) -> Vec<(usize, Vec<Token>)> {
    let all: Vec<Row<'_>> = rows.iter().collect();
    let mut found: Vec<(usize, Vec<Token>)> = vec![(0, vec![]); all.len()];
    for (i, row) in all.iter().enumerate().filter(|(_, row)| row.output) {
        let is_parent =
            |p: &Row<'_>| p.output && p.pos + 1 == row.pos && p.seqs.contains(&row.seqs[0]);
        if let Some(parent) = all[..i].iter().rposition(is_parent) {
            found[i].0 = found[parent].0 + 1;
            found[parent].1.push(row.token);
        }
    }
    found
}

impl<F: Forward> Forward for Simulated<F> {
    fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    fn forward(&mut self, rows: &Rows) -> Result<(), StepError> {
        self.model.forward(rows)?;
        self.change(rows)
    }

    fn logits(&self, row: usize) -> Result<&[f32], StepError> {
        match self.changed.get(row).filter(|logits| !logits.is_empty()) {
            Some(logits) => Ok(logits),
            None => self.model.logits(row),
        }
    }

    fn hidden(&self, row: usize) -> Result<&[f32], StepError> {
        self.model.hidden(row)
    }

    fn state(&self, row: usize) -> Result<Option<&[f32]>, StepError> {
        self.model.state(row)
    }

    fn verifies(&self) -> bool {
        self.model.verifies()
    }

    fn verify(&mut self, ask: Ask<'_>) -> Option<&[i32]> {
        self.asked.clear();
        let mut rows = ask.rows.iter();
        for sequence in ask.sequences {
            let on_host = sequence.n_rows > 1;
            let own = rows.by_ref().take(sequence.n_rows);
            self.asked
                .extend(own.map(|row| OutputRow { rule: row.rule.filter(|_| !on_host), ..*row }));
        }
        self.model.verify(Ask { rows: &self.asked, ..ask })
    }

    fn apply(&mut self, op: KvOp) -> Result<(), StepError> {
        self.model.apply(op)
    }

    fn piece(&self, token: Token, by_name: bool, out: &mut Vec<u8>) {
        self.model.piece(token, by_name, out);
    }

    fn is_end(&self, token: Token) -> bool {
        self.model.is_end(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::SeqId;
    use crate::speculate::paths::fill;
    use crate::speculate::tree::Tree;

    /// The logits of every row are the same.
    struct Same([f32; 5]);

    impl Forward for Same {
        fn n_vocab(&self) -> usize {
            5
        }
        fn forward(&mut self, _: &Rows) -> Result<(), StepError> {
            Ok(())
        }
        fn logits(&self, _: usize) -> Result<&[f32], StepError> {
            Ok(&self.0)
        }
        fn hidden(&self, _: usize) -> Result<&[f32], StepError> {
            Ok(&[])
        }
        fn apply(&mut self, _: KvOp) -> Result<(), StepError> {
            Ok(())
        }
        fn piece(&self, _: Token, _: bool, _: &mut Vec<u8>) {}
        fn is_end(&self, _: Token) -> bool {
            false
        }
    }

    #[test]
    fn the_best_candidate_is_right_at_the_rate_and_no_other_ever() {
        let acceptance = Acceptance::new(vec![0.6, 0.25]).unwrap();
        // The root's candidates are 3 and 1; 2 follows 3, and 4 follows that.
        let mut rows = Rows::default();
        let (own, other) = (SeqId(0), SeqId(7));
        rows.push(Token(0), 9, [own, other], true);
        rows.push(Token(3), 10, [own], true);
        rows.push(Token(1), 10, [other], true);
        rows.push(Token(2), 11, [own], true);
        rows.push(Token(4), 12, [own], true);
        let mut model = Simulated::new(Same([0.0, 3.0, 1.0, 2.0, 0.5]), acceptance.clone());
        let mut counts = [[0; 5]; 5];
        const N: usize = 4000;
        for _ in 0..N {
            model.forward(&rows).unwrap();
            for (row, counts) in counts.iter_mut().enumerate() {
                counts[crate::engine::sampler::argmax(model.logits(row).unwrap()).0 as usize] += 1;
            }
        }
        let right = |row: usize, token: usize| counts[row][token] as f64 / N as f64;
        assert!((right(0, 3) - 0.6).abs() < 0.03 && (right(0, 2) - 0.4).abs() < 0.03, "{counts:?}");
        assert!((right(1, 2) - 0.25).abs() < 0.03, "{counts:?}");
        assert_eq!(counts[1][1] + counts[1][2], N, "what is no candidate is left alone");
        assert_eq!(counts[3][1], N, "beyond the rates nothing is right");
        assert_eq!([counts[2][1], counts[4][1]], [N; 2], "nor where nothing was drafted");

        let mut tree = Tree::default();
        let levels =
            [vec![(Token(3), 0.5), (Token(1), 0.4)], vec![(Token(2), 0.5)], vec![(Token(4), 0.5)]];
        fill(&mut tree, &levels, &acceptance.calibration(), 1.0, 64);
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
