//! The CPU kernels of `vendor/ggml` against plain loops: alone, for each set of instructions that
//! this CPU has, and through ggml's graphs, which the patches make call them. `--nocapture` shows
//! which ran.
#![allow(missing_docs, unsafe_code)]

use std::ffi::c_void;
use std::ops::{Range, RangeInclusive};
use std::ptr::null;

use half::{bf16, f16};
use medusa_llama as _; // links the kernels

/// The struct of the same name in `vendor/ggml/testing.cpp`.
#[repr(C)]
struct MulMat {
    weight_type: i32,
    repacked: i32,
    n_threads: i32,
    k: i64,
    cols: i64,
    rows: i64,
    weights: *const c_void,
    x: *const f32,
    out: *mut f32,
}

/// The struct of the same name in `vendor/ggml/testing.cpp`.
#[repr(C)]
struct Attention {
    kv_type: i32,
    n_threads: i32,
    dk: i64,
    dv: i64,
    n_q: i64,
    n_cells: i64,
    n_head: i64,
    n_kv_head: i64,
    n_streams: i64,
    scale: f32,
    max_bias: f32,
    softcap: f32,
    q: *const f32,
    k: *const c_void,
    v: *const c_void,
    mask: *const f16,
    sinks: *const f32,
    out: *mut f32,
}

/// Kernels compiled for a set of instructions, or all of ggml's, in a graph.
struct Kernels {
    name: &'static str,
    mul_mat: unsafe extern "C" fn(*const MulMat) -> bool,
    attention: unsafe extern "C" fn(*const Attention) -> bool,
}

macro_rules! kernels {
    ($sets:ident, $name:literal, $mul_mat:ident, $attention:ident) => {
        #[cfg(cpu_kernels = $name)]
        {
            unsafe extern "C" {
                fn $mul_mat(m: *const MulMat) -> bool;
                fn $attention(a: *const Attention) -> bool;
            }
            $sets.push(Kernels { name: $name, mul_mat: $mul_mat, attention: $attention });
        }
    };
}

/// All that build.rs compiled.
fn kernels() -> Vec<Kernels> {
    #[allow(unused_mut)] // with LLAMA_CPP_DIR there are none
    let mut sets = vec![];
    kernels!(sets, "graph", mul_mat_graph, attention_graph);
    kernels!(sets, "avx2", mul_mat_avx2, attention_avx2);
    kernels!(sets, "avx512", mul_mat_avx512, attention_avx512);
    kernels!(sets, "neon", mul_mat_neon, attention_neon);
    println!("kernels: {}", sets.iter().map(|set| set.name).collect::<Vec<_>>().join(", "));
    sets
}

/// What fresh memory holds: not a number.
const FRESH: f32 = f32::NAN;
/// Values after an output that nobody may write to.
const GUARD: usize = 64;

/// An output of `n` values, and whether the kernels took the operation.
fn output(n: usize, run: impl FnOnce(*mut f32) -> bool) -> Option<Vec<f32>> {
    let mut out = vec![FRESH; n + GUARD];
    let done = run(out.as_mut_ptr());
    assert!(out[n..].iter().all(|v| v.is_nan()), "written beyond the end");
    out.truncate(n);
    done.then_some(out)
}

/// ggml's numbers of types.
const F32: i32 = 0;
const F16: i32 = 1;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
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
    fn has_minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1)
    }
}

/// Values of a block, of weights and of activations.
const BLOCK: usize = 32;

/// A block of weights: `scale * value + offset`.
struct WeightBlock {
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
struct SuperBlock {
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

/// A column of weights.
enum Column {
    Blocks(Vec<WeightBlock>),
    SuperBlocks(Vec<SuperBlock>),
}

impl Column {
    fn random(of: Type, k: usize, rng: &mut fastrand::Rng) -> Self {
        if SUPER_BLOCKS.contains(&of) {
            let blocks = (0..k / SUPER_BLOCK).map(|_| SuperBlock::random(of, rng));
            Self::SuperBlocks(blocks.collect())
        } else {
            Self::Blocks((0..k / BLOCK).map(|_| WeightBlock::random(of, rng)).collect())
        }
    }

    fn write(&self, of: Type, out: &mut Vec<u8>) {
        match self {
            Self::Blocks(blocks) => blocks.iter().for_each(|block| block.write(of, out)),
            Self::SuperBlocks(blocks) => blocks.iter().for_each(|block| block.write(of, out)),
        }
    }

