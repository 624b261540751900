//! One safe function for each kernel: [`GpuError::Shape`] for shapes that do not match, then
//! [`GpuError::Launch`]. Argument structs and sizes are generated from `cuda/args.h`.

use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;

use bytemuck::Pod;

use super::abi::{self, PRODUCT_ROWS, PRODUCT_SHARED_BYTES, PRODUCT_THREADS, SELECT_THREADS};
pub use super::abi::{Finish, RowRule, Span};
use super::device::{Device, GpuError, Launch};
use super::memory::{Buffer, Slice, SliceMut};
use super::weights::{Matrices, Precision, Table};

/// Most candidates that [`choose_paths`] sorts.
pub const MAX_CANDIDATES: usize = abi::MAX_CANDIDATES as usize;
/// Most tokens per row of [`top_k`].
pub const MAX_K: usize = abi::MAX_K as usize;
/// Ranges of probability in [`Reliability::ratios`].
pub const N_BINS: usize = abi::N_BINS as usize;

/// Queues `kernel` with blocks of [`SELECT_THREADS`].
///
/// # Safety
/// As of [`Device::launch`]: `A` is the struct that the kernel takes.
unsafe fn launch_select<A>(
    device: &dyn Device,
    kernel: &'static str,
    n_blocks: usize,
    mut args: A,
) -> Result<(), GpuError> {
    let (grid, block) = ([n_blocks as u32, 1, 1], SELECT_THREADS as u32);
    let args = (&raw mut args).cast::<c_void>();
    // SAFETY: by contract.
    unsafe { device.launch(Launch { kernel, grid, block, shared: 0 }, args) }
}

/// The device's pointer; null for `None`.
fn pointer<T: Pod>(values: Option<Slice<'_, T>>) -> *const T {
    values.map_or(ptr::null(), |v| v.as_ptr())
}

/// Rows of values, in order or by index.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// `[n, width]`, for each net or for all.
    pub values: Slice<'a, f32>,
    /// The row of `values` for each row of the product; without it, row `i` is row `i`.
    /// Out-of-range indices are clamped.
    pub index: Option<Slice<'a, i32>>,
    /// `true` where each net has rows of its own.
    pub by_net: bool,
}

/// Input of a product, and what follows it.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The rows.
    pub x: Rows<'a>,
    /// Embeddings appended to the rows, by token.
    pub table: Option<(&'a Table, Slice<'a, i32>)>,
    /// Number of rows.
    pub n_rows: usize,
    /// `[n_nets, n_out]`.
    pub bias: Option<Slice<'a, f32>>,
    /// `r`, rows of `n_out` values.
    pub residual: Option<Rows<'a>>,
    /// The function applied to the sums.
    pub finish: Finish,
}

