//! Weights in ggml's memory and room to compute with them: what the networks of heads have in
//! common. Weights are quantized where their rows allow it, F16 elsewhere, and repacked where the
//! processor has kernels for that.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use super::{LlamaError, start_backend, sys};

/// A matrix as it stands in a file: `n_out` rows of `n_in` values.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub n_out: usize,
    /// Columns.
    pub n_in: usize,
    /// Row after row.
    pub values: Vec<f32>,
}

impl Matrix {
    /// `true` for this many rows and columns, all of them there.
    pub(super) fn is(&self, n_out: usize, n_in: usize) -> bool {
        (self.n_out, self.n_in) == (n_out, n_in)
            && self.values.len() == n_out * n_in
            && n_out > 0
            && n_in > 0
    }
}

pub(super) type Tensor = NonNull<sys::ggml_tensor>;

/// How finely a matrix is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    /// 8 bits and a scale for each 32 values: for what a state goes through.
    Eight,
    /// 4 bits, a scale and an offset for each 32 values: for matrices so large that reading them
    /// takes the time.
    Four,
}

/// Weights that live as long as it, and an arena for graphs. Belongs to one thread.
pub(super) struct Store {
    weights: NonNull<sys::ggml_context>,
    /// Memory of the repacked weights, one buffer each.
    repacked: Vec<Buffer>,
    arena: Vec<u64>,
    n_threads: usize,
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, freed once; the tensors live in it.
        unsafe { sys::ggml_free(self.weights.as_ptr()) };
    }
}

/// Memory of one tensor whose values stand in an order of their own.
struct Buffer(NonNull<sys::ggml_backend_buffer>);

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by ggml, freed once. It does not touch the tensor in it.
        unsafe { sys::ggml_backend_buffer_free(self.0.as_ptr()) };
    }
}

