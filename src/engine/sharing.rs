//! The threads of passes on a machine that others use, too.
//!
//! Of several engines in a process, one computes at a time with more than one thread, and they take
//! turns: threads of two passes on the same cores would wait for each other after each operation.

use std::time::{Duration, Instant};

use parking_lot::{FairMutex, FairMutexGuard};

use super::thread_count::ThreadCount;
use crate::llama::Threads;
use crate::machine::{self, Watch};

/// Time between two looks at the machine.
const LOOK: Duration = Duration::from_millis(250);

/// Held by a pass of several threads.
static TURN: FairMutex<()> = FairMutex::new(());

/// Whose rows a pass has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Running sequences' only.
    Decoding,
    /// Prompts', too.
    Prompts,
}

/// Sets the number of threads of each pass.
pub struct Sharing {
    decoding: ThreadCount,
    prompts: ThreadCount,
    watch: Watch,
    started: Instant,
    looked: Option<Instant>,
    turn: Option<FairMutexGuard<'static, ()>>,
}

impl Sharing {
    /// At most so many threads for passes that decode, and for those that read prompts.
    pub fn new(n_decoding: usize, n_prompts: usize) -> Self {
        Self {
            decoding: ThreadCount::new(n_decoding),
            prompts: ThreadCount::new(n_prompts),
            watch: Watch::default(),
            started: Instant::now(),
            looked: None,
            turn: None,
        }
    }

    /// Sets the threads of the pass of `n_rows` that begins now. It waits for its turn.
    pub fn begin(&mut self, pass: Pass, n_rows: usize, threads: &Threads) {
        if self.looked.is_none_or(|at| at.elapsed() > LOOK) {
            let (most, usage) = (machine::cores(), self.watch.usage());
            self.decoding.look(most, usage);
            self.prompts.look(most, usage);
            self.looked = Some(Instant::now());
        }
        let n_threads = self.count(pass).now(n_rows);
        self.take_turn(n_threads, threads);
    }

    /// The same for a pass that is measured: nothing is tried in it, and nothing learned from it.
    pub fn begin_measured(&mut self, threads: &Threads) {
        let n_threads = self.decoding.usual();
        self.take_turn(n_threads, threads);
    }

    fn take_turn(&mut self, n_threads: usize, threads: &Threads) {
        threads.set_used(n_threads);
        self.turn = (n_threads > 1).then(|| TURN.lock());
    }

    /// Ends a pass that was measured.
    pub fn end_measured(&mut self) {
        self.turn = None;
    }

    /// Records the pass that began at `began` and ends now.
    pub fn end(&mut self, pass: Pass, n_rows: usize, began: Instant) {
        self.turn = None;
        let at = self.started.elapsed().as_secs_f64();
        self.count(pass).record(n_rows, began.elapsed().as_secs_f64(), at);
    }

    fn count(&mut self, pass: Pass) -> &mut ThreadCount {
        match pass {
            Pass::Decoding => &mut self.decoding,
            Pass::Prompts => &mut self.prompts,
        }
    }
}
