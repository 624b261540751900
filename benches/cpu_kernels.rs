//! What a multiplication with a model's weights takes on this machine's CPU, by type, shape and rows:
//! `cargo bench --bench cpu_kernels`.
//!
//! First the bandwidth of a copy in memory and the products of 8-bit numbers in a second, the upper
//! bounds; then each multiplication, checked against the plain loops of `tests/cpu_kernels` and timed
//! through ggml, as the server calls it: the median of many, which rotate through more copies of the
//! weights than a cache holds. GB/s count the weights once. Beside it ggml's own kernel for the
//! weights as a file has them (llama.cpp may repack them: `benches/compare --rows` measures it whole).
//!
//! `cargo bench --bench cpu_kernels -- --types Q4_K,Q6_K --rows 1,8 --models Vicuna-7B --threads 4`
#![allow(missing_docs, unsafe_code)]

#[path = "../tests/cpu_kernels/mul_mat.rs"]
mod mul_mat;
#[path = "../tests/cpu_kernels/weights.rs"]
mod weights;

use std::thread::available_parallelism;
use std::time::Instant;

use clap::Parser;
use medusa_llama as _; // links the kernels
use mul_mat::MulMat;
use weights::{Column, Row, SUPER_BLOCKS, Type, activations};

/// A model's matrices: inputs and outputs.
struct Model {
    name: &'static str,
    matrices: &'static [(&'static str, usize, usize)],
}

const MODELS: [Model; 3] = [
    Model {
        name: "SmolLM2-135M",
        matrices: &[("attention", 576, 576), ("feed up", 576, 1536), ("feed down", 1536, 576)],
    },
    Model {
        name: "Vicuna-7B",
        matrices: &[
            ("attention", 4096, 4096),
            ("feed up", 4096, 11_008),
            ("feed down", 11_008, 4096),
        ],
    },
    Model {
        name: "Llama-3-8B",
        matrices: &[("keys", 4096, 1024), ("feed up", 4096, 14_336), ("feed down", 14_336, 4096)],
    },
];

const TYPES: [(&str, Type); 14] = [
    ("Q4_0", Type::Q4_0),
    ("Q4_1", Type::Q4_1),
    ("Q5_0", Type::Q5_0),
    ("Q5_1", Type::Q5_1),
    ("Q8_0", Type::Q8_0),
    ("IQ4_NL", Type::Iq4Nl),
    ("Q2_K", Type::Q2K),
    ("Q3_K", Type::Q3K),
    ("Q4_K", Type::Q4K),
    ("Q5_K", Type::Q5K),
    ("Q6_K", Type::Q6K),
    ("IQ4_XS", Type::Iq4Xs),
    ("F16", Type::F16),
    ("BF16", Type::Bf16),
];

/// Bytes of weights that no cache holds.
const BEYOND_CACHES: usize = 256 << 20;
const MOST_COPIES: usize = 200;
/// Seconds of multiplications for each figure.
const MEASURE_S: f64 = 0.2;

