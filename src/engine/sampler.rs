//! One token from one row of logits: bias and penalties by llama.cpp, [`dry`](super::dry),
//! [`filter`](super::filter), and the draw.
//!
//! The draw is keyed by (seed, position) with a counter-based generator, so the same request with
//! the same seed gives the same text alone, among concurrent requests, and with speculation.

use super::dry::Dry;
use super::filter::Filter;
use crate::llama::{Candidates, LlamaError, SamplerChain, Token};
use crate::request::SamplingParams;
use crate::vector::largest;

/// The sampler of one request.
pub struct Sampler {
    /// Bias and penalties: llama.cpp's. `None` if neither is asked for.
    chain: Option<SamplerChain>,
    dry: Option<Dry>,
    /// `None`: greedy.
    filter: Option<Filter>,
    /// How often XTC excludes tokens, and from which probability on.
    xtc: Option<(f32, f32)>,
    /// Tokens that are never chosen before a position, and that position.
    late: (Vec<Token>, usize),
    seed: u64,
}

/// All that a draw from unchanged logits depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// What to draw from; `None`: greedy.
    pub filter: Option<Filter>,
    /// With the position it keys the random number.
    pub seed: u64,
    /// The token's place in the sequence.
    pub position: usize,
}

/// Working memory for one row, reused from row to row.
#[derive(Default)]
pub struct Scratch {
    candidates: Candidates,
    logits: Vec<f32>,
    kept: Vec<(Token, f32)>,
    maxima: Vec<f32>,
}

impl Sampler {
    /// In llama.cpp's order: bias, penalties, DRY, top-n-sigma, top-k, typical sampling, top-p, min-p,
    /// XTC, temperature. `banned` tokens are never chosen. `prompt` fills the penalties' window. DRY
    /// is given [later](Self::with_dry).
    ///
    /// # Errors
    /// [`LlamaError::Sampler`] for a parameter that llama.cpp refuses.
    pub fn new(
        params: &SamplingParams,
        banned: &[Token],
        prompt: &[Token],
        n_vocab: usize,
    ) -> Result<Self, LlamaError> {
        let SamplingParams { top_k, top_p, min_p, temperature, seed, .. } = *params;
        let SamplingParams { typical_p, top_n_sigma, xtc_probability, xtc_threshold, .. } = *params;
        let excludes = xtc_probability > 0.0 && xtc_threshold <= 0.5;
        let xtc = excludes.then_some((xtc_probability, xtc_threshold));
        let filter = Filter { top_n_sigma, top_k, typical_p, top_p, min_p, xtc: None, temperature };
        // Only these two may drop the most likely token.
        let filter = (temperature > 0.0 || typical_p < 1.0 || excludes).then_some(filter);
        let penalties = params.repeat_last_n > 0
            && (params.repetition_penalty != 1.0
                || params.frequency_penalty != 0.0
                || params.presence_penalty != 0.0);
        let mut bias = params.logit_bias.clone();
        bias.extend(banned.iter().map(|&t| (t, f32::NEG_INFINITY)));
        let mut chain = None;
        if penalties || !bias.is_empty() {
            let mut new = SamplerChain::new(n_vocab);
            if !bias.is_empty() {
                new = new.logit_bias(&bias)?;
            }
            if penalties {
                let p = params;
                let (repeat, frequency) = (p.repetition_penalty, p.frequency_penalty);
                new = new.penalties(p.repeat_last_n, repeat, frequency, p.presence_penalty)?;
            }
            chain = Some(new);
        }
        let mut sampler = Self { chain, dry: None, filter, xtc, late: (Vec::new(), 0), seed };
        let window = prompt.len().saturating_sub(params.repeat_last_n);
        prompt[window..].iter().for_each(|&t| sampler.accept(t));
        Ok(sampler)
    }

    /// Adds DRY, which knows the prompt.
    #[must_use]
    pub fn with_dry(self, dry: Option<Dry>) -> Self {
        Self { dry, ..self }
    }

