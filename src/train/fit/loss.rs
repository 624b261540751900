//! Cross entropy of head states against the model's own distribution, over all draft tokens or a
//! sample of them.
//!
//! The product with all draft rows is three quarters of a training step. A minibatch therefore
//! compares its states with fewer classes: every token that some row of the minibatch has as a
//! label, and a uniform sample of the others. A sampled class represents `1 / p` others, p its
//! chance to be drawn: adding `-ln p` to its logit makes the sum of exponentials, and so the
//! gradient up to the logarithm's curvature, right on average.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

use crate::train::fit::lanes;
use crate::vector::largest;

/// Rows of logits at a time: 256 rows of 4,096 classes are 4 MiB, which stay in the last cache.
const CHUNK: usize = 256;
/// No draft token.
pub const NONE: u32 = u32::MAX;

/// The labels of a minibatch: for each pair of head and example a list of output rows and
/// probabilities, which may be empty.
#[derive(Clone, Default)]
pub struct Targets {
    ends: Vec<usize>,
    rows: Vec<u32>,
    p: Vec<f32>,
}

impl Targets {
    /// Appends the next pair's labels.
    pub fn push(&mut self, labels: impl Iterator<Item = (u32, f32)>) {
        for (row, p) in labels {
            self.rows.push(row);
            self.p.push(p);
        }
        self.ends.push(self.rows.len());
    }

    fn of(&self, pair: usize) -> impl Iterator<Item = (usize, f32)> {
        let range = pair.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[pair];
        self.rows[range.clone()].iter().map(|&row| row as usize).zip(self.p[range].iter().copied())
    }
}

/// The classes that a minibatch is compared with.
pub struct Classes<'a> {
    output: ndarray::CowArray<'a, f32, ndarray::Ix2>,
    /// Classes from this index on are a sample.
    n_certain: usize,
    /// Added to the logits of the sample: minus the logarithm of the probability to be drawn.
    correction: f32,
}

impl<'a> Classes<'a> {
    /// All labels and a sample of the other classes, `n` in all, but at least a quarter of `n` others.
    /// The labels' rows become indices of the classes.
    pub fn sample(
        output: ArrayView2<'a, f32>,
        labels: &mut Targets,
        n: usize,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let mut place = vec![NONE; output.nrows()];
        let mut rows: Vec<usize> = Vec::with_capacity(n);
        for row in &mut labels.rows {
            let place = &mut place[*row as usize];
            if *place == NONE {
                *place = rows.len() as u32;
                rows.push(*row as usize);
            }
            *row = *place;
        }
        let n_certain = rows.len();
        let mut others: Vec<usize> =
            (0..output.nrows()).filter(|&row| place[row] == NONE).collect();
        let n_drawn = n.saturating_sub(n_certain).max(n / 4).min(others.len());
        for i in 0..n_drawn {
            let j = rng.usize(i..others.len());
            others.swap(i, j);
        }
        rows.extend(&others[..n_drawn]);
        let chosen = output.select(Axis(0), &rows);
        let correction = -(n_drawn.max(1) as f32 / others.len().max(1) as f32).ln();
        Self { output: chosen.into(), n_certain, correction }
    }

    /// The loss of states [n, d] against the labels of the pairs from `first` on, summed over
    /// examples and times `weight`; its gradient replaces `dz`.
    pub fn cross_entropy(
        &self,
        z: &Array2<f32>,
        labels: &Targets,
        first: usize,
        weight: f32,
        mut dz: ArrayViewMut2<'_, f32>,
    ) -> f64 {
        let (mut loss, mut pair) = (0.0, first);
        for (z, mut dz) in
            z.axis_chunks_iter(Axis(0), CHUNK).zip(dz.axis_chunks_iter_mut(Axis(0), CHUNK))
        {
            let mut logits = z.dot(&self.output.t());
            for mut row in logits.outer_iter_mut() {
                let row = row.as_slice_mut().expect("rows follow one another");
                loss += self.row(row, labels, pair, weight);
                pair += 1;
            }
            general_mat_mul(1.0, &logits, &self.output, 0.0, &mut dz);
        }
        loss
    }

