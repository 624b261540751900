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
///
/// In a unified cache a step is one pass. In streams it is one for all sequences with a single row, and one for each with
/// more: llama.cpp would divide the rows no better, since sequences of one pass must have equally many, and a pass looks at
/// as many cells of every stream as the longest one has, so a long prompt must not be in the pass of short streams.
pub struct LlamaForward {
    context: Context,
    batch: Batch,
    model: Arc<Model>,
    streams: bool,
    /// For each row of the step, where its logits are.
    places: Vec<Place>,
    /// Logits of earlier passes of the step, row after row.
    kept: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the context, for this row of the last pass.
    Context(usize),
    /// From this index on in `kept`.
    Kept(usize),
    /// Nowhere: the row wanted none.
    Nowhere,
}

impl LlamaForward {
    /// Takes a context over.
    #[must_use]
    pub fn new(context: Context) -> Self {
        let (batch, model) = (context.batch(), Arc::clone(context.model()));
        Self { batch, model, streams: !context.is_unified(), context, places: Vec::new(), kept: Vec::new() }
    }

    /// Adds `row`, which is the step's `index`-th, to the next pass.
    fn add(&mut self, index: usize, row: &Row) -> Result<(), LlamaError> {
        let at = self.batch.add(row.token, row.pos, &[row.seq], row.output)?;
        self.places[index] = if row.output { Place::Context(at) } else { Place::Nowhere };
        Ok(())
    }

    /// Copies out what the next pass would overwrite.
    fn keep_logits(&mut self) -> Result<(), LlamaError> {
        for place in &mut self.places {
            if let Place::Context(at) = *place {
                *place = Place::Kept(self.kept.len());
                self.kept.extend_from_slice(self.context.logits(at)?);
            }
        }
        Ok(())
    }

    /// One pass for each sequence with several rows, and then one for the others.
    fn forward_streams(&mut self, rows: &[Row]) -> Result<(), LlamaError> {
        let runs = || {
            rows.chunk_by(|a, b| a.seq == b.seq)
                .scan(0, |first, run| Some((std::mem::replace(first, *first + run.len()), run)))
        };
        for (first, run) in runs().filter(|(_, run)| run.len() > 1) {
            self.batch.clear();
            run.iter().enumerate().try_for_each(|(i, row)| self.add(first + i, row))?;
            self.context.forward(&self.batch)?;
            self.keep_logits()?;
        }
        self.batch.clear();
        runs().filter(|(_, run)| run.len() == 1).try_for_each(|(first, run)| self.add(first, &run[0]))?;
        if self.batch.is_empty() { Ok(()) } else { self.context.forward(&self.batch) }
    }
}

impl Forward for LlamaForward {
    fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    fn forward(&mut self, rows: &[Row]) -> Result<(), LlamaError> {
        self.places.clear();
        self.places.resize(rows.len(), Place::Nowhere);
        self.kept.clear();
        if self.streams {
            return self.forward_streams(rows);
        }
        self.batch.clear();
        rows.iter().enumerate().try_for_each(|(i, row)| self.add(i, row))?;
        self.context.forward(&self.batch)
    }

    fn logits(&self, row: usize) -> Result<&[f32], LlamaError> {
        match self.places.get(row) {
            Some(&Place::Context(at)) => self.context.logits(at),
            Some(&Place::Kept(from)) => Ok(&self.kept[from..from + self.model.n_vocab()]),
            Some(Place::Nowhere) | None => Err(LlamaError::Misuse(format!("row {row} wanted no logits"))),
        }
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
