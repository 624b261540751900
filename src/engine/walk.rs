//! How a sequence walks down its tree after a pass: a token is chosen from each row, and the node
//! that holds it is next.

use std::time::Instant;

use super::forward::{Forward, StepError};
use super::report;
use super::sampler::Scratch;
use super::sequence::Sequence;
use super::stats::Stats;
use super::turn::Turn;
use crate::llama::Token;
use crate::request::TokenReport;

/// Buffers to choose tokens with.
#[derive(Default)]
pub struct Choosing {
    drafted: Vec<Token>,
    sampling: Scratch,
    masked: Vec<f32>,
    most_likely: Vec<(Token, f32)>,
    piece: Vec<u8>,
}

/// Lets a sequence choose its tokens after a pass.
pub struct Walker<'a, F> {
    pub forward: &'a F,
    pub stats: &'a Stats,
    pub n_rows: usize,
    /// The tokens that the device chose, by output row; empty if the host chooses all.
    pub chosen: &'a [i32],
    /// Heads draft from hidden states.
    pub keeps_hidden: bool,
    pub buffers: &'a mut Choosing,
}

impl<F: Forward> Walker<'_, F> {
    /// Chooses tokens: after the sequence's last one, and on as long as its tree holds them.
    ///
    /// # Errors
    /// When the model has no logits for a row.
    pub fn walk(
        mut self,
        turn: &mut Turn,
        s: &mut Sequence,
        now: Instant,
    ) -> Result<(), StepError> {
        let n_drafted = turn.tree.len();
        s.drafts.steps += 1;
        s.drafts.drafted += n_drafted;
        self.stats.drafts.inc_by(u64::from(n_drafted > 0));
        self.stats.drafted.inc_by(n_drafted as u64);
        s.record_wait(self.stats, now);
        let mut at = None;
        loop {
            let token = self.choose(turn, at, s)?;
            self.stats.tokens.inc();
            let next = turn.tree.child(at, token);
            self.report(turn, at, token, s)?;
            let piece = &mut self.buffers.piece;
            piece.clear();
            let is_end = self.forward.is_end(token);
            if !is_end {
                self.forward.piece(token, s.job.shown.contains(&token), piece);
            }
            turn.walk.last = Some(token);
            turn.walk.done = s.accept(token, piece, is_end, now);
            if turn.walk.done {
                return Ok(());
            }
            let Some(node) = next else {
                if self.keeps_hidden {
                    s.keep_hidden(self.forward.hidden(turn.rows.of(at))?);
                }
                return Ok(());
            };
            turn.walk.accepted.push(node);
            s.drafts.accepted += 1;
            self.stats.count_accepted(turn.tree.nodes()[node].depth);
            at = next;
        }
    }

    /// The token after node `at` of a sequence's tree.
    fn choose(
        &mut self,
        turn: &Turn,
        at: Option<usize>,
        s: &mut Sequence,
    ) -> Result<Token, StepError> {
        if let Some(&token) = self.chosen.get(turn.outputs.of(at)).filter(|&&token| token >= 0) {
            return Ok(Token(token));
        }
        let Choosing { drafted, masked, sampling, .. } = &mut *self.buffers;
        drafted.clear();
        if s.job.request.speculation.is_typical() {
            let children = turn.tree.nodes().iter().filter(|n| n.parent == at);
            drafted.extend(children.map(|n| n.token));
        }
        let mut logits = self.forward.logits(turn.rows.of(at))?;
        if s.job.guide.as_ref().is_some_and(|guide| guide.mask(logits, masked)) {
            logits = masked;
        }
        Ok(s.sampler.draw(logits, s.tokens.len(), drafted, sampling))
    }

    /// Records what the client or a trace wants to know of the `token` chosen after node `at`.
    fn report(
        &mut self,
        turn: &Turn,
        at: Option<usize>,
        token: Token,
        s: &mut Sequence,
    ) -> Result<(), StepError> {
        let (forward, row) = (self.forward, turn.rows.of(at));
        if let Some(trace) = &mut s.trace {
            let most_likely = &mut self.buffers.most_likely;
            report::push(trace, token, forward.hidden(row)?, forward.logits(row)?, most_likely);
        }
        let Some(report) = s.job.request.report else { return Ok(()) };
        let logprobs = match report.n_top {
            Some(n_top) => Some(report::logprobs(token, forward.logits(row)?, n_top)),
            None => None,
        };
        let source = turn.tree.child(at, token).map(|node| turn.tree.nodes()[node].source());
        let (step, n_rows) = (s.drafts.steps, self.n_rows);
        s.push_report(TokenReport { token, source, step, n_rows, logprobs });
        Ok(())
    }
}
