//! What HTTP (or the command line) and the engine share: a [`Request`] in, [`Event`]s out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use half::f16;
use serde::{Serialize, Serializer};
use serde_json::Value;
use utoipa::ToSchema;

mod speculation;

pub use speculation::Speculation;

use crate::llama::{Pooling, Token};

/// How to choose each token. [`Default`] is `/generate`'s.
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
    /// Keep the tokens whose surprise is closest to the entropy, up to this probability together; 1
    /// keeps all.
    pub typical_p: f32,
    /// Keep tokens at most this many standard deviations below the largest logit; 0 keeps all.
    pub top_n_sigma: f32,
    /// How often the tokens above `xtc_threshold` are dropped but for the least likely of them.
    pub xtc_probability: f32,
    /// Above 0.5 no two tokens are.
    pub xtc_threshold: f32,
    /// Makes repetitions less likely.
    pub dry: Option<DryParams>,
    /// Divides the logits of tokens in the window; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for each time it occurs in the window; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a token that occurs in the window; 0 is off.
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
            typical_p: 1.0,
            top_n_sigma: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            dry: None,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// The penalty DRY: `multiplier * base^(n - allowed_length)` is subtracted from the logit of a token
/// that would continue a repetition of `n` tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct DryParams {
    /// Above 0.
    pub multiplier: f32,
    /// At least 1.
    pub base: f32,
    /// Shorter repetitions cost nothing.
    pub allowed_length: usize,
    /// Repetitions of this many last tokens, the prompt's included.
    pub last_n: usize,
    /// No repetition goes across these strings.
    pub breakers: Vec<String>,
}

/// A request whose every field is in range. Only the prompt's length in tokens is not checked yet:
/// [`Handle::submit`](crate::engine::Handle::submit) does.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate; with 0 the answer is empty, or the prompt if it is echoed. The
    /// context's end may come first.
    pub max_tokens: usize,
    /// The answer begins with the prompt: its text, and if there is a report, with its tokens'.
    pub echo: bool,
    /// The answer comes with the prompt's embedding; `None`: without.
    pub embed: Option<Pooling>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// The text ends before the first of these to be complete. None is empty.
    pub stop: Vec<String>,
    /// Tokens before the answer may end by the model's choice or at a stop string.
    pub min_tokens: usize,
    /// The text also ends before any of these tokens.
    pub stop_token_ids: Vec<Token>,
    /// Never choose the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// Start from what is cached of the prompt's beginning.
    pub cache_prompt: bool,
    /// Whether to draft.
    pub speculation: Speculation,
    /// Whether its tenant's other answers may be drafted from this one, and this one from them.
    pub share_text: bool,
    /// What the text must be; `None`: any text.
    pub grammar: Option<GrammarSource>,
    /// Where the grammar begins.
    pub begin: GrammarBegin,
    /// How the answer thinks, where that matters to a grammar or is limited.
    pub thinking: Option<Thinking>,
    /// Names of control tokens that the text shows.
    pub shown: Vec<String>,
    /// Tell how far the prompt is while it is read.
    pub progress: bool,
    /// What to report of each token beside its text; `None`: nothing.
    pub report: Option<Report>,
    /// The answer ends where it is when this much time has passed since the request was accepted.
    pub timeout: Option<Duration>,
}

impl Request {
    /// With nothing asked for but an answer of at most `max_tokens` tokens.
    pub fn new(prompt: impl Into<Prompt>, max_tokens: usize) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens,
            echo: false,
            embed: None,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            cache_prompt: true,
            speculation: Speculation::AUTO,
            share_text: true,
            grammar: None,
            begin: GrammarBegin::Answer,
            thinking: None,
            shown: Vec::new(),
            progress: false,
            report: None,
            timeout: None,
        }
    }
}

impl Request {
    /// The embedding of a prompt, and no answer.
    pub fn embedding(prompt: Prompt, pooling: Pooling) -> Self {
        Self {
            embed: Some(pooling),
            speculation: Speculation::OFF,
            share_text: false,
            ..Self::new(prompt, 0)
        }
    }

    /// `true` if it may start from cached cells.
    pub fn reuses_cells(&self) -> bool {
        self.cache_prompt && !self.reads_prompt()
    }

    /// `true` if rows of the prompt before its last one have results, so that they must be computed.
    pub fn reads_prompt(&self) -> bool {
        self.scores_prompt() || matches!(self.embed, Some(Pooling::Mean | Pooling::Cls))
    }

