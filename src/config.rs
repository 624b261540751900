//! From what was typed ([`Args`]) to what is run ([`Config`]): every limit, with its default, is in
//! the table of [`ServeArgs`].

mod commands;
pub mod network;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use hyper::Uri;

pub use commands::{
    BenchArgs, GenerateArgs, PerplexityArgs, PromptArgs, QuantizeArgs, ResultArgs, SynthArgs,
    TrainArgs, TuneArgs,
};
use network::NetworkArgs;

use crate::engine::thread::{DraftParams, EngineParams, HeadsParams};
use crate::engine::{Layout, Limits};
use crate::http::auth::Auth;
use crate::http::cors::Cors;
use crate::http::tls::Tls;
use crate::llama;

/// Where `make model` puts the default model.
pub const DEFAULT_MODEL: &str = "models/smollm2-135m-instruct-q4_1.gguf";

/// Where heads for the default model are looked for.
pub const DEFAULT_HEADS: &str = "heads/smollm2-135m-instruct";

/// What MEDUSA_HEADS says for none.
const NO_HEADS: &str = "none";

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "medusa-llama",
    version,
    about = "A server that makes GGUF models answer faster",
    max_term_width = 110
)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
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
    /// Measure what drafts are worth: each prompt with and without them
    Bench(BenchArgs),
    /// Write a GGUF file in another quantization
    Quantize(QuantizeArgs),
    /// Measure how well a model foretells a text
    Perplexity(PerplexityArgs),
    /// Try a model in several quantizations and with several numbers of threads, and say which to
    /// use
    Tune(TuneArgs),
    /// Write a model of random weights in a known one's shape, to measure speed with
    Synth(SynthArgs),
}

/// Model and machine; the same for every command.
#[derive(Clone, Debug, ClapArgs)]
pub struct ModelArgs {
    /// GGUF file to load [default: models/smollm2-135m-instruct-q4_1.gguf]
    #[arg(
        short = 'm',
        long = "model",
        env = "MODEL_PATH",
        value_name = "MODEL_PATH",
        hide_env_values = true
    )]
    pub model_path: Option<PathBuf>,
    /// Longest prompt plus answer of one request, in tokens
    #[arg(short = 'c', long = "ctx", env = "MODEL_CONTEXT_SIZE", value_name = "MODEL_CONTEXT_SIZE", default_value_t = 2048,
          value_parser = between(16, 1 << 20))]
    pub context_size: usize,
    /// Layers held on the GPU (ignored by a build without one)
    #[arg(long, env = "N_GPU_LAYERS", value_name = "N_GPU_LAYERS", default_value_t = 25)]
    pub n_gpu_layers: u32,
    /// Threads of a forward pass; at most the cores there are
    #[arg(short = 't', long, env = "N_THREADS", value_name = "N_THREADS", default_value_t = 4, value_parser = between(1, 1024))]
    pub n_threads: usize,
    /// What to log: ERROR, WARN, INFO, DEBUG, TRACE
    #[arg(
        long,
        env = "LOG_LEVEL",
        value_name = "LOG_LEVEL",
        default_value = "INFO",
        ignore_case = true
    )]
    pub log_level: LogLevel,
}

/// What drafts; the same for every command that drafts.
#[derive(Clone, Debug, ClapArgs)]
pub struct DraftArgs {
    /// Folder with heads for the model, or `none` [default: for the default model
    /// heads/smollm2-135m-instruct, else none]
    #[arg(long = "heads", env = "MEDUSA_HEADS", value_name = "MEDUSA_HEADS")]
    pub folder: Option<PathBuf>,
    /// Use at most this many of the heads
    #[arg(long = "medusa-k-heads", env = "MEDUSA_K_HEADS", value_name = "MEDUSA_K_HEADS", default_value_t = 5, value_parser = between(1, 16))]
    pub k_heads: usize,
    /// Draft what followed in a text before: in the request's own, or in recent answers too (to the
    /// same API key, if there are keys)
    #[arg(long, env = "TEXT_DRAFTS", value_name = "TEXT_DRAFTS", default_value = "shared")]
    pub text_drafts: TextSource,
    /// Tokens of recent answers that are kept to draft from; 20 bytes each
    #[arg(long, env = "SHARED_TEXT", value_name = "SHARED_TEXT", default_value_t = 1 << 16, value_parser = between(64, 1 << 28))]
    pub shared_text: usize,
    /// Most tokens one step may give a sequence, its own choice included [default: 33 with text,
    /// else heads + 1]
    #[arg(long = "medusa-max-tokens-per-step", env = "MEDUSA_MAX_TOKENS_PER_STEP", value_name = "MEDUSA_MAX_TOKENS_PER_STEP", value_parser = between(1, 64))]
    pub max_tokens_per_step: Option<usize>,
}