    /// One result as the kernels must have it, to the last bit.
    fn twin(&self, of: Type, repacked: bool, x: &[ActivationBlock]) -> f32 {
        match self {
            Self::Blocks(blocks) => mul_mat_twin(of, repacked, blocks, x),
            Self::SuperBlocks(blocks) => {
                let groups = blocks.iter().flat_map(|block| (0..8).map(move |g| (block, g)));
                groups.zip(x).fold(0.0, |acc, ((block, g), x)| block.add_group(of, g, x, acc))
            }
        }
    }
}

/// A block of activations in Q8_0, rounded as ggml does.
struct ActivationBlock {
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

/// A multiplication: activations, weights as a file has them, and the results, to the last bit.
struct Product<'a> {
    of: Type,
    repacked: bool,
    /// `[k, cols, rows]`
    shape: [usize; 3],
    weights: &'a [u8],
    x: &'a [f32],
    twin: Vec<f32>,
}

impl Product<'_> {
    /// All kernels have the results of the twin, with several numbers of threads.
    fn check(&self) {
        if !cfg!(target_arch = "x86_64") {
            return; // there are kernels for AVX2 and AVX512-VNNI
        }
        let Self { of, repacked, shape: [k, cols, rows], .. } = *self;
        for set in kernels() {
            for n_threads in [1, 3] {
                let out = output(rows * cols, |out| {
                    let op = MulMat {
                        weight_type: of as i32,
                        repacked: i32::from(repacked),
                        n_threads,
                        k: k as i64,
                        cols: cols as i64,
                        rows: rows as i64,
                        weights: self.weights.as_ptr().cast(),
                        x: self.x.as_ptr(),
                        out,
                    };
                    // SAFETY: the memory has the shapes that the struct says, and lives on.
                    unsafe { (set.mul_mat)(&op) }
                });
                let what = format!(
                    "{of:?}, repacked {repacked}, {rows} x {cols} x {k}, {}, {n_threads} threads",
                    set.name
                );
                let out = out.unwrap_or_else(|| panic!("{what}: not computed"));
                for (i, (out, twin)) in out.iter().zip(&self.twin).enumerate() {
                    let (row, column) = (i / cols, i % cols);
                    assert!(
                        out.to_bits() == twin.to_bits(),
                        "{what}: row {row}, column {column} is {out} and not {twin}"
                    );
                }
            }
        }
    }
}

/// Activations; a block of zeros, one of equal values, and one with a single large value are among
/// them.
fn activations(n: usize, rng: &mut fastrand::Rng) -> Vec<f32> {
    let value = |i: usize| match i / BLOCK % 7 {
        0 => 0.0,
        1 => 1.0,
        2 if i % BLOCK == 5 => 1e3,
        _ => rng.f32() * 4.0 - 2.0,
    };
    (0..n).map(value).collect()
}

/// Multiplications of a shape with quantized weights.
fn check_mul_mat(of: Type, repacked: bool, k: usize, cols: usize, rows: usize) {
    let mut rng = fastrand::Rng::with_seed((k * 31 + cols * 7 + rows) as u64);
    let columns: Vec<Column> = (0..cols).map(|_| Column::random(of, k, &mut rng)).collect();
    let mut weights = vec![];
    columns.iter().for_each(|column| column.write(of, &mut weights));
    let x = activations(rows * k, &mut rng);
    let quantized =
        x.chunks(k).map(|row| row.chunks(BLOCK).map(ActivationBlock::quantize).collect::<Vec<_>>());
    let twin = quantized.flat_map(|row| {
        columns.iter().map(move |w| w.twin(of, repacked, &row)).collect::<Vec<_>>()
    });
    let (shape, twin) = ([k, cols, rows], twin.collect());
    Product { of, repacked, shape, weights: &weights, x: &x, twin }.check();
}

/// Multiplications of a shape with weights in F16 or BF16: products are summed in eight lanes, and
/// these at the end.
fn check_mul_mat_of_floats(of: Type, k: usize, cols: usize, rows: usize) {
    let mut rng = fastrand::Rng::with_seed((k * 31 + cols * 7 + rows) as u64);
    let (mut weights, mut values) = (vec![], vec![]);
    for _ in 0..k * cols {
        let v = rng.f32() - 0.5;
        if of == Type::F16 {
            weights.extend(f16::from_f32(v).to_le_bytes());
            values.push(f16::from_f32(v).to_f32());
        } else {
            weights.extend(bf16::from_f32(v).to_le_bytes());
            values.push(bf16::from_f32(v).to_f32());
        }
    }
    let x = activations(rows * k, &mut rng);
    let dot = |x: &[f32], w: &[f32]| {
        let mut lanes = [0f32; 8];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            lanes[i % 8] = w.mul_add(*x, lanes[i % 8]);
        }
        sum_of_lanes(&lanes)
    };
    let twin = x.chunks(k).flat_map(|x| values.chunks(k).map(move |w| dot(x, w))).collect();
    Product { of, repacked: false, shape: [k, cols, rows], weights: &weights, x: &x, twin }.check();
}

