//! Arguments of all commands but `serve`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use clap::builder::NonEmptyStringValueParser;
use tracing::Level;

use super::values::{between, level, number};
use super::{DraftArgs, ModelArgs};
use crate::llama::Quantization;
use crate::request::Speculation;
use crate::synth::ModelShape;
use crate::train::kind::HeadKind;

/// Prompts to answer.
#[derive(Clone, Debug, ClapArgs)]
pub struct PromptArgs {
    /// File of prompts: one JSON object per line, with "prompt" or "turns", and optionally
    /// "category"
    #[arg(long = "prompts", value_name = "FILE.jsonl")]
    pub file: PathBuf,
    /// How they become what a model continues.
    #[command(flatten)]
    pub style: PromptStyle,
}

/// How prompts become what a model continues.
#[derive(Clone, Debug, ClapArgs)]
pub struct PromptStyle {
    /// System message before each prompt
    #[arg(long)]
    pub system: Option<String>,
    /// Send the prompts as they are, without the model's chat format
    #[arg(long)]
    pub raw: bool,
}

/// Files to write results to.
#[derive(Clone, Debug, ClapArgs)]
pub struct ReportArgs {
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a plot to this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// `medusa-llama generate`.
#[derive(Clone, Debug, ClapArgs)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) drafts: DraftArgs,
    /// User's message to answer, or the model's own format of a chat; `-` reads standard input
    #[arg(short = 'p', long)]
    pub prompt: String,
    /// System message before the prompt
    #[arg(long)]
    pub system: Option<String>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    pub raw: bool,
    /// Maximum tokens to generate
    #[arg(short = 'n', long, default_value_t = 128, value_parser = between(1, 1 << 20))]
    pub max_tokens: usize,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.8, value_parser = number(0.0, 100.0))]
    pub temperature: f32,
    /// Keep the most likely tokens up to this total probability
    #[arg(long, default_value_t = 0.95, value_parser = number(0.0, 1.0))]
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep tokens at least this fraction as likely as the top one
    #[arg(long, default_value_t = 0.0, value_parser = number(0.0, 1.0))]
    pub min_p: f32,
    /// The same seed gives the same text [default: random]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Stop before this string; repeatable
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
}

/// `medusa-llama worker`.
#[derive(Clone, Debug, ClapArgs)]
pub struct WorkerArgs {
    /// Address to listen on; port 0 picks a free one. There is no authentication: whoever reaches it
    /// controls this process
    #[arg(
        short = 'l',
        long,
        env = "WORKER_LISTEN",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:50052"
    )]
    pub listen: SocketAddr,
    /// Threads of a CPU that computes [default: as many as there are cores]
    #[arg(short = 't', long = "threads", env = "WORKER_THREADS", value_name = "N", value_parser = between(1, 512))]
    pub n_threads: Option<usize>,
    /// Folder in which tensors above 10 MiB are kept, so that a server need not send them again
    /// [default: they are not kept]
    #[arg(long, env = "WORKER_CACHE", value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Log level: ERROR, WARN, INFO, DEBUG or TRACE
    #[arg(long, env = "LOG_LEVEL", default_value = "INFO", value_parser = level)]
    pub log_level: Level,
}

