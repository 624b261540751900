//! What may come next in an answer: thoughts first, then any text until a grammar begins, then what
//! the grammar leaves.
//!
//! A [`Guide`] has seen the tokens chosen so far. It masks the row of logits that the next one is
//! chosen from, and prepares a tree before it is computed: it cuts out what may not follow, and adds
//! what must. What it does at a place depends on the text up to there and on nothing else, so the
//! text is the same with drafts and without. `thoughts` knows when thoughts are over, `trigger` where
//! a grammar begins, `tree` cuts and adds.

mod thoughts;
mod tree;
mod trigger;

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use self::thoughts::Thoughts;
use self::trigger::{Matcher, find};
use super::grammar::{Grammar, GrammarError, Grammars};
use crate::error::Invalid;
use crate::llama::Token;
use crate::request::{GrammarBegin, Request};

/// Processor time that a grammar may take at once, and for each token again. All streams wait for
/// it, and an ambiguous grammar takes more with each token.
const MOST_TIME: Duration = Duration::from_millis(250);
const TIME_PER_TOKEN: Duration = Duration::from_millis(20);
/// The same for what a tree may take. A tree that would take more stays as it was drafted: an answer
/// never ends because of its drafts.
const TIME_PER_TREE: Duration = Duration::from_millis(5);

/// Tokens before the last one an answer may have, from which on it is looked for its end.
const CLOSING: usize = 96;
/// Tokens between two looks, which take time.
const LOOK_EVERY: usize = 4;
/// Tokens to spare when it is closed.
const SPARE: usize = 16;

/// Follows one answer.
pub struct Guide {
    grammar: Option<Grammar>,
    thoughts: Option<Thoughts>,
    triggers: Vec<Matcher>,
    /// Tokens of the text that the answer and its grammar begin with.
    opening: Vec<Token>,
    /// The grammar waits for a trigger, or has not been reached yet.
    waits: bool,
    place: Place,
    /// What thoughts and triggers are looked for in.
    text: Vec<u8>,
    /// Tokens that the answer may still have.
    n_left: usize,
    /// Tokens that close an answer that may have few more, the next one last; none are left at its
    /// end.
    closing: Option<Vec<Token>>,
    /// What it closes is not whole.
    is_cut: bool,
    /// Processor time that it may still take for tokens, and for trees.
    time: Duration,
    tree_time: Duration,
}

/// Where an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At its beginning, where thoughts may begin.
    Before,
    /// After this many tokens of thoughts.
    Thinking(usize),
    /// After this many tokens of the text that ends thoughts.
    Closing(usize),
    /// After this many tokens of the text that the grammar begins with.
    Opening(usize),
    /// Before a trigger.
    Waiting,
    /// Where the grammar holds.
    Following,
    /// Where nothing holds any more.
    Free,
}

/// What a path took, to be taken back.
struct Undo {
    place: Place,
    n_text: usize,
    /// Tokens that the grammar consumed.
    n_consumed: usize,
}

/// What must come next.
enum Next {
    Anything,
    Only(Token),
    /// What the grammar allows, or the token that begins thoughts.
    Grammar(Option<Token>),
}

impl Guide {
    /// Of a request, if anything guides it. `grammars` are those of the vocabulary in which the
    /// request's [`shown`](Request::shown) tokens are text.
    ///
    /// # Errors
    /// [`Invalid`] for a grammar that cannot be followed.
    pub fn of(request: &Request, grammars: &Grammars) -> Result<Option<Self>, Invalid> {
        let grammar =
            request.grammar.as_ref().map(|source| grammars.compile(source)).transpose()?;
        if grammar.is_none() && request.thinking.as_ref().is_none_or(|t| t.budget.is_none()) {
            return Ok(None);
        }
        let mut guide = Self::from_parts(grammar);
        guide.thoughts =
            request.thinking.as_ref().map(|thinking| Thoughts::new(thinking, grammars));
        let fail =
            |why: &str| Invalid::new("grammar", format!("grammar cannot be followed: {why}"));
        match &request.begin {
            GrammarBegin::Answer => {}
            GrammarBegin::Prompt(text) => {
                let path = grammars.tokenize(text);
                let grammar = guide.grammar.as_mut();
                if !grammar.is_none_or(|grammar| grammar.begin_after(&path)) {
                    return Err(fail("it does not begin with the prompt's end"));
                }
            }
            GrammarBegin::Text(text) => guide.opening = grammars.tokenize(text),
            GrammarBegin::Triggers(triggers) => {
                let matchers = triggers.iter().map(Matcher::new);
                guide.triggers =
                    matchers.collect::<Result<_, _>>().map_err(|e| fail(&e.to_string()))?;
                guide.waits = true;
            }
        }
        guide.place = match &guide.thoughts {
            Some(Thoughts { begin: Some(_), .. }) => Place::Before,
            Some(Thoughts { begin: None, .. }) => Place::Thinking(0),
            None => guide.place_after_thoughts(),
        };
        Ok(Some(guide))
    }

