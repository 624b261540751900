//! An index of a text's tokens: where the last ones occurred before, and what followed there. Pure.
//!
//! The last tokens are looked up by their hash, in chains from the newest place to older ones, as in
//! compressors, and compared token by token. Adding a token takes one entry a chain; a lookup at most
//! [`MAX_PLACES`] comparisons of at most [`MAX_MATCH`] tokens a chain. The text is a ring of fixed
//! size: the oldest tokens are forgotten.

use crate::llama::Token;

/// Longest match that is counted.
pub const MAX_MATCH: usize = 32;
/// Places that one chain is followed through.
pub const MAX_PLACES: usize = 8;
/// Tokens that a chain's places have in common with the end of the text at least, longest first.
const ORDERS: [usize; 2] = [3, 1];
/// The end of one text and the beginning of another: no token.
const BREAK: Token = Token(-1);

/// The index of one text, or of several after one another.
#[derive(Clone, Debug)]
pub struct Suffixes {
    /// The token at place `p` is at `p % len`; the length is a power of two.
    ring: Vec<Token>,
    /// Places so far, forgotten ones included. Wraps around: what a place holds is compared before
    /// it is believed.
    n: u32,
    chains: [Chain; ORDERS.len()],
}

#[derive(Clone, Debug)]
struct Chain {
    /// By hash of the last tokens, the newest place after them plus one; 0 for none.
    newest: Vec<u32>,
    /// By place, as the ring: the one before with the same hash.
    before: Vec<u32>,
}

/// A place where the last tokens stood before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// What followed.
    pub token: Token,
    /// How many tokens before that are the same, up to [`MAX_MATCH`].
    pub n: usize,
}

impl Suffixes {
    /// An empty index that remembers `n` tokens, rounded up to a power of two.
    #[must_use]
    pub fn new(n: usize) -> Self {
        let n = n.max(2 * MAX_MATCH).next_power_of_two();
        let chain = || Chain { newest: vec![0; n], before: vec![0; n] };
        Self { ring: vec![BREAK; n], n: 0, chains: [chain(), chain()] }
    }

    /// Bytes that an index of `n` tokens takes.
    #[must_use]
    pub fn bytes(n: usize) -> usize {
        n.max(2 * MAX_MATCH).next_power_of_two()
            * (size_of::<Token>() + ORDERS.len() * 2 * size_of::<u32>())
    }

    /// Adds the next token.
    pub fn push(&mut self, token: Token) {
        let at = self.slot(self.n);
        self.ring[at] = token;
        self.n = self.n.wrapping_add(1);
        for (order, i) in ORDERS.into_iter().zip(0..) {
            let key = self.key(
                (1..=order as u32)
                    .rev()
                    .map(|back| self.ring[self.slot(self.n.wrapping_sub(back))]),
            );
            let chain = &mut self.chains[i];
            chain.before[at] = std::mem::replace(&mut chain.newest[key], self.n);
        }
    }

    /// Adds a whole text: nothing that comes later continues it, or what came before.
    pub fn push_text(&mut self, tokens: &[Token]) {
        tokens.iter().for_each(|&token| self.push(token));
        self.push(BREAK);
    }

    /// Appends what followed where the last tokens of `text` stood before, the longest matches of
    /// each chain's newest places. Where this index is of `text` itself, its end is no such place,
    /// as nothing follows yet.
    pub fn find(&self, text: &[Token], found: &mut Vec<Match>) {
        let mut known = [0; MAX_PLACES];
        let mut n_known = 0;
        for (order, chain) in ORDERS.into_iter().zip(&self.chains) {
            let Some(last) = text.len().checked_sub(order).map(|from| &text[from..]) else {
                continue;
            };
            let mut next = chain.newest[self.key(last.iter().copied())];
            let mut youngest = 0;
            for _ in 0..MAX_PLACES {
                // Behind the last matching token.
                let place = next;
                let age = self.n.wrapping_sub(place) as usize;
                if place == 0 || age >= self.ring.len() || age < youngest {
                    break; // none, or overwritten since
                }
                youngest = age + 1;
                next = chain.before[self.slot(place.wrapping_sub(1))];
                if age == 0 || known[..n_known].contains(&place) {
                    continue;
                }
                let n = self.n_common(place, self.ring.len() - age, text);
                let token = self.ring[self.slot(place)];
                if n < order || token == BREAK {
                    continue;
                }
                found.push(Match { token, n });
                if order == ORDERS[0] {
                    known[n_known] = place;
                    n_known += 1;
                }
            }
        }
    }

