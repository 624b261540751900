//! The first part of a step: waiting requests get their places, with what is cached or kept of their prompts.

use std::time::Instant;

use super::sampler::Sampler;
use super::sequence::Sequence;
use super::slots::{Admission, Layout};
use super::stats::Ended;
use super::{Engine, Forward, Job, StepError, apply};
use crate::llama::Token;
use crate::request::{Restored, Timings, span};

impl<F: Forward> Engine<F> {
    /// Gives waiting requests their places, in order; the first that does not fit keeps the rest
    /// waiting. Those whose prompt is being read for another request wait until they can share its
    /// cells, and those behind them leave them their slots.
    pub(super) fn admit(&mut self) {
        self.expire_waiting();
        let mut n_following = 0;
        while let Some(job) = self.waiting.get(n_following) {
            if job.events.is_closed() {
                self.waiting.remove(n_following);
                self.stats.count_end(Ended::Cancelled);
                continue;
            }
            if job.is_trivial() {
                if let Some(job) = self.waiting.remove(n_following) {
                    self.answer_trivially(job);
                }
                continue;
            }
            if self.running.len() + n_following >= self.limits.n_slots {
                return;
            }
            if self.follows(job) {
                n_following += 1;
                continue;
            }
            let n_max = job.prompt.len() + job.n_generate(self.limits.n_ctx);
            let reuse = job.reuses_cells();
            let Some(place) = self.ledger.admit(&job.prompt, n_max, reuse) else { return };
            let mut job = self.waiting.remove(n_following).expect("it was there");
            let banned: &[Token] = if job.request.ignore_eos { &self.end_tokens } else { &[] };
            let n_vocab = self.forward.n_vocab();
            let mut sampler = Sampler::new(&job.request.sampling, banned, &job.prompt, n_vocab)
                .map(|sampler| sampler.with_dry(job.dry.take()));
            if job.request.min_tokens > 0 {
                let ends = [&self.end_tokens[..], &job.request.stop_token_ids].concat();
                let position = job.prompt.len() + job.request.min_tokens;
                sampler = sampler.map(|sampler| sampler.not_before(position, ends));
            }
            let ready = apply(&mut self.forward, &place.ops).and(sampler.map_err(StepError::from));
            match ready {
                Ok(sampler) => {
                    let restored = self.restore(&job, &place);
                    self.start(job, sampler, place, restored);
                }
                Err(error) => self.fail_job(job, place.seq, &error),
            }
        }
    }

    /// `true` if all that this request could share is being computed for a running one.
    fn follows(&self, job: &Job) -> bool {
        let shared = &job.prompt[..job.prompt.len() - 1];
        let reads = |s: &Sequence| match self.limits.layout {
            Layout::Unified { .. } => s.n_computed < shared.len() && s.tokens.starts_with(shared),
            Layout::States { .. } => s.keep.iter().any(|&n| shared.starts_with(&s.tokens[..n])),
            Layout::Streams { .. } => false,
        };
        job.reuses_cells() && self.running.values().any(reads)
    }

    /// Brings back the cells of an admitted prompt that are kept beside the cache.
    fn restore(&mut self, job: &Job, place: &Admission) -> Restored {
        let Self { saving, ledger, forward, stats, .. } = self;
        let Some(saving) = saving.as_ref().filter(|_| job.reuses_cells()) else {
            return Restored::default();
        };
        let (tenant, n_cached) = (job.caller.tenant, place.n_cached);
        let restored = saving.restore(place.seq, tenant, &job.prompt, n_cached, forward, stats);
        ledger.push(place.seq, &job.prompt[n_cached..n_cached + restored.total()]);
        restored
    }

    fn start(&mut self, job: Job, sampler: Sampler, place: Admission, restored: Restored) {
        let Admission { seq, keep, .. } = place;
        let n_cached = place.n_cached + restored.total();
        if job.reuses_cells() {
            self.stats.prefix_queries.inc_by(job.prompt.len() as u64);
            self.stats.prefix_hits.inc_by(n_cached as u64);
        }
        let _of_request = span(&job.caller.id).entered();
        tracing::debug!(slot = seq.0, n_prompt = job.prompt.len(), n_cached, ?restored, "admitted");
        let has_text = self.speculator.as_ref().is_some_and(|s| s.text.is_some());
        let drafts_text = has_text && job.request.speculation.by_text();
        let order = self.n_admitted;
        let mut sequence = Sequence::new(job, sampler, seq, n_cached, order, self.limits.n_ctx);
        sequence.restored = restored;
        sequence.keep = keep.into();
        sequence.trace = self.traces.then(Box::default);
        if drafts_text {
            sequence.index_text();
        }
        sequence.tell_progress(n_cached, Instant::now());
        self.running.insert(seq, sequence);
        self.n_admitted += 1;
    }

    /// Answers a request that needs no computation.
    fn answer_trivially(&self, job: Job) {
        let now = Instant::now();
        let queue_s = (now - job.accepted).as_secs_f64();
        self.stats.record_answer(Ended::Length, Timings { queue_s, ..Timings::default() }, 0);
        job.answer_trivially(now);
    }

    /// Ends waiting requests whose time is over.
    fn expire_waiting(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(i) = self.waiting.iter().position(|job| job.is_overdue(now)) {
            self.stats.count_end(Ended::Deadline);
            if let Some(job) = self.waiting.remove(i) {
                job.expire(now);
            }
        }
    }
}
