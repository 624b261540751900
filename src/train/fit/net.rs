//! The draft heads' network, forward and backward. Knows neither tokens nor losses: it turns hidden
//! states and embeddings into one state per head, and gradients of those states into gradients of
//! its parameters.
//!
//! A network is a list of residual blocks `z' = z + V SiLU(W z + sum_j U_j e_j + b)`. What differs
//! between kinds is only where a block's `z` comes from, which tokens it sees, and whether it has a
//! `V`:
//!
//! | kind | block of head h reads | tokens | V |
//! |---|---|---|---|
//! | medusa | the hidden state x | none | identity |
//! | conditioned | the state of head h-1 (head 0: x) | c_h, head 0 also the one before | d x m |
//! | flat | x | c_0 ... c_h | d x m |
//!
//! Parameters are one flat slice, so that an optimizer and a checkpoint need not know the blocks.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use serde::{Deserialize, Serialize};

use crate::train::fit::lanes;

/// How the heads are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Each head from the hidden state alone.
    Medusa,
    /// Each head from the one before and the token drafted in between.
    Conditioned,
    /// Each head from the hidden state and all tokens of the path.
    Flat,
}

/// What a network is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// How the heads are built.
    pub kind: Kind,
    /// Width of the hidden state, d.
    pub n_embd: usize,
    /// Width of a block, m; `Medusa` has blocks of `n_embd`.
    pub width: usize,
    /// Heads.
    pub n_heads: usize,
    /// Blocks of each head, the first head's in front.
    pub n_blocks: Vec<usize>,
    /// The first head also sees the token at the hidden state's own position.
    pub previous: bool,
}

/// What a block reads besides its parameters.
#[derive(Clone, Debug)]
struct Block {
    head: usize,
    /// The block whose result it continues; `None`: the hidden state.
    from: Option<usize>,
    /// Columns of the path: 0 is the token at the hidden state's position, 1 + j is c_j.
    tokens: Vec<usize>,
    /// Rows of W, U and b.
    width: usize,
    w: Range<usize>,
    u: Vec<Range<usize>>,
    b: Range<usize>,
    v: Option<Range<usize>>,
}

/// A network's shape with the place of each parameter.
#[derive(Clone, Debug)]
pub struct Net {
    n_embd: usize,
    blocks: Vec<Block>,
    /// The last block of each head.
    heads: Vec<usize>,
    n_params: usize,
}

/// What the backward pass needs of the forward pass.
pub struct Trace {
    /// Per block: what goes into SiLU, what comes out of it, and the block's result.
    steps: Vec<(Array2<f32>, Array2<f32>, Array2<f32>)>,
}

/// One matrix of a network for a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// `{head}.w`; of a head's further blocks `{head}.{block}.w`.
    pub name: String,
    /// Rows and columns; a bias has one number.
    pub shape: Vec<usize>,
    /// Where in the parameters.
    pub range: Range<usize>,
}

impl Net {
    /// Lays out the parameters.
    #[must_use]
    pub fn new(shape: &Shape) -> Self {
        let d = shape.n_embd;
        let m = if shape.kind == Kind::Medusa { d } else { shape.width };
        let mut net = Self { n_embd: d, blocks: Vec::new(), heads: Vec::new(), n_params: 0 };
        for head in 0..shape.n_heads {
            for block in 0..shape.n_blocks.get(head).copied().unwrap_or(1).max(1) {
                let last = net.blocks.len().checked_sub(1);
                let from = if block > 0 || shape.kind == Kind::Conditioned { last } else { None };
                let tokens = match shape.kind {
                    Kind::Medusa => Vec::new(),
                    Kind::Conditioned if head == 0 && block == 0 && shape.previous => vec![0, 1],
                    Kind::Conditioned => vec![1 + head],
                    Kind::Flat => (usize::from(!shape.previous)..=1 + head).collect(),
                };
                let mut take = |n: usize| {
                    net.n_params += n;
                    net.n_params - n..net.n_params
                };
                let (w, b) = (take(m * d), take(m));
                let u = tokens.iter().map(|_| take(m * d)).collect();
                let v = (shape.kind != Kind::Medusa).then(|| take(d * m));
                net.blocks.push(Block { head, from, tokens, width: m, w, u, b, v });
            }
            net.heads.push(net.blocks.len() - 1);
        }
        net
    }

    /// Numbers in all matrices.
    #[must_use]
    pub fn n_params(&self) -> usize {
        self.n_params
    }