/// `y[net, row] = finish(W[net] [x[row], table[token[row]]] + bias[net])`, with `y` of `[n_nets,
/// n_rows, n_out]`.
pub fn product(
    device: &dyn Device,
    w: &Matrices,
    input: Input<'_>,
    y: SliceMut<'_, f32>,
) -> Result<(), GpuError> {
    let kernels = match w.precision {
        Precision::F16 => ["product_f16_1", "product_f16_2", "product_f16_4", "product_f16_8"],
        Precision::Q8 => ["product_q8_1", "product_q8_2", "product_q8_4", "product_q8_8"],
    };
    let n_rows = input.n_rows;
    let columns = n_rows.next_power_of_two().min(8);
    let kernel = kernels[columns.ilog2() as usize];
    let misfit = |what: &str| Err(GpuError::Shape { kernel, reason: what.to_owned() });

    let n_table = input.table.map_or(0, |(table, _)| table.n);
    let Some(n_x) = w.n_in.checked_sub(n_table).filter(|&n| n > 0) else {
        return misfit("the table is as wide as the matrix");
    };
    // Rows that each net can choose from, or `None` if there are too few.
    let source = |rows: &Rows<'_>, width: usize| {
        let n = rows.values.len() / if rows.by_net { w.n_nets } else { 1 } / width;
        let fits = n > 0 && rows.index.map_or(n >= n_rows, |index| index.len() >= n_rows);
        fits.then_some(n)
    };
    let Some(n_x_rows) = source(&input.x, n_x) else { return misfit("too few rows of x") };
    if input.table.is_some_and(|(_, tokens)| tokens.len() < n_rows) {
        return misfit("too few tokens");
    }
    if input.bias.is_some_and(|b| b.len() != w.n_nets * w.n_out) {
        return misfit("the bias has another length");
    }
    let residual = match (&input.residual, input.finish) {
        (None, Finish::Plain | Finish::Silu) => None,
        (Some(rows), Finish::Residual | Finish::SiluResidual) => match source(rows, w.n_out) {
            Some(n) => Some((rows, n)),
            None => return misfit("too few rows of the residual"),
        },
        _ => return misfit("a residual must be given if, and only if, `finish` adds one"),
    };
    if n_rows == 0 || y.len() < w.n_nets * n_rows * w.n_out {
        return misfit("no rows, or y is too short");
    }
    let grid = [n_rows.div_ceil(columns), w.n_out.div_ceil(PRODUCT_ROWS as usize), w.n_nets]
        .map(|n| n as u32);
    if grid[1] > 65_535 || grid[2] > 65_535 {
        return misfit("too many rows or nets for a grid");
    }
    let net_stride =
        |rows: &Rows<'_>, n: usize, width: usize| if rows.by_net { (n * width) as i64 } else { 0 };
    let mut args = abi::ProductArgs {
        weights: w.values.slice().as_ptr().cast(),
        scales: w.scales.slice().as_ptr(),
        bias: pointer(input.bias),
        x: input.x.values.as_ptr(),
        x_rows: pointer(input.x.index),
        table: pointer(input.table.map(|(table, _)| table.values.slice())),
        tokens: pointer(input.table.map(|(_, tokens)| tokens)),
        residual: pointer(residual.map(|(rows, _)| rows.values)),
        residual_rows: pointer(residual.and_then(|(rows, _)| rows.index)),
        y: y.as_mut_ptr(),
        x_net: net_stride(&input.x, n_x_rows, n_x),
        residual_net: residual.map_or(0, |(rows, n)| net_stride(rows, n, w.n_out)),
        n_rows: n_rows as i32,
        n_out: w.n_out as i32,
        n_x: n_x as i32,
        n_table: n_table as i32,
        stride: w.stride as i32,
        finish: input.finish,
        n_x_rows: n_x_rows as i32,
        n_table_rows: input.table.map_or(0, |(table, _)| table.n_rows) as i32,
        n_residual_rows: residual.map_or(0, |(_, n)| n) as i32,
    };
    let [block, shared] = [PRODUCT_THREADS, PRODUCT_SHARED_BYTES].map(|n| n as u32);
    // SAFETY: `product_*` take `ProductArgs`; shapes are checked above, and the kernel clamps
    // indices.
    unsafe { device.launch(Launch { kernel, grid, block, shared }, (&raw mut args).cast()) }
}

/// The `k` largest of each row of `n` logits, best first and of equal ones the lowest column first:
/// their tokens, by `token_map` or else their columns, and their probabilities over the whole row.
pub fn top_k(
    device: &dyn Device,
    logits: Slice<'_, f32>,
    n: usize,
    token_map: Option<Slice<'_, i32>>,
    k: usize,
    tokens: SliceMut<'_, i32>,
    p: SliceMut<'_, f32>,
) -> Result<(), GpuError> {
    let kernel = "top_k";
    let misfit = |what: &str| Err(GpuError::Shape { kernel, reason: what.to_owned() });
    if n == 0 || logits.len() == 0 || !logits.len().is_multiple_of(n) || n > i32::MAX as usize {
        return misfit("no whole rows of logits");
    }
    if k == 0 || k > n.min(MAX_K) {
        return misfit("k is 0, or larger than a row or than 64");
    }
    let n_rows = logits.len() / n;
    if token_map.is_some_and(|map| map.len() != n) {
        return misfit("the token map has another length");
    }
    if tokens.len() < n_rows * k || p.len() < n_rows * k {
        return misfit("the output is too short");
    }
    let args = abi::TopKArgs {
        logits: logits.as_ptr(),
        token_map: pointer(token_map),
        tokens: tokens.as_mut_ptr(),
        p: p.as_mut_ptr(),
        n: n as i32,
        k: k as i32,
    };
    // SAFETY: `top_k` takes `TopKArgs`; shapes are checked above.
    unsafe { launch_select(device, kernel, n_rows, args) }
}

