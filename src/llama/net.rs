//! The network of Medusa heads: residual blocks and an output matrix, on ggml's kernels.

use super::store::{self, Matrix, Precision, Store, Tensor};
use super::{LlamaError, sys};

/// `x + SiLU(W x + b)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// `W`: square.
    pub weight: Matrix,
    /// `b`; absent in some layouts.
    pub bias: Option<Vec<f32>>,
}

/// Networks that share an input: each a run of blocks and then an output matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// Width of the input and of all blocks.
    pub n_embd: usize,
    /// The blocks of each network.
    pub blocks: Vec<Vec<Block>>,
    /// One output matrix for each network, or one for all. All have as many rows.
    pub outputs: Vec<Matrix>,
}

/// Weights in ggml's memory, and room to compute. Belongs to one thread.
pub struct Net {
    store: Store,
    blocks: Vec<Vec<(Tensor, Option<Tensor>)>>,
    outputs: Vec<Tensor>,
    n_embd: usize,
    n_out: usize,
    results: Vec<f32>,
}

impl Net {
    /// Takes weights over, quantized.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for shapes that do not fit together, [`LlamaError::Context`] without
    /// memory.
    pub fn new(w: &Weights, n_threads: usize) -> Result<Self, LlamaError> {
        let misuse = |what: &str| LlamaError::Misuse(format!("network weights: {what}"));
        let n_out = w.outputs.first().ok_or_else(|| misuse("no output matrix"))?.n_out;
        if w.n_embd == 0 || w.blocks.is_empty() || ![1, w.blocks.len()].contains(&w.outputs.len()) {
            return Err(misuse("an output matrix for each network, or one for all"));
        }
        let fits = |b: &Block| {
            b.weight.is(w.n_embd, w.n_embd)
                && b.bias.as_ref().is_none_or(|bias| bias.len() == w.n_embd)
        };
        if !w.blocks.iter().flatten().all(fits) || !w.outputs.iter().all(|m| m.is(n_out, w.n_embd))
        {
            return Err(misuse("shapes do not fit together"));
        }
        let matrices = w.outputs.iter().chain(w.blocks.iter().flatten().map(|b| &b.weight));
        let n_biases: usize = w.blocks.iter().map(Vec::len).sum();
        let mut store =
            Store::new(matrices.map(|m| m.values.len()).sum(), w.n_embd * n_biases, n_threads)?;
        let mut block = |b: &Block| {
            let weight = store.matrix(&b.weight, Precision::Eight)?;
            Ok((weight, b.bias.as_deref().map(|b| store.vector(b)).transpose()?))
        };
        let blocks = w
            .blocks
            .iter()
            .map(|blocks| blocks.iter().map(&mut block).collect::<Result<_, LlamaError>>());
        let blocks = blocks.collect::<Result<_, _>>()?;
        let outputs =
            w.outputs.iter().map(|m| store.matrix(m, Precision::Four)).collect::<Result<_, _>>()?;
        Ok(Self { store, blocks, outputs, n_embd: w.n_embd, n_out, results: vec![] })
    }

    /// Number of networks.
    #[must_use]
    pub fn n_nets(&self) -> usize {
        self.blocks.len()
    }

    /// Values that one network gives for one input row.
    #[must_use]
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// The outputs of all networks for `input`, rows of `n_embd` values: for each network, for each
    /// row, `n_out` values.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for a part of a row, [`LlamaError::Context`] without memory.
    pub fn forward(&mut self, input: &[f32]) -> Result<&[f32], LlamaError> {
        let (n_rows, rest) = (input.len() / self.n_embd, input.len() % self.n_embd);
        if n_rows == 0 || rest != 0 {
            return Err(LlamaError::Misuse(format!(
                "{} values are not rows of {}",
                input.len(),
                self.n_embd
            )));
        }
        // Every tensor of the graph has its own memory, and so has the product's working copy of
        // its input.
        let (n_nets, n_blocks) = (self.n_nets(), self.blocks.iter().map(Vec::len).sum::<usize>());
        let n_floats =
            n_rows * (self.n_embd * (2 + 4 * n_blocks + 3 * n_nets) + 2 * n_nets * self.n_out);
        let (blocks, outputs, n_embd) = (&self.blocks, &self.outputs, self.n_embd);
        // SAFETY: all tensors are live and their shapes fit together (checked in `new`); the room
        // is computed above.
        unsafe {
            self.store.compute(n_floats, &mut self.results, |ctx| {
                build(ctx, store::input(ctx, input, n_embd), blocks, outputs)
            })
        }?;
        Ok(&self.results)
    }
}

