//! A run's state as a file, so that a killed run loses minutes only.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::files::FileError;
use crate::train::fit::evaluate::HeadScore;
use crate::train::{le_bytes, read_tensor, write_tensors};

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
    pub(super) fn held_loss(&self, decay: f32) -> f64 {
        let weight = |h: usize| f64::from(decay).powi(h as i32);
        self.held.iter().enumerate().map(|(h, score)| weight(h) * score.mean_loss()).sum()
    }
}

/// The state of a run. What is not a tensor is stored as JSON.
#[derive(Serialize, Deserialize)]
pub struct FitState {
    #[serde(skip)]
    pub params: Vec<f32>,
    /// Adam's first moments.
    #[serde(skip)]
    pub m: Vec<f32>,
    /// Adam's second moments.
    #[serde(skip)]
    pub v: Vec<f32>,
    /// Parameters of the best epoch.
    #[serde(skip)]
    pub best: Vec<f32>,
    pub step: usize,
    /// Losses of this epoch's steps.
    pub losses: Vec<f32>,
    /// Epochs that are done.
    pub history: Vec<Epoch>,
}

impl FitState {
    /// Before the first step.
    pub fn new(params: Vec<f32>) -> Self {
        let zero = vec![0.0; params.len()];
        let (m, v, best) = (zero.clone(), zero, params.clone());
        Self { params, m, v, best, step: 0, losses: Vec::new(), history: Vec::new() }
    }

    /// Writes the file, which appears under its name when it is whole.
    pub fn save(&self, path: &Path, identity: &str) -> Result<(), FileError> {
        let position = serde_json::to_string(self).expect("numbers have a JSON form");
        let metadata =
            [("identity".to_owned(), identity.to_owned()), ("position".to_owned(), position)];
        let named =
            [("params", &self.params), ("m", &self.m), ("v", &self.v), ("best", &self.best)];
        let tensors =
            named.map(|(name, values)| (name, Dtype::F32, vec![values.len()], le_bytes!(values)));
        write_tensors(path, &tensors, Some(metadata.into()))
    }

    /// Reads the file of a run with the same identity.
    pub fn load(path: &Path, identity: &str, n_params: usize) -> Result<Self, FileError> {
        let fail = |reason: String| FileError::new(path, reason);
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
        let position: Self =
            serde_json::from_str(&text("position")).map_err(|e| fail(e.to_string()))?;
        let tensor = |name: &str| {
            let (shape, values) = read_tensor(path, &file, name, Dtype::F32, f32::from_le_bytes)?;
            if shape != [n_params] {
                return Err(fail(format!("{name} is {shape:?}, not [{n_params}]")));
            }
            Ok(values)
        };
        let (params, m, v, best) = (tensor("params")?, tensor("m")?, tensor("v")?, tensor("best")?);
        Ok(Self { params, m, v, best, ..position })
    }
}
