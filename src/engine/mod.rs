//! The engine: one thread, one context, one loop. Requests join and leave at every step.
//!
//! A step is: admit, plan, draft, forward, commit (in `commit`). [`slots`] knows who holds which
//! cells, [`leaves`] lends ids to trees, [`scheduler`] says which rows come next, [`sampler`] which
//! token follows, [`text`] what of it may be shown, [`pace`] and [`company`] how long things may
//! take; [`speculate`](crate::speculate) drafts. They are pure; this file and `commit` alone read
//! the clock, and [`forward`] alone talks to llama.cpp. What happens is counted in [`stats`].

mod commit;
pub mod company;
pub mod filter;
pub mod forward;
pub mod grammar;
pub mod handle;
pub mod leaves;
pub mod pace;
pub mod report;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod slots;
pub mod stats;
pub mod text;
pub mod thread;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

pub use forward::{Forward, LlamaForward, Row, Rows};
pub use handle::{Answer, Failed, Handle, SubmitError};
pub use sequence::Job;
pub use slots::Layout;
pub use thread::{Stage, spawn};

use crate::error::IncidentId;
use crate::gpu::kernels::{RowRule, Span};
use crate::llama::{LlamaError, SeqId, Token};
use crate::request::{Trace, span};
use crate::speculate::tree::Below;
use crate::speculate::{MAX_NODES, Origin, Speculator, Tree};
use leaves::Leaves;
use pace::{Load, Pace};
use sampler::{Sampler, Scratch};
use scheduler::{Budget, Demand, Share};
use sequence::Sequence;
use slots::{KvOp, Slots};
use stats::{Ended, Stats};

/// The sizes an engine works within.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that run together.
    pub n_slots: usize,
    /// Tokens of one sequence, prompt and answer.
    pub n_ctx: usize,
    /// Rows of one step; at least `n_slots`.
    pub n_batch: usize,
    /// Rows of prompts in a step beside streams that run; `None`: as many as pace allows.
    pub n_prefill: Option<usize>,
    /// How the cache is divided.
    pub layout: Layout,
}

impl Limits {
    /// Cells of the whole cache.
    #[must_use]
    pub fn n_cells(&self) -> usize {
        match self.layout {
            Layout::Unified { n_cells, .. } => n_cells,
            Layout::Streams { n_cells } => n_cells * self.n_slots,
        }
    }
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
    /// `None`: nothing is drafted.
    speculator: Option<Speculator>,
    leaves: Leaves,
    /// Answers come with what the model thought.
    traces: bool,
    /// End-of-text tokens, for requests that ignore them.
    end_tokens: Vec<Token>,
    stats: Arc<Stats>,
    work: Work,
}

/// Buffers that keep their memory from step to step.
#[derive(Default)]
struct Work {
    demands: Vec<Demand>,
    load: Load,
    by_age: Vec<Demand>,
    shares: Vec<Share>,
    /// For each share its candidates, and the ids of their leaves: the sequence's own first.
    trees: Vec<Tree>,
    leaf_ids: Vec<Vec<SeqId>>,
    below: Below,
    rows: Rows,
    accepted: Vec<usize>,
    /// The tokens drafted for one place.
    offered: Vec<Token>,
    /// Before the pass, and after it.
    ops: Vec<KvOp>,
    settling: Vec<KvOp>,
    sampling: Scratch,
    likeliest: Vec<(Token, f32)>,
    /// Logits under a grammar.
    masked: Vec<f32>,
    piece: Vec<u8>,
    /// What the device is asked: for each output row its rule, for each sequence its rows, its id
    /// and how far it is trusted.
    rules: Vec<RowRule>,
    spans: Vec<Span>,
    asked: Vec<SeqId>,
    trust: Vec<f32>,
    /// What it chose, and where each share's rows begin there. Empty if it chose nothing.
    chosen: Vec<i32>,
    first_choice: Vec<usize>,
}

