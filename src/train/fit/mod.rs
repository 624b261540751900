//! Fits draft heads: the loop over minibatches, the optimizer, and the best epoch's parameters.
//! Deterministic by seed for a given number of threads, also across interruptions.

pub mod batch;
mod checkpoint;
pub mod evaluate;
mod lanes;
mod loss;
pub mod net;
pub mod shards;

use std::path::Path;
use std::time::{Duration, Instant};

use ndarray::Array2;
use serde::Serialize;

use crate::files::FileError;
use crate::train::fit::batch::Lookup;
use crate::train::fit::evaluate::{HeadScore, evaluate};
use crate::train::fit::loss::Classes;
use crate::train::fit::net::{FitNet, NetShape};
use crate::train::fit::shards::{ModelMatrices, Shard, Shards};
pub use checkpoint::Epoch;
use checkpoint::FitState;
use lanes::AdamStep;

/// How to fit.
#[derive(Serialize)]
pub struct FitParams {
    pub shape: NetShape,
    /// Passes over all rows.
    pub epochs: usize,
    /// Rows per step.
    pub batch: usize,
    /// Highest learning rate: reached after the warm-up, a twentieth of it at the end.
    pub learning_rate: f32,
    /// AdamW's weight decay.
    pub weight_decay: f32,
    /// The weight of a head's loss relative to the head before it.
    pub decay: f32,
    /// Classes a step compares with.
    pub n_classes: usize,
    /// Most held-out rows to score after each epoch.
    pub max_held_rows: usize,
    pub seed: u64,
    /// Threads; each computes a part of every minibatch.
    pub n_threads: usize,
}

/// Fitted heads.
pub struct Fitted {
    /// Parameters of the best epoch, in [`FitNet`]'s layout.
    pub params: Vec<f32>,
    /// The index of the best epoch.
    pub best: usize,
    pub history: Vec<Epoch>,
}

/// Why fitting failed.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "no rows to {0} on: every twentieth prompt is held out, so it takes a few dozen prompts and their answers"
    )]
    Empty(&'static str),
    #[error("the loss is {0} at step {1}: try a lower learning rate")]
    Diverged(f32, usize),
}

const CHECKPOINT_EVERY: Duration = Duration::from_secs(120);

/// Fits heads to `train`, measures them on `held` after each epoch, and keeps the best epoch's
/// parameters. A killed run resumes from the file `checkpoint`, written every two minutes and at
/// each epoch's end. `progress` gets the steps done and all steps.
pub fn fit(
    train: &Shards,
    held: &Shards,
    matrices: &ModelMatrices,
    params: &FitParams,
    checkpoint: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Fitted, FitError> {
    let plan = Plan::new(train, params);
    if plan.n_steps() == 0 {
        return Err(FitError::Empty("fit"));
    }
    if held.n_rows() == 0 {
        return Err(FitError::Empty("measure"));
    }
    let net = FitNet::new(&params.shape);
    let identity = identity(params, train, held);
    let mut state = if checkpoint.exists() {
        FitState::load(checkpoint, &identity, net.n_params)?
    } else {
        FitState::new(net.init(&mut fastrand::Rng::with_seed(params.seed)))
    };
    let mut trainer = Trainer::new(&net, matrices, params);
    let mut saved = Instant::now();
    for epoch in state.history.len()..params.epochs {
        for (shard, first_step) in plan.epoch(epoch) {
            let batches = plan.batches[shard];
            if state.step >= first_step + batches {
                continue; // done before an interruption
            }
            let data = train.load(shard)?;
            let rows = shuffled_rows(&data, params.seed ^ ((epoch as u64) << 32 | shard as u64));
            for batch in state.step - first_step..batches {
                let rows = &rows[batch * rows.len() / batches..(batch + 1) * rows.len() / batches];
                let loss = trainer.step(&mut state, &data, rows, plan.n_steps());
                if !loss.is_finite() {
                    return Err(FitError::Diverged(loss, state.step));
                }
                progress(state.step, plan.n_steps());
                if saved.elapsed() >= CHECKPOINT_EVERY {
                    state.save(checkpoint, &identity)?;
                    saved = Instant::now();
                }
            }
        }
        let (max_rows, n_threads) = (params.max_held_rows, params.n_threads);
        let held = evaluate(&net, &state.params, held, &trainer.lookup, max_rows, n_threads)?;
        state.end_epoch(held, params.decay);
        state.save(checkpoint, &identity)?;
    }
    let best = state.best_epoch(params.decay);
    Ok(Fitted { params: state.best, best, history: state.history })
}

/// Names parameters and data: a run resumes only from a checkpoint of the same identity.
fn identity(params: &FitParams, train: &Shards, held: &Shards) -> String {
    let files: Vec<_> = train.files().chain(held.files()).collect();
    serde_json::to_string(&(params, files)).expect("numbers and names have a JSON form")
}

impl FitState {
    /// Records an epoch's results, and its parameters if they are the best so far.
    fn end_epoch(&mut self, held: Vec<HeadScore>, decay: f32) {
        let losses = std::mem::take(&mut self.losses);
        let tenth = losses.len().div_ceil(10).max(1);
        let train_loss =
            losses.chunks(tenth).map(|part| part.iter().sum::<f32>() / part.len() as f32).collect();
        self.history.push(Epoch { train_loss, held });
        if self.best_epoch(decay) + 1 == self.history.len() {
            self.best.clone_from(&self.params);
        }
    }

    fn best_epoch(&self, decay: f32) -> usize {
        let loss = |i: usize| self.history[i].held_loss(decay);
        (0..self.history.len()).min_by(|&a, &b| loss(a).total_cmp(&loss(b))).unwrap_or(0)
    }
}

/// The order of minibatches.
struct Plan {
    /// Minibatches of each shard.
    batches: Vec<usize>,
    epochs: usize,
    seed: u64,
}

impl Plan {
    fn new(shards: &Shards, params: &FitParams) -> Self {
        // A shard's rows make minibatches of nearly equal size, none of which crosses into the next
        // shard.
        let batches = |i: usize| {
            if shards.n_rows_of(i) == 0 { 0 } else { (shards.n_rows_of(i) / params.batch).max(1) }
        };
        let batches = (0..shards.len()).map(batches).collect();
        Self { batches, epochs: params.epochs, seed: params.seed }
    }

    fn n_steps(&self) -> usize {
        self.epochs * self.batches.iter().sum::<usize>()
    }

    /// The shards in this epoch's order, each with its first step.
    fn epoch(&self, epoch: usize) -> Vec<(usize, usize)> {
        let mut order: Vec<usize> = (0..self.batches.len()).collect();
        fastrand::Rng::with_seed(self.seed.wrapping_add(epoch as u64)).shuffle(&mut order);
        let mut step = epoch * self.batches.iter().sum::<usize>();
        let first = |shard: usize| {
            step += self.batches[shard];
            (shard, step - self.batches[shard])
        };
        order.into_iter().map(first).collect()
    }
}

/// Rows that have something to predict, in random order.
fn shuffled_rows(shard: &Shard, seed: u64) -> Vec<u32> {
    let mut rows: Vec<u32> = shard.rows_to_predict_from().collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut rows);
    rows
}