/// Which text drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TextSource {
    /// The request's own, and recent answers to others
    Shared,
    /// The request's own: its prompt and its answer so far
    Own,
    /// None
    Off,
}

/// `medusa-llama serve`.
#[derive(Clone, Debug, ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Form of the log, llama.cpp's lines included: text, or a JSON object a line
    #[arg(
        long,
        env = "LOG_FORMAT",
        value_name = "LOG_FORMAT",
        default_value = "text",
        ignore_case = true
    )]
    pub log_format: LogFormat,
    /// Sequences decoded together
    #[arg(short = 'b', long, env = "BATCH_SIZE", value_name = "BATCH_SIZE", default_value_t = 4, value_parser = between(1, 256))]
    pub batch_size: usize,
    /// BATCH_SIZE times this many requests may run or wait before one is refused with 429
    #[arg(long, env = "MAX_CONCURRENT_BATCHES", value_name = "MAX_CONCURRENT_BATCHES", default_value_t = 4,
          value_parser = between(1, 4096))]
    pub max_concurrent_batches: usize,
    /// Longest time an idle engine may wait for company before a step, in seconds. Only bursts ever
    /// pay it
    #[arg(long, env = "MAX_WAIT_TIME", value_name = "MAX_WAIT_TIME", default_value = "0.1", value_parser = seconds)]
    pub max_wait_time: Duration,
    /// How the KV cache is divided: one pool, one stream per sequence, or what is faster (the pool)
    #[arg(long, env = "KV_LAYOUT", value_name = "KV_LAYOUT", default_value = "auto")]
    pub kv: KvLayout,
    /// Cells of a unified KV cache, in tokens [default: BATCH_SIZE x MODEL_CONTEXT_SIZE]
    #[arg(long, env = "KV_CELLS", value_name = "KV_CELLS", value_parser = between(16, 1 << 28))]
    pub kv_cells: Option<usize>,
    /// Cells of a unified KV cache that may hold finished prompts for reuse [default: all]
    #[arg(long, env = "PREFIX_CELLS", value_name = "PREFIX_CELLS", value_parser = between(0, 1 << 28))]
    pub prefix_cells: Option<usize>,
    /// Most rows (tokens) of one step; a longer prompt takes several
    #[arg(long, env = "N_BATCH", value_name = "N_BATCH", default_value_t = 512, value_parser = between(1, 8192))]
    pub n_batch: usize,
    /// Rows of prompts in a step beside streams that run [default: as many as leave the streams
    /// their pace]
    #[arg(long, env = "PREFILL_CHUNK", value_name = "PREFILL_CHUNK", value_parser = between(1, 8192))]
    pub prefill_chunk: Option<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub drafts: DraftArgs,
    /// Address to listen on
    #[arg(long, env = "HOST", value_name = "HOST", default_value = "0.0.0.0")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(short = 'p', long, env = "PORT", value_name = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Threads for the network; the model has its own
    #[arg(long, env = "WORKERS", value_name = "WORKERS", default_value_t = 1, value_parser = between(1, 256))]
    pub workers: usize,
    /// After SIGTERM, how long running requests may take to finish, in seconds
    #[arg(long, env = "DRAIN_TIMEOUT", value_name = "DRAIN_TIMEOUT", default_value = "30", value_parser = seconds)]
    pub drain_timeout: Duration,
    /// Largest request body, in bytes
    #[arg(long, env = "MAX_BODY_BYTES", value_name = "MAX_BODY_BYTES", default_value_t = 1 << 20, value_parser = between(1, 1 << 30))]
    pub max_body_bytes: usize,
    /// Open connections; more wait to be accepted
    #[arg(long, env = "MAX_CONNECTIONS", value_name = "MAX_CONNECTIONS", default_value_t = 1024, value_parser = between(1, 65_536))]
    pub max_connections: usize,
    /// Largest head of a request, in bytes
    #[arg(long, env = "MAX_HEADER_BYTES", value_name = "MAX_HEADER_BYTES", default_value_t = 1 << 15, value_parser = between(1024, 1 << 20))]
    pub max_header_bytes: usize,
    /// How long a client may take to send a request's head, and then its body, in seconds; between
    /// requests a connection may idle as long
    #[arg(long, env = "READ_TIMEOUT", value_name = "READ_TIMEOUT", default_value = "30", value_parser = seconds)]
    pub read_timeout: Duration,
    /// Longest time for a request, in seconds: then its answer ends where it stands. A request's
    /// own timeout_s may be shorter [default: no limit]
    #[arg(long, env = "REQUEST_TIMEOUT", value_name = "REQUEST_TIMEOUT", value_parser = seconds)]
    pub request_timeout: Option<Duration>,
    /// How long a client may take no byte of its answer before it is let go and its request
    /// cancelled, in seconds
    #[arg(long, env = "WRITE_TIMEOUT", value_name = "WRITE_TIMEOUT", default_value = "60", value_parser = some_seconds)]
    pub write_timeout: Duration,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub network: NetworkArgs,
}

