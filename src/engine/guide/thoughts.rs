//! Thoughts before an answer: how they begin and end.

use crate::engine::grammar::Grammars;
use crate::llama::Token;
use crate::request::Thinking;

/// How one answer may think.
pub struct Thoughts {
    /// The text that begins them, and its token if it is one.
    pub begin: Option<(Vec<u8>, Option<Token>)>,
    pub ends: Vec<Vec<u8>>,
    /// What to write where the budget is spent.
    pub closing: Vec<Token>,
    pub budget: Option<usize>,
}

impl Thoughts {
    pub fn new(thinking: &Thinking, grammars: &Grammars) -> Self {
        let begin = thinking.begin.as_ref().map(|text| {
            let tokens = grammars.tokenize(text);
            let only = (tokens.len() == 1).then(|| tokens[0]);
            (text.clone().into_bytes(), only)
        });
        let closing = thinking.ends.first().map(|end| grammars.tokenize(end)).unwrap_or_default();
        let ends = thinking.ends.iter().map(|end| end.clone().into_bytes()).collect();
        Self { begin, ends, closing, budget: thinking.budget }
    }
}
