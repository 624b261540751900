//! The bodies of answers about the server and its models.

use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::models::Phase;
use crate::request::SamplingParams;

/// This server and its version.
pub const BUILD: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));

/// The served models.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: &'static str,
    /// One entry, or those of all models of `--model-dir` and `--model-list`.
    pub data: Vec<ModelEntry>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelEntry {
    /// Its file's name, without the ending.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// 0.
    pub created: u64,
    /// `medusa-llama`.
    pub owned_by: &'static str,
    /// Longest prompt plus answer, in tokens; absent while it is not loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
    /// How far it is, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<ModelStatus>,
}

/// How far one of several models is.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelStatus {
    /// `unloaded`, `loading`, `loaded`, `unloading` or `failed`. A request loads it.
    pub value: &'static str,
    /// How much of it is read, from 0 to 1, while it is loading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<f32>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<&Phase> for ModelStatus {
    fn from(phase: &Phase) -> Self {
        let (value, progress, error) = match phase {
            Phase::Unloaded => ("unloaded", None, None),
            Phase::Loading(progress) => ("loading", Some(*progress), None),
            Phase::Ready(_) => ("loaded", None, None),
            Phase::Leaving(_) => ("unloading", None, None),
            Phase::Failed(why, _) => ("failed", None, Some(why.clone())),
        };
        Self { value, progress, error }
    }
}

/// Which of several models a request without a body is about.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "it documents what `RequestContext::model` reads")]
pub struct ModelQuery {
    /// One of several models.
    pub model: Option<String>,
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
    /// What it computes on: `cpu` or `cuda`, and with workers `rpc+cpu` or `rpc+cuda`.
    pub backend: &'static str,
    /// Instruction sets that the CPU's kernels use, as ggml names them. The same request and seed give the
    /// same text from any server with the same of these, the same version and the same model.
    pub cpu: String,
    /// Methods and paths.
    pub endpoints: Vec<String>,
    /// How much of the model is read, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loading: Option<f32>,
    /// The model.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    pub model: Option<ModelInformation>,
    /// All models, where there are several; then none of the fields that follow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<ModelEntry>>,
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
    /// Name of the model that drafts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft_model: Option<String>,
    /// Whether text drafts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_drafts: Option<bool>,
    /// Where heads and verification are computed: `cpu` or `cuda`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drafting_on: Option<&'static str>,
    /// What of a sequence's candidates one pass can verify: `trees`, `chains`, or nothing (`plain`). It
    /// follows from the architecture and the cache's layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drafts: Option<&'static str>,
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
    /// As its file names it, for example `llama`.
    pub architecture: String,
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
    /// States of sequences, running and kept, of a recurrent or hybrid model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub states: Option<usize>,
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

/// How busy the models are, with SGLang's fields.
#[derive(Debug, Serialize, ToSchema)]
pub struct Loads<'a> {
    /// When, as RFC 3339 has it.
    pub timestamp: String,
    /// Entries of `loads`.
    pub dp_rank_count: usize,
    /// By loaded model.
    pub loads: Vec<ModelLoad<'a>>,
}

/// How busy a model is.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ModelLoad<'a> {
    /// Its place in the list, from 0.
    pub dp_rank: usize,
    /// What clients call it.
    pub model_name: &'a str,
    /// Requests that the engine works on.
    pub num_running_reqs: usize,
    /// Requests that wait for a slot.
    pub num_waiting_reqs: usize,
    /// Both.
    pub num_total_reqs: usize,
    /// Cells of the cache that running requests hold, one for each token.
    pub num_used_tokens: usize,
    /// Cells of the cache.
    pub max_total_num_tokens: usize,
    /// The one as a share of the other, from 0 to 1.
    pub token_usage: f64,
    /// The larger of `token_usage` and all requests for each slot; above 1 while some wait.
    pub utilization: f64,
    /// Share of the tokens of prompts that were found in the cache since the start, from 0 to 1.
    pub cache_hit_rate: f64,
    /// Slots: requests that can run together.
    pub max_running_requests: usize,
}

/// What is served, with llama-server's fields.
#[derive(Debug, Serialize, ToSchema)]
pub struct Props<'a> {
    /// Of requests that say nothing else.
    #[schema(inline)]
    pub default_generation_settings: GenerationSettings,
    /// Sequences decoded together.
    pub total_slots: usize,
    /// As OpenAI's clients name the model.
    pub model_alias: &'a str,
    /// The model's file.
    pub model_path: String,
    /// The source of the chat template; empty if there is none.
    pub chat_template: String,
    /// The token that begins a text; empty if there is none.
    pub bos_token: String,
    /// The token that ends a text; empty if there is none.
    pub eos_token: String,
    /// What else than text the model takes.
    #[schema(inline)]
    pub modalities: Modalities,
    /// This server's name and version.
    pub build_info: &'static str,
}

/// Settings of requests that say nothing else.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerationSettings {
    /// Longest prompt plus answer, in tokens.
    pub n_ctx: usize,
    /// Of `/generate`.
    #[schema(inline)]
    pub params: GenerationParams,
}

/// `/generate`'s defaults under llama-server's names.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs)] // `GenerateRequest` says it
pub struct GenerationParams {
    pub temperature: f32,
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    pub repeat_last_n: usize,
    pub repeat_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
}

impl From<SamplingParams> for GenerationParams {
    fn from(sampling: SamplingParams) -> Self {
        Self {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repeat_last_n: sampling.repeat_last_n,
            repeat_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
        }
    }
}

/// What else than text the model takes: nothing.
#[derive(Debug, Default, Serialize, ToSchema)]
#[allow(missing_docs)]
pub struct Modalities {
    pub vision: bool,
    pub audio: bool,
}
