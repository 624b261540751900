//! Command-line arguments ([`Args`]) and the checked configuration made from them (`Config`).
//! [`ServeArgs`] declares every limit of the server with its default.

mod commands;
pub mod network;
mod placement;
mod sources;

use std::ffi::OsString;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::Duration;

use anyhow::{anyhow, ensure};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use hyper::Uri;
use tracing::Level;

pub use commands::{
    BenchArgs, GenerateArgs, PerplexityArgs, PromptArgs, QuantizeArgs, ReportArgs, RowsArgs,
    SynthArgs, TrainArgs, TuneArgs,
};
use network::NetworkArgs;
pub use placement::{PlacementArgs, RopeArgs};
pub(crate) use sources::{HeadsSource, ModelSource};

use crate::engine::plan::{LONGEST_CONTEXT, Sizes};
use crate::engine::thread::{DraftParams, EngineParams, HeadsParams};
use crate::http::api::Unknown;
use crate::http::app::HttpLimits;
use crate::http::auth::Auth;
use crate::http::cors::Cors;
use crate::http::host::Hosts;
use crate::http::tls::Tls;
use crate::hub::name::ModelName;
use crate::jinja;
use crate::llama::{AdapterFile, CacheTypes, ContextParams, Numa, Placement, Pooling, TensorType};
use crate::machine::cores;

/// Where `make model` puts the default model.
pub const DEFAULT_MODEL: &str = "models/smollm2-135m-instruct-q4_1.gguf";

/// Tokens of a context of the commands that do not follow the model's.
const COMMAND_CONTEXT: usize = 2048;

/// Heads that ship for the default model.
pub const DEFAULT_HEADS: &str = "heads/smollm2-135m-instruct";

/// llama.cpp's options of one dash and several letters, which clap does not have, and ours.
const SHORT_NAMES: [(&str, &str); 12] = [
    ("-hf", "--hf-repo"),
    ("-hfr", "--hf-repo"),
    ("-hff", "--hf-file"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-ngl", "--n-gpu-layers"),
    ("-sm", "--split-mode"),
    ("-ts", "--tensor-split"),
    ("-mg", "--main-gpu"),
    ("-cmoe", "--cpu-moe"),
    ("-ncmoe", "--n-cpu-moe"),
    ("-ot", "--override-tensor"),
];

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "medusa-llama",
    version,
    about = "A server that makes GGUF models answer faster",
    max_term_width = 110
)]
pub struct Args {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// Reads a command line, its first word the program, with llama.cpp's `-hf`, `-ctk` and others.
    ///
    /// # Errors
    /// clap's, for words it does not know; also the texts of `--help` and `--version`.
    pub fn read(words: impl Iterator<Item = OsString>) -> Result<Self, clap::Error> {
        let long = |word: OsString| {
            let found = SHORT_NAMES.iter().find(|(short, _)| word == *short);
            found.map_or(word, |(_, long)| long.into())
        };
        Self::try_parse_from(words.map(long))
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a GGUF model over HTTP
    Serve(Box<ServeArgs>),
    /// Generate text from one prompt, streamed to the terminal
    Generate(GenerateArgs),
    /// Train heads for a model from its own answers to a file of prompts
    Train(TrainArgs),
    /// Measure the speed with and without drafts on a file of prompts
    Bench(BenchArgs),
    /// Measure what a step takes by its number of rows (tokens)
    Rows(RowsArgs),
    /// Write a GGUF file in another quantization
    Quantize(QuantizeArgs),
    /// Measure the perplexity of a model on a text
    Perplexity(PerplexityArgs),
    /// Compare quantizations and thread counts of a model and recommend one
    Tune(TuneArgs),
    /// Write a model with random weights in the shape of a known one, for speed measurements and tests
    Synth(SynthArgs),
}

impl Command {
    /// The chosen log level. By default, commands that print their own output log only problems.
    pub fn log_level(&self) -> Level {
        let level = match (self, self.model()) {
            (Self::Serve(args), _) => return args.model.log_level,
            (Self::Synth(_), _) => Level::ERROR,
            (_, Some(model)) => model.log_level,
            (_, None) => Level::WARN,
        };
        if level == Level::INFO { Level::WARN } else { level }
    }

