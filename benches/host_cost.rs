//! The engine's own cost per step, without a model: plan, commit, sampling, text, events.
//!
//! `cargo bench --bench host_cost`. A step of N decoding sequences over a vocabulary of 49,152
//! (SmolLM2's) whose forward pass does nothing. Greedy reads every logit once; sampled filters
//! with `/generate`'s defaults, where the model is sure and where it is not.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use medusa_llama::engine::slots::KvOp;
use medusa_llama::engine::{Engine, Forward, Job, Layout, Limits, Rows, StepError};
use medusa_llama::llama::Token;
use medusa_llama::request::{Event, Request, SamplingParams};
use tokio::sync::mpsc::{self, Receiver};

const N_VOCAB: usize = 49_152;
/// Tokens of a sequence. Sequences that come to their end are replaced by new ones.
const N_CTX: usize = 1 << 16;

/// Logits that stay as they are: a heap for each row, as llama.cpp's output buffer has.
struct Still(Vec<Vec<f32>>);

impl Still {
    /// Shaped like a model's: a bell of a thousandth of the mass, and some forty likely tokens ahead of
    /// it; or, if it `is_unsure`, a bell so wide that 95% of the mass are some four thousand tokens.
    fn new(n_rows: usize, is_unsure: bool) -> Self {
        let uniform = |i: usize| {
            ((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / (1u64 << 24) as f32
        };
        let bell = |i: usize| (0..6).map(|k| uniform(i * 6 + k + 1)).sum::<f32>() - 3.0;
        let logit = |row: usize, i: usize| match i % 1229 {
            _ if is_unsure => 4.2 * bell(i + row),
            0 => 20.0 - 0.3 * ((i / 1229 + row) % 40) as f32,
            _ => 2.5 * bell(i + row),
        };
        Self((0..n_rows).map(|row| (0..N_VOCAB).map(|i| logit(row, i)).collect()).collect())
    }
}

impl Forward for Still {
    fn n_vocab(&self) -> usize {
        N_VOCAB
    }
    fn forward(&mut self, rows: &Rows) -> Result<(), StepError> {
        black_box(rows);
        Ok(())
    }
    fn logits(&self, row: usize) -> Result<&[f32], StepError> {
        Ok(&self.0[row])
    }
    fn hidden(&self, row: usize) -> Result<&[f32], StepError> {
        Err(StepError::NoLogits(row))
    }
    fn apply(&mut self, _: KvOp) -> Result<(), StepError> {
        Ok(())
    }
    fn piece(&self, _: Token, _: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(b" token");
    }
    fn is_end(&self, _: Token) -> bool {
        false
    }
}

/// An engine whose sequences all decode, and the readers of their events.
struct Decoding {
    engine: Engine<Still>,
    receivers: Vec<Receiver<Event>>,
    temperature: f32,
    /// Steps until the sequences end.
    n_left: usize,
}

impl Decoding {
    fn new(n: usize, temperature: f32, is_unsure: bool) -> Self {
        let limits = Limits {
            n_slots: n,
            n_ctx: N_CTX,
            n_batch: 512,
            n_prefill: None,
            layout: Layout::Streams { n_cells: N_CTX },
        };
        let engine = Engine::new(Still::new(n, is_unsure), limits, Default::default());
        let mut decoding = Self { engine, receivers: vec![], temperature, n_left: 0 };
        decoding.start(n);
        decoding
    }

    /// Starts `n` sequences, and takes the step that reads their prompts.
    fn start(&mut self, n: usize) {
        self.receivers.extend((0..n).map(|i| {
            let (events, receiver) = mpsc::channel(N_CTX);
            let sampling = SamplingParams {
                temperature: self.temperature,
                seed: i as u64,
                ..SamplingParams::default()
            };
            let stop = vec!["\n\n###".to_owned()];
            let request = Request { sampling, stop, ..Request::new("", N_CTX) };
            self.engine.enqueue(Job::new(vec![Token(1)], request, events));
            receiver
        }));
        self.engine.step();
        self.n_left = N_CTX - 8; // none ends by itself
    }

    /// Cancels all sequences, as clients that hang up do, and starts as many new ones.
    fn replace(&mut self) {
        let n = self.receivers.len();
        self.receivers.clear();
        while !self.engine.is_idle() {
            self.engine.step();
        }
        self.start(n);
    }

    /// Only the steps are timed; events are read in between, as the network's thread would.
    fn steps(&mut self, n: u64) -> Duration {
        let mut spent = Duration::ZERO;
        for _ in 0..n {
            if self.n_left == 0 {
                self.replace();
            }
            let start = Instant::now();
            self.engine.step();
            spent += start.elapsed();
            self.n_left -= 1;
            self.receivers.iter_mut().for_each(|r| while r.try_recv().is_ok() {});
        }
        assert!(!self.engine.is_idle(), "a sequence ended");
        spent
    }
}

fn host_cost(c: &mut Criterion) {
    let groups = [("greedy", 0.0, false), ("sampled", 0.8, false), ("sampled, unsure", 0.8, true)];
    for (name, temperature, is_unsure) in groups {
        let mut group = c.benchmark_group(name);
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(500))
            .measurement_time(Duration::from_secs(3));
        for n in [1, 8, 32] {
            let mut decoding = Decoding::new(n, temperature, is_unsure);
            group
                .bench_function(format!("{n} sequences"), |b| b.iter_custom(|n| decoding.steps(n)));
        }
    }
}

criterion_group!(benches, host_cost);
criterion_main!(benches);