    fn from_parts(grammar: Option<Grammar>) -> Self {
        let place = if grammar.is_some() { Place::Following } else { Place::Free };
        Self {
            grammar,
            thoughts: None,
            triggers: Vec::new(),
            opening: Vec::new(),
            waits: false,
            place,
            text: Vec::new(),
            n_left: usize::MAX,
            closing: None,
            is_cut: false,
            time: MOST_TIME,
            tree_time: MOST_TIME,
        }
    }

    /// Of an answer of at most `n` tokens: near them JSON is closed, so that it can be read.
    #[must_use]
    pub fn limited(self, n: usize) -> Self {
        Self { n_left: n, ..self }
    }

    /// The answer was closed, where it was not whole, because it may have no more tokens.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Looks for the end of an answer that may have few tokens more. Returns `true` if it is here.
    fn look_ahead(&mut self) -> bool {
        self.n_left = self.n_left.saturating_sub(1);
        if let Some(closing) = &mut self.closing {
            closing.pop();
            return closing.is_empty();
        }
        let is_near = self.n_left <= CLOSING && self.n_left.is_multiple_of(LOOK_EVERY);
        let is_near = is_near && self.place == Place::Following;
        let Some(grammar) = self.grammar.as_mut().filter(|_| is_near) else { return false };
        let Some(mut way) = grammar.way_out(self.n_left) else { return false };
        // One token more may open what takes several to close; another call takes many.
        let is_between_calls = way.is_empty() && (self.waits || !self.opening.is_empty());
        let spare = if is_between_calls { CLOSING } else { SPARE };
        if way.len() + spare < self.n_left {
            return false;
        }
        let is_over = way.is_empty();
        way.reverse();
        (self.closing, self.is_cut) = (Some(way), !is_between_calls);
        is_over
    }

    /// Where an answer is once it no longer thinks.
    fn place_after_thoughts(&self) -> Place {
        match &self.grammar {
            None => Place::Free,
            Some(_) if self.waits => Place::Waiting,
            Some(_) if !self.opening.is_empty() => Place::Opening(0),
            Some(_) => Place::Following,
        }
    }

    fn next(&self) -> Next {
        match (self.place, &self.thoughts) {
            (Place::Closing(n), Some(thoughts)) => Next::Only(thoughts.closing[n]),
            (Place::Opening(n), _) => Next::Only(self.opening[n]),
            (Place::Following, _) => {
                let closing = self.closing.as_ref().and_then(|closing| closing.last());
                closing.map_or(Next::Grammar(None), |token| Next::Only(*token))
            }
            (Place::Before, Some(thoughts)) => {
                let begin = thoughts.begin.as_ref().and_then(|(_, token)| *token);
                match (self.place_after_thoughts(), begin) {
                    (Place::Following, begin) => Next::Grammar(begin),
                    (Place::Opening(_), None) => Next::Only(self.opening[0]),
                    // Either of two tokens: what the model begins with decides.
                    _ => Next::Anything,
                }
            }
            _ => Next::Anything,
        }
    }

    /// Copies `logits` with those of forbidden tokens lowered to minus infinity. Returns `false`,
    /// and copies nothing, where any token may come next.
    pub fn mask(&self, logits: &[f32], masked: &mut Vec<f32>) -> bool {
        match (self.next(), &self.grammar) {
            (Next::Anything, _) | (Next::Grammar(_), None) => return false,
            (Next::Only(token), _) => {
                masked.clear();
                masked.resize(logits.len(), f32::NEG_INFINITY);
                copy(token, logits, masked);
            }
            (Next::Grammar(or), Some(grammar)) => {
                grammar.mask(logits, masked);
                or.iter().for_each(|token| copy(*token, logits, masked));
            }
        }
        true
    }

