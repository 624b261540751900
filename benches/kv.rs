//! What the cache's bookkeeping takes beside a forward pass: 16,384 cells, 32 sequences, trees of
//! several leaves.
//!
//! `cargo bench --bench kv` (needs the default model; some minutes on two cores, most of them to
//! fill the cache; with `-- --test` a small cache and one step, to see that it runs). Prints, for trees of 1, 2 and 7 leaves, the microseconds of llama.cpp's
//! sequence operations before and after a step, by the operations that the engine makes of them,
//! and the milliseconds of the step between.
#![allow(missing_docs)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use medusa_llama::config::DEFAULT_MODEL;
use medusa_llama::engine::leaves::Leaves;
use medusa_llama::engine::slots::KvOp;
use medusa_llama::engine::{Forward, LlamaForward, Rows, StepError};
use medusa_llama::llama::{Context, ContextParams, Model, Placement, SeqId, Token, max_sequences};

const N_SLOTS: usize = 32;
const N_CELLS: usize = 16_384;
const N_BATCH: usize = 512;

fn main() -> Result<(), StepError> {
    let short = std::env::args().any(|arg| arg == "--test");
    // Tokens of a sequence before anything is timed (the cache is nearly full), and steps.
    let (n_tokens, n_steps) = if short { (4, 1) } else { (420, 12) };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_MODEL);
    let model = Arc::new(Model::load(&path, &Placement::default(), |_| true)?);
    let n_ids = max_sequences();
    let one = ContextParams::of_one_sequence(N_CELLS, N_BATCH, 2);
    let params = ContextParams { n_seq_max: n_ids, ..one };
    let mut forward = LlamaForward::new(Context::new(model, &params)?);
    let mut rows = Rows::default();
    for slot in 0..N_SLOTS {
        rows.clear();
        (0..n_tokens).for_each(|pos| rows.push(token(slot, pos), pos, [SeqId(slot as u32)], false));
        forward.forward(&rows)?;
    }
    println!("{N_SLOTS} sequences of {n_tokens} tokens in {N_CELLS} cells, {n_ids} ids");
    println!("leaves   ops before   us before   step ms   ops after   us after");
    let mut n_cached = n_tokens;
    for n_leaves in [1, 2, 7] {
        let mut leaves = Leaves::new(N_SLOTS, n_ids, N_SLOTS);
        let mut sums = [0.0; 5];
        for step in 0..=n_steps {
            let one = timed_step(&mut forward, &mut leaves, n_leaves, n_cached)?;
            n_cached += 2;
            if step > 0 {
                // The first one puts the ids on all that is cached.
                sums.iter_mut().zip(one).for_each(|(sum, x)| *sum += x / n_steps as f64);
            }
        }
        let [before, before_us, step_ms, after, after_us] = sums;
        println!(
            "{n_leaves:6}   {before:10.0}   {before_us:9.0}   {step_ms:7.1}   {after:9.0}   {after_us:8.0}"
        );
        let mut ops = vec![];
        (0..N_SLOTS).for_each(|slot| leaves.end(SeqId(slot as u32), &mut ops));
        apply(&mut forward, &ops)?;
    }
    Ok(())
}

/// A step in which each sequence verifies a tree of `n_leaves` nodes below its root and takes the
/// last of them.
fn timed_step(
    forward: &mut LlamaForward,
    leaves: &mut Leaves,
    n_leaves: usize,
    n_cached: usize,
) -> Result<[f64; 5], StepError> {
    let (mut ops, mut rows) = (vec![], Rows::default());
    let mut ids = vec![vec![]; N_SLOTS];
    for (slot, ids) in ids.iter_mut().enumerate() {
        leaves.lend(SeqId(slot as u32), n_leaves, n_cached, ids, &mut ops);
        rows.push(token(slot, n_cached), n_cached, ids.iter().copied(), true);
        for (leaf, &id) in ids.iter().enumerate() {
            rows.push(token(slot + leaf, n_cached + 1), n_cached + 1, [id], true);
        }
    }
    let (n_before, before_us) = (ops.len() as f64, apply(forward, &ops)?);
    let started = Instant::now();
    forward.forward(&rows)?;
    let step_ms = started.elapsed().as_secs_f64() * 1e3;
    ops.clear();
    ids.iter()
        .for_each(|ids| leaves.settle(ids, n_leaves - 1, n_cached + 1, n_cached + 2, &mut ops));
    Ok([n_before, before_us, step_ms, ops.len() as f64, apply(forward, &ops)?])
}

/// Microseconds that they take.
fn apply(forward: &mut LlamaForward, ops: &[KvOp]) -> Result<f64, StepError> {
    let started = Instant::now();
    ops.iter().try_for_each(|&op| forward.apply(op))?;
    Ok(started.elapsed().as_secs_f64() * 1e6)
}

fn token(slot: usize, pos: usize) -> Token {
    Token((1000 + 37 * slot + 11 * pos) as i32 % 40_000)
}