/// The kind of memory in which ggml's CPU backend repacks matrices for the processor, if this build
/// has it.
fn repacking() -> Option<sys::ggml_backend_buffer_type_t> {
    // SAFETY: plain lookups in ggml's registry, null where there is nothing; the function's type is
    // the one that ggml-backend.h declares for this name, and its result ends with a null.
    unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if device.is_null() {
            return None;
        }
        let registry = sys::ggml_backend_dev_backend_reg(device);
        let address = sys::ggml_backend_reg_get_proc_address(
            registry,
            c"ggml_backend_dev_get_extra_bufts".as_ptr(),
        );
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

/// Headers, alignment and a graph need at most this many bytes besides the tensors' data.
const OVERHEAD: usize = 1 << 20;

impl Store {
    /// Room for matrices of `n_values` values together and vectors of `n_floats`.
    pub(super) fn new(
        n_values: usize,
        n_floats: usize,
        n_threads: usize,
    ) -> Result<Self, LlamaError> {
        start_backend();
        // 2 bytes a value are enough for either type; vectors are F32.
        let bytes = 2 * n_values + 4 * n_floats + OVERHEAD;
        let params = sys::ggml_init_params {
            mem_size: bytes,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: false,
        };
        // SAFETY: no buffer of ours is passed; C allocates or returns null.
        let weights = NonNull::new(unsafe { sys::ggml_init(params) }).ok_or_else(|| {
            LlamaError::Context(format!("no memory for {bytes} bytes of weights"))
        })?;
        Ok(Self { weights, repacked: vec![], arena: vec![], n_threads: n_threads.max(1) })
    }

    fn tensor(
        &self,
        kind: sys::ggml_type,
        n_in: usize,
        n_out: usize,
    ) -> Result<Tensor, LlamaError> {
        // SAFETY: a live context with memory allocated for all weights; null if that were not so.
        let t = unsafe {
            sys::ggml_new_tensor_2d(self.weights.as_ptr(), kind, n_in as i64, n_out as i64)
        };
        NonNull::new(t).ok_or_else(|| LlamaError::Context("no memory for weights".into()))
    }

    /// Takes a matrix in, quantized.
    pub(super) fn matrix(
        &mut self,
        m: &Matrix,
        precision: Precision,
    ) -> Result<Tensor, LlamaError> {
        if !m.is(m.n_out, m.n_in) {
            return Err(LlamaError::Misuse(format!(
                "a matrix of {} values is not {} x {}",
                m.values.len(),
                m.n_out,
                m.n_in
            )));
        }
        let kind = match precision {
            _ if !m.n_in.is_multiple_of(32) => sys::GGML_TYPE_F16,
            Precision::Eight => sys::GGML_TYPE_Q8_0,
            Precision::Four => sys::GGML_TYPE_Q4_1,
        };
        if let Some(tensor) = self.repacked(m, kind)? {
            return Ok(tensor);
        }
        let tensor = self.tensor(kind, m.n_in, m.n_out)?;
        // SAFETY: the tensor holds as many bytes as its own size says, which the arguments of
        // `quantize` give.
        unsafe { quantize(m, kind, (*tensor.as_ptr()).data) };
        Ok(tensor)
    }

    /// Takes a matrix in as the processor's kernels like it best, if they like it in any order of
    /// its own.
    fn repacked(&mut self, m: &Matrix, kind: sys::ggml_type) -> Result<Option<Tensor>, LlamaError> {
        let Some(memory) = repacking() else { return Ok(None) };
        // SAFETY: the context is live; a tensor without data is a header that the buffer then gets.
        unsafe {
            sys::ggml_set_no_alloc(self.weights.as_ptr(), true);
            let tensor = self.tensor(kind, m.n_in, m.n_out);
            sys::ggml_set_no_alloc(self.weights.as_ptr(), false);
            let tensor = tensor?;
            let bytes = sys::ggml_nbytes(tensor.as_ptr());
            let buffer = NonNull::new(sys::ggml_backend_buft_alloc_buffer(memory, bytes))
                .map(Buffer)
                .ok_or_else(|| {
                    LlamaError::Context(format!("no memory for {bytes} bytes of weights"))
                })?;
            let start = sys::ggml_backend_buffer_get_base(buffer.0.as_ptr());
            let status = sys::ggml_backend_tensor_alloc(buffer.0.as_ptr(), tensor.as_ptr(), start);
            // What repacks the tensor; there is nothing for a type or a shape without kernels.
            if status != sys::GGML_STATUS_SUCCESS || (*tensor.as_ptr()).extra.is_null() {
                return Ok(None);
            }
            let mut values = vec![0u8; bytes];
            quantize(m, kind, values.as_mut_ptr().cast());
            sys::ggml_backend_tensor_set(tensor.as_ptr(), values.as_ptr().cast(), 0, bytes);
            self.repacked.push(buffer);
            Ok(Some(tensor))
        }
    }

    /// The first `n_out` rows of a matrix that was taken in, a multiple of eight, without a copy of
    /// them.
    pub(super) fn first_rows(&self, matrix: Tensor, n_out: usize) -> Result<Tensor, LlamaError> {
        // SAFETY: a live tensor of this store; the new one has its columns and fewer rows, and
        // repacked rows stand in groups of eight at most, one after the other, so the first rows
        // are the first bytes in either case.
        unsafe {
            let whole = &*matrix.as_ptr();
            if n_out as i64 > whole.ne[1] || !n_out.is_multiple_of(8) {
                return Err(LlamaError::Misuse(format!("{n_out} first rows of {}", whole.ne[1])));
            }
            if whole.buffer.is_null() {
                let columns = whole.ne[0];
                let view = sys::ggml_view_2d(
                    self.weights.as_ptr(),
                    matrix.as_ptr(),
                    columns,
                    n_out as i64,
                    whole.nb[1],
                    0,
                );
                return NonNull::new(view)
                    .ok_or_else(|| LlamaError::Context("no memory for weights".into()));
            }
            sys::ggml_set_no_alloc(self.weights.as_ptr(), true);
            let rows = self.tensor(whole.type_, whole.ne[0] as usize, n_out);
            sys::ggml_set_no_alloc(self.weights.as_ptr(), false);
            let rows = rows?;
            // Gives it the kernels that the whole matrix has: all multiples of eight rows do.
            match sys::ggml_backend_tensor_alloc(whole.buffer, rows.as_ptr(), whole.data) {
                sys::GGML_STATUS_SUCCESS if !(*rows.as_ptr()).extra.is_null() => Ok(rows),
                _ => Err(LlamaError::Context("a part of a repacked matrix has no kernels".into())),
            }
        }
    }

    /// Takes a vector in.
    pub(super) fn vector(&self, values: &[f32]) -> Result<Tensor, LlamaError> {
        let tensor = self.tensor(sys::GGML_TYPE_F32, values.len(), 1)?;
        // SAFETY: the tensor holds as many floats.
        unsafe {
            std::ptr::copy_nonoverlapping(
                values.as_ptr(),
                (*tensor.as_ptr()).data.cast(),
                values.len(),
            )
        };
        Ok(tensor)
    }

    /// Lets `build` make the tensors of a graph, computes those it returns, and copies their values
    /// behind each other to `results`. `n_floats`: an upper bound of the values of all tensors of
    /// the graph.
    ///
    /// # Safety
    /// What `build` calls must suit the tensors it passes. It may allocate `n_floats` floats in the
    /// context; ggml stops the process when it needs more.
    pub(super) unsafe fn compute(
        &mut self,
        n_floats: usize,
        results: &mut Vec<f32>,
        build: impl FnOnce(*mut sys::ggml_context) -> Vec<*mut sys::ggml_tensor>,
    ) -> Result<(), LlamaError> {
        let bytes = 4 * n_floats + 2 * OVERHEAD + 4096 * self.n_threads;
        if self.arena.len() * 8 < bytes {
            self.arena.resize(bytes.div_ceil(8), 0);
        }
        let params = sys::ggml_init_params {
            mem_size: self.arena.len() * 8,
            mem_buffer: self.arena.as_mut_ptr().cast::<c_void>(),
            no_alloc: false,
        };
        // SAFETY: the buffer is ours, 8-byte aligned, of that size, and outlives the context, which
        // is freed below.
        let ctx = NonNull::new(unsafe { sys::ggml_init(params) })
            .ok_or_else(|| LlamaError::Context("no graph".into()))?;
        let outputs = build(ctx.as_ptr());
        // SAFETY: tensors that `build` made in the live context; the graph and its working memory
        // have room by contract.
        let status = unsafe {
            let graph = sys::ggml_new_graph(ctx.as_ptr());
            outputs.iter().for_each(|&t| sys::ggml_build_forward_expand(graph, t));
            sys::ggml_graph_compute_with_ctx(ctx.as_ptr(), graph, self.n_threads as i32)
        };
        results.clear();
        for &t in &outputs {
            // SAFETY: a computed, contiguous F32 tensor of that many values.
            let values = unsafe {
                let n = sys::ggml_nelements(t) as usize;
                std::slice::from_raw_parts((*t).data.cast::<f32>(), n)
            };
            results.extend_from_slice(values);
        }
        // SAFETY: made above, freed once; no tensor of it is used any more.
        unsafe { sys::ggml_free(ctx.as_ptr()) };
        if status == sys::GGML_STATUS_SUCCESS {
            return Ok(());
        }
        Err(LlamaError::Decode { code: status, reason: "a head's network was not computed".into() })
    }
}

/// Writes the quantized matrix to `to`.
///
/// # Safety
/// `to` has room for `n_out` rows of `n_in` values of the type, whose blocks divide `n_in`.
unsafe fn quantize(m: &Matrix, kind: sys::ggml_type, to: *mut c_void) {
    let (n_out, n_in) = (m.n_out as i64, m.n_in as i64);
    // SAFETY: by contract; `values` has `n_out` times `n_in` floats.
    unsafe {
        sys::ggml_quantize_chunk(kind, m.values.as_ptr(), to, 0, n_out, n_in, std::ptr::null())
    };
}

/// A graph's input: rows of `n_in` values.
///
/// # Safety
/// `ctx` is live and has room for as many floats as `values` has, a multiple of `n_in`.
pub(super) unsafe fn input(
    ctx: *mut sys::ggml_context,
    values: &[f32],
    n_in: usize,
) -> *mut sys::ggml_tensor {
    // SAFETY: by contract; the new tensor holds as many floats.
    unsafe {
        let x = sys::ggml_new_tensor_2d(
            ctx,
            sys::GGML_TYPE_F32,
            n_in as i64,
            (values.len() / n_in) as i64,
        );
        std::ptr::copy_nonoverlapping(values.as_ptr(), (*x).data.cast(), values.len());
        x
    }
}
