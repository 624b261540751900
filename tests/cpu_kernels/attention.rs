//! Attention: the twin's within rounding.
#![allow(unsafe_code)]

use std::ptr::null;

use half::f16;

use crate::ffi::{Attention, Kernels, kernels, output};

/// Types of a cache, by ggml's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KvType {
    F32 = 0,
    F16 = 1,
    Q8_0 = 8,
}

/// Values of a block of Q8_0.
const BLOCK: usize = 32;
/// Their scales here: with each, whole numbers are exact in F16, too.
const SCALES: [f32; 3] = [1.0 / 512.0, 1.0 / 256.0, 1.0 / 128.0];

impl KvType {
    /// Values that are exact in this type, a multiple of a block's.
    fn exact(self, values: Vec<f16>) -> Vec<f16> {
        if self != Self::Q8_0 {
            return values;
        }
        let blocks = values.chunks(BLOCK).zip(SCALES.into_iter().cycle());
        blocks
            .flat_map(|(block, scale)| {
                block.iter().map(move |v| f16::from_f32((v.to_f32() * 127.0).round() * scale))
            })
            .collect()
    }

    /// Values as a cache of this type holds them.
    fn bytes(self, values: &[f16]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Q8_0 => values.chunks(BLOCK).flat_map(block).collect(),
        }
    }
}

/// A block of Q8_0: its scale, and whole numbers; no number if a value is none.
fn block(values: &[f16]) -> Vec<u8> {
    let is_exact = |scale: &f32| {
        values.iter().map(|v| v.to_f32() / scale).all(|q| q.fract() == 0.0 && q.abs() <= 127.0)
    };
    let scale = SCALES.into_iter().find(is_exact).unwrap_or(f32::NAN);
    let whole = values.iter().map(|v| (v.to_f32() / scale) as i8 as u8); // 0 for what is no number
    f16::from_f32(scale).to_le_bytes().into_iter().chain(whole).collect()
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
    kv: KvType,
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
    kv: KvType::F16,
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

/// A case's tensors. Keys and values are exact in F16, and in the cache's type.
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
            k: case.kv.exact(halves(n_kv * case.dk, rng)),
            v: case.kv.exact(halves(n_kv * case.dv, rng)),
            mask,
            sinks: case.sinks.then(|| (0..case.n_head()).map(|_| rng.f32() * 4.0).collect()),
            case: case.clone(),
        }
    }

    /// The result of `set`, or `None` if it has no kernel for the case.
    fn run(&self, set: &Kernels, n_threads: i32) -> Option<Vec<f32>> {
        let case = &self.case;
        let [k, v] = [&self.k, &self.v].map(|values| case.kv.bytes(values));
        output(case.n_streams * case.n_q * case.n_head() * case.dv, |out| {
            let op = Attention {
                kv_type: case.kv as i32,
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
                k: k.as_ptr().cast(),
                v: v.as_ptr().cast(),
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
    for n_cells in
        [1, 2, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 640, 1030, 2048, 2049, 2600]
    {
        for mask in [Mask::Absent, Mask::Causal, Mask::Shared] {
            check_attention(&Case { n_cells, mask, ..CASE });
        }
    }
}

/// Head sizes, numbers of query heads for a KV head (more than a tile has among them), types of
/// caches and streams.
#[test]
fn attention_of_any_shape_is_the_twins_within_rounding() {
    for (dk, dv) in [(16, 16), (32, 32), (48, 80), (80, 80), (96, 96), (128, 128), (192, 128)] {
        for kv in [KvType::F16, KvType::F32, KvType::Q8_0] {
            let has_blocks = dk % BLOCK == 0 && dv % BLOCK == 0;
            if kv != KvType::Q8_0 || has_blocks {
                check_attention(&Case { dk, dv, kv, n_q: 5, mask: Mask::Shared, ..CASE });
            }
        }
    }
    for group in [1, 2, 4, 5, 7, 8, 23, 24, 25, 50] {
        check_attention(&Case { group, n_q: 4, n_cells: 150, ..CASE });
    }
    for n_streams in [2, 3] {
        check_attention(&Case { n_streams, n_q: 2, mask: Mask::Any, ..CASE });
    }
    for n_q in [1, 2, 9, 33] {
        for mask in [Mask::Causal, Mask::Any] {
            check_attention(&Case { n_q, mask, n_cells: 700, kv: KvType::Q8_0, ..CASE });
        }
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
