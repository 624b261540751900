//! The engine: one thread, one context, one loop. Requests join and leave at every step.
//!
//! A step is: admit, plan, forward, commit. [`slots`] knows who holds which cells, [`scheduler`] which rows come next,
//! [`sampler`] which token follows, [`text`] what of it may be shown, [`pace`] and [`company`] how long things may take.
//! They are pure; this file alone reads the clock, and [`forward`] alone talks to llama.cpp.

pub mod company;
pub mod filter;
pub mod forward;
pub mod handle;
pub mod pace;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod slots;
pub mod text;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

pub use forward::{Forward, Row};
pub use handle::{Handle, Stage, SubmitError, spawn};
pub use sequence::Job;
pub use slots::Layout;

use crate::error::IncidentId;
use crate::llama::{LlamaError, SeqId, Token};
use handle::Stats;
use pace::Pace;
use sampler::{Sampler, Scratch};
use scheduler::{Budget, Demand, Share};
use sequence::Sequence;
use slots::{KvOp, Slots};

/// The sizes an engine works within.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that run together.
    pub n_slots: usize,
    /// Tokens of one sequence, prompt and answer.
    pub n_ctx: usize,
    /// Rows of one step; at least `n_slots`.
    pub n_batch: usize,
    /// How the cache is divided.
    pub layout: Layout,
}

/// The state of the loop. Lives on the engine's thread.
pub struct Engine<F> {
    forward: F,
    limits: Limits,
    ledger: Slots,
    waiting: VecDeque<Job>,
    /// Indexed by sequence id.
    running: Vec<Option<Sequence>>,
    n_admitted: u64,
    pace: Pace,
    /// End-of-text tokens, for requests that ignore them.
    end_tokens: Vec<Token>,
    stats: Arc<Stats>,
    work: Work,
}

/// Buffers that keep their memory from step to step.
#[derive(Default)]
struct Work {
    demands: Vec<Demand>,
    by_age: Vec<Demand>,
    shares: Vec<Share>,
    rows: Vec<Row>,
    sampling: Scratch,
    piece: Vec<u8>,
}

impl<F: Forward> Engine<F> {
    /// An engine without requests.
    pub fn new(forward: F, limits: Limits, stats: Arc<Stats>) -> Self {
        let n_seqs = match limits.layout {
            Layout::Unified { n_seqs, .. } => n_seqs,
            Layout::Streams { .. } => limits.n_slots,
        };
        let end_tokens = (0..forward.n_vocab() as i32).map(Token).filter(|&t| forward.is_end(t)).collect();
        Self {
            ledger: Slots::new(limits.layout, limits.n_slots),
            waiting: VecDeque::new(),
            running: (0..n_seqs).map(|_| None).collect(),
            n_admitted: 0,
            pace: Pace::new(limits.n_batch),
            end_tokens,
            stats,
            work: Work::default(),
            forward,
            limits,
        }
    }

    /// Takes a request into the queue.
    pub fn enqueue(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// `true` without a request to work on.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.iter().all(Option::is_none)
    }

