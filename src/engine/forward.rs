//! What the engine needs of a model and its cache. llama.cpp stands behind it in the server, a stub in tests and benches.

use std::sync::Arc;

use super::slots::KvOp;
use crate::llama::{Batch, Context, LlamaError, Model, SeqId, Token};

/// One token to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Which.
    pub token: Token,
    /// Its position in the sequence.
    pub pos: usize,
    /// Whose.
    pub seq: SeqId,
    /// Whether its logits are wanted.
    pub output: bool,
}

/// A model with its KV cache.
pub trait Forward {
    /// Values in a row of logits.
    fn n_vocab(&self) -> usize;
    /// Computes all rows and caches them.
    ///
    /// # Errors
    /// When the pass failed; what the cache then holds of these sequences is unknown.
    fn forward(&mut self, rows: &[Row]) -> Result<(), LlamaError>;
    /// Logits of a row of the last pass that wanted them.
    ///
    /// # Errors
    /// For any other row.
    fn logits(&self, row: usize) -> Result<&[f32], LlamaError>;
    /// Does to the cache what the ledger says.
    ///
    /// # Errors
    /// When the cache cannot do that.
    fn apply(&mut self, op: KvOp) -> Result<(), LlamaError>;
    /// Appends a token's bytes.
    fn piece(&self, token: Token, out: &mut Vec<u8>);
    /// `true` for tokens that end a text.
    fn is_end(&self, token: Token) -> bool;
}

/// llama.cpp as the engine's model.
pub struct LlamaForward {
    context: Context,
    batch: Batch,
    model: Arc<Model>,
}

impl LlamaForward {
    /// Takes a context over.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { batch: context.batch(), model: Arc::clone(context.model()), context }
    }
}

impl Forward for LlamaForward {
    fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    fn forward(&mut self, rows: &[Row]) -> Result<(), LlamaError> {
        self.batch.clear();
        for row in rows {
            self.batch.add(row.token, row.pos, &[row.seq], row.output)?;
        }
        self.context.forward(&self.batch)
    }

    fn logits(&self, row: usize) -> Result<&[f32], LlamaError> {
        self.context.logits(row)
    }

    fn apply(&mut self, op: KvOp) -> Result<(), LlamaError> {
        match op {
            KvOp::Remove { seq, from } => self.context.remove_from(seq, from),
            KvOp::Share { from, to, n } => self.context.share_prefix(from, to, n),
        }
    }

    fn piece(&self, token: Token, out: &mut Vec<u8>) {
        self.model.piece(token, false, out);
    }

    fn is_end(&self, token: Token) -> bool {
        self.model.is_end(token)
    }
}