/// Paths that a head was computed for, and its candidates after each.
#[derive(Clone, Copy)]
pub struct Paths<'a> {
    /// Probability that each path is accepted.
    pub q: Slice<'a, f32>,
    /// Index of its sequence.
    pub origins: Slice<'a, i32>,
    /// The candidates after each, `k` per path, best first.
    pub candidates: Slice<'a, i32>,
    /// The head's probabilities of them.
    pub p: Slice<'a, f32>,
    /// Candidates per path.
    pub k: usize,
}

/// Output of [`choose_paths`]: the paths to continue.
pub struct NextPaths<'a> {
    /// Probability that each path is accepted.
    pub q: SliceMut<'a, f32>,
    /// Index of its sequence.
    pub origins: SliceMut<'a, i32>,
    /// The path that each continues.
    pub parents: SliceMut<'a, i32>,
    /// The token it continues with.
    pub tokens: SliceMut<'a, i32>,
}

/// Turns a head's probabilities into acceptance rates, as `speculate::calibration` measures them.
#[derive(Clone, Copy)]
pub struct Reliability<'a> {
    /// Measured acceptance over the head's probability, for each range of the latter.
    pub ratios: Slice<'a, f32>,
    /// Lower end of the first range.
    pub lowest: f32,
    /// Upper clamp of a rate.
    pub highest: f32,
    /// A factor for each sequence.
    pub trust: Slice<'a, f32>,
}

/// Fills `next` with the most probable continuations of `paths`, over all sequences.
pub fn choose_paths(
    device: &dyn Device,
    paths: Paths<'_>,
    reliability: Reliability<'_>,
    next: &mut NextPaths<'_>,
) -> Result<(), GpuError> {
    let kernel = "choose_paths";
    let misfit = |what: &str| Err(GpuError::Shape { kernel, reason: what.to_owned() });
    let (n_paths, n_next) = (paths.q.len(), next.q.len());
    let n = n_paths * paths.k;
    if n == 0 || n > MAX_CANDIDATES || n_next == 0 || n_next > n {
        return misfit("no candidates, too many, or fewer than paths to choose");
    }
    if paths.origins.len() != n_paths || paths.p.len() != n || paths.candidates.len() != n {
        return misfit("paths, their origins and candidates differ in number");
    }
    if [next.origins.len(), next.parents.len(), next.tokens.len()] != [n_next; 3] {
        return misfit("the outputs differ in length");
    }
    if reliability.ratios.len() != N_BINS || reliability.trust.len() == 0 {
        return misfit("ratios or trust have another length");
    }
    let args = abi::ChoosePathsArgs {
        p: paths.p.as_ptr(),
        candidates: paths.candidates.as_ptr(),
        path_q: paths.q.as_ptr(),
        origins: paths.origins.as_ptr(),
        trust: reliability.trust.as_ptr(),
        ratios: reliability.ratios.as_ptr(),
        next_q: next.q.as_mut_ptr(),
        next_origins: next.origins.as_mut_ptr(),
        next_parents: next.parents.as_mut_ptr(),
        next_tokens: next.tokens.as_mut_ptr(),
        lowest: reliability.lowest,
        highest: reliability.highest,
        n_paths: n_paths as i32,
        k: paths.k as i32,
        n_next: n_next as i32,
        n_origins: reliability.trust.len() as i32,
    };
    // SAFETY: `choose_paths` takes `ChoosePathsArgs`; shapes are checked above, and the kernel
    // clamps origins.
    unsafe { launch_select(device, kernel, 1, args) }
}

