//! The threads that compute graphs on the CPU.

use std::cell::Cell;
use std::ptr::NonNull;
use std::rc::Rc;

use super::backend::start_backend;
use super::error::LlamaError;
use super::sys;

/// How long a thread without a graph spins before it sleeps, in ggml's units of 1024 pauses of the
/// processor: some 0.1 ms. What the host does between two graphs of a step takes less.
const POLL: u32 = 4;

/// Threads that compute one graph at a time. Clones are the same threads: a context and the networks
/// beside it take turns.
#[derive(Clone)]
pub struct Threads(Rc<Pool>);

struct Pool {
    ptr: NonNull<sys::ggml_threadpool>,
    n_most: usize,
    n_used: Cell<usize>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: freed once; whoever computes with it holds a clone.
        unsafe { sys::ggml_threadpool_free(self.ptr.as_ptr()) };
    }
}

impl Threads {
    /// `n` threads, of which the one that asks for a graph is one.
    ///
    /// # Errors
    /// [`LlamaError::Context`] for 0, and for more than ggml has room for.
    pub fn new(n: usize) -> Result<Self, LlamaError> {
        start_backend();
        let fail = || LlamaError::Context(format!("n_threads = {n}"));
        let c_n = i32::try_from(n).map_err(|_| fail())?;
        if c_n < 1 || c_n > sys::GGML_MAX_N_THREADS as i32 {
            return Err(fail());
        }
        // SAFETY: a number in range; returns a struct by value.
        let mut params = unsafe { sys::ggml_threadpool_params_default(c_n) };
        params.poll = POLL;
        // SAFETY: valid parameters, which are copied.
        let ptr = unsafe { sys::ggml_threadpool_new(&raw mut params) };
        let ptr = NonNull::new(ptr).ok_or_else(fail)?;
        Ok(Self(Rc::new(Pool { ptr, n_most: n, n_used: Cell::new(n) })))
    }

    /// How many there are.
    #[must_use]
    pub fn n_most(&self) -> usize {
        self.0.n_most
    }

    /// How many compute the next graph; the others sleep.
    #[must_use]
    pub fn n_used(&self) -> usize {
        self.0.n_used.get()
    }

    /// Lets `n` of them compute the next graphs, at least one and at most all.
    pub fn set_used(&self, n: usize) {
        self.0.n_used.set(n.clamp(1, self.0.n_most));
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ggml_threadpool {
        self.0.ptr.as_ptr()
    }
}