    /// `true` if more requests wait than could start.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.waiting.len() + self.ledger.n_active() >= self.limits.n_slots
    }

    /// Admits what fits, computes one batch of rows, and hands out what came of it.
    pub fn step(&mut self) {
        self.admit();
        self.plan();
        if !self.work.rows.is_empty() {
            let started = Instant::now();
            match self.forward.forward(&self.work.rows) {
                Ok(()) => self.commit(started),
                Err(error) => self.fail(&error),
            }
        }
        self.publish();
    }

    /// Gives waiting requests their places, in order; the first that does not fit keeps the rest waiting.
    fn admit(&mut self) {
        while let Some(job) = self.waiting.front() {
            if job.events.is_closed() {
                self.waiting.pop_front();
                continue;
            }
            let n_max = job.prompt.len() + job.n_generate(self.limits.n_ctx);
            let Some(place) = self.ledger.admit(&job.prompt, n_max, job.request.cache_prompt) else { return };
            let job = self.waiting.pop_front().expect("it was at the front");
            let banned: &[Token] = if job.request.ignore_eos { &self.end_tokens } else { &[] };
            let sampler = Sampler::new(&job.request.sampling, banned, &job.prompt, self.forward.n_vocab());
            let ready = self.apply(&place.ops).and(sampler);
            match ready {
                Ok(sampler) => {
                    let (seq, n_ctx) = (place.seq, self.limits.n_ctx);
                    self.running[seq.0 as usize] =
                        Some(Sequence::new(job, sampler, seq, place.n_cached, self.n_admitted, n_ctx));
                    self.n_admitted += 1;
                }
                Err(error) => {
                    let id = IncidentId::new();
                    tracing::error!(%id, %error, "a request could not start");
                    let _ = job.events.try_send(crate::request::Event::Failed { id: id.to_string() });
                    self.forget(place.seq);
                }
            }
        }
    }

    /// Fills the shares and rows of the next step.
    fn plan(&mut self) {
        let work = &mut self.work;
        work.demands.clear();
        let demand = |s: &Sequence| Demand { seq: s.seq, n_pending: s.n_pending(), order: s.order };
        work.demands.extend(self.running.iter().flatten().map(demand));
        let budget = Budget { n_batch: self.limits.n_batch, n_prefill: self.pace.n_prefill() };
        scheduler::plan(&work.demands, budget, &mut work.by_age, &mut work.shares);

        work.rows.clear();
        for share in &work.shares {
            let s = self.running[share.seq.0 as usize].as_ref().expect("planned from the running ones");
            let last = s.n_computed + share.n_rows - 1;
            work.rows.extend((s.n_computed..=last).map(|pos| Row {
                token: s.tokens[pos],
                pos,
                seq: s.seq,
                output: share.to_end && pos == last,
            }));
        }
    }

    /// Moves every planned sequence on and lets go of those that ended.
    fn commit(&mut self, started: Instant) {
        let mut row = 0;
        let shares = std::mem::take(&mut self.work.shares);
        let now = Instant::now();
        let n_decode = shares.iter().filter(|s| s.n_rows == 1 && s.to_end).count();
        let (n_prompt, seconds) = (self.work.rows.len() - n_decode, (now - started).as_secs_f64());
        self.pace.record(n_decode, n_prompt, seconds);
        tracing::trace!(n_decode, n_prompt, seconds, "step");
        for share in &shares {
            row += share.n_rows;
            match self.advance(share, row - 1, started, now) {
                Ok(false) => {}
                Ok(true) => {
                    self.running[share.seq.0 as usize] = None;
                    let ops = self.ledger.release(share.seq);
                    if let Err(error) = self.apply(&ops) {
                        tracing::error!(%error, "the cache refused to drop a prefix");
                    }
                }
                Err(error) => self.fail_one(share.seq, &error),
            }
        }
        self.work.shares = shares;
    }

    /// Notes a sequence's computed rows; if they reached its end, chooses the next token from the last one's logits. Returns
    /// `true` if the sequence is done, or nobody wants it any more.
    fn advance(&mut self, share: &Share, row: usize, started: Instant, now: Instant) -> Result<bool, LlamaError> {
        let s = self.running[share.seq.0 as usize].as_mut().expect("planned from the running ones");
        s.note_step(started);
        self.ledger.push(s.seq, &s.tokens[s.n_computed..s.n_computed + share.n_rows]);
        s.n_computed += share.n_rows;
        if s.is_cancelled() {
            return Ok(true);
        }
        if !share.to_end {
            return Ok(false);
        }
        let logits = self.forward.logits(row)?;
        let token = s.sampler.draw(logits, s.tokens.len(), &mut self.work.sampling);
        self.stats.count_token();
        self.work.piece.clear();
        let is_end = self.forward.is_end(token);
        if !is_end {
            self.forward.piece(token, &mut self.work.piece);
        }
        Ok(s.accept(token, &self.work.piece, is_end, now))
    }

    fn apply(&mut self, ops: &[KvOp]) -> Result<(), LlamaError> {
        ops.iter().try_for_each(|&op| self.forward.apply(op))
    }

    /// A step failed: what the cache holds of its sequences is not known, so they end. The others go on.
    fn fail(&mut self, error: &LlamaError) {
        let shares = std::mem::take(&mut self.work.shares);
        shares.iter().for_each(|share| self.fail_one(share.seq, error));
        self.work.shares = shares;
    }

    fn fail_one(&mut self, seq: SeqId, error: &LlamaError) {
        let id = IncidentId::new();
        tracing::error!(%id, %error, "a request failed in the engine");
        if let Some(mut s) = self.running[seq.0 as usize].take() {
            s.fail(&id.to_string());
        }
        self.forget(seq);
    }

    /// Ends a sequence whose cells cannot be trusted.
    fn forget(&mut self, seq: SeqId) {
        let ops = self.ledger.discard(seq);
        if let Err(error) = self.apply(&ops) {
            tracing::error!(%error, "the cache refused to drop a sequence");
        }
    }

    fn publish(&self) {
        let running = self.ledger.n_active();
        self.stats.publish(running, self.waiting.len(), self.ledger.n_cells_active(), self.ledger.n_cells_retained());
    }

    /// Checks the ledger and that it knows the same sequences as the loop. For tests.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_integrity(&self) {
        self.ledger.check_integrity();
        assert_eq!(self.running.iter().flatten().count(), self.ledger.n_active());
    }
}
