//! Drafting: what may follow, and how much of it to verify. Pure but for the heads' files.
//!
//! Each step, every decoding sequence has a root (its last token, chosen but not computed) and the
//! hidden state of the token before it. Heads, as a [`Draft`], make a [`Tree`] of candidates from
//! it; a [draft model](draft_model) makes another from the tokens, and one tree is made of both;
//! [`text`] adds what followed earlier occurrences of the last tokens. [`policy`] cuts all trees
//! to the nodes that pay, by the measured [`cost`] of rows and by how often such candidates were
//! right ([`calibration`], [`text`]). The engine computes root and nodes in one pass and walks down
//! each tree by the model's own choices, so speculation never changes a text.

pub mod calibration;
pub mod conditioned;
pub mod cost;
pub mod device;
pub mod draft_model;
mod error;
pub mod heads;
mod joint;
mod lanes;
pub mod medusa;
pub mod nets;
pub mod paths;
mod pickle;
pub mod policy;
pub mod recording;
pub mod reliability;
pub mod simulated;
pub mod speculator;
pub mod states;
pub mod suffix;
pub mod text;
pub mod tree;

use calibration::Calibration;
pub use speculator::Speculator;
use states::States;
use text::TextOrigin;
pub use tree::{Node, Tree};

use crate::llama::{SeqId, Token};

/// A sequence to draft for.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Which it is.
    pub seq: SeqId,
    /// Its tokens; the last one is the root.
    pub tokens: &'a [Token],
    /// Hidden state, after the final norm, of the token before the root: `n_embd` values.
    pub hidden: &'a [f32],
    /// What the model's draft layers continue from, of its last tokens but the root; none where there
    /// are no such layers.
    pub states: &'a States,
    /// What heads are asked for.
    pub heads: Asked,
    /// What a draft model is asked for.
    pub model: Asked,
    /// Probability that text does not know the next token.
    pub open: f32,
    /// Its text, if that may be drafted from.
    pub text: Option<TextOrigin<'a>>,
}

/// What a source of drafts is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Tokens after the root; 0 for none.
    pub max_depth: usize,
    /// [`Trust::factor`](calibration::Trust::factor) of this source for the sequence.
    pub trust: f32,
}

impl Origin<'_> {
    /// The sequence's last token, chosen but not computed.
    ///
    /// # Panics
    /// For a sequence without tokens.
    #[must_use]
    pub fn root(&self) -> Token {
        *self.tokens.last().expect("a sequence has tokens")
    }
}

/// Something that proposes continuations.
pub trait Draft {
    /// Most tokens that a path after the root can have; of heads, how many there are.
    fn n_heads(&self) -> usize;
    /// Fills `trees[i]`, which is empty, with candidates after `origins[i]`, best first, within `worth`.
    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    );
    /// Seconds of the last draft that went into what later drafts need, too.
    fn invested_s(&self) -> f64 {
        0.0
    }
}

/// What candidates are worth in the step they are drafted for.
#[derive(Clone, Copy, Debug)]
pub struct Worth {
    /// Most candidates of one tree.
    pub n_nodes: usize,
    /// Seconds that one token more saves: what a token takes in a step of these sequences alone.
    pub token_s: f64,
    /// Seconds that one row more costs.
    pub row_s: f64,
}

impl Worth {
    /// Seconds that candidates at `depth` are expected to save after a path of probability `q`, where
    /// text does not know the next token with probability `open` and their source has that trust.
    #[must_use]
    pub fn saved_s(
        &self,
        depth: usize,
        q: f32,
        open: f32,
        trust: f32,
        calibration: &Calibration,
    ) -> f64 {
        let token_s = f64::from(q) * self.token_s;
        f64::from(open) * token_s * calibration.expect(depth, self.row_s / token_s, trust)
    }
}

/// Most nodes proposed for one sequence.
pub const MAX_NODES: usize = 64;
