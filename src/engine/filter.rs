//! Top-k, top-p, min-p and temperature over one row of logits, in llama.cpp's order. Pure.
//!
//! llama.cpp's top-p sorts as much of the vocabulary as the distribution is wide: 2.6 ms a row for a
//! vocabulary of 49,152 at temperature 0.8. Here one pass finds the largest logit, one adds up the
//! probabilities, and only the tokens near the top are collected and sorted.

use crate::llama::Token;
use crate::vector::{NEGLIGIBLE, exp_below, largest, sum_exp};

/// What to keep of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filter {
    /// The most likely tokens; 0 for all.
    pub top_k: usize,
    /// The smallest set of most likely tokens with this probability together; 1 for all.
    pub top_p: f32,
    /// Tokens at least this fraction as likely as the most likely one; 0 for all.
    pub min_p: f32,
    /// Divides what is left.
    pub temperature: f32,
}

/// Distances from the largest logit within which tokens are collected, tried in turn until enough
/// are found. All tokens beyond the last one together have less probability than rounding loses.
const REACHES: [f32; 5] = [3.0, 6.0, 10.0, 16.0, NEGLIGIBLE];

impl Filter {
    /// Fills `kept` with the tokens that are left and their unnormalised probabilities, in
    /// ascending order of token id: that order does not depend on rounding, so neither does what a
    /// given random number selects. Empty only for a row without a finite logit.
    pub fn apply(&self, logits: &[f32], kept: &mut Vec<(Token, f32)>) {
        kept.clear();
        let max = largest(logits);
        if !max.is_finite() {
            return;
        }
        if self.top_k > 0 {
            self.collect(logits, max, kept, |kept| kept.len() >= self.top_k);
            if kept.len() > self.top_k {
                kept.select_nth_unstable_by(self.top_k - 1, more_likely);
                kept.truncate(self.top_k);
            }
        }
        if self.top_p < 1.0 {
            // Probabilities are of what top-k left.
            let sum = if self.top_k > 0 {
                kept.iter().map(|k| exp_below(k.1 - max)).sum()
            } else {
                sum_exp(logits, max)
            };
            let enough = self.top_p * sum;
            if self.top_k == 0 {
                self.collect(logits, max, kept, |kept| {
                    kept.iter().map(|k| exp_below(k.1 - max)).sum::<f32>() >= enough
                });
            }
            kept.sort_unstable_by(more_likely);
            let mut mass = 0.0;
            let beyond = kept.iter().position(|k| {
                mass += exp_below(k.1 - max);
                mass >= enough
            });
            kept.truncate(beyond.map_or(kept.len(), |i| i + 1));
        } else if self.top_k == 0 {
            self.collect(logits, max, kept, |_| false);
        }
        if self.min_p > 0.0 {
            let least = max + self.min_p.ln();
            kept.retain(|k| k.1 >= least);
        }
        kept.sort_unstable_by_key(|k| k.0);
        let inverse = 1.0 / self.temperature;
        kept.iter_mut().for_each(|k| k.1 = ((k.1 - max) * inverse).exp());
    }

    /// Collects tokens with their logits, ever farther from the top, until there are `enough`. At a
    /// high temperature with nothing cut off before, tokens far down count too, so the last reach
    /// then is the whole row.
    fn collect(
        &self,
        logits: &[f32],
        max: f32,
        kept: &mut Vec<(Token, f32)>,
        enough: impl Fn(&[(Token, f32)]) -> bool,
    ) {
        let all = self.top_k > 0 || self.top_p >= 1.0;
        for reach in REACHES.into_iter().chain(all.then_some(f32::INFINITY)) {
            let least = max - reach;
            kept.clear();
            for (block, values) in logits.chunks(64).enumerate() {
                // Most blocks have none: one comparison per value, without a branch.
                if values.iter().fold(false, |any, &v| any | (v >= least)) {
                    let near = values.iter().enumerate().filter(|(_, v)| **v >= least);
                    kept.extend(near.map(|(i, &v)| (Token((block * 64 + i) as i32), v)));
                }
            }
            if enough(kept) {
                return;
            }
        }
    }
}

/// Larger logits first, and of equal ones, as 0 and -0 are, the smaller token.
fn more_likely(a: &(Token, f32), b: &(Token, f32)) -> std::cmp::Ordering {
    (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let filter = Filter { top_k, top_p, min_p, temperature };
            let mut kept = vec![];
            filter.apply(&logits, &mut kept);
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

    #[test]
    fn rows_no_model_should_give() {
        let filter = Filter { top_k: 0, top_p: 0.9, min_p: 0.0, temperature: 1.0 };
        let mut kept = vec![];
        for row in [vec![f32::NAN; 5], vec![f32::NEG_INFINITY; 70], vec![]] {
            filter.apply(&row, &mut kept);
            assert!(kept.is_empty());
        }
        filter.apply(&[f32::NAN, 1.0, f32::NEG_INFINITY], &mut kept);
        assert_eq!(kept, [(Token(1), 1.0)]);
    }
}
