//! Small networks on ggml's kernels: weights in ggml's memory, and graphs that compute with them.
//!
//! A [`Graph`] is a plain list of operations, built anew for each pass. [`Store::compute`] checks its
//! shapes, sizes its memory, and only then hands it to ggml, which would stop the process for
//! either.

use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::ptr::{self, NonNull};

use super::error::LlamaError;
use super::sys;
use super::tensor_type::TensorType;
use super::threads::Threads;
use crate::matrix::Matrix;

/// How finely a matrix is quantized. Rows that are not a multiple of 32 values are F16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantized {
    /// 8 bits, with a scale per 32 values.
    Eight,
    /// 4 bits, with a scale and an offset per 32 values: for matrices so large that reading them
    /// takes the time.
    Four,
}

/// A matrix or vector of a [`Store`].
#[derive(Clone, Copy, Debug)]
pub struct Weight(usize);

/// The result of an operation of a [`Graph`]: rows of values.
#[derive(Clone, Copy, Debug)]
pub struct Node(usize);

/// An operation on results of earlier ones.
#[derive(Clone, Copy)]
pub enum Op<'a> {
    /// Rows of so many values.
    Input(&'a [f32], usize),
    /// A matrix times each row.
    Product(Weight, Node),
    /// A vector added to each row.
    AddVector(Node, Weight),
    /// The sum of two results of the same shape.
    Add(Node, Node),
    /// `SiLU(x)`.
    Silu(Node),
    /// The rows of the first, then those of the second.
    Concat(Node, Node),
}

/// Operations in order.
#[derive(Default)]
pub struct Graph<'a> {
    ops: Vec<Op<'a>>,
}

impl<'a> Graph<'a> {
    /// Appends an operation.
    pub fn push(&mut self, op: Op<'a>) -> Node {
        self.ops.push(op);
        Node(self.ops.len() - 1)
    }
}

/// A ggml context, which owns the headers of its tensors. Drop frees them.
pub(super) struct Tensors {
    ptr: NonNull<sys::ggml_context>,
    /// Headers that still fit.
    n_left: Cell<usize>,
}

impl Drop for Tensors {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, freed once; the headers are not used after it.
        unsafe { sys::ggml_free(self.ptr.as_ptr()) };
    }
}

impl Tensors {
    /// A context for `n` headers without data.
    pub(super) fn headers(n: usize) -> Result<Self, LlamaError> {
        // SAFETY: no arguments; returns a constant.
        let mem_size = (n + 1) * unsafe { sys::ggml_tensor_overhead() };
        let params =
            sys::ggml_init_params { mem_size, mem_buffer: ptr::null_mut(), no_alloc: true };
        Self::new(params, n)
    }

    fn new(params: sys::ggml_init_params, n: usize) -> Result<Self, LlamaError> {
        // SAFETY: the buffer is null, so that C allocates it, or `compute`'s arena, which outlives
        // the context. C returns null without memory.
        let ptr = NonNull::new(unsafe { sys::ggml_init(params) });
        let ptr = ptr.ok_or_else(|| LlamaError::Context("no memory for tensors".into()))?;
        Ok(Self { ptr, n_left: Cell::new(n) })
    }

    /// A tensor of this shape: values of a row, rows, matrices, groups of matrices.
    pub(super) fn tensor(
        &self,
        kind: TensorType,
        shape: [usize; 4],
    ) -> Result<NonNull<sys::ggml_tensor>, LlamaError> {
        let size = shape.map(|n| i64::try_from(n).unwrap_or(0));
        let n_values = size.iter().try_fold(1i64, |all, n| all.checked_mul(*n));
        // A value takes 8 bytes at most.
        let fits = n_values.is_some_and(|n| (1..=i64::MAX / 8).contains(&n))
            && shape[0].is_multiple_of(kind.block());
        let refuse = || LlamaError::Misuse(format!("no tensor of the shape {shape:?} fits"));
        let n_left = self.n_left.get().checked_sub(1).filter(|_| fits);
        self.n_left.set(n_left.ok_or_else(refuse)?);
        let [a, b, c, d] = size;
        // SAFETY: a live context with memory for another tensor; rows are whole blocks.
        let t = unsafe { sys::ggml_new_tensor_4d(self.ptr.as_ptr(), kind.0, a, b, c, d) };
        NonNull::new(t).ok_or_else(refuse)
    }
}

