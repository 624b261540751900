//! How often a candidate is right, against the probability that its head gave it. Heads are
//! overconfident, each in its own way, and it depends on the text; so accepted candidates are
//! counted by head and by that probability, and old counts fade.

use crate::gpu::kernels::N_BINS;

/// Heads that are counted apart; deeper ones share the last one's counts.
const N_HEADS: usize = 8;
/// Lower end of the first of [`N_BINS`] ranges of a head's probability, equally wide on a logarithmic
/// scale from here to 1.
pub const LOWEST: f32 = 1e-3;
/// Before anything is known, this share of what a head says is believed ...
const BELIEF: f64 = 0.8;
/// ... as firmly as after this many expected hits.
const FIRMNESS: f64 = 2.0;
/// The same of a place's best candidate, in candidates.
const FIRMNESS_BEST: f64 = 4.0;
/// Counts are halved at this many expected hits, so that a bin follows the text.
const MEMORY: f64 = 64.0;
/// Ranges, equally wide, of the probabilities that a head's candidates may turn out to have.
const N_RANGES: usize = 20;
/// Ranges of the probability of a path, each of which ends where it has fallen by the square root of 2.
const PATH_RANGES: usize = 8;
/// Places that count for that: older ones fade.
const PLACES: f64 = 128.0;
/// Before anything is known, a head is taken to be sure and right at this share of places ...
const SURE: f64 = 0.4;
/// ... and a draft model at this one ...
const SURE_MODEL: f64 = 0.7;
/// ... as firmly as after this many of them.
const SURE_FIRMNESS: f64 = 4.0;
/// Decay per step without candidates, so that places not tried lately are tried again.
const PLACES_FADE: f64 = 0.99;
/// Places of a sequence that count for how far its text is to be trusted: older ones fade.
const TRUST_MEMORY: f64 = 32.0;
/// A sequence's text is taken for an ordinary one as firmly as after this many expected hits.
const TRUST_FIRMNESS: f64 = 4.0;
/// What a place without candidates leaves of them.
const TRUST_FADE: f64 = 0.98;
/// Upper limit of predicted probabilities.
pub const HIGHEST: f32 = 0.99;

/// Counts for each head and range.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    /// Of candidates that are not the best at their place, and of those that are: where texts are
    /// greedy these are right far more often than a head says.
    bins: [[[Bin; N_BINS]; 2]; N_HEADS],
    proposals: [Proposals; N_HEADS],
    /// Instead of what was counted: rates of the best candidate by depth. Others are never right.
    given: Option<Vec<f32>>,
    /// Of a draft model, which is as good at any depth: all share the first one's counts.
    is_model: bool,
}

/// How often candidates of one kind are right, against how often they were said to be.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bin {
    /// Sum of the probabilities of candidates whose parent was accepted.
    expected: f64,
    /// Those that were accepted.
    hits: f64,
    /// All of them.
    n: f64,
}

impl std::ops::Add for Bin {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            expected: self.expected + other.expected,
            hits: self.hits + other.hits,
            n: self.n + other.n,
        }
    }
}

impl Bin {
    /// By what to multiply such a probability; as long as little is known, by about `belief`.
    pub(super) fn ratio(self, belief: f64) -> f32 {
        ((self.hits + FIRMNESS * belief) / (self.expected + FIRMNESS)) as f32
    }

    /// How often a best candidate of such a probability is right; as long as little is known, about
    /// as often as is believed of it.
    fn share(self, p: f32) -> f32 {
        ((self.hits + FIRMNESS_BEST * BELIEF * f64::from(p)) / (self.n + FIRMNESS_BEST)) as f32
    }

    /// Records a candidate.
    pub(super) fn record(&mut self, p: f32, accepted: bool) {
        self.expected += f64::from(p);
        self.hits += f64::from(u8::from(accepted));
        self.n += 1.0;
        if self.expected >= MEMORY || self.hits >= MEMORY {
            let Self { expected, hits, n } = *self;
            *self = Self { expected: expected / 2.0, hits: hits / 2.0, n: n / 2.0 };
        }
    }
}

