//! The last part of a step: tokens are chosen from what the pass gave, and sequences move on, or
//! end.

use std::time::Instant;

use super::grammar::GrammarError;
use super::report;
use super::scheduler::Share;
use super::sequence::Sequence;
use super::{Engine, Forward, Work};
use crate::gpu::kernels::{RowRule, Span};
use crate::llama::{LlamaError, Token};
use crate::request::{Speculation, TokenReport, span};
use crate::speculate::device::Ask;
use crate::speculate::{Speculator, Tree};

/// Why one sequence could not go on.
#[derive(Debug, thiserror::Error)]
enum AdvanceError {
    #[error(transparent)]
    Llama(#[from] LlamaError),
    #[error(transparent)]
    Grammar(#[from] GrammarError),
}

/// How far a sequence came.
#[derive(Clone, Copy)]
struct Walk {
    /// The token behind those that were drafted; `None` if nobody waited for any.
    last: Option<Token>,
    /// Its answer has ended.
    done: bool,
}

impl<F: Forward> Engine<F> {
    /// Moves every planned sequence on and lets go of those that ended.
    pub(super) fn commit(&mut self, started: Instant) {
        let now = Instant::now();
        let shares = std::mem::take(&mut self.work.shares);
        let n_decode = shares.iter().filter(|s| s.n_rows == 1 && s.to_end).count();
        let n_nodes: usize = self.work.trees.iter().take(shares.len()).map(Tree::len).sum();
        let n_rows = self.work.rows.len();
        let (n_prompt, seconds) = (n_rows - n_decode - n_nodes, (now - started).as_secs_f64());
        self.pace.record(self.work.load, n_prompt, seconds);
        self.stats.note_rows(n_rows);
        if let Some(speculator) = &mut self.speculator {
            speculator.note_step(n_rows, (n_prompt == 0).then_some(seconds));
        }
        tracing::trace!(n_decode, n_prompt, n_nodes, seconds, "step");
        self.choose_on_device(&shares, n_decode);
        let mut first_row = 0;
        for (i, share) in shares.iter().enumerate() {
            let row = first_row + share.n_rows - 1;
            first_row += share.n_rows + self.work.trees[i].len();
            match self.advance(i, share, row, started, now) {
                Ok(false) => {}
                Ok(true) => {
                    let done = self.running[share.seq.0 as usize].take();
                    if let Some(s) = &done {
                        s.note_end(&self.stats);
                    }
                    let mut ops = self.ledger.release(share.seq);
                    self.leaves.end(share.seq, &mut ops);
                    if let Err(error) = self.apply(&ops) {
                        let _of_request = done.map(|s| span(&s.id).entered());
                        tracing::error!(%error, "the cache refused to drop a prefix");
                    }
                }
                Err(error) => self.fail_one(share.seq, &error),
            }
        }
        self.work.shares = shares;
    }

    /// Lets the device choose the tokens behind the rows of sequences whose choice it knows how to
    /// make, and draft behind them.
    fn choose_on_device(&mut self, shares: &[Share], n_decode: usize) {
        let work = &mut self.work;
        work.rules.clear();
        work.spans.clear();
        work.asked.clear();
        work.trust.clear();
        work.chosen.clear();
        work.first_choice.clear();
        if !self.forward.verifies() {
            work.first_choice.resize(shares.len(), 0);
            return;
        }
        let mut any_drafts = false;
        for (i, (share, tree)) in shares.iter().zip(&work.trees).enumerate() {
            work.first_choice.push(work.rules.len());
            if !share.to_end {
                continue;
            }
            let s =
                self.running[share.seq.0 as usize].as_ref().expect("planned from the running ones");
            let (first, sequence) = (work.rules.len() as i32, work.spans.len() as i32);
            let on_host = s.speculation == Speculation::Typical
                || s.grammar.is_some()
                || s.sampler.rule(0).is_none();
            for at in std::iter::once(None).chain((0..tree.len()).map(Some)) {
                let (parent, token, depth) = at.map_or((-1, 0, 0), |node: usize| {
                    let n = &tree.nodes()[node];
                    (n.parent.map_or(first, |p| first + 1 + p as i32), n.token.0, n.depth)
                });
                let position = s.tokens.len() + depth;
                let forced = self
                    .speculator
                    .as_ref()
                    .and_then(|speculator| speculator.forced(i, at, || s.sampler.chance(position)));
                work.rules.push(RowRule {
                    logits_row: work.rules.len() as i32, // every output row has a rule, in order
                    sequence,
                    parent,
                    token,
                    on_host: i32::from(on_host),
                    forced: forced.map_or(0, |token| token.0 + 1),
                    ..s.sampler.rule(position).unwrap_or_default()
                });
            }
            work.spans.push(Span { first, n: work.rules.len() as i32 - first });
            work.asked.push(share.seq);
            work.trust.push(s.trust.heads.factor());
            any_drafts |= s.speculation.by_heads();
        }
        if work.rules.is_empty() {
            return;
        }
        let calibration =
            self.speculator.as_ref().filter(|_| any_drafts).and_then(|s| s.will_draft(n_decode));
        let Work { rules, spans, asked: seqs, trust, .. } = work;
        let ask = Ask { rules, spans, seqs, trust, draft: calibration };
        if let Some(chosen) = self.forward.verify(ask) {
            work.chosen.extend_from_slice(chosen);
        }
    }

    /// Notes a sequence's computed rows; if they reached its end, lets it walk down its tree by the
    /// tokens it chooses, from the last of them, `row`, on. Returns `true` if the sequence is done,
    /// or nobody wants it any more.
    fn advance(
        &mut self,
        i: usize,
        share: &Share,
        row: usize,
        started: Instant,
        now: Instant,
    ) -> Result<bool, AdvanceError> {
        let mut s =
            self.running[share.seq.0 as usize].take().expect("planned from the running ones");
        s.note_step(started);
        self.work.accepted.clear();
        let done = s.is_cancelled() || s.expire(now);
        let walk = if share.to_end && !done {
            self.walk(i, &mut s, row, now)
        } else {
            Ok(Walk { last: None, done })
        };
        let n_before = s.n_computed + share.n_rows;
        let n_after = n_before + self.work.accepted.len();
        if let Ok(Walk { last, done }) = walk {
            self.ledger.push(s.seq, &s.tokens[s.n_computed..n_after]);
            s.n_computed = n_after;
            if let Some(speculator) = &mut self.speculator {
                speculator.note_walk(
                    i,
                    self.work.trees[i].len(),
                    &self.work.accepted,
                    last,
                    &mut s.trust,
                );
                if let Some((owner, answer)) = s.shared_answer().filter(|_| done) {
                    speculator.remember(owner, answer);
                }
            }
        }
        self.running[share.seq.0 as usize] = Some(s);
        let Walk { done, .. } = walk?;
        self.settle(i, n_before, n_after)?;
        Ok(done)
    }

    /// Lets a sequence choose tokens: behind `row`, and on as long as its `i`-th tree holds them.
    fn walk(
        &mut self,
        i: usize,
        s: &mut Sequence,
        row: usize,
        now: Instant,
    ) -> Result<Walk, AdvanceError> {
        s.note_drafted(self.work.trees[i].len());
        self.stats.count_draft(self.work.trees[i].len());
        self.stats.note_wait(s.waited(now));
        let mut at = None;
        loop {
            let row = at.map_or(row, |node| row + 1 + node);
            let token = self.choose(i, s, at, row)?;
            self.stats.count_token();
            let next = self.work.trees[i].child(at, token);
            self.tell(i, s, token, row, next)?;
            let work = &mut self.work;
            work.piece.clear();
            let is_end = self.forward.is_end(token);
            if !is_end {
                self.forward.piece(token, &mut work.piece);
            }
            if s.accept(token, &work.piece, is_end, now)? {
                return Ok(Walk { last: Some(token), done: true });
            }
            let Some(node) = next else {
                if self.speculator.as_ref().is_some_and(Speculator::has_heads) {
                    s.keep_hidden(self.forward.hidden(row)?);
                }
                return Ok(Walk { last: Some(token), done: false });
            };
            work.accepted.push(node);
            s.note_accepted();
            self.stats.count_accepted(work.trees[i].nodes()[node].depth);
            at = Some(node);
        }
    }

    /// The token behind node `at` of a sequence's `i`-th tree, whose logits stand at `row`.
    fn choose(
        &mut self,
        i: usize,
        s: &mut Sequence,
        at: Option<usize>,
        row: usize,
    ) -> Result<Token, LlamaError> {
        let work = &mut self.work;
        let place = work.first_choice[i] + at.map_or(0, |node| 1 + node);
        if let Some(&token) = work.chosen.get(place).filter(|&&token| token >= 0) {
            return Ok(Token(token));
        }
        work.offered.clear();
        if s.speculation == Speculation::Typical {
            work.offered
                .extend(work.trees[i].nodes().iter().filter(|n| n.parent == at).map(|n| n.token));
        }
        let mut logits = self.forward.logits(row)?;
        if let Some(grammar) = &s.grammar {
            grammar.mask(logits, &mut work.masked);
            logits = &work.masked;
        }
        let position = s.tokens.len();
        let own = s.sampler.draw_typical(logits, position, &work.offered, &mut work.sampling);
        let chance = || s.sampler.chance(position);
        Ok(self
            .speculator
            .as_ref()
            .map_or(own, |speculator| speculator.choice(i, at, own, logits, chance)))
    }

    /// Notes of a token chosen from `row` what somebody wants to know; it is node `next` of the
    /// `i`-th tree, if it was drafted.
    fn tell(
        &mut self,
        i: usize,
        s: &mut Sequence,
        token: Token,
        row: usize,
        next: Option<usize>,
    ) -> Result<(), LlamaError> {
        let work = &mut self.work;
        if let Some(trace) = &mut s.trace {
            report::push(
                trace,
                token,
                self.forward.hidden(row)?,
                self.forward.logits(row)?,
                &mut work.likeliest,
            );
        }
        let Some(report) = s.report else { return Ok(()) };
        let logprobs = match report.n_top {
            Some(n_top) => Some(report::logprobs(token, self.forward.logits(row)?, n_top)),
            None => None,
        };
        let source = next.map(|node| work.trees[i].nodes()[node].source());
        s.tell(TokenReport { token, source, step: s.step(), n_rows: work.rows.len(), logprobs });
        Ok(())
    }

    /// Leaves a sequence the cells of the path that it took down its `i`-th tree, at positions
    /// `n_before..n_after`, and takes the others' back.
    fn settle(&mut self, i: usize, n_before: usize, n_after: usize) -> Result<(), LlamaError> {
        let work = &mut self.work;
        let (tree, ids) = (&work.trees[i], &mut work.leaf_ids[i]);
        if tree.is_empty() {
            return Ok(());
        }
        tree.leaves_below(&mut work.below);
        let winner = work.accepted.last().map_or(0, |&node| work.below.lists()[node][0]);
        work.settling.clear();
        self.leaves.settle(ids, winner, n_before, n_after, &mut work.settling);
        ids.clear();
        let settling = std::mem::take(&mut work.settling);
        let settled = self.apply(&settling);
        self.work.settling = settling;
        settled
    }
}
