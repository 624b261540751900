//! The hidden states of the output rows, without enabling llama.cpp's embeddings.
//!
//! ggml's scheduler asks a callback, for each tensor of the graph, whether to report it when it is
//! computed. Reporting `result_output` only is free: it is the graph's last node, so the graph is
//! not split. Its first source is the output matrix, its second the post-norm hidden state, one row
//! per output row: the input of Medusa heads. With `embeddings = true` every prompt token would be
//! an output row.

use std::ffi::{CStr, c_void};

use super::sys;
use super::workers::is_remote;
use crate::gpu::{Address, Slice};

/// Hidden rows of the last forward pass, appended micro-batch by micro-batch.
pub(super) struct HiddenTap {
    rows: Vec<f32>,
    n_embd: usize,
    n_micro_batches: usize,
    /// The results of the last micro-batch.
    results: Option<Results>,
}

/// Addresses of a forward pass's results.
#[derive(Clone, Copy)]
struct Results {
    logits: Address,
    hidden: Address,
    n_rows: usize,
    n_vocab: usize,
    n_embd: usize,
    on_host: bool,
}

/// The results of a forward pass in place, until the context computes another.
#[derive(Clone, Copy)]
pub struct Tapped<'a> {
    /// `[n_rows, n_vocab]`.
    pub logits: Slice<'a, f32>,
    /// After the final norm: `[n_rows, n_embd]`.
    pub hidden: Slice<'a, f32>,
    /// Output rows.
    pub n_rows: usize,
    /// `true` in host memory, `false` on a device.
    pub on_host: bool,
}

impl HiddenTap {
    /// Boxed: C keeps the address.
    pub(super) fn new(n_embd: usize) -> Box<Self> {
        Box::new(Self { rows: Vec::new(), n_embd, n_micro_batches: 0, results: None })
    }

    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.n_micro_batches = 0;
        self.results = None;
    }

    /// The results, if the pass was one micro-batch: of several, only the last one's remain.
    pub(super) fn tapped(&self) -> Option<Tapped<'_>> {
        let r = self.results.filter(|_| self.n_micro_batches == 1)?;
        // SAFETY: contiguous values of a computed tensor, not written to while the context is
        // borrowed.
        let slice = |address, width| unsafe { Slice::from_raw(address, r.n_rows * width) };
        let (logits, hidden) = (slice(r.logits, r.n_vocab), slice(r.hidden, r.n_embd));
        Some(Tapped { logits, hidden, n_rows: r.n_rows, on_host: r.on_host })
    }

    /// The `i`-th output row in the order that llama.cpp computed them.
    pub(super) fn row(&self, i: usize) -> Option<&[f32]> {
        self.rows.chunks_exact(self.n_embd).nth(i)
    }
}

/// The context's `cb_eval`, with the tap as user data.
///
/// # Safety
/// `user_data` points to the [`HiddenTap`] of the computing context, which is not borrowed during
/// the forward pass.
pub(super) unsafe extern "C" fn on_tensor(
    tensor: *mut sys::ggml_tensor,
    ask: bool,
    user_data: *mut c_void,
) -> bool {
    // SAFETY: ggml passes a tensor of the graph; its name is an array with a terminator.
    let (name, hidden) = unsafe { (CStr::from_ptr((*tensor).name.as_ptr()), (*tensor).src[1]) };
    if name != c"result_output" {
        return !ask; // `false` when asked: not wanted; `true` when reported: continue
    }
    if ask || hidden.is_null() {
        return true;
    }
    // SAFETY: by contract.
    let tap = unsafe { &mut *user_data.cast::<HiddenTap>() };
    // SAFETY: a live tensor of the graph.
    let (kind, ne) = unsafe { ((*hidden).type_, (*hidden).ne) };
    if kind != sys::GGML_TYPE_F32 || usize::try_from(ne[0]) != Ok(tap.n_embd) {
        return true; // another kind of graph; `Context::hidden` then returns an error
    }
    tap.n_micro_batches += 1;
    // SAFETY: both tensors are live; computed ones have memory.
    tap.results = unsafe { results(tensor, hidden) };
    let n = tap.n_embd * usize::try_from(ne[1]).unwrap_or(0);
    let start = tap.rows.len();
    tap.rows.resize(start + n, 0.0);
    // SAFETY: the tensor is contiguous F32 of `n` values and computed; the target has room for `n`
    // values. The call copies from the device where the tensor lives on one.
    unsafe {
        sys::ggml_backend_tensor_get(
            hidden,
            tap.rows[start..].as_mut_ptr().cast(),
            0,
            n * size_of::<f32>(),
        )
    };
    true
}

/// Addresses of logits and hidden states, if both are contiguous floats on the same side of this
/// machine.
///
/// # Safety
/// Both are live and computed.
unsafe fn results(
    logits: *const sys::ggml_tensor,
    hidden: *const sys::ggml_tensor,
) -> Option<Results> {
    // SAFETY: by contract.
    let (logits, hidden) = unsafe { (&*logits, &*hidden) };
    let side = |t: &sys::ggml_tensor| {
        let plain = t.type_ == sys::GGML_TYPE_F32 && !t.data.is_null() && !t.buffer.is_null();
        // SAFETY: live tensors.
        let plain = plain && unsafe { sys::ggml_is_contiguous(t) && !is_remote(t.buffer) };
        // SAFETY: as above, with a buffer.
        plain.then(|| unsafe { sys::ggml_backend_buffer_is_host(t.buffer) })
    };
    let [n_vocab, n_embd, n_rows] =
        [logits.ne[0], hidden.ne[0], hidden.ne[1]].map(|n| usize::try_from(n).unwrap_or(0));
    let on_host = side(logits)?;
    (side(hidden)? == on_host && logits.ne[1] == hidden.ne[1]).then_some(Results {
        logits: logits.data as Address,
        hidden: hidden.data as Address,
        n_rows,
        n_vocab,
        n_embd,
        on_host,
    })
}
