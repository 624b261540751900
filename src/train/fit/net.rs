//! The draft heads' network, forward and backward. Knows neither tokens nor losses: it turns hidden
//! states and embeddings into one state per head, and gradients of those states into gradients of
//! its parameters.
//!
//! A head is a residual block `z' = z + V SiLU(W z + U e + b)`:
//!
//! | kind | `z` of head h | `e` | V |
//! |---|---|---|---|
//! | medusa | the hidden state x | none | identity |
//! | conditioned | the state of head h-1 (head 0: x) | the embedding of c_h | d x m |
//!
//! Parameters are one flat slice, so that an optimizer and a checkpoint need not know the blocks.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayRef2, ArrayView2, ArrayViewMut2, Axis};
use serde::{Deserialize, Serialize};

use crate::train::fit::lanes;
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

/// The places of a head's parameters.
struct HeadRanges {
    w: Range<usize>,
    b: Range<usize>,
    /// U and V of a conditioned head.
    path: Option<[Range<usize>; 2]>,
}

/// A network's shape with the place of each parameter.
pub struct FitNet {
    n_embd: usize,
    /// Rows of W, U and b.
    width: usize,
    blocks: Vec<HeadRanges>,
    pub n_params: usize,
}

/// What the backward pass needs of the forward pass.
pub struct Activations {
    /// Per head: the input of SiLU, its output, and the head's state.
    heads: Vec<(Array2<f32>, Array2<f32>, Array2<f32>)>,
}

/// A named parameter of a network.
pub struct Parameter {
    /// `{head}.w`, and so on.
    pub name: String,
    /// Rows and columns; a bias has one number.
    pub shape: Vec<usize>,
    /// Its place among all parameters.
    pub range: Range<usize>,
}

/// Adds the product of two matrices to a third.
fn add_product(a: &ArrayRef2<f32>, b: &ArrayRef2<f32>, sum: &mut ArrayRef2<f32>) {
    general_mat_mul(1.0, a, b, 1.0, sum);
}

impl FitNet {
    pub fn new(shape: &NetShape) -> Self {
        let (d, conditioned) = (shape.n_embd, shape.kind == HeadKind::Conditioned);
        let m = if conditioned { shape.width } else { d };
        let mut n_params = 0;
        let mut take = |n: usize| {
            n_params += n;
            n_params - n..n_params
        };
        let block = |_| HeadRanges {
            w: take(m * d),
            b: take(m),
            path: conditioned.then(|| [take(m * d), take(d * m)]),
        };
        let blocks = (0..shape.n_heads).map(block).collect();
        Self { n_embd: d, width: m, blocks, n_params }
    }

    pub fn parameters(&self) -> Vec<Parameter> {
        let (m, d) = (self.width, self.n_embd);
        let mut all = Vec::new();
        for (head, block) in self.blocks.iter().enumerate() {
            let mut push = |name: &str, shape: Vec<usize>, range: &Range<usize>| {
                all.push(Parameter { name: format!("{head}.{name}"), shape, range: range.clone() });
            };
            push("w", vec![m, d], &block.w);
            push("b", vec![m], &block.b);
            if let Some([u, v]) = &block.path {
                push("u", vec![m, d], u);
                push("v", vec![d, m], v);
            }
        }
        all
    }

    /// Initial parameters: W and U uniform with deviation `1/sqrt(d)`, V zero, so that every head
    /// begins as the model's own prediction of the next token. Medusa heads have no V: their W is
    /// zero.
    pub fn init(&self, rng: &mut fastrand::Rng) -> Vec<f32> {
        let mut params = vec![0.0; self.n_params];
        let limit = (3.0 / self.n_embd as f32).sqrt();
        for block in &self.blocks {
            let Some([u, _]) = &block.path else { continue };
            for range in [&block.w, u] {
                params[range.clone()].fill_with(|| (rng.f32() * 2.0 - 1.0) * limit);
            }
        }
        params
    }