/// `medusa-llama train`.
#[derive(Clone, Debug, ClapArgs)]
pub struct TrainArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// File of prompts: one JSON object per line, with "prompt" or "turns" [default: the model
    /// writes its own]
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: Option<PathBuf>,
    /// Prompts that the model writes itself [default: one for each MAX_ANSWER of TOKENS without
    /// --prompts, none with it]
    #[arg(long, value_name = "N", value_parser = between(1, 1 << 24))]
    pub own_prompts: Option<usize>,
    /// Folder of texts (.txt, .md, .rst, .html): some of the model's own prompts ask about passages of
    /// them [default: passages that the model wrote]
    #[arg(long, value_name = "DIR")]
    pub texts: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) style: PromptStyle,
    /// Folder to write the heads to
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Input of the heads
    #[arg(long, default_value = "conditioned")]
    pub kind: HeadKind,
    /// Number of heads
    #[arg(long, default_value_t = 4, value_parser = between(1, 16))]
    pub heads: usize,
    /// Width of a conditioned head's block [default: four thirds of the model's]
    #[arg(long, value_parser = between(1, 1 << 16))]
    pub width: Option<usize>,
    /// Draft vocabulary: heads draft only this many of the most frequent tokens
    #[arg(long, default_value_t = 16_384, value_parser = between(16, 1 << 24))]
    pub draft_vocab: usize,
    /// Passes over the training data
    #[arg(long, default_value_t = 3, value_parser = between(1, 1000))]
    pub epochs: usize,
    /// Folder for answers and features; a killed run resumes from it [default: OUTPUT/work]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Tokens of answers to train on
    #[arg(long, default_value_t = 500_000, value_parser = between(1000, 1 << 40))]
    pub tokens: usize,
    /// Maximum tokens of one answer
    #[arg(long, default_value_t = 256, value_parser = between(8, 1 << 20))]
    pub max_answer: usize,
    /// Answers to generate concurrently
    #[arg(short = 'b', long, default_value_t = 64, value_parser = between(1, 256))]
    pub batch_size: usize,
    /// Maximum disk space for features, in GiB; features beyond it are not used
    #[arg(long, default_value_t = 8, value_parser = between(1, 1 << 20))]
    pub max_disk_gib: usize,
    /// Seed for the order of prompts, the answers and the initial weights
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// `medusa-llama bench`.
#[derive(Clone, Debug, ClapArgs)]
pub struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) drafts: DraftArgs,
    #[command(flatten)]
    pub(crate) prompts: PromptArgs,
    /// Number of prompts to use, spread over the file
    #[arg(short = 'k', long, default_value_t = 24, value_parser = between(1, 1 << 20))]
    pub n_prompts: usize,
    /// Maximum tokens of one answer
    #[arg(short = 'n', long, default_value_t = 128, value_parser = between(1, 1 << 20))]
    pub max_tokens: usize,
    /// Numbers of parallel requests
    #[arg(long, default_value = "1,2,4,8", value_delimiter = ',', value_parser = between(1, 256))]
    pub parallel: Vec<usize>,
    /// Number of measurements of each mode
    #[arg(long, default_value_t = 3, value_parser = between(1, 1000))]
    pub rounds: usize,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Modes to compare, the first with each other one: off, heads, text, model, several of them joined
    /// by +, auto (all), typical
    #[arg(long, default_value = "off,auto", value_delimiter = ',', value_parser = speculation)]
    pub modes: Vec<Speculation>,
    /// Verify this many candidates in every step, whatever they cost
    #[arg(long, value_parser = between(1, 64))]
    pub tree_nodes: Option<usize>,
    /// Simulate acceptance: for each head, the probability that its top candidate is right if the
    /// path before it is. Texts are meaningless then, but step times are real, which shows what
    /// trained heads would be worth where only random ones exist
    #[arg(long, value_name = "RATE,...", value_delimiter = ',', value_parser = number(0.0, 1.0))]
    pub acceptance: Option<Vec<f32>>,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// `medusa-llama rows`.
#[derive(Clone, Debug, ClapArgs)]
pub struct RowsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Numbers of rows
    #[arg(long, default_value = "1,2,3,4,6,8,12,16,24,32,64,128,512", value_delimiter = ',', value_parser = between(1, 1 << 16))]
    pub rows: Vec<usize>,
    /// Tokens in the cache before them
    #[arg(long, default_value_t = 0, value_parser = between(0, 1 << 20))]
    pub cells: usize,
    /// Logits of the last row only, as where a prompt is read, instead of all
    #[arg(long)]
    pub last: bool,
    /// Most rows of one pass over the weights
    #[arg(long, default_value_t = 512, value_parser = between(1, 1 << 16))]
    pub micro_batch: usize,
    /// Number of measurements of each
    #[arg(long, default_value_t = 5, value_parser = between(1, 1000))]
    pub rounds: usize,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// `medusa-llama quantize`.
#[derive(Clone, Debug, ClapArgs)]
pub struct QuantizeArgs {
    /// GGUF file to read, preferably F16 or BF16
    pub input: PathBuf,
    /// GGUF file to write
    pub output: PathBuf,
    /// Quantization, such as Q4_0, Q8_0 or Q4_K_M
    #[arg(value_name = "TYPE", value_parser = quantization)]
    pub kind: Quantization,
    /// Overwrite an existing output file
    #[arg(short, long)]
    pub force: bool,
    /// Number of threads
    #[arg(short = 't', long, default_value_t = 4, value_parser = between(1, 1024))]
    pub n_threads: usize,
}

