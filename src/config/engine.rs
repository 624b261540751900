//! The part of `serve`'s table that is about one engine: its model, its sizes, its drafts.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{anyhow, ensure};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args as ClapArgs, ValueEnum};

use super::sources::{HeadsSource, ModelSource};
use super::values::{between, seconds};
use super::{DraftArgs, DraftFiles, ModelArgs};
use crate::engine::EngineParams;
use crate::engine::drafts::DraftParams;
use crate::engine::plan::Sizes;
use crate::engine::prefix::{PrefixParams, Room};
use crate::jinja;
use crate::llama::{Endpoint, Pooling};
use crate::prefixes::key::Owner;
use crate::prefixes::store::{Place, StoreParams};

/// Flags about an engine. Of several models, each has its own.
#[derive(Clone, Debug, ClapArgs)]
pub struct EngineArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
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
    /// Memory of the host for prefixes that had to leave the KV cache, in MiB, also -cram; 0 keeps none
    /// [default: a quarter of what is left beside the model, at most 8192; of several models without a store, none]
    #[arg(long = "cache-ram", env = "CACHE_RAM", value_name = "MIB", value_parser = between(0, 1 << 30))]
    pub cache_ram: Option<usize>,
    /// Folder, or s3://BUCKET[/PATH], where prefixes outlive the server, and are found by others that
    /// compute the same; S3's settings are AWS_ENDPOINT, AWS_REGION, AWS_ACCESS_KEY_ID and so on
    /// [default: none]
    #[arg(long, env = "PREFIX_STORE", value_name = "DIR_OR_URL")]
    pub prefix_store: Option<Place>,
    /// Most that PREFIX_STORE may hold, in MiB
    #[arg(long, env = "PREFIX_STORE_SIZE", value_name = "MIB", default_value_t = 1 << 16, value_parser = between(1, 1 << 40))]
    pub prefix_store_size: usize,
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

/// Where a model and what drafts for it are.
pub(crate) struct Files {
    /// The GGUF file.
    pub model: PathBuf,
    /// The sources of drafts.
    pub drafts: DraftFiles,
}

/// What an engine needs, once its files are here.
pub(crate) type MakeParams = Arc<dyn Fn(Files) -> EngineParams + Send + Sync>;

/// A model to serve, and how.
#[derive(Clone)]
pub(crate) struct ModelConfig {
    /// What clients call it.
    pub id: String,
    pub model: ModelSource,
    pub heads: Option<HeadsSource>,
    pub draft_model: Option<ModelSource>,
    /// The workers that compute layers of it.
    pub workers: Vec<Endpoint>,
    /// What its engine needs, once its files are here.
    pub params: MakeParams,
    /// The source of a chat template to use instead of the model's.
    pub chat_template: Option<String>,
}

impl EngineArgs {
    /// Checks values against each other, for the owners of these API keys. An error names the variable,
    /// its value and the limit.
    pub(crate) fn check(&self, owners: &[Owner]) -> anyhow::Result<ModelConfig> {
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
        let model = self.model.source()?;
        let heads = self.drafts.source(&self.model)?.filter(|_| !streams);
        let draft_model = self.drafts.model_source()?;
        ensure!(
            !(streams && draft_model.is_some()),
            "KV_LAYOUT is streams, which cannot hold the trees of DRAFT_MODEL: use unified"
        );
        Ok(ModelConfig {
            id: self.alias.clone().unwrap_or_else(|| model.id()),
            model,
            heads,
            draft_model,
            workers: self.model.placement.rpc.clone(),
            params: self.params(owners)?,
            chat_template: self.chat_template()?,
        })
    }

    /// The engine's parameters with files, for the owners of API keys. An error names variables that
    /// contradict each other.
    fn params(&self, owners: &[Owner]) -> anyhow::Result<MakeParams> {
        let args = self.clone();
        let prefixes = self.prefixes(owners.to_vec())?;
        let n_tenants = owners.len();
        let params = self.model.engine(PathBuf::new(), self.batch_size)?;
        Ok(Arc::new(move |Files { model, drafts }| {
            let drafts = args
                .drafts
                .params(drafts, &params.placement)
                .filter(|_| args.kv != KvLayout::Streams);
            EngineParams {
                model_path: model,
                sizes: args.sizes(),
                drafts: drafts.map(|drafts| DraftParams { n_tenants, ..drafts }),
                pooling: args.pooling,
                prefixes: prefixes.clone(),
                n_queue: args.batch_size * args.max_concurrent_batches,
                max_wait: args.max_wait_time,
                ..params.clone()
            }
        }))
    }

    /// What is kept of prefixes beside the cache.
    fn prefixes(&self, owners: Vec<Owner>) -> anyhow::Result<PrefixParams> {
        let room = |mib: usize| if mib == 0 { Room::None } else { Room::Most((mib as u64) << 20) };
        let memory = match self.kv {
            KvLayout::Streams => Room::None,
            KvLayout::Auto | KvLayout::Unified => self.cache_ram.map_or(Room::Auto, room),
        };
        ensure!(
            self.prefix_store.is_none() || memory != Room::None,
            "PREFIX_STORE needs memory for what it reads, and a pool: CACHE_RAM must not be 0, nor KV_LAYOUT streams"
        );
        let most = (self.prefix_store_size as u64) << 20;
        let store = self.prefix_store.clone().map(|place| StoreParams { place, most });
        Ok(PrefixParams { memory, store, owners })
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
    pub(super) fn sizes(&self) -> Sizes {
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