    /// The machine's nodes, if they are to be used.
    pub(crate) fn numa(&self) -> Option<Numa> {
        self.model()?.placement.numa
    }

    /// The model that it loads, if it does.
    fn model(&self) -> Option<&ModelArgs> {
        match self {
            Self::Serve(args) => Some(&args.model),
            Self::Generate(args) => Some(&args.model),
            Self::Train(args) => Some(&args.model),
            Self::Bench(args) => Some(&args.model),
            Self::Rows(args) => Some(&args.model),
            Self::Perplexity(args) => Some(&args.model),
            Self::Tune(args) => Some(&args.model),
            Self::Quantize(_) | Self::Synth(_) => None,
        }
    }
}

/// Model and machine; shared by all commands that load a model.
#[derive(Clone, Debug, ClapArgs)]
pub struct ModelArgs {
    /// GGUF file to load [default: models/smollm2-135m-instruct-q4_1.gguf]
    #[arg(short = 'm', long = "model", env = "MODEL_PATH", hide_env_values = true)]
    pub model_path: Option<PathBuf>,
    /// Model on the Hugging Face Hub to load, user/repo or user/repo:QUANT, downloaded unless the
    /// cache has it; also -hf. Without QUANT it is Q4_K_M, else Q8_0, else the first GGUF file
    /// [default: none]
    #[arg(long, env = "HF_REPO", value_name = "HF_REPO", value_parser = ModelName::from_str)]
    pub hf_repo: Option<ModelName>,
    /// Path of the model's file in HF_REPO, instead of a quantization; also -hff [default: none]
    #[arg(long, env = "HF_FILE", value_name = "HF_FILE", value_parser = NonEmptyStringValueParser::new())]
    pub hf_file: Option<String>,
    /// Maximum length of prompt plus answer of one request, in tokens [default: of serve, what the
    /// model was trained for, as far as memory allows; of other commands, 2048]
    #[arg(short = 'c', long = "ctx", env = "MODEL_CONTEXT_SIZE", value_name = "MODEL_CONTEXT_SIZE", value_parser = between(16, LONGEST_CONTEXT))]
    pub context_size: Option<usize>,
    #[command(flatten)]
    pub(crate) placement: PlacementArgs,
    #[command(flatten)]
    pub(crate) rope: RopeArgs,
    /// Most threads of a forward pass; capped at the number of cores. Fewer compute while other
    /// processes keep cores busy
    #[arg(short = 't', long, env = "N_THREADS", default_value_t = 4, value_parser = between(1, 512))]
    pub n_threads: usize,
    /// Most threads of a forward pass that reads prompts [default: as N_THREADS]
    #[arg(long = "threads-batch", env = "N_THREADS_BATCH", value_name = "N_THREADS_BATCH", value_parser = between(1, 512))]
    pub n_threads_batch: Option<usize>,
    /// Type of the cached keys: f16, q8_0 (half the memory), bf16, f32, q5_1, q5_0, q4_1, q4_0 or
    /// iq4_nl; also -ctk
    #[arg(long = "cache-type-k", env = "CACHE_TYPE_K", value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_k: TensorType,
    /// Type of the cached values, as for keys; also -ctv
    #[arg(long = "cache-type-v", env = "CACHE_TYPE_V", value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: TensorType,
    /// Log level: ERROR, WARN, INFO, DEBUG or TRACE
    #[arg(long, env = "LOG_LEVEL", default_value = "INFO", value_parser = level)]
    pub log_level: Level,
}

/// Draft sources; shared by all commands that draft.
#[derive(Clone, Debug, ClapArgs)]
pub struct DraftArgs {
    /// Folder with heads trained for the model, `hf:user/repo` for a repository on the Hugging Face
    /// Hub, or `none` [default: heads/smollm2-135m-instruct for the default model, else none]
    #[arg(long = "heads", env = "MEDUSA_HEADS", value_name = "MEDUSA_HEADS")]
    pub folder: Option<PathBuf>,
    /// Maximum number of heads to use
    #[arg(long = "medusa-k-heads", env = "MEDUSA_K_HEADS", value_name = "MEDUSA_K_HEADS", default_value_t = 5, value_parser = between(1, 16))]
    pub k_heads: usize,
    /// Draft by copying what followed earlier occurrences of the last tokens: in the request's own
    /// text, or also in recent answers (to the same API key, if keys are set)
    #[arg(long, env = "TEXT_DRAFTS", default_value = "shared")]
    pub text_drafts: TextSource,
    /// Tokens of recent answers to keep for text drafts; 20 bytes each
    #[arg(long, env = "SHARED_TEXT", default_value_t = 1 << 16, value_parser = between(64, 1 << 28))]
    pub shared_text: usize,
    /// Maximum tokens a sequence can gain in one step, including the model's own choice
    /// [default: 33 with text drafts, else heads + 1]
    #[arg(long = "medusa-max-tokens-per-step", env = "MEDUSA_MAX_TOKENS_PER_STEP", value_name = "MEDUSA_MAX_TOKENS_PER_STEP", value_parser = between(1, 64))]
    pub max_tokens_per_step: Option<usize>,
}

/// Where text drafts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TextSource {
    /// The request's own text and recent answers
    Shared,
    /// The request's own text: its prompt and its answer so far
    Own,
    /// No text drafts
    Off,
}

