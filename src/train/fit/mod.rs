//! Fits draft heads with candle, on the CPU or a GPU: the loop over minibatches, and the best epoch's
//! parameters. Deterministic by seed for a device and a number of threads, also across
//! interruptions.

mod adam;
mod batch;
mod checkpoint;
mod error;
pub mod evaluate;
mod loss;
pub mod net;
mod parts;
pub mod shards;

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use serde::Serialize;

use crate::train::fit::batch::Lookup;
use crate::train::fit::evaluate::{HeadScore, evaluate};
use crate::train::fit::loss::Classes;
use crate::train::fit::net::{FitNet, NetShape};
use crate::train::fit::shards::{ModelMatrices, Shard, Shards};
pub use checkpoint::Epoch;
use checkpoint::{FitState, Position};
pub use error::FitError;
use parts::in_parts;

/// How to fit.
#[derive(Serialize)]
pub struct FitParams {
    pub shape: NetShape,
    /// Passes over all rows.
    pub epochs: usize,
    /// Rows per step.
    pub batch: usize,
    /// Highest learning rate: reached after the warm-up, a twentieth of it at the end.
    pub learning_rate: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// The weight of a head's loss relative to the head before it.
    pub decay: f64,
    /// Classes a step compares with.
    pub n_classes: usize,
    /// Most held-out rows to score after each epoch.
    pub max_held_rows: usize,
    pub seed: u64,
    /// Parts of every minibatch whose gradients are added up: on the CPU each has a thread, on a GPU
    /// they follow one another, and more of them take less memory.
    pub n_parts: usize,
}

/// Fitted heads.
pub struct Fitted {
    /// Parameters of the best epoch.
    pub params: Vec<Parameter>,
    /// The index of the best epoch.
    pub best: usize,
    pub history: Vec<Epoch>,
}

/// A parameter's values.
pub struct Parameter {
    /// As [`FitNet::parameters`] names it.
    pub name: String,
    /// Rows and columns; a bias has one number.
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

const CHECKPOINT_EVERY: Duration = Duration::from_secs(120);

/// The first GPU if candle was built for them and there is one, otherwise the CPU.
pub fn device() -> Result<Device, FitError> {
    Ok(Device::cuda_if_available(0)?)
}

/// Fits heads to `train`, measures them on `held` after each epoch, and keeps the best epoch's
/// parameters. A killed run resumes from the file `checkpoint`, written every two minutes and at
/// each epoch's end. `progress` gets the steps done and all steps.
pub fn fit(
    train: &Shards,
    held: &Shards,
    matrices: ModelMatrices,
    params: &FitParams,
    device: &Device,
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
    let net = FitNet::new(&params.shape, device, &mut fastrand::Rng::with_seed(params.seed))?;
    let lookup = Lookup::new(matrices, device)?;
    let identity = identity(params, lookup.scale, train, held);
    let mut state = if checkpoint.exists() {
        FitState::load(&net, checkpoint, &identity)?
    } else {
        FitState::new(&net)?
    };
    let trainer = Trainer { net: &net, params, lookup: &lookup, n_steps: plan.n_steps() };
    let mut saved = Instant::now();
    for epoch in state.position.history.len()..params.epochs {
        for (shard, first_step) in plan.epoch(epoch) {
            let batches = plan.batches[shard];
            if state.position.step >= first_step + batches {
                continue; // done before an interruption
            }
            let data = train.load(shard)?;
            let rows = shuffled_rows(&data, params.seed ^ ((epoch as u64) << 32 | shard as u64));
            for batch in state.position.step - first_step..batches {
                let rows = &rows[batch * rows.len() / batches..(batch + 1) * rows.len() / batches];
                let loss = trainer.step(&mut state, &data, rows)?;
                if !loss.is_finite() {
                    return Err(FitError::Diverged(loss, state.position.step));
                }
                progress(state.position.step, plan.n_steps());
                if saved.elapsed() >= CHECKPOINT_EVERY {
                    state.save(&net, checkpoint, &identity)?;
                    saved = Instant::now();
                }
            }
        }
        let scores = evaluate(&net, held, &lookup, params.max_held_rows, params.n_parts)?;
        if state.position.end_epoch(scores, params.decay) {
            state.keep(&net)?;
        }
        state.save(&net, checkpoint, &identity)?;
    }
    let values = net.parameters().into_iter().zip(&state.best).map(|((name, _), best)| {
        // Served heads see embeddings as they are.
        let scale = if FitNet::reads_embedding(&name) { f64::from(lookup.scale) } else { 1.0 };
        let values = (best.flatten_all()? * scale)?.to_vec1()?;
        Ok(Parameter { name, shape: best.dims().to_vec(), values })
    });
    let best = state.position.best_epoch(params.decay);
    let params = values.collect::<Result<_, FitError>>()?;
    Ok(Fitted { params, best, history: state.position.history })
}

/// Names parameters, the scale of embeddings, and data: a run resumes only from a checkpoint of the same identity.
fn identity(params: &FitParams, scale: f32, train: &Shards, held: &Shards) -> String {
    let files: Vec<_> = train.files().chain(held.files()).collect();
    serde_json::to_string(&(params, scale, files)).expect("numbers and names have a JSON form")
}

impl Position {
    /// Records an epoch's results; returns whether it is the best so far.
    fn end_epoch(&mut self, held: Vec<HeadScore>, decay: f64) -> bool {
        let losses = std::mem::take(&mut self.losses);
        let tenth = losses.len().div_ceil(10).max(1);
        let train_loss =
            losses.chunks(tenth).map(|part| part.iter().sum::<f32>() / part.len() as f32).collect();
        self.history.push(Epoch { train_loss, held });
        self.best_epoch(decay) + 1 == self.history.len()
    }

