//! What the engine counts; `/metrics` shows it. One thread writes, others read at any time.
//!
//! Counters are atomics, so that counting neither allocates nor locks. Only [`Reliability`] and the
//! start of the pass are locked, once or twice a step.

use std::fmt::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::request::{FinishReason, Timings};
use crate::speculate::MAX_NODES;
use crate::speculate::reliability::Reliability;

/// Upper bounds, in seconds, for what comes once a step: from a small model's step to a stall.
const STEP_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0, 40.0,
];
/// Upper bounds, in seconds, for what comes once a request: vLLM's for the first token.
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
    /// Its grammar could not be followed any further.
    Grammar,
    /// Its client went away.
    Cancelled,
    /// The engine failed.
    Failed,
}

impl Ended {
    const ALL: [Self; 6] =
        [Self::Stop, Self::Length, Self::Deadline, Self::Grammar, Self::Cancelled, Self::Failed];
}

impl From<&FinishReason> for Ended {
    fn from(reason: &FinishReason) -> Self {
        match reason {
            FinishReason::EndOfText | FinishReason::StopString(_) | FinishReason::StopToken(_) => {
                Self::Stop
            }
            FinishReason::Length => Self::Length,
            FinishReason::Deadline => Self::Deadline,
            FinishReason::Grammar(_) => Self::Grammar,
        }
    }
}