const REPACKED: [Type; 6] =
    [Type::Q4_0, Type::Q4_1, Type::Q5_0, Type::Q5_1, Type::Q8_0, Type::Iq4Nl];
const SUPER_BLOCKS: [Type; 6] =
    [Type::Q2K, Type::Q3K, Type::Q4K, Type::Q5K, Type::Q6K, Type::Iq4Xs];
const AS_STORED: [Type; 2] = [Type::Q4_1, Type::Q8_0];
const FLOATS: [Type; 2] = [Type::F16, Type::Bf16];

/// All numbers of rows that are computed together, and beyond: more than one group, a set of 32
/// and several. A row's twin knows no other row, so rows do not depend on those beside them.
#[test]
fn multiplications_with_any_number_of_rows_are_the_twins_bit_for_bit() {
    for rows in (1..=17).chain([24, 31, 32, 33, 40, 65]) {
        REPACKED.iter().for_each(|&of| check_mul_mat(of, true, 96, 24, rows));
        AS_STORED.iter().for_each(|&of| check_mul_mat(of, false, 96, 11, rows));
        SUPER_BLOCKS.iter().for_each(|&of| check_mul_mat(of, true, 512, 24, rows));
        FLOATS.iter().for_each(|&of| check_mul_mat_of_floats(of, 96, 11, rows));
    }
}

/// One block of weights, odd numbers of blocks of columns (of which AVX-512 computes two at a
/// time), fewer columns than threads, and more weights than one chunk holds.
#[test]
fn multiplications_of_odd_shapes_are_the_twins_bit_for_bit() {
    for (k, cols) in [(32, 8), (32, 16), (64, 40), (160, 72), (576, 8), (1024, 200)] {
        for rows in [1, 5, 9] {
            REPACKED.iter().for_each(|&of| check_mul_mat(of, true, k, cols, rows));
        }
    }
    for (k, cols) in [(256, 8), (256, 16), (512, 40), (768, 72), (1024, 200)] {
        for rows in [1, 5, 9] {
            SUPER_BLOCKS.iter().for_each(|&of| check_mul_mat(of, true, k, cols, rows));
        }
    }
    for (k, cols) in [(32, 1), (32, 2), (64, 3), (160, 37), (576, 5), (1024, 190)] {
        for rows in [1, 5, 9] {
            AS_STORED.iter().for_each(|&of| check_mul_mat(of, false, k, cols, rows));
            FLOATS.iter().for_each(|&of| check_mul_mat_of_floats(of, k, cols, rows));
        }
    }
}

/// What a query row sees.
#[derive(Clone, Copy, Debug)]
enum Mask {
    /// There is none.
    Absent,
    /// Row i sees all cells but the last n_q - 1 - i.
    Causal,
    /// Cells belong to four sequences in turn, or to all of them at the beginning, and rows too.
    Shared,
    /// Any cells, with scores added to them; the second row sees nothing.
    Any,
}

#[derive(Clone, Debug)]
struct Case {
    half: bool,
    dk: usize,
    dv: usize,
    n_q: usize,
    n_cells: usize,
    /// Query heads of each KV head.
    group: usize,
    n_kv_head: usize,
    n_streams: usize,
    mask: Mask,
    max_bias: f32,
    softcap: f32,
    sinks: bool,
}

