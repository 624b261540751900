//! The last part of a step: tokens are chosen from the pass's logits, and sequences move on, or end.

use std::time::Instant;

use super::turn::Turn;
use super::walk::Walker;
use super::{Engine, Forward, StepError, apply, n_decode, report};
use crate::llama::{SeqId, Token};
use crate::request::span;
use crate::speculate::device::{Ask, OutputRow, Verified};
use crate::speculate::speculator::Verifying;

impl<F: Forward> Engine<F> {
    /// Moves every planned sequence on and releases those that ended.
    pub(super) fn commit(
        &mut self,
        turns: &mut [Turn],
        round: Option<Verifying>,
        started: Instant,
    ) {
        let now = Instant::now();
        let n_nodes: usize = turns.iter().map(|turn| turn.tree.len()).sum();
        let (n_rows, n_decode, prompts) =
            (self.work.rows.len(), n_decode(turns), self.work.prompts);
        let seconds = (now - started).as_secs_f64();
        self.pace.record(self.work.load, prompts, seconds);
        self.stats.rows.observe(n_rows as f64);
        if let (Some(round), Some(speculator)) = (round, &mut self.speculator) {
            round.finish(speculator, n_rows, seconds);
        }
        tracing::trace!(n_decode, n_prompt = prompts.n, n_nodes, seconds, "step");
        self.choose_on_device(turns);
        for turn in turns {
            match self.advance(turn, started, now) {
                Ok(()) if turn.walk.done => self.release(turn.share.seq),
                Ok(()) => {}
                Err(error) => self.fail(turn.share.seq, &error),
            }
        }
    }

    /// Lets the device choose the tokens after the rows of sequences whose rule it knows, and draft
    /// after them.
    fn choose_on_device(&mut self, turns: &[Turn]) {
        let Self { work, running, .. } = self;
        work.outputs.clear();
        work.verified.clear();
        work.chosen.clear();
        // The device takes rows that end a sequence or belong to its tree, and no others.
        if !self.forward.verifies() || turns.iter().any(|turn| turn.n_read > 0) {
            return;
        }
        let mut any_drafts = false;
        for Turn { share, tree, .. } in turns.iter().filter(|turn| turn.share.to_end) {
            let s = &running[&share.seq];
            let speculation = s.job.request.speculation;
            let on_host = speculation.is_typical() || s.job.guide.is_some();
            let rule = |depth| s.sampler.rule(s.tokens.len() + depth).filter(|_| !on_host);
            work.outputs.push(OutputRow { rule: rule(0), parent: None, token: Token(0) });
            work.outputs.extend(tree.nodes().iter().map(|n| OutputRow {
                rule: rule(n.depth),
                parent: Some(n.parent.map_or(0, |node| 1 + node)),
                token: n.token,
            }));
            let trust = s.trust.heads.factor();
            work.verified.push(Verified { seq: share.seq, n_rows: 1 + tree.len(), trust });
            any_drafts |= speculation.by_heads();
        }
        if work.outputs.is_empty() {
            return;
        }
        let speculator = self.speculator.as_ref().filter(|_| any_drafts);
        let draft = speculator.and_then(|s| s.will_draft(n_decode(turns)));
        let ask = Ask { rows: &work.outputs, sequences: &work.verified, draft };
        if let Some(chosen) = self.forward.verify(ask) {
            work.chosen.extend_from_slice(chosen);
        }
    }

    /// Records a sequence's computed rows; if they reached its end, lets it walk down its tree.
    fn advance(
        &mut self,
        turn: &mut Turn,
        started: Instant,
        now: Instant,
    ) -> Result<(), StepError> {
        let Self { forward, running, work, stats, speculator, ledger, leaves, limits, .. } = self;
        let s = running.get_mut(&turn.share.seq).expect("a turn is of a running sequence");
        s.started.get_or_insert(started);
        turn.walk.done = s.job.events.is_closed() || s.expire(now);
        for (row, position) in turn.share_rows().zip(s.n_computed..) {
            if let (Some(next), Some(report)) = (s.scored_after(position), s.job.request.report) {
                let n_top = report.n_top.unwrap_or(0);
                let logprobs = report::logprobs(next, forward.logits(row)?, n_top);
                s.push_prompt_logprobs(logprobs);
            }
            if s.embeds(position) {
                s.push_hidden(forward.hidden(row)?);
            }
        }
        s.tell_progress(s.n_computed + turn.share.n_rows, now);
        if turn.share.to_end && !turn.walk.done {
            turn.walk.done = s.begin_answer(stats, now);
        }
        if turn.share.to_end && !turn.walk.done {
            let walker = Walker {
                forward: &*forward,
                stats,
                n_rows: work.rows.len(),
                chosen: &work.chosen,
                keeps_hidden: speculator.as_ref().is_some_and(|s| s.heads.is_some()),
                buffers: &mut work.choosing,
            };
            walker.walk(turn, s, now)?;
        }
        let accepted = turn.walk.accepted.iter().map(|&node| turn.rows.of(Some(node)));
        for (row, position) in turn.share_rows().chain(accepted).zip(s.n_computed..) {
            let Some(state) = forward.state(row)? else { break };
            s.keep_state(position, state);
        }
        let Turn { tree, walk, leaves: ids, .. } = turn;
        let n_before = s.n_computed + turn.share.n_rows;
        let n_after = n_before + walk.accepted.len();
        ledger.push(s.seq, &s.tokens[s.n_computed..n_after]);
        if walk.accepted.len() < tree.len() && limits.layout.has_states() {
            ledger.take_back(s.seq);
        }
        s.n_computed = n_after;
        if s.keep.front() == Some(&n_after) {
            s.keep.pop_front();
            apply(forward, &ledger.keep(s.seq))?;
        }
        if let Some(speculator) = speculator {
            speculator.learn(s.order, tree, &walk.accepted, walk.last, &mut s.trust);
            let answer = s.shared_answer().filter(|_| walk.done);
            if let (Some((tenant, answer)), Some(text)) = (answer, &mut speculator.text) {
                text.remember(tenant, answer);
            }
        }
        work.ops.clear();
        if !tree.is_empty() {
            // The sequence keeps the cells of the path that it took; the others' are free again.
            tree.leaves_below(&mut work.below);
            let winner = walk.accepted.last().map_or(0, |&node| work.below.lists()[node][0]);
            leaves.settle(ids, winner, n_before, n_after, &mut work.ops);
        }
        if limits.n_window_cells().is_some() {
            leaves.follow(s.seq, n_after, &mut work.ops);
        }
        apply(forward, &work.ops)
    }

    /// Ends a sequence that is done; its cells are retained.
    fn release(&mut self, seq: SeqId) {
        let mut done = self.running.remove(&seq).expect("its turn was now");
        let ops = self.ledger.release(seq);
        if let Some(saving) = self.saving.as_mut().filter(|_| done.job.reuses_cells()) {
            saving.end(seq, done.job.caller.tenant, &done.tokens[..done.n_computed]);
        }
        self.publish_load(); // whoever has the whole answer finds its place free
        done.end(&self.stats);
        let _of_request = span(&done.job.caller.id).entered();
        self.free(seq, ops);
    }
}