/// `medusa-llama serve`.
#[derive(Clone, Debug, ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Log format, also of llama.cpp's messages: text, or one JSON object per line
    #[arg(long, env = "LOG_FORMAT", default_value = "text", ignore_case = true)]
    pub log_format: LogFormat,
    /// Maximum number of sequences decoded together (slots)
    #[arg(short = 'b', long, env = "BATCH_SIZE", default_value_t = 4, value_parser = between(1, 256))]
    pub batch_size: usize,
    /// BATCH_SIZE times this many requests may run or wait; further ones get 429
    #[arg(long, env = "MAX_CONCURRENT_BATCHES", default_value_t = 4, value_parser = between(1, 4096))]
    pub max_concurrent_batches: usize,
    /// Longest time an idle engine waits for more requests before a step, in seconds; it waits only
    /// if recent traffic came in bursts
    #[arg(long, env = "MAX_WAIT_TIME", default_value = "0.1", value_parser = seconds(0.0))]
    pub max_wait_time: Duration,
    /// KV cache layout; auto is unified
    #[arg(long, env = "KV_LAYOUT", value_name = "KV_LAYOUT", default_value = "auto")]
    pub kv: KvLayout,
    /// Size of a unified KV cache, in tokens [default: BATCH_SIZE x MODEL_CONTEXT_SIZE, as far as memory allows]
    #[arg(long, env = "KV_CELLS", value_parser = between(16, 1 << 28))]
    pub kv_cells: Option<usize>,
    /// Part of a unified KV cache that may keep finished prompts for reuse, in tokens [default: all]
    #[arg(long, env = "PREFIX_CELLS", value_parser = between(0, 1 << 28))]
    pub prefix_cells: Option<usize>,
    /// States that are kept for later prompts, beside one for each slot, where a model has a state for
    /// each sequence: of a recurrent or hybrid one (Mamba, LFM2, Qwen3.5) [default: 2 x BATCH_SIZE]
    #[arg(long = "ctx-checkpoints", env = "CTX_CHECKPOINTS", value_name = "CTX_CHECKPOINTS", value_parser = between(0, 4096))]
    pub ctx_checkpoints: Option<usize>,
    /// Maximum rows (tokens) of one step; longer prompts take several steps
    #[arg(long, env = "N_BATCH", default_value_t = 512, value_parser = between(1, 8192))]
    pub n_batch: usize,
    /// Prompt rows in a step that also decodes [default: adaptive, so that running streams keep
    /// their pace]
    #[arg(long, env = "PREFILL_CHUNK", value_parser = between(1, 8192))]
    pub prefill_chunk: Option<usize>,
    /// Name of the model in answers, metrics and /v1/models [default: HF_REPO, or the file's name without .gguf]
    #[arg(long, env = "MODEL_ALIAS", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub alias: Option<String>,
    /// File with a chat template (Jinja) to use instead of the model's own [default: none]
    #[arg(long, env = "CHAT_TEMPLATE_FILE", value_name = "FILE")]
    pub chat_template_file: Option<PathBuf>,
    /// How /v1/embeddings makes one vector of a text's tokens [default: as the GGUF says; if it says
    /// nothing, there are no embeddings]
    #[arg(long, env = "POOLING", value_name = "POOLING")]
    pub pooling: Option<Pooling>,
    #[command(flatten)]
    pub(crate) drafts: DraftArgs,
    /// Address to listen on
    #[arg(long, env = "HOST", default_value = "0.0.0.0")]
    pub host: IpAddr,
    /// Port to listen on; 0 picks a free one
    #[arg(short = 'p', long, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Threads of the HTTP server; the model has its own
    #[arg(long, env = "WORKERS", default_value_t = 1, value_parser = between(1, 256))]
    pub workers: usize,
    /// Time that running requests have to finish after SIGTERM, in seconds
    #[arg(long, env = "DRAIN_TIMEOUT", default_value = "30", value_parser = seconds(0.0))]
    pub drain_timeout: Duration,
    /// Maximum size of a request body, in bytes
    #[arg(long, env = "MAX_BODY_BYTES", default_value_t = 1 << 20, value_parser = between(1, 1 << 30))]
    pub max_body_bytes: usize,
    /// Maximum number of open connections; further ones wait to be accepted
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 1024, value_parser = between(1, 65_536))]
    pub max_connections: usize,
    /// Maximum size of a request's head, in bytes
    #[arg(long, env = "MAX_HEADER_BYTES", default_value_t = 1 << 15, value_parser = between(1024, 1 << 20))]
    pub max_header_bytes: usize,
    /// Time that a client has to send a request's head, and then its body, in seconds; also the
    /// idle limit between requests
    #[arg(long, env = "READ_TIMEOUT", default_value = "30", value_parser = seconds(0.0))]
    pub read_timeout: Duration,
    /// Maximum duration of a request, in seconds; generation stops then. A request's own timeout_s
    /// may be shorter [default: no limit]
    #[arg(long, env = "REQUEST_TIMEOUT", value_parser = seconds(0.0))]
    pub request_timeout: Option<Duration>,
    /// Time without a byte read by the client after which its connection is closed and its request
    /// cancelled, in seconds
    #[arg(long, env = "WRITE_TIMEOUT", default_value = "60", value_parser = seconds(0.1))]
    pub write_timeout: Duration,
    /// Time without an event after which a stream gets a comment, so that proxies and clients keep
    /// waiting, in seconds; its head is sent by then, too. 0 sends none
    #[arg(long, env = "SSE_KEEP_ALIVE", default_value = "10", value_parser = seconds(0.0))]
    pub sse_keep_alive: Duration,
    /// Time for a forward pass, after which /ready answers 503, in seconds; 0 sets no limit
    #[arg(long, env = "STALL_TIMEOUT", default_value = "60", value_parser = seconds(0.0))]
    pub stall_timeout: Duration,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
}

