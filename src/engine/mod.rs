//! The engine: one thread, one context, one loop. Requests join and leave at every step.
//!
//! A step is: admit (in `admission`), plan, draft, forward, commit (in `commit`). Each sequence that takes part has a
//! `Turn`. [`slots`] records who holds which cells, [`leaves`] lends ids to trees, `scheduler` picks
//! the next rows, [`sampler`] the next token, `text` what of it may be shown; `pool` makes a prompt's
//! embedding; `pace` and `bursts` limit how long things take; `sharing` sets the threads of a pass, by `thread_count`; [`speculate`](crate::speculate) drafts.
//! They are pure: only this file, `admission`, `commit`, `grammar` and `sharing` read a clock, and only [`forward`] calls
//! llama.cpp. [`stats`] counts. Before the loop, `load` loads a model in the sizes that [`plan`] makes
//! of the memory there is.

mod admission;
mod bursts;
mod closing;
mod commit;
mod digits;
pub mod drafts;
pub mod dry;
pub mod filter;
pub mod forward;
mod gbnf;
pub mod grammar;
pub mod guide;
pub mod handle;
mod lanes;
pub mod leaves;
mod load;
pub mod offload;
mod pace;
pub mod plan;
mod pool;
pub mod prefix;
mod rate;
pub(crate) mod report;
pub mod sampler;
mod saving;
mod scheduler;
mod sequence;
mod sharing;
pub mod slots;
pub mod stats;
pub(crate) mod text;
pub mod thread;
mod thread_count;
mod turn;
mod walk;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

pub use forward::{Forward, LlamaForward, Row, Rows, StepError};
pub use handle::{Answer, Failed, Handle, SubmitError};
pub use load::{EngineParams, fits};
pub use rate::Rate;
pub use sequence::Job;
pub use slots::Layout;
pub use thread::{EngineThread, Stage, spawn, spawn_after};

use crate::error::incident_id;
use crate::llama::{SeqId, Token};
use crate::prefixes::Prefixes;
use crate::request::{Event, span};
use crate::speculate::device::{OutputRow, Verified};
use crate::speculate::speculator::Verifying;
use crate::speculate::tree::Below;
use crate::speculate::{MAX_NODES, Origin, Speculator};
use leaves::Leaves;
use pace::{Load, Pace};
use saving::Saving;
use scheduler::{Budget, Demand, PromptRows, Share};
use sequence::Sequence;
use slots::{KvOp, Slots};
use stats::{Ended, Stats};
use turn::{RowRange, Turn};
use walk::Choosing;

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

/// Tokens that an answer without a limit of its own may have where cells are few.
pub const UNLIMITED: usize = 2048;

impl Limits {
    /// Most tokens of an answer to a prompt of `n_prompt` tokens that nobody limited: up to a slot's
    /// part of a pool that has less than a context for each, so that such requests still run
    /// together, but at least [`UNLIMITED`].
    pub fn longest_answer(&self, n_prompt: usize) -> usize {
        let of_slot = (self.n_cells() / self.n_slots).saturating_sub(n_prompt);
        of_slot.max(UNLIMITED).min(self.n_ctx - n_prompt)
    }

    /// Cells of layers with a window: the last tokens of each sequence and what its leaves are behind,
    /// and the rows of a step. `None`: such layers have as many as others.
    pub fn n_window_cells(&self) -> Option<usize> {
        match self.layout {
            Layout::States { n_seqs, window, .. } if window > 0 => {
                Some(n_seqs * (window + leaves::FAR_BEHIND) + self.n_batch)
            }
            _ => None,
        }
    }

