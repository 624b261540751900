//! The network of conditioned heads, on ggml's kernels: each call goes one token deeper along the
//! paths of a tree.
//!
//! With `z` the state before (the model's hidden state at first) and `e` the embedding of the
//! path's newest token, head `h` has `z' = z + V SiLU(W z + U e + b)`, and its logits are `Out z'`.
//! So a path's state holds what its tokens were.

use super::store::{self, Matrix, Precision, Store, Tensor};
use super::{LlamaError, sys};

/// One head.
#[derive(Clone, Debug, PartialEq)]
pub struct PathStep {
    /// `W`: `width` rows of `n_embd`.
    pub w: Matrix,
    /// `U`, of the same shape.
    pub u: Matrix,
    /// `V`: `n_embd` rows of `width`.
    pub v: Matrix,
    /// `b`: `width` values.
    pub b: Vec<f32>,
}

/// Heads in the order of their depth, and the output matrix they share.
#[derive(Clone, Debug, PartialEq)]
pub struct PathWeights {
    /// Width of states and embeddings.
    pub n_embd: usize,
    /// The heads.
    pub steps: Vec<PathStep>,
    /// `Out`; `None` for rows of the model's own.
    pub output: Option<Matrix>,
}

/// Weights in ggml's memory, and room to compute. Belongs to one thread.
pub struct PathNet {
    store: Store,
    steps: Vec<[Tensor; 4]>,
    /// The output matrix's first rows, and all of them: each with their number, ascending.
    outputs: Vec<(usize, Tensor)>,
    n_embd: usize,
    width: usize,
    results: Vec<f32>,
}

impl PathNet {
    /// Takes weights over, quantized; `output` is the matrix they share. What it gives can be cut
    /// to its first rows, by one of the numbers in `cuts`: ascending multiples of eight.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for shapes that do not fit together, or cuts that are none,
    /// [`LlamaError::Context`] without memory.
    pub fn new(
        weights: &PathWeights,
        output: &Matrix,
        cuts: &[usize],
        n_threads: usize,
    ) -> Result<Self, LlamaError> {
        let misuse = |what: &str| LlamaError::Misuse(format!("network weights: {what}"));
        let d = weights.n_embd;
        let width = weights.steps.first().ok_or_else(|| misuse("no head"))?.b.len();
        let fits = |s: &PathStep| {
            s.w.is(width, d) && s.u.is(width, d) && s.v.is(d, width) && s.b.len() == width
        };
        if !weights.steps.iter().all(fits) || !output.is(output.n_out, d) {
            return Err(misuse("shapes do not fit together"));
        }
        let n_steps = weights.steps.len();
        let mut store =
            Store::new(output.values.len() + 3 * n_steps * width * d, n_steps * width, n_threads)?;
        let mut steps = vec![];
        for s in &weights.steps {
            let [w, u, v] = [&s.w, &s.u, &s.v].map(|m| store.matrix(m, Precision::Eight));
            steps.push([w?, u?, v?, store.vector(&s.b)?]);
        }
        let whole = store.matrix(output, Precision::Four)?;
        let cuts = cuts
            .iter()
            .filter(|&&n| n < output.n_out)
            .map(|&n| Ok((n, store.first_rows(whole, n)?)));
        let mut outputs = cuts.collect::<Result<Vec<_>, LlamaError>>()?;
        outputs.push((output.n_out, whole));
        Ok(Self { store, steps, outputs, n_embd: d, width, results: vec![] })
    }

    /// Number of heads.
    #[must_use]
    pub fn n_steps(&self) -> usize {
        self.steps.len()
    }

    /// Width of states and embeddings.
    #[must_use]
    pub fn n_embd(&self) -> usize {
        self.n_embd
    }

    /// Numbers of logits that a row can have, ascending: the cuts, and the output matrix's rows.
    pub fn n_outs(&self) -> impl Iterator<Item = usize> {
        self.outputs.iter().map(|(n, _)| *n)
    }

