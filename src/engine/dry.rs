//! DRY, "don't repeat yourself": tokens that would continue a repetition of earlier text become less
//! likely, exponentially in its length. The definition is llama.cpp's; it walks the whole vocabulary
//! for each of a request's breakers, here that is one walk for all, off the engine's thread.

use std::collections::HashMap;

use crate::llama::{LlamaError, Model, Token};
use crate::request::DryParams;

/// What no repetition goes across, as tokens: by a first token what may follow it, often nothing.
#[derive(Clone, Debug, Default)]
pub struct Breakers(HashMap<Token, Vec<Vec<Token>>>);

/// Tokens of a breaker after its first one.
const MAX_TAIL: usize = 20;

impl Breakers {
    /// The ways in which tokens of a model can hold these strings.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`] for a string that cannot be tokenised.
    pub fn new(model: &Model, strings: &[String]) -> Result<Self, LlamaError> {
        let mut all = Self::default();
        let tokens = |text: &str| {
            let mut tokens = model.tokenize_part(text, false, false)?;
            tokens.truncate(MAX_TAIL);
            Ok::<_, LlamaError>(tokens)
        };
        let strings = || strings.iter().filter(|string| !string.is_empty());
        // Also where a token ends within a character, which llama.cpp misses.
        for string in strings() {
            if let Some((first, rest)) = tokens(string)?.split_first() {
                all.add(*first, rest.to_vec());
            }
        }
        let mut piece = Vec::new();
        for token in (0..model.n_vocab() as i32).map(Token) {
            piece.clear();
            model.piece(token, true, &mut piece);
            for string in strings() {
                if piece.windows(string.len()).any(|part| part == string.as_bytes()) {
                    all.add(token, Vec::new());
                    continue;
                }
                let begins = |&n: &usize| {
                    string.is_char_boundary(n) && piece.ends_with(&string.as_bytes()[..n])
                };
                for n in (1..string.len()).filter(begins) {
                    all.add(token, tokens(&string[n..])?);
                }
            }
        }
        Ok(all)
    }

    fn add(&mut self, first: Token, rest: Vec<Token>) {
        let known = self.0.entry(first).or_default();
        if !known.contains(&rest) {
            known.push(rest);
        }
    }

    /// Tokens at the end, the last one first in `back`, that follow the last breaker.
    fn n_after_last(&self, back: &[Token]) -> usize {
        let after = |(i, first): (usize, &Token)| {
            let follows = |rest: &&Vec<Token>| {
                rest.len() <= i && rest.iter().eq(back[i - rest.len()..i].iter().rev())
            };
            let longest = self.0.get(first)?.iter().filter(follows).map(Vec::len).max()?;
            Some(i - longest)
        };
        back.iter().enumerate().find_map(after).unwrap_or(back.len())
    }

    fn is_alone(&self, token: Token) -> bool {
        self.0.get(&token).is_some_and(|rests| rests.iter().any(Vec::is_empty))
    }
}

/// One request's penalty, with the tokens that it looks at.
#[derive(Debug)]
pub struct Dry {
    params: DryParams,
    breakers: Breakers,
    tokens: Vec<Token>,
    /// Working memory: the window backwards, and of each place how far it repeats the end.
    back: Vec<Token>,
    common: Vec<usize>,
    longest: HashMap<Token, usize>,
}

impl Dry {
    /// After a prompt.
    pub fn new(params: &DryParams, breakers: Breakers, prompt: &[Token]) -> Self {
        Self {
            params: params.clone(),
            breakers,
            tokens: prompt.to_vec(),
            back: Vec::new(),
            common: Vec::new(),
            longest: HashMap::new(),
        }
    }

    /// Records the next token.
    pub fn accept(&mut self, token: Token) {
        self.tokens.push(token);
    }

    /// Lowers the logits of tokens that would continue a repetition.
    pub fn apply(&mut self, logits: &mut [f32]) {
        let Self { params, breakers, tokens, back, common, longest } = self;
        back.clear();
        back.extend(tokens.iter().rev().take(params.last_n));
        let n_most = breakers.n_after_last(back);
        if back.len() <= params.allowed_length || n_most < params.allowed_length {
            return;
        }
        common_prefixes(back, common);
        longest.clear();
        // What stands k tokens before the end followed by a token would, with it, be repeated.
        for (&token, &n) in back.iter().zip(&common[1..]) {
            let n = n.min(n_most);
            if n >= params.allowed_length && !breakers.is_alone(token) {
                let known = longest.entry(token).or_default();
                *known = n.max(*known);
            }
        }
        for (token, n) in longest.drain() {
            let exponent = (n - params.allowed_length) as f32;
            let penalty = params.multiplier * params.base.powf(exponent.min(params.max_exponent()));
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit -= penalty;
            }
        }
    }
}