    /// Tokens in common before `place`, of which `n_kept` are still there, and at the end of
    /// `text`.
    fn n_common(&self, place: u32, n_kept: usize, text: &[Token]) -> usize {
        let before = (1..=n_kept.min(MAX_MATCH) as u32)
            .map(|back| self.ring[self.slot(place.wrapping_sub(back))]);
        before.zip(text.iter().rev()).take_while(|(a, b)| a == *b).count()
    }

    fn slot(&self, place: u32) -> usize {
        place as usize & (self.ring.len() - 1)
    }

    fn key(&self, tokens: impl Iterator<Item = Token>) -> usize {
        // Multiplication moves what differs into the high bits.
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        let mixed = tokens
            .fold(0u64, |hash, token| (hash ^ token.0 as u64).wrapping_mul(ODD).rotate_left(23));
        (mixed.wrapping_mul(ODD) >> 32) as usize & (self.ring.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(text: &str) -> Vec<Token> {
        text.bytes().map(|b| Token(i32::from(b))).collect()
    }

    fn found(index: &Suffixes, text: &str) -> Vec<(char, usize)> {
        let mut found = vec![];
        index.find(&tokens(text), &mut found);
        found.iter().map(|m| (m.token.0 as u8 as char, m.n)).collect()
    }

    fn index(n: usize, text: &str) -> Suffixes {
        let mut index = Suffixes::new(n);
        tokens(text).into_iter().for_each(|t| index.push(t));
        index
    }

    #[test]
    fn the_longest_match_comes_first_and_what_follows_is_found() {
        let index = index(256, "the cat sat. the cow sat on a mat. the c");
        assert_eq!(found(&index, "the cat sat. the cow sat on a mat. the c"), [('o', 9), ('a', 5)]);
        assert_eq!(found(&index, "xx the cow"), [(' ', 8)]);
        assert_eq!(found(&index, "xxcow"), [(' ', 3)]);
        assert_eq!(found(&index, "xxw"), [(' ', 1)], "one token will do");
        assert_eq!(found(&index, "q"), []);
    }

    #[test]
    fn the_end_of_one_text_is_not_continued_by_the_next() {
        let mut index = Suffixes::new(64);
        index.push_text(&tokens("abcabc"));
        index.push_text(&tokens("defg"));
        assert_eq!(found(&index, "abc"), [('a', 3)], "and nothing after the second one");
        assert_eq!(found(&index, "de"), [('f', 2)]);
    }

    #[test]
    fn what_is_older_than_the_ring_is_forgotten() {
        let mut index = index(64, "find me");
        assert_eq!(found(&index, "find"), [(' ', 4)]);
        for token in 1000..1064 {
            index.push(Token(token));
        }
        assert_eq!(found(&index, "find"), []);
        assert_eq!(Suffixes::bytes(2048), 2048 * 20);
    }

    #[test]
    fn places_may_wrap_around() {
        let mut index = Suffixes::new(64);
        index.n = u32::MAX - 20;
        for _ in 0..3 {
            tokens("round and ").into_iter().for_each(|t| index.push(t));
        }
        assert_eq!(found(&index, "round ")[0], ('a', 6));
    }

    proptest! {
        /// Whatever is found is true, the newest place of the longest match is among it, and
        /// nothing else is when none is.
        #[test]
        fn what_is_found_stands_in_the_text(text in "[ab]{0,200}", ring in 64usize..200) {
            let all = tokens(&text);
            let index = index(ring, &text);
            let kept = &all[all.len().saturating_sub(index.ring.len())..];
            let mut matches = vec![];
            index.find(kept, &mut matches);
            let common = |end: usize| {
                kept[..end].iter().rev().zip(kept.iter().rev()).take(MAX_MATCH).take_while(|(a, b)| a == b).count()
            };
            let places: Vec<(usize, Token)> = (1..kept.len()).map(|end| (common(end), kept[end])).collect();
            for m in &matches {
                prop_assert!(places.contains(&(m.n, m.token)), "{:?} of {:?}", m, places);
            }
            let newest = places.iter().rev().find(|(n, _)| *n >= ORDERS[1]);
            prop_assert_eq!(newest.is_some(), !matches.is_empty());
        }
    }
}
