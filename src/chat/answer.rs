//! A model's answer: text, thoughts and calls of tools, read from what it writes.
//!
//! The text is parsed whole as it grows, never piece by piece: one step may bring the end of a
//! thought, a call and the beginning of the next.

use std::sync::Arc;

use serde_json::Value;

use crate::llama::{AnswerParser, ParsedAnswer, ParsedCall};

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Its text.
    pub content: String,
    /// Its thoughts.
    pub reasoning: String,
    /// Its calls of tools, in order.
    pub calls: Vec<Call>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Never empty, and no other call of the answer has it.
    pub id: String,
    /// The tool's.
    pub name: String,
    /// JSON; of an answer that was cut off perhaps only the beginning of it.
    pub arguments: String,
}

/// What an answer says more than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// More thoughts.
    Reasoning(String),
    /// More text.
    Content(String),
    /// A call begins.
    Call {
        /// Its place among the answer's.
        index: usize,
        /// Its own.
        id: String,
        /// The tool's.
        name: String,
    },
    /// More of the arguments of a call.
    Arguments {
        /// Its place among the answer's.
        index: usize,
        /// JSON, a part of it.
        text: String,
    },
}

/// How answers to one request are written.
#[derive(Clone, Debug)]
pub struct Syntax {
    parser: Arc<AnswerParser>,
    /// What the parser finds in what the answer continues.
    before: ParsedAnswer,
}

impl Syntax {
    /// Of the `syntax` in what [`ChatFormat::apply`](crate::llama::ChatFormat::apply) returns.
    ///
    /// # Errors
    /// It is none.
    pub fn new(syntax: &Value) -> Result<Self, String> {
        let parser = AnswerParser::new(syntax).map_err(|e| e.to_string())?;
        // What an answer continues is in what is parsed.
        let before = parser.parse("", true).unwrap_or_default();
        Ok(Self { parser: Arc::new(parser), before })
    }
}

/// Between two parses the text grows by this share of its length.
const GROWTH: usize = 256;

/// Reads one answer.
#[derive(Clone, Debug)]
pub struct AnswerReader {
    /// `None`: the text is the content.
    syntax: Option<Syntax>,
    text: String,
    /// Bytes of the text when it was last parsed.
    n_parsed: usize,
    shown: Answer,
}

impl AnswerReader {
    /// Of an answer that is about to be written.
    #[must_use]
    pub fn new(syntax: Option<Syntax>) -> Self {
        Self { syntax, text: String::new(), n_parsed: 0, shown: Answer::default() }
    }

    /// Takes more of the text; gives `each` what the answer says more.
    pub fn push(&mut self, text: &str, each: &mut dyn FnMut(Delta)) {
        let Some(syntax) = &self.syntax else {
            self.shown.content += text;
            if !text.is_empty() {
                each(Delta::Content(text.to_owned()));
            }
            return;
        };
        self.text += text;
        if self.text.len() - self.n_parsed <= self.n_parsed / GROWTH || text.is_empty() {
            return;
        }
        self.n_parsed = self.text.len();
        if let Ok(parsed) = syntax.parser.parse(&self.text, true) {
            self.show(parsed, false, each);
        }
    }

    /// Ends the text; gives `each` what was held back.
    pub fn end(&mut self, each: &mut dyn FnMut(Delta)) {
        let Some(syntax) = &self.syntax else { return };
        let parsed = match syntax.parser.parse(&self.text, false) {
            Ok(parsed) => parsed,
            Err(_) => self.unparsed(syntax),
        };
        self.show(parsed, true, each);
    }

    /// A text that follows no syntax: what was understood of it, or else all of it as content.
    fn unparsed(&self, syntax: &Syntax) -> ParsedAnswer {
        let partial = syntax.parser.parse(&self.text, true).unwrap_or_default();
        let calls = |answer: &Answer| !answer.calls.is_empty();
        if calls(&self.shown) || !partial.calls.is_empty() {
            return partial;
        }
        if partial.reasoning.is_empty() {
            let content = syntax.before.content.clone() + &self.text;
            return ParsedAnswer { content, ..ParsedAnswer::default() };
        }
        partial
    }

    /// What the answer says so far.
    #[must_use]
    pub fn answer(&self) -> &Answer {
        &self.shown
    }

    /// Whether it calls a tool.
    #[must_use]
    pub fn has_calls(&self) -> bool {
        !self.shown.calls.is_empty()
    }

    /// Shows what is new. What was shown stays: a parse that says less says nothing.
    fn show(&mut self, parsed: ParsedAnswer, is_whole: bool, each: &mut dyn FnMut(Delta)) {
        let Some(syntax) = &self.syntax else { return };
        let before = &syntax.before;
        let shown = &mut self.shown;
        let reasoning = rest(&parsed.reasoning, &before.reasoning, &mut shown.reasoning);
        reasoning.into_iter().for_each(|text| each(Delta::Reasoning(text)));
        let content = rest(&parsed.content, &before.content, &mut shown.content);
        content.into_iter().for_each(|text| each(Delta::Content(text)));
        let n_calls = parsed.calls.len();
        for (index, call) in parsed.calls.into_iter().enumerate() {
            let is_last = index + 1 == n_calls;
            if index >= shown.calls.len() {
                // The last call's name may grow until its arguments begin.
                if call.name.is_empty() || (is_last && !is_whole && call.arguments.is_empty()) {
                    return;
                }
                let call =
                    Call { id: id(&call, shown), name: call.name.clone(), ..Call::default() };
                each(Delta::Call { index, id: call.id.clone(), name: call.name.clone() });
                shown.calls.push(call);
            }
            let empty = is_whole && call.arguments.is_empty();
            let arguments = if empty { "{}".to_owned() } else { call.arguments };
            let more = rest(&arguments, "", &mut shown.calls[index].arguments);
            more.into_iter().for_each(|text| each(Delta::Arguments { index, text }));
        }
    }
}

/// What `text`, which begins with `before`, says more than what is `shown`; adds it there.
fn rest(text: &str, before: &str, shown: &mut String) -> Option<String> {
    let text = text.strip_prefix(before)?;
    let rest = text.strip_prefix(shown.as_str()).filter(|rest| !rest.is_empty())?.to_owned();
    shown.push_str(&rest);
    Some(rest)
}

/// Characters of a new id, letters and digits: Mistral's templates take no other ids back.
const ID: usize = 9;

/// A call's id: the model's, or a new one.
fn id(call: &ParsedCall, shown: &Answer) -> String {
    let is_taken = |id: &str| shown.calls.iter().any(|other| other.id == id);
    let mut id = call.id.clone();
    while id.is_empty() || is_taken(&id) {
        id = std::iter::repeat_with(fastrand::alphanumeric).take(ID).collect();
    }
    id
}