    /// Takes the token that was chosen, and its bytes in the text. Returns `true` if the text is
    /// complete: nothing may follow, or only its end.
    ///
    /// # Errors
    /// [`GrammarError`] when llguidance gives up, or took too much time.
    pub fn accept(&mut self, token: Token, bytes: &[u8]) -> Result<bool, GrammarError> {
        let begun = processor_time();
        let is_whole = self.advance(token, bytes)?;
        let left = (self.time + TIME_PER_TOKEN).checked_sub(processor_time() - begun);
        let late = || GrammarError("it takes too much time for each token".into());
        self.time = left.ok_or_else(late)?.min(MOST_TIME);
        self.tree_time = (self.tree_time + TIME_PER_TREE).min(MOST_TIME);
        Ok(is_whole || self.look_ahead())
    }

    fn advance(&mut self, token: Token, bytes: &[u8]) -> Result<bool, GrammarError> {
        if let (Place::Following, Some(grammar)) = (self.place, &mut self.grammar) {
            return grammar.accept(token);
        }
        let entered = self.step(token, bytes).map_or(Vec::new(), |(_, path)| path);
        if self.place == Place::Following {
            let grammar = self.grammar.as_mut();
            return grammar.map_or(Ok(false), |grammar| grammar.settle(&entered));
        }
        Ok(false)
    }

    /// Takes a token, of which it is only known that [`next`](Self::next) does not forbid it, and
    /// returns how to take it back, and the tokens that the grammar consumed if it begins here.
    /// `None` if it may not follow.
    fn step(&mut self, token: Token, bytes: &[u8]) -> Option<(Undo, Vec<Token>)> {
        let mut undo = Undo { place: self.place, n_text: self.text.len(), n_consumed: 0 };
        let mut entered = Vec::new();
        match self.place {
            Place::Free => {}
            Place::Following => {
                let grammar = self.grammar.as_mut()?;
                if !grammar.try_path(&[token]) {
                    return None;
                }
                undo.n_consumed = 1;
            }
            Place::Closing(n) => {
                let closing = &self.thoughts.as_ref()?.closing;
                if closing[n] != token {
                    return None;
                }
                let is_last = n + 1 == closing.len();
                self.place =
                    if is_last { self.place_after_thoughts() } else { Place::Closing(n + 1) };
            }
            Place::Opening(n) => {
                if self.opening[n] != token {
                    return None;
                }
                self.place = Place::Opening(n + 1);
                if n + 1 == self.opening.len() {
                    let opening = self.opening.clone();
                    self.enter(&opening);
                    entered = opening;
                }
            }
            Place::Before | Place::Thinking(_) | Place::Waiting => {
                self.text.extend_from_slice(bytes);
                entered = self.scan(undo.n_text, token);
            }
        }
        if self.place == Place::Following && undo.place != Place::Following {
            undo.n_consumed = entered.len();
        }
        Some((undo, entered))
    }

    /// Looks for what begins or ends in the text from `new` on, and moves on. Returns the tokens that
    /// the grammar consumed if it begins here.
    fn scan(&mut self, new: usize, token: Token) -> Vec<Token> {
        let mut new = new;
        if self.place == Place::Before {
            let begin = self.thoughts.as_ref().and_then(|thoughts| thoughts.begin.as_ref());
            let Some((begin, first)) = begin else { return Vec::new() };
            // Where a form begins at once, it is one of two tokens, and white space is part of it.
            let is_held = !matches!(self.next(), Next::Anything);
            if is_held && first.is_none_or(|first| first != token) {
                return self.leave_thoughts(0, Some(token));
            }
            let start = self.text.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let seen = &self.text[start..];
            if seen.starts_with(begin) {
                self.place = Place::Thinking(0);
                new = start + begin.len();
            } else if begin.starts_with(seen) {
                return Vec::new(); // it may still begin
            } else {
                return self.leave_thoughts(0, Some(token));
            }
        }
        if let (Place::Thinking(n), Some(thoughts)) = (self.place, &self.thoughts) {
            let ends = thoughts
                .ends
                .iter()
                .filter_map(|end| find(&self.text, end, new).map(|at| (at, at + end.len(), end)));
            if let Some((at, end, word)) = ends.min_by_key(|(at, end, _)| (*at, usize::MAX - end)) {
                // A call may end thoughts, too.
                let calls = |matcher: &Matcher| matches!(matcher, Matcher::Word(w) if w == word);
                let rest = if self.triggers.iter().any(calls) { at } else { end };
                return self.leave_thoughts(rest, None);
            }
            let n = n + 1;
            let is_spent = thoughts.budget.is_some_and(|budget| n >= budget);
            self.place = if is_spent && !thoughts.closing.is_empty() {
                Place::Closing(0)
            } else {
                Place::Thinking(n)
            };
            return Vec::new();
        }
        self.await_trigger(new)
    }

