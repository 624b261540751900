//! Before the loop: an engine's parameters become those that are possible with its model and this machine,
//! and the model is loaded in the sizes that [`plan`] makes of the memory there is.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::drafts::{self, DraftParams, DraftsError, LayersParams};
use super::plan::{self, Beside, Plan, Sizes};
use super::prefix::{self, PrefixParams};
use super::scheduler::MOST_READ;
use super::{Layout, Limits, offload};
use crate::files::folder_bytes;
use crate::llama::{
    AdapterFile, CacheTypes, Context, ContextParams, LlamaError, Memory, Model, Placement, Pooling,
    Rope, max_sequences, model_files,
};
use crate::speculate::MAX_NODES;

/// What the engine needs to start.
#[derive(Clone, Debug)]
pub struct EngineParams {
    /// The GGUF file.
    pub model_path: PathBuf,
    /// Where its weights go.
    pub placement: Placement,
    /// What is added to its weights. All requests get it.
    pub adapters: Vec<AdapterFile>,
    /// How positions are rotated.
    pub rope: Rope,
    /// Most threads of a forward pass.
    pub n_threads: usize,
    /// The same for one that reads prompts.
    pub n_threads_batch: usize,
    /// Types of the cached keys and values.
    pub cache: CacheTypes,
    /// The engine's sizes.
    pub sizes: Sizes,
    /// What to draft with; `None`: nothing is drafted.
    pub drafts: Option<DraftParams>,
    /// What is kept of prefixes beside the cache.
    pub prefixes: PrefixParams,
    /// How prompts are embedded; `None`: as the GGUF says, if it does.
    pub pooling: Option<Pooling>,
    /// Answers come with hidden states and logits for each token.
    pub traces: bool,
    /// Requests that may run or wait.
    pub n_queue: usize,
    /// The longest an idle engine may wait for more requests.
    pub max_wait: Duration,
    /// Most bytes of the host's memory; `None`: what there is.
    pub memory: Option<u64>,
}

