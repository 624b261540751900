//! Threads that read requests before the engine does: tokenising a long prompt or compiling a large
//! grammar takes up to seconds. Short prompts never wait for either, and the engine's steps keep
//! the cores. Knows nothing of what is read.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::oneshot;

/// A kind of work, which has a thread of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Bodies and prompts that take less than a step.
    Short,
    /// Longer ones, one after another.
    Long,
    /// Grammars, with their requests' prompts.
    Grammar,
}

impl Lane {
    const ALL: [Self; 3] = [Self::Short, Self::Long, Self::Grammar];

    fn name(self) -> &'static str {
        match self {
            Self::Short => "prompts",
            Self::Long => "long-prompts",
            Self::Grammar => "grammars",
        }
    }

    /// How far its thread gives way to others: at 10 a busy core leaves it a tenth.
    fn nice(self) -> i32 {
        match self {
            Self::Short => 0,
            Self::Long => 10,
            Self::Grammar => 5,
        }
    }
}

/// Bytes of stack of each thread: the recursion of llama.cpp and llguidance follows what they read.
/// Only what is used becomes memory.
const STACK: usize = 256 << 20;

type Work = Box<dyn FnOnce() + Send>;

/// The threads. They end when this is dropped and their work is done.
pub struct Lanes([Sender<Work>; Lane::ALL.len()]);

impl Lanes {
    /// Starts them.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start() -> std::io::Result<Self> {
        let [a, b, c] = Lane::ALL.map(|lane| {
            let (sender, receiver) = channel();
            let thread = std::thread::Builder::new().name(lane.name().into()).stack_size(STACK);
            thread.spawn(move || serve(lane, &receiver)).map(|_| sender)
        });
        Ok(Self([a?, b?, c?]))
    }

    /// Does `work` on a lane's thread, in the order of calls. It is not begun once the caller has
    /// left. `None` if it panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, done) = oneshot::channel();
        let work = move || {
            if !sender.is_closed() {
                let _ = sender.send(work());
            }
        };
        self.0[lane as usize].send(Box::new(work)).ok()?;
        done.await.ok()
    }
}

fn serve(lane: Lane, works: &Receiver<Work>) {
    give_way(lane.nice());
    while let Ok(work) = works.recv() {
        // What waited for it is told by the channel; the panic itself was logged.
        let _ = catch_unwind(AssertUnwindSafe(work));
    }
}

/// Lowers this thread's priority.
fn give_way(nice: i32) {
    #[cfg(target_os = "linux")]
    if nice > 0 {
        let thread = rustix::thread::gettid();
        if let Err(error) = rustix::process::setpriority_process(Some(thread), nice) {
            tracing::debug!(%error, "this thread keeps its priority");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nice; // elsewhere a priority is the whole process's
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn short_work_passes_long_work_and_what_nobody_waits_for_is_left() {
        let lanes = Arc::new(Lanes::start().unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (open, gate) = std::sync::mpsc::channel::<()>();
            let held = Arc::clone(&lanes);
            let (begin, begun) = oneshot::channel();
            let work = move || {
                begin.send(()).unwrap();
                gate.recv()
            };
            let long = tokio::spawn(async move { held.run(Lane::Long, work).await });
            begun.await.unwrap();
            let left = lanes.run(Lane::Long, || panic!("its caller has left"));
            assert!(tokio::time::timeout(Duration::from_millis(20), left).await.is_err());
            assert_eq!(lanes.run(Lane::Short, || 1).await, Some(1));
            assert_eq!(lanes.run(Lane::Grammar, || 2).await, Some(2));
            open.send(()).unwrap();
            long.await.unwrap().unwrap().unwrap();
            assert_eq!(lanes.run(Lane::Long, || -> u8 { panic!("as it must") }).await, None);
            assert_eq!(lanes.run(Lane::Long, || 3).await, Some(3), "the thread goes on");
        });
    }
}