    /// Goes one token deeper with head `step`: from `states` and the `embeddings` of the tokens
    /// that follow, each rows of `n_embd` values, to the new states and then the logits: of
    /// [`n_outs`](Self::n_outs), the `cut`-th.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for a head or a cut that is not there, or rows that do not match;
    /// [`LlamaError::Context`] without memory.
    pub fn forward(
        &mut self,
        step: usize,
        cut: usize,
        states: &[f32],
        embeddings: &[f32],
    ) -> Result<(&[f32], &[f32]), LlamaError> {
        let (d, n_rows) = (self.n_embd, states.len() / self.n_embd);
        if step >= self.steps.len()
            || cut >= self.outputs.len()
            || n_rows == 0
            || states.len() != n_rows * d
            || embeddings.len() != states.len()
        {
            let (s, e) = (states.len(), embeddings.len());
            return Err(LlamaError::Misuse(format!(
                "head {step}, cut {cut}, {s} values of states, {e} of embeddings"
            )));
        }
        let [w, u, v, b] = self.steps[step];
        let (n_out, output) = self.outputs[cut];
        // Every tensor of the graph has its own memory, and so has a product's working copy of its
        // input.
        let n_floats = n_rows * (8 * d + 8 * self.width + n_out);
        // SAFETY: all tensors are live and their shapes fit together (checked in `new`); the room
        // is computed above.
        unsafe {
            self.store.compute(n_floats, &mut self.results, |ctx| {
                let z = store::input(ctx, states, d);
                let e = store::input(ctx, embeddings, d);
                let seen = sys::ggml_mul_mat(ctx, u.as_ptr(), e);
                let inner = sys::ggml_add(ctx, sys::ggml_mul_mat(ctx, w.as_ptr(), z), seen);
                let active = sys::ggml_silu(ctx, sys::ggml_add(ctx, inner, b.as_ptr()));
                let z = sys::ggml_add(ctx, z, sys::ggml_mul_mat(ctx, v.as_ptr(), active));
                vec![z, sys::ggml_mul_mat(ctx, output.as_ptr(), z)]
            })
        }?;
        Ok(self.results.split_at(n_rows * d))
    }
}

#[cfg(test)]
mod tests {
    use super::super::net::tests::{on_grid, random};
    use super::*;

    fn product(m: &Matrix, x: &[f32]) -> Vec<f32> {
        m.values.chunks(m.n_in).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    }

    /// The formula in plain Rust.
    fn twin(s: &PathStep, output: &Matrix, z: &[f32], e: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (wz, ue) = (product(&s.w, z), product(&s.u, e));
        let inner: Vec<f32> = wz.iter().zip(&ue).zip(&s.b).map(|((a, c), b)| a + c + b).collect();
        let active: Vec<f32> = inner.iter().map(|v| v / (1.0 + (-v).exp())).collect();
        let z: Vec<f32> = z.iter().zip(product(&s.v, &active)).map(|(z, v)| z + v).collect();
        let logits = product(output, &z);
        (z, logits)
    }

    #[test]
    fn ggml_computes_the_formula() {
        for (d, width, n_out, n_rows) in
            [(64, 96, 100, 5), (32, 32, 7, 1), (30, 34, 9, 3), (64, 64, 96, 12), (64, 96, 104, 9)]
        {
            let matrix =
                |n_out, n_in, seed| Matrix { n_out, n_in, values: random(n_out * n_in, seed, 0.5) };
            let step = |i| PathStep {
                w: matrix(width, d, i),
                u: matrix(width, d, i + 1),
                v: matrix(d, width, i + 2),
                b: random(width, i + 3, 1.0),
            };
            let output = Matrix { values: on_grid(n_out * d, 40), ..matrix(n_out, d, 0) };
            let weights = PathWeights { n_embd: d, steps: vec![step(1), step(11)], output: None };
            let mut net = PathNet::new(&weights, &output, &[8, 32], 2).unwrap();
            let (z, e) = (random(n_rows * d, 5, 4.0), random(n_rows * d, 6, 4.0));
            let whole = net.n_outs().count() - 1;
            for (i, step) in weights.steps.iter().enumerate() {
                let (states, logits) = net.forward(i, whole, &z, &e).unwrap();
                let want: Vec<_> =
                    z.chunks(d).zip(e.chunks(d)).map(|(z, e)| twin(step, &output, z, e)).collect();
                for (got, want) in [
                    (states, want.iter().flat_map(|w| &w.0).copied().collect::<Vec<_>>()),
                    (logits, want.iter().flat_map(|w| &w.1).copied().collect()),
                ] {
                    assert_eq!(got.len(), want.len());
                    let size = (want.iter().map(|v| v * v).sum::<f32>() / want.len() as f32).sqrt();
                    let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(far < 0.05 * size, "{d} {width}: {far} of {size}");
                }
            }
            // A cut gives the first of the same logits.
            let all = net.forward(1, whole, &z, &e).unwrap().1.to_vec();
            for (cut, n) in net.n_outs().collect::<Vec<_>>().into_iter().enumerate() {
                let got = net.forward(1, cut, &z, &e).unwrap().1;
                assert_eq!(got.len(), n * n_rows);
                got.chunks(n)
                    .zip(all.chunks(n_out))
                    .for_each(|(got, all)| assert_eq!(got, &all[..n]));
            }
            assert!(
                net.forward(2, 0, &z, &e).is_err() && net.forward(0, whole + 1, &z, &e).is_err()
            );
            assert!(
                net.forward(0, 0, &z, &e[1..]).is_err() && net.forward(0, 0, &[], &[]).is_err()
            );
        }
    }
}
