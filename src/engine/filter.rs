//! Top-n-sigma, top-k, typical sampling, top-p, min-p, XTC and temperature over one row of logits, in
//! llama.cpp's order. Pure.
//!
//! llama.cpp's top-p sorts as much of the vocabulary as the distribution is wide: 2.6 ms a row for a
//! vocabulary of 49,152 at temperature 0.8. Here one pass finds the largest logit, one adds up the
//! probabilities, and only the tokens near the top are collected, and ordered as far as needed.

use crate::llama::Token;
use crate::vector::{BLOCK, NEGLIGIBLE, block_maxima, exp_below, sum_exp};

/// What to keep of a row. [`Default`] keeps all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filter {
    /// Tokens at most this many standard deviations of the row below its largest logit; 0 for all.
    pub top_n_sigma: f32,
    /// The most likely tokens; 0 for all.
    pub top_k: usize,
    /// The smallest set of tokens whose surprise is closest to the entropy, with this probability
    /// together; 1 for all.
    pub typical_p: f32,
    /// The smallest set of most likely tokens with this probability together; 1 for all.
    pub top_p: f32,
    /// Tokens at least this fraction as likely as the most likely one; 0 for all.
    pub min_p: f32,
    /// Of tokens at least this likely only the least likely one, and all others; `None` for all.
    pub xtc: Option<f32>,
    /// Divides what is left; 0 leaves the most likely token.
    pub temperature: f32,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            top_n_sigma: 0.0,
            top_k: 0,
            typical_p: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            xtc: None,
            temperature: 1.0,
        }
    }
}

/// A row of logits, the largest of each block of them, and of all.
struct Row<'a> {
    logits: &'a [f32],
    maxima: &'a [f32],
    max: f32,
}

/// Distances from the largest logit within which tokens are collected, tried in turn until enough
/// are found. All tokens beyond the last one together have less probability than rounding loses.
const REACHES: [f32; 5] = [3.0, 6.0, 10.0, 16.0, NEGLIGIBLE];

impl Filter {
    /// Fills `kept` with the tokens that are left and their unnormalised probabilities, in
    /// ascending order of token id: that order does not depend on rounding, so neither does what a
    /// given random number selects. Empty only for a row without a finite logit. `maxima` is memory to
    /// work in.
    pub fn apply(&self, logits: &[f32], kept: &mut Vec<(Token, f32)>, maxima: &mut Vec<f32>) {
        kept.clear();
        let max = block_maxima(logits, maxima);
        let row = Row { logits, maxima, max };
        if !max.is_finite() {
            return;
        }
        let is_narrow = self.is_narrow();
        if is_narrow {
            self.narrow(&row, kept);
        }
        let max = if is_narrow { highest(kept) } else { max };
        if self.top_p < 1.0 {
            // Probabilities are of what is left.
            let sum = if is_narrow {
                kept.iter().map(|k| exp_below(k.1 - max)).sum()
            } else {
                sum_exp(logits, max)
            };
            let enough = self.top_p * sum;
            if !is_narrow {
                self.collect(&row, kept, |kept| {
                    kept.iter().map(|k| exp_below(k.1 - max)).sum::<f32>() >= enough
                });
            }
            keep_nucleus(max, enough, kept);
        } else if !is_narrow {
            row.collect(f32::INFINITY, kept);
        }
        if self.min_p > 0.0 {
            let least = max + self.min_p.ln();
            kept.retain(|k| k.1 >= least);
        }
        if let Some(threshold) = self.xtc {
            exclude_top(threshold, kept);
        }
        self.weigh(kept);
    }

    /// `true` if tokens are removed before top-p.
    fn is_narrow(&self) -> bool {
        self.top_k > 0 || self.top_n_sigma > 0.0 || self.typical_p < 1.0
    }