/// A buffer of one of ggml's memory types. Drop frees it.
struct Buffer(NonNull<sys::ggml_backend_buffer>);

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by ggml, freed once. ggml does not touch the tensors in it.
        unsafe { sys::ggml_backend_buffer_free(self.0.as_ptr()) };
    }
}

/// Memory types for weights, best first: the one in which ggml's CPU backend repacks matrices for
/// the processor, if this build has it, and plain memory.
fn memory_types() -> impl Iterator<Item = sys::ggml_backend_buffer_type_t> {
    // SAFETY: no arguments; returns a constant.
    repacking().into_iter().chain([unsafe { sys::ggml_backend_cpu_buffer_type() }])
}

fn repacking() -> Option<sys::ggml_backend_buffer_type_t> {
    // SAFETY: plain lookups in ggml's registry, which return null for what it has not;
    // ggml-backend.h declares the function's type for this name, and its result ends with a null.
    unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if device.is_null() {
            return None;
        }
        let registry = sys::ggml_backend_dev_backend_reg(device);
        let name = c"ggml_backend_dev_get_extra_bufts".as_ptr();
        let address = sys::ggml_backend_reg_get_proc_address(registry, name);
        let extra =
            std::mem::transmute::<*mut c_void, sys::ggml_backend_dev_get_extra_bufts_t>(address)?;
        let mut kinds = extra(device);
        while !kinds.is_null() && !(*kinds).is_null() {
            if CStr::from_ptr(sys::ggml_backend_buft_name(*kinds)) == c"CPU_REPACK" {
                return Some(*kinds);
            }
            kinds = kinds.add(1);
        }
        None
    }
}

struct Stored {
    tensor: NonNull<sys::ggml_tensor>,
    kind: TensorType,
    n_in: usize,
    n_out: usize,
}

/// Weights that live as long as the store, and memory for graphs. Belongs to one thread.
pub struct Store {
    weights: Vec<Stored>,
    buffers: Vec<Buffer>,
    headers: Tensors,
    arena: Vec<u64>,
    /// Memory that ggml's operations work in.
    work: Vec<u8>,
    threads: Threads,
}

/// Most weights of a store.
const MAX_WEIGHTS: usize = 2048;
/// Most operations of a graph: ggml's own limit.
const MAX_OPS: usize = sys::GGML_DEFAULT_GRAPH_SIZE as usize;
/// Bytes of a graph's headers, padding and bookkeeping besides its values.
const OVERHEAD: usize = 2 << 20;

impl Store {
    /// Without weights, computing on `threads`; [`LlamaError::Context`] without memory.
    pub fn new(threads: &Threads) -> Result<Self, LlamaError> {
        Ok(Self {
            weights: vec![],
            buffers: vec![],
            headers: Tensors::headers(2 * MAX_WEIGHTS)?, // a header is lost where repacking is refused
            arena: vec![],
            work: vec![],
            threads: threads.clone(),
        })
    }

    /// Takes a matrix in, quantized.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for a matrix that is empty or contradicts its shape,
    /// [`LlamaError::Context`] without memory.
    pub fn matrix(&mut self, m: &Matrix, quantized: Quantized) -> Result<Weight, LlamaError> {
        if !m.is(m.n_out, m.n_in) {
            let (n, n_out, n_in) = (m.values.len(), m.n_out, m.n_in);
            return Err(LlamaError::Misuse(format!(
                "{n} values are no matrix of {n_out} x {n_in}"
            )));
        }
        let kind = match quantized {
            _ if !m.n_in.is_multiple_of(32) => TensorType::F16,
            Quantized::Eight => TensorType(sys::GGML_TYPE_Q8_0),
            Quantized::Four => TensorType(sys::GGML_TYPE_Q4_1),
        };
        self.add(kind, m.n_in, m.n_out, &m.values)
    }

    /// Takes a vector in; errors as [`matrix`](Self::matrix).
    pub fn vector(&mut self, values: &[f32]) -> Result<Weight, LlamaError> {
        self.add(TensorType::F32, values.len(), 1, values)
    }