impl<F: Forward> Engine<F> {
    /// An engine without requests.
    pub fn new(forward: F, limits: Limits, stats: Arc<Stats>) -> Self {
        let n_seqs = match limits.layout {
            Layout::Unified { n_seqs, .. } => n_seqs,
            Layout::Streams { .. } => limits.n_slots,
        };
        let end_tokens =
            (0..forward.n_vocab() as i32).map(Token).filter(|&t| forward.is_end(t)).collect();
        Self {
            ledger: Slots::new(limits.layout, limits.n_slots),
            waiting: VecDeque::new(),
            running: (0..n_seqs).map(|_| None).collect(),
            n_admitted: 0,
            pace: limits
                .n_prefill
                .map_or_else(|| Pace::new(limits.n_batch), |n| Pace::fixed(n, limits.n_batch)),
            speculator: None,
            leaves: Leaves::new(0, 0, 0),
            traces: false,
            end_tokens,
            stats,
            work: Work::default(),
            forward,
            limits,
        }
    }

    /// Lets trees be drafted and verified, with the sequence ids behind the layout's own up to
    /// `n_ids` for their leaves.
    ///
    /// # Panics
    /// In streams, which cannot hold trees.
    pub fn speculate(&mut self, speculator: Speculator, n_ids: usize) {
        let Layout::Unified { n_seqs, .. } = self.limits.layout else {
            panic!("trees need a unified cache")
        };
        self.leaves = Leaves::new(n_seqs, n_ids, self.limits.n_slots);
        self.stats.set_deepest(speculator.max_tokens_per_step() - 1);
        self.speculator = Some(speculator);
    }

    /// Lets answers come with what the model thought at each token. Its [`Forward`] must keep
    /// hidden states.
    pub fn trace_answers(&mut self) {
        self.traces = true;
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
        self.draft();
        self.fill_rows();
        if !self.work.rows.is_empty() {
            let started = Instant::now();
            self.stats.begin_pass(started);
            let ops = std::mem::take(&mut self.work.ops);
            match self.apply(&ops).and_then(|()| self.forward.forward(&self.work.rows)) {
                Ok(()) => self.commit(started),
                Err(error) => self.fail(&error),
            }
            self.work.ops = ops;
            self.stats.end_pass();
        }
        self.publish();
    }

    /// Gives waiting requests their places, in order; the first that does not fit keeps the rest
    /// waiting.
    fn admit(&mut self) {
        self.expire_waiting();
        while let Some(job) = self.waiting.front() {
            if job.events.is_closed() {
                self.waiting.pop_front();
                self.stats.count_end(Ended::Cancelled);
                continue;
            }
            let n_max = job.prompt.len() + job.n_generate(self.limits.n_ctx);
            let Some(place) = self.ledger.admit(&job.prompt, n_max, job.request.cache_prompt)
            else {
                return;
            };
            let job = self.waiting.pop_front().expect("it was at the front");
            if job.request.cache_prompt {
                self.stats.count_prefix(job.prompt.len(), place.n_cached);
            }
            let banned: &[Token] = if job.request.ignore_eos { &self.end_tokens } else { &[] };
            let sampler =
                Sampler::new(&job.request.sampling, banned, &job.prompt, self.forward.n_vocab());
            let ready = self.apply(&place.ops).and(sampler);
            let _of_request = span(&job.caller.id).entered();
            match ready {
                Ok(sampler) => {
                    let (seq, n_ctx) = (place.seq, self.limits.n_ctx);
                    tracing::debug!(
                        slot = seq.0,
                        n_prompt = job.prompt.len(),
                        n_cached = place.n_cached,
                        "admitted"
                    );
                    let mut sequence =
                        Sequence::new(job, sampler, seq, place.n_cached, self.n_admitted, n_ctx);
                    sequence.trace = self.traces.then(Trace::default);
                    if sequence.speculation.by_text()
                        && self.speculator.as_ref().is_some_and(Speculator::has_text)
                    {
                        sequence.index_text();
                    }
                    self.running[seq.0 as usize] = Some(sequence);
                    self.n_admitted += 1;
                }
                Err(error) => {
                    let id = IncidentId::new();
                    tracing::error!(%id, %error, "a request could not start");
                    let _ =
                        job.events.try_send(crate::request::Event::Failed { id: id.to_string() });
                    self.stats.count_end(Ended::Failed);
                    self.forget(place.seq);
                }
            }
        }
    }

