//! The bodies of answers and of a stream's events. A chunk of OpenAI's is an answer with a part of
//! each text.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use utoipa::ToSchema;

use crate::llama::Token;
use crate::request::{
    Completion, FinishReason, Logprobs, Piece, Source, SpeculationUsage, Timings, TokenReport,
    Usage,
};

/// A token's bytes; of a control token its name's.
pub type Detokenize = Arc<dyn Fn(Token) -> Vec<u8> + Send + Sync>;

/// Why an answer ended: by itself or at a stop string, or because it was long enough.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FinishKind {
    Stop,
    Length,
}

/// What ended an answer before the model did: a stop string, a token of `stop_token_ids`,
/// `deadline` if its time was over, or `grammar` if its grammar could not be followed any further.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason<'a> {
    Text(&'a str),
    Token(i32),
}

/// Why an answer ended, and what ended it.
pub fn finish(done: &Completion) -> (FinishKind, Option<StopReason<'_>>) {
    match &done.finish_reason {
        FinishReason::EndOfText => (FinishKind::Stop, None),
        FinishReason::StopString(stop) => (FinishKind::Stop, Some(StopReason::Text(stop))),
        FinishReason::StopToken(Token(id)) => (FinishKind::Stop, Some(StopReason::Token(*id))),
        FinishReason::Length => (FinishKind::Length, None),
        FinishReason::Deadline => (FinishKind::Length, Some(StopReason::Text("deadline"))),
        FinishReason::Grammar(_) => (FinishKind::Length, Some(StopReason::Text("grammar"))),
    }
}

/// What drafts did.
#[derive(Debug, Serialize, ToSchema)]
pub struct SpeculationReport {
    /// Steps that gave tokens.
    pub steps: usize,
    /// Candidates verified in them.
    pub drafted: usize,
    /// Candidates accepted.
    pub accepted: usize,
    /// Tokens of the answer over its steps.
    pub tokens_per_step: f64,
}

impl From<&Completion> for SpeculationReport {
    fn from(done: &Completion) -> Self {
        let SpeculationUsage { steps, drafted, accepted } = done.speculation;
        let per_step = done.usage.completion_tokens as f64 / steps.max(1) as f64;
        Self { steps, drafted, accepted, tokens_per_step: (per_step * 1e3).round() / 1e3 }
    }
}

/// An event of `/generate`'s stream before the last one, a [`GenerateAnswer`].
#[derive(Debug, Serialize)]
pub struct GeneratePiece<'a> {
    pub generated_text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenDetails>>,
}

/// An answer of `/generate`, or the last event of its stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerateAnswer<'a> {
    /// The text, without the prompt; in a stream's last event what was left of it.
    pub generated_text: &'a str,
    /// Why it ended.
    pub finish_reason: FinishKind,
    /// The stop string or token that ended it, if one did; `deadline` if its time was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason<'a>>,
    /// Counts of tokens.
    pub usage: GenerateUsage,
    /// Where the time went.
    pub timings: Timings,
    /// What drafts did.
    pub speculation: SpeculationReport,
    /// With `details` or `logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenDetails>>,
}

impl<'a> GenerateAnswer<'a> {
    pub fn new(done: &'a Completion, piece: &'a Piece, detokenize: Option<&Detokenize>) -> Self {
        let Usage { prompt_tokens, cached_tokens, completion_tokens } = done.usage;
        let total_tokens = prompt_tokens + completion_tokens;
        let (finish_reason, stop_reason) = finish(done);
        Self {
            generated_text: &piece.text,
            finish_reason,
            stop_reason,
            usage: GenerateUsage { prompt_tokens, cached_tokens, completion_tokens, total_tokens },
            timings: done.timings,
            speculation: done.into(),
            tokens: detokenize.map(|text| details(&piece.tokens, text)),
        }
    }
}

/// Counts of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerateUsage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of those, found in the cache.
    pub cached_tokens: usize,
    /// Generated, one that ends the text included.
    pub completion_tokens: usize,
    /// Prompt and completion.
    pub total_tokens: usize,
}

/// A token of an answer. One that ends the text is not reported, nor those of a stop string.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenDetails {
    /// Its number in the vocabulary.
    pub id: i32,
    /// Its text; parts of a character are U+FFFD.
    pub text: String,
    /// What drafted it: `heads`, `text` or `both`; null: the model alone.
    #[schema(required = true)]
    pub source: Option<Source>,
    /// The answer's step that decided it, from 1.
    pub step: usize,
    /// Rows of that step, those of other requests included.
    pub rows: usize,
    /// With `logprobs`: the natural logarithm of its probability, before bias, penalties,
    /// temperature and grammar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    /// With `logprobs`: the most likely tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<TopToken>>,
}

