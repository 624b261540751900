//! The fence around llama.cpp: everything C stands here and nothing of it leaves.
//!
//! A [`Model`] is shared by reference count and read from any thread. A [`Context`] (KV cache and
//! compute buffers) belongs to the thread that built it and keeps its model alive. A [`Batch`] is
//! what one forward pass computes; what goes into it is checked before it crosses. A
//! [`SamplerChain`] filters one row of logits; the draw is not its job.
//!
//! Nothing in this folder knows of requests, slots or HTTP.
#![allow(unsafe_code)]

mod batch;
mod context;
mod error;
mod gguf;
mod log;
mod model;
mod net;
mod path_net;
mod quantize;
mod sampler;
mod store;
mod sys;
mod tap;
mod writer;

pub use batch::Batch;
pub use context::{Context, ContextParams};
pub use error::LlamaError;
pub use gguf::MatrixRows;
pub use model::{Model, ModelParams};
pub use net::{Block, Net, Weights};
pub use path_net::{PathNet, PathStep, PathWeights};
pub use quantize::{Quantization, quantize};
pub use sampler::{Candidates, SamplerChain};
pub use store::Matrix;
pub use tap::Tapped;
pub use writer::{ALIGNMENT, Meta, TensorInfo, TensorType, tensor_types, write_header};

use std::ffi::CStr;
use std::sync::Once;

/// Index into the model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub i32);

/// Names one sequence of the KV cache: below the context's `n_seq_max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u32);

/// Starts llama.cpp once per process and sends its log to `tracing`. Called by [`Model::load`].
fn start_backend() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        log::install();
        // SAFETY: no arguments; llama.cpp asks for one call before any other, which `Once` gives.
        unsafe { sys::backend_init() };
    });
}

/// `true` where llama.cpp was built with a backend that can hold layers on a GPU and finds one.
#[must_use]
pub fn supports_gpu_offload() -> bool {
    start_backend();
    // SAFETY: no arguments; reads a registry that `start_backend` has filled.
    unsafe { sys::supports_gpu_offload() }
}

/// The most sequence ids that one context of this llama.cpp takes.
#[must_use]
pub fn max_sequences() -> usize {
    // SAFETY: no arguments; returns a constant.
    unsafe { sys::max_parallel_sequences() }
}

/// What the CPU kernels were compiled for, as llama.cpp prints it ("CPU : SSE3 = 1 | AVX2 = 1
/// ...").
#[must_use]
pub fn system_info() -> String {
    start_backend();
    // SAFETY: returns a pointer to a static buffer, which the next call rewrites; it is copied at
    // once.
    unsafe { text(sys::print_system_info()) }
}

/// The release of the llama.cpp that was compiled in.
#[must_use]
pub fn version() -> String {
    // SAFETY: returns a pointer to a constant.
    unsafe { text(sys::version()) }
}

/// Copies a C string; empty for null.
///
/// # Safety
/// `c` is null or points to a zero-terminated string that nobody writes during the call.
unsafe fn text(c: *const std::ffi::c_char) -> String {
    if c.is_null() {
        return String::new();
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { CStr::from_ptr(c) }.to_string_lossy().into_owned()
}