    /// Bans tokens before a position of the sequence.
    #[must_use]
    pub fn not_before(self, position: usize, tokens: Vec<Token>) -> Self {
        Self { late: (tokens, position), ..self }
    }

    /// The token at `position` of the sequence, given the logits of the row before it. A `drafted`
    /// token that is typical of the distribution is taken in place of a draw, the most likely one
    /// if there are several. This is lossy: the text follows the drafts more than the model alone
    /// would.
    ///
    /// Typical is a token with a probability above `min(eps, delta exp(-H))`, `H` being the entropy
    /// in nats: "Medusa" (Cai et al., 2024), section 2.3.1. Here of the distribution that is drawn
    /// from, after temperature and filters. Greedy has none.
    pub fn draw(
        &mut self,
        logits: &[f32],
        position: usize,
        drafted: &[Token],
        scratch: &mut Scratch,
    ) -> Token {
        let Scratch { candidates, logits: changed, kept, maxima } = scratch;
        changed.clear();
        let is_early = position < self.late.1;
        match &mut self.chain {
            // All of them, by token.
            Some(chain) => changed.extend(candidates.filter(chain, logits).map(|(_, logit)| logit)),
            None if is_early || self.dry.is_some() => changed.extend_from_slice(logits),
            None => {}
        }
        if let Some(dry) = &mut self.dry {
            dry.apply(changed);
        }
        if is_early {
            self.late.0.iter().for_each(|token| changed[token.0 as usize] = f32::NEG_INFINITY);
        }
        let logits = if changed.is_empty() { logits } else { changed };
        let Some(mut filter) = self.filter else { return argmax(logits) };
        let position = position as u64;
        let excludes = |(often, _): &(f32, f32)| {
            uniform(self.seed, position, Lane::Exclusion) < f64::from(*often)
        };
        filter.xtc = self.xtc.filter(excludes).map(|(_, threshold)| threshold);
        filter.apply(logits, kept, maxima);
        let sum: f64 = kept.iter().map(|k| f64::from(k.1)).sum();
        if let Some(token) = typical(kept, sum, drafted) {
            return token;
        }
        let mut left = uniform(self.seed, position, Lane::Draw) * sum;
        for &(token, weight) in kept.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return token;
            }
        }
        argmax(logits) // rounding left some weight after the last token, or there is no token
    }

    /// How the token at `position` is chosen; `None` where bias, penalties or bans change the logits
    /// first, or filters that a rule's reader need not know apply.
    pub fn rule(&self, position: usize) -> Option<Rule> {
        let Self { filter, seed, .. } = *self;
        let is_unchanged = self.chain.is_none() && self.dry.is_none() && position >= self.late.1;
        let is_common = |f: Filter| f.typical_p >= 1.0 && f.top_n_sigma <= 0.0;
        let is_plain = is_unchanged && self.xtc.is_none() && filter.is_none_or(is_common);
        is_plain.then_some(Rule { filter, seed, position })
    }

    /// Records the token that was chosen.
    pub fn accept(&mut self, token: Token) {
        if let Some(chain) = &mut self.chain {
            chain.accept(token);
        }
        if let Some(dry) = &mut self.dry {
            dry.accept(token);
        }
    }
}

/// A drafted token of at least this probability is typical of any distribution ...
const TYPICAL_EPS: f64 = 0.09;
/// ... and of a flat one also one of this many times `exp(-H)`.
const TYPICAL_DELTA: f64 = 0.3;

/// The most likely drafted token that is typical of the tokens kept, whose weights add up to `sum`.
fn typical(kept: &[(Token, f32)], sum: f64, drafted: &[Token]) -> Option<Token> {
    if drafted.is_empty() {
        return None;
    }
    let p = kept.iter().map(|&(token, weight)| (token, f64::from(weight) / sum));
    let entropy: f64 = p.clone().filter(|(_, p)| *p > 0.0).map(|(_, p)| -p * p.ln()).sum();
    let least = TYPICAL_EPS.min(TYPICAL_DELTA * (-entropy).exp());
    let typical = p.filter(|(token, p)| *p > least && drafted.contains(token));
    typical.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(token, _)| token)
}