/// One of the most likely tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopToken {
    /// Its number in the vocabulary.
    pub id: i32,
    /// Its text.
    pub text: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

pub fn details(tokens: &[TokenReport], detokenize: &Detokenize) -> Vec<TokenDetails> {
    let top = |&(token, p): &(Token, f32)| TopToken {
        id: token.0,
        text: text(&detokenize(token)),
        logprob: finite(p),
    };
    let one = |t: &TokenReport| TokenDetails {
        id: t.token.0,
        text: text(&detokenize(t.token)),
        source: t.source,
        step: t.step,
        rows: t.n_rows,
        logprob: t.logprobs.as_ref().map(|l| finite(l.logprob)),
        top_logprobs: t.logprobs.as_ref().map(|l| l.top.iter().map(top).collect()),
    };
    tokens.iter().map(one).collect()
}

/// Log probabilities of a text's tokens: lists with an entry for each.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct TextLogprobs {
    /// Their texts.
    pub tokens: Vec<String>,
    /// Natural logarithms of their probabilities.
    pub token_logprobs: Vec<f32>,
    /// The same of the most likely ones, by their texts.
    pub top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Where they begin in the answer, in characters.
    pub text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// `None` if they were not asked for. Moves `offset`, in characters, from the tokens' begin to
    /// their end.
    pub fn new(
        tokens: &[TokenReport],
        detokenize: &Detokenize,
        offset: &mut usize,
    ) -> Option<Self> {
        let mut lists = Self::default();
        for (token, logprobs) in with_logprobs(tokens) {
            let (own, logprob) = (text(&detokenize(token)), finite(logprobs.logprob));
            lists.text_offset.push(*offset);
            *offset += own.chars().count();
            let top = logprobs.top.iter().map(|&(token, p)| (text(&detokenize(token)), finite(p)));
            lists.top_logprobs.push(top.chain([(own.clone(), logprob)]).collect());
            lists.token_logprobs.push(logprob);
            lists.tokens.push(own);
        }
        Some(lists).filter(|lists| !lists.tokens.is_empty())
    }
}

/// Log probabilities of a message's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// An entry for each token.
    pub content: Vec<ChatToken>,
    /// Null.
    #[schema(required = true)]
    pub refusal: Option<String>,
}

impl ChatLogprobs {
    /// `None` if they were not asked for.
    pub fn new(tokens: &[TokenReport], detokenize: &Detokenize) -> Option<Self> {
        let entry = |token: Token, logprob: f32, top_logprobs| {
            let bytes = detokenize(token);
            ChatToken { token: text(&bytes), logprob: finite(logprob), bytes, top_logprobs }
        };
        let one = |(token, logprobs): (Token, &Logprobs)| {
            let top = logprobs.top.iter().map(|&(token, p)| entry(token, p, None));
            entry(token, logprobs.logprob, Some(top.collect()))
        };
        let content: Vec<ChatToken> = with_logprobs(tokens).map(one).collect();
        Some(Self { content, refusal: None }).filter(|logprobs| !logprobs.content.is_empty())
    }
}

/// A token of a message.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatToken {
    /// Its text; parts of a character are U+FFFD.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    #[schema(value_type = Vec<u64>)]
    pub bytes: Vec<u8>,
    /// The most likely tokens, which have no such list of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    pub top_logprobs: Option<Vec<ChatToken>>,
}

fn with_logprobs(tokens: &[TokenReport]) -> impl Iterator<Item = (Token, &Logprobs)> {
    tokens.iter().filter_map(|t| t.logprobs.as_ref().map(|logprobs| (t.token, logprobs)))
}

/// A token may be a part of a character, which no string holds; [`ChatToken::bytes`] is exact.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// JSON has no minus infinity; vLLM writes this number.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// An answer of OpenAI's dialect, or a chunk of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiAnswer<'a> {
    /// Of this answer.
    pub id: &'a str,
    /// `text_completion`, `chat.completion` or `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: &'a str,
    /// `n` for each prompt, in the prompts' order.
    pub choices: Vec<OpenAiChoice<'a>>,
    /// Counts of tokens. In a stream with `include_usage`: of the last chunk, else null.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<OpenAiUsage>)]
    pub usage: Option<Option<OpenAiUsage>>,
}

/// One of the texts or messages.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct OpenAiChoice<'a> {
    /// Its place.
    pub index: usize,
    /// Of `/v1/completions`: the text, without the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<&'a str>,
    /// Of a chat: the whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<AnswerMessage<'a>>,
    /// Of a chat's stream: a part of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta<'a>>,
    /// Null if they were not asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChoiceLogprobs>,
    /// Why it ended; null in a stream until it does.
    #[schema(required = true)]
    pub finish_reason: Option<FinishKind>,
    /// The stop string or token that ended it, if one did; `deadline` if its time was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason<'a>>,
    /// With `details`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenDetails>>,
    /// What drafts did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculation: Option<SpeculationReport>,
}

