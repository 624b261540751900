//! The models of a server: which there are, which of them are loaded, and who waits for one.
//!
//! A single model is loaded at the start, answers to any name, and ends the server if it fails. Several
//! are loaded when a request names them, one at a time; what fails then fails its own requests. Before
//! a model is loaded, others are unloaded, the one first that was used longest ago, until the new one
//! fits as it was asked for. A model that is to be unloaded answers the requests that it has; new ones
//! wait until it is loaded again.

mod loaded;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Mutex as TurnMutex, watch};

use crate::engine::{self, EngineParams, EngineThread, Stage};
use crate::machine::available_memory;
pub use loaded::Loaded;

/// Time after a failed load in which requests for the model get its error, and no other attempt.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Between two looks at whether a model that is to be unloaded still answers.
const LOOK: Duration = Duration::from_millis(10);

/// Where a model comes from. Its methods may take long.
pub trait Load: Send + Sync {
    /// What its engine needs, once its files are here. `goes_on` says when to give up.
    ///
    /// # Errors
    /// Why the files are not here.
    fn prepare(&self, goes_on: &dyn Fn() -> bool) -> Result<EngineParams, String>;

    /// Looks at the files where a crash does no harm: at the headers, then at all of them.
    ///
    /// # Errors
    /// Why they cannot be loaded.
    fn try_out(
        &self,
        params: &EngineParams,
        part: Part,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<(), String>;
}

/// What is tried of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What it is, without its weights.
    Outline,
    /// All of it.
    Whole,
}

/// A model that a server has.
pub struct ModelSetup {
    /// What clients call it.
    pub id: String,
    /// Where it comes from.
    pub loader: Box<dyn Load>,
    /// The source of a chat template to use instead of the model's.
    pub template: Option<String>,
}

/// How many models may be loaded at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelLimits {
    /// At most so many.
    pub n_loaded: usize,
    /// Bytes of the host's memory for all of them; `None`: what is available at the start.
    pub memory: Option<u64>,
}

/// How far a model is.
#[derive(Clone)]
pub enum Phase {
    /// It is loaded when a request names it.
    Unloaded,
    /// It is being read: from 0 to 1.
    Loading(f32),
    /// It answers.
    Ready(Arc<Loaded>),
    /// It answers what it has, and is unloaded then.
    Leaving(Arc<Loaded>),
    /// Why it could not be loaded, or has ended, and when.
    Failed(String, Instant),
}

/// Why there is no model for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// There are several, and none was named; the names.
    Unnamed(String),
    /// There is none of this name.
    Unknown(String),
    /// It is still loading.
    Loading,
    /// It could not be loaded, and why.
    Failed(String),
    /// It has ended.
    Stopped,
    /// The server shuts down.
    Draining,
}

/// A model, loaded or not.
pub struct Entry {
    setup: ModelSetup,
    phase: watch::Sender<Phase>,
    /// When it was last asked for.
    used: Mutex<Instant>,
    engine: Mutex<Option<EngineThread>>,
    /// Requests that wait for the load that is under way. They get the model before it is unloaded:
    /// otherwise two models could be loaded in turn for ever, and answer nobody.
    n_waiting: AtomicUsize,
}

/// A request that is counted in [`Entry::n_waiting`].
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Entry {
    fn new(setup: ModelSetup) -> Self {
        let phase = watch::Sender::new(Phase::Unloaded);
        let (used, engine) = (Mutex::new(Instant::now()), Mutex::default());
        Self { setup, phase, used, engine, n_waiting: AtomicUsize::new(0) }
    }

    /// What clients call it.
    pub fn id(&self) -> &str {
        &self.setup.id
    }

    /// How far it is, now and later.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// The model, if it is loaded, also if it is about to be unloaded.
    pub fn loaded(&self) -> Option<Arc<Loaded>> {
        match &*self.phase.borrow() {
            Phase::Ready(loaded) | Phase::Leaving(loaded) => Some(Arc::clone(loaded)),
            _ => None,
        }
    }
}

/// Whether requests are taken, in the order in which that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Intake {
    /// They are.
    Open,
    /// They still are, but the end has been announced: senders should look for another server.
    Ending,
    /// They are not.
    Closed,
}

/// All models of a server.
pub struct Models {
    entries: Vec<Entry>,
    /// `None`: there is one, which is loaded at the start.
    limits: Option<ModelLimits>,
    /// Held while one is loaded.
    turn: TurnMutex<()>,
    intake: watch::Sender<Intake>,
}

impl Models {
    /// Of one model, which [`start`](Self::start) loads; or with limits of several, which are loaded
    /// when they are asked for.
    #[must_use]
    pub fn new(setups: Vec<ModelSetup>, limits: Option<ModelLimits>) -> Arc<Self> {
        let entries = setups.into_iter().map(Entry::new).collect();
        let limits = limits.map(|limits| ModelLimits {
            memory: limits.memory.or_else(available_memory),
            ..limits
        });
        let intake = watch::Sender::new(Intake::Open);
        Arc::new(Self { entries, limits, turn: TurnMutex::default(), intake })
    }

