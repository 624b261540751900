//! Drafting: what may follow, and how much of it to verify. Pure but for the heads' files.
//!
//! Each step, every decoding sequence has a root (its last token, chosen but not computed) and the hidden state of the token
//! before it. A [`Draft`] makes a [`Tree`] of candidates of that; [`policy`] cuts the trees of all sequences to the nodes
//! that pay, by the measured [`cost`] of rows and the [`calibration`] of what the heads say. The engine computes root and
//! nodes in one pass and walks down each tree by the model's own choices: what it accepts is what it would have generated
//! anyway, so speculation changes the pace of a text and never the text.

pub mod calibration;
pub mod cost;
pub mod heads;
pub mod medusa;
pub mod policy;
pub mod tree;

use calibration::Calibration;
use cost::Cost;
use policy::Step;
pub use tree::{Node, Tree};

use crate::llama::Token;

/// Where a sequence stands.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Hidden state, after the final norm, of the token before the root: `n_embd` values.
    pub hidden: &'a [f32],
    /// The sequence's last token.
    pub root: Token,
    /// Tokens behind the root that may be drafted; 0 for none.
    pub max_depth: usize,
}

/// Something that proposes continuations.
pub trait Draft {
    /// Fills `trees[i]` with at most `n_nodes` candidates behind `origins[i]`.
    fn draft(&mut self, origins: &[Origin<'_>], n_nodes: usize, calibration: &Calibration, trees: &mut [Tree]);
}

/// Most nodes offered for one sequence.
pub const MAX_NODES: usize = 64;
/// Weight of a new measurement of the time drafting takes.
const ALPHA: f64 = 0.1;
/// After drafts that did not pay, at most this many steps go by without one.
const LONGEST_REST: u32 = 64;

/// The draft side of an engine.
pub struct Speculator {
    drafter: Box<dyn Draft>,
    /// Most tokens a step may give one sequence, its own choice included; at least 1.
    max_tokens_per_step: usize,
    cost: Cost,
    calibration: Calibration,
    /// Mean seconds of drafting.
    draft_s: f64,
    rest: Rest,
    scratch: Vec<f32>,
}

/// Drafting is skipped while it does not pay, for longer each time it did not.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    length: u32,
    left: u32,
}

impl Speculator {
    /// From a drafter and the measured cost of rows.
    #[must_use]
    pub fn new(drafter: Box<dyn Draft>, max_tokens_per_step: usize, cost: Cost) -> Self {
        Self {
            drafter,
            max_tokens_per_step: max_tokens_per_step.max(1),
            cost,
            calibration: Calibration::default(),
            draft_s: 0.0,
            rest: Rest::default(),
            scratch: Vec::new(),
        }
    }

    /// Most tokens a step may give one sequence.
    #[must_use]
    pub fn max_tokens_per_step(&self) -> usize {
        self.max_tokens_per_step
    }

    /// `true` if this step should draft. To be asked once a step.
    pub fn is_due(&mut self) -> bool {
        if self.rest.left > 0 {
            self.rest.left -= 1;
            return false;
        }
        true
    }

    /// Fills `trees` with all candidates for `origins`.
    pub fn draft(&mut self, origins: &[Origin<'_>], trees: &mut [Tree]) {
        self.drafter.draft(origins, MAX_NODES, &self.calibration, trees);
    }

    /// Cuts the trees to what pays in a step of `n_rows` rows of which `n_decode` decode, with `room` for more.
    /// `seconds` is what drafting took.
    pub fn choose(&mut self, trees: &mut [Tree], n_rows: usize, n_decode: usize, room: usize, seconds: f64) -> usize {
        self.draft_s = if self.draft_s == 0.0 { seconds } else { self.draft_s + ALPHA * (seconds - self.draft_s) };
        let step = Step { n_rows, n_decode, draft_s: self.draft_s, room };
        let n = policy::choose(trees, step, &self.cost, &mut self.scratch);
        self.rest.length = if n > 0 { 0 } else { (self.rest.length * 2).clamp(1, LONGEST_REST) };
        self.rest.left = self.rest.length;
        n
    }

    /// Notes what a step of `n_rows` rows took.
    pub fn note_step(&mut self, n_rows: usize, seconds: f64) {
        self.cost.note(n_rows, seconds);
    }

    /// Notes the walk down a tree: the accepted nodes, and whether it ended because no child held the model's choice (and
    /// not because the request was done).
    pub fn note_walk(&mut self, tree: &Tree, accepted: &[usize], refused: bool) {
        let mut parent = None;
        for step in accepted.iter().map(|&i| Some(i)).chain(refused.then_some(None)) {
            for (i, node) in tree.nodes().iter().enumerate().filter(|(_, n)| n.parent == parent) {
                self.calibration.note(node.depth, node.p, step == Some(i));
            }
            parent = step;
        }
    }
}