/// What a head's candidates turned out to be worth at the places it was asked at.
#[derive(Clone, Copy, Debug, Default)]
struct Proposals {
    places: f64,
    /// For each range the candidates in it, and the sum of their probabilities.
    ranges: [(f64, f64); N_RANGES],
}

impl Calibration {
    /// One that believes every head.
    #[cfg(test)]
    pub(super) fn exact() -> Self {
        let others = Bin { hits: FIRMNESS * (1.0 - BELIEF), ..Bin::default() };
        let best = Bin { hits: 0.0, n: FIRMNESS_BEST * (BELIEF - 1.0), ..Bin::default() };
        Self { bins: [[[others; N_BINS], [best; N_BINS]]; N_HEADS], ..Self::default() }
    }

    /// One for a draft model.
    #[must_use]
    pub fn of_model() -> Self {
        Self { is_model: true, ..Self::default() }
    }

    /// One that learns nothing: at depth `h + 1` the best candidate is right at `rates[h]`, and no
    /// other is.
    #[must_use]
    pub fn given(rates: Vec<f32>) -> Self {
        Self { given: Some(rates), ..Self::default() }
    }

    /// Probability that a candidate at `depth` (1: after the root) is accepted if its parent is,
    /// where `rank` of its siblings are better, its head says `p`, and the sequence's heads are to
    /// be trusted so far.
    #[must_use]
    pub fn estimate(&self, depth: usize, rank: usize, p: f32, trust: f32) -> f32 {
        if let Some(rates) = &self.given {
            return if rank == 0 { rate(rates, depth) } else { 0.0 };
        }
        let [others, best] = &self.bins[self.place(depth)];
        let q = if rank == 0 { best[bin(p)].share(p) } else { p * others[bin(p)].ratio(BELIEF) };
        (q * trust).clamp(0.0, HIGHEST)
    }

    /// For each range of what the head at `depth` says, how often candidates of any rank are accepted,
    /// against that.
    #[must_use]
    pub fn ratios(&self, depth: usize) -> [f32; N_BINS] {
        match self.given {
            None => {
                let [others, best] = self.bins[self.place(depth)];
                std::array::from_fn(|i| (others[i] + best[i]).ratio(BELIEF))
            }
            Some(_) => [1.0; N_BINS],
        }
    }

    /// What to expect of a head that is to be asked for candidates at `depth`, before it is: the
    /// sum of `q - row` over those whose probability `q` is above `row`, what verifying one costs.
    #[must_use]
    pub fn expect(&self, depth: usize, row: f64, trust: f32) -> f64 {
        if let Some(rates) = &self.given {
            return (f64::from(rate(rates, depth)) - row).max(0.0);
        }
        let Proposals { places, ranges } = &self.proposals[self.place(depth)];
        let trust = f64::from(trust);
        let seen: f64 = ranges.iter().map(|&(n, q)| (q * trust - n * row).max(0.0)).sum();
        let sure = if self.is_model { SURE_MODEL } else { SURE };
        let sure = sure * (f64::from(HIGHEST) * trust.min(1.0) - row).max(0.0);
        (seen + SURE_FIRMNESS * sure) / (places + SURE_FIRMNESS)
    }

    /// Records the candidates' probabilities at one place where a head was asked.
    pub fn record_proposals(&mut self, depth: usize, proposed: impl Iterator<Item = f32>) {
        let place = self.place(depth);
        let Proposals { places, ranges } = &mut self.proposals[place];
        let keep = 1.0 - 1.0 / PLACES;
        *places = *places * keep + 1.0;
        ranges.iter_mut().for_each(|(n, q)| (*n, *q) = (*n * keep, *q * keep));
        for q in proposed {
            let (n, sum) = &mut ranges[((q * N_RANGES as f32) as usize).min(N_RANGES - 1)];
            *n += 1.0;
            *sum += f64::from(q);
        }
    }

