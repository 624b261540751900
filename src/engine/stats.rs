//! What the engine counts while it works, for anyone to read.
//!
//! One thread writes, others read at any time. All of it is atomics, so that a step neither
//! allocates nor locks for what it counts here; only [`Reliability`] is copied out under a lock,
//! once a step. [`metrics`](crate::metrics) gives these counts their names.

use std::array;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::request::Timings;
use crate::speculate::MAX_NODES;
use crate::speculate::reliability::Reliability;

/// Upper bounds, in seconds, for what comes once a step: from a small model's step on a quick
/// machine to a stall that one notices.
const STEP_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0, 40.0,
];
/// Upper bounds, in seconds, for what comes once a request: from a cached prompt to minutes in a
/// queue. As vLLM's for the first token.
const REQUEST_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Upper bounds for rows of a step: powers of two up to the largest batch.
const ROWS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By the model's end of text, or at a stop string.
    Stop,
    /// At its most tokens, or the context's end.
    Length,
    /// Its time was over.
    Deadline,
    /// Its client went away.
    Cancelled,
    /// The engine failed.
    Failed,
}

impl Ended {
    /// All of them, in order.
    pub const ALL: [Self; 5] =
        [Self::Stop, Self::Length, Self::Deadline, Self::Cancelled, Self::Failed];
}

/// What a client waited for, when a step gives it tokens.
#[derive(Clone, Copy, Debug)]
pub enum Waited {
    /// The first token, since acceptance; and so many tokens of prompt.
    First(f64, usize),
    /// The next one, since the last.
    Next(f64),
}

/// Observations by size. Written and read without a lock.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// By bound; the last one is for what is above all of them.
    counts: Box<[AtomicU64]>,
    /// An `f64` as bits.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let add = |sum: u64| Some((f64::from_bits(sum) + value).to_bits());
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add); // never refused
    }

    /// The sum of all observations, and how many there are up to each bound and above the one
    /// before; the last bound is infinite.
    #[must_use]
    pub fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        (f64::from_bits(self.sum.load(Ordering::Relaxed)), bounds.zip(counts).collect())
    }
}

/// Counters that anyone may read; the engine writes them as it goes.
#[derive(Debug)]
pub struct Stats {
    running: AtomicUsize,
    waiting: AtomicUsize,
    cells_active: AtomicUsize,
    cells_retained: AtomicUsize,
    steps: AtomicU64,
    tokens: AtomicU64,
    prompt_tokens: AtomicU64,
    prefix_queries: AtomicU64,
    prefix_hits: AtomicU64,
    offered: AtomicU64,
    chosen: AtomicU64,
    drafts: AtomicU64,
    drafted: AtomicU64,
    accepted: [AtomicU64; MAX_NODES],
    /// Tokens that the longest path of a draft can have.
    deepest: AtomicUsize,
    ended: [AtomicU64; Ended::ALL.len()],
    /// Rows of each step.
    pub rows: Histogram,
    /// Seconds from acceptance to the first token.
    pub first_token: Histogram,
    /// Seconds from one step that gave a request tokens to the next.
    pub inter_token: Histogram,
    /// Seconds a token, in the mean of each complete answer of two or more.
    pub per_token: Histogram,
    /// Of complete answers, seconds from acceptance to the first step with a row of theirs.
    pub queue: Histogram,
    /// Of complete answers, from there to the first token.
    pub prefill: Histogram,
    /// Of complete answers, from the first token to the last.
    pub decode: Histogram,
    /// Of complete answers, from acceptance to the last token.
    pub end_to_end: Histogram,
    /// Locked once a step.
    reliability: Mutex<Reliability>,
}

/// The counters at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Sequences that run.
    pub running: usize,
    /// Requests that wait for a place.
    pub waiting: usize,
    /// KV cells that running sequences hold.
    pub cells_active: usize,
    /// KV cells kept for later prompts.
    pub cells_retained: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Tokens generated since the start.
    pub tokens: u64,
    /// Tokens of prompts that were read to their end, those from the cache included.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were looked for in the cache.
    pub prefix_queries: u64,
    /// Those of them that were there.
    pub prefix_hits: u64,
    /// Candidates that were drafted.
    pub offered: u64,
    /// Those of them that were worth a row.
    pub chosen: u64,
    /// Times that a sequence had candidates to verify.
    pub drafts: u64,
    /// Candidates verified.
    pub drafted: u64,
    /// Candidates accepted, by place behind the sequence's last token.
    pub accepted: [u64; MAX_NODES],
    /// The first so many of these can be other than 0.
    pub deepest: usize,
    /// Requests that ended, in the order of [`Ended::ALL`].
    pub ended: [u64; Ended::ALL.len()],
}

impl Default for Stats {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        let number = || AtomicUsize::new(0);
        let (of_steps, of_requests) =
            (|| Histogram::new(STEP_SECONDS), || Histogram::new(REQUEST_SECONDS));
        Self {
            running: number(),
            waiting: number(),
            cells_active: number(),
            cells_retained: number(),
            steps: zero(),
            tokens: zero(),
            prompt_tokens: zero(),
            prefix_queries: zero(),
            prefix_hits: zero(),
            offered: zero(),
            chosen: zero(),
            drafts: zero(),
            drafted: zero(),
            accepted: array::from_fn(|_| zero()),
            deepest: number(),
            ended: array::from_fn(|_| zero()),
            rows: Histogram::new(ROWS),
            first_token: of_requests(),
            inter_token: of_steps(),
            per_token: of_steps(),
            queue: of_requests(),
            prefill: of_requests(),
            decode: of_requests(),
            end_to_end: of_requests(),
            reliability: Mutex::default(),
        }
    }
}