    /// `true` if the log probabilities of the prompt's tokens are asked for.
    pub fn scores_prompt(&self) -> bool {
        self.echo && self.report.is_some_and(|report| report.n_top.is_some())
    }
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A text. Parts meet at control tokens, so that each can be tokenised alone.
    Text(Vec<Part>),
    /// Tokens, taken as they are.
    Tokens(Vec<Token>),
}

impl Prompt {
    /// The same where names of control tokens are text.
    #[must_use]
    pub fn without_controls(mut self) -> Self {
        if let Self::Text(parts) = &mut self {
            parts.iter_mut().for_each(|part| part.special = false);
        }
        self
    }

    /// Its text, unless it is tokens.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Text(parts) => Some(parts.iter().map(|part| part.text.as_str()).collect()),
            Self::Tokens(_) => None,
        }
    }
}

/// A part of a prompt's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its text.
    pub text: String,
    /// Names of control tokens in it become those tokens; otherwise they are text.
    pub special: bool,
}

/// A text whose names of control tokens become those tokens.
impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(vec![Part { text, special: true }])
    }
}

/// An empty text.
impl Default for Prompt {
    fn default() -> Self {
        Self::Text(Vec::new())
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// Who sends a request, and what the server adds to it.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Names the request in the log; may be empty.
    pub id: Arc<str>,
    /// A number, the same for all that one client sends; 0 where clients have no keys.
    pub tenant: u32,
    /// Limits the time of a request, whatever its own limit.
    pub timeout: Option<Duration>,
}

/// A grammar as it was sent.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSource {
    /// JSON that a schema describes.
    JsonSchema(Value),
    /// In llguidance's dialect of Lark.
    Lark(String),
    /// In llama.cpp's GBNF.
    Gbnf(String),
    /// Calls of tools.
    Calls(CallGrammar),
}

/// What calls of tools are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CallGrammar {
    /// In llama.cpp's GBNF.
    pub gbnf: String,
    /// Schemas of objects, by the names of rules that these are in place of.
    pub schemas: BTreeMap<String, Value>,
    /// Names of rules of which an answer has one at most; without any it has what the grammar says.
    pub once: Vec<String>,
}

impl GrammarSource {
    /// A grammar as a text, which is GBNF if a line of it begins a rule with `::=`, or else Lark.
    #[must_use]
    pub fn of_text(text: String) -> Self {
        let name = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let is_rule = |line: &str| {
            let line = line.trim_start();
            let rest = line.trim_start_matches(name);
            rest.len() < line.len() && rest.trim_start().starts_with("::=")
        };
        if text.lines().any(is_rule) { Self::Gbnf(text) } else { Self::Lark(text) }
    }
}

/// Where in an answer its grammar begins. Thoughts, if there are any, come before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GrammarBegin {
    /// With the answer.
    #[default]
    Answer,
    /// With this end of the prompt, which the grammar's texts begin with.
    Prompt(String),
    /// With this text, which the answer begins with, too.
    Text(String),
    /// At the first place where one of these matches, if there is one; until then any text will do.
    Triggers(Vec<Trigger>),
}

/// What a grammar begins at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A text.
    Word(String),
    /// A regular expression: the grammar begins with its first group that is not empty, or else with
    /// the whole match. `^` and `$` are the ends of the text so far.
    Pattern(String),
}

/// Thoughts at the beginning of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thinking {
    /// The text that begins them, if the prompt does not end within them.
    pub begin: Option<String>,
    /// The texts that end them, the one to write first; at least one.
    pub ends: Vec<String>,
    /// Most tokens of thoughts, after which the answer goes on with the first of `ends`.
    pub budget: Option<usize>,
}

/// What to report of each token of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Where it came from, and which step decided it.
    pub details: bool,
    /// Its log probability, and those of this many most likely tokens; `None`: neither.
    pub n_top: Option<usize>,
}

/// What is reported of a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenReport {
    /// Which.
    pub token: Token,
    /// Where it was drafted; `None` if it was not, and a step went by for it.
    pub source: Option<Source>,
    /// The request's step that decided it; 1 is the first, and 0 stands for the prompt's tokens.
    pub step: usize,
    /// Rows of that step, those of other requests included.
    pub n_rows: usize,
    /// What the model thought of it, where that was asked for. Of a prompt's first token it thinks
    /// nothing.
    pub logprobs: Option<Logprobs>,
}

impl TokenReport {
    /// `true` for a token of the prompt.
    pub fn is_prompt(&self) -> bool {
        self.step == 0
    }
}

