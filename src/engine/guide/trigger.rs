//! Where in a text a grammar begins.

use regex::bytes::Regex;

use crate::request::Trigger;

/// Bytes of text before a token in which a match of a pattern may begin.
const PATTERN_WINDOW: usize = 256;

/// Looks for a trigger.
pub enum Matcher {
    Word(Vec<u8>),
    Pattern(Regex),
}

impl Matcher {
    /// # Errors
    /// A pattern that is none.
    pub fn new(trigger: &Trigger) -> Result<Self, regex::Error> {
        Ok(match trigger {
            Trigger::Word(word) => Self::Word(word.clone().into_bytes()),
            Trigger::Pattern(pattern) => Self::Pattern(Regex::new(pattern)?),
        })
    }

    /// Where the grammar begins in `text`, whose bytes from `new` on were not searched before.
    pub fn find(&self, text: &[u8], new: usize) -> Option<usize> {
        match self {
            Self::Word(word) => find(text, word, new),
            Self::Pattern(pattern) => {
                let from = new.saturating_sub(PATTERN_WINDOW);
                let found = pattern.captures_at(text, from)?;
                let group = found.iter().skip(1).flatten().find(|group| !group.is_empty());
                Some(group.or(found.get(0))?.start())
            }
        }
    }
}

/// The first place of a word in a text that ends behind `new`.
pub fn find(text: &[u8], word: &[u8], new: usize) -> Option<usize> {
    let from = (new + 1).saturating_sub(word.len());
    memchr::memmem::find(&text[from..], word).map(|at| from + at)
}