/// KV cache layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvLayout {
    /// The faster layout, which is the pool
    Auto,
    /// One pool: prefixes are shared between sequences at no cost
    Unified,
    /// One stream of cells per sequence, without trees
    Streams,
}

/// Log format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

/// The checked configuration of `serve`.
pub(crate) struct Config {
    pub listen: SocketAddr,
    /// Threads of the HTTP server.
    pub workers: usize,
    pub model: ModelSource,
    pub heads: Option<HeadsSource>,
    /// What the engine needs, once the files are here.
    pub engine: Box<dyn FnOnce(Files) -> EngineParams + Send>,
    pub http: HttpLimits,
    pub auth: Auth,
    pub cors: Cors,
    pub hosts: Hosts,
    pub unknown_fields: Unknown,
    /// Certificate and key; `None` serves plain HTTP.
    pub tls: Option<Tls>,
    pub otlp_endpoint: Option<Uri>,
    /// What clients call the model.
    pub model_id: String,
    pub drain_timeout: Duration,
    /// The source of a chat template to use instead of the model's.
    pub chat_template: Option<String>,
}

/// Where a model and its heads are.
pub(crate) struct Files {
    /// The GGUF file.
    pub model: PathBuf,
    /// The heads' folder, if there are any.
    pub heads: Option<PathBuf>,
}