const CASE: Case = Case {
    half: true,
    dk: 64,
    dv: 64,
    n_q: 3,
    n_cells: 300,
    group: 3,
    n_kv_head: 2,
    n_streams: 1,
    mask: Mask::Causal,
    max_bias: 0.0,
    softcap: 0.0,
    sinks: false,
};

/// A case's tensors. Keys and values are exact in F16.
#[derive(Clone)]
struct Inputs {
    case: Case,
    q: Vec<f32>,
    k: Vec<f16>,
    v: Vec<f16>,
    mask: Option<Vec<f16>>,
    sinks: Option<Vec<f32>>,
}

impl Inputs {
    fn random(case: &Case) -> Self {
        let rng = &mut fastrand::Rng::with_seed((case.n_q * 1000 + case.n_cells) as u64);
        let halves = |n: usize, rng: &mut fastrand::Rng| -> Vec<f16> {
            (0..n).map(|_| f16::from_f32(rng.f32() * 2.0 - 1.0)).collect()
        };
        let (n_q, n_cells) = (case.n_q, case.n_cells);
        let mut seen = |i: usize, cell: usize| match case.mask {
            Mask::Absent => true,
            Mask::Causal => cell + n_q < n_cells + i + 1 || cell == 0,
            Mask::Shared => cell < n_cells / 3 || cell % 4 == i % 4,
            Mask::Any => i != 1 && rng.bool(),
        };
        let n_rows = case.n_streams * n_q;
        let pairs = (0..n_rows * n_cells).map(|at| (at / n_cells % n_q, at % n_cells));
        let visible: Vec<bool> = pairs.map(|(i, cell)| seen(i, cell)).collect();
        let scores = halves(visible.len(), rng);
        let mask = visible.iter().zip(scores).map(|(seen, score)| match (seen, case.mask) {
            (false, _) => f16::NEG_INFINITY,
            (true, Mask::Any) => score,
            _ if case.max_bias > 0.0 => score,
            _ => f16::ZERO,
        });
        let mask = (!matches!(case.mask, Mask::Absent)).then(|| mask.collect());
        let n_kv = case.n_streams * n_cells * case.n_kv_head;
        Self {
            q: (0..n_rows * case.n_head() * case.dk).map(|_| rng.f32() * 6.0 - 3.0).collect(),
            k: halves(n_kv * case.dk, rng),
            v: halves(n_kv * case.dv, rng),
            mask,
            sinks: case.sinks.then(|| (0..case.n_head()).map(|_| rng.f32() * 4.0).collect()),
            case: case.clone(),
        }
    }

    /// The result of `set`, or `None` if it has no kernel for the case.
    fn run(&self, set: &Kernels, n_threads: i32) -> Option<Vec<f32>> {
        let case = &self.case;
        let floats = |values: &[f16]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
        let (k, v) = if case.half { (vec![], vec![]) } else { (floats(&self.k), floats(&self.v)) };
        output(case.n_streams * case.n_q * case.n_head() * case.dv, |out| {
            let op = Attention {
                kv_type: if case.half { F16 } else { F32 },
                n_threads,
                dk: case.dk as i64,
                dv: case.dv as i64,
                n_q: case.n_q as i64,
                n_cells: case.n_cells as i64,
                n_head: case.n_head() as i64,
                n_kv_head: case.n_kv_head as i64,
                n_streams: case.n_streams as i64,
                scale: case.scale(),
                max_bias: case.max_bias,
                softcap: case.softcap,
                q: self.q.as_ptr(),
                k: if case.half { self.k.as_ptr().cast() } else { k.as_ptr().cast() },
                v: if case.half { self.v.as_ptr().cast() } else { v.as_ptr().cast() },
                mask: self.mask.as_ref().map_or(null(), |mask| mask.as_ptr()),
                sinks: self.sinks.as_ref().map_or(null(), |sinks| sinks.as_ptr()),
                out,
            };
            // SAFETY: the memory has the shapes that the struct says, and lives on.
            unsafe { (set.attention)(&op) }
        })
    }

    /// The query row `row` of all streams' rows, alone.
    fn alone(&self, row: usize) -> Self {
        let case = &self.case;
        let per_stream = |values: &[f16]| {
            let n = values.len() / case.n_streams;
            let stream = row / case.n_q;
            values[stream * n..(stream + 1) * n].to_vec()
        };
        let n = case.n_head() * case.dk;
        let cells = row * case.n_cells..(row + 1) * case.n_cells;
        Self {
            case: Case { n_q: 1, n_streams: 1, ..case.clone() },
            q: self.q[row * n..(row + 1) * n].to_vec(),
            k: per_stream(&self.k),
            v: per_stream(&self.v),
            mask: self.mask.as_ref().map(|mask| mask[cells].to_vec()),
            sinks: self.sinks.clone(),
        }
    }