    /// Ends waiting requests whose time is over.
    fn expire_waiting(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let is_over = |job: &Job| job.deadline().is_some_and(|deadline| deadline <= now);
        while let Some(i) = self.waiting.iter().position(is_over) {
            if let Some(job) = self.waiting.remove(i) {
                job.expire(now);
            }
            self.stats.count_end(Ended::Deadline);
        }
    }

    /// Fills the shares of the next step.
    fn plan(&mut self) {
        let work = &mut self.work;
        work.demands.clear();
        let demand = |s: &Sequence| Demand { seq: s.seq, n_pending: s.n_pending(), order: s.order };
        work.demands.extend(self.running.iter().flatten().map(demand));
        let n_decode = work.demands.iter().filter(|d| d.n_pending == 1).count();
        work.load = Load { n_decode, n_prompts: work.demands.len() - n_decode };
        let budget =
            Budget { n_batch: self.limits.n_batch, n_prefill: self.pace.n_prefill(work.load) };
        scheduler::plan(&work.demands, budget, &mut work.by_age, &mut work.shares);
    }

    /// Fills the trees of the next step, and what to do to the cache for them.
    fn draft(&mut self) {
        let work = &mut self.work;
        work.ops.clear();
        work.trees.iter_mut().for_each(Tree::clear);
        work.trees.resize_with(work.shares.len().max(work.trees.len()), Tree::default);
        work.leaf_ids.iter_mut().for_each(Vec::clear);
        work.leaf_ids.resize_with(work.trees.len(), Vec::new);
        let Some(speculator) = &mut self.speculator else { return };

        let sequence = |share: &Share| {
            self.running[share.seq.0 as usize].as_ref().expect("planned from the running ones")
        };
        let deepest = speculator.max_tokens_per_step() - 1;
        let origin = |share: &Share| {
            let s = sequence(share);
            let n_draftable =
                if share.to_end && share.n_rows == 1 { s.n_draftable().min(deepest) } else { 0 };
            Origin {
                seq: s.seq,
                hidden: s.hidden(),
                root: s.tokens[s.n_computed],
                max_depth: if s.hidden().is_empty() { 0 } else { n_draftable },
                trust: s.trust.heads.factor(),
                open: 1.0,
                text: s.text_origin(n_draftable).filter(|_| n_draftable > 0),
            }
        };
        let mut origins: Vec<Origin<'_>> = work.shares.iter().map(origin).collect();
        let n_rows: usize = work.shares.iter().map(|s| s.n_rows).sum();
        let n_decode = work.shares.iter().filter(|s| s.to_end && s.n_rows == 1).count();
        if !speculator.is_due(n_rows, n_decode)
            || origins.iter().all(|o| o.max_depth == 0 && o.text.is_none())
        {
            return;
        }
        let trees = &mut work.trees[..origins.len()];
        let started = Instant::now();
        speculator.draft(&mut origins, n_rows, n_decode, trees);
        for (share, tree) in work.shares.iter().zip(trees.iter_mut()) {
            let s = self.running[share.seq.0 as usize].as_mut();
            if let Some(grammar) = s.and_then(|s| s.grammar.as_mut()) {
                grammar.prune(tree);
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let n_offered = trees.iter().map(Tree::len).sum::<usize>();
        let n_free = self.ledger.make_room(n_rows + n_offered.min(MAX_NODES), &mut work.ops);
        let room = (self.limits.n_batch - n_rows).min(n_free.saturating_sub(n_rows));
        speculator.choose(trees, n_rows, n_decode, room, seconds);

        for ((share, tree), ids) in work.shares.iter().zip(trees).zip(&mut work.leaf_ids) {
            while tree.leaves_below(&mut work.below) > self.leaves.n_leaves() {
                tree.truncate(tree.len() - 1);
            }
            if !tree.is_empty() {
                let n_leaves = tree.leaves_below(&mut work.below);
                let n_computed =
                    self.running[share.seq.0 as usize].as_ref().map_or(0, |s| s.n_computed);
                self.leaves.lend(share.seq, n_leaves, n_computed, ids, &mut work.ops);
            }
        }
        let n_chosen = work.trees.iter().take(work.shares.len()).map(Tree::len).sum();
        self.stats.count_candidates(n_offered, n_chosen);
    }

    /// Fills the rows of the next step: each share's, and behind a decoding one's its tree's.
    fn fill_rows(&mut self) {
        let work = &mut self.work;
        work.rows.clear();
        for ((share, tree), ids) in work.shares.iter().zip(&work.trees).zip(&work.leaf_ids) {
            let s =
                self.running[share.seq.0 as usize].as_ref().expect("planned from the running ones");
            if tree.is_empty() {
                let last = s.n_computed + share.n_rows - 1;
                for pos in s.n_computed..=last {
                    work.rows.push(s.tokens[pos], pos, [s.seq], share.to_end && pos == last);
                }
                continue;
            }
            tree.leaves_below(&mut work.below);
            work.rows.push(s.tokens[s.n_computed], s.n_computed, ids.iter().copied(), true);
            for (node, below) in tree.nodes().iter().zip(work.below.lists()) {
                work.rows.push(
                    node.token,
                    s.n_computed + node.depth,
                    below.iter().map(|&leaf| ids[leaf]),
                    true,
                );
            }
        }
    }

    fn apply(&mut self, ops: &[KvOp]) -> Result<(), LlamaError> {
        ops.iter().try_for_each(|&op| self.forward.apply(op))
    }

    /// A step failed: what the cache holds of its sequences is not known, so they end. The others
    /// go on.
    fn fail(&mut self, error: &LlamaError) {
        let shares = std::mem::take(&mut self.work.shares);
        shares.iter().for_each(|share| self.fail_one(share.seq, error));
        self.work.shares = shares;
    }

    fn fail_one(&mut self, seq: SeqId, error: &dyn std::error::Error) {
        let id = IncidentId::new();
        let failed = self.running[seq.0 as usize].take();
        let _of_request = failed.as_ref().map(|s| span(&s.id).entered());
        tracing::error!(%id, %error, "a request failed in the engine");
        if let Some(mut s) = failed {
            s.fail(&id.to_string());
            self.stats.count_end(Ended::Failed);
        }
        self.forget(seq);
    }

    /// Ends a sequence whose cells cannot be trusted.
    fn forget(&mut self, seq: SeqId) {
        let mut ops = self.ledger.discard(seq);
        self.leaves.end(seq, &mut ops);
        if let Err(error) = self.apply(&ops) {
            tracing::error!(%error, "the cache refused to drop a sequence");
        }
    }

    fn publish(&self) {
        let running = self.ledger.n_active();
        self.stats.publish(
            running,
            self.waiting.len(),
            self.ledger.n_cells_active(),
            self.ledger.n_cells_retained(),
        );
        if let Some(speculator) = &self.speculator {
            self.stats.publish_reliability(speculator.reliability());
        }
    }

    /// Checks the ledger and that it knows the same sequences as the loop. For tests.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_integrity(&self) {
        self.ledger.check_integrity();
        assert_eq!(self.running.iter().flatten().count(), self.ledger.n_active());
    }

    /// Checks that an idle engine holds no sequence, no cell but retained ones, and no lent id. For
    /// tests.
    ///
    /// # Panics
    /// When it does.
    pub fn check_nothing_left(&self) {
        assert!(self.is_idle() && self.ledger.n_cells_active() == 0);
        assert!(self.leaves.is_whole(), "every block of ids came back");
    }
}