    fn add(
        &mut self,
        kind: TensorType,
        n_in: usize,
        n_out: usize,
        values: &[f32],
    ) -> Result<Weight, LlamaError> {
        let bytes = kind.store(values)?;
        for memory in memory_types() {
            let tensor = self.headers.tensor(kind, [n_in, n_out, 1, 1])?;
            // SAFETY: one of ggml's memory types; null without memory.
            let buffer = unsafe { sys::ggml_backend_buft_alloc_buffer(memory, bytes.len()) };
            let buffer = NonNull::new(buffer).map(Buffer).ok_or_else(|| {
                LlamaError::Context(format!("no memory for {} bytes of weights", bytes.len()))
            })?;
            // SAFETY: a live buffer of the tensor's size, and a header without data, which gets the
            // buffer's.
            let (status, repacks) = unsafe {
                let start = sys::ggml_backend_buffer_get_base(buffer.0.as_ptr());
                let status =
                    sys::ggml_backend_tensor_alloc(buffer.0.as_ptr(), tensor.as_ptr(), start);
                (status, !(*tensor.as_ptr()).extra.is_null())
            };
            // Repacking memory has kernels for some types and shapes only.
            // SAFETY: a live buffer.
            let plain = unsafe { sys::ggml_backend_buffer_is_host(buffer.0.as_ptr()) };
            if status != sys::GGML_STATUS_SUCCESS || !(plain || repacks) {
                continue;
            }
            // SAFETY: the tensor holds as many bytes; ggml repacks them where the memory asks for it.
            unsafe {
                sys::ggml_backend_tensor_set(tensor.as_ptr(), bytes.as_ptr().cast(), 0, bytes.len())
            };
            self.buffers.push(buffer);
            return Ok(self.push(Stored { tensor, kind, n_in, n_out }));
        }
        Err(LlamaError::Context("ggml refused the weights".into()))
    }

    fn push(&mut self, stored: Stored) -> Weight {
        self.weights.push(stored);
        Weight(self.weights.len() - 1)
    }

    fn stored(&self, weight: Weight) -> Result<&Stored, LlamaError> {
        self.weights
            .get(weight.0)
            .ok_or_else(|| LlamaError::Misuse("weights of another net".into()))
    }

    /// The first `n_out` rows of a matrix, without copying them; [`LlamaError::Misuse`] unless they
    /// are a multiple of eight.
    pub fn first_rows(&mut self, matrix: Weight, n_out: usize) -> Result<Weight, LlamaError> {
        let &Stored { tensor: whole, kind, n_in, n_out: n_whole } = self.stored(matrix)?;
        if n_out > n_whole || !n_out.is_multiple_of(8) {
            return Err(LlamaError::Misuse(format!("the first {n_out} rows of {n_whole}")));
        }
        let tensor = self.headers.tensor(kind, [n_in, n_out, 1, 1])?;
        // SAFETY: two live tensors, the new one without data. It gets the first bytes of the other's:
        // repacking orders rows in groups of at most eight, one group after the other.
        let same = unsafe {
            let whole = &*whole.as_ptr();
            sys::ggml_backend_tensor_alloc(whole.buffer, tensor.as_ptr(), whole.data)
                == sys::GGML_STATUS_SUCCESS
                && (*tensor.as_ptr()).extra.is_null() == whole.extra.is_null()
        };
        if !same {
            return Err(LlamaError::Context("a part of a repacked matrix has no kernels".into()));
        }
        Ok(self.push(Stored { tensor, kind, n_in, n_out }))
    }

    /// Floats that a graph's values take. Checks that the arguments of each operation match.
    fn n_floats(&self, graph: &Graph<'_>) -> Result<usize, LlamaError> {
        let mut n_floats = 0;
        let mut shapes: Vec<(usize, usize)> = Vec::with_capacity(graph.ops.len());
        for (i, op) in graph.ops.iter().enumerate() {
            let of = |node: Node| shapes.get(node.0).copied();
            let shape = match *op {
                Op::Input(values, width) => Some((width, values.len() / width.max(1)))
                    .filter(|(width, n)| !values.is_empty() && width * n == values.len()),
                Op::Product(w, x) => {
                    let w = self.stored(w)?;
                    of(x).filter(|x| x.0 == w.n_in).map(|x| (w.n_out, x.1))
                }
                Op::AddVector(x, v) => {
                    let v = self.stored(v)?;
                    of(x).filter(|x| (x.0, 1, TensorType::F32) == (v.n_in, v.n_out, v.kind))
                }
                Op::Add(a, b) => of(a).filter(|_| of(a) == of(b)),
                Op::Silu(x) => of(x),
                Op::Concat(a, b) => {
                    let joined = of(a).zip(of(b)).filter(|(a, b)| a.0 == b.0);
                    joined.map(|(a, b)| (a.0, a.1 + b.1))
                }
            };
            let shape = shape.filter(|_| i < MAX_OPS).ok_or_else(|| {
                LlamaError::Misuse(format!("operation {i} of a graph: its arguments do not match"))
            })?;
            n_floats += shape.0 * shape.1;
            shapes.push(shape);
        }
        Ok(n_floats)
    }