    /// Records a step in which no head was asked.
    pub fn fade(&mut self) {
        for Proposals { places, ranges } in &mut self.proposals {
            *places *= PLACES_FADE;
            ranges.iter_mut().for_each(|(n, q)| (*n, *q) = (*n * PLACES_FADE, *q * PLACES_FADE));
        }
    }

    /// Where counts of a depth are.
    fn place(&self, depth: usize) -> usize {
        if self.is_model { 0 } else { depth.clamp(1, N_HEADS) - 1 }
    }

    /// Records what became of a candidate whose parent was accepted; `is_best` is of those at its
    /// place the one with the highest probability.
    pub fn record(&mut self, depth: usize, is_best: bool, p: f32, accepted: bool) {
        let place = self.place(depth);
        self.bins[place][usize::from(is_best)][bin(p)].record(p, accepted);
    }
}

/// How often whole paths are right, against the product of what is said of their tokens: where tokens
/// came true, the next ones do more often than they do elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PathRates([[Bin; PATH_RANGES]; 2]);

impl PathRates {
    /// Probability of a path of so many tokens, of which the product is `product`.
    pub(super) fn estimate(&self, depth: usize, product: f32) -> f32 {
        (product * self.0[usize::from(depth > 1)][path_range(product)].ratio(1.0)).min(HIGHEST)
    }

    /// Records what became of one.
    pub(super) fn record(&mut self, depth: usize, product: f32, is_right: bool) {
        self.0[usize::from(depth > 1)][path_range(product)].record(product, is_right);
    }
}

fn path_range(product: f32) -> usize {
    ((-2.0 * product.max(f32::MIN_POSITIVE).log2()) as usize).min(PATH_RANGES - 1)
}

/// How much better or worse a source of drafts is at one sequence's text than at recent texts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trust {
    /// Hits that its calibration alone predicted.
    predicted: f64,
    hits: f64,
}

impl Trust {
    /// By what to multiply predictions.
    #[must_use]
    pub fn factor(&self) -> f32 {
        ((self.hits + TRUST_FIRMNESS) / (self.predicted + TRUST_FIRMNESS)) as f32
    }

    /// Records a place without candidates: what was recorded before is a little older.
    pub fn fade(&mut self) {
        self.predicted *= TRUST_FADE;
        self.hits *= TRUST_FADE;
    }

    /// Records a place: the probability that one of its candidates is right, as calibration alone
    /// predicts it, and whether one was.
    pub fn record(&mut self, predicted: f32, hit: bool) {
        let keep = 1.0 - 1.0 / TRUST_MEMORY;
        self.predicted = keep * self.predicted + f64::from(predicted.min(1.0));
        self.hits = keep * self.hits + f64::from(u8::from(hit));
    }
}

/// The [`Trust`] in each source at one sequence's text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trusts {
    /// Heads.
    pub heads: Trust,
    /// The draft model.
    pub model: Trust,
    /// The text before.
    pub text: Trust,
}

impl Trusts {
    /// Records a place where nobody proposed anything.
    pub fn fade(&mut self) {
        [&mut self.heads, &mut self.model, &mut self.text].into_iter().for_each(Trust::fade);
    }
}

fn rate(rates: &[f32], depth: usize) -> f32 {
    rates.get(depth - 1).copied().unwrap_or(0.0)
}