/// Index of the largest value, the first of equals; NaN never wins.
pub fn argmax(logits: &[f32]) -> Token {
    const BLOCK: usize = 2048;
    // Without a branch per value; then one block is looked into.
    let mut best = (f32::NEG_INFINITY, 0);
    for (block, values) in logits.chunks(BLOCK).enumerate() {
        let max = largest(values);
        if max > best.0 {
            best = (max, block * BLOCK);
        }
    }
    let at = logits[best.1..].iter().position(|&v| v == best.0).unwrap_or(0);
    Token((best.1 + at) as i32)
}

/// What a random number is for. Numbers for one position have nothing to do with each other.
#[derive(Clone, Copy)]
enum Lane {
    Draw,
    Exclusion,
}

/// A number in [0, 1) for a position: 53 bits of Philox.
fn uniform(seed: u64, position: u64, lane: Lane) -> f64 {
    let [a, b, ..] = philox(
        [position as u32, (position >> 32) as u32, lane as u32, 0],
        [seed as u32, (seed >> 32) as u32],
    );
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
/// (2011): a block cipher on a counter, so any position's number can be had alone, on any device.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (a, b) = (0xD251_1F53 * u64::from(counter[0]), 0xCD9E_8D57 * u64::from(counter[2]));
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Known answers that the paper's authors publish with Random123.
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    fn sampler(params: &SamplingParams, n_vocab: usize) -> Sampler {
        Sampler::new(params, &[], &[], n_vocab).unwrap()
    }

    /// Draws at 20,000 positions: counts per token.
    fn histogram(params: &SamplingParams, logits: &[f32]) -> Vec<u32> {
        let (mut s, mut scratch) = (sampler(params, logits.len()), Scratch::default());
        let mut counts = vec![0; logits.len()];
        (0..20_000).for_each(|pos| counts[s.draw(logits, pos, &[], &mut scratch).0 as usize] += 1);
        counts
    }

    fn chi2(counts: &[u32], p: &[f64]) -> f64 {
        let n = f64::from(counts.iter().sum::<u32>());
        let counted = counts.iter().zip(p).filter(|(_, p)| **p > 0.0);
        counted.map(|(&c, p)| (f64::from(c) - n * p).powi(2) / (n * p)).sum()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.15, 0.1, 0.05].map(f32::ln).to_vec();
        let open = SamplingParams { temperature: 1.0, top_p: 1.0, ..SamplingParams::default() };
        // 18.47: p = 0.001 with four degrees of freedom.
        assert!(chi2(&histogram(&open, &logits), &[0.4, 0.3, 0.15, 0.1, 0.05]) < 18.47);
        let top2 = histogram(&SamplingParams { top_k: 2, ..open.clone() }, &logits);
        assert_eq!(&top2[2..], [0, 0, 0]);
        assert!(chi2(&top2, &[0.4 / 0.7, 0.3 / 0.7, 0.0, 0.0, 0.0]) < 10.83);
        let top_p = histogram(&SamplingParams { top_p: 0.6, ..open.clone() }, &logits);
        let min_p = histogram(&SamplingParams { min_p: 0.5, ..open.clone() }, &logits);
        assert_eq!((&top_p[2..], &min_p[2..]), (&[0; 3][..], &[0; 3][..]));
        let squared = [0.16, 0.09, 0.0225, 0.01, 0.0025].map(|p| p / 0.285);
        let cold = histogram(&SamplingParams { temperature: 0.5, ..open }, &logits);
        assert!(chi2(&cold, &squared) < 18.47);
    }

    #[test]
    fn xtc_excludes_as_often_as_asked_and_the_draw_does_not_follow_its_coin() {
        let p = [0.4f32, 0.3, 0.15, 0.1, 0.05];
        let params = SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            xtc_probability: 0.5,
            xtc_threshold: 0.25,
            ..SamplingParams::default()
        };
        // Without the first token the others have 0.6.
        let mixed = [0.2, 0.15 + 0.25, 0.075 + 0.125, 0.05 + 0.5 / 6.0, 0.025 + 0.25 / 6.0];
        let counts = histogram(&params, &p.map(f32::ln));
        assert!(chi2(&counts, &mixed) < 18.47, "{counts:?}");
        let s = sampler(&params, 5);
        assert_eq!(s.rule(0), None, "a device knows no XTC");
    }

    #[test]
    fn typical_drafts_are_taken_and_others_are_left_to_the_draw() {
        // Entropy 1.39: typical is what is above 0.3 exp(-1.39) = 0.075.
        let logits: Vec<f32> = [0.4f32, 0.3, 0.15, 0.1, 0.05].map(f32::ln).to_vec();
        let open = SamplingParams { temperature: 1.0, top_p: 1.0, ..SamplingParams::default() };
        let (mut s, mut scratch) = (sampler(&open, 5), Scratch::default());
        for pos in 0..100 {
            let plain = s.draw(&logits, pos, &[], &mut scratch);
            assert_eq!(s.draw(&logits, pos, &[Token(4), Token(3)], &mut scratch), Token(3));
            assert_eq!(
                s.draw(&logits, pos, &[Token(3), Token(1)], &mut scratch),
                Token(1),
                "the most likely one"
            );
            assert_eq!(s.draw(&logits, pos, &[Token(4)], &mut scratch), plain);
        }
        let mut greedy = sampler(&SamplingParams { temperature: 0.0, ..open }, 5);
        assert_eq!(greedy.draw(&logits, 0, &[Token(1)], &mut scratch), Token(0));
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
        let mut scratch = Scratch::default();
        let params = SamplingParams { seed: 7, ..SamplingParams::default() };
        let (mut a, mut b) = (sampler(&params, 50), sampler(&params, 50));
        let forward: Vec<_> = (0..100).map(|p| a.draw(&logits, p, &[], &mut scratch)).collect();
        let backward: Vec<_> =
            (0..100).rev().map(|p| b.draw(&logits, p, &[], &mut scratch)).collect();
        assert!(forward.iter().eq(backward.iter().rev()));
        let mut other = sampler(&SamplingParams { seed: 8, ..params }, 50);
        assert!((0..100).map(|p| other.draw(&logits, p, &[], &mut scratch)).ne(forward));
    }

    #[test]
    fn penalties_and_bias_move_the_greedy_choice() {
        let logits = [1.0f32, 2.0, 3.0, 2.9];
        let mut scratch = Scratch::default();
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let biased = SamplingParams { logit_bias: vec![(Token(0), 5.0)], ..greedy.clone() };
        assert_eq!(sampler(&biased, 4).draw(&logits, 0, &[], &mut scratch), Token(0));
        let mut banned = Sampler::new(&greedy, &[Token(2)], &[], 4).unwrap();
        assert_eq!(banned.draw(&logits, 0, &[], &mut scratch), Token(3));
        let presence = SamplingParams { presence_penalty: 0.5, ..greedy };
        let mut s = Sampler::new(&presence, &[], &[Token(2)], 4).unwrap();
        assert_eq!(s.draw(&logits, 0, &[], &mut scratch), Token(3), "the prompt counts");
        s.accept(Token(3));
        assert_eq!(s.draw(&logits, 1, &[], &mut scratch), Token(2));
    }

    proptest! {
        #[test]
        fn argmax_is_the_first_largest(values in prop::collection::vec(-3i8..3, 1..5000)) {
            let logits: Vec<f32> = values.iter().map(|&v| f32::from(v)).collect();
            let max = values.iter().max().unwrap();
            let first = values.iter().position(|v| v == max).unwrap();
            prop_assert_eq!(argmax(&logits), Token(first as i32));
        }
    }

    #[test]
    fn argmax_survives_what_no_model_should_give() {
        assert_eq!(argmax(&[f32::NAN, 1.0, f32::NAN]), Token(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), Token(0));
        assert_eq!(argmax(&[f32::NAN; 40]), Token(0));
    }
}
