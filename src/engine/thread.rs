//! The engine's thread: it loads the model, measures the machine, and runs the loop until no
//! handle is left.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::bursts::Bursts;
use super::forward::LlamaForward;
use super::handle::Handle;
use super::lanes::Lanes;
use super::leaves::DraftShape;
use super::load::{EngineParams, Prepared, StartError, arithmetic, files, load, n_ids};
use super::rate::Rate;
use super::stats::Stats;
use super::{Engine, Forward, Job, drafts, prefix};
use crate::llama::SeqId;

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