/// How the KV cache is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvLayout {
    /// What is faster: the pool
    Auto,
    /// One pool: prefixes are shared between sequences at no cost
    Unified,
    /// One stream per sequence: a row looks at its own sequence's cells only
    Streams,
}

/// How much to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    #[value(alias = "warning")]
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// For `tracing`'s filter.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// In which form to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

/// What `serve` runs with. Every value was checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Threads for the network.
    pub workers: usize,
    /// For the engine's thread.
    pub engine: EngineParams,
    /// For the network side.
    pub http: HttpLimits,
    /// Who may ask.
    pub auth: Auth,
    /// Which pages may read answers.
    pub cors: Cors,
    /// The certificate, where connections are to be encrypted.
    pub tls: Option<Tls>,
    /// The collector of traces.
    pub otlp_endpoint: Option<Uri>,
    /// How long running requests may take after SIGTERM.
    pub drain_timeout: Duration,
}

/// What one client, or all of them, may take of the network side.
#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// Open connections.
    pub max_connections: usize,
    /// Bytes of a request's head.
    pub max_header_bytes: usize,
    /// For a request's head, and for its body.
    pub read_timeout: Duration,
    /// For a request, from its acceptance to its answer's end.
    pub timeout: Option<Duration>,
    /// For a client to take some bytes of its answer.
    pub write_timeout: Duration,
}

impl ModelArgs {
    /// The model file: what was given, or the default one.
    ///
    /// # Errors
    /// When no model was given and the default one is not there.
    pub fn path(&self) -> Result<PathBuf, String> {
        match &self.model_path {
            Some(path) if path.as_os_str().is_empty() => {
                Err("MODEL_PATH is empty: name a GGUF file, or leave it unset".into())
            }
            Some(path) => Ok(path.clone()),
            None if Path::new(DEFAULT_MODEL).is_file() => Ok(DEFAULT_MODEL.into()),
            None => Err(format!(
                "MODEL_PATH is not set and {DEFAULT_MODEL} is not there: run `make model`, or name a GGUF file with -m"
            )),
        }
    }

    /// Threads to use here.
    #[must_use]
    pub fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.n_threads.min(cores)
    }
}

impl DraftArgs {
    /// The heads to use: what was given, or for the default model those in its folder, if there are
    /// any.
    #[must_use]
    pub fn heads(&self, model: &ModelArgs) -> Option<HeadsParams> {
        let folder = match &self.folder {
            Some(folder) => (folder.as_os_str() != NO_HEADS).then(|| folder.clone()),
            None => (model.model_path.is_none() && Path::new(DEFAULT_HEADS).is_dir())
                .then(|| DEFAULT_HEADS.into()),
        }?;
        Some(HeadsParams { folder, n_heads: self.k_heads })
    }

