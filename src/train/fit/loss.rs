//! Cross entropy of heads' states against the model's distribution, over all draft tokens or a
//! sample of them.
//!
//! The product with all draft rows is three quarters of a training step. A minibatch therefore
//! compares its states with fewer classes: every token that some row of the minibatch has as a
//! label, and a uniform sample of the others. A sampled class represents `1 / p` others, p its
//! chance to be drawn: adding `-ln p` to its logit makes the sum of exponentials, and so the
//! gradient up to the logarithm's curvature, right on average.

use candle_core::{D, Result, Tensor};

/// Rows of logits at a time: 256 rows of 4,096 classes are 4 MiB, which stay in the last cache.
const CHUNK: usize = 256;
/// No draft token.
pub const NONE: u32 = u32::MAX;

/// The labels of a minibatch: for each pair of head and example up to `most` output rows with
/// probabilities, the head's examples one after the other.
#[derive(Clone)]
pub struct Targets {
    most: usize,
    /// `most` of each pair; those that it has less are row 0 with probability 0.
    rows: Vec<u32>,
    p: Vec<f32>,
}

impl Targets {
    /// For pairs of up to `most` labels.
    pub fn new(most: usize) -> Self {
        Self { most, rows: vec![], p: vec![] }
    }

    /// Appends the next pair's labels.
    pub fn push(&mut self, labels: impl Iterator<Item = (u32, f32)>) {
        let end = self.rows.len() + self.most;
        for (row, p) in labels.take(self.most) {
            self.rows.push(row);
            self.p.push(p);
        }
        self.rows.resize(end, 0);
        self.p.resize(end, 0.0);
    }
}

/// The classes that a minibatch is compared with.
pub struct Classes {
    /// Their output rows [n, d].
    output: Tensor,
    /// Added to the logits [n]: minus the logarithm of the probability to be drawn.
    correction: Tensor,
    /// The labels as indices of the classes, and their probabilities [pairs, most].
    index: Tensor,
    p: Tensor,
}

impl Classes {
    /// All labels and a sample of the other rows of `output`, `n` in all, but at least a quarter of
    /// `n` others.
    pub fn sample(
        output: &Tensor,
        labels: Targets,
        n: usize,
        rng: &mut fastrand::Rng,
    ) -> Result<Self> {
        let n_rows = output.dim(0)?;
        let mut place = vec![NONE; n_rows];
        let mut rows: Vec<u32> = Vec::with_capacity(n);
        let labelled = labels.rows.iter().zip(&labels.p).filter(|(_, p)| **p > 0.0);
        for (&row, _) in labelled {
            let place = &mut place[row as usize];
            if *place == NONE {
                *place = rows.len() as u32;
                rows.push(row);
            }
        }
        let n_certain = rows.len();
        let mut others: Vec<u32> =
            (0..n_rows as u32).filter(|&row| place[row as usize] == NONE).collect();
        let n_drawn = n.saturating_sub(n_certain).max(n / 4).min(others.len());
        for i in 0..n_drawn {
            let j = rng.usize(i..others.len());
            others.swap(i, j);
        }
        rows.extend(&others[..n_drawn]);
        let drawn = -(n_drawn.max(1) as f32 / others.len().max(1) as f32).ln();
        let mut correction = vec![0.0; n_certain];
        correction.resize(rows.len(), drawn);
        let index = labels.rows.iter().map(|&row| place[row as usize]);
        let index: Vec<u32> = index.map(|place| if place == NONE { 0 } else { place }).collect();
        let (device, pairs) = (output.device(), index.len() / labels.most);
        Ok(Self {
            output: output.index_select(&Tensor::new(rows, device)?, 0)?,
            correction: Tensor::new(correction, device)?,
            index: Tensor::from_vec(index, (pairs, labels.most), device)?,
            p: Tensor::from_vec(labels.p, (pairs, labels.most), device)?,
        })
    }

    /// The loss of states [n, d] against the labels of the pairs from `first` on, summed over
    /// examples and times `weight`; and its gradient [n, d]. Of the logits that is their softmax less
    /// the labels, which costs less than to trace the softmax.
    pub fn cross_entropy(&self, z: &Tensor, first: usize, weight: f64) -> Result<(f64, Tensor)> {
        let n = z.dim(0)?;
        let starts = (0..n).step_by(CHUNK);
        let chunks = starts.map(|i| {
            let n = CHUNK.min(n - i);
            self.chunk(&z.narrow(0, i, n)?.detach(), first + i)
        });
        let chunks = chunks.collect::<Result<Vec<_>>>()?;
        let loss: f64 = chunks.iter().map(|(loss, _)| loss).sum();
        let gradients: Vec<_> = chunks.iter().map(|(_, gradient)| gradient).collect();
        Ok((weight * loss, (Tensor::cat(&gradients, 0)? * weight)?))
    }

