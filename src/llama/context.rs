//! KV cache and compute buffers for one model: forward passes, logits, hidden states, operations on
//! cached cells.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::adapter::Adapter;
use super::backend::max_sequences;
use super::batch::{Batch, Limits};
use super::cache_types::CacheTypes;
use super::error::LlamaError;
use super::ids::{SeqId, Token};
use super::loading::Loading;
use super::model::{Memory, Model};
use super::rope::Rope;
use super::tap::{HiddenTap, Tapped, on_tensor};
use super::threads::Threads;
use super::{log, sys};

/// Parameters of a context.
#[derive(Clone, Debug)]
pub struct ContextParams {
    /// Cells of the whole cache, in tokens. llama.cpp rounds up to a multiple of 256.
    pub n_cells: usize,
    /// Most rows of one forward pass.
    pub n_batch: usize,
    /// Most rows of one pass over the weights; a larger batch takes several micro-batches.
    pub n_ubatch: usize,
    /// Most rows of one pass that have outputs: each takes room for its logits.
    pub n_outputs: usize,
    /// Sequence ids; without `unified`, each owns `n_cells / n_seq_max` cells.
    pub n_seq_max: usize,
    /// Most threads of a forward pass.
    pub n_threads: usize,
    /// One cache for all sequences, in which a row may belong to several; otherwise one stream per
    /// sequence.
    pub unified: bool,
    /// Types of the cached keys and values.
    pub cache: CacheTypes,
    /// How positions are rotated.
    pub rope: Rope,
    /// Cells of layers that look at a [window](Memory::Window) of tokens, in a unified cache: those that
    /// no later token of a sequence will see are freed. `None`: as many as the others have, and none
    /// are freed.
    pub n_window_cells: Option<usize>,
    /// Tokens that a model's state can be taken back by, where its architecture can do that; see
    /// [`Context::n_rollback`]. Each takes the room of another state.
    pub n_rollback: usize,
    /// Keep the post-norm hidden state of output rows, for [`Context::hidden`]. Needs `unified`, and a
    /// model that keeps no state.
    pub tap_hidden: bool,
    /// Keep what the model's draft layers continue from, of every row, for [`Context::state`].
    pub keeps_states: bool,
    /// Compute the model's draft layers, and nothing else: each row needs the
    /// [state](Batch::set_state) of the token before it.
    pub of_draft_layers: bool,
    /// Let llama.cpp compute embeddings of every row, as a reference for the tap.
    pub embeddings: bool,
}

impl ContextParams {
    /// One sequence of up to `n_cells` tokens, whose passes have up to `n_batch` rows: to measure.
    #[must_use]
    pub fn of_one_sequence(n_cells: usize, n_batch: usize, n_threads: usize) -> Self {
        Self {
            n_cells,
            n_batch,
            n_ubatch: n_batch,
            n_outputs: n_batch,
            n_seq_max: 1,
            n_threads,
            unified: true,
            cache: CacheTypes::default(),
            rope: Rope::default(),
            n_window_cells: None,
            n_rollback: 0,
            tap_hidden: false,
            keeps_states: false,
            of_draft_layers: false,
            embeddings: false,
        }
    }
}

/// A context belongs to the thread that made it: it is neither `Send` nor `Sync`. Its methods return
/// [`LlamaError::Misuse`] for a row of the last batch without output, or a sequence id out of range.
pub struct Context {
    ptr: NonNull<sys::llama_context>,
    memory: sys::memory_t,
    /// C holds its address as `cb_eval`'s user data, so it is dropped after the context (see `Drop`).
    tap: Option<Box<HiddenTap>>,
    limits: Limits,
    embeddings: bool,
    keeps_states: bool,
    /// By row of the last batch: whether it has logits.
    outputs: Vec<bool>,
    /// The C context computes with them.
    threads: Threads,
    /// The C context points to its weights and its adapters.
    model: Arc<Model>,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: freed once, before the model, the tap and the threads that it points to: fields are
        // dropped after this.
        unsafe { sys::free(self.ptr.as_ptr()) };
    }
}

impl Context {
    /// Allocates the cache and the compute buffers.
    ///
    /// # Errors
    /// [`LlamaError::Context`] for sizes that are out of range or do not fit memory.
    pub fn new(model: Arc<Model>, params: &ContextParams) -> Result<Self, LlamaError> {
        Self::with_threads(model, params, Threads::new(params.n_threads)?)
    }