    /// All models, in their order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The model, if there is no other.
    pub fn only(&self) -> Option<&Entry> {
        self.entries.first().filter(|_| self.limits.is_none())
    }

    /// The models that are loaded.
    pub fn loaded(&self) -> Vec<Arc<Loaded>> {
        self.entries.iter().filter_map(Entry::loaded).collect()
    }

    /// Requests accepted and not yet ended.
    pub fn n_in_flight(&self) -> usize {
        self.loaded().iter().map(|model| model.handle.n_in_flight()).sum()
    }

    /// The model of a name. If it is one of several, it is loaded first.
    ///
    /// # Errors
    /// [`Unavailable`]; a single model that is loading is not waited for.
    pub async fn get(self: &Arc<Self>, name: Option<&str>) -> Result<Arc<Loaded>, Unavailable> {
        if self.intake() == Intake::Closed {
            return Err(Unavailable::Draining);
        }
        if let Some(only) = self.only() {
            return match &*only.phase.borrow() {
                Phase::Ready(loaded) => Ok(Arc::clone(loaded)),
                Phase::Failed(..) => Err(Unavailable::Stopped),
                _ => Err(Unavailable::Loading),
            };
        }
        let index = self.find(name)?;
        let entry = &self.entries[index];
        let (mut phase, mut intake) = (entry.phase(), self.intake.subscribe());
        let mut waiting = None;
        loop {
            *entry.used.lock() = Instant::now();
            self.begin(index);
            match &*phase.borrow_and_update() {
                Phase::Ready(loaded) => return Ok(Arc::clone(loaded)),
                Phase::Leaving(loaded) if waiting.is_some() => return Ok(Arc::clone(loaded)),
                Phase::Failed(why, _) => return Err(Unavailable::Failed(why.clone())),
                Phase::Loading(_) => {
                    waiting.get_or_insert_with(|| Waiting::new(&entry.n_waiting));
                }
                Phase::Unloaded | Phase::Leaving(_) => {}
            }
            tokio::select! {
                _ = phase.changed() => {}
                _ = intake.wait_for(|intake| *intake == Intake::Closed) => return Err(Unavailable::Draining),
            }
        }
    }

    /// Where there is one model, any name is its own.
    fn find(&self, name: Option<&str>) -> Result<usize, Unavailable> {
        if self.entries.len() == 1 {
            return Ok(0);
        }
        let Some(name) = name else {
            let names: Vec<&str> = self.entries.iter().map(Entry::id).collect();
            return Err(Unavailable::Unnamed(names.join(", ")));
        };
        let found = self.entries.iter().position(|entry| entry.id() == name);
        found.ok_or_else(|| Unavailable::Unknown(name.to_owned()))
    }

    /// Begins to load a single model.
    pub fn start(self: &Arc<Self>) {
        self.begin(0);
    }

    /// Begins to load a model, unless it is loaded or about to be.
    fn begin(self: &Arc<Self>, index: usize) {
        let begins = self.entries[index].phase.send_if_modified(|phase| {
            let begins = match phase {
                Phase::Unloaded => true,
                Phase::Failed(_, at) => self.limits.is_some() && at.elapsed() > RETRY_PAUSE,
                _ => false,
            };
            if begins {
                *phase = Phase::Loading(0.0);
            }
            begins
        });
        if begins {
            tokio::spawn(Arc::clone(self).load(index));
        }
    }

    /// Loads a model, and sees to it until it ends.
    async fn load(self: Arc<Self>, index: usize) {
        let entry = &self.entries[index];
        let turn = self.turn.lock().await;
        let this = Arc::clone(&self);
        let engine = engine::spawn_after(move |stop| this.prepare(index, stop));
        let mut stage = engine.stage();
        *entry.engine.lock() = Some(engine);
        let ready = loop {
            match stage.borrow_and_update().clone() {
                Stage::Loading(progress) => {
                    drop(entry.phase.send_replace(Phase::Loading(progress)))
                }
                Stage::Ready(handle) => {
                    let loaded = Loaded::new(entry.id(), *handle, entry.setup.template.clone());
                    loaded.announce();
                    break Ok(Arc::new(loaded));
                }
                Stage::Failed(why) => break Err(why),
            }
            if stage.changed().await.is_err() {
                break Err("the engine's thread ended".into());
            }
        };
        match ready {
            Err(why) => self.fail(entry, why, |phase| matches!(phase, Phase::Loading(_))),
            Ok(loaded) => {
                let this = Arc::downgrade(&loaded);
                entry.phase.send_replace(Phase::Ready(loaded));
                drop(turn);
                let ended = stage.wait_for(|stage| matches!(stage, Stage::Failed(_))).await;
                let why = match ended.as_deref() {
                    Ok(Stage::Failed(why)) => why.clone(),
                    _ => "the engine's thread ended".into(),
                };
                // Else it was unloaded.
                self.fail(entry, why, |phase| {
                    matches!(phase, Phase::Ready(loaded) if Arc::as_ptr(loaded) == this.as_ptr())
                });
            }
        }
    }

