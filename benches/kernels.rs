//! What each kernel takes on this machine's GPU: `cargo bench --features cuda-kernels --bench
//! kernels`.
//!
//! First the bandwidth of a copy within the device, the upper bound; then each kernel, checked
//! against plain Rust and timed with CUDA events: the median of many launches, which rotate through
//! more copies of the inputs than the L2 cache holds. GB/s count each byte that must be read or
//! written once.
#![allow(missing_docs)]

use std::error::Error;
use std::rc::Rc;

use cudarc::driver::sys;
use medusa_llama::gpu::cuda::Cuda;
use medusa_llama::gpu::kernels::{
    Finish, Input, RowRule, Rows, Span, Verification, product, top_k, verify,
};
use medusa_llama::gpu::weights::{Matrices, Precision};
use medusa_llama::gpu::{Buffer, Device};
use medusa_llama::llama::Token;
use medusa_llama::matrix::Matrix;
use medusa_llama::vector::largest_k;

/// Launches per case; the median is reported.
const N_LAUNCHES: usize = 101;
const N_SEQUENCES: [usize; 4] = [1, 4, 8, 32];
/// Candidates per head.
const K: usize = 10;
/// Rows of a sequence's tree, the root among them.
const N_NODES: usize = 8;

/// Heads of a model's shape.
struct Shape {
    name: &'static str,
    n_embd: usize,
    n_heads: usize,
    /// Rows of an output matrix, and whether each head has its own.
    n_out: usize,
    own_outputs: bool,
    n_vocab: usize,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "SmolLM2-135M",
        n_embd: 576,
        n_heads: 4,
        n_out: 16_384,
        own_outputs: false,
        n_vocab: 49_152,
    },
    Shape {
        name: "Vicuna-7B",
        n_embd: 4096,
        n_heads: 5,
        n_out: 32_000,
        own_outputs: true,
        n_vocab: 32_000,
    },
    Shape {
        name: "Llama-3-8B",
        n_embd: 4096,
        n_heads: 4,
        n_out: 128_256,
        own_outputs: false,
        n_vocab: 128_256,
    },
];

struct Bench {
    cuda: Rc<Cuda>,
    device: Rc<dyn Device>,
    /// Of the second-level cache.
    cache_bytes: usize,
    /// Bytes per second of a copy, both read and written.
    bandwidth: f64,
}

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    if std::env::args().any(|arg| arg == "--test") {
        return Ok(()); // `cargo test --benches`: it starts
    }
    let cuda = match Cuda::new(0) {
        Ok(cuda) => Rc::new(cuda),
        Err(error) => {
            println!("{error}: nothing to measure");
            return Ok(());
        }
    };
    let device: Rc<dyn Device> = Rc::clone(&cuda) as _;
    let l2 = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
    let cache_bytes = usize::try_from(cuda.stream().context().attribute(l2)?)?;
    let mut bench = Bench { cuda, device, cache_bytes, bandwidth: 0.0 };
    bench.bandwidth = bench.copy_bandwidth()?;
    println!(
        "{}, L2 {} MiB, copy {:.0} GB/s",
        bench.cuda.stream().context().name()?,
        bench.cache_bytes >> 20,
        bench.bandwidth / 1e9
    );
    println!(
        "{:14} {:28} {:>4} {:>10} {:>9} {:>7}",
        "model", "kernel", "seqs", "us", "GB/s", "share"
    );
    for shape in &SHAPES {
        for precision in [Precision::F16, Precision::Q8] {
            bench.heads(shape, precision)?;
        }
        for n in N_SEQUENCES {
            bench.choosing(shape, n)?;
        }
    }
    Ok(())
}

