//! The arguments of the commands that do not serve.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::{DraftArgs, ModelArgs, between};
use crate::llama::Quantization;
use crate::request::Speculation;
use crate::synth::ModelShape;
use crate::train::kind::HeadKind;

/// `medusa-llama generate`.
#[derive(Clone, Debug, ClapArgs)]
pub struct GenerateArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub drafts: DraftArgs,
    /// Text to continue; `-` reads it from standard input
    #[arg(short = 'p', long)]
    pub prompt: String,
    /// Most tokens to generate
    #[arg(short = 'n', long, default_value_t = 128)]
    pub max_tokens: u64,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Keep the most likely tokens up to this probability together
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Keep this many most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    pub top_k: u64,
    /// Keep tokens at least this fraction as likely as the most likely one
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f64,
    /// The same seed gives the same text [default: a new one each time]
    #[arg(long)]
    pub seed: Option<u64>,
    /// End the text before this string; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
}

/// The prompts of `train` and `bench`.
#[derive(Clone, Debug, ClapArgs)]
pub struct PromptArgs {
    /// Prompts: one JSON object per line, with "prompt" or "turns", and optionally "category"
    #[arg(long = "prompts", value_name = "FILE.jsonl")]
    pub file: PathBuf,
    /// System message before each prompt
    #[arg(long)]
    pub system: Option<String>,
    /// Take the prompts as they are, not as a user's messages in the model's chat format
    #[arg(long)]
    pub raw: bool,
}

/// Where `bench` and `tune` write results.
#[derive(Clone, Debug, ClapArgs)]
pub struct ResultArgs {
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a plot to this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// `medusa-llama train`.
#[derive(Clone, Debug, ClapArgs)]
pub struct TrainArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub prompts: PromptArgs,
    /// Folder for the heads
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// What the heads see: the hidden state and the path they continue, or, as in Medusa, the
    /// hidden state only
    #[arg(long, default_value = "conditioned")]
    pub kind: HeadKind,
    /// Number of heads
    #[arg(long, default_value_t = 4, value_parser = between(1, 16))]
    pub heads: usize,
    /// Width of a conditioned head's block [default: the model's]
    #[arg(long, value_parser = between(1, 1 << 16))]
    pub width: Option<usize>,
    /// Tokens that heads can draft: the most frequent ones
    #[arg(long, default_value_t = 16_384, value_parser = between(16, 1 << 24))]
    pub draft_vocab: usize,
    /// Passes over all rows
    #[arg(long, default_value_t = 3, value_parser = between(1, 1000))]
    pub epochs: usize,
    /// Folder for answers and features, from which a killed run resumes [default: OUTPUT/work]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Train on this many tokens of answers
    #[arg(long, default_value_t = 200_000, value_parser = between(1000, 1 << 40))]
    pub tokens: usize,
    /// Most tokens of one answer
    #[arg(long, default_value_t = 256, value_parser = between(8, 1 << 20))]
    pub max_answer: usize,
    /// Answers generated together
    #[arg(short = 'b', long, default_value_t = 32, value_parser = between(1, 256))]
    pub batch_size: usize,
    /// Most disk space for features, in GiB; what does not fit is not trained on
    #[arg(long, default_value_t = 8, value_parser = between(1, 1 << 20))]
    pub max_disk_gib: usize,
    /// Orders the prompts, seeds answers and weights
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// `medusa-llama bench`.
#[derive(Clone, Debug, ClapArgs)]
pub struct BenchArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub drafts: DraftArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub prompts: PromptArgs,
    /// Ask this many of them, spread over the file
    #[arg(short = 'k', long, default_value_t = 24, value_parser = between(1, 1 << 20))]
    pub n_prompts: usize,
    /// Most tokens of an answer
    #[arg(short = 'n', long, default_value_t = 128, value_parser = between(1, 1 << 20))]
    pub max_tokens: usize,
    /// Parallel requests
    #[arg(long, default_value = "1,2,4,8", value_delimiter = ',', value_parser = between(1, 256))]
    pub parallel: Vec<usize>,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = between(1, 1000))]
    pub rounds: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// What to compare, the first with each other one: off, heads, text, auto (both), typical
    #[arg(long, default_value = "off,auto", value_delimiter = ',', value_parser = speculation)]
    pub modes: Vec<Speculation>,
    /// Verify this many candidates in every step whatever they cost, instead of those that pay
    #[arg(long, value_parser = between(1, 64))]
    pub tree_nodes: Option<usize>,
    /// Simulate that heads are right at these rates, the first head's first: each is the
    /// probability that a head's best candidate is right given that the path before it is. As many
    /// heads are used. Texts are meaningless then; what steps take is measured as ever, which tells
    /// what good heads would be worth where there are random ones only
    #[arg(long, value_name = "RATE,...", value_delimiter = ',', value_parser = rate)]
    pub acceptance: Option<Vec<f32>>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub results: ResultArgs,
}

