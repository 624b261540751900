//! What crosses between HTTP (or the command line) and the engine: a [`Request`] in, [`Event`]s
//! out.
//!
//! Both sides know this file and nothing else of each other.

use std::sync::Arc;
use std::time::Duration;

use half::f16;
use serde_json::Value;

use crate::llama::Token;
use crate::speculate::reliability::Source;
use crate::vector::{largest_k, log_sum_exp};

/// How to choose each token. Every value is in the range its field names; [`Default`] is
/// `/generate`'s.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the most likely tokens up to this probability together; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides the logits of tokens in the window; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for each time it stands in the window; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a token that stands in the window; 0 is off.
    pub presence_penalty: f32,
    /// The window of the penalties: this many last tokens, the prompt's included.
    pub repeat_last_n: usize,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(Token, f32)>,
    /// With the position it decides every draw: the same request and seed give the same text.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_p: 0.95,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// `true` if a penalty is on, so that the tokens before matter.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repeat_last_n > 0
            && (self.repetition_penalty != 1.0
                || self.frequency_penalty != 0.0
                || self.presence_penalty != 0.0)
    }
}

/// A request whose every field is in range. Only the prompt's length in tokens is not known yet:
/// the engine's [`Handle`](crate::engine::Handle) counts them and may still refuse.
#[derive(Clone, Debug)]
pub struct Request {
    /// The text to continue; control tokens may stand in it by name.
    pub prompt: String,
    /// Most tokens to generate; at least 1. The context's end may come first.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// The text ends before the first of these to be complete. None is empty.
    pub stop: Vec<String>,
    /// Never choose the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// Start from what is cached of the prompt's beginning.
    pub cache_prompt: bool,
    /// Whether to draft.
    pub speculation: Speculation,
    /// Whether its owner's other answers may be drafted from this one, and this one from them.
    pub share_text: bool,
    /// What the text must be; `None`: any text.
    pub grammar: Option<GrammarSource>,
    /// What to tell of each token beside its text; `None`: nothing.
    pub report: Option<Report>,
    /// The answer ends where it stands when so long has passed since the request was accepted.
    pub timeout: Option<Duration>,
    /// Names it in the log; empty if nobody asks.
    pub id: Arc<str>,
    /// Whose it is: a number, the same for all that one client sends; 0 where clients are not told
    /// apart.
    pub owner: u32,
}

impl Request {
    /// With nothing asked for but an answer of at most `max_tokens` tokens.
    #[must_use]
    pub fn new(prompt: impl Into<String>, max_tokens: usize) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            ignore_eos: false,
            cache_prompt: true,
            speculation: Speculation::Auto,
            share_text: true,
            grammar: None,
            report: None,
            timeout: None,
            id: "".into(),
            owner: 0,
        }
    }
}

/// A grammar as it was sent.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSource {
    /// JSON that a schema describes.
    JsonSchema(Value),
    /// In llguidance's dialect of Lark.
    Lark(String),
}

/// What to tell of each token of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Where it came from, and which step decided it.
    pub details: bool,
    /// Its log probability, and those of this many of the likeliest tokens; `None`: neither.
    pub n_top: Option<usize>,
}

/// What is told of a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenReport {
    /// Which.
    pub token: Token,
    /// Where it was drafted; `None` if it was not, and a step went by for it.
    pub source: Option<Source>,
    /// The request's step that decided it; 1 is the first.
    pub step: usize,
    /// Rows of that step, those of other requests included.
    pub n_rows: usize,
    /// What the model thought of it, where that was asked for.
    pub logprobs: Option<Logprobs>,
}

/// Natural logarithms of probabilities as the model gives them: before bias, penalties,
/// temperature, filters and grammar.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token.
    pub logprob: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(Token, f32)>,
}

impl Logprobs {
    /// Of `token` in a row of logits, with the `n_top` best.
    #[must_use]
    pub fn new(token: Token, logits: &[f32], n_top: usize) -> Self {
        let norm = log_sum_exp(logits);
        let mut top = Vec::with_capacity(n_top);
        largest_k(logits, n_top, &mut top);
        top.iter_mut().for_each(|(_, logit)| *logit -= norm);
        Self { logprob: logits[token.0 as usize] - norm, top }
    }
}

/// What every line of the log about a request stands in, wherever it is logged. Its level is the
/// highest there is, so that no filter takes it from a line.
#[must_use]
pub fn span(id: &str) -> tracing::Span {
    tracing::error_span!("request", request_id = id)
}

