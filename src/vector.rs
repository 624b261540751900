//! Loops over rows of values, logits most of all, as vector code for the processor at hand. Pure.

use crate::llama::Token;

/// Values per iteration: eight registers of the smallest x86-64, two of the largest.
const LANES: usize = 32;

/// Declares functions that are compiled for each kind of processor, all that they call with
/// `inline(always)` included. A closure given to `dispatch` may be left outside of that.
macro_rules! for_each_processor {
    ($($(#[$doc:meta])* pub fn $name:ident<$life:lifetime>($($arg:ident: $kind:ty),*) -> $out:ty
        $body:block)+) => {$(
        $(#[$doc])*
        pub fn $name<$life>($($arg: $kind),*) -> $out {
            struct Op<$life> {
                $($arg: $kind,)*
            }
            impl<$life> pulp::WithSimd for Op<$life> {
                type Output = $out;
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> $out {
                    let Self { $($arg,)* } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Op { $($arg,)* })
        }
    )+};
}

for_each_processor! {
/// The largest value; NaN never is. Negative infinity for none.
pub fn largest<'a>(values: &'a [f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// Fills `maxima` with the largest value of each block of [`BLOCK`] values, and returns the largest of
/// all; NaN never is. Negative infinity for none.
pub fn block_maxima<'a>(values: &'a [f32], maxima: &'a mut Vec<f32>) -> f32 {
    maxima.clear();
    let mut most = f32::NEG_INFINITY;
    for block in values.chunks(BLOCK) {
        let max = largest_of_block(block);
        maxima.push(max);
        most = if max > most { max } else { most };
    }
    most
}

/// The sum of `e^(v - max)`, where `max` is the largest.
pub fn sum_exp<'a>(values: &'a [f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += exp_below(v - max);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&v| exp_below(v - max)).sum::<f32>()
}

/// Fills `best` with the `k` largest values and their indices, best first; of equal ones the first
/// indices. NaN never is among them. Returns how many there are.
pub fn largest_k<'a>(values: &'a [f32], k: usize, best: &'a mut Vec<(Token, f32)>) -> usize {
    best.clear();
    if k > 0 {
        largest_k_blocks(values, k, best);
    }
    best.len()
}
}

/// Values of a block of [`block_maxima`].
pub const BLOCK: usize = 64;

#[inline(always)]
fn largest_of_block(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

#[inline(always)]
fn largest_k_blocks(values: &[f32], k: usize, best: &mut Vec<(Token, f32)>) {
    let mut least = f32::NEG_INFINITY;
    for (block, chunk) in values.chunks(LANES).enumerate() {
        // Most blocks have none: one comparison per value, without a branch.
        if best.len() == k && !chunk.iter().fold(false, |any, &v| any | (v > least)) {
            continue;
        }
        for (i, &value) in chunk.iter().enumerate().filter(|(_, v)| !v.is_nan()) {
            if best.len() < k || value > least {
                best.truncate(k - 1);
                let place = best.partition_point(|&(_, better)| better >= value);
                best.insert(place, (Token((block * LANES + i) as i32), value));
                least = best[best.len() - 1].1;
            }
        }
    }
}

/// The logarithm of the sum of `e^v`: what turns logits into logarithms of probabilities.
pub fn log_sum_exp(values: &[f32]) -> f32 {
    let max = largest(values);
    max + sum_exp(values, max).ln()
}

/// All tokens of a vocabulary below `e^-NEGLIGIBLE` together are less than rounding loses.
pub const NEGLIGIBLE: f32 = 32.0;

/// `e^x` for x at most 0; 0 below `-NEGLIGIBLE` and for NaN.
#[inline(always)]
pub fn exp_below(x: f32) -> f32 {
    let scaled = exp(x);
    if x > -NEGLIGIBLE { scaled } else { 0.0 }
}

/// `e^x` for `-87 <= x <= 87`, clamped outside, to some 2 units in the last place. Without branches
/// or calls, so that loops over it become vector code. NaN gives anything.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 2^n e^f with |f| at most ln(2)/2; adding this number rounds to an integer, which then is
    // in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 87.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let f = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4; // ln(2) in two parts
    let series = 1.0
        + f * (1.0
            + f * (0.5
                + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f * (1.0 / 720.0))))));
    f32::from_bits((rounded.to_bits() << 23).wrapping_add(series.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_range() {
        for i in -8700..8700 {
            let x = i as f32 / 100.0;
            let (ours, exact) = (exp(x), x.exp());
            assert!((ours - exact).abs() <= 4e-7 * exact, "{x}: {ours}, not {exact}");
        }
    }

    #[test]
    fn below_zero_it_is_exp_until_it_is_negligible() {
        for i in 0..320_000 {
            let x = -(i as f32) * 1e-4;
            let (ours, exact) = (f64::from(exp_below(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= exact * 4e-7, "{x}: {ours} {exact}");
        }
        let edges = [-40.0, f32::NEG_INFINITY, f32::NAN, 0.0].map(exp_below);
        assert_eq!(edges, [0.0, 0.0, 0.0, 1.0]);
    }
}
