//! A run's state as a file, so that a killed run loses minutes only.

use std::collections::HashMap;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Tensor, Var};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::files::{FileError, write_whole};
use crate::train::fit::adam::Moments;
use crate::train::fit::error::FitError;
use crate::train::fit::evaluate::HeadScore;
use crate::train::fit::net::FitNet;

/// The results of an epoch.
#[derive(Serialize, Deserialize)]
pub struct Epoch {
    /// Mean loss of each tenth of the epoch.
    pub train_loss: Vec<f32>,
    /// Each head's accuracy on held-out rows.
    pub held: Vec<HeadScore>,
}

impl Epoch {
    /// The heads' mean losses, weighted as in training.
    pub(super) fn held_loss(&self, decay: f64) -> f64 {
        let weight = |h: usize| decay.powi(h as i32);
        self.held.iter().enumerate().map(|(h, score)| weight(h) * score.mean_loss()).sum()
    }
}

/// The state of a run beside the network's parameters.
pub struct FitState {
    /// Adam's, of each parameter.
    pub moments: Vec<Moments>,
    /// Parameters of the best epoch.
    pub best: Vec<Tensor>,
    pub position: Position,
}

/// How far a run is: what of its state is not a tensor, stored as JSON.
#[derive(Default, Serialize, Deserialize)]
pub struct Position {
    pub step: usize,
    /// Losses of this epoch's steps.
    pub losses: Vec<f32>,
    /// Epochs that are done.
    pub history: Vec<Epoch>,
}

impl FitState {
    /// Before the first step.
    pub fn new(net: &FitNet) -> candle_core::Result<Self> {
        let params = net.parameters();
        let moments = params.iter().map(|(_, var)| Moments::new(var)).collect::<Result<_, _>>()?;
        let mut state = Self { moments, best: vec![], position: Position::default() };
        state.keep(net)?;
        Ok(state)
    }

    /// Takes the network's parameters as the best so far.
    pub fn keep(&mut self, net: &FitNet) -> candle_core::Result<()> {
        let copies = net.parameters().into_iter().map(|(_, var)| var.as_tensor().copy());
        self.best = copies.collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Writes the file, which appears under its name when it is whole.
    pub fn save(&self, net: &FitNet, path: &Path, identity: &str) -> Result<(), FileError> {
        let position = serde_json::to_string(&self.position).expect("numbers have a JSON form");
        let metadata = HashMap::from([
            ("identity".to_owned(), identity.to_owned()),
            ("position".to_owned(), position),
        ]);
        let params = net.parameters();
        let all = params.iter().zip(&self.moments).zip(&self.best);
        let tensors = all.flat_map(|(((name, var), Moments { m, v }), best)| {
            [("", var.as_tensor()), (".m", m), (".v", v), (".best", best)]
                .map(|(suffix, tensor)| (format!("{name}{suffix}"), tensor))
        });
        write_whole(path, |part| {
            safetensors::serialize_to_file(tensors, Some(metadata), part)
                .map_err(|e| FileError::new(path, e))
        })
    }

    /// Reads the file of a run with the same identity, and the network's parameters.
    pub fn load(net: &FitNet, path: &Path, identity: &str) -> Result<Self, FitError> {
        let fail = |reason: String| FileError::new(path, reason);
        let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| fail(e.to_string()))?;
        let text = |key: &str| {
            metadata.metadata().as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
        };
        if text("identity") != identity {
            let why = "was written with other parameters or other data; remove it to begin anew";
            return Err(fail(why.into()).into());
        }
        let position = serde_json::from_str(&text("position")).map_err(|e| fail(e.to_string()))?;
        let tensor = |name: String, like: &Var| {
            let view = file.tensor(&name).map_err(|e| fail(format!("{name}: {e}")))?;
            if view.shape() != like.dims() {
                let why = format!("{name} is {:?}, not {:?}", view.shape(), like.dims());
                return Err(FitError::from(fail(why)));
            }
            Ok(view.load(like.device())?)
        };
        let mut state = Self { moments: vec![], best: vec![], position };
        for (name, var) in net.parameters() {
            var.set(&tensor(name.clone(), var)?)?;
            let moments = Moments {
                m: tensor(format!("{name}.m"), var)?,
                v: tensor(format!("{name}.v"), var)?,
            };
            state.moments.push(moments);
            state.best.push(tensor(format!("{name}.best"), var)?);
        }
        Ok(state)
    }
}