    /// The same with cells that nobody sees, which hold no numbers, before, between and after.
    fn scattered(&self) -> Self {
        let case = &self.case;
        let old_of = |cell: usize| (cell % 3 == 1).then_some(cell / 3); // of the new cells
        let n_cells = 3 * case.n_cells;
        let spread = |values: &[f16], filler: f16, n_old: usize, width: usize| -> Vec<f16> {
            let lists = values.chunks(n_old * width);
            let cells = lists.flat_map(|list| (0..n_cells).map(move |cell| (list, old_of(cell))));
            cells
                .flat_map(|(list, old)| match old {
                    Some(old) => list[old * width..(old + 1) * width].to_vec(),
                    None => vec![filler; width],
                })
                .collect()
        };
        let visible = vec![f16::ZERO; case.n_streams * case.n_q * case.n_cells];
        let mask = self.mask.as_ref().unwrap_or(&visible);
        Self {
            case: Case { n_cells, mask: Mask::Any, ..case.clone() },
            k: spread(&self.k, f16::NAN, case.n_cells, case.n_kv_head * case.dk),
            v: spread(&self.v, f16::NAN, case.n_cells, case.n_kv_head * case.dv),
            mask: Some(spread(mask, f16::NEG_INFINITY, case.n_cells, 1)),
            ..self.clone()
        }
    }
}

/// Half the distance of two F32 numbers from 1 on: the largest relative error of rounding.
const U: f64 = f32::EPSILON as f64 / 2.0;

impl Case {
    fn n_head(&self) -> usize {
        self.group * self.n_kv_head
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dk as f32).sqrt()
    }

    /// ALiBi's slope of a head.
    fn slope(&self, head: usize) -> f64 {
        if self.max_bias == 0.0 {
            return 1.0;
        }
        let log2 = (self.n_head() as f64).log2().floor().exp2();
        let (head, bias) = (head as f64, f64::from(self.max_bias));
        if head < log2 {
            (-bias / log2 * (head + 1.0)).exp2()
        } else {
            (-bias / 2.0 / log2 * (2.0 * (head - log2) + 1.0)).exp2()
        }
    }
}

/// Results in F64, and how far each may be from them by F32's rounding: a score by that of its
/// products and sums; its weight by twice the largest such error (once its own, once that of the
/// maximum or the other weights), by that of the exponent's argument and function, and by one
/// addition for each cell of a chunk and each chunk; in weights and, alike, in their sum.
fn attention_twin(inputs: &Inputs) -> Vec<(f64, f64)> {
    let case = &inputs.case;
    let (n_head, dk, dv) = (case.n_head(), case.dk, case.dv);
    let mut out = vec![];
    for row in 0..case.n_streams * case.n_q {
        for head in 0..n_head {
            let q = &inputs.q[(row * n_head + head) * dk..][..dk];
            let of_cell = |cell: usize| {
                let at = (row / case.n_q * case.n_cells + cell) * case.n_kv_head;
                at + head / case.group
            };
            let (mut cells, mut score_error) = (vec![], 0f64);
            for cell in 0..case.n_cells {
                let mask =
                    inputs.mask.as_ref().map_or(0.0, |m| m[row * case.n_cells + cell].to_f64());
                if mask == f64::NEG_INFINITY {
                    continue;
                }
                let key = &inputs.k[of_cell(cell) * dk..][..dk];
                let products = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k.to_f64());
                let scale = f64::from(case.scale());
                let mut score = scale * products.clone().sum::<f64>();
                let size = scale * products.map(f64::abs).sum::<f64>();
                if case.softcap > 0.0 {
                    let cap = f64::from(case.softcap);
                    score = cap * (score / cap).tanh();
                }
                let bias = case.slope(head) * mask;
                score += bias;
                cells.push((cell, score));
                let error = (dk + 8) as f64 * size + 8.0 * (score.abs() + 2.0 * bias.abs());
                score_error = score_error.max(error * U);
            }
            let sink = inputs.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
            let scores = cells.iter().map(|&(_, score)| score).chain(sink);
            let max = scores.clone().fold(f64::NEG_INFINITY, f64::max);
            let range = max - scores.clone().fold(f64::INFINITY, f64::min);
            let total: f64 = scores.map(|score| (score - max).exp()).sum();
            let n_chunks = case.n_cells.div_ceil(128);
            let n_roundings = 2 * (128 + 8 * n_chunks + 16);
            let relative = 2.0 * score_error + (2.0 * range.max(0.0) + n_roundings as f64) * U;
            for i in 0..dv {
                let parts = cells.iter().map(|&(cell, score)| {
                    (score - max).exp() / total * inputs.v[of_cell(cell) * dv + i].to_f64()
                });
                let size: f64 = parts.clone().map(f64::abs).sum();
                out.push((parts.sum(), relative * size));
            }
        }
    }
    out
}