/// Whether drafts are verified for a request, where they come from, and how they are accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// From heads and text, as far as it pays; the answer is the same as without.
    #[default]
    Auto,
    /// The same, from heads alone.
    Heads,
    /// The same, from text alone.
    Text,
    /// Never.
    Off,
    /// As `Auto`, but a drafted token that is typical is accepted in place of a draw: lossy.
    Typical,
}

impl Speculation {
    /// All of them, as requests name them.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("auto", Self::Auto),
        ("heads", Self::Heads),
        ("text", Self::Text),
        ("off", Self::Off),
        ("typical", Self::Typical),
    ];

    /// By its name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::NAMES
            .into_iter()
            .find(|(known, _)| *known == name)
            .map(|(_, speculation)| speculation)
    }

    /// As requests name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.into_iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }

    /// `true` if heads draft.
    #[must_use]
    pub fn by_heads(self) -> bool {
        matches!(self, Self::Auto | Self::Heads | Self::Typical)
    }

    /// `true` if text drafts.
    #[must_use]
    pub fn by_text(self) -> bool {
        matches!(self, Self::Auto | Self::Text | Self::Typical)
    }
}

/// What a request gets back: any number of pieces, then one end.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More text; never empty, never half a character.
    Piece(Piece),
    /// The answer is complete. The last event.
    Done(Completion),
    /// The engine failed and the answer stays incomplete. The last event. The log names the cause
    /// under this id.
    Failed {
        /// What the log repeats.
        id: String,
    },
}

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// The tokens whose text begins in it, if a [`Report`] was asked for. One that ends the text is
    /// not among them.
    pub tokens: Vec<TokenReport>,
}

impl Piece {
    /// Appends a later part.
    pub fn append(&mut self, next: Self) {
        self.text += &next.text;
        self.tokens.extend(next.tokens);
    }
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// What was still held back as a possible beginning of a stop string; often empty.
    pub tail: Piece,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Token counts.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
    /// What drafting did.
    pub speculation: SpeculationUsage,
    /// What the model thought at each token; only from an engine that traces.
    pub trace: Option<Trace>,
}

/// What the model thought at each token of an answer: what heads learn from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The tokens chosen, an end-of-text token included.
    pub tokens: Vec<Token>,
    /// For each the post-norm hidden state that it was chosen from: `n_embd` values.
    pub hidden: Vec<f16>,
    /// For each the [`TOP`](Self::TOP) likeliest tokens, before temperature and filters, and their
    /// probabilities.
    pub top: Vec<(Token, f16)>,
}

impl Trace {
    /// Likeliest tokens that are kept; of a smaller vocabulary, tokens of no probability fill the
    /// rest.
    pub const TOP: usize = 16;

    /// Appends a token; `best` is room to work in.
    pub fn push(
        &mut self,
        token: Token,
        hidden: &[f32],
        logits: &[f32],
        best: &mut Vec<(Token, f32)>,
    ) {
        let norm = log_sum_exp(logits);
        largest_k(logits, Self::TOP, best);
        self.tokens.push(token);
        self.hidden.extend(hidden.iter().map(|&v| f16::from_f32(v)));
        self.top.extend(
            best.iter().map(|&(token, logit)| (token, f16::from_f32((logit - norm).exp()))),
        );
        self.top.resize(self.tokens.len() * Self::TOP, (Token(0), f16::ZERO));
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text, or its grammar allows no more.
    EndOfText,
    /// This stop string appeared; the text ends before it.
    StopString(String),
    /// `max_tokens` or the context's end was reached.
    Length,
    /// The request's time was over; perhaps before its first token.
    Deadline,
}

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were in the cache already.
    pub cached_tokens: usize,
    /// Tokens generated, an end-of-text token included.
    pub completion_tokens: usize,
}

/// What drafting did for one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationUsage {
    /// Steps that decided tokens.
    pub steps: usize,
    /// Candidates verified in them.
    pub drafted: usize,
    /// Candidates that were what the model chose.
    pub accepted: usize,
}

/// Seconds a request spent in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// From acceptance to the first step with a row of its own.
    pub queue_s: f64,
    /// From there to the first token.
    pub prefill_s: f64,
    /// From the first token to the last.
    pub decode_s: f64,
}
