//! The network of Medusa heads: residual blocks and an output matrix.

use crate::llama::Threads;
use crate::llama::ggml::{Graph, Node, Op, Quantized, Store, Weight};
use crate::matrix::Matrix;
use crate::speculate::error::HeadsError;

/// `x + SiLU(W x + b)`.
#[derive(Clone, Debug, PartialEq)]
pub struct ResidualBlock {
    /// `W`: square.
    pub weight: Matrix,
    /// `b`; absent in some layouts.
    pub bias: Option<Vec<f32>>,
}

/// Heads that share an input: each a chain of blocks, then an output matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct MedusaWeights {
    /// Width of the input and of all blocks.
    pub n_embd: usize,
    /// The blocks of each head.
    pub blocks: Vec<Vec<ResidualBlock>>,
    /// One output matrix for each head, or one for all, of equal shapes; none: the model's own.
    pub outputs: Vec<Matrix>,
}

/// Heads ready to compute. Belongs to one thread.
pub struct MedusaNet {
    store: Store,
    blocks: Vec<Vec<(Weight, Option<Weight>)>>,
    outputs: Vec<Weight>,
    n_embd: usize,
    n_out: usize,
    results: Vec<f32>,
}

impl MedusaNet {
    /// Quantizes the weights, which must include output matrices.
    ///
    /// # Errors
    /// [`HeadsError::Shape`] for shapes that do not match, [`HeadsError::Llama`] without memory.
    pub fn new(w: &MedusaWeights, threads: &Threads) -> Result<Self, HeadsError> {
        let shape = |what: &str| HeadsError::Shape(what.to_owned());
        if w.blocks.is_empty() || ![1, w.blocks.len()].contains(&w.outputs.len()) {
            return Err(shape("they need an output matrix each, or one for all"));
        }
        let n_out = w.outputs[0].n_out;
        let fits = |b: &ResidualBlock| {
            b.weight.is(w.n_embd, w.n_embd)
                && b.bias.as_ref().is_none_or(|bias| bias.len() == w.n_embd)
        };
        if !w.blocks.iter().flatten().all(fits) || !w.outputs.iter().all(|m| m.is(n_out, w.n_embd))
        {
            return Err(shape("matrices differ in shape"));
        }
        let mut store = Store::new(threads)?;
        let mut block = |b: &ResidualBlock| {
            let weight = store.matrix(&b.weight, Quantized::Eight)?;
            Ok((weight, b.bias.as_deref().map(|b| store.vector(b)).transpose()?))
        };
        let blocks = w.blocks.iter().map(|head| head.iter().map(&mut block).collect());
        let blocks = blocks.collect::<Result<_, HeadsError>>()?;
        let outputs = w.outputs.iter().map(|m| store.matrix(m, Quantized::Four));
        let outputs = outputs.collect::<Result<_, _>>()?;
        Ok(Self { store, blocks, outputs, n_embd: w.n_embd, n_out, results: vec![] })
    }

    /// Number of heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.blocks.len()
    }

    /// Logits of one head for one row.
    #[must_use]
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Computes all heads for `input`, whole rows of `n_embd` values. Returns
    /// `[n_heads, n_rows, n_out]`.
    pub fn forward(&mut self, input: &[f32]) -> Result<&[f32], HeadsError> {
        let mut graph = Graph::default();
        let x = graph.push(Op::Input(input, self.n_embd));
        let mut states: Vec<Node> = vec![];
        for blocks in &self.blocks {
            states.push(blocks.iter().fold(x, |state, &(weight, bias)| {
                let product = graph.push(Op::Product(weight, state));
                let inner = bias.map_or(product, |b| graph.push(Op::AddVector(product, b)));
                let active = graph.push(Op::Silu(inner));
                graph.push(Op::Add(state, active))
            }));
        }
        if self.outputs.len() == 1 {
            // One matrix for all heads: one product over the rows of all.
            states = states
                .into_iter()
                .reduce(|all, s| graph.push(Op::Concat(all, s)))
                .into_iter()
                .collect();
        }
        let logits: Vec<Node> = states
            .iter()
            .zip(&self.outputs)
            .map(|(&s, &o)| graph.push(Op::Product(o, s)))
            .collect();
        self.store.compute(&graph, &logits, &mut self.results)?;
        Ok(&self.results)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::speculate::nets) fn product(m: &Matrix, x: &[f32]) -> Vec<f32> {
        m.values.chunks(m.n_in).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    }

    /// Asserts that quantized weights gave about these values.
    pub(in crate::speculate::nets) fn assert_close(got: &[f32], want: &[f32], what: &str) {
        assert_eq!(got.len(), want.len());
        let size = (want.iter().map(|v| v * v).sum::<f32>() / want.len() as f32).sqrt();
        let far = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 0.05 * size, "{what}: {far} of {size}");
    }

    /// The formula in plain Rust.
    fn twin(w: &MedusaWeights, x: &[f32]) -> Vec<f32> {
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

    pub(in crate::speculate::nets) fn random(n: usize, seed: u64, scale: f32) -> Vec<f32> {
        let mut x = seed * 2 + 1;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * scale
        };
        (0..n).map(|_| next()).collect()
    }

    /// Values that 4 bits hold exactly: sixteen steps, the lowest and the highest in each 32.
    pub(in crate::speculate::nets) fn on_grid(n: usize, seed: u64) -> Vec<f32> {
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
        // Rows that are not a multiple of 32 values are F16, others are quantized, and repacked if
        // their number is a multiple of 8.
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
            let block = |seed| ResidualBlock {
                weight: matrix(n_embd, seed),
                bias: (seed % 2 == 0).then(|| random(n_embd, seed + 9, 1.0)),
            };
            let w = MedusaWeights {
                n_embd,
                blocks: (0..n_nets)
                    .map(|i| (0..n_blocks).map(|j| block(10 * i + j)).collect())
                    .collect(),
                outputs: (0..if shared { 1 } else { n_nets })
                    .map(|i| Matrix { values: on_grid(n_out * n_embd, 77 + i), ..matrix(n_out, 0) })
                    .collect(),
            };
            let mut net = MedusaNet::new(&w, &Threads::new(2).unwrap()).unwrap();
            for n_rows in [n_rows, n_rows + 1, n_rows + 3] {
                let x = random(n_rows * n_embd, 5, 4.0);
                let (got, want) = (net.forward(&x).unwrap().to_vec(), twin(&w, &x));
                assert_close(&got, &want, &format!("{n_embd} {n_out} {n_nets} {n_rows}"));
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
    fn weights_of_wrong_shapes_are_refused() {
        let m = |n_out, n_in| Matrix { n_out, n_in, values: vec![0.0; n_out * n_in] };
        let good = MedusaWeights {
            n_embd: 4,
            blocks: vec![vec![ResidualBlock { weight: m(4, 4), bias: None }]],
            outputs: vec![m(3, 4)],
        };
        let threads = Threads::new(1).unwrap();
        assert!(
            MedusaNet::new(&good, &threads).is_ok_and(|mut net| net.forward(&[0.0; 5]).is_err())
        );
        let mut bad = vec![good.clone(); 4];
        bad[0].outputs.clear();
        bad[1].outputs[0].values.pop();
        bad[2].blocks[0][0].bias = Some(vec![0.0; 3]);
        bad[3].blocks[0][0].weight = m(5, 4);
        assert!(bad.iter().all(|w| MedusaNet::new(w, &threads).is_err()));
    }
}