    /// What to draft with, if anything.
    #[must_use]
    pub fn params(&self, model: &ModelArgs) -> Option<DraftParams> {
        let n_shared_text = match self.text_drafts {
            TextSource::Shared => Some(self.shared_text),
            TextSource::Own => Some(0),
            TextSource::Off => None,
        };
        let heads = self.heads(model);
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
    /// Checks what one value means for another.
    ///
    /// # Errors
    /// One line that names the variable, its value and the limit.
    pub fn check(&self) -> Result<Config, String> {
        let n_ctx = self.model.context_size;
        if self.n_batch < self.batch_size {
            return Err(format!(
                "N_BATCH is {}, but each of BATCH_SIZE = {} sequences needs a row",
                self.n_batch, self.batch_size
            ));
        }
        if let Some(cells) = self.kv_cells.filter(|&cells| cells < n_ctx) {
            return Err(format!(
                "KV_CELLS is {cells}, but one request may take MODEL_CONTEXT_SIZE = {n_ctx}"
            ));
        }
        let streams = self.kv == KvLayout::Streams;
        if self.drafts.folder.as_ref().is_some_and(|folder| folder.as_os_str() != NO_HEADS)
            && streams
        {
            return Err("KV_LAYOUT is streams, which cannot hold the trees that MEDUSA_HEADS drafts: use unified".into());
        }
        let auth = self.network.auth()?;
        let drafts = self.drafts.params(&self.model).filter(|_| !streams);
        let drafts = drafts.map(|drafts| DraftParams { n_owners: auth.keys.len(), ..drafts });
        let limits = Limits {
            n_slots: self.batch_size,
            n_ctx,
            n_batch: self.n_batch,
            n_prefill: self.prefill_chunk,
            layout: self.layout(),
        };
        Ok(Config {
            listen: SocketAddr::new(self.host, self.port),
            workers: self.workers,
            engine: EngineParams {
                model_path: self.model.path()?,
                n_gpu_layers: self.model.n_gpu_layers,
                n_threads: self.model.threads(),
                limits,
                drafts,
                traces: false,
                n_queue: self.batch_size * self.max_concurrent_batches,
                max_wait: self.max_wait_time,
            },
            http: HttpLimits {
                max_body_bytes: self.max_body_bytes,
                max_connections: self.max_connections,
                max_header_bytes: self.max_header_bytes,
                read_timeout: self.read_timeout,
                timeout: self.request_timeout,
                write_timeout: self.write_timeout,
            },
            auth,
            cors: self.network.cors()?,
            tls: self.network.tls()?,
            otlp_endpoint: self.network.otlp_endpoint.clone(),
            drain_timeout: self.drain_timeout,
        })
    }

    /// `auto` is the pool: it shares prefixes and holds trees, and with `vendor/patches/` a row
    /// pays for the cells it sees and no others, so it is the faster layout on a CPU too.
    /// `benches/results/` has the measurement.
    fn layout(&self) -> Layout {
        let unified = matches!(self.kv, KvLayout::Auto | KvLayout::Unified);
        if !unified {
            return Layout::Streams { n_cells: self.model.context_size };
        }
        let n_cells = self.kv_cells.unwrap_or(self.batch_size * self.model.context_size);
        let n_retained = self.prefix_cells.unwrap_or(n_cells).min(n_cells);
        Layout::Unified {
            n_cells,
            n_retained,
            n_seqs: (self.batch_size * 2).min(llama::max_sequences()).max(self.batch_size),
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

/// Seconds, with fractions; at most a day.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.0..=86_400.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err("must be a number of seconds from 0 to 86400".into()),
    }
}

/// The same, but long enough for something to happen in it.
fn some_seconds(text: &str) -> Result<Duration, String> {
    let long_enough = seconds(text).ok().filter(|time| *time >= Duration::from_millis(100));
    long_enough.ok_or_else(|| "must be a number of seconds from 0.1 to 86400".into())
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
    fn a_bad_value_is_refused_with_its_variable() {
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
    fn an_unknown_shape_is_refused_with_those_there_are() {
        let text = Args::try_parse_from(["x", "synth", "--like", "gpt-9", "-o", "f"])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("--like") && text.contains("vicuna-7b") && text.contains("tiny"),
            "{text}"
        );
    }

    #[test]
    fn values_that_contradict_each_other_are_refused() {
        let refused = |args: &[&str]| serve(args).unwrap().check().unwrap_err();
        assert!(refused(&["--n-batch", "2"]).contains("N_BATCH is 2"));
        assert!(refused(&["--kv-cells", "100"]).contains("KV_CELLS is 100"));
        assert!(refused(&["--kv", "streams", "--heads", "x"]).contains("MEDUSA_HEADS"));
    }

    #[test]
    fn the_cache_is_one_pool_unless_streams_are_named() {
        let layout = |args: &[&str]| serve(args).unwrap().layout();
        assert!(matches!(
            layout(&[]),
            Layout::Unified { n_cells: 8192, n_retained: 8192, n_seqs: 8 }
        ));
        assert!(matches!(
            layout(&["--prefix-cells", "100"]),
            Layout::Unified { n_retained: 100, .. }
        ));
        assert_eq!(layout(&["--kv", "streams"]), Layout::Streams { n_cells: 2048 });
        assert!(matches!(layout(&["--batch-size", "256"]), Layout::Unified { n_seqs: 256, .. }));
    }
}