impl ModelArgs {
    /// An engine of `n_slots` sequences for a command; nothing is drafted. An error names variables
    /// that contradict each other.
    pub(crate) fn engine(&self, model: PathBuf, n_slots: usize) -> anyhow::Result<EngineParams> {
        Ok(EngineParams {
            placement: self.placement()?,
            adapters: self.adapters(),
            rope: self.rope.rope()?,
            n_threads_batch: self.threads_batch(),
            cache: self.cache(),
            ..EngineParams::new(model, self.threads(), n_slots, self.n_ctx())
        })
    }

    /// A context of one sequence, to measure; errors as above.
    pub(crate) fn context(&self, n_cells: usize, n_batch: usize) -> anyhow::Result<ContextParams> {
        let params = ContextParams::of_one_sequence(n_cells, n_batch, self.threads());
        Ok(ContextParams { cache: self.cache(), rope: self.rope.rope()?, ..params })
    }

    /// Where the weights go; errors as above.
    pub(crate) fn placement(&self) -> anyhow::Result<Placement> {
        self.placement.placement()
    }

    /// What is added to the weights.
    pub(crate) fn adapters(&self) -> Vec<AdapterFile> {
        self.placement.adapters()
    }

    /// Tokens of a context for commands that do not follow the model's.
    pub(crate) fn n_ctx(&self) -> usize {
        self.context_size.unwrap_or(COMMAND_CONTEXT)
    }

    pub(crate) fn cache(&self) -> CacheTypes {
        CacheTypes { keys: self.cache_type_k, values: self.cache_type_v }
    }

    pub(crate) fn threads(&self) -> usize {
        self.n_threads.min(cores())
    }

    fn threads_batch(&self) -> usize {
        self.n_threads_batch.unwrap_or(self.n_threads).min(cores())
    }
}

impl DraftArgs {
    /// Parameters of the draft sources, of which heads are in a folder; `None` without any.
    pub(crate) fn params(&self, heads: Option<PathBuf>) -> Option<DraftParams> {
        let n_shared_text = match self.text_drafts {
            TextSource::Shared => Some(self.shared_text),
            TextSource::Own => Some(0),
            TextSource::Off => None,
        };
        let heads = heads.map(|folder| HeadsParams { folder, n_heads: self.k_heads });
        let max_tokens_per_step = self.max_tokens_per_step;
        (heads.is_some() || n_shared_text.is_some()).then_some(DraftParams {
            heads,
            n_shared_text,
            max_tokens_per_step,
            ..DraftParams::default()
        })
    }
}

impl ServeArgs {
    /// Checks values against each other. An error names the variable, its value and the limit.
    pub(crate) fn check(&self) -> anyhow::Result<Config> {
        let (n_batch, n_slots) = (self.n_batch, self.batch_size);
        ensure!(
            n_batch >= n_slots,
            "N_BATCH is {n_batch}, but each of BATCH_SIZE = {n_slots} sequences needs a row"
        );
        if let (Some(n_cells), Some(n_ctx)) = (self.kv_cells, self.model.context_size) {
            ensure!(
                n_cells >= n_ctx,
                "KV_CELLS is {n_cells}, but one request may take MODEL_CONTEXT_SIZE = {n_ctx}"
            );
        }
        let streams = self.kv == KvLayout::Streams;
        ensure!(
            !(streams && self.drafts.are_named()),
            "KV_LAYOUT is streams, which cannot hold the trees of MEDUSA_HEADS: use unified"
        );
        ensure!(
            !(streams && self.pooling.is_some()),
            "KV_LAYOUT is streams, which keeps no hidden states for POOLING: use unified"
        );
        let auth = self.network.auth()?;
        let model = self.model.source()?;
        let heads = self.drafts.source(&self.model)?.filter(|_| !streams);
        Ok(Config {
            model_id: self.alias.clone().unwrap_or_else(|| model.id()),
            model,
            heads,
            engine: self.engine(auth.keys.len())?,
            listen: SocketAddr::new(self.host, self.port),
            workers: self.workers,
            http: HttpLimits {
                max_body_bytes: self.max_body_bytes,
                max_connections: self.max_connections,
                max_header_bytes: self.max_header_bytes,
                read_timeout: self.read_timeout,
                timeout: self.request_timeout,
                write_timeout: self.write_timeout,
                sse_keep_alive: Some(self.sse_keep_alive).filter(|period| !period.is_zero()),
                stall_timeout: Some(self.stall_timeout).filter(|limit| !limit.is_zero()),
            },
            unknown_fields: self.network.unknown_fields(),
            hosts: self.network.hosts(self.host, !auth.keys.is_empty()),
            auth,
            cors: self.network.cors()?,
            tls: self.network.tls()?,
            otlp_endpoint: self.network.otlp_endpoint.clone(),
            drain_timeout: self.drain_timeout,
            chat_template: self.chat_template()?,
        })
    }

