//! Sequence ids for the leaves of trees. Pure.
//!
//! A row of the batch sees the cells that carry its first id. So a tree of `n` leaves needs `n`
//! ids: the sequence's own for its first leaf, and others for the rest, on all cached cells of the
//! sequence. A node carries the ids of the leaves below it. After the step the sequence takes over
//! the cells of the accepted path, and the other ids come off the cells after the root, which frees
//! the rejected paths. No keys or values move.
//!
//! Each sequence that drafts has its own block of ids, which stay on its cells from step to step:
//! adding an id to a cell or removing it is expensive in llama.cpp, so only new cells are touched.

use super::slots::{KvOp, Layout};
use crate::llama::SeqId;

/// What of a sequence's candidates one pass can verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftShape {
    /// Many paths after each other's tokens.
    Trees,
    /// One path of a few tokens: the model keeps a state, which can be taken back by them.
    Chains,
    /// Nothing: the model's state cannot be taken back, or the cache is divided into streams.
    Plain,
}

impl DraftShape {
    /// What is possible in a cache of this layout, where a state can be taken back by `n_rollback`
    /// tokens.
    #[must_use]
    pub fn of(layout: Layout, n_rollback: usize) -> Self {
        match layout {
            Layout::Streams { .. } => Self::Plain,
            _ if !layout.has_states() => Self::Trees,
            _ if n_rollback > 0 => Self::Chains,
            _ => Self::Plain,
        }
    }

    /// `trees`, `chains` or `plain`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Trees => "trees",
            Self::Chains => "chains",
            Self::Plain => "plain",
        }
    }
}

/// Tokens by which an id [follows](Leaves::follow) its sequence.
pub const FAR_BEHIND: usize = 64;

/// The ids, in blocks.
#[derive(Debug)]
pub struct Leaves {
    /// Most leaves of a tree: a block, and the sequence's own id.
    n_leaves: usize,
    free: Vec<Block>,
    /// By sequence id.
    held: Vec<Option<Block>>,
}

/// Ids, each with how many of the sequence's first tokens it is on.
type Block = Vec<(SeqId, usize)>;

impl Leaves {
    /// Divides the ids from `n_seqs` to `n_ids` among `n_slots` running sequences.
    pub fn new(n_seqs: usize, n_ids: usize, n_slots: usize) -> Self {
        let n_each = n_ids.saturating_sub(n_seqs) / n_slots.max(1);
        let id = |i: usize| SeqId((n_seqs + i) as u32);
        let block = |slot| (0..n_each).map(|i| (id(slot * n_each + i), 0)).collect();
        Self {
            n_leaves: n_each + 1,
            free: (0..n_slots).rev().map(block).collect(),
            held: vec![None; n_seqs],
        }
    }

    /// Most leaves that a tree may have.
    pub fn n_leaves(&self) -> usize {
        self.n_leaves
    }

    /// Appends the ids of `n` leaves after the `n_cached` tokens of `seq` to `ids`, and what to do
    /// before the step to `ops`.
    ///
    /// # Panics
    /// For no leaf, more than [`n_leaves`](Self::n_leaves), or more sequences at a time than there
    /// are blocks.
    pub fn lend(
        &mut self,
        seq: SeqId,
        n: usize,
        n_cached: usize,
        ids: &mut Vec<SeqId>,
        ops: &mut Vec<KvOp>,
    ) {
        assert!((1..=self.n_leaves).contains(&n), "{n} leaves of {}", self.n_leaves);
        ids.push(seq);
        if n == 1 {
            return;
        }
        let held = &mut self.held[seq.0 as usize];
        let block =
            held.get_or_insert_with(|| self.free.pop().expect("a block for each running sequence"));
        for (id, n_on) in &mut block[..n - 1] {
            if *n_on < n_cached {
                ops.push(KvOp::Share { from: seq, to: *id, start: *n_on, end: n_cached });
                *n_on = n_cached;
            }
            ids.push(*id);
        }
    }

    /// After a step of `seq`, which has `n_cached` tokens now: ids of its block that are far behind
    /// get its newer cells. Where layers keep a window of the last tokens, an id would else keep the
    /// cells of the window that it saw last.
    pub fn follow(&mut self, seq: SeqId, n_cached: usize, ops: &mut Vec<KvOp>) {
        let Some(block) = self.held(seq) else { return };
        for (id, n_on) in block.iter_mut().filter(|(_, n_on)| *n_on > 0) {
            if *n_on + FAR_BEHIND <= n_cached {
                ops.push(KvOp::Share { from: seq, to: *id, start: *n_on, end: n_cached });
                *n_on = n_cached;
            }
        }
    }

    /// After a step with the tree of these `ids`: `ids[0]` keeps the first `n_kept` tokens of the
    /// path that ends in leaf `winner`; all paths have the first `n_common`, which end with the
    /// root.
    pub fn settle(
        &mut self,
        ids: &[SeqId],
        winner: usize,
        n_common: usize,
        n_kept: usize,
        ops: &mut Vec<KvOp>,
    ) {
        let seq = ids[0];
        if winner == 0 {
            ops.push(KvOp::Remove { seq, from: n_kept });
        } else {
            ops.push(KvOp::Remove { seq, from: n_common });
            if n_kept > n_common {
                ops.push(KvOp::Share { from: ids[winner], to: seq, start: n_common, end: n_kept });
            }
        }
        ops.extend(ids[1..].iter().map(|&id| KvOp::Remove { seq: id, from: n_common }));
        if let Some(block) = self.held(seq) {
            block[..ids.len() - 1].iter_mut().for_each(|(_, n_on)| *n_on = n_common);
        }
    }

    /// The block of a sequence that has one; an engine that drafts nothing has none at all.
    fn held(&mut self, seq: SeqId) -> Option<&mut Block> {
        self.held.get_mut(seq.0 as usize).and_then(Option::as_mut)
    }

    /// The sequence has ended, or what its cells hold is not known: its block is free for the next.
    pub fn end(&mut self, seq: SeqId, ops: &mut Vec<KvOp>) {
        if let Some(mut block) = self.held.get_mut(seq.0 as usize).and_then(Option::take) {
            for (id, n_on) in block.iter_mut().filter(|(_, n_on)| *n_on > 0) {
                ops.push(KvOp::Remove { seq: *id, from: 0 });
                *n_on = 0;
            }
            self.free.push(block);
        }
    }

    /// `true` if no sequence holds a block.
    pub fn is_whole(&self) -> bool {
        self.held.iter().all(Option::is_none)
    }
}
