//! Sources of drafts, loaded and measured for an engine.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::Limits;
use super::forward::LlamaForward;
use crate::gpu::Device;
use crate::gpu::weights::Precision;
use crate::llama::{
    Context, ContextParams, DeviceUse, LlamaError, Memory, Model, Placement, Threads,
};
use crate::speculate::calibration::Calibration;
use crate::speculate::cost::{self, Cost};
use crate::speculate::device::DeviceHeads;
use crate::speculate::draft_model::{self, DraftModel};
use crate::speculate::heads::{Heads, HeadsError, Shape};
use crate::speculate::recording::Recording;
use crate::speculate::text::TextDrafts;
use crate::speculate::{Draft, Speculator};

/// What drafts are made of, and how much of them is verified.
#[derive(Clone, Debug, Default)]
pub struct DraftParams {
    /// Heads.
    pub heads: Option<HeadsParams>,
    /// A smaller model.
    pub model: Option<DraftModelParams>,
    /// The model's own draft layers, if it has some and there is no smaller model.
    pub own_layers: Option<LayersParams>,
    /// Each sequence's own text, and this many tokens of recent answers; `None`: no text.
    pub n_shared_text: Option<usize>,
    /// Tenants: an answer to one is not drafted for another. 0 counts as one.
    pub n_tenants: usize,
    /// Most tokens a step may give one sequence; `None`: what the sources can give.
    pub max_tokens_per_step: Option<usize>,
    /// Verify this many candidates for each sequence in every step, to measure; `None` to serve.
    pub fixed_nodes: Option<usize>,
    /// Where steps are recorded, to measure; `None` to serve.
    pub recording: Option<Arc<Mutex<Recording>>>,
    /// How often heads' candidates are right, as far as that is known at the start.
    pub calibration: Calibration,
}

/// Which heads.
#[derive(Clone, Debug)]
pub struct HeadsParams {
    /// Their folder.
    pub folder: PathBuf,
    /// Use at most this many.
    pub n_heads: usize,
}

/// Which draft model.
#[derive(Clone, Debug)]
pub struct DraftModelParams {
    /// The GGUF file.
    pub path: PathBuf,
    /// Where its weights go.
    pub placement: Placement,
    /// Cells of its cache, in tokens; `None`: as many as most answers need, [`CELLS`] a slot.
    pub n_cells: Option<usize>,
    /// Most tokens of a draft.
    pub max_depth: usize,
}

/// How far a model's own draft layers draft.
#[derive(Clone, Copy, Debug)]
pub struct LayersParams {
    /// Cells of their cache, as of a [draft model](DraftModelParams::n_cells).
    pub n_cells: Option<usize>,
    /// Most tokens of a draft.
    pub max_depth: usize,
    /// There must be such layers.
    pub is_needed: bool,
}