/// `medusa-llama draft`.
#[derive(Clone, Debug, ClapArgs)]
pub struct MakeDraftArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// GGUF file to write
    #[arg(short, long)]
    pub output: PathBuf,
    /// Keep this many of the first layers [default: all]
    #[arg(long, value_parser = between(1, 4096))]
    pub layers: Option<usize>,
    /// Quantization of the draft model [default: Q2_K, or with --layers the model's own]
    #[arg(long = "type", value_name = "TYPE", value_parser = quantization)]
    pub kind: Option<Quantization>,
    /// Overwrite an existing output file
    #[arg(short, long)]
    pub force: bool,
    /// File of prompts to measure with: one JSON object per line, with "prompt" or "turns" [default: a
    /// few general ones]
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: Option<PathBuf>,
    /// System message before each prompt
    #[arg(long)]
    pub system: Option<String>,
    /// Number of prompts
    #[arg(short = 'k', long, default_value_t = 8, value_parser = between(1, 1 << 20))]
    pub n_prompts: usize,
    /// Maximum tokens of one answer
    #[arg(short = 'n', long, default_value_t = 64, value_parser = between(2, 1 << 20))]
    pub max_tokens: usize,
}

/// `medusa-llama perplexity`.
#[derive(Clone, Debug, ClapArgs)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text file to measure on
    #[arg(short, long)]
    pub file: PathBuf,
}

/// `medusa-llama tune`.
#[derive(Clone, Debug, ClapArgs)]
pub struct TuneArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text file to measure perplexity on and to take prompts from
    #[arg(short, long)]
    pub file: PathBuf,
    /// Quantizations to try, besides the model as it is
    #[arg(long, value_name = "TYPE,...", default_value = "Q4_0,Q4_1,Q8_0", value_delimiter = ',', value_parser = quantization)]
    pub types: Vec<Quantization>,
    /// Thread counts to try [default: powers of two up to the number of cores, and that number]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = between(1, 1024))]
    pub threads: Vec<usize>,
    /// Keep the quantized files in this folder [default: they are removed]
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Maximum excess of perplexity over the lowest one; 0.05 is 5%
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = number(0.0, 1.0))]
    pub max_perplexity_loss: f32,
    /// Tokens per sequence in a speed measurement
    #[arg(short = 'n', long, default_value_t = 64, value_parser = between(2, 4096))]
    pub max_tokens: usize,
    /// Number of speed measurements
    #[arg(long, default_value_t = 3, value_parser = between(1, 1000))]
    pub rounds: usize,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// `medusa-llama synth`.
#[derive(Clone, Debug, ClapArgs)]
pub struct SynthArgs {
    /// The model whose shape to use.
    #[arg(long, value_name = "NAME", value_parser = shape, help = shapes())]
    pub like: ModelShape,
    /// GGUF file to write
    #[arg(short, long, value_name = "FILE.gguf")]
    pub output: PathBuf,
    /// Quantization, in llama.cpp's mixture of types, such as Q4_K_M, Q8_0 or F16
    #[arg(short, long, value_name = "TYPE", default_value = "Q4_K_M", value_parser = quantization)]
    pub quantization: Quantization,
    /// Folder to write random heads to [default: no heads]
    #[arg(long, value_name = "DIR")]
    pub heads: Option<PathBuf>,
    /// Number of heads
    #[arg(long, default_value_t = 4, value_parser = between(1, 16))]
    pub n_heads: usize,
    /// Input of the heads
    #[arg(long, default_value = "medusa")]
    pub kind: HeadKind,
    /// The same seed gives the same files
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Overwrite existing files
    #[arg(short, long)]
    pub force: bool,
}

/// `medusa-llama try-out`.
#[derive(Clone, Debug, ClapArgs)]
pub struct TryOutArgs {
    /// GGUF file to load
    pub file: PathBuf,
    /// Read what it is, without its weights
    #[arg(long)]
    pub outline: bool,
}

fn speculation(name: &str) -> Result<Speculation, String> {
    Speculation::by_name(name).ok_or_else(|| {
        "it must be off, auto, typical, or some of heads, text and model, joined by + in this order"
            .into()
    })
}

fn quantization(name: &str) -> Result<Quantization, String> {
    one_of(Quantization::by_name(name), Quantization::names())
}

fn shape(name: &str) -> Result<ModelShape, String> {
    one_of(ModelShape::by_name(name), ModelShape::names())
}

/// The help of `--like`.
fn shapes() -> String {
    let names: Vec<_> = ModelShape::names().collect();
    format!("Model whose shape to use: {}", names.join(", "))
}

/// The value that was found by its name, or an error with the known names.
fn one_of<T>(found: Option<T>, names: impl Iterator<Item = &'static str>) -> Result<T, String> {
    found.ok_or_else(|| format!("must be one of {}", names.collect::<Vec<_>>().join(", ")))
}
