//! The engine's thread: it loads the model, measures the machine, and runs the loop until no
//! handle is left.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::bursts::Bursts;
use super::drafts::{self, DraftsError};
use super::drafts::{DraftParams, LayersParams};
use super::forward::LlamaForward;
use super::handle::Handle;
use super::lanes::Lanes;
use super::leaves::DraftShape;
use super::offload;
use super::plan::{self, Beside, Plan, Sizes};
use super::prefix::{self, PrefixParams};
use super::rate::Rate;
use super::scheduler::MOST_READ;
use super::stats::Stats;
use super::{Engine, Forward, Job, Layout, Limits};
use crate::files::folder_bytes;
use crate::llama::{
    AdapterFile, CacheTypes, Context, ContextParams, LlamaError, Memory, Model, Placement, Pooling,
    Rope, SeqId, max_sequences, model_files,
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
enum StartError {
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

/// How far the engine is.
#[derive(Clone)]
pub enum Stage {
    /// The model is being read: from 0 to 1.
    Loading(f32),
    /// Requests are served.
    Ready(Box<Handle>),
    /// The engine's thread has ended, and why.
    Failed(String),
}

/// A running engine's thread. Dropping it does not stop it: drop all handles, or call
/// [`stop`](EngineThread::stop).
pub struct EngineThread {
    stage: watch::Receiver<Stage>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EngineThread {
    /// How far the engine is, now and later.
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.clone()
    }

    /// Waits until the model is loaded.
    ///
    /// # Errors
    /// Why it could not be.
    pub async fn ready(&self) -> Result<Handle, String> {
        let mut stage = self.stage.clone();
        loop {
            match &*stage.borrow_and_update() {
                Stage::Ready(handle) => return Ok((**handle).clone()),
                Stage::Failed(why) => return Err(why.clone()),
                Stage::Loading(_) => {}
            }
            if stage.changed().await.is_err() {
                return Err("the engine's thread ended".into());
            }
        }
    }

    /// Ends the engine after its current step, whatever still runs, and waits for that.
    pub fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic was logged, and shown as `Stage::Failed`
        }
    }
}

/// Starts the engine's thread, which loads the model and then serves.
///
/// # Panics
/// When the operating system gives no thread.
#[must_use]
pub fn spawn(params: EngineParams) -> EngineThread {
    spawn_with(params, |model| model)
}

/// As [`spawn`], with parameters that the engine's thread gets first, which may take long. Until then
/// the stage is `Loading(0.0)`. `prepare` returns why there are none, and looks at its flag meanwhile:
/// it is set when the engine is to end.
///
/// # Panics
/// When the operating system gives no thread.
#[must_use]
pub fn spawn_after(
    prepare: impl FnOnce(&AtomicBool) -> Result<EngineParams, String> + Send + 'static,
) -> EngineThread {
    start(prepare, |model| model)
}

/// As [`spawn`], with something wrapped around the model.
///
/// # Panics
/// When the operating system gives no thread.
#[must_use]
pub fn spawn_with<F: Forward>(
    params: EngineParams,
    wrap: impl FnOnce(LlamaForward) -> F + Send + 'static,
) -> EngineThread {
    start(|_| Ok(params), wrap)
}

fn start<F: Forward>(
    prepare: impl FnOnce(&AtomicBool) -> Result<EngineParams, String> + Send + 'static,
    wrap: impl FnOnce(LlamaForward) -> F + Send + 'static,
) -> EngineThread {
    let (tx, stage) = watch::channel(Stage::Loading(0.0));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let body = move || {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let params = prepare(&stopped).map_err(StartError::Files)?;
            serve(&params, wrap, &tx, &stopped)
        }));
        let why = match ended {
            Ok(Ok(())) => "the engine was stopped".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the engine panicked; the log above says where".to_owned(),
        };
        tx.send_replace(Stage::Failed(why));
    };
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(body)
        .expect("a thread for the engine");
    EngineThread { stage, stop, thread: Some(thread) }
}