/// `medusa-llama quantize`.
#[derive(Clone, Debug, ClapArgs)]
pub struct QuantizeArgs {
    /// GGUF file to read; F16 or BF16 gives the best result
    pub input: PathBuf,
    /// GGUF file to write
    pub output: PathBuf,
    /// For example Q4_0, Q8_0, Q4_K_M
    #[arg(value_name = "TYPE", value_parser = quantization)]
    pub kind: Quantization,
    /// Overwrite the output
    #[arg(short, long)]
    pub force: bool,
    /// Threads
    #[arg(short = 't', long, default_value_t = 4, value_parser = between(1, 1024))]
    pub n_threads: usize,
}

/// `medusa-llama perplexity`.
#[derive(Clone, Debug, ClapArgs)]
pub struct PerplexityArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Text to read
    #[arg(short, long)]
    pub file: PathBuf,
}

/// `medusa-llama tune`.
#[derive(Clone, Debug, ClapArgs)]
pub struct TuneArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Text to measure perplexity on, and to continue
    #[arg(short, long)]
    pub file: PathBuf,
    /// Quantizations to try beside the model as it is
    #[arg(long, value_name = "TYPE,...", default_value = "Q4_0,Q4_1,Q8_0", value_delimiter = ',', value_parser = quantization)]
    pub types: Vec<Quantization>,
    /// Numbers of threads to try [default: 1, 2, 4, 8 and so on, and as many as there are cores]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = between(1, 1024))]
    pub threads: Vec<usize>,
    /// Keep the quantized files in this folder; else they are removed
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Most that perplexity may be above the best one's: 0.05 is 5%
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = rate)]
    pub max_perplexity_loss: f32,
    /// Tokens of each sequence whose speed is measured
    #[arg(short = 'n', long, default_value_t = 64, value_parser = between(2, 4096))]
    pub max_tokens: usize,
    /// How often everything but perplexity is measured
    #[arg(long, default_value_t = 3, value_parser = between(1, 1000))]
    pub rounds: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub results: ResultArgs,
}

/// `medusa-llama synth`.
#[derive(Clone, Debug, ClapArgs)]
pub struct SynthArgs {
    /// Whose shape: vicuna-7b, llama-3-8b, smollm2-135m, tiny
    #[arg(long, value_name = "NAME", value_parser = shape)]
    pub like: ModelShape,
    /// GGUF file to write
    #[arg(short, long, value_name = "FILE.gguf")]
    pub output: PathBuf,
    /// How the model is stored, in llama.cpp's mixture: for example Q4_K_M, Q8_0, F16
    #[arg(short, long, value_name = "TYPE", default_value = "Q4_K_M", value_parser = quantization)]
    pub quantization: Quantization,
    /// Folder to write heads to
    #[arg(long, value_name = "DIR")]
    pub heads: Option<PathBuf>,
    /// Number of heads
    #[arg(long, default_value_t = 4, value_parser = between(1, 16))]
    pub n_heads: usize,
    /// What the heads see: the hidden state, each with an output matrix of its own, or also the
    /// path they continue
    #[arg(long, default_value = "medusa")]
    pub kind: HeadKind,
    /// The same seed gives the same files
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Overwrite the files
    #[arg(short, long)]
    pub force: bool,
}

fn speculation(name: &str) -> Result<Speculation, String> {
    let names = || Speculation::NAMES.map(|(name, _)| name).join(", ");
    Speculation::by_name(name).ok_or_else(|| format!("must be one of {}", names()))
}

/// A probability.
fn rate(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(rate) if (0.0..=1.0).contains(&rate) => Ok(rate),
        _ => Err("must be a number from 0 to 1".into()),
    }
}

fn quantization(name: &str) -> Result<Quantization, String> {
    let names = || Quantization::names().collect::<Vec<_>>().join(", ");
    Quantization::by_name(name).ok_or_else(|| format!("must be one of {}", names()))
}

fn shape(name: &str) -> Result<ModelShape, String> {
    let names = || ModelShape::names().collect::<Vec<_>>().join(", ");
    ModelShape::by_name(name).ok_or_else(|| format!("must be one of {}", names()))
}
