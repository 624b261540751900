//! The hidden state beside the logits, without asking llama.cpp for embeddings.
//!
//! ggml's scheduler asks a callback, for each tensor of the graph, whether it wants to see it. Answering `true` for
//! `result_output` only is free: it is the graph's last node, so nothing is split. When it has been computed, its first
//! source is the output matrix and its second the post-norm hidden state, one row per output row: what Medusa heads read.
//! `embeddings = true` would turn every prompt token into an output row instead.

use std::ffi::{CStr, c_void};

use super::sys;

/// Hidden rows of the last forward pass, appended micro-batch by micro-batch.
pub(super) struct HiddenTap {
    rows: Vec<f32>,
    n_embd: usize,
}

impl HiddenTap {
    /// Boxed: C keeps the address.
    pub(super) fn new(n_embd: usize) -> Box<Self> {
        Box::new(Self { rows: Vec::new(), n_embd })
    }

    pub(super) fn clear(&mut self) {
        self.rows.clear();
    }

    /// The `i`-th output row in the order that llama.cpp computed them.
    pub(super) fn row(&self, i: usize) -> Option<&[f32]> {
        self.rows.chunks_exact(self.n_embd).nth(i)
    }
}

/// What a context's `cb_eval` is set to, with the tap as user data.
///
/// # Safety
/// `user_data` points to the [`HiddenTap`] of the context that computes; nobody else uses it during the forward pass.
pub(super) unsafe extern "C" fn on_tensor(tensor: *mut sys::ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    // SAFETY: ggml passes a tensor of the graph; its name is an array with a terminator.
    let (name, hidden) = unsafe { (CStr::from_ptr((*tensor).name.as_ptr()), (*tensor).src[1]) };
    if name != c"result_output" {
        return !ask; // not wanted; and never stop the computation
    }
    if ask || hidden.is_null() {
        return true;
    }
    // SAFETY: by contract.
    let tap = unsafe { &mut *user_data.cast::<HiddenTap>() };
    // SAFETY: a live tensor of the graph.
    let (kind, ne) = unsafe { ((*hidden).type_, (*hidden).ne) };
    if kind != sys::GGML_TYPE_F32 || usize::try_from(ne[0]) != Ok(tap.n_embd) {
        return true; // a graph of another shape; `Context::hidden` then finds no row
    }
    let n = tap.n_embd * usize::try_from(ne[1]).unwrap_or(0);
    let start = tap.rows.len();
    tap.rows.resize(start + n, 0.0);
    // SAFETY: the tensor is contiguous F32 of `n` values and computed; the target has room for `n` values. The call
    // copies from the device where the tensor lives on one.
    unsafe { sys::ggml_backend_tensor_get(hidden, tap.rows[start..].as_mut_ptr().cast(), 0, n * size_of::<f32>()) };
    true
}