    /// The engine's parameters, once its files are there. An error names variables that contradict
    /// each other.
    fn engine(
        &self,
        n_tenants: usize,
    ) -> anyhow::Result<Box<dyn FnOnce(Files) -> EngineParams + Send>> {
        let args = self.clone();
        let params = self.model.engine(PathBuf::new(), self.batch_size)?;
        Ok(Box::new(move |Files { model, heads }| {
            let drafts = args.drafts.params(heads).filter(|_| args.kv != KvLayout::Streams);
            EngineParams {
                model_path: model,
                sizes: args.sizes(),
                drafts: drafts.map(|drafts| DraftParams { n_tenants, ..drafts }),
                pooling: args.pooling,
                n_queue: args.batch_size * args.max_concurrent_batches,
                max_wait: args.max_wait_time,
                ..params
            }
        }))
    }

    /// The chat template of the file, which must be valid.
    fn chat_template(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.chat_template_file else { return Ok(None) };
        let fail = |why: &dyn Display| anyhow!("CHAT_TEMPLATE_FILE is {}: {why}", path.display());
        let source = std::fs::read_to_string(path).map_err(|error| fail(&error))?;
        jinja::Template::new(&source).map_err(|error| fail(&error))?;
        Ok(Some(source))
    }

    /// The engine's sizes as they were asked for. `auto` is the pool: it shares prefixes and holds
    /// trees. With our attention kernel a row reads only its own sequence's cells, so the pool is
    /// also the faster layout on a CPU (`benches/results/`).
    fn sizes(&self) -> Sizes {
        Sizes {
            n_slots: self.batch_size,
            n_ctx: self.model.context_size,
            n_batch: self.n_batch,
            n_prefill: self.prefill_chunk,
            n_cells: self.kv_cells,
            n_retained: self.prefix_cells,
            streams: self.kv == KvLayout::Streams,
            n_states_kept: self.ctx_checkpoints.unwrap_or(2 * self.batch_size),
        }
    }
}

/// A whole number in a range; the error names both ends.
fn between(
    min: usize,
    max: usize,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("must be a whole number from {min} to {max}")),
    }
}

/// A number in a range.
fn number(min: f32, max: f32) -> impl Fn(&str) -> Result<f32, String> + Clone + Send + Sync {
    move |text| match text.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("must be a number from {min} to {max}")),
    }
}

/// Seconds, with fractions, from `min` to a day.
fn seconds(min: f64) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(s) if (min..=86_400.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err(format!("must be a number of seconds from {min} to 86400")),
    }
}

fn cache_type(name: &str) -> Result<TensorType, String> {
    let names = || CacheTypes::ALL.map(TensorType::name).join(", ");
    CacheTypes::by_name(name).ok_or_else(|| format!("must be one of {}", names()))
}

