//! A model's tensors and the distributions of their values. Pure.
//!
//! Matrices are normal with a deviation of `1 / sqrt(inputs)`, so a normalised state stays as large
//! as it is; what is added to the residual stream is smaller by `sqrt(layers)`, so all layers
//! together add about as much as one. The output matrix makes logits with a deviation of
//! [`LOGIT_DEVIATION`], which leaves many tokens a chance and makes a few of them likely.

use super::shape::ModelShape;
use super::vocab::N_SPECIAL;
use crate::llama::{TensorInfo, TensorType};

const LOGIT_DEVIATION: f32 = 3.0;

/// A tensor to be filled.
pub(super) struct TensorSpec {
    pub name: String,
    /// Values of a row.
    pub n_in: usize,
    /// Rows; 1 for a vector.
    pub n_out: usize,
    pub fill: Fill,
}

/// The values of a tensor.
#[derive(Clone, Copy)]
pub(super) enum Fill {
    /// One value everywhere.
    Constant(f32),
    /// Normal values of this deviation; in the first `n_faint` rows of a quarter of it.
    Normal { deviation: f32, n_faint: usize },
}

impl TensorSpec {
    pub fn info(&self, n_out: usize, kind: TensorType) -> TensorInfo {
        TensorInfo { name: self.name.clone(), n_in: self.n_in, n_out, kind }
    }

    /// A matrix that keeps the size of a normalised state.
    pub fn matrix(name: String, n_in: usize, n_out: usize) -> Self {
        let deviation = (n_in as f32).sqrt().recip();
        Self { name, n_in, n_out, fill: Fill::Normal { deviation, n_faint: 0 } }
    }

    /// A matrix from a normalised state to logits: smaller ones for control tokens and bytes, so that
    /// greedy text never contains them and never ends.
    pub fn output(name: String, n_in: usize, n_vocab: usize) -> Self {
        let deviation = LOGIT_DEVIATION / (n_in as f32).sqrt();
        Self { name, n_in, n_out: n_vocab, fill: Fill::Normal { deviation, n_faint: N_SPECIAL } }
    }

    pub fn vector(name: String, n: usize, value: f32) -> Self {
        Self { name, n_in: n, n_out: 1, fill: Fill::Constant(value) }
    }

    /// A matrix whose results each of `n_layer` layers adds to the residual stream.
    fn residual(name: String, n_in: usize, n_out: usize, n_layer: usize) -> Self {
        let deviation = ((n_in * n_layer) as f32).sqrt().recip();
        Self { name, n_in, n_out, fill: Fill::Normal { deviation, n_faint: 0 } }
    }
}

/// All tensors, by llama.cpp's names.
pub(super) fn of(shape: &ModelShape) -> Vec<TensorSpec> {
    let ModelShape { n_embd, n_ff, n_layer, n_vocab, .. } = *shape;
    let n_kv = n_embd / shape.n_head * shape.n_head_kv;
    let embeddings = "token_embd.weight".to_owned();
    let mut all = if shape.tied {
        vec![TensorSpec::output(embeddings, n_embd, n_vocab)]
    } else {
        let fill = Fill::Normal { deviation: 1.0, n_faint: 0 };
        vec![
            TensorSpec { name: embeddings, n_in: n_embd, n_out: n_vocab, fill },
            TensorSpec::output("output.weight".into(), n_embd, n_vocab),
        ]
    };
    all.push(TensorSpec::vector("output_norm.weight".into(), n_embd, 1.0));
    for layer in 0..n_layer {
        let name = |of: &str| format!("blk.{layer}.{of}.weight");
        all.extend([
            TensorSpec::vector(name("attn_norm"), n_embd, 1.0),
            TensorSpec::matrix(name("attn_q"), n_embd, n_embd),
            TensorSpec::matrix(name("attn_k"), n_embd, n_kv),
            TensorSpec::matrix(name("attn_v"), n_embd, n_kv),
            TensorSpec::residual(name("attn_output"), n_embd, n_embd, n_layer),
            TensorSpec::vector(name("ffn_norm"), n_embd, 1.0),
            TensorSpec::matrix(name("ffn_gate"), n_embd, n_ff),
            TensorSpec::matrix(name("ffn_up"), n_embd, n_ff),
            TensorSpec::residual(name("ffn_down"), n_ff, n_embd, n_layer),
        ]);
    }
    all
}