    /// Fills `kept` with what is left before top-p, with logits.
    fn narrow(&self, row: &Row<'_>, kept: &mut Vec<(Token, f32)>) {
        self.collect(row, kept, |kept| self.top_k > 0 && kept.len() >= self.top_k);
        if self.top_n_sigma > 0.0 {
            let least = row.max - self.top_n_sigma * deviation(row.logits);
            kept.retain(|k| k.1 >= least);
        }
        if self.top_k > 0 && kept.len() > self.top_k {
            kept.select_nth_unstable_by(self.top_k - 1, more_likely);
            kept.truncate(self.top_k);
        }
        if self.typical_p < 1.0 {
            keep_typical(self.typical_p, kept);
        }
    }

    /// Turns logits into weights, in the order of tokens.
    fn weigh(&self, kept: &mut Vec<(Token, f32)>) {
        let max = highest(kept);
        kept.sort_unstable_by_key(|k| k.0);
        if self.temperature == 0.0 {
            kept.retain(|k| k.1 == max);
            kept.truncate(1);
            kept.iter_mut().for_each(|k| k.1 = 1.0);
            return;
        }
        let inverse = 1.0 / self.temperature;
        kept.iter_mut().for_each(|k| k.1 = ((k.1 - max) * inverse).exp());
    }

    /// Collects tokens with their logits, ever farther from the top, until there are `enough`. Before
    /// other filters than top-p, tokens far down count too, so the last reach then is the whole row.
    fn collect(
        &self,
        row: &Row<'_>,
        kept: &mut Vec<(Token, f32)>,
        enough: impl Fn(&[(Token, f32)]) -> bool,
    ) {
        for reach in REACHES.into_iter().chain(self.is_narrow().then_some(f32::INFINITY)) {
            row.collect(reach, kept);
            if enough(kept) {
                return;
            }
        }
    }
}

impl Row<'_> {
    /// Fills `kept` with the tokens whose logits are at most `reach` below the largest, in order.
    fn collect(&self, reach: f32, kept: &mut Vec<(Token, f32)>) {
        let least = self.max - reach;
        kept.clear();
        for (block, values) in self.logits.chunks(BLOCK).enumerate() {
            if self.maxima[block] >= least {
                let near = values.iter().enumerate().filter(|(_, v)| **v >= least);
                kept.extend(near.map(|(i, &v)| (Token((block * BLOCK + i) as i32), v)));
            }
        }
    }
}

/// Tokens that are sorted at once: fewer are not worth a selection.
const SORTED: usize = 32;

/// Keeps the smallest set of most likely tokens whose probabilities, relative to that of the logit
/// `max`, are `enough` together. Halves what is undecided at each turn: the nucleus of a flat
/// distribution has thousands of tokens, and if they are sorted, a row takes 1.8 times as long.
fn keep_nucleus(max: f32, enough: f32, kept: &mut Vec<(Token, f32)>) {
    let (mut from, mut to, mut mass) = (0, kept.len(), 0.0);
    while to - from > SORTED {
        let half = (to - from) / 2;
        kept[from..to].select_nth_unstable_by(half, more_likely);
        let of_half: f32 = kept[from..from + half].iter().map(|k| exp_below(k.1 - max)).sum();
        if mass + of_half >= enough {
            to = from + half;
        } else {
            mass += of_half;
            from += half;
        }
    }
    kept[from..to].sort_unstable_by(more_likely);
    let beyond = kept[from..to].iter().position(|k| {
        mass += exp_below(k.1 - max);
        mass >= enough
    });
    kept.truncate(beyond.map_or(to, |i| from + i + 1));
}