/// Log probabilities of a text's or a message's tokens.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ChoiceLogprobs {
    Text(TextLogprobs),
    Chat(ChatLogprobs),
}

/// What the model says.
#[derive(Debug, Serialize, ToSchema)]
pub struct AnswerMessage<'a> {
    /// `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: &'a str,
    /// Null.
    #[schema(required = true)]
    pub refusal: Option<&'a str>,
}

/// A part of an answer: first its role, then more text, nothing at its end.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta<'a> {
    /// `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    /// Null, with the role.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub refusal: Option<Option<&'a str>>,
}

/// Counts of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiUsage {
    /// Of the prompts, each once.
    pub prompt_tokens: usize,
    /// Of all choices.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Of the prompts' tokens.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Of the prompts' tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Found in the cache.
    pub cached_tokens: usize,
}

/// The served model, as a list of one.
#[derive(Debug, Serialize, ToSchema)]
pub struct Models<'a> {
    /// `list`.
    pub object: &'static str,
    /// One entry.
    pub data: Vec<ModelEntry<'a>>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelEntry<'a> {
    /// Its file's name, without the ending.
    pub id: &'a str,
    /// `model`.
    pub object: &'static str,
    /// 0.
    pub created: u64,
    /// `medusa-llama`.
    pub owned_by: &'static str,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: usize,
}

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// How.
    pub status: HealthStatus,
}

/// `ok` alone means that requests are taken; only `failed` is worth a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    Ok,
    Loading,
    Draining,
    Stalled,
    Failed,
}

/// What is served. After `endpoints` either `loading`, while the model is read, or the rest.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Information {
    /// `medusa-llama`.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// llama.cpp's.
    pub llama_cpp: String,
    /// What this build can compute on: `cpu` or `cuda`.
    pub backend: &'static str,
    /// Methods and paths.
    pub endpoints: Vec<String>,
    /// How much of the model is read, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loading: Option<f32>,
    /// The model.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    pub model: Option<ModelInformation>,
    /// Longest prompt plus answer, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_size: Option<usize>,
    /// Sequences decoded together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots: Option<usize>,
    /// The cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    pub kv: Option<KvInformation>,
    /// Heads that draft.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Whether text drafts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_drafts: Option<bool>,
    /// Where heads and verification are computed: `cpu` or `cuda`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drafting_on: Option<&'static str>,
    /// What goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    pub load: Option<EngineLoad>,
}

/// The model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelInformation {
    /// As its file names it.
    #[schema(required = true)]
    pub name: Option<String>,
    /// Of its tensors.
    pub quantization: String,
    /// How many.
    pub parameters: u64,
    /// Of its tensors.
    pub size_bytes: u64,
    /// Longest text it was trained on, in tokens.
    pub n_ctx_train: usize,
    /// Tokens it knows.
    pub n_vocab: usize,
}

/// The cache.
#[derive(Debug, Serialize, ToSchema)]
pub struct KvInformation {
    /// `unified` or `streams`.
    pub layout: &'static str,
    /// Tokens it holds.
    pub cells: usize,
}

/// What goes on.
#[derive(Debug, Serialize, ToSchema)]
pub struct EngineLoad {
    /// Requests accepted and not yet ended.
    pub in_flight: usize,
    /// Requests the engine works on.
    pub running: i64,
    /// Requests that wait for a place.
    pub waiting: i64,
    /// Cells that running requests hold.
    pub kv_cells_running: i64,
    /// Cells that finished prompts hold.
    pub kv_cells_kept: i64,
    /// Of the engine since the start.
    pub steps: u64,
    /// Since the start.
    pub tokens_generated: u64,
}

/// An event of a stream.
#[derive(ToSchema)]
#[allow(dead_code)] // it is documented only: `reply` writes events
pub struct StreamEvent {
    /// `error` if the engine failed after the first piece.
    #[schema(required = false)]
    pub event: String,
    /// JSON, or `[DONE]`.
    pub data: String,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody<'a> {
    /// What went wrong.
    #[schema(inline)]
    pub error: ErrorDetails<'a>,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetails<'a> {
    /// For programs: `invalid_request`, `queue_full`, ... In OpenAI's dialect:
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    pub r#type: &'static str,
    /// For people.
    pub message: String,
    /// The field to blame, if one is; in OpenAI's dialect null if none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub param: Option<Option<&'a str>>,
    /// In OpenAI's dialect, for programs: `invalid_request`, `queue_full`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
}
