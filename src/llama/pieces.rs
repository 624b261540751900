//! Cuts a text where a vocabulary's special tokens stand. llama.cpp looks for those in the whole
//! text, in a time that grows with the square of how many there are; so it gets pieces.

use aho_corasick::{AhoCorasick, Match};

/// Bytes of a piece at least: each costs a call.
const LEAST: usize = 4 << 10;

/// Occurrences in a text at most; beyond, it is not cut.
const MOST: usize = 1 << 20;

/// A token that llama.cpp looks for before it reads the text between.
#[derive(Debug)]
pub struct Special {
    pub text: String,
    /// It is looked for only where control tokens may be named.
    pub control: bool,
    /// White space before it, and after it, belongs to it.
    pub strips_before: bool,
    pub strips_after: bool,
}

/// All of a vocabulary.
#[derive(Debug)]
pub struct Specials {
    automaton: AhoCorasick,
    tokens: Vec<Special>,
}

impl Specials {
    /// `None` for too many of them.
    pub fn new(tokens: Vec<Special>) -> Option<Self> {
        let automaton = AhoCorasick::new(tokens.iter().map(|token| &token.text)).ok()?;
        Some(Self { automaton, tokens })
    }

    /// The text in pieces whose tokens are, one after another, those of the text. Each but the last
    /// ends with a special token that no other overlaps, which is found in any order of search.
    pub fn cut<'t>(&self, text: &'t str, control: bool) -> Vec<&'t str> {
        self.cut_from(text, control, LEAST)
    }

    fn cut_from<'t>(&self, text: &'t str, control: bool, least: usize) -> Vec<&'t str> {
        if text.len() <= least {
            return vec![text];
        }
        let sought = self.automaton.find_overlapping_iter(text);
        let sought = sought.filter(|m| control || !self.tokens[m.pattern().as_usize()].control);
        let found: Vec<_> = sought.take(MOST).collect(); // in the order of their ends
        if found.len() == MOST {
            return vec![text];
        }
        let token = |m: &Match| &self.tokens[m.pattern().as_usize()];
        let is_space = |b: &&u8| b.is_ascii_whitespace() || **b == 0x0B;
        let space_before =
            |at: usize| text.as_bytes()[..at].iter().rev().take_while(is_space).count();
        let space_after = |at: usize| text.as_bytes()[at..].iter().take_while(is_space).count();
        // By occurrence, how far those before it reach.
        let mut reach = 0;
        let reached: Vec<usize> = found
            .iter()
            .map(|m| {
                let own = if token(m).strips_after { space_after(m.end()) } else { 0 };
                let before = reach;
                reach = reach.max(m.end() + own);
                before
            })
            .collect();
        let mut cuts = Vec::new();
        let mut next_start = usize::MAX;
        for (m, reached) in found.iter().zip(reached).rev() {
            if reached <= m.start() && m.end() <= next_start && !token(m).strips_after {
                cuts.push(m.end());
            }
            let own = if token(m).strips_before { space_before(m.start()) } else { 0 };
            next_start = next_start.min(m.start() - own);
        }
        let (mut pieces, mut begin) = (Vec::new(), 0);
        for end in cuts.into_iter().rev() {
            if end - begin >= least && end < text.len() {
                pieces.push(&text[begin..end]);
                begin = end;
            }
        }
        pieces.push(&text[begin..]);
        pieces
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    enum Part {
        Text(String),
        Token(usize),
    }

    /// As llama.cpp does it: the longest token first, each in what the ones before it left.
    fn partition(text: &str, tokens: &[Special], control: bool) -> Vec<Part> {
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(tokens[i].text.len()));
        let mut parts = vec![Part::Text(text.to_owned())];
        for i in order.into_iter().filter(|&i| control || !tokens[i].control) {
            let split = |part: Part| {
                let Part::Text(mut text) = part else { return vec![part] };
                let mut parts = Vec::new();
                while let Some(at) = text.find(&tokens[i].text) {
                    let left = &text[..at];
                    let left = if tokens[i].strips_before { left.trim_end() } else { left };
                    parts.push(Part::Text(left.to_owned()));
                    parts.push(Part::Token(i));
                    let rest = &text[at + tokens[i].text.len()..];
                    text = if tokens[i].strips_after { rest.trim_start() } else { rest }.to_owned();
                }
                parts.push(Part::Text(text));
                parts
            };
            parts = parts.into_iter().flat_map(split).collect();
            parts.retain(|part| *part != Part::Text(String::new()));
        }
        parts
    }

    proptest! {
        #[test]
        fn pieces_have_the_parts_of_the_whole(
            tokens in prop::collection::hash_set("[<> a|]{1,4}", 1..6),
            kinds in prop::collection::vec(any::<[bool; 3]>(), 6),
            text in "[<> a|b]{0,80}",
            control: bool,
            least in 1usize..12,
        ) {
            let special = |(text, kind): (String, [bool; 3])| {
                let [control, strips_before, strips_after] = kind;
                Special { text, control, strips_before, strips_after }
            };
            let tokens = tokens.into_iter().zip(kinds).map(special).collect();
            let specials = Specials::new(tokens).unwrap();
            let pieces = specials.cut_from(&text, control, least);
            prop_assert_eq!(pieces.concat(), text.clone());
            let parts = |text: &str| partition(text, &specials.tokens, control);
            let of_pieces: Vec<Part> = pieces.into_iter().flat_map(parts).collect();
            prop_assert_eq!(of_pieces, parts(&text));
        }
    }
}
