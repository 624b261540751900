//! The rows of one forward pass, checked as they are added.

use super::error::LlamaError;
use super::ids::{SeqId, Token};
use super::sys;

/// Rows for one [`Context::forward`](super::Context::forward): a token, its position, the sequences
/// it belongs to, and whether it outputs logits. [`Context::batch`](super::Context::batch) makes one
/// for that context's limits.
pub struct Batch {
    /// C's view; its arrays are owned by this batch.
    pub(super) c: sys::batch,
    pub(super) limits: Limits,
    /// By row: whether it outputs logits.
    pub(super) outputs: Vec<bool>,
    /// What draft layers continue from: `n_state` values a row.
    states: Vec<f32>,
}

/// What a context accepts; kept with the batch so that every row is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub n_rows: usize,
    pub n_seq_max: usize,
    pub n_vocab: usize,
    /// A row may have several ids: the cache is unified.
    pub shared_rows: bool,
    /// Values of the state that each row needs; 0: none does.
    pub n_state: usize,
}

impl Batch {
    pub(super) fn new(limits: Limits) -> Self {
        let n_rows = i32::try_from(limits.n_rows).expect("Context::new bounds n_batch");
        let n_seq = i32::try_from(limits.n_seq_max).expect("Context::new bounds n_seq_max");
        // SAFETY: allocates arrays for `n_rows` tokens with `n_seq` ids each; C aborts the process
        // if it has no memory.
        let c = unsafe { sys::batch_init(n_rows, 0, n_seq) };
        Self { c, limits, outputs: Vec::with_capacity(limits.n_rows), states: vec![] }
    }

    /// Rows it has room for.
    #[must_use]
    pub fn n_most(&self) -> usize {
        self.limits.n_rows
    }

    /// Adds a row and returns its index. The first id decides which cells the row sees.
    ///
    /// # Errors
    /// [`LlamaError::Batch`] when the batch is full, the token is not in the vocabulary, the
    /// position does not fit 31 bits, or there are no ids, too many, or one out of range. The batch is
    /// unchanged.
    pub fn add(
        &mut self,
        token: Token,
        pos: usize,
        seqs: &[SeqId],
        output: bool,
    ) -> Result<usize, LlamaError> {
        let row = self.outputs.len();
        let refuse = |what: String| Err(LlamaError::Batch(what));
        if row == self.limits.n_rows {
            return refuse(format!("the batch is full: {row} rows"));
        }
        if !usize::try_from(token.0).is_ok_and(|t| t < self.limits.n_vocab) {
            return refuse(format!(
                "token {} is not in the vocabulary of {}",
                token.0, self.limits.n_vocab
            ));
        }
        let Ok(c_pos) = i32::try_from(pos) else { return refuse(format!("position {pos}")) };
        if seqs.is_empty()
            || seqs.len() > self.limits.n_seq_max
            || (seqs.len() > 1 && !self.limits.shared_rows)
        {
            return refuse(format!("{} sequence ids", seqs.len()));
        }
        if let Some(bad) = seqs.iter().find(|s| s.0 as usize >= self.limits.n_seq_max) {
            return refuse(format!("sequence id {} of {}", bad.0, self.limits.n_seq_max));
        }
        // SAFETY: `row` is below the rows allocated, and `seqs` is no longer than the ids allocated
        // for each.
        unsafe {
            *self.c.token.add(row) = token.0;
            *self.c.pos.add(row) = c_pos;
            *self.c.n_seq_id.add(row) = seqs.len() as i32; // at most n_seq_max, which fits
            *self.c.logits.add(row) = i8::from(output);
            let ids = *self.c.seq_id.add(row);
            for (i, seq) in seqs.iter().enumerate() {
                *ids.add(i) = seq.0 as i32; // below n_seq_max, which fits
            }
        }
        self.outputs.push(output);
        self.states.resize(self.states.len() + self.limits.n_state, 0.0);
        self.c.n_tokens = row as i32 + 1;
        Ok(row)
    }

    /// Removes all rows.
    pub fn clear(&mut self) {
        self.c.n_tokens = 0;
        self.outputs.clear();
        self.states.clear();
    }

    /// Sets what draft layers continue from at a row; zeros before.
    ///
    /// # Panics
    /// For a row that is not there, or another number of values than a context of [draft
    /// layers](super::ContextParams::of_draft_layers) needs.
    pub fn set_state(&mut self, row: usize, state: &[f32]) {
        let n = self.limits.n_state;
        self.states[row * n..][..n].copy_from_slice(state);
    }

    /// C's view, valid as long as this batch is not changed.
    pub(super) fn as_c(&self) -> sys::batch {
        let mut c = self.c;
        if self.limits.n_state > 0 {
            c.embd = self.states.as_ptr().cast_mut(); // C reads it
        }
        c
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outputs.len()
    }

    /// `true` without rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: the arrays came from `batch_init` and are freed once; C counts them by the null at
        // the end.
        unsafe { sys::batch_free(self.c) };
    }
}