    /// Records why a model has ended, if it is in the phase that it ended in.
    fn fail(&self, entry: &Entry, why: String, is_own: impl FnOnce(&Phase) -> bool) {
        let failed = entry.phase.send_if_modified(|phase| {
            let is_own = is_own(phase);
            if is_own {
                *phase = Phase::Failed(why.clone(), Instant::now());
            }
            is_own
        });
        if failed {
            entry.engine.lock().take();
            if self.limits.is_some() && self.intake() != Intake::Closed {
                tracing::error!(model = entry.id(), "{why}");
            }
        }
    }

    /// Makes room for a model, and looks at its files. Runs on its engine's thread.
    fn prepare(&self, index: usize, stop: &AtomicBool) -> Result<EngineParams, String> {
        let goes_on = || !stop.load(Ordering::Relaxed) && self.intake() != Intake::Closed;
        let entry = &self.entries[index];
        let mut params = entry.setup.loader.prepare(&goes_on)?;
        let Some(limits) = self.limits else { return Ok(params) };
        tracing::info!(model = entry.id(), "loading {}", params.model_path.display());
        entry.setup.loader.try_out(&params, Part::Outline, &goes_on)?;
        loop {
            let loaded = self.loaded();
            let taken = |model: &Arc<Loaded>| model.handle.host_memory;
            let taken: u64 = loaded.iter().map(taken).sum();
            params.memory = limits.memory.map(|memory| memory.saturating_sub(taken));
            params.prefixes = params.prefixes.beside_others();
            let is_full = loaded.len() >= limits.n_loaded;
            if loaded.is_empty() || (!is_full && engine::fits(&params)?) {
                break;
            }
            drop(loaded);
            self.unload_oldest(&goes_on)?;
        }
        entry.setup.loader.try_out(&params, Part::Whole, &goes_on)?;
        Ok(params)
    }

    /// Unloads the model that was used longest ago, once it has answered.
    fn unload_oldest(&self, goes_on: &dyn Fn() -> bool) -> Result<(), String> {
        let is_ready = |entry: &&Entry| matches!(*entry.phase.borrow(), Phase::Ready(_));
        let ready = self.entries.iter().filter(is_ready);
        let oldest = ready.min_by_key(|entry| *entry.used.lock());
        oldest.map_or(Ok(()), |entry| unload(entry, goes_on))
    }

    /// Tells that the end is near. Requests are still taken.
    pub fn announce_end(&self) {
        self.set_intake(Intake::Ending);
    }

    /// Refuses new requests from now on, also those that wait for a model.
    pub fn close(&self) {
        self.set_intake(Intake::Closed);
    }

    /// Whether requests are taken.
    pub fn intake(&self) -> Intake {
        *self.intake.borrow()
    }

    /// There is no way back.
    fn set_intake(&self, to: Intake) {
        self.intake.send_if_modified(|intake| {
            let changes = *intake < to;
            *intake = to.max(*intake);
            changes
        });
    }

    /// Ends all engines after their current steps, whatever still runs. Blocks.
    pub fn stop(&self) {
        self.close();
        let engines = self.entries.iter().filter_map(|entry| entry.engine.lock().take());
        engines.for_each(EngineThread::stop);
    }
}

/// Unloads a model, once it has answered. It stays if that is not to go on.
fn unload(entry: &Entry, goes_on: &dyn Fn() -> bool) -> Result<(), String> {
    let leaves = |phase: &mut Phase| {
        let Phase::Ready(model) = phase else { return false };
        *phase = Phase::Leaving(Arc::clone(model));
        true
    };
    if !entry.phase.send_if_modified(leaves) {
        return Ok(());
    }
    tracing::info!(model = entry.id(), "unloading");
    while is_busy(entry) {
        if !goes_on() {
            entry.phase.send_if_modified(|phase| {
                let Phase::Leaving(model) = phase else { return false };
                *phase = Phase::Ready(Arc::clone(model));
                true
            });
            return Err("the server shuts down".into());
        }
        sleep(LOOK);
    }
    if let Some(engine) = entry.engine.lock().take() {
        engine.stop();
    }
    entry.phase.send_replace(Phase::Unloaded);
    Ok(())
}

/// Whether anything uses a model that is about to be unloaded.
fn is_busy(entry: &Entry) -> bool {
    match &*entry.phase.borrow() {
        Phase::Leaving(model) => {
            entry.n_waiting.load(Ordering::Acquire) > 0
                || Arc::strong_count(model) > 1
                || model.handle.n_in_flight() > 0
        }
        _ => false,
    }
}