    /// Computes a graph, and copies the values of `outputs` one after the other to `results`.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for operations whose arguments do not match, [`LlamaError::Context`]
    /// without memory, [`LlamaError::Compute`] when ggml fails.
    pub fn compute(
        &mut self,
        graph: &Graph<'_>,
        outputs: &[Node],
        results: &mut Vec<f32>,
    ) -> Result<(), LlamaError> {
        let bytes = 4 * self.n_floats(graph)? + OVERHEAD;
        if outputs.iter().any(|o| o.0 >= graph.ops.len()) {
            return Err(LlamaError::Misuse("outputs of another graph".into()));
        }
        if self.arena.len() * 8 < bytes {
            self.arena.resize(bytes.div_ceil(8), 0);
        }
        let params = sys::ggml_init_params {
            mem_size: self.arena.len() * 8,
            mem_buffer: self.arena.as_mut_ptr().cast::<c_void>(),
            no_alloc: false,
        };
        let context = Tensors::new(params, graph.ops.len())?;
        let ctx = context.ptr.as_ptr();
        let weight = |w: Weight| self.weights[w.0].tensor.as_ptr();
        let mut nodes: Vec<*mut sys::ggml_tensor> = Vec::with_capacity(graph.ops.len());
        for op in &graph.ops {
            // SAFETY: live tensors, whose shapes `n_floats` checked; the arena has memory for the
            // results.
            nodes.push(unsafe {
                match *op {
                    Op::Input(values, width) => {
                        let x =
                            context.tensor(TensorType::F32, [width, values.len() / width, 1, 1])?;
                        let data = (*x.as_ptr()).data.cast::<f32>();
                        ptr::copy_nonoverlapping(values.as_ptr(), data, values.len());
                        x.as_ptr()
                    }
                    Op::Product(w, x) => sys::ggml_mul_mat(ctx, weight(w), nodes[x.0]),
                    Op::AddVector(x, v) => sys::ggml_add(ctx, nodes[x.0], weight(v)),
                    Op::Add(a, b) => sys::ggml_add(ctx, nodes[a.0], nodes[b.0]),
                    Op::Silu(x) => sys::ggml_silu(ctx, nodes[x.0]),
                    Op::Concat(a, b) => sys::ggml_concat(ctx, nodes[a.0], nodes[b.0], 1),
                }
            });
        }
        // SAFETY: tensors of the live context, whose arena has memory for the graph; the plan gets the
        // memory to work in that it asks for.
        let status = unsafe {
            let graph = sys::ggml_new_graph(ctx);
            outputs.iter().for_each(|o| sys::ggml_build_forward_expand(graph, nodes[o.0]));
            let n_threads = self.threads.n_used() as i32;
            let mut plan = sys::ggml_graph_plan(graph, n_threads, self.threads.as_ptr());
            if self.work.len() < plan.work_size {
                self.work.resize(plan.work_size, 0);
            }
            plan.work_data = self.work.as_mut_ptr();
            sys::ggml_graph_compute(graph, &raw mut plan)
        };
        if status != sys::GGML_STATUS_SUCCESS {
            return Err(LlamaError::Compute { code: status });
        }
        results.clear();
        for output in outputs {
            let t = nodes[output.0];
            // SAFETY: a computed, contiguous F32 tensor of that many values.
            results.extend_from_slice(unsafe {
                let n = sys::ggml_nelements(t) as usize;
                std::slice::from_raw_parts((*t).data.cast::<f32>(), n)
            });
        }
        Ok(())
    }
}