impl Stats {
    pub(super) fn publish(
        &self,
        running: usize,
        waiting: usize,
        cells_active: usize,
        cells_retained: usize,
    ) {
        self.running.store(running, Ordering::Relaxed);
        self.waiting.store(waiting, Ordering::Relaxed);
        self.cells_active.store(cells_active, Ordering::Relaxed);
        self.cells_retained.store(cells_retained, Ordering::Relaxed);
        add(&self.steps, 1);
    }

    pub(super) fn publish_reliability(&self, reliability: &Reliability) {
        self.reliability.lock().clone_from(reliability);
    }

    /// Notes how long the longest path of a draft can be.
    pub(super) fn set_deepest(&self, deepest: usize) {
        self.deepest.store(deepest.min(MAX_NODES), Ordering::Relaxed);
    }

    pub(super) fn count_token(&self) {
        add(&self.tokens, 1);
    }

    /// Notes the rows of a step.
    pub(super) fn note_rows(&self, n: usize) {
        self.rows.observe(n as f64);
    }

    /// Notes that a prompt was looked for in the cache, and what of it was there.
    pub(super) fn count_prefix(&self, n_prompt: usize, n_cached: usize) {
        add(&self.prefix_queries, n_prompt);
        add(&self.prefix_hits, n_cached);
    }

    /// Notes the candidates of a step, and how many of them were worth a row.
    pub(super) fn count_candidates(&self, offered: usize, chosen: usize) {
        add(&self.offered, offered);
        add(&self.chosen, chosen);
    }

    /// Notes that `n` candidates of one sequence were computed.
    pub(super) fn count_draft(&self, n: usize) {
        add(&self.drafts, usize::from(n > 0));
        add(&self.drafted, n);
    }

    /// Notes an accepted candidate, `depth` tokens behind its sequence's last one.
    pub(super) fn count_accepted(&self, depth: usize) {
        add(&self.accepted[depth.clamp(1, MAX_NODES) - 1], 1);
    }

    /// Notes that a step gives tokens to a request that waited for them.
    pub(super) fn note_wait(&self, waited: Waited) {
        match waited {
            Waited::First(seconds, n_prompt) => {
                self.first_token.observe(seconds);
                add(&self.prompt_tokens, n_prompt);
            }
            Waited::Next(seconds) => self.inter_token.observe(seconds),
        }
    }

    /// Notes that a request ended before its answer was complete.
    pub(super) fn count_end(&self, ended: Ended) {
        add(&self.ended[ended as usize], 1);
    }

    /// Notes a complete answer of `n` tokens.
    pub(super) fn note_answer(&self, ended: Ended, timings: Timings, n: usize) {
        self.count_end(ended);
        self.queue.observe(timings.queue_s);
        self.prefill.observe(timings.prefill_s);
        self.decode.observe(timings.decode_s);
        self.end_to_end.observe(timings.queue_s + timings.prefill_s + timings.decode_s);
        if n > 1 {
            self.per_token.observe(timings.decode_s / (n - 1) as f64);
        }
    }

    /// All counts but the histograms.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let (number, count) = (
            |n: &AtomicUsize| n.load(Ordering::Relaxed),
            |n: &AtomicU64| n.load(Ordering::Relaxed),
        );
        Snapshot {
            running: number(&self.running),
            waiting: number(&self.waiting),
            cells_active: number(&self.cells_active),
            cells_retained: number(&self.cells_retained),
            steps: count(&self.steps),
            tokens: count(&self.tokens),
            prompt_tokens: count(&self.prompt_tokens),
            prefix_queries: count(&self.prefix_queries),
            prefix_hits: count(&self.prefix_hits),
            offered: count(&self.offered),
            chosen: count(&self.chosen),
            drafts: count(&self.drafts),
            drafted: count(&self.drafted),
            accepted: array::from_fn(|i| count(&self.accepted[i])),
            deepest: number(&self.deepest),
            ended: array::from_fn(|i| count(&self.ended[i])),
        }
    }

    /// Whether candidates were right as often as was said.
    #[must_use]
    pub fn reliability(&self) -> Reliability {
        self.reliability.lock().clone()
    }
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_is_counted_up_to_the_first_bound_that_holds_it() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 3.0].into_iter().for_each(|value| histogram.observe(value));
        assert_eq!(histogram.read(), (6.0, vec![(1.0, 2), (2.0, 1), (f64::INFINITY, 1)]));
    }

    #[test]
    fn an_answer_of_one_token_has_no_pace() {
        let stats = Stats::default();
        stats.note_answer(Ended::Length, Timings::default(), 1);
        stats.note_answer(Ended::Stop, Timings { decode_s: 2.0, ..Timings::default() }, 5);
        assert_eq!((stats.per_token.read().0, stats.snapshot().ended), (0.5, [1, 1, 0, 0, 0]));
    }
}