    /// Turns one row of logits into their gradient.
    fn row(&self, logits: &mut [f32], labels: &Targets, pair: usize, weight: f32) -> f64 {
        let mass: f32 = labels.of(pair).map(|(_, p)| p).sum();
        if mass == 0.0 {
            logits.fill(0.0);
            return 0.0;
        }
        let label: f32 = labels.of(pair).map(|(class, p)| p * logits[class]).sum();
        let (certain, drawn) = logits.split_at_mut(self.n_certain);
        let max = largest(certain).max(largest(drawn) + self.correction);
        let sum = lanes::exp_minus(certain, max) + lanes::exp_minus(drawn, max - self.correction);
        lanes::scale(logits, weight * mass / sum);
        for (class, p) in labels.of(pair) {
            logits[class] -= weight * p;
        }
        f64::from(weight) * (f64::from(mass) * f64::from(max + sum.ln()) - f64::from(label))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All draft rows.
    fn all(output: &Array2<f32>) -> Classes<'_> {
        Classes { n_certain: output.nrows(), output: output.view().into(), correction: 0.0 }
    }

    fn setting() -> (Array2<f32>, Array2<f32>, Targets) {
        let mut rng = fastrand::Rng::with_seed(5);
        let output = Array2::from_shape_simple_fn((300, 8), || rng.f32() * 2.0 - 1.0);
        let z = Array2::from_shape_simple_fn((4, 8), || rng.f32() * 2.0 - 1.0);
        let mut labels = Targets::default();
        labels.push([(3, 0.5), (299, 0.25)].into_iter());
        labels.push(std::iter::empty());
        labels.push([(0, 1.0)].into_iter());
        labels.push([(7, 0.9), (3, 0.1)].into_iter());
        (output, z, labels)
    }

    #[test]
    fn gradients_are_the_slopes_of_the_loss() {
        let (output, z, labels) = setting();
        let classes = all(&output);
        let mut dz = Array2::zeros(z.dim());
        classes.cross_entropy(&z, &labels, 0, 0.8, dz.view_mut());
        for at in [(0, 1), (1, 3), (2, 7), (3, 0)] {
            let loss = |step: f32| {
                let mut z = z.clone();
                z[at] += step;
                classes.cross_entropy(&z, &labels, 0, 0.8, Array2::zeros(z.dim()).view_mut())
            };
            let slope = (loss(1e-2) - loss(-1e-2)) / 2e-2;
            assert!((slope - f64::from(dz[at])).abs() < 1e-3, "{at:?}: {slope} and {}", dz[at]);
        }
    }

    #[test]
    fn a_sample_of_classes_gives_the_full_gradient_on_average() {
        let (output, z, labels) = setting();
        let mut full = Array2::zeros(z.dim());
        let full_loss = all(&output).cross_entropy(&z, &labels, 0, 1.0, full.view_mut());
        let mut rng = fastrand::Rng::with_seed(9);
        let (mut mean, mut mean_loss) = (Array2::<f32>::zeros(z.dim()), 0.0);
        let n = 2000;
        for _ in 0..n {
            let mut labels = labels.clone();
            let classes = Classes::sample(output.view(), &mut labels, 80, &mut rng);
            assert_eq!((classes.output.nrows(), classes.n_certain), (80, 4));
            let mut dz = Array2::zeros(z.dim());
            mean_loss += classes.cross_entropy(&z, &labels, 0, 1.0, dz.view_mut()) / f64::from(n);
            mean += &(dz / n as f32);
        }
        assert!((mean_loss - full_loss).abs() < 0.02, "{mean_loss}, not {full_loss}");
        let most = |values: &Array2<f32>| values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let off = most(&(&mean - &full));
        assert!(off < 0.02, "{off} off, gradients up to {:?}", most(&full));
    }
}