    fn best_epoch(&self, decay: f64) -> usize {
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
    lookup: &'a Lookup,
    /// Steps of the whole run.
    n_steps: usize,
}

impl Trainer<'_> {
    /// Trains on one minibatch; returns its mean loss.
    fn step(&self, state: &mut FitState, shard: &Shard, rows: &[u32]) -> Result<f64, FitError> {
        let (params, position) = (self.params, &mut state.position);
        let labels = self.lookup.labels(shard, rows, self.net.n_heads());
        let seed = params.seed.wrapping_mul(31).wrapping_add(position.step as u64);
        let mut rng = fastrand::Rng::with_seed(seed);
        let classes = Classes::sample(&self.lookup.output, labels, params.n_classes, &mut rng)?;
        let parts = in_parts(rows, params.n_parts, |first, part| {
            self.part(shard, &classes, part, (first, rows.len()))
        })?;
        let loss = parts.iter().map(|(loss, _)| loss).sum();
        let grads: Vec<GradStore> = parts.into_iter().map(|(_, grads)| grads).collect();
        position.step += 1;
        position.losses.push(loss as f32);
        let (number, rate) = (position.step, self.learning_rate(position.step));
        let step = adam::Step { number, rate, decay: params.weight_decay };
        let vars: Vec<_> = self.net.parameters().into_iter().map(|(_, var)| var).collect();
        step.apply(&vars, &mut state.moments, &grads, params.n_parts)?;
        Ok(loss)
    }

    /// The share of a minibatch's mean loss, and the gradients, of its rows from `first` on, of
    /// `n` in all.
    fn part(
        &self,
        shard: &Shard,
        classes: &Classes,
        rows: &[u32],
        (first, n): (usize, usize),
    ) -> candle_core::Result<(f64, GradStore)> {
        let (x, e) = self.lookup.inputs(shard, rows, self.net.n_heads())?;
        let mut loss = 0.0;
        let mut along: Option<Tensor> = None;
        for (head, z) in self.net.forward(&x, &e)?.iter().enumerate() {
            let weight = self.params.decay.powi(head as i32) / n as f64;
            let (of_head, gradient) = classes.cross_entropy(z, head * n + first, weight)?;
            loss += of_head;
            // Its gradient by z is the loss's.
            let term = (z * gradient)?.sum_all()?;
            along = Some(match along {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
        let grads = along.map_or_else(|| Ok(GradStore::default()), |sum| sum.backward())?;
        Ok((loss, grads))
    }

    /// Of a step, from 1: rises to its highest at the end of the warm-up, then falls along a cosine
    /// to a twentieth.
    fn learning_rate(&self, step: usize) -> f64 {
        let (step, n_steps) = (step as f64, self.n_steps as f64);
        let warm_up = (n_steps / 20.0).clamp(1.0, 100.0);
        let part = ((step - warm_up) / (n_steps - warm_up).max(1.0)).clamp(0.0, 1.0);
        let cosine = 0.05 + 0.95 * (0.5 + 0.5 * (std::f64::consts::PI * part).cos());
        self.params.learning_rate * (step / warm_up).min(1.0) * cosine
    }
}