    fn matrix<'a>(params: &'a [f32], range: &Range<usize>, rows: usize) -> ArrayView2<'a, f32> {
        ArrayView2::from_shape((rows, range.len() / rows), &params[range.clone()])
            .expect("ranges are whole matrices")
    }

    fn matrix_mut<'a>(
        params: &'a mut [f32],
        range: &Range<usize>,
        rows: usize,
    ) -> ArrayViewMut2<'a, f32> {
        ArrayViewMut2::from_shape((rows, range.len() / rows), &mut params[range.clone()])
            .expect("ranges are whole matrices")
    }

    /// What a head continues: the state of the head before it, or the hidden state.
    fn input<'a>(&self, head: usize, x: &'a Array2<f32>, done: &'a Activations) -> &'a Array2<f32> {
        let is_chained = head > 0 && self.blocks[head].path.is_some();
        if is_chained { self.state(done, head - 1) } else { x }
    }

    /// The states of all heads for hidden states `x` [b, d] and the embeddings `e` of the tokens c_0,
    /// c_1, ..., one [b, d] per head.
    pub fn forward(&self, params: &[f32], x: &Array2<f32>, e: &[Array2<f32>]) -> Activations {
        let (m, d) = (self.width, self.n_embd);
        let mut done = Activations { heads: Vec::with_capacity(self.blocks.len()) };
        for (head, block) in self.blocks.iter().enumerate() {
            let z = self.input(head, x, &done);
            let mut a = Array2::zeros((x.nrows(), m));
            a += &Self::matrix(params, &block.b, 1);
            add_product(z, &Self::matrix(params, &block.w, m).t(), &mut a);
            if let Some([u, _]) = &block.path {
                add_product(&e[head], &Self::matrix(params, u, m).t(), &mut a);
            }
            let mut s = a.clone();
            lanes::silu(s.as_slice_mut().expect("rows follow one another"));
            let mut out = z.clone();
            match &block.path {
                Some([_, v]) => add_product(&s, &Self::matrix(params, v, d).t(), &mut out),
                None => out += &s,
            }
            done.heads.push((a, s, out));
        }
        done
    }

    /// Adds the parameters' gradients to `grad`, given those of each head's state in `dz`.
    pub fn backward(
        &self,
        params: &[f32],
        x: &Array2<f32>,
        e: &[Array2<f32>],
        done: &Activations,
        mut dz: Vec<Array2<f32>>,
        grad: &mut [f32],
    ) {
        let (m, d) = (self.width, self.n_embd);
        for (head, block) in self.blocks.iter().enumerate().rev() {
            let Some(mut dout) = dz.pop() else { continue };
            let (a, s, _) = &done.heads[head];
            let mut da = match &block.path {
                Some([_, v]) => {
                    add_product(&dout.t(), s, &mut Self::matrix_mut(grad, v, d));
                    dout.dot(&Self::matrix(params, v, d))
                }
                None => dout.clone(),
            };
            let (a, da_slice) = (a.as_slice().expect("as made"), da.as_slice_mut());
            lanes::silu_backward(a, da_slice.expect("as made"));
            let z = self.input(head, x, done);
            add_product(&da.t(), z, &mut Self::matrix_mut(grad, &block.w, m));
            for (g, d) in grad[block.b.clone()].iter_mut().zip(da.sum_axis(Axis(0))) {
                *g += d;
            }
            let Some([u, _]) = &block.path else { continue };
            add_product(&da.t(), &e[head], &mut Self::matrix_mut(grad, u, m));
            if let Some(before) = dz.last_mut() {
                add_product(&da, &Self::matrix(params, &block.w, m), &mut dout);
                *before += &dout; // the residual path
            }
        }
    }

    pub fn n_heads(&self) -> usize {
        self.blocks.len()
    }

    /// The state of a head, one row per example.
    pub fn state<'a>(&self, done: &'a Activations, head: usize) -> &'a Array2<f32> {
        &done.heads[head].2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, rng: &mut fastrand::Rng) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, columns), || rng.f32() * 2.0 - 1.0)
    }

    /// The gradient along random directions against the loss's slope there, for `sum_h <z_h, r_h>`
    /// with random r.
    #[test]
    fn gradients_are_the_slopes_of_the_loss() {
        for kind in [HeadKind::Medusa, HeadKind::Conditioned] {
            let shape = NetShape { kind, n_embd: 6, width: 9, n_heads: 3 };
            let (net, mut rng) = (FitNet::new(&shape), fastrand::Rng::with_seed(3));
            let params: Vec<f32> = (0..net.n_params).map(|_| rng.f32() - 0.5).collect();
            let x = random(5, 6, &mut rng);
            let e: Vec<_> = (0..3).map(|_| random(5, 6, &mut rng)).collect();
            let r: Vec<_> = (0..3).map(|_| random(5, 6, &mut rng)).collect();
            let loss = |params: &[f32]| {
                let trace = net.forward(params, &x, &e);
                r.iter()
                    .enumerate()
                    .map(|(h, r)| f64::from((r * net.state(&trace, h)).sum()))
                    .sum::<f64>()
            };
            let mut grad = vec![0.0; net.n_params];
            net.backward(&params, &x, &e, &net.forward(&params, &x, &e), r.clone(), &mut grad);
            for parameter in net.parameters() {
                let mut direction = vec![0.0; params.len()];
                direction[parameter.range.clone()].fill_with(|| rng.f32() - 0.5);
                let at = |t: f32| {
                    loss(&params.iter().zip(&direction).map(|(p, d)| p + t * d).collect::<Vec<_>>())
                };
                let slope = (at(5e-3) - at(-5e-3)) / 1e-2;
                let along: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                let tolerance = 2e-3 * (1.0 + slope.abs());
                assert!(
                    (slope - along).abs() < tolerance,
                    "{kind:?} {}: {slope} and {along}",
                    parameter.name
                );
            }
        }
    }

    #[test]
    fn heads_begin_as_the_models_own_prediction() {
        let shape = NetShape { kind: HeadKind::Conditioned, n_embd: 4, width: 8, n_heads: 2 };
        let (net, mut rng) = (FitNet::new(&shape), fastrand::Rng::with_seed(1));
        let (x, e) = (random(3, 4, &mut rng), vec![random(3, 4, &mut rng); 2]);
        let trace = net.forward(&net.init(&mut rng), &x, &e);
        assert_eq!(net.state(&trace, 1), &x);
    }
}