/// Where a drafted token came from.
#[derive(Clone, Copy, Debug, PartialEq, Hash, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A head.
    Heads,
    /// The text before.
    Text,
    /// Both.
    Both,
    /// The grammar, which leaves nothing else.
    Grammar,
    /// The draft model.
    Model,
    /// The draft model, and heads or text or both.
    Several,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Heads, Self::Text, Self::Both, Self::Grammar, Self::Model, Self::Several];

    /// As JSON and metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Heads => "heads",
            Self::Text => "text",
            Self::Both => "both",
            Self::Grammar => "grammar",
            Self::Model => "model",
            Self::Several => "several",
        }
    }
}

/// Natural logarithms of probabilities as the model gives them: before bias, penalties,
/// temperature, filters and grammar.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(Token, f32)>,
}

/// The span of every log line about a request. Its level is the highest, so that no filter drops it.
#[must_use]
pub fn span(id: &str) -> tracing::Span {
    tracing::error_span!("request", request_id = id)
}

/// What a request gets back: any number of pieces, then one end.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// How far the prompt is, if that was asked for; before all pieces.
    Progress(Progress),
    /// More text; never empty, never half a character.
    Piece(Piece),
    /// The answer is complete. The last event.
    Done(Completion),
    /// The engine failed and the answer stays incomplete. The last event.
    Failed {
        /// Names the failure in the log.
        id: String,
    },
}

/// How far a prompt is read: tokens, and the time since that began.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
pub struct Progress {
    /// All of the prompt's tokens.
    pub total: usize,
    /// Those that were in the cache.
    pub cache: usize,
    /// Those read so far, the cached ones included.
    pub processed: usize,
    /// Milliseconds.
    pub time_ms: u64,
}

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// The tokens whose text begins in it, if a [`Report`] was asked for. One that ends the text is
    /// not among them, unless the prompt's were scored.
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
    /// Of the prompt, if it was asked for and computed: `n_embd` values, not normalized.
    pub embedding: Option<Vec<f32>>,
    /// What the model thought at each token; only from an engine that traces.
    pub trace: Option<Box<Trace>>,
}

/// What the model thought at each token of an answer: what heads learn from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The tokens chosen, an end-of-text token included.
    pub tokens: Vec<Token>,
    /// For each the post-norm hidden state that it was chosen from: `n_embd` values.
    pub hidden: Vec<f16>,
    /// For each the [`TOP`](Self::TOP) most likely tokens, before temperature and filters, and their
    /// probabilities.
    pub top: Vec<(Token, f16)>,
}

impl Trace {
    /// Most likely tokens that are kept; of a smaller vocabulary, tokens of no probability fill the
    /// rest.
    pub const TOP: usize = 16;
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text, or its grammar allows no more.
    EndOfText,
    /// This stop string appeared; the text ends before it.
    StopString(String),
    /// This token of `stop_token_ids` was chosen; the text ends before it.
    StopToken(Token),
    /// `max_tokens` or the context's end was reached.
    Length,
    /// The request's time was over; perhaps before its first token.
    Deadline,
    /// Its grammar could not be followed any further; why.
    Grammar(String),
}

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were in the cache already, or came back into it.
    pub cached_tokens: usize,
    /// Those of them that came back.
    pub restored: Restored,
    /// Tokens generated, an end-of-text token included.
    pub completion_tokens: usize,
}

/// Tokens of a prompt whose cells had left the cache, or were computed by another process, and came
/// back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Restored {
    /// From the host's memory.
    pub memory: usize,
    /// From the prefix store.
    pub store: usize,
}

impl Restored {
    /// From anywhere.
    #[must_use]
    pub fn total(self) -> usize {
        self.memory + self.store
    }

    /// As answers tell it: nothing if there were none.
    #[must_use]
    pub fn any(self) -> Option<Self> {
        (self.total() > 0).then_some(self)
    }
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

/// Seconds that a request spent in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Timings {
    /// From acceptance to the first step with a row of its own.
    #[serde(serialize_with = "micros")]
    pub queue_s: f64,
    /// From there to the first token.
    #[serde(serialize_with = "micros")]
    pub prefill_s: f64,
    /// From the first token to the last.
    #[serde(serialize_with = "micros")]
    pub decode_s: f64,
}

/// Seconds to the microsecond: the rest is noise on the wire.
fn micros<S: Serializer>(seconds: &f64, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_f64((seconds * 1e6).round() / 1e6)
}