impl EngineParams {
    /// `n_slots` sequences of up to `n_ctx` tokens each, on the CPU alone. Nothing is drafted.
    pub fn new(model_path: PathBuf, n_threads: usize, n_slots: usize, n_ctx: usize) -> Self {
        Self {
            model_path,
            placement: Placement::default(),
            adapters: vec![],
            rope: Rope::default(),
            n_threads,
            n_threads_batch: n_threads,
            cache: CacheTypes::default(),
            sizes: Sizes::new(n_slots, n_ctx),
            drafts: None,
            prefixes: PrefixParams::default(),
            pooling: None,
            traces: false,
            n_queue: n_slots + 1,
            max_wait: Duration::ZERO,
            memory: None,
        }
    }
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("{0}")]
    Llama(#[from] LlamaError),
    #[error("{0}")]
    Drafts(#[from] DraftsError),
    #[error("{0}")]
    Files(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Prefixes(#[from] prefix::PrefixError),
    #[error("there are no threads to read requests: {0}")]
    Threads(#[from] std::io::Error),
}

/// The files with weights.
pub(super) fn files(params: &EngineParams) -> Vec<PathBuf> {
    let model = &params.model_path;
    let files = model_files(model).unwrap_or_else(|_| vec![model.clone()]); // loading says what is wrong
    files.into_iter().chain(params.adapters.iter().map(|of| of.path.clone())).collect()
}

/// The settings that decide the bits of what is computed.
pub(super) fn arithmetic(params: &EngineParams) -> String {
    let EngineParams { placement, adapters, rope, cache, .. } = params;
    let scales: Vec<_> = adapters.iter().map(|of| of.scale).collect();
    format!("{} {scales:?} {rope:?} {cache:?}", placement.arithmetic())
}

/// A model that is ready to compute.
pub(super) struct Prepared {
    /// As they are possible with this model and this machine.
    pub params: EngineParams,
    pub context: Context,
    pub limits: Limits,
    /// Bytes.
    pub host_memory: u64,
    /// The longest context that the model was trained for.
    pub n_ctx_trained: usize,
}

/// Decides on sizes and loads the model.
pub(super) fn load(
    params: &EngineParams,
    progress: impl FnMut(f32) -> bool,
) -> Result<Prepared, StartError> {
    let Planned { params, plan, n_ctx_trained } = planned(params)?;
    plan.log(&params.sizes);
    let (limits, host_memory) = (plan.limits, plan.host_memory());
    let mut model = Model::load(&params.model_path, &params.placement, progress)?;
    model.adapt(&params.adapters)?;
    let context = Context::new(Arc::new(model), &context_params(&params, &limits))?;
    Ok(Prepared { params, context, limits, host_memory, n_ctx_trained })
}

/// A model that is about to be loaded.
struct Planned {
    params: EngineParams,
    plan: Plan,
    n_ctx_trained: usize,
}

/// The parameters as they are possible with their model and this machine, and the engine's sizes.
fn planned(params: &EngineParams) -> Result<Planned, StartError> {
    let path = &params.model_path;
    let own_layers = |params: &EngineParams| {
        params.drafts.as_ref().is_some_and(|drafts| drafts.own_layers.is_some())
    };
    let wanted = Placement { draft_layers: own_layers(params), ..params.placement.clone() };
    let mut placement = offload::settle(path, &wanted, |model| fits_gpus(params, model))?;
    let outline = Model::outline(path, &placement)?;
    let params = for_model(params, &outline)?;
    placement.draft_layers = own_layers(&params);
    let params = EngineParams { placement, ..params };
    let n_ctx_trained = params.rope.n_ctx(&outline);
    let heads = params.drafts.as_ref().and_then(|drafts| drafts.heads.as_ref());
    let heads = heads.map_or(0, |heads| folder_bytes(&heads.folder));
    let drafter = params.drafts.as_ref().map(|of| {
        drafts::footprint(of, &params.model_path, &params.placement, params.sizes.n_slots)
    });
    let drafter = drafter.transpose()?.unwrap_or_default();
    let (adapters, most) = (&params.adapters, params.memory);
    let beside = Beside { heads, drafter: &drafter, adapters, most };
    let of_context = |limits: &Limits| context_params(&params, limits);
    let plan = plan::plan(outline, &params.sizes, &params.rope, beside, of_context)?;
    Ok(Planned { params, plan, n_ctx_trained })
}

/// Whether an engine would get the sizes that were asked for, or those that the model has, in the
/// memory that there is now.
///
/// # Errors
/// Why the model cannot be used.
pub fn fits(params: &EngineParams) -> Result<bool, String> {
    let planned = planned(params).map_err(|error| error.to_string())?;
    Ok(planned.plan.is_whole)
}

/// Whether GPUs have room for what an outline puts there, and for a context that is worth it.
fn fits_gpus(params: &EngineParams, model: Model) -> Result<bool, StartError> {
    let params = for_model(params, &model)?;
    let limits = plan::limits_on_gpu(&model, &params.sizes, &params.rope);
    let context = Context::new(Arc::new(model), &context_params(&params, &limits))?;
    Ok(plan::fits_devices(&context, &params.adapters))
}

/// Tokens of the longest chain that is drafted for a model with states: each takes the room of one
/// more state for every sequence.
const LONGEST_CHAIN: usize = 4;

/// Most leaves of a sequence's tree: for every id llama.cpp keeps a row of logits.
const MAX_LEAVES: usize = 16;

/// Sequence ids of a unified cache: the layout's, and after them those for the leaves of trees.
pub(super) fn n_ids(params: &EngineParams, limits: &Limits) -> usize {
    let n_seqs = match limits.layout {
        Layout::Unified { n_seqs, .. } => n_seqs,
        Layout::States { n_seqs, window: 0, .. } => return n_seqs, // a chain needs no further id
        Layout::States { n_seqs, .. } => n_seqs,
        Layout::Streams { .. } => return limits.n_slots,
    };
    let n_leaves = match &params.drafts {
        Some(DraftParams { fixed_nodes: Some(_), .. }) => MAX_NODES,
        Some(_) => MAX_LEAVES,
        None => 1,
    };
    let n_spare = usize::from(prefix::are_kept(&params.prefixes, limits.layout));
    (n_seqs + limits.n_slots * (n_leaves - 1)).min(max_sequences() - n_spare)
}

/// How a model's own draft layers draft, where they do: not beside a draft model, nor in streams.
fn own_layers(params: &EngineParams, model: &Model) -> Result<Option<LayersParams>, StartError> {
    let drafts = params.drafts.as_ref().filter(|drafts| drafts.model.is_none());
    let Some(own) = drafts.and_then(|drafts| drafts.own_layers) else { return Ok(None) };
    let refuse = |why: String| match own.is_needed {
        true => Err(StartError::Unsupported(why)),
        false => Ok(None),
    };
    if !model.has_draft_layers() {
        let what = format!("{} has no draft layers (MTP)", model.path().display());
        let why = "or llama.cpp cannot compute those of its architecture";
        return refuse(format!("{what}, {why}, {}", model.architecture()));
    }
    if params.sizes.streams {
        return refuse("draft layers (MTP) need the pool: KV_LAYOUT cannot be streams".into());
    }
    Ok(Some(own))
}

/// The parameters as they are possible with this model.
fn for_model(params: &EngineParams, model: &Model) -> Result<EngineParams, StartError> {
    let mut params = params.clone();
    let architecture = model.architecture();
    let own_layers = own_layers(&params, model)?;
    if let Some(drafts) = &mut params.drafts {
        drafts.own_layers = own_layers;
    }
    if model.memory() == Memory::State {
        let refuse = |what: &str| {
            let why = format!("a model of the architecture {architecture} keeps a state of each");
            Err(StartError::Unsupported(format!("{why} sequence: {what}")))
        };
        if params.drafts.as_ref().is_some_and(|drafts| drafts.heads.is_some()) {
            return refuse("heads cannot draft for it; leave MEDUSA_HEADS unset");
        }
        if params.traces || params.pooling.is_some() {
            return refuse("its hidden states cannot be read, for embeddings or to train heads");
        }
        if params.sizes.streams {
            return refuse("KV_LAYOUT cannot be streams");
        }
        // Text drafts chains, if the architecture's state can be taken back.
        let longest =
            |most: Option<usize>| most.map_or(LONGEST_CHAIN, |n| n - 1).min(LONGEST_CHAIN);
        params.drafts = params.drafts.map(|drafts| DraftParams {
            max_tokens_per_step: Some(longest(drafts.max_tokens_per_step) + 1),
            ..drafts
        });
    } else if params.sizes.streams {
        params.pooling = None; // hidden states need the pool
    } else {
        params.pooling = params.pooling.or_else(|| Pooling::of(model));
    }
    Ok(params)
}

/// Tokens that a model's state must be able to go back by: as many as a step may draft.
fn n_rollback(params: &EngineParams, layout: Layout) -> usize {
    let most = params.drafts.as_ref().and_then(|drafts| drafts.max_tokens_per_step);
    most.filter(|_| layout.has_states()).map_or(0, |n| n - 1)
}

fn context_params(params: &EngineParams, limits: &Limits) -> ContextParams {
    let &Limits { n_slots, n_batch, layout, .. } = limits;
    let (unified, n_cells, n_seq_max) = match layout {
        Layout::Unified { n_cells, .. } | Layout::States { n_cells, .. } => {
            let n_spare = usize::from(prefix::are_kept(&params.prefixes, layout));
            (true, n_cells, n_ids(params, limits) + n_spare)
        }
        // llama.cpp divides the cells among the streams and rounds each share; so round before
        // multiplying.
        Layout::Streams { n_cells } => (false, n_cells.next_multiple_of(256) * n_slots, n_slots),
    };
    ContextParams {
        n_cells,
        n_batch,
        n_ubatch: n_batch,
        n_outputs: n_batch.min(MOST_READ + n_slots * (1 + MAX_NODES)),
        n_seq_max,
        n_threads: params.n_threads.max(params.n_threads_batch),
        unified,
        cache: params.cache,
        rope: params.rope,
        n_window_cells: limits.n_window_cells(),
        n_rollback: n_rollback(params, layout),
        tap_hidden: unified
            && (params.traces
                || params.pooling.is_some()
                || params.drafts.as_ref().is_some_and(|d| d.heads.is_some())),
        keeps_states: params.drafts.as_ref().is_some_and(|d| d.own_layers.is_some()),
        of_draft_layers: false,
        embeddings: false,
    }
}
