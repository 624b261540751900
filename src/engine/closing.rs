//! The short way to the end of JSON: how an answer that may have few tokens more is closed, so that
//! it can be read.

use super::digits::Digits;
use super::grammar::Grammar;
use crate::llama::Token;

/// What ends a string, or is part of most that have a form.
const IN_STRING: &[&str] = &["\"", "0", "1", "a", "A", "-", "T", ":", "Z"];
/// What else to try, the shortest way first: the end of what is open, a value, a comma.
const OUTSIDE: &[&str] = &[
    "}", "]", "0", "1", "2", "5", "9", "-", "\"", "null", "true", "false", "n", "t", "f", "[", "{",
    ", ", ",",
];

/// Tokens of which nothing is known but that they may come next: looking for them takes long.
const MOST_GUESSES: usize = 8;

impl Grammar {
    /// Tokens that end the text from here, at most `most`; `None` if they were not found so soon.
    pub fn way_out(&mut self, most: usize) -> Option<Vec<Token>> {
        let mut digits = self.digits()?;
        let (mut way, mut guesses) = (Vec::new(), MOST_GUESSES);
        while !self.may_end() {
            let next = match self.forced() {
                forced if forced.is_empty() => self.step_out(&digits, &mut guesses),
                forced => Some(forced),
            };
            let next = next.filter(|next| way.len() + next.len() <= most && self.try_path(next));
            let Some(next) = next else {
                self.go_back(way.len());
                return None;
            };
            next.iter().for_each(|token| digits.push(self.bytes(*token)));
            way.extend(next);
        }
        self.go_back(way.len());
        Some(way)
    }

    /// One step towards the end, where there is a choice.
    fn step_out(&mut self, digits: &Digits, guesses: &mut usize) -> Option<Vec<Token>> {
        let texts = if digits.is_in_string() { IN_STRING } else { OUTSIDE };
        let known = texts.iter().map(|text| self.tokenize(text.as_bytes()));
        let known: Vec<Vec<Token>> = known.collect();
        let mut fits = |path: &Vec<Token>| {
            let fits = self.try_path(path);
            if fits {
                self.go_back(path.len());
            }
            fits
        };
        known.into_iter().find(|path| fits(path)).or_else(|| {
            *guesses = guesses.checked_sub(1)?;
            Some(vec![self.any_token()?])
        })
    }
}
