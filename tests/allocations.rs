//! In the steady state a step allocates memory for the pieces that it sends, and a few times for
//! itself: never for a row, a candidate or a sequence.
#![allow(missing_docs, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use medusa_llama::engine::slots::KvOp;
use medusa_llama::engine::{Engine, Forward, Job, Layout, Limits, Rows, StepError};
use medusa_llama::llama::Token;
use medusa_llama::request::{Event, Request, SamplingParams};
use medusa_llama::speculate::calibration::Calibration;
use medusa_llama::speculate::cost::Cost;
use medusa_llama::speculate::text::TextDrafts;
use medusa_llama::speculate::{Draft, Origin, Speculator, Tree, Worth};
use tokio::sync::mpsc::{self, Receiver};

/// The system's, counted.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: MemoryLayout) {
        // SAFETY: `at` came from `alloc` above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: MemoryLayout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `at` came from `alloc` above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const N_VOCAB: usize = 4096;
const N_CTX: usize = 1 << 16;

/// A model whose texts go round in circles of eight tokens, so that text drafts are right, with a
/// little noise.
#[derive(Default)]
struct Circles {
    logits: Vec<Vec<f32>>,
    n_rows: usize,
}

impl Forward for Circles {
    fn n_vocab(&self) -> usize {
        N_VOCAB
    }

    fn forward(&mut self, rows: &Rows) -> Result<(), StepError> {
        self.n_rows = rows.len();
        self.logits.resize_with(rows.len().max(self.logits.len()), || vec![0.0; N_VOCAB]);
        for (logits, row) in self.logits.iter_mut().zip(rows.iter()) {
            logits.fill(0.0);
            logits[1 + row.pos % 8 + 8 * usize::from(row.pos % 61 == 0)] = 9.0;
        }
        Ok(())
    }

    fn logits(&self, row: usize) -> Result<&[f32], StepError> {
        Ok(&self.logits[..self.n_rows][row])
    }

    fn hidden(&self, _: usize) -> Result<&[f32], StepError> {
        Ok(&[0.5; 4])
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

/// Heads that offer the same candidates at every place.
struct Same;

impl Draft for Same {
    fn n_heads(&self) -> usize {
        1
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        _: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        for (origin, tree) in origins.iter().zip(trees).filter(|(o, _)| o.heads.max_depth > 0) {
            let q = calibration.estimate(1, 0, 0.5, origin.heads.trust);
            tree.push(None, Token(3), 0.5, q);
            tree.push(
                None,
                Token(4),
                0.3,
                calibration.estimate(1, 1, 0.3, origin.heads.trust).min(q),
            );
        }
    }
}

/// Allocations and pieces of some steps of `n` sequences.
fn counted(n: usize, temperature: f32) -> (usize, usize, usize) {
    const STEPS: usize = 200;
    let layout = Layout::Unified { n_cells: n * N_CTX, n_retained: 0, n_seqs: n };
    let limits = Limits { n_slots: n, n_ctx: N_CTX, n_batch: 512, n_prefill: None, layout };
    let mut engine = Engine::new(Circles::default(), limits, Default::default());
    let cost = Cost::from_points(&[(1, 1.0), (64, 2.0)]);
    let mut speculator = Speculator::new(Some(Box::new(Same)), 9, cost);
    speculator.text = Some(TextDrafts::new(1, 1 << 12));
    engine.speculate(speculator, 256);
    let mut receivers: Vec<Receiver<Event>> = (0..n)
        .map(|i| {
            let (events, receiver) = mpsc::channel(N_CTX);
            let sampling =
                SamplingParams { temperature, seed: i as u64, ..SamplingParams::default() };
            let request = Request { sampling, stop: vec!["###".into()], ..Request::new("", N_CTX) };
            engine.enqueue(Job::new(vec![Token(1)], request, events));
            receiver
        })
        .collect();
    let mut read = || -> usize {
        receivers.iter_mut().map(|r| std::iter::from_fn(|| r.try_recv().ok()).count()).sum()
    };
    // Buffers grow to the sizes that they keep.
    (0..300).for_each(|_| engine.step());
    read();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..STEPS).for_each(|_| engine.step());
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert!(!engine.is_idle());
    (allocations, read(), STEPS)
}

#[test]
fn a_step_allocates_for_what_it_sends_and_not_for_rows() {
    for temperature in [0.0, 0.8] {
        let (one, many) = (counted(1, temperature), counted(16, temperature));
        for (allocations, pieces, steps) in [one, many] {
            assert!(pieces > 2 * steps, "drafts are verified: {pieces} pieces in {steps} steps");
            // A piece is a string, and the channel takes a block for every 32; amortised growth of
            // the tokens is rare.
            let more = allocations.saturating_sub(pieces + pieces / 16);
            assert!(
                more <= 4 * steps,
                "{allocations} allocations for {pieces} pieces in {steps} steps"
            );
        }
    }
}
