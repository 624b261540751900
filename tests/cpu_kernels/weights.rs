//! Random weights of each type, as a file has them, and what products with them must be, to the last
//! bit: a plain twin of the kernels.

use std::ops::{Range, RangeInclusive};

use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Type {
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2K = 10,
    Q3K = 11,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
    Iq4Nl = 20,
    Iq4Xs = 23,
    Bf16 = 30,
}

/// What the values of the IQ4 types stand for.
const IQ4_VALUES: [i32; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl Type {
    /// Whether blocks of 32 values have a number that is added to them.
    pub fn has_minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1)
    }
}

/// Values of a block, of weights and of activations.
const BLOCK: usize = 32;

/// A block of weights: `scale * value + offset`.
pub struct WeightBlock {
    scale: f16,
    offset: f16,
    values: [i32; BLOCK],
}

impl WeightBlock {
    fn random(of: Type, rng: &mut fastrand::Rng) -> Self {
        let scale = f16::from_f32(rng.f32() * 0.02 - 0.01);
        let offset = if of.has_minimum() { f16::from_f32(rng.f32() - 0.5) } else { f16::ZERO };
        let range = match of {
            Type::Q4_0 => -8..=7,
            Type::Q4_1 => 0..=15,
            Type::Q5_0 => -16..=15,
            Type::Q5_1 => 0..=31,
            Type::Iq4Nl => {
                let values = extremes(0..=15, rng).map(|i: i32| IQ4_VALUES[i as usize]);
                return Self { scale, offset, values };
            }
            _ => -128..=127,
        };
        Self { scale, offset, values: extremes(range, rng) }
    }

    /// As a file has it.
    fn write(&self, of: Type, out: &mut Vec<u8>) {
        out.extend(self.scale.to_le_bytes());
        if of.has_minimum() {
            out.extend(self.offset.to_le_bytes());
        }
        if of == Type::Q8_0 {
            return out.extend(self.values.map(|v| v as u8));
        }
        let less = match of {
            Type::Q4_0 => 8,
            Type::Q5_0 => 16,
            _ => 0,
        };
        let place =
            |v| IQ4_VALUES.iter().position(|value| *value == v).expect("it is of the table");
        let values = match of {
            Type::Iq4Nl => self.values.map(|v| place(v) as u32),
            _ => self.values.map(|v| (v + less) as u32),
        };
        if matches!(of, Type::Q5_0 | Type::Q5_1) {
            let fifth_bits = values.iter().enumerate().map(|(i, v)| v >> 4 << i).sum::<u32>();
            out.extend(fifth_bits.to_le_bytes());
        }
        let nibble = |i: usize| (values[i] & 15) as u8;
        out.extend((0..BLOCK / 2).map(|i| nibble(i) | nibble(i + BLOCK / 2) << 4));
    }
}

/// Values of a range. Extremes are likely: sums of products must fit where kernels keep them.
fn extremes<const N: usize>(range: RangeInclusive<i32>, rng: &mut fastrand::Rng) -> [i32; N] {
    std::array::from_fn(|_| match rng.u8(..4) {
        0 => *range.start(),
        1 => *range.end(),
        _ => rng.i32(range.clone()),
    })
}

/// Values of a block of the K types and IQ4_XS.
const SUPER_BLOCK: usize = 256;

/// A block of 256 weights, as a file stores them. `scales` and `minima` are of groups of 32 values,
/// or in Q2_K, Q3_K and Q6_K of 16.
pub struct SuperBlock {
    scale: f16,
    minimum: f16,
    scales: [i32; 16],
    minima: [i32; 16],
    values: [i32; SUPER_BLOCK],
}

impl SuperBlock {
    fn random(of: Type, rng: &mut fastrand::Rng) -> Self {
        let most = match of {
            Type::Q2K => 3,
            Type::Q3K => 7,
            Type::Q5K => 31,
            Type::Q6K => 63,
            _ => 15,
        };
        let scales = match of {
            Type::Q2K => 0..=15,
            Type::Q6K => -128..=127,
            _ => 0..=63,
        };
        Self {
            scale: f16::from_f32(rng.f32() * 2e-3 - 1e-3),
            minimum: f16::from_f32(rng.f32() * 0.01),
            scales: extremes(scales, rng),
            minima: extremes(0..=if of == Type::Q2K { 15 } else { 63 }, rng),
            values: extremes(0..=most, rng),
        }
    }