struct Trainer<'a> {
    net: &'a FitNet,
    params: &'a FitParams,
    lookup: Lookup<'a>,
    /// One gradient per thread, zero between steps.
    grads: Vec<Vec<f32>>,
}

impl<'a> Trainer<'a> {
    fn new(net: &'a FitNet, matrices: &'a ModelMatrices, params: &'a FitParams) -> Self {
        let grads = vec![vec![0.0; net.n_params]; params.n_threads.max(1)];
        Self { net, params, lookup: Lookup::new(matrices), grads }
    }

    /// Trains on one minibatch: labels, classes, gradients of each thread's rows, an optimizer step.
    fn step(&mut self, state: &mut FitState, shard: &Shard, rows: &[u32], n_steps: usize) -> f32 {
        let params = self.params;
        let mut labels = self.lookup.labels(shard, rows, self.net.n_heads());
        let seed = params.seed.wrapping_mul(31).wrapping_add(state.step as u64);
        let mut rng = fastrand::Rng::with_seed(seed);
        let classes =
            Classes::sample(self.lookup.output(), &mut labels, params.n_classes, &mut rng);
        let (net, lookup, n_threads) = (self.net, &self.lookup, self.grads.len());
        let loss: f64 = std::thread::scope(|scope| {
            let (weights, labels, classes) = (&state.params, &labels, &classes);
            // Adds the gradient of the minibatch's mean loss from one thread's rows; returns their
            // share of that loss.
            let work = move |(i, grad): (usize, &mut Vec<f32>)| {
                let range = i * rows.len() / n_threads..(i + 1) * rows.len() / n_threads;
                let (x, e) = lookup.inputs(shard, &rows[range.clone()], net.n_heads());
                let done = net.forward(weights, &x, &e);
                let mut loss = 0.0;
                let mut dz = vec![Array2::zeros(x.dim()); net.n_heads()];
                for (head, dz) in dz.iter_mut().enumerate() {
                    let weight = params.decay.powi(head as i32) / rows.len() as f32;
                    let first = head * rows.len() + range.start;
                    let z = net.state(&done, head);
                    loss += classes.cross_entropy(z, labels, first, weight, dz.view_mut());
                }
                net.backward(weights, &x, &e, &done, dz, grad);
                loss
            };
            let jobs = self.grads.iter_mut().enumerate();
            let workers: Vec<_> = jobs.map(|job| scope.spawn(move || work(job))).collect();
            workers.into_iter().map(|w| w.join().expect("a worker does not panic")).sum()
        });
        state.step += 1;
        state.losses.push(loss as f32);
        self.optimize(state, n_steps);
        loss as f32
    }

    /// AdamW, each thread on its part of the parameters.
    fn optimize(&mut self, state: &mut FitState, n_steps: usize) {
        let (step, params) = (state.step as f32, self.params);
        let warm_up = (n_steps as f32 / 20.0).clamp(1.0, 100.0);
        let part = ((step - warm_up) / (n_steps as f32 - warm_up).max(1.0)).clamp(0.0, 1.0);
        let cosine = 0.05 + 0.95 * (0.5 + 0.5 * (std::f32::consts::PI * part).cos());
        let rate = params.learning_rate * (step / warm_up).min(1.0) * cosine;
        let adam = AdamStep {
            rate: rate / (1.0 - 0.9f32.powf(step)),
            second: 1.0 / (1.0 - 0.98f32.powf(step)),
            decay: rate * params.weight_decay,
        };
        let n = state.params.len().div_ceil(self.grads.len()).max(1);
        let mut grads: Vec<_> = self.grads.iter_mut().map(|grad| grad.chunks_mut(n)).collect();
        std::thread::scope(|scope| {
            let moments = state.m.chunks_mut(n).zip(state.v.chunks_mut(n));
            for (weights, (m, v)) in state.params.chunks_mut(n).zip(moments) {
                let mut grads: Vec<&mut [f32]> =
                    grads.iter_mut().filter_map(Iterator::next).collect();
                scope.spawn(move || lanes::adam(adam, weights, m, v, &mut grads));
            }
        });
    }
}
