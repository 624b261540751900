//! The bodies of answers, as documented. They describe only; `tests/openapi.rs` holds them against
//! what the server sends.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

/// Why an answer ended: by itself or at a stop string, or because it was long enough.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum FinishReason {
    Stop,
    Length,
}

/// What drafts did.
#[derive(Debug, ToSchema)]
pub struct SpeculationReport {
    /// Steps that gave tokens.
    pub steps: u64,
    /// Candidates verified in them.
    pub drafted: u64,
    /// Candidates accepted.
    pub accepted: u64,
    /// Tokens of the answer over its steps.
    pub tokens_per_step: f64,
}

/// An answer of `/generate`, or the last event of its stream.
#[derive(Debug, ToSchema)]
pub struct GenerateAnswer {
    /// The text, without the prompt; in a stream's last event what was left of it.
    pub generated_text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop string that ended it, if one did; `deadline` if its time was over.
    #[schema(required = false)]
    pub stop_reason: String,
    /// Counts of tokens.
    pub usage: GenerateUsage,
    /// Where the time went.
    pub timings: Timings,
    /// What drafts did.
    pub speculation: SpeculationReport,
    /// With `details` or `logprobs`.
    #[schema(required = false)]
    pub tokens: Vec<TokenDetails>,
}

/// A token of an answer. One that ends the text is not told of, nor those of a stop string.
#[derive(Debug, ToSchema)]
pub struct TokenDetails {
    /// Its number in the vocabulary.
    pub id: u64,
    /// Its text; parts of a character are U+FFFD.
    pub text: String,
    /// What drafted it: `heads`, `text` or `both`; null: the model alone.
    #[schema(required = true)]
    pub source: Option<String>,
    /// The answer's step that decided it, from 1.
    pub step: u64,
    /// Rows of that step, those of other requests included.
    pub rows: u64,
    /// With `logprobs`: the natural logarithm of its probability, before bias, penalties,
    /// temperature and grammar.
    #[schema(required = false)]
    pub logprob: f64,
    /// With `logprobs`: the likeliest tokens.
    #[schema(required = false)]
    pub top_logprobs: Vec<LikelyToken>,
}

/// One of the likeliest tokens.
#[derive(Debug, ToSchema)]
pub struct LikelyToken {
    /// Its number in the vocabulary.
    pub id: u64,
    /// Its text.
    pub text: String,
    /// The natural logarithm of its probability.
    pub logprob: f64,
}

/// Log probabilities of a text's tokens: lists with an entry for each.
#[derive(Debug, ToSchema)]
pub struct TextLogprobs {
    /// Their texts.
    pub tokens: Vec<String>,
    /// Natural logarithms of their probabilities.
    pub token_logprobs: Vec<f64>,
    /// The same of the likeliest, by their texts.
    pub top_logprobs: Vec<BTreeMap<String, f64>>,
    /// Where they begin in the answer, in characters.
    pub text_offset: Vec<u64>,
}

/// Log probabilities of a message's tokens.
#[derive(Debug, ToSchema)]
pub struct ChatLogprobs {
    /// An entry for each token.
    pub content: Vec<ChatToken>,
    /// Null.
    #[schema(required = true)]
    pub refusal: Option<String>,
}

/// A token of a message.
#[derive(Debug, ToSchema)]
pub struct ChatToken {
    /// Its text; parts of a character are U+FFFD.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f64,
    /// Its bytes.
    pub bytes: Vec<u64>,
    /// The likeliest tokens; of them nothing more is told.
    #[schema(required = false, no_recursion)]
    pub top_logprobs: Vec<ChatToken>,
}

/// Counts of tokens.
#[derive(Debug, ToSchema)]
pub struct GenerateUsage {
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of those, found in the cache.
    pub cached_tokens: u64,
    /// Generated, one that ends the text included.
    pub completion_tokens: u64,
    /// Prompt and completion.
    pub total_tokens: u64,
}

/// Seconds of each stage.
#[derive(Debug, ToSchema)]
pub struct Timings {
    /// From acceptance to the first step.
    pub queue_s: f64,
    /// From there to the first token.
    pub prefill_s: f64,
    /// From there to the last.
    pub decode_s: f64,
}

/// An answer of `/v1/completions`.
#[derive(Debug, ToSchema)]
pub struct Completion {
    /// Of this answer.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// `n` for each prompt, in the prompts' order.
    pub choices: Vec<CompletionChoice>,
    /// Counts of tokens.
    pub usage: Usage,
}

/// One of the texts.
#[derive(Debug, ToSchema)]
pub struct CompletionChoice {
    /// Its place.
    pub index: u64,
    /// The text, without the prompt.
    pub text: String,
    /// Null if they were not asked for.
    #[schema(required = true)]
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop string that ended it, if one did; `deadline` if its time was over.
    #[schema(required = false)]
    pub stop_reason: String,
    /// With `details`.
    #[schema(required = false)]
    pub tokens: Vec<TokenDetails>,
    /// What drafts did.
    pub speculation: SpeculationReport,
}

/// An answer of `/v1/chat/completions`.
#[derive(Debug, ToSchema)]
pub struct ChatCompletion {
    /// Of this answer.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// `n` of them.
    pub choices: Vec<ChatChoice>,
    /// Counts of tokens.
    pub usage: Usage,
}