/// Why there are no drafts.
#[derive(Debug, thiserror::Error)]
pub(super) enum DraftsError {
    #[error("{0}")]
    Llama(#[from] LlamaError),
    #[error("{0}")]
    Heads(#[from] HeadsError),
    #[error("{} cannot draft for this model: {why}", .path.display())]
    Model { path: PathBuf, why: String },
}

/// Step times are measured up to two rows for each slot and this many more.
const MEASURED_BEYOND: usize = 24;
/// Most time spent on that measurement.
const MEASURING: Duration = Duration::from_millis(1500);

/// Tokens after a sequence's last one that its text may draft.
const TEXT_DEPTH: usize = 32;

/// Cells of a draft model's cache for each slot, if they are not named.
pub const CELLS: usize = 4096;
/// Most rows of a draft model's pass.
const MODEL_ROWS: usize = 512;

/// What drafts.
pub(super) struct Drafts {
    pub speculator: Speculator,
    pub n_heads: usize,
    /// Where heads and verification are computed.
    pub on: &'static str,
    /// Name of the draft model.
    pub model: Option<String>,
}

/// Loads all sources, and measures what rows cost.
pub(super) fn load(
    params: &DraftParams,
    model: &Arc<Model>,
    forward: &mut LlamaForward,
    Limits { n_batch, n_slots, .. }: Limits,
) -> Result<Drafts, DraftsError> {
    // Beyond, the curve goes on as a line; and what is measured takes memory.
    let most = n_batch.min(2 * n_slots + MEASURED_BEYOND);
    let numbers: Vec<usize> = cost::POINTS.into_iter().filter(|&n| n <= most).collect();
    let (points, change_s) = forward.measure(&numbers, MEASURING)?;
    let curve: Vec<String> = points.iter().map(|(n, s)| format!("{n}: {:.1}", s * 1e3)).collect();
    let (curve, change) = (curve.join(", "), change_s * 1e3);
    tracing::info!(
        "milliseconds of a step by rows: {curve}; {change:.1} more if their number changes"
    );

    let cost = Cost::from_points(&points).with_change(change_s);
    let text_depth = if params.n_shared_text.is_some() { TEXT_DEPTH } else { 0 };
    let (heads, on) = match &params.heads {
        Some(heads) => {
            let (heads, on) = load_heads(heads, model, forward)?;
            tracing::info!(n_heads = heads.n_heads(), side = on, "heads loaded");
            (Some(heads), on)
        }
        None => (None, "cpu"),
    };
    let n_heads = heads.as_ref().map_or(0, |heads| heads.n_heads());
    let drafter = params.model.as_ref().map(|of| load_model(of, model, forward, n_slots));
    let drafter = match (drafter.transpose()?, &params.own_layers) {
        (None, Some(of)) => Some(load_layers(of, model, forward, n_slots)?),
        (drafter, _) => drafter,
    };
    let model_depth = drafter.as_ref().map_or(0, Draft::n_heads);
    let deepest = n_heads.max(text_depth).max(model_depth);
    let max_tokens = params.max_tokens_per_step.unwrap_or(deepest + 1);
    let mut speculator = Speculator::new(heads, max_tokens, cost);
    let name = |of: &DraftModel| match of.model() {
        own if Arc::ptr_eq(own, model) => "its own draft layers".into(),
        other => other.name().unwrap_or_else(|| "unnamed model".into()),
    };
    let name = drafter.as_ref().map(name);
    speculator.model = drafter.map(|drafter| Box::new(drafter) as Box<dyn Draft>);
    speculator.text = params.n_shared_text.map(|n| TextDrafts::new(params.n_tenants.max(1), n));
    speculator.fixed_nodes = params.fixed_nodes;
    speculator.recording.clone_from(&params.recording);
    speculator.calibration = params.calibration.clone();
    Ok(Drafts { speculator, n_heads, on, model: name })
}

/// Reads heads and makes them ready where they will be computed.
fn load_heads(
    params: &HeadsParams,
    model: &Model,
    forward: &mut LlamaForward,
) -> Result<(Box<dyn Draft>, &'static str), DraftsError> {
    let shape = Shape { n_embd: model.n_embd(), n_vocab: model.n_vocab() };
    let heads = Heads::load(&params.folder, shape, params.n_heads)?;
    let Some(device) = logits_device(forward) else {
        return Ok((heads.drafter(model, forward.threads())?, "cpu"));
    };
    let heads = Rc::new(RefCell::new(DeviceHeads::new(device, heads, model, Precision::Q8)?));
    forward.use_device(Rc::clone(&heads));
    Ok((Box::new(heads), "cuda"))
}

/// The device that the last pass left its logits on, if our kernels can work there.
fn logits_device(forward: &LlamaForward) -> Option<Rc<dyn Device>> {
    let tapped = forward.tapped().filter(|tapped| !tapped.on_host)?;
    #[cfg(not(feature = "cuda-kernels"))]
    let _ = tapped;
    #[cfg(feature = "cuda-kernels")]
    match crate::gpu::cuda::Cuda::holding(tapped.logits) {
        Ok(cuda) => return Some(Rc::new(cuda)),
        Err(error) => tracing::warn!(%error, "heads and verification stay on the CPU"),
    }
    None
}

/// Loads a draft model, which computes with the threads of the model that it drafts for.
fn load_model(
    params: &DraftModelParams,
    target: &Model,
    forward: &LlamaForward,
    n_slots: usize,
) -> Result<DraftModel, DraftsError> {
    let model = Model::load(&params.path, &params.placement, |_| true)?;
    let refuse = |why| DraftsError::Model { path: params.path.clone(), why };
    draft_model::check_vocabulary(target, &model).map_err(refuse)?;
    if model.memory() == Memory::State {
        let why = "it keeps a state of each sequence, which cannot be taken back".to_owned();
        return Err(DraftsError::Model { path: params.path.clone(), why });
    }
    let (n_cells, max_depth) = (params.n_cells, params.max_depth);
    let threads = forward.threads().clone();
    let context = context(Arc::new(model), n_cells, max_depth, n_slots, threads)?;
    let drafter = DraftModel::new(context, n_slots, target.n_vocab(), max_depth)?;
    log_loaded("draft model", &drafter);
    Ok(drafter)
}

/// Makes a model's own draft layers ready.
fn load_layers(
    params: &LayersParams,
    model: &Arc<Model>,
    forward: &LlamaForward,
    n_slots: usize,
) -> Result<DraftModel, DraftsError> {
    let &LayersParams { n_cells, max_depth, .. } = params;
    let threads = forward.threads().clone();
    let context = context(Arc::clone(model), n_cells, max_depth, n_slots, threads)?;
    let drafter = DraftModel::new(context, n_slots, model.n_vocab(), max_depth)?;
    log_loaded("the model's own draft layers", &drafter);
    Ok(drafter)
}

fn log_loaded(what: &str, drafter: &DraftModel) {
    let ms = |n| drafter.seconds(n) * 1e3;
    tracing::info!(
        "{what} loaded; milliseconds of a pass by rows: 1: {:.1}, 4: {:.1}, 16: {:.1}",
        ms(1),
        ms(4),
        ms(16)
    );
}

/// The context of a draft model, or of the draft layers of a model that was loaded with them.
fn context(
    model: Arc<Model>,
    n_cells: Option<usize>,
    max_depth: usize,
    n_slots: usize,
    threads: Threads,
) -> Result<Context, LlamaError> {
    let least = draft_model::n_least_cells(n_slots, max_depth);
    let n_cells = n_cells.unwrap_or(CELLS * n_slots).max(least);
    let n_batch = MODEL_ROWS.min(n_cells);
    let of_one = ContextParams::of_one_sequence(n_cells, n_batch, threads.n_most());
    let n_outputs = draft_model::n_outputs(n_slots);
    let n_seq_max = draft_model::n_ids(n_slots);
    let of_draft_layers = model.has_draft_layers();
    let params = ContextParams { n_outputs, n_seq_max, of_draft_layers, ..of_one };
    Context::with_threads(model, &params, threads)
}

/// What the smaller model, or the model's own draft layers, will take of each device, the host first.
/// `placement` is the model's.
pub(super) fn footprint(
    params: &DraftParams,
    path: &Path,
    placement: &Placement,
    n_slots: usize,
) -> Result<Vec<DeviceUse>, DraftsError> {
    let of = |model: Model, n_cells, max_depth| {
        let context = context(Arc::new(model), n_cells, max_depth, n_slots, Threads::new(1)?)?;
        Ok::<_, LlamaError>(context.footprint())
    };
    if let Some(params) = &params.model {
        let model = Model::outline(&params.path, &params.placement)?;
        return Ok(of(model, params.n_cells, params.max_depth)?);
    }
    let Some(layers) = &params.own_layers else { return Ok(vec![]) };
    let mut all = of(Model::outline(path, placement)?, layers.n_cells, layers.max_depth)?;
    all.iter_mut().for_each(|device| device.weights = 0); // they are the model's
    Ok(all)
}
