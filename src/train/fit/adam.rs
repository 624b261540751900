//! AdamW (<https://arxiv.org/abs/1711.05101>) over a network's parameters. candle's own keeps its
//! moments to itself, so that a killed run could not go on with them.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

/// Decay of the mean of gradients, and of that of their squares.
const BETAS: (f64, f64) = (0.9, 0.98);
const EPSILON: f64 = 1e-8;

/// Means of a parameter's gradients and of their squares.
#[derive(Clone)]
pub struct Moments {
    pub m: Tensor,
    pub v: Tensor,
}

impl Moments {
    pub fn new(of: &Var) -> Result<Self> {
        Ok(Self { m: of.zeros_like()?, v: of.zeros_like()? })
    }
}

/// What a step of the run does with the gradients.
#[derive(Clone, Copy)]
pub struct Step {
    /// Which one, from 1.
    pub number: usize,
    /// Learning rate.
    pub rate: f64,
    /// The parameters lose `rate` times this of themselves.
    pub decay: f64,
}

impl Step {
    /// Moves parameters against the sums of their gradients, some of them in each of `n_threads`. A
    /// parameter without a gradient stays.
    pub fn apply(
        self,
        params: &[&Var],
        moments: &mut [Moments],
        grads: &[GradStore],
        n_threads: usize,
    ) -> Result<()> {
        let n = params.len().div_ceil(n_threads.max(1)).max(1);
        std::thread::scope(|scope| {
            let part = |(params, moments): (&'_ [&'_ Var], &'_ mut [Moments])| {
                params
                    .iter()
                    .zip(moments)
                    .try_for_each(|(param, of)| self.move_one(param, of, grads))
            };
            let parts = params.chunks(n).zip(moments.chunks_mut(n));
            let workers: Vec<_> = parts.map(|both| scope.spawn(move || part(both))).collect();
            workers.into_iter().try_for_each(|w| w.join().expect("a worker does not panic"))
        })
    }

    fn move_one(self, param: &Var, moments: &mut Moments, grads: &[GradStore]) -> Result<()> {
        let (first, second) = BETAS;
        let rate_of_mean = self.rate / (1.0 - first.powi(self.number as i32));
        let scale_of_squares = 1.0 / (1.0 - second.powi(self.number as i32));
        let mut parts = grads.iter().filter_map(|grads| grads.get(param));
        let Some(grad) = parts.next().cloned() else { return Ok(()) };
        let grad = parts.try_fold(grad, |sum, part| sum + part)?;
        moments.m = ((&moments.m * first)? + (&grad * (1.0 - first))?)?;
        moments.v = ((&moments.v * second)? + (grad.sqr()? * (1.0 - second))?)?;
        let size = ((&moments.v * scale_of_squares)?.sqrt()? + EPSILON)?;
        let change = ((&moments.m * rate_of_mean)? / size)?;
        param.set(&((param.as_tensor() * (1.0 - self.rate * self.decay))? - change)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The first step moves each parameter by the learning rate against its gradient's sign,
    /// whatever the gradient's size.
    #[test]
    fn a_first_step_has_the_learning_rates_size() {
        let param = Var::new(&[1.0f32, -2.0, 0.5], &Device::Cpu).unwrap();
        let untouched = Var::new(&[1.0f32], &Device::Cpu).unwrap();
        let weights = Tensor::new(&[1e-3f32, -40.0, 0.0], &Device::Cpu).unwrap();
        let loss = || (param.as_tensor() * &weights).unwrap().sum_all().unwrap();
        let mut moments = [Moments::new(&param).unwrap(), Moments::new(&untouched).unwrap()];
        let halves = [loss().backward().unwrap(), loss().backward().unwrap()];
        let step = Step { number: 1, rate: 0.1, decay: 0.5 };
        step.apply(&[&param, &untouched], &mut moments, &halves, 2).unwrap();
        for (got, expected) in param.to_vec1::<f32>().unwrap().into_iter().zip([0.85, -1.8, 0.475])
        {
            assert!((got - expected).abs() < 1e-4, "{got}, not {expected}");
        }
        assert_eq!(untouched.to_vec1::<f32>().unwrap(), [1.0]);
    }
}