    /// The same with threads that another context computes with, too: they take turns.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_threads(
        model: Arc<Model>,
        params: &ContextParams,
        threads: Threads,
    ) -> Result<Self, LlamaError> {
        let fail = |what: &str| LlamaError::Context(what.to_owned());
        if params.n_seq_max == 0 || params.n_seq_max > max_sequences() {
            return Err(fail(&format!(
                "{} sequences; the limit is {}",
                params.n_seq_max,
                max_sequences()
            )));
        }
        if params.tap_hidden && !(params.unified && model.memory() != Memory::State) {
            return Err(fail(
                "the hidden-state tap needs a unified cache without states: others regroup the rows",
            ));
        }
        let c_count = |n: usize, name: &str| {
            u32::try_from(n)
                .ok()
                .filter(|&n| n > 0 && n <= i32::MAX as u32)
                .ok_or_else(|| fail(&format!("{name} = {n}")))
        };
        // SAFETY: no arguments; returns a struct by value.
        let mut c = unsafe { sys::context_default_params() };
        c.n_ctx = c_count(params.n_cells, "n_cells")?;
        c.n_batch = c_count(params.n_batch, "n_batch")?;
        c.n_ubatch = c_count(params.n_ubatch.min(params.n_batch), "n_ubatch")?;
        c.n_seq_max = c_count(params.n_seq_max, "n_seq_max")?;
        c.n_rs_seq = params.n_rollback as u32;
        let n_outputs = c_count(params.n_outputs.min(params.n_batch), "n_outputs")?;
        c.n_outputs_max = n_outputs.max(c.n_seq_max); // C reserves an output per sequence, and aborts below that
        c.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_AUTO;
        c.kv_unified = params.unified;
        (c.type_k, c.type_v) = (params.cache.keys.0, params.cache.values.0);
        params.rope.set(&mut c);
        c.swa_full = params.n_window_cells.is_none();
        c.n_swa_cells = params.n_window_cells.map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX));
        if params.of_draft_layers {
            if !model.has_draft_layers() {
                return Err(fail("the model has no layers that draft"));
            }
            c.ctx_type = sys::LLAMA_CONTEXT_TYPE_MTP;
        }
        c.no_perf = true;
        c.embeddings = params.embeddings;
        let mut tap = params.tap_hidden.then(|| HiddenTap::new(model.n_embd()));
        if let Some(tap) = &mut tap {
            c.cb_eval = Some(on_tensor);
            c.cb_eval_user_data = (&raw mut **tap).cast();
        }
        log::take_errors();
        // The first graphs show what sizes do not fit.
        let files = [model.path()].into_iter().chain(model.adapters().iter().map(Adapter::path));
        let _loading: Vec<Loading> = files.map(Loading::begin).collect();
        // SAFETY: the model is loaded and kept by the new value; the tap is boxed and kept too.
        let ptr = unsafe { sys::init_from_model(model.as_ptr(), c) };
        let ptr = NonNull::new(ptr)
            .ok_or_else(|| LlamaError::Context(log::take_errors().unwrap_or_default()))?;
        if !model.adapters().is_empty() {
            // SAFETY: a live context of this model, which the new value frees before the model.
            unsafe { Adapter::set(model.adapters(), ptr) };
        }
        // SAFETY: a live context, and threads that the new value keeps.
        unsafe { sys::attach_threadpool(ptr.as_ptr(), threads.as_ptr(), threads.as_ptr()) };
        // SAFETY: a live context; the memory belongs to it.
        let memory = unsafe { sys::get_memory(ptr.as_ptr()) };
        let limits = Limits {
            n_rows: params.n_batch,
            n_seq_max: params.n_seq_max,
            n_vocab: model.n_vocab(),
            shared_rows: params.unified,
            n_state: if params.of_draft_layers { model.n_embd() } else { 0 },
        };
        let mut context = Self {
            ptr,
            memory,
            tap,
            limits,
            embeddings: params.embeddings,
            keeps_states: params.keeps_states || params.of_draft_layers,
            outputs: vec![],
            threads,
            model,
        };
        if context.memory.is_null() {
            return Err(fail("the model has no KV cache"));
        }
        if context.keeps_states {
            context.keep_states(params.of_draft_layers);
        }
        context.try_out()?;
        Ok(context)
    }

    /// Computes a few tokens and forgets them. Weights are read from the disk now, not for the first
    /// request; and a file whose sizes contradict each other shows here at the latest.
    fn try_out(&mut self) -> Result<(), LlamaError> {
        if self.model.is_outline() {
            return Ok(());
        }
        let mut batch = self.batch();
        let n = self.limits.n_rows.min(self.n_cells_per_sequence()).min(3);
        for (from, to) in [(0, n - 1), (n - 1, n)] {
            batch.clear();
            for pos in from..to {
                batch.add(Token(0), pos, &[SeqId(0)], pos + 1 == to)?;
            }
            if !batch.is_empty() {
                self.forward(&batch)?;
                if !self.embeddings {
                    self.logits(to - from - 1)?; // waits for the device
                }
            }
        }
        self.outputs.clear();
        self.clear();
        Ok(())
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut sys::llama_context {
        self.ptr.as_ptr()
    }

    pub(super) fn as_ptr(&self) -> *const sys::llama_context {
        self.ptr.as_ptr()
    }

    /// Rows of the last batch.
    pub(super) fn n_rows(&self) -> usize {
        self.outputs.len()
    }

    /// Whether it keeps states for draft layers.
    #[must_use]
    pub fn has_states(&self) -> bool {
        self.keeps_states
    }

    /// The model this context computes with.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The threads of its forward passes.
    #[must_use]
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    /// `true` for one cache that all sequences share.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        self.limits.shared_rows
    }

    /// Tokens that a sequence's state can be taken back by, once after each pass; 0 where the
    /// architecture cannot do that.
    #[must_use]
    pub fn n_rollback(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::n_rs_seq(self.ptr.as_ptr()) as usize }
    }

    /// Cells that one sequence may fill, as llama.cpp allocated them.
    #[must_use]
    pub fn n_cells_per_sequence(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::n_ctx_seq(self.ptr.as_ptr()) as usize }
    }

    /// Cells of the whole cache, as llama.cpp allocated them.
    #[must_use]
    pub fn n_cells(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::n_ctx(self.ptr.as_ptr()) as usize }
    }

    /// An empty batch within this context's limits.
    #[must_use]
    pub fn batch(&self) -> Batch {
        Batch::new(self.limits)
    }

    /// Computes all rows of the batch and caches their keys and values.
    ///
    /// # Errors
    /// [`LlamaError::Batch`] for an empty batch, one made for another context, or positions that do
    /// not continue the cached ones. [`LlamaError::NoRoom`] leaves the cache unchanged.
    /// [`LlamaError::Decode`] may leave part of the batch in it.
    pub fn forward(&mut self, batch: &Batch) -> Result<(), LlamaError> {
        if batch.is_empty() {
            return Err(LlamaError::Batch("no rows".into()));
        }
        if batch.limits != self.limits {
            return Err(LlamaError::Batch("made for a context with other limits".into()));
        }
        self.outputs.clear();
        if let Some(tap) = &mut self.tap {
            tap.clear();
        }
        let n_threads = self.threads.n_used() as i32;
        // SAFETY: a live context; sets two numbers.
        unsafe { sys::set_n_threads(self.ptr.as_ptr(), n_threads, n_threads) };
        // SAFETY: every array of the batch holds `n_tokens` checked entries. The tap is not
        // borrowed during the call.
        let code = unsafe { sys::decode(self.ptr.as_ptr(), batch.as_c()) };
        match code {
            0 => {
                self.outputs.extend_from_slice(&batch.outputs);
                Ok(())
            }
            1 => Err(LlamaError::NoRoom { rows: batch.len() }),
            -1 => Err(LlamaError::Batch(log::take_errors().unwrap_or_default())),
            code => {
                Err(LlamaError::Decode { code, reason: log::take_errors().unwrap_or_default() })
            }
        }
    }

    fn check_output(&self, row: usize) -> Result<i32, LlamaError> {
        let wanted = self.outputs.get(row).copied().unwrap_or(false);
        let index = wanted.then_some(row as i32);
        index.ok_or_else(|| LlamaError::Misuse(format!("row {row} has no output")))
    }

    /// The logits of a row of the last batch: one per token of the vocabulary.
    pub fn logits(&self, row: usize) -> Result<&[f32], LlamaError> {
        let c_row = self.check_output(row)?;
        // SAFETY: the row has an output. The call waits for the device; the first one after a
        // forward pass also reorders the output buffer, before any slice of it was handed out.
        let ptr = unsafe { sys::get_logits_ith(self.ptr.as_ptr(), c_row) };
        if ptr.is_null() {
            return Err(LlamaError::Misuse(format!("llama.cpp has no logits for row {row}")));
        }
        // SAFETY: `n_vocab` values, untouched until the next forward pass, which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(ptr, self.limits.n_vocab) })
    }

    /// The post-norm hidden state of an output row of the last batch: `n_embd` values; only with
    /// `tap_hidden`.
    pub fn hidden(&self, row: usize) -> Result<&[f32], LlamaError> {
        self.check_output(row)?;
        // A unified cache computes rows in the batch's order, so a row's index among the outputs is
        // its index in the tap.
        let index = self.outputs[..row].iter().filter(|&&o| o).count();
        let tapped = self.tap.as_ref().and_then(|t| t.row(index));
        tapped.ok_or_else(|| LlamaError::Misuse(format!("row {row} has no hidden state")))
    }

    /// Logits and hidden states of the last pass in place, if it was one micro-batch; only with
    /// `tap_hidden`.
    #[must_use]
    pub fn tapped(&self) -> Option<Tapped<'_>> {
        self.tap.as_ref()?.tapped()
    }

    /// llama.cpp's own embedding of a row: `n_embd` values; only with `embeddings`.
    pub fn embedding(&self, row: usize) -> Result<&[f32], LlamaError> {
        let c_row = self.check_output(row)?;
        if !self.embeddings {
            return Err(LlamaError::Misuse("the context computes no embeddings".into()));
        }
        // SAFETY: the row has an output and the context computes embeddings.
        let ptr = unsafe { sys::get_embeddings_ith(self.ptr.as_ptr(), c_row) };
        if ptr.is_null() {
            return Err(LlamaError::Misuse(format!("llama.cpp has no embedding for row {row}")));
        }
        // SAFETY: `n_embd` values, untouched until the next forward pass, which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(ptr, self.model.n_embd()) })
    }

    pub(super) fn check_seq(&self, seq: SeqId) -> Result<i32, LlamaError> {
        if (seq.0 as usize) < self.limits.n_seq_max {
            return Ok(seq.0 as i32);
        }
        Err(LlamaError::Misuse(format!("sequence id {} of {}", seq.0, self.limits.n_seq_max)))
    }

    /// Removes a sequence's id from its cells from position `from` on. Cells without ids are free.
    pub fn remove_from(&mut self, seq: SeqId, from: usize) -> Result<(), LlamaError> {
        let c_seq = self.check_seq(seq)?;
        let from = i32::try_from(from).unwrap_or(i32::MAX);
        // SAFETY: a live memory and an id in range; -1 is "to the end".
        let done = unsafe { sys::memory_seq_rm(self.memory, c_seq, from, -1) };
        done.then_some(()).ok_or_else(|| {
            LlamaError::Misuse(format!("the cache cannot drop positions from {from} on"))
        })
    }

    /// Adds `to`'s id to the cells of `from` at these positions: both share them, and no data moves.
    /// Of a model that keeps states, all positions of `from` must be shared; the state is copied when
    /// either goes on. Needs `unified`.
    pub fn share(
        &mut self,
        from: SeqId,
        to: SeqId,
        positions: Range<usize>,
    ) -> Result<(), LlamaError> {
        let (c_from, c_to) = (self.check_seq(from)?, self.check_seq(to)?);
        if !self.is_unified() {
            return Err(LlamaError::Misuse("streams share no cells".into()));
        }
        let is_whole = positions.start == 0 && Some(positions.end) == self.cached_len(from);
        // Draft layers have keys and values, whatever the layers before them have.
        let has_state = self.model.memory() == Memory::State && self.limits.n_state == 0;
        if !is_whole && has_state {
            return Err(LlamaError::Misuse(format!(
                "a part of a state, {positions:?}, is not kept"
            )));
        }
        // Some architectures copy only what is named as a whole.
        let [start, end] = match is_whole {
            true => [-1, -1],
            false => [positions.start, positions.end].map(|n| i32::try_from(n).unwrap_or(i32::MAX)),
        };
        // SAFETY: a live memory, ids in range, and one stream, for which any range may be copied.
        unsafe { sys::memory_seq_cp(self.memory, c_from, c_to, start, end) };
        Ok(())
    }

    /// Forgets everything cached.
    pub fn clear(&mut self) {
        // SAFETY: a live memory; `false` keeps the buffers' contents, which no cell refers to.
        unsafe { sys::memory_clear(self.memory, false) };
    }

    /// Number of positions cached for a sequence, or `None` for an id out of range.
    #[must_use]
    pub fn cached_len(&self, seq: SeqId) -> Option<usize> {
        let c_seq = self.check_seq(seq).ok()?;
        // SAFETY: a live memory and an id in range; -1 for an empty sequence.
        usize::try_from(unsafe { sys::memory_seq_pos_max(self.memory, c_seq) } + 1).ok()
    }
}
