//! Command-line arguments ([`Args`]) and the checked configuration made from them (`Config`).
//! [`ServeArgs`] declares every limit of the server with its default.

mod commands;
mod drafts;
mod engine;
pub mod network;
mod placement;
mod serve;
mod several;
mod sources;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr as _;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args as ClapArgs, Parser, Subcommand};
use tracing::Level;

pub use commands::{
    BenchArgs, GenerateArgs, MakeDraftArgs, PerplexityArgs, PromptArgs, QuantizeArgs, ReportArgs,
    RowsArgs, SynthArgs, TrainArgs, TryOutArgs, TuneArgs, WorkerArgs,
};
pub(crate) use drafts::DraftFiles;
pub use drafts::{DraftArgs, TextSource};
pub use engine::EngineArgs;
pub(crate) use engine::{Files, ModelConfig};
pub use placement::{PlacementArgs, RopeArgs};
pub(crate) use serve::Config;
pub use serve::{LogFormat, ServeArgs};
pub(crate) use sources::{HeadsSource, ModelSource};
use values::{between, cache_type, level};

use crate::engine::EngineParams;
use crate::engine::plan::LONGEST_CONTEXT;
use crate::hub::name::ModelName;
use crate::llama::{AdapterFile, CacheTypes, ContextParams, Numa, Placement, TensorType};
use crate::machine::cores;

/// Where `make model` puts the default model.
pub const DEFAULT_MODEL: &str = "models/smollm2-135m-instruct-q4_1.gguf";

/// Tokens of a context of the commands that do not follow the model's.
const COMMAND_CONTEXT: usize = 2048;

/// Heads that ship for the default model.
pub const DEFAULT_HEADS: &str = "heads/smollm2-135m-instruct";

/// llama.cpp's options of one dash and several letters, which clap does not have, and ours.
const SHORT_NAMES: [(&str, &str); 18] = [
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
    ("-md", "--draft-model"),
    ("-hfd", "--draft-hf"),
    ("-hfrd", "--draft-hf"),
    ("-ngld", "--draft-gpu-layers"),
    ("-cd", "--draft-ctx"),
    ("-cram", "--cache-ram"),
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
        let words: Vec<OsString> = words.map(long).collect();
        let mut args = Self::try_parse_from(&words)?;
        if let Command::Serve(serve) = &mut args.command {
            serve.words = words;
        }
        Ok(args)
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a GGUF model over HTTP
    Serve(Box<ServeArgs>),
    /// Compute layers of a model for a `serve` on another machine, which names this one in --rpc
    Worker(WorkerArgs),
    /// Generate text from one prompt, streamed to the terminal
    Generate(GenerateArgs),
    /// Train heads for a model from its answers to prompts that it writes, or to a file of prompts
    Train(TrainArgs),
    /// Measure the speed with and without drafts on a file of prompts
    Bench(BenchArgs),
    /// Measure what a step takes by its number of rows (tokens)
    Rows(RowsArgs),
    /// Write a GGUF file in another quantization
    Quantize(QuantizeArgs),
    /// Make a draft model of a model itself, and measure what it brings
    Draft(MakeDraftArgs),
    /// Measure the perplexity of a model on a text
    Perplexity(PerplexityArgs),
    /// Compare quantizations and thread counts of a model and recommend one
    Tune(TuneArgs),
    /// Write a model with random weights in the shape of a known one, for speed measurements and tests
    Synth(SynthArgs),
    /// Load a model and compute a few tokens, as `serve` does for each of several models
    #[command(hide = true)]
    TryOut(TryOutArgs),
}

impl Command {
    /// The chosen log level. By default, commands that print their own output log only problems.
    pub fn log_level(&self) -> Level {
        let level = match (self, self.model()) {
            (Self::Serve(args), _) => return args.engine.model.log_level,
            (Self::Worker(args), _) => return args.log_level,
            (Self::Synth(_) | Self::TryOut(_), _) => Level::ERROR,
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
            Self::Serve(args) => Some(&args.engine.model),
            Self::Generate(args) => Some(&args.model),
            Self::Train(args) => Some(&args.model),
            Self::Bench(args) => Some(&args.model),
            Self::Draft(args) => Some(&args.model),
            Self::Rows(args) => Some(&args.model),
            Self::Perplexity(args) => Some(&args.model),
            Self::Tune(args) => Some(&args.model),
            Self::Worker(_) | Self::Quantize(_) | Self::Synth(_) | Self::TryOut(_) => None,
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