/// The graph, up to its outputs.
///
/// # Safety
/// As [`Store::compute`] asks.
unsafe fn build(
    ctx: *mut sys::ggml_context,
    x: *mut sys::ggml_tensor,
    blocks: &[Vec<(Tensor, Option<Tensor>)>],
    outputs: &[Tensor],
) -> Vec<*mut sys::ggml_tensor> {
    // SAFETY: by contract.
    unsafe {
        let mut states = vec![];
        for blocks in blocks {
            let mut state = x;
            for (weight, bias) in blocks {
                let mut inner = sys::ggml_mul_mat(ctx, weight.as_ptr(), state);
                if let Some(bias) = bias {
                    inner = sys::ggml_add(ctx, inner, bias.as_ptr());
                }
                state = sys::ggml_add(ctx, state, sys::ggml_silu(ctx, inner));
            }
            states.push(state);
        }
        if let [output] = outputs {
            // One matrix for all: one product over the rows of all networks.
            let all = states[1..]
                .iter()
                .fold(states[0], |all, &state| sys::ggml_concat(ctx, all, state, 1));
            return vec![sys::ggml_mul_mat(ctx, output.as_ptr(), all)];
        }
        states.iter().zip(outputs).map(|(&s, o)| sys::ggml_mul_mat(ctx, o.as_ptr(), s)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The formula in plain Rust.
    fn twin(w: &Weights, x: &[f32]) -> Vec<f32> {
        let product = |m: &Matrix, x: &[f32]| -> Vec<f32> {
            m.values.chunks(m.n_in).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        let mut out = vec![];
        for (i, blocks) in w.blocks.iter().enumerate() {
            for row in x.chunks(w.n_embd) {
                let mut state = row.to_vec();
                for block in blocks {
                    let mut inner = product(&block.weight, &state);
                    inner.iter_mut().zip(block.bias.iter().flatten()).for_each(|(v, b)| *v += b);
                    state.iter_mut().zip(inner).for_each(|(s, v)| *s += v / (1.0 + (-v).exp()));
                }
                out.extend(product(w.outputs.get(i).unwrap_or(&w.outputs[0]), &state));
            }
        }
        out
    }

    pub(in crate::llama) fn random(n: usize, seed: u64, scale: f32) -> Vec<f32> {
        let mut x = seed * 2 + 1;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * scale
        };
        (0..n).map(|_| next()).collect()
    }

    /// Values that 4 bits hold exactly: sixteen steps, the lowest and the highest in each 32.
    pub(in crate::llama) fn on_grid(n: usize, seed: u64) -> Vec<f32> {
        let mut values = random(n, seed, 1.0);
        values.iter_mut().for_each(|v| *v = ((*v + 0.5) * 15.99).floor() / 16.0 - 0.5);
        values.chunks_mut(32).for_each(|block| {
            block[0] = -0.5;
            block[1] = 15.0 / 16.0 - 0.5;
        });
        values
    }

    #[test]
    fn ggml_computes_the_formula() {
        // Rows that 32 does not divide are F16, others quantized, and repacked where 8 divides
        // their number.
        for (n_embd, n_out, n_nets, n_blocks, shared, n_rows) in [
            (64, 100, 3, 1, true, 5),
            (96, 33, 2, 2, false, 1),
            (30, 7, 4, 1, false, 9),
            (32, 1, 1, 0, true, 2),
            (32, 8, 1, 1, true, 1),
            (576, 40, 2, 1, true, 7),
            (64, 1000, 1, 1, true, 33),
            (96, 16, 1, 1, false, 600),
        ] {
            let matrix = |n_out, seed| Matrix {
                n_out,
                n_in: n_embd,
                values: random(n_out * n_embd, seed, 1.0),
            };
            let block = |seed| Block {
                weight: matrix(n_embd, seed),
                bias: (seed % 2 == 0).then(|| random(n_embd, seed + 9, 1.0)),
            };
            let w = Weights {
                n_embd,
                blocks: (0..n_nets)
                    .map(|i| (0..n_blocks).map(|j| block(10 * i + j)).collect())
                    .collect(),
                outputs: (0..if shared { 1 } else { n_nets })
                    .map(|i| Matrix { values: on_grid(n_out * n_embd, 77 + i), ..matrix(n_out, 0) })
                    .collect(),
            };
            let mut net = Net::new(&w, 2).unwrap();
            for n_rows in [n_rows, n_rows + 1, n_rows + 3] {
                let x = random(n_rows * n_embd, 5, 4.0);
                let (got, want) = (net.forward(&x).unwrap().to_vec(), twin(&w, &x));
                assert_eq!(got.len(), want.len());
                let size = (want.iter().map(|v| v * v).sum::<f32>() / want.len() as f32).sqrt();
                let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 0.05 * size, "{n_embd} {n_out} {n_nets} {n_rows}: {far} of {size}");
                // A row does not depend on the rows beside it.
                for row in (0..n_rows).take(40) {
                    let alone = net.forward(&x[row * n_embd..][..n_embd]).unwrap();
                    for net in 0..n_nets as usize {
                        let got = &got[(net * n_rows + row) * n_out..][..n_out];
                        assert_eq!(alone[net * n_out..][..n_out], *got, "row {row} of {n_rows}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_that_do_not_fit_together_are_refused() {
        let m = |n_out, n_in| Matrix { n_out, n_in, values: vec![0.0; n_out * n_in] };
        let good = Weights {
            n_embd: 4,
            blocks: vec![vec![Block { weight: m(4, 4), bias: None }]],
            outputs: vec![m(3, 4)],
        };
        assert!(Net::new(&good, 1).is_ok_and(|mut net| net.forward(&[0.0; 5]).is_err()));
        let mut bad = vec![good.clone(); 4];
        bad[0].outputs.clear();
        bad[1].outputs[0].values.pop();
        bad[2].blocks[0][0].bias = Some(vec![0.0; 3]);
        bad[3].blocks[0][0].weight = m(5, 4);
        assert!(bad.iter().all(|w| Net::new(w, 1).is_err()));
    }
}
