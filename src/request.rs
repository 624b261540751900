//! What crosses between HTTP (or the command line) and the engine: a [`Request`] in, [`Event`]s out.
//!
//! Both sides know this file and nothing else of each other.

use std::sync::Arc;

use half::f16;

use crate::llama::Token;
use crate::vector::{largest_k, log_sum_exp};

/// How to choose each token. Every value is in the range its field names; [`Default`] is `/generate`'s.
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
            && (self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0)
    }
}

/// A request whose every field is in range. Only the prompt's length in tokens is not known yet: the engine's
/// [`Handle`](crate::engine::Handle) counts them and may still refuse.
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
    /// Whether other answers may be drafted from this one, and this one from others.
    pub share_text: bool,
    /// Names it in the log; empty if nobody asks.
    pub id: Arc<str>,
    /// Whose it is: a number, the same for all that one client sends; 0 where clients are not told apart.
    pub owner: u32,
}

/// What every line of the log about a request stands in, wherever it is logged. Its level is the highest there is, so that no
/// filter takes it from a line.
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
    pub const NAMES: [(&'static str, Self); 5] =
        [("auto", Self::Auto), ("heads", Self::Heads), ("text", Self::Text), ("off", Self::Off), ("typical", Self::Typical)];

    /// By its name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|(known, _)| *known == name).map(|(_, speculation)| speculation)
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
    Piece(String),
    /// The answer is complete. The last event.
    Done(Completion),
    /// The engine failed and the answer stays incomplete. The last event. The log names the cause under this id.
    Failed {
        /// What the log repeats.
        id: String,
    },
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Text that was still held back as a possible beginning of a stop string; often empty.
    pub tail: String,
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
    /// For each the [`TOP`](Self::TOP) likeliest tokens, before temperature and filters, and their probabilities.
    pub top: Vec<(Token, f16)>,
}

impl Trace {
    /// Likeliest tokens that are kept; of a smaller vocabulary, tokens of no probability fill the rest.
    pub const TOP: usize = 16;

    /// Appends a token; `best` is room to work in.
    pub fn push(&mut self, token: Token, hidden: &[f32], logits: &[f32], best: &mut Vec<(Token, f32)>) {
        let norm = log_sum_exp(logits);
        largest_k(logits, Self::TOP, best);
        self.tokens.push(token);
        self.hidden.extend(hidden.iter().map(|&v| f16::from_f32(v)));
        self.top.extend(best.iter().map(|&(token, logit)| (token, f16::from_f32((logit - norm).exp()))));
        self.top.resize(self.tokens.len() * Self::TOP, (Token(0), f16::ZERO));
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text.
    EndOfText,
    /// This stop string appeared; the text ends before it.
    StopString(String),
    /// `max_tokens` or the context's end was reached.
    Length,
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