    /// As a file has it.
    fn write(&self, of: Type, out: &mut Vec<u8>) {
        let v = self.values.map(|v| v as u8);
        let [scales, minima] = [&self.scales, &self.minima].map(|s| s.map(|s| s as u8));
        let halves = || v.chunks(128);
        // Two bits, from bit `from` on, of four groups of a half; or one of all eight.
        let pairs = |h: &[u8], l: usize, from: u8| {
            (0..4).map(|i| (h[32 * i + l] >> from & 3) << (2 * i)).sum::<u8>()
        };
        let bits = |l: usize, from: u8| (0..8).map(|g| (v[32 * g + l] >> from) << g).sum::<u8>();
        match of {
            Type::Q2K => {
                out.extend((0..16).map(|i| scales[i] | minima[i] << 4));
                halves().for_each(|h| out.extend((0..32).map(|l| pairs(h, l, 0))));
                out.extend([self.scale, self.minimum].iter().flat_map(|d| d.to_le_bytes()));
            }
            Type::Q3K => {
                out.extend((0..32).map(|l| bits(l, 2)));
                halves().for_each(|h| out.extend((0..32).map(|l| pairs(h, l, 0))));
                out.extend((0..8).map(|i| (scales[i] & 15) | (scales[i + 8] & 15) << 4));
                let high = |i: usize| (0..4).map(|j| scales[i + 4 * j] >> 4 << (2 * j)).sum::<u8>();
                out.extend((0..4).map(high));
                out.extend(self.scale.to_le_bytes());
            }
            Type::Q6K => {
                let low = |h: &[u8], l: usize| (h[l] & 15) | (h[64 + l] & 15) << 4;
                halves().for_each(|h| out.extend((0..64).map(|l| low(h, l))));
                halves().for_each(|h| out.extend((0..32).map(|l| pairs(h, l, 4))));
                out.extend(scales);
                out.extend(self.scale.to_le_bytes());
            }
            Type::Iq4Xs => {
                out.extend(self.scale.to_le_bytes());
                let high: u16 = (0..8).map(|g| u16::from(scales[g] >> 4) << (2 * g)).sum();
                out.extend(high.to_le_bytes());
                out.extend((0..4).map(|i| (scales[2 * i] & 15) | (scales[2 * i + 1] & 15) << 4));
                v.chunks(32).for_each(|g| out.extend((0..16).map(|l| g[l] | g[l + 16] << 4)));
            }
            _ => {
                out.extend([self.scale, self.minimum].iter().flat_map(|d| d.to_le_bytes()));
                let six_bits = |of: &[u8], i: usize| of[i] | of[i + 4] >> 4 << 6;
                out.extend((0..4).map(|i| six_bits(&scales, i)));
                out.extend((0..4).map(|i| six_bits(&minima, i)));
                out.extend((4..8).map(|i| (scales[i] & 15) | (minima[i] & 15) << 4));
                if of == Type::Q5K {
                    out.extend((0..32).map(|l| bits(l, 4)));
                }
                for pair in v.chunks(64) {
                    out.extend((0..32).map(|l| (pair[l] & 15) | (pair[32 + l] & 15) << 4));
                }
            }
        }
    }

    /// Adds the products with the activations of its group `g` to `acc`, as the kernels do.
    fn add_group(&self, of: Type, g: usize, x: &ActivationBlock, acc: f32) -> f32 {
        let value = |i: usize| match of {
            Type::Q3K => self.values[i] - 4,
            Type::Q6K => self.values[i] - 32,
            Type::Iq4Xs => IQ4_VALUES[self.values[i] as usize],
            _ => self.values[i],
        };
        let dot = |values: Range<usize>| {
            values.map(|i| value(32 * g + i) * x.values[i]).sum::<i32>() as f32
        };
        let sum = |values: Range<usize>| x.values[values].iter().sum::<i32>() as f32;
        let less = if matches!(of, Type::Q3K | Type::Iq4Xs) { 32 } else { 0 };
        let scale = |i: usize| self.scale.to_f32() * (self.scales[i] - less) as f32;
        let minimum = |i: usize| -self.minimum.to_f32() * self.minima[i] as f32;
        let dots_of_parts = || {
            let first = scale(2 * g) * dot(0..16);
            scale(2 * g + 1).mul_add(dot(16..32), first)
        };
        match of {
            Type::Q2K => {
                let first = minimum(2 * g).mul_add(sum(0..16), dots_of_parts());
                minimum(2 * g + 1).mul_add(sum(16..32), first).mul_add(x.scale, acc)
            }
            Type::Q3K | Type::Q6K => dots_of_parts().mul_add(x.scale, acc),
            Type::Iq4Xs => dot(0..32).mul_add(scale(g) * x.scale, acc),
            _ => {
                let acc = minimum(g).mul_add(x.scale * sum(0..32), acc);
                dot(0..32).mul_add(scale(g) * x.scale, acc)
            }
        }
    }
}

/// Types whose blocks have 256 values.
pub const SUPER_BLOCKS: [Type; 6] =
    [Type::Q2K, Type::Q3K, Type::Q4K, Type::Q5K, Type::Q6K, Type::Iq4Xs];

/// A column of weights.
pub enum Column {
    Floats(Vec<f32>),
    Blocks(Vec<WeightBlock>),
    SuperBlocks(Vec<SuperBlock>),
}