/// Memory that [`verify`] reads and writes, for a fixed number of rows and sequences.
pub struct Verification {
    rules: Buffer<RowRule>,
    spans: Buffer<Span>,
    /// By sequence the logits row of the last accepted row; the root's where the host has to choose
    /// on the way.
    pub last: Buffer<i32>,
    /// By sequence the token chosen there: the next root. 0 where the host chooses.
    pub roots: Buffer<i32>,
    n_done: Buffer<u32>,
}

impl Verification {
    /// Allocates memory for at most this many rows and sequences.
    pub fn new(
        device: &Rc<dyn Device>,
        n_rows: usize,
        n_sequences: usize,
    ) -> Result<Self, GpuError> {
        Ok(Self {
            rules: Buffer::zeros(device, n_rows)?,
            spans: Buffer::zeros(device, n_sequences)?,
            last: Buffer::zeros(device, n_sequences)?,
            roots: Buffer::zeros(device, n_sequences)?,
            n_done: Buffer::zeros(device, n_sequences)?,
        })
    }
}

/// Chooses the token after each row, -1 where the host is to choose, and walks down each sequence's
/// tree along the choices. `spans` cover all rows, in order; rules and spans must agree and not
/// exceed the logits.
pub fn verify(
    device: &dyn Device,
    logits: Slice<'_, f32>,
    n_vocab: usize,
    rules: &[RowRule],
    spans: &[Span],
    memory: &mut Verification,
    chosen: SliceMut<'_, i32>,
) -> Result<(), GpuError> {
    let kernel = "verify";
    let misfit = |what: String| Err(GpuError::Shape { kernel, reason: what });
    if n_vocab == 0 || n_vocab > i32::MAX as usize || rules.is_empty() {
        return misfit("no vocabulary or no rows".into());
    }
    if rules.len() > memory.rules.len().min(chosen.len()) || spans.len() > memory.spans.len() {
        return misfit(format!("too many: {} rows of {} sequences", rules.len(), spans.len()));
    }
    let n_logits_rows = (logits.len() / n_vocab) as i32;
    let mut first = 0;
    for (sequence, span) in (0..).zip(spans) {
        let rows = first..first + span.n;
        if span.n < 1 || span.first != first || rows.end as usize > rules.len() {
            return misfit(format!("sequence {sequence}: rows {span:?}, expected from {first} on"));
        }
        for row in rows.clone() {
            let r = &rules[row as usize];
            let parent_is_above =
                if row == first { r.parent == -1 } else { (first..row).contains(&r.parent) };
            if r.sequence != sequence
                || !parent_is_above
                || !(0..n_logits_rows).contains(&r.logits_row)
                || r.top_k < 0
            {
                return misfit(format!("row {row}: {r:?}"));
            }
        }
        first = rows.end;
    }
    if first as usize != rules.len() {
        return misfit(format!("{} rows, of which {first} belong to a sequence", rules.len()));
    }
    memory.rules.upload(0, rules)?;
    memory.spans.upload(0, spans)?;
    let args = abi::VerifyArgs {
        logits: logits.as_ptr(),
        rules: memory.rules.slice().as_ptr(),
        spans: memory.spans.slice().as_ptr(),
        chosen: chosen.as_mut_ptr(),
        last: memory.last.slice_mut().as_mut_ptr(),
        roots: memory.roots.slice_mut().as_mut_ptr(),
        n_done: memory.n_done.slice_mut().as_mut_ptr(),
        n_vocab: n_vocab as i32,
    };
    // SAFETY: `verify` takes `VerifyArgs`; rules and spans are checked above.
    unsafe { launch_select(device, kernel, rules.len(), args) }
}