    /// The matrices by name.
    #[must_use]
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let nth = i - self.blocks.iter().position(|b| b.head == block.head).unwrap_or(i);
            let stem =
                if nth == 0 { block.head.to_string() } else { format!("{}.{nth}", block.head) };
            let (m, d) = (block.width, self.n_embd);
            let mut push = |name: String, shape: Vec<usize>, range: &Range<usize>| {
                tensors.push(Tensor {
                    name: format!("{stem}.{name}"),
                    shape,
                    range: range.clone(),
                });
            };
            push("w".into(), vec![m, d], &block.w);
            push("b".into(), vec![m], &block.b);
            for (token, u) in block.tokens.iter().zip(&block.u) {
                let own = *token == 1 + block.head;
                push(if own { "u".into() } else { format!("u{token}") }, vec![m, d], u);
            }
            if let Some(v) = &block.v {
                push("v".into(), vec![d, m], v);
            }
        }
        tensors
    }

    /// Parameters to begin with: W and U uniform with deviation `1/sqrt(d)`, what follows SiLU
    /// zero, so that every head begins as the model's own prediction of the next token. (`Medusa`
    /// has no V: there W is zero.)
    #[must_use]
    pub fn init(&self, rng: &mut fastrand::Rng) -> Vec<f32> {
        let mut params = vec![0.0; self.n_params];
        let limit = (3.0 / self.n_embd as f32).sqrt();
        for block in self.blocks.iter().filter(|block| block.v.is_some()) {
            for range in std::iter::once(&block.w).chain(&block.u) {
                params[range.clone()].fill_with(|| (rng.f32() * 2.0 - 1.0) * limit);
            }
        }
        params
    }

    fn matrix<'a>(
        &self,
        params: &'a [f32],
        range: &Range<usize>,
        rows: usize,
    ) -> ArrayView2<'a, f32> {
        ArrayView2::from_shape((rows, range.len() / rows), &params[range.clone()])
            .expect("ranges are whole matrices")
    }

    fn matrix_mut<'a>(
        &self,
        params: &'a mut [f32],
        range: &Range<usize>,
        rows: usize,
    ) -> ArrayViewMut2<'a, f32> {
        let n = range.len() / rows;
        ArrayViewMut2::from_shape((rows, n), &mut params[range.clone()])
            .expect("ranges are whole matrices")
    }

    /// The states of all heads for hidden states `x` [b, d] and the path's embeddings `e`, one [b,
    /// d] per column: the token at the hidden state's position, c_0, c_1, ...
    #[must_use]
    pub fn forward(&self, params: &[f32], x: &Array2<f32>, e: &[Array2<f32>]) -> Trace {
        let mut trace = Trace { steps: Vec::with_capacity(self.blocks.len()) };
        for block in &self.blocks {
            let z = block.from.map_or(x, |i| &trace.steps[i].2);
            let mut a = Array2::zeros((x.nrows(), block.width));
            a += &ArrayView2::from_shape((1, block.width), &params[block.b.clone()])
                .expect("a bias is one row");
            general_mat_mul(1.0, z, &self.matrix(params, &block.w, block.width).t(), 1.0, &mut a);
            for (token, u) in block.tokens.iter().zip(&block.u) {
                general_mat_mul(
                    1.0,
                    &e[*token],
                    &self.matrix(params, u, block.width).t(),
                    1.0,
                    &mut a,
                );
            }
            let mut s = a.clone();
            lanes::silu(s.as_slice_mut().expect("rows follow one another"));
            let mut out = z.clone();
            match &block.v {
                Some(v) => general_mat_mul(
                    1.0,
                    &s,
                    &self.matrix(params, v, self.n_embd).t(),
                    1.0,
                    &mut out,
                ),
                None => out += &s,
            }
            trace.steps.push((a, s, out));
        }
        trace
    }

    /// Adds the parameters' gradients to `grad`, given those of each head's state in `dz`.
    pub fn backward(
        &self,
        params: &[f32],
        x: &Array2<f32>,
        e: &[Array2<f32>],
        trace: &Trace,
        dz: Vec<Array2<f32>>,
        grad: &mut [f32],
    ) {
        let mut pending: Vec<Option<Array2<f32>>> = vec![None; self.blocks.len()];
        for (dz, &block) in dz.into_iter().zip(&self.heads) {
            pending[block] = Some(dz);
        }
        for (i, block) in self.blocks.iter().enumerate().rev() {
            let Some(dout) = pending[i].take() else { continue };
            let (a, s, _) = &trace.steps[i];
            let z = block.from.map_or(x, |i| &trace.steps[i].2);
            let mut da = match &block.v {
                Some(v) => {
                    general_mat_mul(
                        1.0,
                        &dout.t(),
                        s,
                        1.0,
                        &mut self.matrix_mut(grad, v, self.n_embd),
                    );
                    dout.dot(&self.matrix(params, v, self.n_embd))
                }
                None => dout.clone(),
            };
            lanes::silu_backward(
                a.as_slice().expect("as made"),
                da.as_slice_mut().expect("as made"),
            );
            general_mat_mul(
                1.0,
                &da.t(),
                z,
                1.0,
                &mut self.matrix_mut(grad, &block.w, block.width),
            );
            for (token, u) in block.tokens.iter().zip(&block.u) {
                general_mat_mul(
                    1.0,
                    &da.t(),
                    &e[*token],
                    1.0,
                    &mut self.matrix_mut(grad, u, block.width),
                );
            }
            for (g, d) in grad[block.b.clone()].iter_mut().zip(da.sum_axis(Axis(0))) {
                *g += d;
            }
            if let Some(from) = block.from {
                let mut dz = dout; // the residual path
                general_mat_mul(
                    1.0,
                    &da,
                    &self.matrix(params, &block.w, block.width),
                    1.0,
                    &mut dz,
                );
                pending[from] = Some(match pending[from].take() {
                    Some(own) => own + dz,
                    None => dz,
                });
            }
        }
    }

    /// Heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.heads.len()
    }

    /// The state of head `h`, one row per example.
    #[must_use]
    pub fn state<'a>(&self, trace: &'a Trace, h: usize) -> &'a Array2<f32> {
        &trace.steps[self.heads[h]].2
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
        for (kind, n_blocks, previous) in [
            (Kind::Medusa, vec![1, 1, 1], false),
            (Kind::Medusa, vec![2, 2, 2], false),
            (Kind::Conditioned, vec![1, 1, 1], false),
            (Kind::Conditioned, vec![2, 1, 1], true),
            (Kind::Flat, vec![1, 1, 1], true),
        ] {
            let shape = Shape { kind, n_embd: 6, width: 9, n_heads: 3, n_blocks, previous };
            let (net, mut rng) = (Net::new(&shape), fastrand::Rng::with_seed(3));
            let params: Vec<f32> = (0..net.n_params()).map(|_| rng.f32() - 0.5).collect();
            let x = random(5, 6, &mut rng);
            let e: Vec<_> = (0..4).map(|_| random(5, 6, &mut rng)).collect();
            let r: Vec<_> = (0..3).map(|_| random(5, 6, &mut rng)).collect();
            let loss = |params: &[f32]| {
                let trace = net.forward(params, &x, &e);
                r.iter()
                    .enumerate()
                    .map(|(h, r)| f64::from((r * net.state(&trace, h)).sum()))
                    .sum::<f64>()
            };
            let mut grad = vec![0.0; net.n_params()];
            net.backward(&params, &x, &e, &net.forward(&params, &x, &e), r.clone(), &mut grad);
            for tensor in net.tensors() {
                let mut direction = vec![0.0; params.len()];
                direction[tensor.range.clone()].fill_with(|| rng.f32() - 0.5);
                let at = |t: f32| {
                    loss(&params.iter().zip(&direction).map(|(p, d)| p + t * d).collect::<Vec<_>>())
                };
                let slope = (at(5e-3) - at(-5e-3)) / 1e-2;
                let along: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                let tolerance = 2e-3 * (1.0 + slope.abs());
                assert!(
                    (slope - along).abs() < tolerance,
                    "{kind:?} {}: {slope} and {along}",
                    tensor.name
                );
            }
        }
    }

    #[test]
    fn heads_begin_as_the_models_own_prediction() {
        let shape = Shape {
            kind: Kind::Conditioned,
            n_embd: 4,
            width: 8,
            n_heads: 2,
            n_blocks: vec![1, 1],
            previous: false,
        };
        let (net, mut rng) = (Net::new(&shape), fastrand::Rng::with_seed(1));
        let (x, e) = (random(3, 4, &mut rng), vec![random(3, 4, &mut rng); 3]);
        let trace = net.forward(&net.init(&mut rng), &x, &e);
        assert_eq!(net.state(&trace, 1), &x);
    }
}