impl Column {
    pub fn random(of: Type, k: usize, rng: &mut fastrand::Rng) -> Self {
        if matches!(of, Type::F16 | Type::Bf16) {
            let value = |v: f32| match of {
                Type::F16 => f16::from_f32(v).to_f32(),
                _ => bf16::from_f32(v).to_f32(),
            };
            Self::Floats((0..k).map(|_| value(rng.f32() - 0.5)).collect())
        } else if SUPER_BLOCKS.contains(&of) {
            let blocks = (0..k / SUPER_BLOCK).map(|_| SuperBlock::random(of, rng));
            Self::SuperBlocks(blocks.collect())
        } else {
            Self::Blocks((0..k / BLOCK).map(|_| WeightBlock::random(of, rng)).collect())
        }
    }

    pub fn write(&self, of: Type, out: &mut Vec<u8>) {
        match self {
            Self::Floats(values) if of == Type::F16 => {
                out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()))
            }
            Self::Floats(values) => {
                out.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()))
            }
            Self::Blocks(blocks) => blocks.iter().for_each(|block| block.write(of, out)),
            Self::SuperBlocks(blocks) => blocks.iter().for_each(|block| block.write(of, out)),
        }
    }

    /// One result as the kernels must have it, to the last bit.
    pub fn twin(&self, of: Type, repacked: bool, x: &Row) -> f32 {
        match self {
            Self::Floats(values) => {
                let mut lanes = [0f32; 8];
                for (i, (x, w)) in x.values.iter().zip(values).enumerate() {
                    lanes[i % 8] = w.mul_add(*x, lanes[i % 8]);
                }
                sum_of_lanes(&lanes)
            }
            Self::Blocks(blocks) => mul_mat_twin(of, repacked, blocks, &x.quantized),
            Self::SuperBlocks(blocks) => {
                let groups = blocks.iter().flat_map(|block| (0..8).map(move |g| (block, g)));
                groups
                    .zip(&x.quantized)
                    .fold(0.0, |acc, ((block, g), x)| block.add_group(of, g, x, acc))
            }
        }
    }
}

/// A row of activations.
pub struct Row {
    values: Vec<f32>,
    quantized: Vec<ActivationBlock>,
}

impl Row {
    pub fn new(x: &[f32]) -> Self {
        let quantized = x.chunks(BLOCK).map(ActivationBlock::quantize).collect();
        Self { values: x.to_vec(), quantized }
    }
}

/// A block of activations in Q8_0, rounded as ggml does.
pub struct ActivationBlock {
    scale: f32,
    values: [i32; BLOCK],
}

impl ActivationBlock {
    fn quantize(x: &[f32]) -> Self {
        let max = x.iter().fold(0f32, |max, v| max.max(v.abs()));
        let inverse = if max == 0.0 { 0.0 } else { 127.0 / max };
        Self {
            scale: f16::from_f32(max / 127.0).to_f32(),
            values: std::array::from_fn(|i| (x[i] * inverse).round_ties_even() as i32),
        }
    }
}

/// One result as the kernels must have it, to the last bit. A block's products are summed exactly,
/// and blocks in their order by fused multiplications and additions: in one sum, or, where the
/// weights are not repacked, in eight of four values each.
fn mul_mat_twin(of: Type, repacked: bool, w: &[WeightBlock], x: &[ActivationBlock]) -> f32 {
    let n_lanes = if repacked { 1 } else { 8 };
    let mut lanes = [0f32; 8];
    let mut offsets = 0f32;
    for (w, x) in w.iter().zip(x) {
        let x_sum = x.scale * x.values.iter().sum::<i32>() as f32;
        let scale = w.scale.to_f32() * x.scale;
        if of.has_minimum() {
            let to = if repacked { &mut lanes[0] } else { &mut offsets };
            *to = w.offset.to_f32().mul_add(x_sum, *to);
        }
        for (lane, acc) in lanes.iter_mut().enumerate().take(n_lanes) {
            let part = lane * BLOCK / n_lanes..(lane + 1) * BLOCK / n_lanes;
            let dot: i32 = part.map(|i| w.values[i] * x.values[i]).sum();
            *acc = (dot as f32).mul_add(scale, *acc);
        }
    }
    if repacked {
        return lanes[0];
    }
    let sum = sum_of_lanes(&lanes);
    if of.has_minimum() { sum + offsets } else { sum }
}

/// In the kernels' order.
fn sum_of_lanes(lanes: &[f32; 8]) -> f32 {
    let four: [f32; 4] = std::array::from_fn(|i| lanes[i + 4] + lanes[i]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Activations; a block of zeros, one of equal values, and one with a single large value are among
/// them.
pub fn activations(n: usize, rng: &mut fastrand::Rng) -> Vec<f32> {
    let value = |i: usize| match i / BLOCK % 7 {
        0 => 0.0,
        1 => 1.0,
        2 if i % BLOCK == 5 => 1e3,
        _ => rng.f32() * 4.0 - 2.0,
    };
    (0..n).map(value).collect()
}
