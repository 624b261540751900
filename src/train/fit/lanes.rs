//! Elementwise loops of training as vector code for the processor at hand.

use pulp::Arch;

use crate::vector::exp;

/// `x / (1 + e^-x)` in place.
pub fn silu(values: &mut [f32]) {
    Arch::new().dispatch(|| {
        for v in &mut *values {
            *v /= 1.0 + exp(-*v);
        }
    });
}

/// Multiplies gradients by SiLU's slope at `x`.
pub fn silu_backward(x: &[f32], gradient: &mut [f32]) {
    Arch::new().dispatch(|| {
        for (g, &x) in gradient.iter_mut().zip(x) {
            let s = 1.0 / (1.0 + exp(-x));
            *g *= s * (1.0 + x * (1.0 - s));
        }
    });
}

/// Replaces each value by `e^(value - max)` and returns the sum.
pub fn exp_minus(values: &mut [f32], max: f32) -> f32 {
    const N: usize = 32; // sums side by side: four registers of AVX2
    Arch::new().dispatch(|| {
        let mut sums = [0.0f32; N];
        let (chunks, rest) = values.as_chunks_mut::<N>();
        for chunk in chunks {
            for (sum, v) in sums.iter_mut().zip(chunk) {
                *v = exp(*v - max);
                *sum += *v;
            }
        }
        for (sum, v) in sums.iter_mut().zip(rest) {
            *v = exp(*v - max);
            *sum += *v;
        }
        sums.iter().sum()
    })
}

/// Multiplies all values.
pub fn scale(values: &mut [f32], by: f32) {
    Arch::new().dispatch(|| {
        for v in &mut *values {
            *v *= by;
        }
    });
}

/// Values larger than `limit`.
pub fn count_above(values: &[f32], limit: f32) -> usize {
    Arch::new().dispatch(|| values.iter().map(|&v| u32::from(v > limit)).sum::<u32>()) as usize
}

/// AdamW's numbers for one step.
#[derive(Clone, Copy)]
pub struct AdamStep {
    /// Learning rate over the first moment's bias correction.
    pub rate: f32,
    /// One over the second moment's bias correction.
    pub second: f32,
    /// What a weight loses, as a part of itself.
    pub decay: f32,
}

/// One AdamW step with betas 0.9 and 0.98 on a slice of everything; the gradients are summed and
/// cleared.
pub fn adam(
    step: AdamStep,
    params: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grads: &mut [&mut [f32]],
) {
    let Some((first, others)) = grads.split_first_mut() else { return };
    Arch::new().dispatch(|| {
        for other in &mut *others {
            for (g, o) in first.iter_mut().zip(other.iter_mut()) {
                *g += *o;
                *o = 0.0;
            }
        }
        for (((p, m), v), g) in
            params.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(first.iter_mut())
        {
            *m = 0.9 * *m + 0.1 * *g;
            *v = 0.98 * *v + 0.02 * *g * *g;
            *p -= step.rate * *m / ((*v * step.second).sqrt() + 1e-8) + step.decay * *p;
            *g = 0.0;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_minus_sums_what_it_leaves() {
        let mut values = vec![0.0, 1.0, -200.0];
        assert!((exp_minus(&mut values, 1.0) - 1.367_879_4).abs() < 1e-6);
    }
}
