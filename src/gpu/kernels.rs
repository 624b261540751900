//! One safe function for each kernel.

use std::ffi::c_void;
use std::ptr;

use super::memory::{Plain, Slice, SliceMut};
use super::weights::{Matrices, Precision, Table};
use super::{Address, Buffer, Device, GpuError, Launch};

/// Threads of a block of products, and rows of a matrix that it multiplies with. As in
/// `cuda/heads.cu`.
const PRODUCT_THREADS: u32 = 256;
const PRODUCT_ROWS: usize = 32;
/// Bytes of shared memory that it asks for.
const PRODUCT_SHARED: u32 = 4 * 8192;
/// Threads of a block that looks at a row of logits. As in `cuda/select.cuh`.
const SELECT_THREADS: u32 = 512;
/// Candidates that [`choose_paths`] can sort. As in `cuda/select.cuh`.
pub const MOST_CANDIDATES: usize = 1024;
/// Most tokens of [`top_k`]. As in `cuda/topk.cu`.
pub const MOST_K: usize = 64;
/// Ranges of probability in [`Reliability::ratios`]. As in `cuda/topk.cu`.
pub const N_BINS: usize = 12;
const _: () = assert!(N_BINS == crate::speculate::calibration::N_BINS);

/// What becomes of a product's sums `s`, after the bias was added. As in `cuda/heads.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Finish {
    /// `s`.
    Plain = 0,
    /// `silu(s)`.
    Silu = 1,
    /// `r + silu(s)`.
    SiluResidual = 2,
    /// `r + s`.
    Residual = 3,
}

/// Rows of values, perhaps chosen by an index.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// `[n, width]`, for each net or for all.
    pub values: Slice<'a, f32>,
    /// Which of them each row of the product is; without, its own number. Numbers out of range are
    /// brought into it.
    pub index: Option<Slice<'a, i32>>,
    /// `true` where each net has rows of its own.
    pub by_net: bool,
}

/// What a product works on.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The rows.
    pub x: Rows<'a>,
    /// Rows looked up by token that stand behind them.
    pub table: Option<(&'a Table, Slice<'a, i32>)>,
    /// Number of rows.
    pub n_rows: usize,
    /// `[n_nets, n_out]`.
    pub bias: Option<Slice<'a, f32>>,
    /// `r`, rows of `n_out` values.
    pub residual: Option<Rows<'a>>,
    /// What becomes of the sums.
    pub finish: Finish,
}

#[repr(C)]
struct ProductArgs {
    weights: Address,
    scales: Address,
    bias: Address,
    x: Address,
    x_rows: Address,
    table: Address,
    tokens: Address,
    residual: Address,
    residual_rows: Address,
    y: Address,
    x_net: i64,
    residual_net: i64,
    n_rows: i32,
    n_out: i32,
    n_x: i32,
    n_table: i32,
    stride: i32,
    finish: i32,
    n_x_rows: i32,
    n_table_rows: i32,
    n_residual_rows: i32,
    padding: i32,
}

/// `y[net, row] = finish(W[net] [x[row], table[token[row]]] + bias[net])`, with `y` of `[n_nets,
/// n_rows, n_out]`.
///
/// # Errors
/// [`GpuError::Shape`] where sizes do not fit together, [`GpuError::Launch`].
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
        return misfit("a table as wide as the matrix");
    };
    // Rows that each net can choose from, or `None` where they do not fit.
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
        return misfit("a bias of another length");
    }
    let residual = match (&input.residual, input.finish) {
        (None, Finish::Plain | Finish::Silu) => None,
        (Some(rows), Finish::Residual | Finish::SiluResidual) => match source(rows, w.n_out) {
            Some(n) => Some((rows, n)),
            None => return misfit("too few rows of the residual"),
        },
        _ => return misfit("a residual that the finish does not take, or none that it does"),
    };
    if n_rows == 0 || y.len() < w.n_nets * n_rows * w.n_out {
        return misfit("no row, or no room for the result");
    }
    let net_stride =
        |rows: &Rows<'_>, n: usize, width: usize| if rows.by_net { (n * width) as i64 } else { 0 };
    let address = |index: Option<Slice<'_, i32>>| index.map_or(0, |i| i.address());
    let mut args = ProductArgs {
        weights: w.values.slice().address(),
        scales: w.scales.slice().address(),
        bias: input.bias.map_or(0, |b| b.address()),
        x: input.x.values.address(),
        x_rows: address(input.x.index),
        table: input.table.map_or(0, |(table, _)| table.values.slice().address()),
        tokens: input.table.map_or(0, |(_, tokens)| tokens.address()),
        residual: residual.map_or(0, |(rows, _)| rows.values.address()),
        residual_rows: residual.map_or(0, |(rows, _)| address(rows.index)),
        y: y.address(),
        x_net: net_stride(&input.x, n_x_rows, n_x),
        residual_net: residual.map_or(0, |(rows, n)| net_stride(rows, n, w.n_out)),
        n_rows: n_rows as i32,
        n_out: w.n_out as i32,
        n_x: n_x as i32,
        n_table: n_table as i32,
        stride: w.stride as i32,
        finish: input.finish as i32,
        n_x_rows: n_x_rows as i32,
        n_table_rows: input.table.map_or(0, |(table, _)| table.n_rows) as i32,
        n_residual_rows: residual.map_or(0, |(_, n)| n) as i32,
        padding: 0,
    };
    let grid =
        [n_rows.div_ceil(columns), w.n_out.div_ceil(PRODUCT_ROWS), w.n_nets].map(|n| n as u32);
    if grid[1] > 65_535 || grid[2] > 65_535 {
        return misfit("more rows or nets than a grid has places");
    }
    let launch = Launch { kernel, grid, block: PRODUCT_THREADS, shared: PRODUCT_SHARED };
    // SAFETY: `Product` of heads.cu; sizes are checked above, and the kernel brings indices into
    // range.
    unsafe { device.launch(launch, &mut [ptr::from_mut(&mut args).cast()]) }
}

