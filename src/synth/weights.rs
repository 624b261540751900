//! A model's tensors and the distributions of their values.
//!
//! Matrices are normal with a deviation of `1 / sqrt(inputs)`, so a normalised state stays as large
//! as it is; what is added to the residual stream is smaller by `sqrt(layers)`, so all layers
//! together add about as much as one. The output matrix makes logits with a deviation of
//! [`LOGIT_DEVIATION`], which leaves many tokens a chance and makes a few of them likely. States of
//! recurrent layers decay as Mamba's do before its training.
//!
//! Of small models for tests, embeddings are as large as what the layers add, and queries select a
//! few of the tokens before ([`QUERY`]). So their text depends on all that was cached, and does not
//! repeat itself soon. Models of the llama architecture repeat themselves, and tests draft from that. So
//! do those with draft layers, which take the last token as it is and are right now and then.

use super::shape::{Architecture, Llama, ModelShape};
use super::vocab::N_SPECIAL;
use crate::llama::{LlamaError, Meta, TensorInfo, TensorType, tensors_of};

const LOGIT_DEVIATION: f32 = 3.0;
/// The deviation of values of queries, in models whose attention is sharp.
const QUERY: f32 = 3.0;

/// A tensor to be filled.
pub(super) struct TensorSpec {
    pub name: String,
    /// As [`TensorInfo::shape`].
    pub shape: [usize; 4],
    pub fill: Fill,
}

/// The values of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fill {
    /// One value everywhere.
    Constant(f32),
    /// Normal values of this deviation; in the first `n_faint` rows of a quarter of it.
    Normal { deviation: f32, n_faint: usize },
    /// Values between two, all alike likely.
    Uniform(f32, f32),
    /// Takes over the first inputs, one for each output, and no others.
    Identity,
}

/// What tensors of a model have in common.
#[derive(Clone, Copy)]
struct Model {
    n_layer: usize,
    /// Input embeddings serve as the output matrix.
    tied: bool,
    /// Attention selects few tokens.
    sharp: bool,
}

impl TensorSpec {
    pub fn info(&self, kind: TensorType) -> TensorInfo {
        TensorInfo { name: self.name.clone(), shape: self.shape, kind }
    }

    /// Values of a row.
    pub fn n_in(&self) -> usize {
        self.shape[0]
    }

    /// Rows of all its matrices; 1 for a vector.
    pub fn n_rows(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// A matrix that keeps the size of a normalised state.
    pub fn matrix(name: String, n_in: usize, n_out: usize) -> Self {
        Self { name, shape: [n_in, n_out, 1, 1], fill: Fill::scaled(n_in) }
    }

    /// A matrix from a normalised state to logits.
    pub fn output(name: String, n_in: usize, n_vocab: usize) -> Self {
        Self { name, shape: [n_in, n_vocab, 1, 1], fill: Fill::logits(n_in) }
    }

    pub fn vector(name: String, n: usize, value: f32) -> Self {
        Self { name, shape: [n, 1, 1, 1], fill: Fill::Constant(value) }
    }
}

impl Fill {
    const fn normal(deviation: f32) -> Self {
        Self::Normal { deviation, n_faint: 0 }
    }

    /// Keeps the size of a state of so many values.
    fn scaled(n_in: usize) -> Self {
        Self::normal((n_in as f32).sqrt().recip())
    }

    /// Smaller for control tokens and bytes, so that greedy text never contains them and never ends.
    fn logits(n_in: usize) -> Self {
        Self::Normal { deviation: LOGIT_DEVIATION / (n_in as f32).sqrt(), n_faint: N_SPECIAL }
    }