/// One of the answers.
#[derive(Debug, ToSchema)]
pub struct ChatChoice {
    /// Its place.
    pub index: u64,
    /// The answer.
    pub message: AnswerMessage,
    /// Null if they were not asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop string that ended it, if one did; `deadline` if its time was over.
    #[schema(required = false)]
    pub stop_reason: String,
    /// With `details`.
    #[schema(required = false)]
    pub tokens: Vec<TokenDetails>,
    /// What drafts did.
    pub speculation: SpeculationReport,
}

/// What the model says.
#[derive(Debug, ToSchema)]
pub struct AnswerMessage {
    /// `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
    /// Null.
    #[schema(required = true)]
    pub refusal: Option<String>,
}

/// Counts of tokens.
#[derive(Debug, ToSchema)]
pub struct Usage {
    /// Of the prompts, each once.
    pub prompt_tokens: u64,
    /// Of all choices.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// Of the prompts' tokens.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Of the prompts' tokens.
#[derive(Debug, ToSchema)]
pub struct PromptTokensDetails {
    /// Found in the cache.
    pub cached_tokens: u64,
}

/// The served model, as a list of one.
#[derive(Debug, Serialize, ToSchema)]
pub struct Models {
    /// `list`.
    pub object: String,
    /// One entry.
    pub data: Vec<ModelEntry>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelEntry {
    /// Its file's name, without the ending.
    pub id: String,
    /// `model`.
    pub object: String,
    /// 0.
    pub created: u64,
    /// `medusa-llama`.
    pub owned_by: String,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: u64,
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
#[allow(missing_docs)]
pub enum HealthStatus {
    Ok,
    Loading,
    Draining,
    Stalled,
    Failed,
}

/// What is served. Behind `endpoints` either `loading`, while the model is read, or the rest.
#[derive(Debug, ToSchema)]
pub struct Information {
    /// `medusa-llama`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// llama.cpp's.
    pub llama_cpp: String,
    /// What this build can compute on: `cpu` or `cuda`.
    pub backend: String,
    /// Methods and paths.
    pub endpoints: Vec<String>,
    /// How much of the model is read, from 0 to 1.
    #[schema(required = false)]
    pub loading: f64,
    /// The model.
    #[schema(required = false, inline)]
    pub model: ModelInformation,
    /// Longest prompt plus answer, in tokens.
    #[schema(required = false)]
    pub context_size: u64,
    /// Sequences decoded together.
    #[schema(required = false)]
    pub slots: u64,
    /// The cache.
    #[schema(required = false, inline)]
    pub kv: KvInformation,
    /// Heads that draft.
    #[schema(required = false)]
    pub heads: u64,
    /// Whether text drafts.
    #[schema(required = false)]
    pub text_drafts: bool,
    /// Where heads and verification are computed: `cpu` or `cuda`.
    #[schema(required = false)]
    pub drafting_on: String,
    /// What goes on.
    #[schema(required = false, inline)]
    pub load: Load,
}

/// The model.
#[derive(Debug, ToSchema)]
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
    pub n_ctx_train: u64,
    /// Tokens it knows.
    pub n_vocab: u64,
}

/// The cache.
#[derive(Debug, ToSchema)]
pub struct KvInformation {
    /// `unified` or `streams`.
    pub layout: String,
    /// Tokens it holds.
    pub cells: u64,
}

/// What goes on.
#[derive(Debug, ToSchema)]
pub struct Load {
    /// Requests accepted and not yet ended.
    pub in_flight: u64,
    /// Requests the engine works on.
    pub running: u64,
    /// Requests that wait for a place.
    pub waiting: u64,
    /// Cells that running requests hold.
    pub kv_cells_running: u64,
    /// Cells that finished prompts hold.
    pub kv_cells_kept: u64,
    /// Of the engine since the start.
    pub steps: u64,
    /// Since the start.
    pub tokens_generated: u64,
}

/// An event of a stream.
#[derive(Debug, ToSchema)]
pub struct StreamEvent {
    /// `error` if the engine failed behind the first piece.
    #[schema(required = false)]
    pub event: String,
    /// JSON, or `[DONE]`.
    pub data: String,
}

/// What went wrong.
#[derive(Debug, ToSchema)]
pub struct Problem {
    /// What went wrong.
    #[schema(inline)]
    pub error: ProblemDetails,
}

/// What went wrong.
#[derive(Debug, ToSchema)]
pub struct ProblemDetails {
    /// For programs: `invalid_request`, `queue_full`, ...
    pub r#type: String,
    /// For people.
    pub message: String,
    /// The field to blame, if one is.
    #[schema(required = false)]
    pub param: String,
}

/// What went wrong, as OpenAI's clients expect it.
#[derive(Debug, ToSchema)]
pub struct OpenAiProblem {
    /// What went wrong.
    #[schema(inline)]
    pub error: OpenAiProblemDetails,
}

/// What went wrong.
#[derive(Debug, ToSchema)]
pub struct OpenAiProblemDetails {
    /// For people.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    pub r#type: String,
    /// The field to blame, if one is.
    #[schema(required = true)]
    pub param: Option<String>,
    /// For programs: `invalid_request`, `queue_full`, ...
    pub code: String,
}