fn bin(p: f32) -> usize {
    let place = 1.0 - p.clamp(LOWEST, 1.0).ln() / LOWEST.ln();
    ((place * N_BINS as f32) as usize).min(N_BINS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_approaches_what_happens() {
        let mut c = Calibration::default();
        assert!((c.estimate(1, 0, 0.5, 1.0) - 0.4).abs() < 1e-6);
        for i in 0..4000 {
            c.record(1, true, 0.9, i % 10 < 6);
            c.record(2, true, 0.9, i % 10 < 3);
            c.record(1, false, 0.01, i % 50 == 0);
            c.record(1, false, 0.9, false);
        }
        for (depth, rank, p, happens) in [(1, 0, 0.9, 0.6), (2, 0, 0.9, 0.3), (1, 1, 0.01, 0.02)] {
            assert!(
                (c.estimate(depth, rank, p, 1.0) / happens - 1.0).abs() < 0.1,
                "{depth} {p}: {}",
                c.estimate(depth, rank, p, 1.0)
            );
        }
        assert!(c.estimate(1, 1, 0.9, 1.0) < 0.05 && (0.25..0.35).contains(&c.ratios(1)[bin(0.9)]));
        assert!((c.estimate(3, 0, 0.9, 1.0) - 0.72).abs() < 1e-6, "other heads know nothing of it");
    }

    #[test]
    fn it_follows_a_change_of_text() {
        let mut c = Calibration::default();
        (0..10_000).for_each(|_| c.record(1, true, 0.5, true));
        (0..2000).for_each(|_| c.record(1, true, 0.5, false));
        assert!(c.estimate(1, 0, 0.5, 1.0) < 0.1);
    }

    #[test]
    fn what_heads_proposed_is_expected_again() {
        let mut c = Calibration::default();
        let before = c.expect(1, 0.5, 1.0);
        for i in 0..1000 {
            c.record_proposals(1, [if i % 2 == 0 { 0.9 } else { 0.3 }, 0.1].into_iter());
        }
        for (row, expected) in [(0.95, 0.0), (0.5, 0.2), (0.2, 0.4), (0.0, 0.7)] {
            assert!(
                (c.expect(1, row, 1.0) - expected).abs() < 0.03,
                "{row}: {}",
                c.expect(1, row, 1.0)
            );
        }
        assert!(
            (c.expect(1, 0.2, 0.5) - 0.5 * (0.45 - 0.2)).abs() < 0.03,
            "half of all, where half is trusted"
        );
        assert_eq!(c.expect(2, 0.5, 1.0), before, "other heads know nothing of it");
        (0..2000).for_each(|_| c.fade());
        assert!((c.expect(1, 0.5, 1.0) - before).abs() < 1e-3, "and long ago is as never");
    }

    #[test]
    fn paths_whose_tokens_come_true_together_are_foreseen() {
        let mut paths = PathRates::default();
        assert_eq!(paths.estimate(3, 0.25), 0.25);
        // Half of the texts are copied: there all three tokens are right, elsewhere none.
        (0..400).for_each(|i| paths.record(3, 0.5f32.powi(3), i % 2 == 0));
        assert!((0.4..0.55).contains(&paths.estimate(3, 0.5f32.powi(3))), "{paths:?}");
        assert_eq!((paths.estimate(1, 0.125), paths.estimate(3, 0.5)), (0.125, 0.5));
        (0..400).for_each(|_| paths.record(9, 1e-9, true));
        assert!(paths.estimate(9, 0.001) <= HIGHEST);
    }

    #[test]
    fn a_text_is_trusted_by_its_own_hits() {
        let mut trust = Trust::default();
        assert_eq!(trust.factor(), 1.0);
        (0..200).for_each(|i| trust.record(0.5, i % 4 == 0));
        assert!((0.5..0.65).contains(&trust.factor()), "{trust:?}");
        (0..200).for_each(|_| trust.fade());
        assert!(trust.factor() > 0.95, "{trust:?}");
        (0..200).for_each(|_| trust.record(0.5, true));
        assert!((1.7..2.0).contains(&trust.factor()), "{trust:?}");
    }

    #[test]
    fn every_probability_has_a_bin() {
        assert_eq!((bin(0.0), bin(1e-9), bin(1.0), bin(2.0)), (0, 0, N_BINS - 1, N_BINS - 1));
        assert_eq!(Calibration::default().estimate(99, 0, 1.0, 1.0), 0.8);
    }
}