#[derive(Parser)]
struct Args {
    /// Types of weights
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    /// Models whose matrices to take
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Numbers of rows
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,32,128,512")]
    rows: Vec<usize>,
    /// Threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// One small case of each type, to see that it runs
    #[arg(long)]
    test: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

struct Bench {
    threads: usize,
    /// Bytes in a second, read and written.
    copy: f64,
    /// 8-bit products in a second.
    peak: Option<f64>,
    is_test: bool,
}

fn main() {
    let args = Args::parse();
    let threads = args.threads.unwrap_or_else(|| available_parallelism().map_or(1, usize::from));
    let copy = copy_bandwidth(threads);
    let peak = peak_products(threads).into_iter().filter(|p| *p > 0.0).reduce(f64::max);
    let bench = Bench { threads, copy, peak, is_test: args.test };
    let peak =
        bench.peak.map_or("no 8-bit products".into(), |p| format!("{:.0} G products/s", p / 1e9));
    println!("{threads} threads, copy {:.1} GB/s, {peak}", copy / 1e9);
    println!(
        "{:12} {:10} {:>13} {:7} {:>4} {:>10} {:>7} {:>7} {:>7} {:>7} {:>10} {:>6}",
        "model",
        "matrix",
        "k x columns",
        "type",
        "rows",
        "us",
        "GB/s",
        "of copy",
        "G prod",
        "of peak",
        "ggml us",
        "ratio"
    );
    let wanted = |list: &[String], name: &str| {
        list.is_empty() || list.iter().any(|wanted| wanted.eq_ignore_ascii_case(name))
    };
    let models = MODELS.iter().take(if args.test { 1 } else { MODELS.len() });
    for model in models.filter(|model| wanted(&args.models, model.name)) {
        for &(matrix, k, columns) in model.matrices {
            for (name, of) in TYPES.iter().filter(|(name, _)| wanted(&args.types, name)) {
                let whole_blocks = !SUPER_BLOCKS.contains(of) || k % 256 == 0;
                let rows: &[usize] = if args.test { &[3] } else { &args.rows };
                if whole_blocks {
                    let weights = Weights::random(*of, k, columns);
                    for &rows in rows {
                        print!(
                            "{:12} {matrix:10} {:>13} {name:7} {rows:>4} ",
                            model.name,
                            format!("{k} x {columns}")
                        );
                        bench.measure(&weights, rows);
                    }
                }
            }
        }
    }
}

/// A matrix whose columns are a few random ones in turn.
struct Weights {
    of: Type,
    k: usize,
    columns: usize,
    different: Vec<Column>,
    bytes: Vec<u8>,
}

impl Weights {
    fn random(of: Type, k: usize, columns: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(1);
        let different: Vec<Column> = (0..32).map(|_| Column::random(of, k, &mut rng)).collect();
        let mut period = vec![];
        different.iter().for_each(|column| column.write(of, &mut period));
        let size = period.len() / different.len() * columns;
        let bytes = period.iter().copied().cycle().take(size).collect();
        Self { of, k, columns, different, bytes }
    }
}

impl Bench {
    fn measure(&self, weights: &Weights, rows: usize) {
        let &Weights { of, k, columns, .. } = weights;
        let x = activations(rows * k, &mut fastrand::Rng::with_seed(2));
        let mut out = vec![f32::NAN; rows * columns];
        let is_float = matches!(of, Type::F16 | Type::Bf16);
        let mut op = MulMat {
            weight_type: of as i32,
            repacked: i32::from(!is_float),
            n_threads: self.threads as i32,
            k: k as i64,
            cols: columns as i64,
            rows: rows as i64,
            weights: weights.bytes.as_ptr().cast(),
            x: x.as_ptr(),
            out: out.as_mut_ptr(),
        };
        let all_copies = BEYOND_CACHES.div_ceil(weights.bytes.len()).min(MOST_COPIES);
        let time = |op: &MulMat, reference| {
            let first = time_mul_mat(op, 1, 1, reference)?[0];
            let n = if self.is_test { 1 } else { (MEASURE_S / first).ceil() as usize };
            let n = n.min(3 * all_copies);
            let mut seconds = time_mul_mat(op, n.min(all_copies), n, reference)?;
            seconds.sort_by(f64::total_cmp);
            Some(seconds[seconds.len() / 2])
        };
        let Some(ours) = time(&op, false) else { return println!("not here") };
        check(weights, &x, &out, rows);
        op.repacked = 0;
        // Our kernels take these as a file has them.
        let reference = is_float || matches!(of, Type::Q4_1 | Type::Q8_0);
        let ggml = time(&op, reference).unwrap_or(f64::NAN);
        let bandwidth = weights.bytes.len() as f64 / ours;
        let products = (k * columns * rows) as f64 / ours;
        println!(
            "{:>10.1} {:>7.1} {:>7.2} {:>7.1} {:>7.2} {:>10.1} {:>6.2}",
            ours * 1e6,
            bandwidth / 1e9,
            bandwidth / self.copy,
            products / 1e9,
            self.peak.map_or(f64::NAN, |peak| products / peak),
            ggml * 1e6,
            ggml / ours
        );
    }
}

/// Compares the first and the last row with the twin.
fn check(weights: &Weights, x: &[f32], out: &[f32], rows: usize) {
    let Weights { of, k, columns, different, .. } = weights;
    for row in [0, rows - 1] {
        let x = Row::new(&x[row * k..][..*k]);
        for (i, column) in different.iter().enumerate().take(*columns) {
            let (is, twin) = (out[row * columns + i], column.twin(*of, true, &x));
            assert!(is.to_bits() == twin.to_bits(), "row {row}, column {i} is {is} and not {twin}");
        }
    }
}

/// Bytes in a second, read and written, of copies by `threads` threads.
fn copy_bandwidth(threads: usize) -> f64 {
    let size = BEYOND_CACHES / threads;
    let copy = || {
        let (from, mut to) = (vec![1u8; size], vec![0u8; size]);
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = Instant::now();
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
            best = best.min(start.elapsed().as_secs_f64());
        }
        2.0 * size as f64 / best
    };
    std::thread::scope(|scope| {
        let copies: Vec<_> = (0..threads).map(|_| scope.spawn(copy)).collect();
        copies.into_iter().map(|copy| copy.join().expect("a copy does not panic")).sum()
    })
}

/// Seconds of `n` multiplications with each of `n_copies` of the weights in turn, through ggml's
/// graphs; `None` where there are none, or `m` does not work. `reference`: by ggml's own kernels
/// where ours take the file's layout.
fn time_mul_mat(m: &MulMat, n_copies: usize, n: usize, reference: bool) -> Option<Vec<f64>> {
    #[cfg(cpu_kernels = "graph")]
    {
        unsafe extern "C" {
            fn time_mul_mat(
                m: *const MulMat,
                n_copies: i32,
                n: i32,
                reference: bool,
                seconds: *mut f64,
            ) -> bool;
        }
        let mut seconds = vec![0.0; n];
        let (n_copies, n, out) = (n_copies as i32, n as i32, seconds.as_mut_ptr());
        // SAFETY: the caller's memory has the shapes that `m` says; `seconds` has room for all.
        let done = unsafe { time_mul_mat(m, n_copies, n, reference, out) };
        done.then_some(seconds)
    }
    #[cfg(not(cpu_kernels = "graph"))]
    {
        let _ = (m, n_copies, n, reference);
        None
    }
}

/// Products of 8-bit numbers in a second that `n_threads` can compute with each set of instructions
/// that the kernels are compiled for here; 0 for one that has none.
fn peak_products(n_threads: usize) -> Vec<f64> {
    #[allow(unused_mut)]
    let mut peaks = vec![];
    macro_rules! peak {
        ($name:literal, $peak:ident) => {
            #[cfg(cpu_kernels = $name)]
            {
                unsafe extern "C" {
                    fn $peak(n_threads: i32) -> f64;
                }
                // SAFETY: it takes a number of threads and needs nothing else.
                peaks.push(unsafe { $peak(n_threads as i32) });
            }
        };
    }
    peak!("avx2", peak_products_avx2);
    peak!("avx512", peak_products_avx512);
    peaks
}