/// All kernels' results are within rounding of the twin's; and, bit for bit, they are the same with
/// other numbers of threads, of rows alone, and with cells between that nobody sees.
fn check_attention(case: &Case) {
    let inputs = Inputs::random(case);
    let twin = attention_twin(&inputs);
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    for set in kernels() {
        let what = format!("{case:?}, {}", set.name);
        let out = inputs.run(&set, 1).unwrap_or_else(|| panic!("{what}: not computed"));
        for (i, (value, (exact, bound))) in out.iter().zip(&twin).enumerate() {
            let error = (f64::from(*value) - exact).abs();
            assert!(error <= *bound, "{what}: {value} at {i}, not {exact}: {error:e} of {bound:e}");
        }
        for n_threads in [2, 3, 5] {
            let other = inputs.run(&set, n_threads).unwrap();
            assert!(same(&out, &other), "{what}: differs with {n_threads} threads");
        }
        let width = case.n_head() * case.dv;
        for (row, expected) in out.chunks(width).enumerate() {
            let alone = inputs.alone(row).run(&set, 1).unwrap();
            assert!(same(expected, &alone), "{what}: row {row} differs alone");
        }
        let scattered = inputs.scattered().run(&set, 2).unwrap();
        assert!(same(&out, &scattered), "{what}: differs where cells are elsewhere");
    }
}

#[test]
fn attention_of_any_number_of_rows_is_the_twins_within_rounding() {
    for n_q in (1..=17).chain([33]) {
        for mask in [Mask::Causal, Mask::Shared, Mask::Any] {
            check_attention(&Case { n_q, mask, ..CASE });
        }
    }
}

/// Around the sizes of a block, a chunk and a word of the mask.
#[test]
fn attention_over_any_number_of_cells_is_the_twins_within_rounding() {
    for n_cells in [1, 2, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 640, 1030] {
        for mask in [Mask::Absent, Mask::Causal, Mask::Shared] {
            check_attention(&Case { n_cells, mask, ..CASE });
        }
    }
}

/// Head sizes, numbers of query heads for a KV head (more than a tile has among them), F32 caches
/// and streams.
#[test]
fn attention_of_any_shape_is_the_twins_within_rounding() {
    for (dk, dv) in [(16, 16), (32, 32), (48, 80), (80, 80), (96, 96), (128, 128), (192, 128)] {
        for half in [true, false] {
            check_attention(&Case { dk, dv, half, n_q: 5, mask: Mask::Shared, ..CASE });
        }
    }
    for group in [1, 2, 4, 5, 7, 8, 23, 24, 25, 50] {
        check_attention(&Case { group, n_q: 4, n_cells: 150, ..CASE });
    }
    for n_streams in [2, 3] {
        check_attention(&Case { n_streams, n_q: 2, mask: Mask::Any, ..CASE });
    }
}

/// ALiBi, a cap on scores, sinks, and all of them.
#[test]
fn attention_with_biases_caps_and_sinks_is_the_twins_within_rounding() {
    let case = Case { group: 6, mask: Mask::Any, ..CASE };
    check_attention(&Case { max_bias: 8.0, mask: Mask::Causal, ..case.clone() });
    check_attention(&Case { softcap: 2.0, ..case.clone() });
    check_attention(&Case { sinks: true, ..case.clone() });
    check_attention(&Case { max_bias: 8.0, softcap: 2.0, sinks: true, ..case });
}