/// A log level by its name; Python's `WARNING` is accepted too.
fn level(name: &str) -> Result<Level, String> {
    let name = if name.eq_ignore_ascii_case("warning") { "warn" } else { name };
    name.parse().map_err(|_| "must be ERROR, WARN, INFO, DEBUG or TRACE".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(args: &[&str]) -> Result<ServeArgs, clap::Error> {
        let all = ["medusa-llama", "serve"].iter().chain(args);
        Args::try_parse_from(all).map(|a| match a.command {
            Command::Serve(s) => *s,
            _ => unreachable!("`serve` was given"),
        })
    }

    #[test]
    fn a_bad_value_is_rejected_with_its_variable() {
        let bad = [
            (["--batch-size", "0"], "BATCH_SIZE"),
            (["--port", "70000"], "PORT"),
            (["--max-wait-time", "100000"], "MAX_WAIT_TIME"),
            (["--max-wait-time", "nan"], "MAX_WAIT_TIME"),
            (["--write-timeout", "0"], "WRITE_TIMEOUT"),
            (["--ctx", "x"], "MODEL_CONTEXT_SIZE"),
            (["--log-level", "loud"], "LOG_LEVEL"),
            (["--kv", "both"], "KV_LAYOUT"),
            (["--host", "here"], "HOST"),
        ];
        for (args, name) in bad {
            let text = serve(&args).unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn rates_of_acceptance_are_probabilities() {
        let bench = |rates: &str| {
            Args::try_parse_from(["x", "bench", "--prompts=p", &format!("--acceptance={rates}")])
        };
        for rates in ["0.5,1.5", "-0.1", "0.5,nan", "", "0.5,x"] {
            let text = bench(rates).unwrap_err().to_string();
            assert!(text.contains("acceptance"), "{text}");
        }
        let Command::Bench(args) = bench("0.56,0.32,1").unwrap().command else {
            unreachable!("`bench` was given")
        };
        assert_eq!(args.acceptance, Some(vec![0.56, 0.32, 1.0]));
    }

    #[test]
    fn an_unknown_shape_is_rejected_with_the_known_ones() {
        let text = Args::try_parse_from(["x", "synth", "--like", "gpt-9", "-o", "f"])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("--like") && text.contains("vicuna-7b") && text.contains("tiny"),
            "{text}"
        );
    }

    #[test]
    fn values_that_contradict_each_other_are_rejected() {
        let rejected = |args: &[&str]| serve(args).unwrap().check().err().unwrap().to_string();
        assert!(rejected(&["--n-batch", "2"]).contains("N_BATCH is 2"));
        let few = ["--kv-cells", "100", "--ctx", "200"];
        assert!(rejected(&few).contains("KV_CELLS is 100"));
        assert!(rejected(&["--kv", "streams", "--heads", "x"]).contains("MEDUSA_HEADS"));
    }

    #[test]
    fn the_cache_is_one_pool_unless_streams_are_named() {
        let sizes = |args: &[&str]| serve(args).unwrap().sizes();
        let of_all = sizes(&[]);
        assert_eq!((of_all.streams, of_all.n_ctx, of_all.n_states_kept), (false, None, 8));
        assert_eq!(sizes(&["--prefix-cells", "100"]).n_retained, Some(100));
        assert!(sizes(&["--kv", "streams"]).streams);
    }

    #[test]
    fn names_are_checked_where_a_server_trusts_whoever_reaches_it() {
        let hosts = |args: &[&str], has_keys: bool| {
            let args = serve(args).unwrap();
            args.network.hosts(args.host, has_keys)
        };
        let only = |names: &[&str]| Hosts::Only(names.iter().map(ToString::to_string).collect());
        assert_eq!(hosts(&[], false), Hosts::Any);
        assert_eq!(hosts(&["--host", "127.0.0.1"], true), Hosts::Any);
        for loopback in ["127.0.0.1", "127.1.2.3", "::1"] {
            assert_eq!(hosts(&["--host", loopback], false), only(&[]), "{loopback}");
        }
        assert_eq!(hosts(&["--host", "::1", "--allowed-hosts", "*"], false), Hosts::Any);
        let named = ["--allowed-hosts", "a.example.,[::2]"];
        assert_eq!(hosts(&named, true), only(&["a.example", "[::2]"]));
        for bad in ["", "a b", "a:80", "http://a"] {
            let text = serve(&["--allowed-hosts", bad]).unwrap_err().to_string();
            assert!(text.contains("ALLOWED_HOSTS") && text.contains("example.org"), "{text}");
        }
    }
}