/// Larger logits first, and of equal ones, as 0 and -0 are, the smaller token.
fn more_likely(a: &(Token, f32), b: &(Token, f32)) -> std::cmp::Ordering {
    (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
}

fn highest(kept: &[(Token, f32)]) -> f32 {
    kept.iter().map(|k| k.1).fold(f32::NEG_INFINITY, f32::max)
}

/// The standard deviation of a row's finite logits.
fn deviation(logits: &[f32]) -> f32 {
    let finite = || logits.iter().filter(|l| l.is_finite()).map(|&l| f64::from(l));
    let n = finite().count().max(1) as f64;
    let mean = finite().sum::<f64>() / n;
    (finite().map(|l| (l - mean).powi(2)).sum::<f64>() / n).sqrt() as f32
}

/// Typical sampling: "Locally Typical Sampling" (Meister et al., 2022), section 4.
fn keep_typical(p: f32, kept: &mut Vec<(Token, f32)>) {
    let max = highest(kept);
    let sum: f64 = kept.iter().map(|k| f64::from(k.1 - max).exp()).sum();
    let norm = max + sum.ln() as f32;
    kept.retain(|k| k.1 > f32::NEG_INFINITY);
    let entropy: f64 =
        kept.iter().map(|k| f64::from(k.1 - norm)).map(|log_p| -log_p * log_p.exp()).sum();
    let oddness = |k: &(Token, f32)| (norm - k.1 - entropy as f32).abs();
    kept.sort_unstable_by(|a, b| oddness(a).total_cmp(&oddness(b)).then(a.0.cmp(&b.0)));
    let mut mass = 0.0;
    let beyond = kept.iter().position(|k| {
        mass += (k.1 - norm).exp();
        mass > p
    });
    kept.truncate(beyond.map_or(kept.len(), |i| i + 1));
}

/// XTC, "exclude top choices": drops the tokens of at least this probability but the least likely of
/// them.
fn exclude_top(threshold: f32, kept: &mut Vec<(Token, f32)>) {
    let max = highest(kept);
    let sum: f32 = kept.iter().map(|k| (k.1 - max).exp()).sum();
    let least = max + (threshold * sum).ln();
    let likely = kept.iter().filter(|k| k.1 >= least);
    if let Some(&(last, _)) = likely.max_by(|a, b| more_likely(a, b)) {
        kept.retain(|k| k.1 < least || k.0 == last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{Candidates, SamplerChain};
    use crate::vector::largest;
    use proptest::prelude::*;

    /// The definitions, by sorting everything, in double precision. Also how close the decision
    /// was.
    fn by_definition(f: &Filter, logits: &[f32]) -> (Vec<Token>, f64) {
        let mut all: Vec<(Token, f64)> =
            (0..).map(Token).zip(logits.iter().map(|&l| f64::from(l))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if f.top_k > 0 {
            all.truncate(f.top_k);
        }
        let max = all[0].1;
        let sum: f64 = all.iter().map(|k| (k.1 - max).exp()).sum();
        let mut close = f64::INFINITY;
        if f.top_p < 1.0 {
            let (mut mass, mut n) = (0.0, all.len());
            for (i, k) in all.iter().enumerate() {
                mass += (k.1 - max).exp() / sum;
                close = close.min((mass - f64::from(f.top_p)).abs());
                if mass >= f64::from(f.top_p) {
                    n = i + 1;
                    break;
                }
            }
            all.truncate(n);
        }
        if f.min_p > 0.0 {
            let least = max + f64::from(f.min_p).ln();
            all.retain(|k| k.1 >= least);
        }
        let mut tokens: Vec<Token> = all.iter().map(|k| k.0).collect();
        tokens.sort();
        (tokens, close)
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_the_definitions_say(
            logits in prop::collection::vec(-300i32..300, 1..700),
            scale in 1u8..20,
            top_k in prop_oneof![Just(0usize), 1usize..50],
            top_p in prop_oneof![Just(1.0f32), 0.0f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.001f32..1.0],
            temperature in 0.05f32..5.0,
        ) {
            // Odd steps, so that min-p never falls on a logit.
            let logits: Vec<f32> = logits.iter().map(|&l| l as f32 * f32::from(scale) * 0.01).collect();
            let filter = Filter { top_k, top_p, min_p, temperature, ..Filter::default() };
            let mut kept = vec![];
            filter.apply(&logits, &mut kept, &mut vec![]);
            let (expected, close) = by_definition(&filter, &logits);
            prop_assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
            let least = largest(&logits) + min_p.ln();
            let on_the_edge = close < 1e-5 || logits.iter().any(|l| (l - least).abs() < 1e-4);
            let tokens: Vec<Token> = kept.iter().map(|k| k.0).collect();
            prop_assert!(on_the_edge || tokens == expected, "{tokens:?} {expected:?}");
            let max = largest(&logits);
            for (token, weight) in kept {
                let exact = ((f64::from(logits[token.0 as usize]) - f64::from(max)) / f64::from(temperature)).exp();
                prop_assert!((f64::from(weight) - exact).abs() <= exact * 1e-4 + 1e-30);
            }
        }
    }

    /// Random rows of `n` logits and filters that do something.
    fn cases() -> impl Iterator<Item = (Vec<f32>, Filter)> {
        let mut random = fastrand::Rng::with_seed(5);
        std::iter::repeat_with(move || {
            let (n, scale) = (random.usize(2..400), 12.0 * random.f32());
            let logits = (0..n).map(|_| scale * (random.f32() + random.f32() - 1.0)).collect();
            let mut some = |at: f32, off: f32| {
                if random.bool() { at * (0.05 + 0.95 * random.f32()) } else { off }
            };
            let (top_n_sigma, typical_p) = (some(3.0, 0.0), some(1.0, 1.0));
            let filter = Filter {
                top_n_sigma,
                top_k: some(40.0, 0.0) as usize,
                // After the other llama.cpp's entropy is NaN, and what it keeps anything.
                typical_p: if top_n_sigma > 0.0 { 1.0 } else { typical_p },
                top_p: some(1.0, 1.0),
                min_p: some(0.2, 0.0),
                xtc: Some(some(0.4, 1.0)).filter(|&threshold| threshold < 1.0),
                temperature: some(3.0, 1.0),
            };
            (logits, filter)
        })
    }

    #[test]
    fn what_is_kept_is_what_llama_cpp_keeps() {
        let mut kept = vec![];
        for (logits, filter) in cases().take(2000) {
            filter.apply(&logits, &mut kept, &mut vec![]);
            let mut chain = SamplerChain::new(logits.len()).filters(&filter);
            let mut candidates = Candidates::default();
            let theirs: Vec<_> = candidates.filter(&mut chain, &logits).collect();
            let max = theirs.iter().map(|k| k.1).fold(f32::NEG_INFINITY, f32::max);
            let share = |all: &[(Token, f32)]| -> Vec<f32> {
                let sum: f32 = all.iter().map(|k| k.1).sum();
                let mut shares = vec![0.0; logits.len()];
                all.iter().for_each(|k| shares[k.0.0 as usize] = k.1 / sum);
                shares
            };
            let theirs: Vec<_> = theirs.iter().map(|&(t, l)| (t, (l - max).exp())).collect();
            for (a, b) in share(&kept).iter().zip(share(&theirs)) {
                assert!((a - b).abs() < 1e-5, "{a}, not {b}: {filter:?} {logits:?}");
            }
        }
    }

    #[test]
    fn at_temperature_0_the_most_likely_token_that_is_left_is_all() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.3, 0.1].map(f32::ln).to_vec();
        let mut kept = vec![];
        let filter = Filter { xtc: Some(0.2), temperature: 0.0, ..Filter::default() };
        filter.apply(&logits, &mut kept, &mut vec![]);
        assert_eq!(kept, [(Token(2), 1.0)], "of equal ones the last counts as the less likely");
        Filter { temperature: 0.0, ..Filter::default() }.apply(&logits, &mut kept, &mut vec![]);
        assert_eq!(kept, [(Token(0), 1.0)]);
    }

    #[test]
    fn rows_no_model_should_give() {
        let filter = Filter { top_p: 0.9, ..Filter::default() };
        let mut kept = vec![];
        for row in [vec![f32::NAN; 5], vec![f32::NEG_INFINITY; 70], vec![]] {
            filter.apply(&row, &mut kept, &mut vec![]);
            assert!(kept.is_empty());
        }
        filter.apply(&[f32::NAN, 1.0, f32::NEG_INFINITY], &mut kept, &mut vec![]);
        assert_eq!(kept, [(Token(1), 1.0)]);
    }
}