/// Counters by one label.
type Labelled<V> = Family<[(&'static str, V); 1], Counter>;

/// Declares [`Stats`]. A metric is one entry: its help (which documents the field), its field, its
/// type, its name after `medusa_llama:`, and a histogram's bounds.
macro_rules! stats {
    (@new) => { Default::default() };
    (@new $bounds:expr) => { Histogram::new($bounds) };
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ty = $name:literal $([$bounds:expr])?;)+) => {
        /// Counters that anyone may read; the engine writes them as it goes.
        #[derive(Debug)]
        pub struct Stats {
            $($(#[doc = $help])+ pub $field: $kind,)+
            /// KV cells that running sequences hold.
            pub cells_active: Gauge,
            /// KV cells kept for later prompts.
            pub cells_retained: Gauge,
            /// `accepted_by_depth`'s counters, from depth 1.
            by_depth: OnceLock<Vec<Counter>>,
            pub(super) reliability: Mutex<Reliability>,
            /// When the pass in progress began; `None` between two passes.
            pub(super) pass_began: Mutex<Option<Instant>>,
        }

        impl Default for Stats {
            fn default() -> Self {
                let stats = Self {
                    $($field: stats!(@new $($bounds)?),)+
                    cells_active: Gauge::default(),
                    cells_retained: Gauge::default(),
                    by_depth: OnceLock::new(),
                    reliability: Mutex::default(),
                    pass_began: Mutex::default(),
                };
                // Every series exists from the start, at 0.
                Ended::ALL.into_iter().for_each(|ended| stats.count_ends(ended, 0));
                stats
            }
        }

        impl Stats {
            /// Registers every named metric.
            pub fn register(&self, registry: &mut Registry) {
                $(registry.register(
                    concat!("medusa_llama:", $name),
                    concat!($($help),+).trim_start(),
                    self.$field.clone(),
                );)+
            }
        }
    };
}

stats! {
    /// Requests that the engine works on
    running: Gauge = "num_requests_running";
    /// Requests that wait for a slot
    waiting: Gauge = "num_requests_waiting";
    /// Steps of the engine, each one forward pass
    steps: Counter = "steps";
    /// Complete answers, by what ended them
    success: Labelled<&'static str> = "request_success";
    /// Requests without a complete answer, by who ended them
    failures: Labelled<&'static str> = "request_failures";
    /// Tokens of prompts read, cached ones included
    prompt_tokens: Counter = "prompt_tokens";
    /// Tokens generated
    tokens: Counter = "generation_tokens";
    /// Tokens of prompts looked for in the cache
    prefix_queries: Counter = "prefix_cache_queries";
    /// Tokens of prompts found in the cache
    prefix_hits: Counter = "prefix_cache_hits";
    /// Tokens of those found that were not in the cache but kept beside it, by where
    restored: Labelled<&'static str> = "prefix_cache_restored";
    /// Blocks of tokens saved beside the cache
    blocks_saved: Counter = "prefix_blocks_saved";
    /// Blocks that were written to the prefix store
    blocks_written: Counter = "prefix_blocks_written";
    /// Blocks of the prefix store, and in memory, that could not be used
    blocks_skipped: Counter = "prefix_blocks_skipped";
    /// Bytes of the blocks in memory
    blocks_memory: Gauge = "prefix_memory_bytes";
    /// Bytes of the blocks in the prefix store, as far as this server knows
    blocks_store: Gauge = "prefix_store_bytes";
    /// Candidates that heads and text offered
    offered: Counter = "draft_candidates_offered";
    /// Candidates that were worth a row
    chosen: Counter = "draft_candidates_chosen";
    /// Trees of candidates verified
    drafts: Counter = "spec_decode_num_drafts";
    /// Candidates verified
    drafted: Counter = "spec_decode_num_draft_tokens";
    /// Candidates accepted
    accepted: Counter = "spec_decode_num_accepted_tokens";
    /// Candidates accepted, by distance from the last token, from 0
    accepted_by_depth: Labelled<u64> = "spec_decode_num_accepted_tokens_per_pos";
    /// Rows (tokens) of a step: running requests', prompts' and candidates'
    rows: Histogram = "rows_per_step" [ROWS];
    /// Seconds from acceptance to the first token
    first_token: Histogram = "time_to_first_token_seconds" [REQUEST_SECONDS];
    /// Seconds between two steps that gave a request tokens; with drafts a step can give several
    inter_token: Histogram = "inter_token_latency_seconds" [STEP_SECONDS];
    /// Mean seconds per token of a complete answer after its first token
    per_token: Histogram = "request_time_per_output_token_seconds" [STEP_SECONDS];
    /// Seconds from acceptance to the first step, of complete answers
    queue: Histogram = "request_queue_time_seconds" [REQUEST_SECONDS];
    /// Seconds from the first step to the first token, of complete answers
    prefill: Histogram = "request_prefill_time_seconds" [REQUEST_SECONDS];
    /// Seconds from the first token to the last, of complete answers
    decode: Histogram = "request_decode_time_seconds" [REQUEST_SECONDS];
    /// Seconds from acceptance to the last token, of complete answers
    end_to_end: Histogram = "e2e_request_latency_seconds" [REQUEST_SECONDS];
}

impl Stats {
    /// Sets how long the longest path of a draft can be.
    pub(super) fn set_deepest(&self, deepest: usize) {
        let counter =
            |i: usize| self.accepted_by_depth.get_or_create_owned(&[("position", i as u64)]);
        self.by_depth.get_or_init(|| (0..deepest.min(MAX_NODES)).map(counter).collect());
    }

    /// How long the pass in progress has taken so far; `None` between two passes.
    pub fn pass_elapsed(&self) -> Option<Duration> {
        self.pass_began.lock().map(|began| began.elapsed())
    }

    /// Counts an accepted candidate, `depth` tokens after its sequence's last one.
    pub(super) fn count_accepted(&self, depth: usize) {
        self.accepted.inc();
        if let Some(counter) = self.by_depth.get().and_then(|all| all.get(depth - 1)) {
            counter.inc();
        }
    }

    /// Counts a request that ended before its answer was complete.
    pub(super) fn count_end(&self, ended: Ended) {
        self.count_ends(ended, 1);
    }

    fn count_ends(&self, ended: Ended, n: u64) {
        let (family, label) = match ended {
            Ended::Stop => (&self.success, ("finished_reason", "stop")),
            Ended::Length => (&self.success, ("finished_reason", "length")),
            Ended::Deadline => (&self.failures, ("reason", "deadline")),
            Ended::Grammar => (&self.failures, ("reason", "grammar")),
            Ended::Cancelled => (&self.failures, ("reason", "cancelled")),
            Ended::Failed => (&self.failures, ("reason", "engine")),
        };
        family.get_or_create(&[label]).inc_by(n);
    }

    /// Counts a complete answer of `n` tokens.
    pub(super) fn record_answer(&self, ended: Ended, timings: Timings, n: usize) {
        self.count_end(ended);
        self.queue.observe(timings.queue_s);
        self.prefill.observe(timings.prefill_s);
        self.decode.observe(timings.decode_s);
        self.end_to_end.observe(timings.queue_s + timings.prefill_s + timings.decode_s);
        if n > 1 {
            self.per_token.observe(timings.decode_s / (n - 1) as f64);
        }
    }

    /// Whether candidates were accepted as often as predicted.
    pub fn reliability(&self) -> Reliability {
        self.reliability.lock().clone()
    }
}

/// A histogram whose observations take no lock, unlike `prometheus_client`'s.
#[derive(Clone, Debug)]
pub struct Histogram(Arc<Buckets>);

#[derive(Debug)]
struct Buckets {
    bounds: &'static [f64],
    /// By bound; the last one counts what is above all bounds.
    counts: Box<[AtomicU64]>,
    /// An `f64` as bits.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Buckets { bounds, counts, sum: AtomicU64::new(0) }))
    }

    pub(super) fn observe(&self, value: f64) {
        let bucket = self.0.bounds.partition_point(|&bound| bound < value);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let add = |sum: u64| Some((f64::from_bits(sum) + value).to_bits());
        let _ = self.0.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add); // never refused
    }

    /// The sum of all observations, and their number up to each bound and above the one before; the
    /// last bound is infinite.
    fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let bounds = self.0.bounds.iter().copied().chain([f64::INFINITY]);
        let counts = self.0.counts.iter().map(|count| count.load(Ordering::Relaxed));
        (f64::from_bits(self.0.sum.load(Ordering::Relaxed)), bounds.zip(counts).collect())
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), Error> {
        let (sum, buckets) = self.read();
        let count = buckets.iter().map(|(_, n)| n).sum();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
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
        stats.record_answer(Ended::Length, Timings::default(), 1);
        stats.record_answer(Ended::Stop, Timings { decode_s: 2.0, ..Timings::default() }, 5);
        let ended = |reason| stats.success.get(&[("finished_reason", reason)]).unwrap().get();
        assert_eq!((stats.per_token.read().0, ended("stop"), ended("length")), (0.5, 1, 1));
        let failed = stats.failures.get(&[("reason", "engine")]).unwrap().get();
        assert_eq!(failed, 0, "there from the start");
    }

    #[test]
    fn a_pass_is_timed_until_it_ends() {
        let stats = Stats::default();
        assert_eq!(stats.pass_elapsed(), None);
        *stats.pass_began.lock() = Some(Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        assert!(stats.pass_elapsed() > Some(Duration::from_millis(1)));
        *stats.pass_began.lock() = None;
        assert_eq!(stats.pass_elapsed(), None);
    }
}