    fn chunk(&self, z: &Tensor, first: usize) -> Result<(f64, Tensor)> {
        let n = z.dim(0)?;
        let (index, p) = (self.index.narrow(0, first, n)?, self.p.narrow(0, first, n)?);
        let mass = p.sum_keepdim(D::Minus1)?;
        let logits = z.matmul(&self.output.t()?)?;
        let label = (logits.gather(&index, D::Minus1)? * &p)?.sum_all()?;
        let logits = logits.broadcast_add(&self.correction)?;
        let max = logits.max_keepdim(D::Minus1)?;
        let exp = logits.broadcast_sub(&max)?.exp()?;
        let sum = exp.sum_keepdim(D::Minus1)?;
        let loss = (((max + sum.log()?)? * &mass)?.sum_all()? - label)?;
        // An example without labels has mass 0, and so no gradient.
        let slope = exp.broadcast_mul(&(mass / sum)?)?;
        let slope = slope.scatter_add(&index.contiguous()?, &p.neg()?.contiguous()?, D::Minus1)?;
        Ok((f64::from(loss.to_scalar::<f32>()?), slope.matmul(&self.output)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// All draft rows.
    fn all(output: &Tensor, labels: &Targets) -> Classes {
        let n = output.dim(0).unwrap();
        let mut rng = fastrand::Rng::with_seed(0);
        Classes::sample(output, labels.clone(), 4 * n, &mut rng).unwrap()
    }

    fn setting() -> (Tensor, Tensor, Targets) {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut random = |rows: usize| {
            let values: Vec<f32> = (0..rows * 8).map(|_| rng.f32() * 2.0 - 1.0).collect();
            Tensor::from_vec(values, (rows, 8), &Device::Cpu).unwrap()
        };
        let (output, z) = (random(300), random(4));
        let mut labels = Targets::new(3);
        labels.push([(3, 0.5), (299, 0.25)].into_iter());
        labels.push(std::iter::empty());
        labels.push([(0, 1.0)].into_iter());
        labels.push([(7, 0.9), (3, 0.1)].into_iter());
        (output, z, labels)
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gradients_are_the_slopes_of_the_loss() {
        let (output, z, labels) = setting();
        let classes = all(&output, &labels);
        let gradient = values(&classes.cross_entropy(&z, 0, 0.8).unwrap().1);
        for at in [1, 11, 23, 24] {
            let loss = |step: f32| {
                let mut moved = values(&z);
                moved[at] += step;
                let z = Tensor::from_vec(moved, (4, 8), &Device::Cpu).unwrap();
                classes.cross_entropy(&z, 0, 0.8).unwrap().0
            };
            let slope = (loss(1e-2) - loss(-1e-2)) / 2e-2;
            assert!((slope - f64::from(gradient[at])).abs() < 1e-3, "{at}: {slope}");
        }
        assert!(gradient[8..16].iter().all(|&g| g == 0.0), "the second has no labels");
    }

    #[test]
    fn a_sample_of_classes_gives_the_full_gradient_on_average() {
        let (output, z, labels) = setting();
        let (full_loss, full) = all(&output, &labels).cross_entropy(&z, 0, 1.0).unwrap();
        let full = values(&full);
        let mut rng = fastrand::Rng::with_seed(9);
        let (mut mean, mut mean_loss) = (vec![0.0; full.len()], 0.0);
        let n = 2000;
        for _ in 0..n {
            let classes = Classes::sample(&output, labels.clone(), 80, &mut rng).unwrap();
            assert_eq!(classes.output.dims(), [80, 8]);
            let (loss, gradient) = classes.cross_entropy(&z, 0, 1.0).unwrap();
            mean_loss += loss / f64::from(n);
            mean.iter_mut().zip(values(&gradient)).for_each(|(m, g)| *m += g / n as f32);
        }
        assert!((mean_loss - full_loss).abs() < 0.02, "{mean_loss}, not {full_loss}");
        let off = mean.iter().zip(&full).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 0.02, "{off} off");
    }
}
