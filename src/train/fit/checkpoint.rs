//! Work in progress as a file, so that a kill costs minutes and not the run.

use std::path::Path;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::train::fit::shards::Shards;
use crate::train::fit::{Epoch, FitError, FitParams};

/// Everything a run has made so far.
#[derive(Debug)]
pub struct State {
    /// The network's parameters.
    pub params: Vec<f32>,
    /// Adam's first moments.
    pub m: Vec<f32>,
    /// Adam's second moments.
    pub v: Vec<f32>,
    /// Parameters of the best epoch.
    pub best: Vec<f32>,
    /// Steps done.
    pub step: usize,
    /// Losses of this epoch's steps.
    pub losses: Vec<f32>,
    /// Epochs that are done.
    pub history: Vec<Epoch>,
}

/// What is not a tensor.
#[derive(Serialize, Deserialize)]
struct Position {
    step: usize,
    losses: Vec<f32>,
    history: Vec<Epoch>,
}

/// A text that is the same for runs which a checkpoint may pass between.
pub fn identity(params: &FitParams, train: &Shards, held: &Shards) -> String {
    let files: Vec<_> = train.files().chain(held.files()).collect();
    serde_json::to_string(&(params, files)).expect("numbers and names have a JSON form")
}

impl State {
    /// Before the first step.
    pub fn new(params: Vec<f32>) -> Self {
        let zero = vec![0.0; params.len()];
        let (m, v, best) = (zero.clone(), zero, params.clone());
        Self { params, m, v, best, step: 0, losses: Vec::new(), history: Vec::new() }
    }

    /// Writes the file; it appears under its name when it is whole.
    pub fn save(&self, path: &Path, identity: &str) -> Result<(), FitError> {
        let fail = |e: &dyn std::fmt::Display| FitError::Checkpoint {
            path: path.to_owned(),
            reason: e.to_string(),
        };
        let position = Position {
            step: self.step,
            losses: self.losses.clone(),
            history: self.history.clone(),
        };
        let position = serde_json::to_string(&position).expect("numbers have a JSON form");
        let metadata =
            [("identity".to_owned(), identity.to_owned()), ("position".to_owned(), position)]
                .into();
        let named =
            [("params", &self.params), ("m", &self.m), ("v", &self.v), ("best", &self.best)];
        let bytes = named.map(|(name, values)| {
            (name, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        });
        let view = |bytes| {
            TensorView::new(Dtype::F32, vec![self.params.len()], bytes).map_err(|e| fail(&e))
        };
        let tensors: Result<Vec<_>, FitError> =
            bytes.iter().map(|(name, bytes)| Ok((*name, view(bytes)?))).collect();
        let part = path.with_extension("part");
        safetensors::serialize_to_file(tensors?, Some(metadata), &part).map_err(|e| fail(&e))?;
        std::fs::rename(&part, path).map_err(|e| fail(&e))
    }

    /// Reads the file of a run with the same identity.
    pub fn load(path: &Path, identity: &str, n_params: usize) -> Result<Self, FitError> {
        let fail = |reason: String| FitError::Checkpoint { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| fail(e.to_string()))?;
        let text = |key: &str| {
            metadata.metadata().as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
        };
        if text("identity") != identity {
            return Err(fail(
                "was written with other parameters or other data; remove it to begin anew".into(),
            ));
        }
        let position: Position =
            serde_json::from_str(&text("position")).map_err(|e| fail(e.to_string()))?;
        let tensor = |name: &str| {
            let view = file.tensor(name).map_err(|e| fail(e.to_string()))?;
            if view.dtype() != Dtype::F32 || view.shape() != [n_params] {
                return Err(fail(format!("{name} is {:?} {:?}", view.dtype(), view.shape())));
            }
            Ok(view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let (params, m, v, best) = (tensor("params")?, tensor("m")?, tensor("v")?, tensor("best")?);
        let Position { step, losses, history } = position;
        Ok(Self { params, m, v, best, step, losses, history })
    }
}