impl Bench {
    /// Seconds on the device for what `queue` queues.
    fn time<E: Error + 'static>(
        &self,
        queue: impl FnOnce() -> std::result::Result<(), E>,
    ) -> Result<f64> {
        // Both events exist before the launch, so that no call delays the second one's record.
        let stream = self.cuda.stream();
        let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        start.record(stream)?;
        queue()?;
        end.record(stream)?;
        Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
    }

    fn copy_bandwidth(&self) -> Result<f64> {
        let (n_bytes, stream) = (1 << 30, self.cuda.stream());
        let (from, mut to) = (stream.alloc_zeros::<u8>(n_bytes)?, stream.alloc_zeros(n_bytes)?);
        let copy = |_| self.time(|| stream.memcpy_dtod(&from, &mut to));
        Ok(2.0 * n_bytes as f64 / self.median((0..21).map(copy))?)
    }

    /// The median in seconds.
    fn median(&self, times: impl Iterator<Item = Result<f64>>) -> Result<f64> {
        let mut seconds = times.collect::<Result<Vec<f64>>>()?;
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    fn report(&self, shape: &Shape, kernel: &str, n: usize, seconds: f64, n_bytes: usize) {
        let rate = n_bytes as f64 / seconds;
        let (us, share) = (seconds * 1e6, 100.0 * rate / self.bandwidth);
        println!("{:14} {kernel:28} {n:4} {us:10.1} {:9.0} {share:6.1}%", shape.name, rate / 1e9);
    }

    /// Number of copies of this size that exceeds the L2 cache.
    fn n_copies(&self, n_bytes: usize) -> usize {
        2 + 2 * self.cache_bytes / n_bytes.max(1)
    }

    fn copies(&self, values: &[f32]) -> Result<Vec<Buffer<f32>>> {
        let copy = |_| Ok(Buffer::from_host(&self.device, values)?);
        (0..self.n_copies(size_of_val(values))).map(copy).collect()
    }

    /// The residual blocks of all heads, and their output matrices.
    fn heads(&self, shape: &Shape, precision: Precision) -> Result<()> {
        let &Shape { n_embd: d, n_heads, n_out, own_outputs, .. } = shape;
        let mut rng = fastrand::Rng::with_seed(7);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.f32() - 0.5).collect() };
        let most = *N_SEQUENCES.last().expect("there are some");
        let x = random(n_heads * most * d);
        let d_x = Buffer::from_host(&self.device, &x)?;
        let block = Matrix { n_out: d, n_in: d, values: random(d * d) };
        let output = Matrix { n_out, n_in: d, values: random(n_out * d) };
        let n_outputs = if own_outputs { n_heads } else { 1 };
        for (name, matrix, n_nets, by_net) in
            [("blocks", &block, n_heads, false), ("outputs", &output, n_outputs, own_outputs)]
        {
            let row_bytes = match precision {
                Precision::F16 => 2 * d,
                Precision::Q8 => d + 2 * d / 32, // a scale per block
            };
            let n_bytes = n_nets * matrix.n_out * row_bytes;
            let nets = vec![vec![matrix]; n_nets];
            let copies: Vec<Matrices> = (0..self.n_copies(n_bytes))
                .map(|_| Matrices::new(&self.device, &nets, precision))
                .collect::<std::result::Result<_, _>>()?;
            for n in N_SEQUENCES {
                // One matrix for all heads: one product over the rows of all.
                let n_rows = if name == "outputs" && !own_outputs { n * n_heads } else { n };
                let n_y = n_nets * n_rows * matrix.n_out;
                let mut y = Buffer::zeros(&self.device, n_y)?;
                let rows = Rows { values: d_x.slice(), index: None, by_net };
                let (residual, finish) = if name == "blocks" {
                    (Some(rows), Finish::SiluResidual)
                } else {
                    (None, Finish::Plain)
                };
                let input = Input { x: rows, table: None, n_rows, bias: None, residual, finish };
                let mut launch = |i: usize| {
                    let weights = &copies[i % copies.len()];
                    self.time(|| product(&*self.device, weights, input, y.slice_mut()))
                };
                launch(0)?;
                let seconds = self.median((0..N_LAUNCHES).map(&mut launch))?;
                if finish == Finish::Plain {
                    let mut got = vec![0.0; n_y];
                    y.download(&mut got)?;
                    check_product(matrix, &x, &got[..matrix.n_out]);
                }
                let moved = n_bytes + 4 * n_rows * d + 4 * n_y;
                self.report(
                    shape,
                    &format!("{name} {precision:?}, {n_rows} rows"),
                    n,
                    seconds,
                    moved,
                );
            }
        }
        Ok(())
    }

    /// Verification of trees, greedy and sampled, and the heads' candidates.
    fn choosing(&self, shape: &Shape, n: usize) -> Result<()> {
        let &Shape { n_heads, n_out, n_vocab, .. } = shape;
        let mut rng = fastrand::Rng::with_seed(9);
        let mut logits = |n: usize| -> Vec<f32> {
            (0..n).map(|_| (rng.f32() + rng.f32() + rng.f32()) * 6.0).collect()
        };
        let n_rows = n * N_NODES;
        let values = logits(n_rows * n_vocab);
        let n_bytes = 4 * values.len();
        let copies = self.copies(&values)?;
        let spans: Vec<Span> =
            (0..n).map(|s| Span { first: (s * N_NODES) as i32, n: N_NODES as i32 }).collect();
        let mut memory = Verification::new(&self.device, n_rows, n)?;
        let mut chosen = Buffer::zeros(&self.device, n_rows)?;
        let sampled = RowRule {
            inverse_temperature: 1.0 / 0.8,
            top_p: 0.95,
            min_logit: 0.05f32.ln(),
            top_k: 40,
            ..greedy()
        };
        for (name, rule) in [("verify, greedy", greedy()), ("verify, sampled", sampled)] {
            let rules: Vec<RowRule> = (0..n_rows as i32)
                .map(|row| {
                    let first = row / N_NODES as i32 * N_NODES as i32;
                    let parent = if row == first { -1 } else { row - 1 };
                    RowRule {
                        logits_row: row,
                        sequence: row / N_NODES as i32,
                        parent,
                        position: [row as u32, 0],
                        ..rule
                    }
                })
                .collect();
            let mut launch = |i: usize| {
                let logits = copies[i % copies.len()].slice();
                self.time(|| {
                    verify(
                        &*self.device,
                        logits,
                        n_vocab,
                        &rules,
                        &spans,
                        &mut memory,
                        chosen.slice_mut(),
                    )
                })
            };
            launch(0)?;
            let seconds = self.median((0..N_LAUNCHES).map(&mut launch))?;
            if rule.inverse_temperature == 0.0 {
                let mut got = vec![0; n_rows];
                chosen.download(&mut got)?;
                for (row, &token) in values.chunks(n_vocab).zip(&got) {
                    let mut best = vec![];
                    largest_k(row, 1, &mut best);
                    assert_eq!(Token(token), best[0].0);
                }
            }
            self.report(shape, &format!("{name}, {n_rows} rows, with upload"), n, seconds, n_bytes);
        }
        drop(copies);

        let n_rows = n * n_heads;
        let values = logits(n_rows * n_out);
        let n_bytes = 4 * values.len();
        let copies = self.copies(&values)?;
        let mut tokens = Buffer::zeros(&self.device, n_rows * K)?;
        let mut p = Buffer::zeros(&self.device, n_rows * K)?;
        let mut launch = |i: usize| {
            let logits = copies[i % copies.len()].slice();
            self.time(|| {
                top_k(&*self.device, logits, n_out, None, K, tokens.slice_mut(), p.slice_mut())
            })
        };
        launch(0)?;
        let seconds = self.median((0..N_LAUNCHES).map(&mut launch))?;
        let mut got = vec![0; n_rows * K];
        tokens.download(&mut got)?;
        for (row, got) in values.chunks(n_out).zip(got.chunks(K)) {
            let mut best = vec![];
            largest_k(row, K, &mut best);
            assert!(best.iter().zip(got).all(|((Token(want), _), got)| want == got));
        }
        self.report(shape, &format!("top {K}, {n_rows} rows"), n, seconds, n_bytes);
        Ok(())
    }
}

fn greedy() -> RowRule {
    RowRule { top_p: 1.0, min_logit: f32::NEG_INFINITY, ..RowRule::default() }
}

/// The first row of a product against plain sums; weights were rounded to 8 bits at worst.
fn check_product(matrix: &Matrix, x: &[f32], got: &[f32]) {
    for (row, &got) in matrix.values.chunks(matrix.n_in).zip(got).step_by(97) {
        let want: f64 = row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let tolerance = 0.02 + 0.004 * (matrix.n_in as f64).sqrt();
        assert!((f64::from(got) - want).abs() < tolerance, "{got}, not {want}");
    }
}
