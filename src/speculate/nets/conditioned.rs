//! The network of conditioned heads: each call goes one token deeper along the paths of a tree.
//!
//! With `z` the state before (the model's hidden state at first) and `e` the embedding of the
//! path's newest token, head `h` has `z' = z + V SiLU(W z + U e + b)`, and its logits are `Out z'`.
//! So a path's state depends on all of its tokens.

use crate::llama::Threads;
use crate::llama::ggml::{Graph, Op, Quantized, Store, Weight};
use crate::matrix::Matrix;
use crate::speculate::error::HeadsError;

/// One head.
#[derive(Clone, Debug, PartialEq)]
pub struct ConditionedHead {
    /// `W`: `width` rows of `n_embd`.
    pub w: Matrix,
    /// `U`, of the same shape.
    pub u: Matrix,
    /// `V`: `n_embd` rows of `width`.
    pub v: Matrix,
    /// `b`: `width` values.
    pub b: Vec<f32>,
}

/// Heads in the order of their depth; they share the model's output matrix, or rows of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ConditionedWeights {
    /// Width of states and embeddings.
    pub n_embd: usize,
    /// The heads.
    pub steps: Vec<ConditionedHead>,
}

/// Heads ready to compute. Belongs to one thread.
pub struct ConditionedNet {
    store: Store,
    steps: Vec<[Weight; 4]>,
    /// First rows of the output matrix, and all of them: each with their number, ascending.
    outputs: Vec<(usize, Weight)>,
    n_embd: usize,
    results: Vec<f32>,
}

impl ConditionedNet {
    /// Quantizes the weights; `output` is the matrix they share. Logits can be limited to its first
    /// rows, by one of the numbers in `cuts`: ascending multiples of eight.
    ///
    /// # Errors
    /// [`HeadsError::Shape`] for shapes that do not match, [`HeadsError::Llama`] for invalid cuts or
    /// without memory.
    pub fn new(
        weights: &ConditionedWeights,
        output: &Matrix,
        cuts: &[usize],
        threads: &Threads,
    ) -> Result<Self, HeadsError> {
        let d = weights.n_embd;
        let width = weights.steps.first().map_or(0, |s| s.b.len());
        let fits = |s: &ConditionedHead| {
            s.w.is(width, d) && s.u.is(width, d) && s.v.is(d, width) && s.b.len() == width
        };
        if width == 0 || !weights.steps.iter().all(fits) || !output.is(output.n_out, d) {
            return Err(HeadsError::Shape("there are none, or matrices differ in shape".into()));
        }
        let mut store = Store::new(threads)?;
        let mut steps = vec![];
        for s in &weights.steps {
            let [w, u, v] = [&s.w, &s.u, &s.v].map(|m| store.matrix(m, Quantized::Eight));
            steps.push([w?, u?, v?, store.vector(&s.b)?]);
        }
        let whole = store.matrix(output, Quantized::Four)?;
        let mut outputs = vec![];
        for &n in cuts.iter().filter(|&&n| n < output.n_out) {
            outputs.push((n, store.first_rows(whole, n)?));
        }
        outputs.push((output.n_out, whole));
        Ok(Self { store, steps, outputs, n_embd: d, results: vec![] })
    }

    /// Number of heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.steps.len()
    }

    /// Width of states and embeddings.
    #[must_use]
    pub fn n_embd(&self) -> usize {
        self.n_embd
    }

    /// Logits per row, ascending: the cuts, and all rows of the output matrix.
    pub fn n_outs(&self) -> impl Iterator<Item = usize> {
        self.outputs.iter().map(|(n, _)| *n)
    }

    /// Goes one token deeper with head `step`: from `states` and the `embeddings` of the next
    /// tokens, each rows of `n_embd` values, to the new states and the logits: the first of them, as
    /// many as the `cut`-th of [`n_outs`](Self::n_outs).
    ///
    /// # Errors
    /// [`HeadsError::Shape`] for a missing head or cut, [`HeadsError::Llama`] for rows that do not
    /// match, or without memory.
    pub fn forward(
        &mut self,
        step: usize,
        cut: usize,
        states: &[f32],
        embeddings: &[f32],
    ) -> Result<(&[f32], &[f32]), HeadsError> {
        let (Some(&[w, u, v, b]), Some(&(_, output))) =
            (self.steps.get(step), self.outputs.get(cut))
        else {
            return Err(HeadsError::Shape(format!("there is no head {step} with cut {cut}")));
        };
        let mut graph = Graph::default();
        let [z, e] = [states, embeddings].map(|rows| graph.push(Op::Input(rows, self.n_embd)));
        let [wz, ue] = [(w, z), (u, e)].map(|(w, x)| graph.push(Op::Product(w, x)));
        let sum = graph.push(Op::Add(wz, ue));
        let inner = graph.push(Op::AddVector(sum, b));
        let active = graph.push(Op::Silu(inner));
        let change = graph.push(Op::Product(v, active));
        let z = graph.push(Op::Add(z, change));
        let logits = graph.push(Op::Product(output, z));
        self.store.compute(&graph, &[z, logits], &mut self.results)?;
        Ok(self.results.split_at(states.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::medusa::tests::{assert_close, on_grid, product, random};
    use super::*;

    /// The formula in plain Rust.
    fn twin(s: &ConditionedHead, output: &Matrix, z: &[f32], e: &[f32]) -> (Vec<f32>, Vec<f32>) {
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
            let step = |i| ConditionedHead {
                w: matrix(width, d, i),
                u: matrix(width, d, i + 1),
                v: matrix(d, width, i + 2),
                b: random(width, i + 3, 1.0),
            };
            let output = Matrix { values: on_grid(n_out * d, 40), ..matrix(n_out, d, 0) };
            let weights = ConditionedWeights { n_embd: d, steps: vec![step(1), step(11)] };
            let mut net =
                ConditionedNet::new(&weights, &output, &[8, 32], &Threads::new(2).unwrap())
                    .unwrap();
            let (z, e) = (random(n_rows * d, 5, 4.0), random(n_rows * d, 6, 4.0));
            let whole = net.n_outs().count() - 1;
            for (i, step) in weights.steps.iter().enumerate() {
                let (states, logits) = net.forward(i, whole, &z, &e).unwrap();
                let want: Vec<_> =
                    z.chunks(d).zip(e.chunks(d)).map(|(z, e)| twin(step, &output, z, e)).collect();
                let (want_states, want_logits): (Vec<_>, Vec<_>) = want.into_iter().unzip();
                assert_close(states, &want_states.concat(), &format!("states {d} {width}"));
                assert_close(logits, &want_logits.concat(), &format!("logits {d} {width}"));
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