#[repr(C)]
struct TopKArgs {
    logits: Address,
    token_map: Address,
    tokens: Address,
    p: Address,
    n: i32,
    k: i32,
}

/// The `k` largest of each row of `n` logits, best first and of equal ones the first places: their
/// tokens, by `token_map` or else their places, and their probabilities in the whole row.
///
/// # Errors
/// [`GpuError::Shape`] where sizes do not fit together, [`GpuError::Launch`].
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
    if n == 0 || logits.is_empty() || !logits.len().is_multiple_of(n) || n > i32::MAX as usize {
        return misfit("no whole rows of logits");
    }
    if k == 0 || k > n.min(MOST_K) {
        return misfit("k is 0, more than a row has, or more than 64");
    }
    let n_rows = logits.len() / n;
    if token_map.is_some_and(|map| map.len() != n) {
        return misfit("a token map of another length");
    }
    if tokens.len() < n_rows * k || p.len() < n_rows * k {
        return misfit("no room for the result");
    }
    let mut args = TopKArgs {
        logits: logits.address(),
        token_map: token_map.map_or(0, |map| map.address()),
        tokens: tokens.address(),
        p: p.address(),
        n: n as i32,
        k: k as i32,
    };
    let launch = Launch { kernel, grid: [n_rows as u32, 1, 1], block: SELECT_THREADS, shared: 0 };
    // SAFETY: `TopK` of topk.cu; sizes are checked above.
    unsafe { device.launch(launch, &mut [ptr::from_mut(&mut args).cast()]) }
}

/// Paths that a head was computed for, and what it offered behind each.
#[derive(Clone, Copy)]
pub struct Paths<'a> {
    /// Probability that each is reached.
    pub q: Slice<'a, f32>,
    /// Index of its sequence.
    pub origins: Slice<'a, i32>,
    /// The candidates behind each, `k` to a path, best first.
    pub candidates: Slice<'a, i32>,
    /// What the head says of them.
    pub p: Slice<'a, f32>,
    /// Candidates of a path.
    pub k: usize,
}

/// Room for the paths to go on from.
pub struct NextPaths<'a> {
    /// Probability that each is reached.
    pub q: SliceMut<'a, f32>,
    /// Index of its sequence.
    pub origins: SliceMut<'a, i32>,
    /// The path that each goes on from.
    pub parents: SliceMut<'a, i32>,
    /// And with which token.
    pub tokens: SliceMut<'a, i32>,
}

/// What turns a head's probabilities into how often its candidates are right.
#[derive(Clone, Copy)]
pub struct Reliability<'a> {
    /// For each range of what the head says, the factor: see
    /// [`Calibration`](crate::speculate::calibration::Calibration).
    pub ratios: Slice<'a, f32>,
    /// The lower end of the first range.
    pub lowest: f32,
    /// No candidate is surer.
    pub highest: f32,
    /// A factor for each sequence.
    pub trust: Slice<'a, f32>,
}

#[repr(C)]
struct ChoosePathsArgs {
    p: Address,
    candidates: Address,
    path_q: Address,
    origins: Address,
    trust: Address,
    ratios: Address,
    next_q: Address,
    next_origins: Address,
    next_parents: Address,
    next_tokens: Address,
    lowest: f32,
    highest: f32,
    n_paths: i32,
    k: i32,
    n_next: i32,
    n_origins: i32,
}

