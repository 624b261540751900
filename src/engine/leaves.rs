//! Sequence ids for the leaves of trees, lent for one step. Pure.
//!
//! A row of the batch sees the cells that carry its first id. So a tree of `n` leaves needs `n` ids: the sequence's own for
//! its first leaf, and others for the rest, each put on everything the sequence has cached. A node carries the ids of the
//! leaves below it. Afterwards the sequence takes over the cells of the accepted path, and the lent ids come off all cells,
//! which frees those of the other paths. No keys or values move.

use super::slots::KvOp;
use crate::llama::SeqId;

/// The ids that are free.
#[derive(Debug, Default)]
pub struct Leaves {
    free: Vec<SeqId>,
    n_all: usize,
}

impl Leaves {
    /// With these ids to lend.
    #[must_use]
    pub fn new(ids: std::ops::Range<usize>) -> Self {
        Self { n_all: ids.len(), free: ids.rev().map(|i| SeqId(i as u32)).collect() }
    }

    /// Ids there are.
    #[must_use]
    pub fn n_all(&self) -> usize {
        self.n_all
    }

    /// Ids that could be lent now.
    #[must_use]
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Appends the ids of `n` leaves behind the `n_cached` tokens of `seq` to `ids`, and what to do before the step to `ops`.
    ///
    /// # Panics
    /// For no leaf, or more than there are ids for.
    pub fn lend(&mut self, seq: SeqId, n: usize, n_cached: usize, ids: &mut Vec<SeqId>, ops: &mut Vec<KvOp>) {
        assert!(n >= 1 && n - 1 <= self.free.len(), "{n} leaves with {} ids", self.free.len());
        ids.push(seq);
        for _ in 1..n {
            let id = self.free.pop().expect("as many as were asked for");
            ids.push(id);
            if n_cached > 0 {
                ops.push(KvOp::Share { from: seq, to: id, n: n_cached });
            }
        }
    }

    /// Takes the ids of a tree back: `ids[0]` keeps the first `n_kept` tokens of the path that ends in leaf `winner`, of
    /// which all paths have the first `n_common`.
    pub fn settle(&mut self, ids: &[SeqId], winner: usize, n_common: usize, n_kept: usize, ops: &mut Vec<KvOp>) {
        let seq = ids[0];
        if winner == 0 {
            ops.push(KvOp::Remove { seq, from: n_kept });
        } else {
            ops.push(KvOp::Remove { seq, from: n_common });
            ops.push(KvOp::Share { from: ids[winner], to: seq, n: n_kept });
        }
        self.take_back(ids, ops);
    }

    /// Takes the ids of a tree back after a step that failed.
    pub fn take_back(&mut self, ids: &[SeqId], ops: &mut Vec<KvOp>) {
        for &id in ids.iter().skip(1) {
            ops.push(KvOp::Remove { seq: id, from: 0 });
            self.free.push(id);
        }
    }
}
