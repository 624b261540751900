//! The draft heads' network on candle. Knows neither tokens nor losses: it turns hidden states and
//! embeddings into one state per head.
//!
//! A head is a residual block `z' = z + V SiLU(W z + U e + b)`:
//!
//! | kind | `z` of head h | `e` | V |
//! |---|---|---|---|
//! | medusa | the hidden state x | none | identity |
//! | conditioned | the state of head h-1 (head 0: x) | the embedding of c_h | d x m |

use candle_core::{DType, Device, Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::train::kind::HeadKind;

/// The sizes of a network.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetShape {
    /// How the heads are built.
    pub kind: HeadKind,
    /// Width of the hidden state, d.
    pub n_embd: usize,
    /// Width of a block, m; Medusa heads have blocks of `n_embd`.
    pub width: usize,
    pub n_heads: usize,
}

/// A head's parameters.
struct Block {
    w: Var,
    b: Var,
    /// U and V of a conditioned head.
    path: Option<[Var; 2]>,
}

/// A network with its parameters.
pub struct FitNet {
    blocks: Vec<Block>,
    /// What products are computed in; parameters and sums are F32.
    dtype: DType,
}

impl FitNet {
    /// With initial parameters: W and U uniform with deviation `1/sqrt(d)`, V zero, so that every
    /// head begins as the model's own prediction of the next token. Medusa heads have no V: their W
    /// is zero. Products are in BF16 on a GPU.
    pub fn new(shape: &NetShape, device: &Device, rng: &mut fastrand::Rng) -> Result<Self> {
        let (d, conditioned) = (shape.n_embd, shape.kind == HeadKind::Conditioned);
        let m = if conditioned { shape.width } else { d };
        let zero = |shape: &[usize]| Var::zeros(shape, DType::F32, device);
        let limit = (3.0 / d as f32).sqrt();
        let mut random = || {
            let values: Vec<f32> = (0..m * d).map(|_| (rng.f32() * 2.0 - 1.0) * limit).collect();
            Var::from_vec(values, (m, d), device)
        };
        let block = |_| {
            let w = if conditioned { random()? } else { zero(&[m, d])? };
            let path = if conditioned { Some([random()?, zero(&[d, m])?]) } else { None };
            Ok(Block { w, b: zero(&[m])?, path })
        };
        let blocks = (0..shape.n_heads).map(block).collect::<Result<_>>()?;
        let dtype = if device.is_cuda() { DType::BF16 } else { DType::F32 };
        Ok(Self { blocks, dtype })
    }

    /// The parameters with their names: `{head}.w`, and so on.
    pub fn parameters(&self) -> Vec<(String, &Var)> {
        let mut all = vec![];
        for (head, block) in self.blocks.iter().enumerate() {
            let path = block.path.iter().flat_map(|[u, v]| [("u", u), ("v", v)]);
            let of_head = [("w", &block.w), ("b", &block.b)].into_iter().chain(path);
            all.extend(of_head.map(|(name, var)| (format!("{head}.{name}"), var)));
        }
        all
    }

    /// Whether the parameter of this name multiplies embeddings.
    pub fn reads_embedding(name: &str) -> bool {
        name.ends_with(".u")
    }

    /// The states of all heads, each [b, d], for hidden states `x` [b, d] and the embeddings `e` of
    /// the tokens c_0, c_1, ..., one [b, d] per head.
    pub fn forward(&self, x: &Tensor, e: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut states: Vec<Tensor> = Vec::with_capacity(self.blocks.len());
        for (block, e) in self.blocks.iter().zip(e) {
            let z = states.last().filter(|_| block.path.is_some()).unwrap_or(x);
            let mut sum = self.product(z, &block.w)?;
            if let Some([u, _]) = &block.path {
                sum = (sum + self.product(e, u)?)?;
            }
            let s = sum.broadcast_add(&block.b)?.silu()?;
            let change = match &block.path {
                Some([_, v]) => self.product(&s, v)?,
                None => s,
            };
            states.push((z + change)?);
        }
        Ok(states)
    }

    /// `x` times the transpose of `matrix`.
    fn product(&self, x: &Tensor, matrix: &Var) -> Result<Tensor> {
        let matrix = matrix.to_dtype(self.dtype)?;
        x.to_dtype(self.dtype)?.matmul(&matrix.t()?)?.to_dtype(DType::F32)
    }

    pub fn n_heads(&self) -> usize {
        self.blocks.len()
    }

    pub fn device(&self) -> &Device {
        self.blocks[0].w.device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_begin_as_the_models_own_prediction() {
        for kind in [HeadKind::Conditioned, HeadKind::Medusa] {
            let shape = NetShape { kind, n_embd: 4, width: 8, n_heads: 2 };
            let mut rng = fastrand::Rng::with_seed(1);
            let net = FitNet::new(&shape, &Device::Cpu, &mut rng).unwrap();
            let random = || Tensor::randn(0f32, 1.0, (3, 4), &Device::Cpu).unwrap();
            let (x, e) = (random(), [random(), random()]);
            let states = net.forward(&x, &e).unwrap();
            let values = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
            if kind == HeadKind::Conditioned {
                assert_eq!(values(&states[1]), values(&x));
            }
            let names: Vec<_> = net.parameters().into_iter().map(|(name, _)| name).collect();
            let expected: &[_] = match kind {
                HeadKind::Conditioned => &["0.w", "0.b", "0.u", "0.v", "1.w", "1.b", "1.u", "1.v"],
                HeadKind::Medusa => &["0.w", "0.b", "1.w", "1.b"],
            };
            assert_eq!(names, expected);
        }
    }
}