    /// Of a tensor by its name in a layer, with rows of `n_in` values.
    fn of(tensor: &str, n_in: usize, model: Model) -> Self {
        match tensor {
            "output.weight" => Self::logits(n_in),
            "token_embd.weight" if model.tied => Self::logits(n_in),
            "token_embd.weight" if model.sharp => Self::scaled(n_in),
            "attn_q.weight" | "attn_q_b.weight" if model.sharp => {
                Self::normal(QUERY / (n_in as f32).sqrt())
            }
            "attn_q_norm.weight" if model.sharp => Self::Constant(QUERY),
            "nextn.eh_proj.weight" => Self::Identity,
            "token_embd.weight" | "attn_sinks.weight" => Self::normal(1.0),
            // What each layer adds to the residual stream.
            "attn_output.weight"
            | "ffn_down.weight"
            | "ffn_down_exps.weight"
            | "ffn_down_shexp.weight"
            | "ssm_out.weight"
            | "shortconv.out_proj.weight"
            | "time_mix_output.weight"
            | "channel_mix_value.weight" => Self::scaled(n_in * model.n_layer),
            // Of Mamba: a state decays by exp(a * softplus(step)), and a part of the input is added.
            "ssm_a" => Self::Uniform(-16.0, -1.0),
            "ssm_dt.bias" => Self::Uniform(-6.0, -2.0),
            "ssm_d" => Self::Constant(1.0),
            // Of RWKV: decay before a sigmoid, shares of the token before, and factors of keys.
            "time_mix_w0.weight" => Self::Uniform(-6.0, -1.0),
            "time_mix_lerp_fused.weight" | "channel_mix_lerp_k.weight" => Self::Uniform(0.0, 1.0),
            "time_mix_k_k.weight" | "time_mix_k_a.weight" | "time_mix_ln.weight" => {
                Self::Constant(1.0)
            }
            _ if tensor.ends_with(".bias") => Self::normal(0.1),
            _ if tensor.contains("norm") || tensor.starts_with("rope_factors") => {
                Self::Constant(1.0)
            }
            _ => Self::scaled(n_in),
        }
    }
}

/// All tensors of a model with this metadata, by llama.cpp's names.
///
/// # Errors
/// [`LlamaError::Metadata`] when llama.cpp makes no model of it.
pub(super) fn of(
    shape: &ModelShape,
    meta: &[(String, Meta)],
) -> Result<Vec<TensorSpec>, LlamaError> {
    let tensors: Vec<(String, [usize; 4])> = match &shape.architecture {
        Architecture::Llama(llama) => of_llama(shape, llama),
        Architecture::Declared(declared) => {
            let has = |t: &TensorInfo| declared.has(in_layer(&t.name));
            tensors_of(meta)?.into_iter().filter(has).map(|t| (t.name, t.shape)).collect()
        }
    };
    let model = Model {
        n_layer: shape.n_layer,
        tied: !tensors.iter().any(|(name, _)| name == "output.weight"),
        sharp: matches!(shape.architecture, Architecture::Declared(_))
            && !tensors.iter().any(|(name, _)| name.contains(".nextn.")),
    };
    let spec = |(name, shape): (String, [usize; 4])| {
        let fill = Fill::of(in_layer(&name), shape[0], model);
        TensorSpec { name, shape, fill }
    };
    Ok(tensors.into_iter().map(spec).collect())
}

/// A tensor's name without its layer's.
fn in_layer(name: &str) -> &str {
    let of_layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    of_layer.map_or(name, |(_, tensor)| tensor)
}

fn of_llama(shape: &ModelShape, llama: &Llama) -> Vec<(String, [usize; 4])> {
    let ModelShape { n_embd, n_layer, n_vocab, .. } = *shape;
    let (n_ff, n_kv) = (llama.n_ff, n_embd / llama.n_head * llama.n_head_kv);
    let matrix = |name: &str, n_in, n_out| (format!("{name}.weight"), [n_in, n_out, 1, 1]);
    let mut all = vec![matrix("token_embd", n_embd, n_vocab)];
    if !llama.tied {
        all.push(matrix("output", n_embd, n_vocab));
    }
    all.push(matrix("output_norm", n_embd, 1));
    for layer in 0..n_layer {
        let tensors = [
            ("attn_norm", n_embd, 1),
            ("attn_q", n_embd, n_embd),
            ("attn_k", n_embd, n_kv),
            ("attn_v", n_embd, n_kv),
            ("attn_output", n_embd, n_embd),
            ("ffn_norm", n_embd, 1),
            ("ffn_gate", n_embd, n_ff),
            ("ffn_up", n_embd, n_ff),
            ("ffn_down", n_ff, n_embd),
        ];
        let of_layer = |(name, n_in, n_out)| matrix(&format!("blk.{layer}.{name}"), n_in, n_out);
        all.extend(tensors.map(of_layer));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_filled_by_its_name_in_a_layer() {
        let model = Model { n_layer: 4, tied: false, sharp: false };
        let fill = |name: &str| Fill::of(in_layer(name), 64, model);
        assert_eq!(fill("output.weight"), Fill::Normal { deviation: 0.375, n_faint: N_SPECIAL });
        assert_eq!(fill("token_embd.weight"), Fill::normal(1.0));
        assert_eq!(fill("blk.13.attn_q.weight"), Fill::normal(0.125));
        assert_eq!(fill("blk.13.ffn_down_exps.weight"), Fill::normal(0.0625));
        assert_eq!(fill("blk.0.ffn_norm"), Fill::Constant(1.0));
        assert_eq!(fill("blk.0.time_mix_ln.bias"), Fill::normal(0.1));
        assert_eq!(fill("blk.0.ssm_a"), Fill::Uniform(-16.0, -1.0));
        let tied = Model { tied: true, ..model };
        assert_eq!(Fill::of("token_embd.weight", 64, tied), fill("output.weight"));
        let sharp = Model { sharp: true, ..model };
        assert_eq!(Fill::of("attn_q_norm.weight", 64, sharp), Fill::Constant(QUERY));
    }
}
