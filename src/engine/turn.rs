//! A sequence's part in a step: its rows, its candidates, and how far it came. Pure.

use std::borrow::{Borrow, BorrowMut};
use std::ops::Range;

use super::scheduler::Share;
use crate::llama::{SeqId, Token};
use crate::speculate::Tree;

/// The rows that a sequence's next tokens are chosen from: its last token's, and after it those of
/// its tree, in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowRange(pub usize);

impl RowRange {
    /// The row of a node, or of the root.
    pub fn of(self, node: Option<usize>) -> usize {
        self.0 + node.map_or(0, |node| 1 + node)
    }
}

/// One sequence's turn in a step. Keeps its memory from step to step.
#[derive(Debug, Default)]
pub struct Turn {
    pub share: Share,
    pub tree: Tree,
    /// Ids of the tree's leaves, the sequence's own first; none without candidates.
    pub leaves: Vec<SeqId>,
    /// Its rows in the batch.
    pub rows: RowRange,
    /// Rows of its share before the prompt's last one that [have results](super::Sequence::reads).
    pub n_read: usize,
    /// Its rows among those with outputs.
    pub outputs: RowRange,
    pub walk: Walk,
}

/// How far a sequence came.
#[derive(Debug, Default)]
pub struct Walk {
    /// The candidates that were accepted, as nodes of its tree.
    pub accepted: Vec<usize>,
    /// The token after them; `None` if no client waited for one.
    pub last: Option<Token>,
    /// Its answer has ended, or its client has left.
    pub done: bool,
}

impl Turn {
    /// The rows of its share in the batch.
    pub fn share_rows(&self) -> Range<usize> {
        let last = self.rows.of(None);
        last + 1 - self.share.n_rows..last + 1
    }

    /// Begins another one.
    pub fn begin(&mut self, share: Share) {
        self.share = share;
        self.tree.clear();
        self.leaves.clear();
        self.walk.accepted.clear();
        (self.walk.last, self.walk.done) = (None, false);
    }
}

impl Borrow<Tree> for Turn {
    fn borrow(&self) -> &Tree {
        &self.tree
    }
}

impl BorrowMut<Tree> for Turn {
    fn borrow_mut(&mut self) -> &mut Tree {
        &mut self.tree
    }
}