    /// Cells of the whole cache.
    pub fn n_cells(&self) -> usize {
        match self.layout {
            Layout::Unified { n_cells, .. } | Layout::States { n_cells, .. } => n_cells,
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
    running: BTreeMap<SeqId, Sequence>,
    n_admitted: u64,
    pace: Pace,
    speculator: Option<Speculator>,
    leaves: Leaves,
    /// What outlives the cache; `None`: nothing does.
    saving: Option<Saving>,
    /// Answers come with hidden states and logits.
    traces: bool,
    /// End-of-text tokens, for requests that ignore them.
    end_tokens: Vec<Token>,
    stats: Arc<Stats>,
    turns: Vec<Turn>,
    work: Work,
}

/// Buffers that keep their memory from step to step.
#[derive(Default)]
struct Work {
    demands: Vec<Demand>,
    load: Load,
    /// Of the step.
    prompts: PromptRows,
    by_age: Vec<Demand>,
    shares: Vec<Share>,
    below: Below,
    rows: Rows,
    /// Before the pass, and after it.
    ops: Vec<KvOp>,
    /// What the device is asked, and the tokens it chose, by output row; empty if it chose none.
    outputs: Vec<OutputRow>,
    verified: Vec<Verified>,
    chosen: Vec<i32>,
    choosing: Choosing,
}

impl<F: Forward> Engine<F> {
    /// An engine without requests.
    pub fn new(forward: F, limits: Limits, stats: Arc<Stats>) -> Self {
        let end_tokens =
            (0..forward.n_vocab() as i32).map(Token).filter(|&t| forward.is_end(t)).collect();
        Self {
            ledger: Slots::new(limits.layout, limits.n_slots),
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            n_admitted: 0,
            pace: Pace::new(limits.n_prefill),
            speculator: None,
            leaves: Leaves::new(0, 0, 0),
            saving: None,
            traces: false,
            end_tokens,
            stats,
            turns: Vec::new(),
            work: Work::default(),
            forward,
            limits,
        }
    }

    /// Lets trees be drafted and verified, or chains of a model that keeps states, with the sequence ids after the layout's own up to
    /// `n_ids` for their leaves.
    ///
    /// # Panics
    /// In streams, which cannot hold trees.
    pub fn speculate(&mut self, speculator: Speculator, n_ids: usize) {
        let (Layout::Unified { n_seqs, .. } | Layout::States { n_seqs, .. }) = self.limits.layout
        else {
            panic!("trees need a unified cache")
        };
        self.leaves = Leaves::new(n_seqs, n_ids, self.limits.n_slots);
        self.stats.set_deepest(speculator.max_tokens_per_step - 1);
        self.speculator = Some(speculator);
    }

    /// Records hidden states and logits for each token, to come with the answer. The [`Forward`]
    /// must keep hidden states.
    pub fn trace_answers(&mut self) {
        self.traces = true;
    }

    /// Keeps prefixes beside the cache.
    ///
    /// # Panics
    /// In layouts where a sequence has more than cells that any other may share.
    pub fn keep_prefixes(&mut self, prefixes: Arc<Prefixes>) {
        assert!(matches!(self.limits.layout, Layout::Unified { .. }), "blocks are of a pool");
        self.saving = Some(Saving::new(prefixes));
    }

    /// Where prefixes are kept beside the cache.
    pub fn prefixes(&self) -> Option<&Prefixes> {
        self.saving.as_ref().map(Saving::prefixes)
    }

    /// Saves a block of an ended sequence's cells, if one is to be saved. Returns whether there may be
    /// more to do.
    pub fn save_block(&mut self) -> bool {
        let Self { saving, ledger, forward, stats, .. } = self;
        saving.as_mut().is_some_and(|saving| saving.save(ledger, forward, stats))
    }

    /// Takes a request into the queue.
    pub fn enqueue(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// `true` without a request to work on.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// `true` if no slot is left for another request.
    pub fn is_full(&self) -> bool {
        self.waiting.len() + self.running.len() >= self.limits.n_slots
    }

    /// Admits what fits, computes one batch of rows, and hands out the results.
    pub fn step(&mut self) {
        self.admit();
        let mut turns = std::mem::take(&mut self.turns); // back below, for the next step
        self.plan(&mut turns);
        let round = self.draft(&mut turns);
        self.fill_rows(&mut turns);
        if !self.work.rows.is_empty() {
            let started = Instant::now();
            *self.stats.pass_began.lock() = Some(started);
            self.stats.steps.inc(); // before answers are sent, as all that they are counted in
            match self.forward() {
                Ok(()) => self.commit(&mut turns, round, started),
                // What the cache holds of these sequences is unknown, so they end.
                Err(error) => turns.iter().for_each(|turn| self.fail(turn.share.seq, &error)),
            }
            *self.stats.pass_began.lock() = None;
        }
        self.turns = turns;
        self.save_block(); // one, however many there are: streams must not wait for it
        self.publish();
    }

    /// Begins the turns of the next step.
    fn plan(&mut self, turns: &mut Vec<Turn>) {
        let work = &mut self.work;
        work.demands.clear();
        let demand = |s: &Sequence| Demand {
            seq: s.seq,
            n_computed: s.n_computed,
            n_pending: s.n_pending(),
            n_most: s.keep.front().map_or(usize::MAX, |stop| stop - s.n_computed),
            reads: s.job.request.reads_prompt(),
            order: s.order,
        };
        work.demands.extend(self.running.values().map(demand));
        let n_decode = work.demands.iter().filter(|d| d.decodes()).count();
        work.load = Load { n_decode, n_prompts: work.demands.len() - n_decode };
        let budget = Budget { n_batch: self.limits.n_batch, prefill: self.pace.prefill(work.load) };
        work.prompts = scheduler::plan(&work.demands, budget, &mut work.by_age, &mut work.shares);
        turns.resize_with(work.shares.len(), Turn::default);
        turns.iter_mut().zip(&work.shares).for_each(|(turn, share)| turn.begin(*share));
    }

    /// Fills the trees of the next step, and what to do to the cache for them.
    fn draft(&mut self, turns: &mut [Turn]) -> Option<Verifying> {
        let Self { forward, running, work, leaves, .. } = self;
        work.ops.clear();
        let speculator = self.speculator.as_mut()?;
        let deepest = speculator.max_tokens_per_step - 1;
        let n_rows: usize = turns.iter().map(|turn| turn.share.n_rows).sum();
        let guided = |turn: &Turn| {
            let s = &running[&turn.share.seq];
            turn.share.decodes() && s.job.guide.is_some() && s.draft_depth(deepest) > 0
        };
        let is_guided = turns.iter().any(guided);
        let drafting = speculator.begin(n_rows, n_decode(turns), is_guided);
        let origin = |Turn { share, .. }: &Turn| {
            running[&share.seq].origin(if share.decodes() { deepest } else { 0 })
        };
        let mut origins: Vec<Origin<'_>> = turns.iter().map(origin).collect();
        let has_source = origins
            .iter()
            .any(|o| o.heads.max_depth > 0 || o.model.max_depth > 0 || o.text.is_some());
        if !drafting.is_due || !(has_source || is_guided) {
            return Some(drafting.skip());
        }
        let started = Instant::now();
        let drafted = drafting.draft(&mut origins, turns, || started.elapsed().as_secs_f64());
        for turn in turns.iter_mut().filter(|turn| turn.share.decodes()) {
            let Some(s) = running.get_mut(&turn.share.seq) else { continue };
            let depth = s.draft_depth(deepest);
            let Job { guide: Some(guide), shown, .. } = &mut s.job else { continue };
            guide.prepare(&mut turn.tree, depth, &|token, out| {
                forward.piece(token, shown.contains(&token), out);
            });
        }
        let has_states = self.limits.layout.has_states();
        if has_states {
            turns.iter_mut().for_each(|turn| turn.tree.keep_path()); // a state has one past
        }
        let seconds = started.elapsed().as_secs_f64();
        let n_proposed: usize = turns.iter().map(|turn| turn.tree.len()).sum();
        let n_free = self.ledger.make_room(n_rows + n_proposed.min(MAX_NODES), &mut work.ops);
        let room = (self.limits.n_batch - n_rows).min(n_free.saturating_sub(n_rows));
        let round = drafted.choose(turns, room, seconds);
        if has_states {
            // A pass takes equally many rows of each sequence; more would be further passes.
            let n = turns.iter().map(|turn| turn.tree.len()).min().unwrap_or(0);
            turns.iter_mut().for_each(|turn| turn.tree.cut(n));
        }
        for Turn { share, tree, leaves: ids, .. } in turns.iter_mut() {
            while tree.leaves_below(&mut work.below) > leaves.n_leaves() {
                tree.cut(tree.len() - 1);
            }
            if !tree.is_empty() {
                let n_leaves = tree.leaves_below(&mut work.below);
                leaves.lend(
                    share.seq,
                    n_leaves,
                    running[&share.seq].n_computed,
                    ids,
                    &mut work.ops,
                );
            }
        }
        self.stats.offered.inc_by(n_proposed as u64);
        self.stats.chosen.inc_by(turns.iter().map(|turn| turn.tree.len() as u64).sum());
        Some(round)
    }

    /// Fills the rows of the next step: each share's, and after a decoding one's its tree's.
    fn fill_rows(&mut self, turns: &mut [Turn]) {
        let Work { rows, below, .. } = &mut self.work;
        rows.clear();
        let mut n_outputs = 0;
        for turn in turns {
            let Turn { share, tree, leaves, .. } = turn;
            let s = &self.running[&share.seq];
            let end = s.n_computed + share.n_rows;
            turn.rows = RowRange(rows.len() + share.n_rows - 1);
            let last = s.job.prompt.len() - 1;
            let is_read = |pos: usize| pos < last && s.reads(pos);
            turn.n_read = (s.n_computed..end).filter(|&pos| is_read(pos)).count();
            n_outputs += turn.n_read;
            turn.outputs = RowRange(n_outputs);
            n_outputs += if share.to_end { 1 + tree.len() } else { 0 };
            if tree.is_empty() {
                for pos in s.n_computed..end {
                    let is_last = share.to_end && pos + 1 == end;
                    rows.push(s.tokens[pos], pos, [s.seq], is_last || is_read(pos));
                }
                continue;
            }
            tree.leaves_below(below);
            rows.push(s.tokens[s.n_computed], s.n_computed, leaves.iter().copied(), true);
            for (node, below) in tree.nodes().iter().zip(below.lists()) {
                let ids = below.iter().map(|&leaf| leaves[leaf]);
                rows.push(node.token, s.n_computed + node.depth, ids, true);
            }
        }
    }

    fn forward(&mut self) -> Result<(), StepError> {
        apply(&mut self.forward, &self.work.ops)?;
        self.forward.forward(&self.work.rows)
    }

    /// Ends a sequence that cannot go on. The others do.
    fn fail(&mut self, seq: SeqId, error: &StepError) {
        if let Some(s) = self.running.remove(&seq) {
            self.fail_job(s.job, seq, error);
        }
    }

    /// Ends a job whose cells, on `seq`, cannot be trusted.
    fn fail_job(&mut self, mut job: Job, seq: SeqId, error: &StepError) {
        let id = incident_id();
        let _of_request = span(&job.caller.id).entered();
        tracing::error!(id, %error, "a request failed in the engine");
        self.stats.count_end(Ended::Failed);
        let ops = self.ledger.discard(seq);
        self.publish_load();
        job.end(Event::Failed { id });
        self.free(seq, ops);
    }

    /// Does `ops` to the cache, and frees the leaves of `seq`.
    fn free(&mut self, seq: SeqId, mut ops: Vec<KvOp>) {
        self.leaves.end(seq, &mut ops);
        if let Err(error) = apply(&mut self.forward, &ops) {
            tracing::error!(%error, "the cache refused to drop a sequence");
        }
    }

    fn publish_load(&self) {
        self.stats.running.set(self.running.len() as i64);
        self.stats.waiting.set(self.waiting.len() as i64);
        self.stats.cells_active.set(self.ledger.n_cells_active() as i64);
        self.stats.cells_retained.set(self.ledger.n_cells_retained() as i64);
    }

    fn publish(&self) {
        self.publish_load();
        if let Some(speculator) = &self.speculator {
            self.stats.reliability.lock().clone_from(&speculator.reliability);
        }
    }

    /// Checks the ledger and that it knows the same sequences as the loop. For tests.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_integrity(&self) {
        self.ledger.check_integrity();
        assert_eq!(self.running.len(), self.ledger.n_active());
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

fn apply<F: Forward>(forward: &mut F, ops: &[KvOp]) -> Result<(), StepError> {
    ops.iter().try_for_each(|&op| forward.apply(op))
}

/// How many of the turns are decoding sequences'.
fn n_decode(turns: &[Turn]) -> usize {
    turns.iter().filter(|turn| turn.share.decodes()).count()
}