impl DryParams {
    /// Powers of the base above this one are no numbers.
    fn max_exponent(&self) -> f32 {
        let most = (f32::MAX.ln() / self.base.ln()).trunc();
        if self.base > 1.000_001 { most } else { f32::MAX }
    }
}

/// For each place how many tokens from there on are those of the beginning; 0 for the beginning
/// itself. Linear: the Z-algorithm, as in Gusfield, "Algorithms on Strings, Trees, and Sequences".
fn common_prefixes(text: &[Token], common: &mut Vec<usize>) {
    common.clear();
    common.resize(text.len(), 0);
    // The match that reaches farthest.
    let (mut from, mut to) = (0, 0);
    for k in 1..text.len() {
        let known = if k < to { common[k - from].min(to - k) } else { 0 };
        let pairs = text[k + known..].iter().zip(&text[known..]);
        common[k] = known + pairs.take_while(|(a, b)| a == b).count();
        if k + common[k] > to {
            (from, to) = (k, k + common[k]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULT_MODEL;
    use crate::llama::{Candidates, Placement, SamplerChain};
    use std::path::Path;

    /// Random histories, of few tokens and of a text's, with breakers of every kind.
    #[test]
    fn penalties_are_what_llama_cpp_subtracts() {
        let model = Model::load(Path::new(DEFAULT_MODEL), &Placement::default(), |_| true).unwrap();
        let text = "a b: a b\na \"b\" c* a b c 😀漢 a b c 😀漢 a b: a b ** a b: a";
        let text = model.tokenize(text, false).unwrap();
        let mut random = fastrand::Rng::with_seed(3);
        let mut n_penalties = 0;
        for breakers in [&[][..], &["\n", ":", "\"", "*"], &[" b", "c", "a b"]] {
            let breakers: Vec<String> = breakers.iter().map(|s| (*s).to_owned()).collect();
            let found = Breakers::new(&model, &breakers).unwrap();
            for _ in 0..15 {
                let params = DryParams {
                    multiplier: 2.0 * random.f32(),
                    base: 1.0 + random.f32(),
                    allowed_length: random.usize(0..4),
                    last_n: random.usize(1..100),
                    breakers: breakers.clone(),
                };
                let n = random.usize(0..120);
                let few = random.bool();
                let mut token = || {
                    if few { Token(random.i32(60..63)) } else { text[random.usize(..text.len())] }
                };
                let mut history: Vec<Token> = (0..n).map(|_| token()).collect();
                history.extend(&text);
                history.truncate(random.usize(1..=history.len()));
                let mut chain = SamplerChain::new(model.n_vocab()).dry(&model, &params);
                history.iter().for_each(|&token| chain.accept(token));
                let zeros = vec![0.0; model.n_vocab()];
                let mut candidates = Candidates::default();
                let theirs = candidates.filter(&mut chain, &zeros).map(|(_, logit)| logit);
                let (prompt, rest) = history.split_at(history.len() / 2);
                let mut dry = Dry::new(&params, found.clone(), prompt);
                rest.iter().for_each(|&token| dry.accept(token));
                let mut ours = zeros.clone();
                dry.apply(&mut ours);
                for (token, (a, b)) in ours.iter().zip(theirs).enumerate() {
                    n_penalties += usize::from(b < 0.0);
                    let close = (a - b).abs() <= 1e-5 * b.abs().max(1.0);
                    assert!(close, "token {token}: {a}, not {b}: {params:?} {history:?}");
                }
            }
        }
        assert!(n_penalties > 100, "{n_penalties}");
        let mut tokens = model.tokenize("a漢b", false).unwrap();
        assert!(tokens.len() > 3, "a character of several tokens");
        tokens.reverse();
        let found = Breakers::new(&model, &["漢".to_owned()]).unwrap();
        assert_eq!(found.n_after_last(&tokens), 1);
    }

    #[test]
    fn a_long_repetition_costs_no_more_than_a_number_can_hold() {
        let params = DryParams {
            multiplier: 100.0,
            base: 100.0,
            allowed_length: 2,
            last_n: usize::MAX,
            breakers: vec![],
        };
        let mut dry = Dry::new(&params, Breakers::default(), &[Token(1); 5000]);
        let mut logits = [0.0; 3];
        dry.apply(&mut logits);
        assert_eq!((logits[0], logits[2]), (0.0, 0.0));
        assert!(logits[1] < -1e37 && !logits[1].is_nan());
    }
}