/// Fills `next` with the likeliest continuations of `paths`, over all sequences, as many as it has
/// room for.
///
/// # Errors
/// [`GpuError::Shape`] where sizes do not fit together, [`GpuError::Launch`].
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
    if n == 0 || n > MOST_CANDIDATES || n_next == 0 || n_next > n {
        return misfit("no candidate, too many, or fewer than paths to choose");
    }
    if paths.origins.len() != n_paths || paths.p.len() != n || paths.candidates.len() != n {
        return misfit("paths, their origins and candidates differ in number");
    }
    if [next.origins.len(), next.parents.len(), next.tokens.len()] != [n_next; 3] {
        return misfit("no room for the result");
    }
    if reliability.ratios.len() != N_BINS || reliability.trust.is_empty() {
        return misfit("no factors");
    }
    let mut args = ChoosePathsArgs {
        p: paths.p.address(),
        candidates: paths.candidates.address(),
        path_q: paths.q.address(),
        origins: paths.origins.address(),
        trust: reliability.trust.address(),
        ratios: reliability.ratios.address(),
        next_q: next.q.address(),
        next_origins: next.origins.address(),
        next_parents: next.parents.address(),
        next_tokens: next.tokens.address(),
        lowest: reliability.lowest,
        highest: reliability.highest,
        n_paths: n_paths as i32,
        k: paths.k as i32,
        n_next: n_next as i32,
        n_origins: reliability.trust.len() as i32,
    };
    let launch = Launch { kernel, grid: [1; 3], block: SELECT_THREADS, shared: 0 };
    // SAFETY: `ChoosePaths` of topk.cu; sizes are checked above, and the kernel brings origins into
    // range.
    unsafe { device.launch(launch, &mut [ptr::from_mut(&mut args).cast()]) }
}

/// How the token behind a row is chosen, and where the row is. As in `cuda/verify.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct RowRule {
    /// Low and high half.
    pub seed: [u32; 2],
    /// Of the token to choose, in its sequence; low and high half.
    pub position: [u32; 2],
    /// 0: the largest logit.
    pub inverse_temperature: f32,
    /// 1: all.
    pub top_p: f32,
    /// How far below the largest logit: `ln(min_p)`; negative infinity: all.
    pub min_logit: f32,
    /// 0: all.
    pub top_k: i32,
    /// Where its logits are.
    pub logits_row: i32,
    /// Index of its sequence.
    pub sequence: i32,
    /// The row above it in its tree; -1 for a root.
    pub parent: i32,
    /// The token drafted there.
    pub token: i32,
    /// Not 0: the host chooses.
    pub on_host: i32,
}
// SAFETY: thirteen numbers of four bytes.
unsafe impl Plain for RowRule {}

/// A sequence's rows, which follow one another, the root first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Span {
    /// The root's row.
    pub first: i32,
    /// Rows.
    pub n: i32,
}
// SAFETY: two numbers of four bytes.
unsafe impl Plain for Span {}

/// Room for what [`verify`] reads and writes, for so many rows and sequences at most.
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
    /// Makes room.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    pub fn new(
        device: &std::rc::Rc<dyn Device>,
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

#[repr(C)]
struct VerifyArgs {
    logits: Address,
    rules: Address,
    spans: Address,
    chosen: Address,
    last: Address,
    roots: Address,
    n_done: Address,
    n_vocab: i32,
    padding: i32,
}

/// Chooses the token behind each row, -1 where the host is to choose, and walks down each
/// sequence's tree by what was chosen. `spans` are all rows, in order.
///
/// # Errors
/// [`GpuError::Shape`] for rules and spans that do not fit together or go beyond the logits,
/// [`GpuError::Memory`], [`GpuError::Launch`].
pub fn verify(
    device: &dyn Device,
    logits: Slice<'_, f32>,
    n_vocab: usize,
    rules: &[RowRule],
    spans: &[Span],
    room: &mut Verification,
    chosen: SliceMut<'_, i32>,
) -> Result<(), GpuError> {
    let kernel = "verify";
    let misfit = |what: String| Err(GpuError::Shape { kernel, reason: what });
    if n_vocab == 0 || n_vocab > i32::MAX as usize || rules.is_empty() {
        return misfit("no vocabulary or no row".into());
    }
    if rules.len() > room.rules.len().min(chosen.len()) || spans.len() > room.spans.len() {
        return misfit(format!(
            "{} rows of {} sequences, more than there is room for",
            rules.len(),
            spans.len()
        ));
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
            let above =
                if row == first { r.parent == -1 } else { (first..row).contains(&r.parent) };
            if r.sequence != sequence
                || !above
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
    room.rules.upload(0, rules)?;
    room.spans.upload(0, spans)?;
    let mut args = VerifyArgs {
        logits: logits.address(),
        rules: room.rules.slice().address(),
        spans: room.spans.slice().address(),
        chosen: chosen.address(),
        last: room.last.slice().address(),
        roots: room.roots.slice().address(),
        n_done: room.n_done.slice().address(),
        n_vocab: n_vocab as i32,
        padding: 0,
    };
    let launch =
        Launch { kernel, grid: [rules.len() as u32, 1, 1], block: SELECT_THREADS, shared: 0 };
    // SAFETY: `Verify` of verify.cu; rules and spans are checked above.
    unsafe { device.launch(launch, &mut [ptr::from_mut(&mut args).cast::<c_void>()]) }
}