fn serve<F: Forward>(
    params: &EngineParams,
    wrap: impl FnOnce(LlamaForward) -> F,
    stage: &watch::Sender<Stage>,
    stop: &AtomicBool,
) -> Result<(), StartError> {
    let mut shown = -1.0;
    let progress = |p: f32| {
        if p - shown >= 0.01 || p >= 1.0 {
            shown = p;
            stage.send_replace(Stage::Loading(p));
        }
        !stop.load(Ordering::Relaxed)
    };
    let digest = prefix::begin(&params.prefixes, || files(params));
    let Prepared { params, context, limits, host_memory, n_ctx_trained } = load(params, progress)?;
    let params = &params;
    let model = Arc::clone(context.model());
    let pooling = params.pooling;
    let stats = Arc::new(Stats::default());
    let (jobs, receiver) = sync_channel(params.n_queue);
    let mut forward = LlamaForward::new(context);
    if prefix::are_kept(&params.prefixes, limits.layout) {
        forward.use_spare(SeqId(n_ids(params, &limits) as u32));
    }
    if params.placement.is_on_cpu() {
        forward.share_threads(params.n_threads, params.n_threads_batch);
    }
    let shape = DraftShape::of(limits.layout, forward.n_rollback());
    let drafts = match &params.drafts {
        Some(drafts) if shape != DraftShape::Plain => {
            Some(drafts::load(drafts, &model, &mut forward, limits)?)
        }
        _ => None,
    };
    let mut engine = Engine::new(wrap(forward), limits, Arc::clone(&stats));
    let (mut n_heads, mut drafting_on, mut drafts_text, mut draft_model) = (0, "cpu", false, None);
    if let Some(drafts) = drafts {
        (n_heads, drafting_on, draft_model) = (drafts.n_heads, drafts.on, drafts.model);
        drafts_text = drafts.speculator.text.is_some();
        engine.speculate(drafts.speculator, n_ids(params, &limits));
    }
    if params.traces {
        engine.trace_answers();
    }
    let prefixes = {
        let (kept, layout) = (&params.prefixes, limits.layout);
        prefix::open(kept, layout, host_memory, arithmetic(params), digest, &stats)?
    };
    if let Some(prefixes) = &prefixes {
        engine.keep_prefixes(Arc::clone(prefixes));
    }
    let n_queue = params.n_queue;
    let handle = Handle {
        model,
        limits,
        n_ctx_trained,
        n_heads,
        draft_model,
        drafts_text,
        drafting_on,
        draft_shape: shape,
        pooling,
        n_queue,
        host_memory,
        stats,
        arrivals: Arc::new(Rate::new(Instant::now())),
        prefixes: prefixes.clone(),
        jobs,
        permits: Arc::new(Semaphore::new(n_queue)),
        grammars: Arc::default(),
        lanes: Arc::new(Lanes::start()?),
    };
    stage.send_replace(Stage::Ready(Box::new(handle)));
    run(&mut engine, &receiver, params.max_wait, stop);
    if let Some(prefixes) = prefixes.filter(|prefixes| prefixes.is_stored()) {
        let until = Instant::now() + prefix::FINISH;
        while Instant::now() < until && (engine.save_block() || !prefixes.keeps_up()) {
            if !prefixes.keeps_up() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        prefixes.flush(until.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// The files with weights.
fn files(params: &EngineParams) -> Vec<PathBuf> {
    let model = &params.model_path;
    let files = model_files(model).unwrap_or_else(|_| vec![model.clone()]); // loading says what is wrong
    files.into_iter().chain(params.adapters.iter().map(|of| of.path.clone())).collect()
}

/// The settings that decide the bits of what is computed.
fn arithmetic(params: &EngineParams) -> String {
    let EngineParams { placement, adapters, rope, cache, .. } = params;
    let scales: Vec<_> = adapters.iter().map(|of| of.scale).collect();
    format!("{} {scales:?} {rope:?} {cache:?}", placement.arithmetic())
}

/// A model that is ready to compute.
struct Prepared {
    /// As they are possible with this model and this machine.
    params: EngineParams,
    context: Context,
    limits: Limits,
    /// Bytes.
    host_memory: u64,
    /// The longest context that the model was trained for.
    n_ctx_trained: usize,
}

/// Decides on sizes and loads the model.
fn load(params: &EngineParams, progress: impl FnMut(f32) -> bool) -> Result<Prepared, StartError> {
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
fn n_ids(params: &EngineParams, limits: &Limits) -> usize {
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

/// Seconds between two looks at the stop flag while idle.
const IDLE_LOOK: Duration = Duration::from_millis(100);

/// The loop: takes new requests, then a step, until no sender is left and all is done, or `stop`.
fn run<F: Forward>(
    engine: &mut Engine<F>,
    jobs: &Receiver<Job>,
    max_wait: Duration,
    stop: &AtomicBool,
) {
    let mut bursts = Bursts::new(max_wait.as_secs_f64());
    while !stop.load(Ordering::Relaxed) {
        if engine.is_idle() {
            let wait = if engine.save_block() { Duration::ZERO } else { IDLE_LOOK };
            match jobs.recv_timeout(wait) {
                Ok(job) => await_burst(engine, job, jobs, &mut bursts),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        while let Ok(job) = jobs.try_recv() {
            bursts.arrival(seconds(job.accepted), false);
            engine.enqueue(job);
        }
        engine.step();
    }
}

/// Starts from idle: may wait a moment for more requests (see [`Bursts`]).
fn await_burst<F: Forward>(
    engine: &mut Engine<F>,
    first: Job,
    jobs: &Receiver<Job>,
    bursts: &mut Bursts,
) {
    let wait = Duration::from_secs_f64(bursts.arrival(seconds(first.accepted), true));
    let until = first.accepted + wait;
    engine.enqueue(first);
    while !engine.is_full() {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(job) = jobs.recv_timeout(left) else { return };
        bursts.arrival(seconds(job.accepted), false);
        engine.enqueue(job);
    }
}

/// Seconds on a steady clock of this process.
fn seconds(at: Instant) -> f64 {
    static ZERO: OnceLock<Instant> = OnceLock::new();
    at.saturating_duration_since(*ZERO.get_or_init(|| at)).as_secs_f64()
}