    /// Goes on after thoughts with the text from `rest` on, all of which is `token` if there is one.
    fn leave_thoughts(&mut self, rest: usize, token: Option<Token>) -> Vec<Token> {
        self.place = self.place_after_thoughts();
        match self.place {
            Place::Waiting => self.await_trigger(rest),
            // What is between thoughts and an answer in a fixed form is white space.
            Place::Following if token.is_some() => {
                let path: Vec<Token> = token.into_iter().collect();
                if self.enter(&path) { path } else { Vec::new() }
            }
            Place::Following => {
                let text = self.text[rest..].trim_ascii_start();
                let path = match &self.grammar {
                    Some(grammar) if !text.is_empty() => grammar.tokenize(text),
                    _ => Vec::new(),
                };
                if self.enter(&path) { path } else { Vec::new() }
            }
            Place::Opening(_) if token == self.opening.first().copied() => {
                self.place = Place::Opening(1);
                if self.opening.len() == 1 {
                    let opening = self.opening.clone();
                    self.enter(&opening);
                    return opening;
                }
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// Looks for a trigger in the text, whose bytes from `new` on were not searched before.
    fn await_trigger(&mut self, new: usize) -> Vec<Token> {
        if self.place != Place::Waiting {
            return Vec::new();
        }
        let found = self.triggers.iter().filter_map(|trigger| trigger.find(&self.text, new)).min();
        let (Some(start), Some(grammar)) = (found, &self.grammar) else { return Vec::new() };
        let path = grammar.tokenize(&self.text[start..]);
        // What goes on otherwise than the grammar has it is text.
        if self.enter(&path) { path } else { Vec::new() }
    }

    /// Begins the grammar after `path`. Returns `false`, and stays where it is, if it does not begin
    /// so.
    fn enter(&mut self, path: &[Token]) -> bool {
        let fits = self.grammar.as_mut().is_some_and(|grammar| grammar.try_path(path));
        if fits {
            self.place = Place::Following;
        } else if matches!(self.place, Place::Opening(_)) {
            self.place = Place::Free;
        }
        fits
    }

    fn take_back(&mut self, undo: &Undo) {
        if let Some(grammar) = self.grammar.as_mut().filter(|_| undo.n_consumed > 0) {
            grammar.go_back(undo.n_consumed);
        }
        self.text.truncate(undo.n_text);
        self.place = undo.place;
    }

    /// The tokens that must come next, if any must.
    fn forced(&mut self) -> Vec<Token> {
        match (self.place, &self.thoughts) {
            (Place::Closing(n), Some(thoughts)) => thoughts.closing[n..].to_vec(),
            (Place::Opening(n), _) => self.opening[n..].to_vec(),
            (Place::Following, _) => match (&self.closing, &mut self.grammar) {
                (Some(closing), _) => closing.iter().rev().copied().collect(),
                (None, Some(grammar)) => grammar.forced(),
                (None, None) => Vec::new(),
            },
            _ => Vec::new(),
        }
    }
}

impl From<Grammar> for Guide {
    /// One in which a grammar holds from the beginning.
    fn from(grammar: Grammar) -> Self {
        Self::from_parts(Some(grammar))
    }
}

fn copy(token: Token, logits: &[f32], masked: &mut [f32]) {
    let at = token.0.cast_unsigned() as usize;
    if let (Some(to), Some(from)) = (masked.get_mut(at), logits.get(at)) {
        *to = *from;
    }
}

/// Processor time of this thread so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.try_into().unwrap_or_default() // it is never negative
}
