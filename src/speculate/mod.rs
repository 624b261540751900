//! Drafting: what may follow, and how much of it to verify. Pure but for the heads' files.
//!
//! Each step, every decoding sequence has a root (its last token, chosen but not computed) and the hidden state of the token
//! before it. A [`Draft`] makes a [`Tree`] of candidates of that; [`policy`] cuts the trees of all sequences to the nodes
//! that pay, by the measured [`cost`] of rows and the [`calibration`] of what the heads say. The engine computes root and
//! nodes in one pass and walks down each tree by the model's own choices: what it accepts is what it would have generated
//! anyway, so speculation changes the pace of a text and never the text.

pub mod calibration;
pub mod conditioned;
pub mod cost;
pub mod heads;
pub mod medusa;
pub mod policy;
pub mod tree;

use calibration::Calibration;
use conditioned::Conditioned;
use cost::Cost;
use heads::{HeadNets, Heads};
use medusa::Medusa;
use policy::Step;
pub use tree::{Node, Tree};

use crate::llama::{LlamaError, Model, Token};

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
    /// Most tokens that a path behind the root can have.
    fn n_heads(&self) -> usize;
    /// Fills `trees[i]` with candidates behind `origins[i]`, best first, within `worth`.
    fn draft(&mut self, origins: &[Origin<'_>], worth: Worth, calibration: &Calibration, trees: &mut [Tree]);
}

/// Makes ready what heads need of their model to draft.
///
/// # Errors
/// When the model's matrices cannot be read, or there is no memory.
pub fn drafter(heads: Heads, model: &Model, n_threads: usize) -> Result<Box<dyn Draft>, LlamaError> {
    let output = model.output_rows()?;
    Ok(match heads.nets {
        HeadNets::Plain(weights) => Box::new(Medusa::new(weights, heads.token_map, &output, n_threads)?),
        HeadNets::Conditioned(weights) => {
            Box::new(Conditioned::new(&weights, heads.token_map, &output, model.embedding_rows()?, n_threads)?)
        }
    })
}

/// What candidates are worth in the step they are drafted for.
#[derive(Clone, Copy, Debug)]
pub struct Worth {
    /// Most candidates of one tree.
    pub n_nodes: usize,
    /// Seconds that one token more saves: what a token takes now.
    pub token_s: f64,
    /// Seconds that one row more costs.
    pub row_s: f64,
}

/// Most nodes offered for one sequence.
pub const MAX_NODES: usize = 64;
/// Weight of a new measurement of the time drafting takes.
const ALPHA: f64 = 0.1;
/// Weight of a draft in the mean of what drafts gained.
const GAIN: f64 = 0.1;
/// While drafts do not pay in the mean, at most this many steps go by without one.
const LONGEST_REST: u32 = 64;

/// The draft side of an engine.
pub struct Speculator {
    drafter: Box<dyn Draft>,
    /// Most tokens a step may give one sequence, its own choice included; at least 1.
    max_tokens_per_step: usize,
    /// Verify this many candidates whatever they cost, for comparison.
    fixed_nodes: Option<usize>,
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
    /// Mean of what drafts gained, in shares of a step's time.
    gain: f64,
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
            fixed_nodes: None,
            cost,
            calibration: Calibration::default(),
            draft_s: 0.0,
            rest: Rest::default(),
            scratch: Vec::new(),
        }
    }

    /// Verifies `n` candidates for each sequence in every step, whatever they cost: not to serve with, but to measure.
    #[must_use]
    pub fn with_fixed_nodes(mut self, n: usize) -> Self {
        self.fixed_nodes = Some(n.min(MAX_NODES));
        self
    }

    /// Most tokens a step may give one sequence.
    #[must_use]
    pub fn max_tokens_per_step(&self) -> usize {
        self.max_tokens_per_step
    }

    /// `true` if this step should draft. To be asked once a step.
    pub fn is_due(&mut self) -> bool {
        if self.rest.left > 0 && self.fixed_nodes.is_none() {
            self.rest.left -= 1;
            return false;
        }
        true
    }

    /// Fills `trees` with all candidates for `origins`, in a step of `n_rows` rows of which `n_decode` decode.
    pub fn draft(&mut self, origins: &[Origin<'_>], n_rows: usize, n_decode: usize, trees: &mut [Tree]) {
        let step_s = self.cost.seconds(n_rows);
        let worth = match self.fixed_nodes {
            Some(n_nodes) => Worth { n_nodes, token_s: f64::MAX.sqrt(), row_s: 0.0 },
            None => Worth {
                n_nodes: MAX_NODES,
                token_s: step_s / n_decode.max(1) as f64,
                row_s: self.cost.seconds(n_rows + 1) - step_s,
            },
        };
        self.drafter.draft(origins, worth, &self.calibration, trees);
    }

    /// Cuts the trees to what pays in a step of `n_rows` rows of which `n_decode` decode, with `room` for more.
    /// `seconds` is what drafting took.
    pub fn choose(&mut self, trees: &mut [Tree], n_rows: usize, n_decode: usize, room: usize, seconds: f64) -> usize {
        self.draft_s = if self.draft_s == 0.0 { seconds } else { self.draft_s + ALPHA * (seconds - self.draft_s) };
        if self.fixed_nodes.is_some() {
            let each = room / trees.len().max(1);
            trees.iter_mut().for_each(|t| t.truncate(each));
            return trees.iter().map(Tree::len).sum();
        }
        let step = Step { n_rows, n_decode, draft_s: self.draft_s, room };
        let n = policy::choose(trees, step, &self.cost, &mut self.scratch);
        let hoped: f64 = trees.iter().flat_map(Tree::nodes).map(|n| f64::from(n.q)).sum();
        let plain_s = self.cost.seconds(n_rows);
        let drafted_s = self.cost.seconds(n_rows + n) + self.draft_s;
        // Against the time that the plain step would take for as many tokens.
        let gain = (1.0 + hoped / n_decode.max(1) as f64) * plain_s / drafted_s - 1.0;
        self.rest.note(gain);
        n
    }

    /// Seconds that drafting takes in the mean.
    #[must_use]
    pub fn draft_s(&self) -> f64 {
        self.draft_s
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

impl Rest {
    /// Notes what a draft gained; sets how many steps go by without one.
    fn note(&mut self, gain: f64) {
        self.gain += GAIN * (gain - self.gain);
        self.length = if self.gain >= 0.0 || gain > 0.0 { 0 } else { (self.length * 2).clamp(1, LONGEST_REST) };
        self.left = self.length;
    }
}
