//! The ledger of KV cells and sequence ids: which sequence holds which cells, what a prompt may
//! reuse, whether one more request fits. Pure: it only says what to do to the cache ([`KvOp`]).
//!
//! A sequence id is *free*, *active* (a request computes on it) or *retained* (a finished request's
//! cells, kept because a later prompt may begin alike). A request is admitted only when the cache
//! holds all it may come to need, so a running request never runs out of cells; retained prefixes
//! go first, the least recently used one first.
//!
//! - [`Layout::Unified`]: one pool of cells, and a cell may belong to several sequences. A prompt
//!   that begins like any other sequence, running or retained, shares its cells; nothing is copied.
//! - [`Layout::States`]: the same for a model that keeps a state of each sequence, beside cells or
//!   instead of them. A state holds all tokens that went into it, so a prompt reuses another
//!   sequence's tokens all together or not at all. While a prompt is read its state is kept where
//!   later prompts will part from it ([`Admission::keep`]). A cache whose layers keep a window of the
//!   last tokens is used in the same way.
//! - [`Layout::Streams`]: each id owns its cells. A prompt reuses only what is on the id it is
//!   given.

use crate::llama::{SeqId, Token};

/// How the cache is divided. A start-time choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One pool.
    Unified {
        /// Cells in it.
        n_cells: usize,
        /// Most cells that only retained sequences hold: each row reads the mask of every used cell.
        n_retained: usize,
        /// Sequence ids, for active and retained sequences together.
        n_seqs: usize,
    },
    /// One pool, in which a sequence is continued only from where it ends: there is a state for each
    /// sequence id, or some layers keep only the last tokens.
    States {
        /// Cells in the pool.
        n_cells: usize,
        /// Most cells that only retained sequences hold.
        n_retained: usize,
        /// Sequence ids, for active and retained sequences together.
        n_seqs: usize,
        /// Tokens that layers with a window keep; 0: there are states.
        window: usize,
    },
    /// One stream per sequence id.
    Streams {
        /// Cells of each.
        n_cells: usize,
    },
}

impl Layout {
    /// `true` if there is a state of each sequence, which cannot be taken back at will.
    #[must_use]
    pub fn has_states(self) -> bool {
        matches!(self, Self::States { window: 0, .. })
    }

    /// `true` if cells may belong to several sequences.
    #[must_use]
    pub fn is_pool(self) -> bool {
        !matches!(self, Self::Streams { .. })
    }
}

/// What to do to the cache, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvOp {
    /// Take `seq` off its cells from position `from` on.
    Remove {
        /// Whose.
        seq: SeqId,
        /// First position to go.
        from: usize,
    },
    /// Put `to` on the cells of `from` at positions `start..end` as well.
    Share {
        /// Who has them.
        from: SeqId,
        /// Who gets them.
        to: SeqId,
        /// First position.
        start: usize,
        /// After the last one.
        end: usize,
    },
}

/// A place for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its sequence id.
    pub seq: SeqId,
    /// Tokens of the prompt that are cached already: never the last one, whose logits are needed.
    pub n_cached: usize,
    /// To be done before the next forward pass.
    pub ops: Vec<KvOp>,
    /// Numbers of computed tokens at which its state is to be [kept](Slots::keep), ascending; none
    /// in other layouts than [`Layout::States`].
    pub keep: Vec<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    /// May grow to this many cells.
    Active(usize),
    /// Last used at this tick.
    Retained(u64),
}

#[derive(Clone, Debug, Default)]
struct Seq {
    state: State,
    /// What is cached, by position.
    tokens: Vec<Token>,
    /// The cell of each position; the numbers are ours, llama.cpp's differ.
    cells: Vec<u32>,
    /// Its state went further and was taken back, so that only itself can go on from it.
    is_taken_back: bool,
}

/// The ledger.
#[derive(Debug)]
pub struct Slots {
    layout: Layout,
    n_slots: usize,
    seqs: Vec<Seq>,
    pool: Pool,
    tick: u64,
}

/// A prompt must share this many tokens with a stream to be given it for that; otherwise the lowest
/// id is better, since only streams whose ids follow on one another are computed together.
const MIN_STREAM_REUSE: usize = 16;

/// A state is kept only where it spares a later prompt at least so many tokens: it takes a step that
/// ends there, and room that another one could have.
const MIN_KEPT: usize = 64;

/// Tokens of a prompt after the place where its state is kept. The next turn of a talk often parts
/// from this one where the answer begins: chat templates end a prompt with a few tokens that they
/// write in another way before an earlier answer.
const BEFORE_ANSWER: usize = 8;

impl Slots {
    /// An empty cache for at most `n_slots` active sequences.
    ///
    /// # Panics
    /// When the layout has fewer sequence ids than slots.
    pub fn new(layout: Layout, n_slots: usize) -> Self {
        let (n_seqs, n_pool) = match layout {
            Layout::Unified { n_cells, n_seqs, .. } | Layout::States { n_cells, n_seqs, .. } => {
                (n_seqs, n_cells)
            }
            Layout::Streams { n_cells } => (n_slots, n_slots * n_cells),
        };
        assert!(n_seqs >= n_slots, "every slot needs a sequence id");
        let seqs = vec![Seq::default(); n_seqs];
        Self { layout, n_slots, seqs, pool: Pool::new(n_pool), tick: 0 }
    }

    /// Number of active sequences.
    pub fn n_active(&self) -> usize {
        self.seqs.iter().filter(|s| s.is_active()).count()
    }

    /// Cells that active sequences hold.
    pub fn n_cells_active(&self) -> usize {
        self.pool.n_active
    }

    /// Cells that only retained sequences hold.
    pub fn n_cells_retained(&self) -> usize {
        self.pool.holders.len() - self.pool.free.len() - self.pool.n_active
    }

    /// Frees retained sequences until `n` cells are free, as far as that goes. Returns how many
    /// are: 0 in streams, where none can be borrowed.
    pub fn make_room(&mut self, n: usize, ops: &mut Vec<KvOp>) -> usize {
        if !self.layout.is_pool() {
            return 0;
        }
        self.evict_while(|s| s.pool.free.len() < n, ops);
        self.pool.free.len()
    }

    /// Finds a place for a prompt that may grow to `n_max` cells; with `reuse`, where its beginning
    /// is cached. `None`: not now; try again after a [`release`].
    ///
    /// [`release`]: Slots::release
    ///
    /// # Panics
    /// For an empty prompt, or an `n_max` below its length or above what an empty cache holds.
    pub fn admit(&mut self, prompt: &[Token], n_max: usize, reuse: bool) -> Option<Admission> {
        let (Layout::Unified { n_cells, .. }
        | Layout::States { n_cells, .. }
        | Layout::Streams { n_cells }) = self.layout;
        assert!(
            !prompt.is_empty() && (prompt.len()..=n_cells).contains(&n_max),
            "requests are checked against the context"
        );
        if self.n_active() == self.n_slots {
            return None;
        }
        let reusable = if reuse { &prompt[..prompt.len() - 1] } else { &[] };
        match self.layout {
            Layout::Unified { .. } => self.admit_to_pool(reusable, n_max),
            Layout::States { .. } => {
                let keep = self.stops(prompt, reusable);
                self.admit_to_pool(reusable, n_max).map(|place| Admission { keep, ..place })
            }
            Layout::Streams { .. } => Some(self.admit_stream(reusable, n_max)),
        }
    }

    fn admit_stream(&mut self, reusable: &[Token], n_max: usize) -> Admission {
        let idle = || self.seqs.iter().enumerate().filter(|(_, s)| !s.is_active());
        let (best, n) = idle()
            .map(|(i, s)| (i, s.common_prefix(reusable)))
            .max_by_key(|&(i, n)| (n, std::cmp::Reverse(i)))
            .expect("an idle stream: fewer are active than there are slots");
        let lowest = idle().next().expect("as above").0;
        let (index, n_cached) = if n >= MIN_STREAM_REUSE {
            (best, n)
        } else {
            (lowest, self.seqs[lowest].common_prefix(reusable))
        };

        let mut ops = Vec::new();
        self.truncate(index, n_cached, &mut ops);
        self.set_state(index, State::Active(n_max));
        Admission { seq: SeqId(index as u32), n_cached, ops, keep: vec![] }
    }

    fn admit_to_pool(&mut self, reusable: &[Token], n_max: usize) -> Option<Admission> {
        let (source, n_cached) = (self.seqs.iter().enumerate())
            .map(|(i, s)| (i, self.reused_prefix(s, reusable)))
            .max_by_key(|&(i, n)| (n, std::cmp::Reverse(i)))
            .expect("there are sequence ids");
        let shared = &self.seqs[source].cells[..n_cached];
        let n_new = n_max - n_cached + self.pool.n_inactive(shared);
        if self.pool.n_active + self.n_promised() + n_new > self.pool.holders.len() {
            return None;
        }

        let mut ops = Vec::new();
        // The source's own id, if nothing would be lost: neither cells beyond the shared part, nor
        // a state to which others may return.
        let &Seq { ref state, ref tokens, is_taken_back, .. } = &self.seqs[source];
        let is_whole = matches!(state, State::Retained(_)) && n_cached == tokens.len();
        let takes_over = is_whole && (is_taken_back || !self.layout.has_states());
        let index = if takes_over { source } else { self.id_for_new(source)? };
        self.truncate(index, if index == source { n_cached } else { 0 }, &mut ops);
        if index != source && n_cached > 0 {
            self.share(source, index, n_cached, &mut ops);
            self.touch(source);
        }
        self.set_state(index, State::Active(n_max));
        let promised = self.n_promised();
        self.evict_while(|s| s.pool.free.len() < promised, &mut ops);
        Some(Admission { seq: SeqId(index as u32), n_cached, ops, keep: vec![] })
    }

    /// Tokens at the beginning of `reusable` that a sequence can give: a state gives all or none, and
    /// so does a window that has left its beginning.
    fn reused_prefix(&self, seq: &Seq, reusable: &[Token]) -> usize {
        let n = seq.common_prefix(reusable);
        let Layout::States { window, .. } = self.layout else { return n };
        let has_left = n < seq.tokens.len() && seq.tokens.len() >= window;
        if has_left || (seq.is_taken_back && seq.is_active()) { 0 } else { n }
    }

    /// Where the state of a prompt is to be kept: where it parts from another sequence, since a
    /// third may begin like both, and shortly before its end.
    fn stops(&self, prompt: &[Token], reusable: &[Token]) -> Vec<usize> {
        if reusable.is_empty() {
            return vec![];
        }
        let cached = self.seqs.iter().map(|s| self.reused_prefix(s, reusable)).max().unwrap_or(0);
        let parting = self.seqs.iter().map(|s| s.common_prefix(reusable)).max().unwrap_or(0);
        let mut stops = vec![];
        for stop in [parting, prompt.len().saturating_sub(BEFORE_ANSWER)] {
            if stop >= stops.last().unwrap_or(&cached) + MIN_KEPT {
                stops.push(stop);
            }
        }
        stops
    }

    /// Keeps the state of an active sequence as it is now, for prompts that begin with its tokens.
    /// Says what to do to the cache: nothing if such a state is kept already, or all ids are in use.
    pub fn keep(&mut self, seq: SeqId) -> Vec<KvOp> {
        let (from, mut ops) = (seq.0 as usize, vec![]);
        let tokens = &self.seqs[from].tokens;
        let is_kept = |s: &Seq| !s.is_active() && !s.is_taken_back && s.tokens == *tokens;
        if let Some(index) = self.seqs.iter().position(is_kept) {
            self.touch(index);
        } else if let Some(index) = self.id_for_new(from) {
            self.truncate(index, 0, &mut ops);
            self.share(from, index, self.seqs[from].tokens.len(), &mut ops);
            self.seqs[index].state = State::Retained(self.tick);
            self.touch(index);
            self.evict_surplus(&mut ops);
        }
        ops
    }

    /// A retained sequence was used.
    fn touch(&mut self, index: usize) {
        if let State::Retained(tick) = &mut self.seqs[index].state {
            self.tick += 1;
            *tick = self.tick;
        }
    }

    /// A free id, or that of the retained sequence used longest ago, `source` only if there is no
    /// other.
    fn id_for_new(&self, source: usize) -> Option<usize> {
        let rank = |(i, s): (usize, &Seq)| match s.state {
            State::Free => Some((false, 0, i)),
            State::Retained(tick) => Some((i == source, tick + 1, i)),
            State::Active(_) => None,
        };
        self.seqs.iter().enumerate().filter_map(rank).min().map(|(_, _, i)| i)
    }

    /// Records that these tokens were computed and cached for an active sequence.
    ///
    /// # Panics
    /// When the sequence is not active, or grows beyond what it was admitted for.
    pub fn push(&mut self, seq: SeqId, tokens: &[Token]) {
        let s = &mut self.seqs[seq.0 as usize];
        let State::Active(n_max) = s.state else { panic!("only active sequences grow") };
        let n = s.tokens.len() + tokens.len();
        assert!(n <= n_max, "a sequence keeps to what it was admitted for");
        s.is_taken_back &= tokens.is_empty();
        s.tokens.extend_from_slice(tokens);
        s.cells.extend(tokens.iter().map(|_| self.pool.take()));
    }

    /// `true` if a sequence, active or retained, begins with these tokens.
    pub fn holds(&self, seq: SeqId, tokens: &[Token]) -> bool {
        self.seqs[seq.0 as usize].tokens.starts_with(tokens)
    }

    /// `true` if fewer cells than half of the pool are free, so that retained ones may go soon.
    pub fn is_scarce(&self) -> bool {
        2 * self.pool.free.len() < self.pool.holders.len()
    }

    /// Records that a sequence computed more than was [pushed](Self::push), which was dropped.
    pub fn take_back(&mut self, seq: SeqId) {
        self.seqs[seq.0 as usize].is_taken_back = true;
    }

    /// Ends an active sequence. Its cells are retained for later prompts as far as the layout
    /// allows.
    pub fn release(&mut self, seq: SeqId) -> Vec<KvOp> {
        self.tick += 1;
        let is_empty = self.seqs[seq.0 as usize].tokens.is_empty();
        let state = if is_empty { State::Free } else { State::Retained(self.tick) };
        self.set_state(seq.0 as usize, state);
        let mut ops = Vec::new();
        self.evict_surplus(&mut ops);
        ops
    }

    /// Ends an active sequence and forgets its cells: what they hold is not known.
    pub fn discard(&mut self, seq: SeqId) -> Vec<KvOp> {
        // Even if none is recorded here: a failed step may have left some.
        let mut ops = vec![KvOp::Remove { seq, from: 0 }];
        self.truncate(seq.0 as usize, 0, &mut Vec::new());
        self.set_state(seq.0 as usize, State::Free);
        self.evict_surplus(&mut ops);
        ops
    }

    /// Keeps to the layout's limit of retained cells. A cell may become one whenever an active
    /// holder goes.
    fn evict_surplus(&mut self, ops: &mut Vec<KvOp>) {
        if let Layout::Unified { n_retained, .. } | Layout::States { n_retained, .. } = self.layout
        {
            self.evict_while(|s| s.n_cells_retained() > n_retained, ops);
        }
    }

    /// Cells that active sequences may still take.
    fn n_promised(&self) -> usize {
        let promised = |s: &Seq| match s.state {
            State::Active(n_max) => n_max - s.tokens.len(),
            State::Free | State::Retained(_) => 0,
        };
        self.seqs.iter().map(promised).sum()
    }

    /// Frees retained sequences, the one used longest ago first, while `more` asks for it.
    fn evict_while(&mut self, more: impl Fn(&Self) -> bool, ops: &mut Vec<KvOp>) {
        while more(self) {
            let retained = |(i, s): (usize, &Seq)| match s.state {
                State::Retained(tick) => Some((tick, i)),
                State::Free | State::Active(_) => None,
            };
            let oldest = self.seqs.iter().enumerate().filter_map(retained).min();
            let Some((_, index)) = oldest else { return };
            self.truncate(index, 0, ops);
            self.set_state(index, State::Free);
        }
    }

    /// Shortens a sequence to `n` cells.
    fn truncate(&mut self, index: usize, n: usize, ops: &mut Vec<KvOp>) {
        let seq = &mut self.seqs[index];
        seq.is_taken_back &= n > 0;
        if seq.tokens.len() > n {
            ops.push(KvOp::Remove { seq: SeqId(index as u32), from: n });
        }
        seq.tokens.truncate(n);
        let active = seq.is_active();
        // From the last one, so that the free cells keep their order.
        seq.cells.drain(n.min(seq.cells.len())..).rev().for_each(|c| self.pool.put_back(c, active));
    }

    /// Lets the empty sequence `to` share the first `n` cells of `from`.
    fn share(&mut self, from: usize, to: usize, n: usize, ops: &mut Vec<KvOp>) {
        let (tokens, cells) =
            (self.seqs[from].tokens[..n].to_vec(), self.seqs[from].cells[..n].to_vec());
        let active = self.seqs[to].is_active();
        cells.iter().for_each(|&cell| self.pool.add(cell, active));
        (self.seqs[to].tokens, self.seqs[to].cells) = (tokens, cells);
        ops.push(KvOp::Share { from: SeqId(from as u32), to: SeqId(to as u32), start: 0, end: n });
    }

    fn set_state(&mut self, index: usize, state: State) {
        let seq = &mut self.seqs[index];
        let (was, is) = (seq.is_active(), matches!(state, State::Active(_)));
        if was != is {
            seq.cells.iter().for_each(|&cell| self.pool.change(cell, is));
        }
        seq.state = state;
    }

    /// Checks every invariant by counting anew. For tests.
    ///
    /// # Panics
    /// When one does not hold.
    pub fn check_integrity(&self) {
        assert!(self.n_active() <= self.n_slots);
        for seq in &self.seqs {
            match seq.state {
                State::Free => assert!(seq.tokens.is_empty(), "a free sequence holds nothing"),
                State::Active(n_max) => assert!(seq.tokens.len() <= n_max),
                State::Retained(_) => {}
            }
        }
        if let Layout::Streams { n_cells } = self.layout {
            assert!(self.seqs.iter().all(|s| s.tokens.len() <= n_cells));
        }
        assert!(self.seqs.iter().all(|s| s.cells.len() == s.tokens.len()), "a cell per token");
        self.pool.check_integrity(self.seqs.iter().map(|s| (s.is_active(), s.cells.as_slice())));
        assert!(self.pool.free.len() >= self.n_promised(), "what was promised is there");
    }
}

impl Seq {
    fn is_active(&self) -> bool {
        matches!(self.state, State::Active(_))
    }

    /// Tokens at the beginning of `reusable` that are cached here.
    fn common_prefix(&self, reusable: &[Token]) -> usize {
        self.tokens.iter().zip(reusable).take_while(|(a, b)| a == b).count()
    }
}

/// Cells with a count of the sequences that hold each.
#[derive(Debug)]
struct Pool {
    /// Active and retained holders of each cell.
    holders: Vec<[u16; 2]>,
    free: Vec<u32>,
    /// Cells with at least one active holder.
    n_active: usize,
}

impl Pool {
    fn new(n: usize) -> Self {
        let n = u32::try_from(n).expect("a cache of fewer than 2^32 cells");
        Self { holders: vec![[0; 2]; n as usize], free: (0..n).rev().collect(), n_active: 0 }
    }

    /// How many of these cells have no active holder.
    fn n_inactive(&self, cells: &[u32]) -> usize {
        cells.iter().filter(|&&c| self.holders[c as usize][0] == 0).count()
    }

    /// A free cell for an active sequence.
    fn take(&mut self) -> u32 {
        let cell = self.free.pop().expect("admission promised it");
        self.add(cell, true);
        cell
    }

    fn add(&mut self, cell: u32, active: bool) {
        let holders = &mut self.holders[cell as usize];
        holders[usize::from(!active)] += 1;
        self.n_active += usize::from(active && holders[0] == 1);
    }

    fn remove(&mut self, cell: u32, active: bool) {
        let holders = &mut self.holders[cell as usize];
        holders[usize::from(!active)] -= 1;
        self.n_active -= usize::from(active && holders[0] == 0);
    }

    fn put_back(&mut self, cell: u32, active: bool) {
        self.remove(cell, active);
        if self.holders[cell as usize] == [0, 0] {
            self.free.push(cell);
        }
    }

    /// A holder became active, or stopped being so.
    fn change(&mut self, cell: u32, active: bool) {
        self.add(cell, active);
        self.remove(cell, !active);
    }

    fn check_integrity<'a>(&self, held: impl Iterator<Item = (bool, &'a [u32])>) {
        let mut counted = vec![[0u16; 2]; self.holders.len()];
        held.for_each(|(active, cells)| {
            cells.iter().for_each(|&c| counted[c as usize][usize::from(!active)] += 1)
        });
        assert_eq!(counted, self.holders, "holders of each cell");
        let n_active = counted.iter().filter(|h| h[0] > 0).count();
        assert_eq!(self.n_active, n_active, "cells of active sequences");
        let mut free = self.free.clone();
        free.sort_unstable();
        let unheld: Vec<u32> =
            (0..).zip(&counted).filter(|(_, h)| **h == [0, 0]).map(|(i, _)| i).collect();
        assert_eq!(free, unheld, "free cells are those without a holder");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    fn tokens(text: &str) -> Vec<Token> {
        text.bytes().map(|b| Token(i32::from(b))).collect()
    }

    /// Admits a prompt and computes all of it.
    fn start(slots: &mut Slots, prompt: &str, n_max: usize) -> Admission {
        let admission = slots.admit(&tokens(prompt), n_max, true).unwrap();
        slots.push(admission.seq, &tokens(prompt)[admission.n_cached..]);
        admission
    }

    fn unified(n_cells: usize, n_slots: usize) -> Slots {
        Slots::new(Layout::Unified { n_cells, n_retained: n_cells, n_seqs: n_slots * 2 }, n_slots)
    }

    #[test]
    fn a_prompt_shares_the_cells_of_a_running_one() {
        let mut slots = unified(30, 2);
        let a = start(&mut slots, "system: hi", 12);
        let b = slots.admit(&tokens("system: yo"), 12, true).unwrap();
        assert_eq!(b.n_cached, 8);
        assert_eq!(b.ops, [KvOp::Share { from: a.seq, to: b.seq, start: 0, end: 8 }]);
        assert_eq!(slots.n_cells_active(), 10, "the shared ones count once");
        slots.check_integrity();
    }

    #[test]
    fn a_full_cache_makes_a_request_wait_and_a_retained_prefix_go() {
        let mut slots = unified(20, 2);
        let a = start(&mut slots, "aaaa", 12);
        assert_eq!(slots.admit(&tokens("bbbb"), 12, true), None, "12 of 20 cells are promised");
        slots.release(a.seq);
        assert_eq!(slots.n_cells_retained(), 4);
        let b = slots.admit(&tokens("bbbb"), 18, true).unwrap();
        assert_eq!(b.ops, [KvOp::Remove { seq: a.seq, from: 0 }], "the retained prefix went");
        slots.check_integrity();
    }

    #[test]
    fn the_next_turn_of_a_talk_takes_over_its_cells() {
        for mut slots in [unified(64, 2), Slots::new(Layout::Streams { n_cells: 64 }, 2)] {
            let a = start(&mut slots, "how are you today", 40);
            slots.release(a.seq);
            let b = slots.admit(&tokens("how are you today? fine"), 40, true).unwrap();
            assert_eq!((b.seq, b.n_cached, b.ops), (a.seq, 17, vec![]));
        }
    }

    #[test]
    fn the_same_prompt_again_computes_its_last_token_only() {
        let mut slots = unified(64, 2);
        start(&mut slots, "same", 10);
        assert_eq!(slots.admit(&tokens("same"), 10, true).unwrap().n_cached, 3);
    }

    #[test]
    fn streams_take_the_lowest_id_unless_another_holds_a_long_prefix() {
        let mut slots = Slots::new(Layout::Streams { n_cells: 64 }, 3);
        let long = "a prefix that is long enough";
        let mut admit = |prompt: &str| slots.admit(&tokens(prompt), 40, true).unwrap().seq;
        let ids = ["x", "y", long].map(&mut admit);
        slots.push(ids[2], &tokens(long));
        ids.iter().for_each(|&id| drop(slots.release(id)));
        assert_eq!(slots.admit(&tokens("a pre"), 40, true).unwrap().seq, ids[0]);
        assert_eq!(slots.admit(&tokens(long), 40, true).unwrap().seq, ids[2]);
    }

    fn states(n_cells: usize, n_slots: usize, n_kept: usize) -> Slots {
        let n_seqs = n_slots + n_kept;
        Slots::new(Layout::States { n_cells, n_retained: n_cells, n_seqs, window: 0 }, n_slots)
    }

    /// A prompt of `n` tokens that parts from others of its `kind` after `n_common`.
    fn prompt(kind: i32, n_common: usize, n: usize) -> Vec<Token> {
        (0..n).map(|i| Token(if i < n_common { 0 } else { kind })).collect()
    }

    /// Admits a prompt and computes it, with all stops.
    fn read(slots: &mut Slots, prompt: &[Token]) -> Admission {
        let place = slots.admit(prompt, prompt.len() + 4, true).unwrap();
        let mut from = place.n_cached;
        for &stop in &place.keep {
            slots.push(place.seq, &prompt[from..stop]);
            let ops = slots.keep(place.seq);
            assert!(matches!(ops.last(), Some(KvOp::Share { end, .. }) if *end == stop), "{ops:?}");
            from = stop;
        }
        slots.push(place.seq, &prompt[from..]);
        slots.check_integrity();
        place
    }

    #[test]
    fn a_state_is_kept_before_the_answer_and_where_prompts_part() {
        let mut slots = states(4000, 1, 4);
        let first = read(&mut slots, &prompt(1, 200, 300));
        assert_eq!((first.n_cached, first.keep), (0, vec![292]));
        slots.release(first.seq);
        // Another question after the same 200 tokens: nothing to return to, but from now on.
        let second = read(&mut slots, &prompt(2, 200, 300));
        assert_eq!((second.n_cached, second.keep), (0, vec![200, 292]));
        slots.release(second.seq);
        let third = read(&mut slots, &prompt(3, 200, 300));
        assert_eq!((third.n_cached, third.keep), (200, vec![292]));
        slots.release(third.seq);
        // The same prompt again goes on from before its end.
        let again = slots.admit(&prompt(3, 200, 300), 310, true).unwrap();
        assert_eq!((again.n_cached, again.keep), (292, vec![]));
    }

    #[test]
    fn the_next_turn_goes_on_from_a_copy_of_the_last_state() {
        let mut slots = states(4000, 2, 4);
        let mut talk = prompt(1, 0, 300);
        let first = read(&mut slots, &talk);
        slots.push(first.seq, &[Token(7), Token(8)]);
        slots.release(first.seq);
        talk.extend([7, 8, 9, 9].map(Token));
        let second = slots.admit(&talk, 400, true).unwrap();
        assert_eq!(second.n_cached, 302);
        assert_ne!(second.seq, first.seq, "others may return to it");
        assert_eq!(
            second.ops,
            [KvOp::Share { from: first.seq, to: second.seq, start: 0, end: 302 }]
        );
    }

    #[test]
    fn only_its_own_sequence_goes_on_from_a_state_that_was_taken_back() {
        let mut slots = states(4000, 2, 4);
        let talk = prompt(1, 0, 40);
        let first = read(&mut slots, &talk);
        slots.take_back(first.seq);
        let more = prompt(1, 0, 60);
        assert_eq!(slots.admit(&more, 80, true).unwrap().n_cached, 0, "it still runs");
        slots.release(first.seq);
        let second = slots.admit(&more, 80, true).unwrap();
        assert_eq!((second.seq, second.n_cached, second.ops), (first.seq, 40, vec![]));
    }

    #[derive(Clone, Debug)]
    enum Act {
        Admit(String, usize),
        Push(usize, String),
        Keep(usize),
        TakeBack(usize),
        Release(usize),
        Discard(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            3 => ("[ab]{1,10}", 0usize..12).prop_map(|(p, n)| Act::Admit(p, n)),
            3 => (any::<usize>(), "[ab]{1,4}").prop_map(|(i, t)| Act::Push(i, t)),
            1 => any::<usize>().prop_map(Act::Keep),
            1 => any::<usize>().prop_map(Act::TakeBack),
            2 => any::<usize>().prop_map(Act::Release),
            1 => any::<usize>().prop_map(Act::Discard),
        ]
    }

    /// A cache that does what the ops say, cell by cell: which token is at which position of
    /// which sequence.
    #[derive(Default)]
    struct Cache {
        held: HashMap<u32, Vec<Token>>,
        /// A state is kept with the last so many tokens.
        window: Option<usize>,
        taken_back: HashSet<u32>,
    }

    impl Cache {
        /// Whether the first `n` tokens of a sequence can be had without the others.
        fn has_part(&self, seq: SeqId, n: usize) -> bool {
            let len = self.held.get(&seq.0).map_or(0, Vec::len);
            n == 0 || n >= len || self.window.is_none_or(|window| len < window)
        }

        fn apply(&mut self, ops: &[KvOp]) {
            for op in ops {
                match *op {
                    KvOp::Remove { seq, from } => {
                        assert!(self.has_part(seq, from), "a state goes as a whole");
                        self.held.entry(seq.0).or_default().truncate(from);
                        self.taken_back.remove(&seq.0);
                    }
                    KvOp::Share { from, to, start, end } => {
                        assert!(
                            start == 0 && self.held.get(&to.0).is_none_or(Vec::is_empty),
                            "shared into an empty sequence"
                        );
                        let prefix = self.held[&from.0][..end].to_vec();
                        assert!(self.has_part(from, end), "a state is shared whole");
                        assert!(!self.taken_back.contains(&from.0), "a state as it is now");
                        self.held.insert(to.0, prefix);
                    }
                }
            }
        }
    }

    proptest! {
        /// Whatever happens, the ledger's books balance, and the cache that follows its ops holds
        /// what it says.
        #[test]
        fn the_books_balance_after_every_step(
            acts in prop::collection::vec(act(), 0..60),
            layout in 0..4,
            n_cells in 22usize..60,
            n_retained in 0usize..40,
        ) {
            let layout = match layout {
                0 => Layout::Unified { n_cells, n_retained, n_seqs: 5 },
                1 => Layout::States { n_cells, n_retained, n_seqs: 5, window: 0 },
                2 => Layout::States { n_cells, n_retained, n_seqs: 5, window: 4 },
                _ => Layout::Streams { n_cells },
            };
            let mut slots = Slots::new(layout, 3);
            let has_states = layout.has_states();
            let window = if let Layout::States { window, .. } = layout { Some(window) } else { None };
            let mut cache = Cache { window, ..Cache::default() };
            let mut active: Vec<(SeqId, usize)> = vec![]; // and room left
            for act in acts {
                match act {
                    Act::Admit(prompt, more) => {
                        let prompt = tokens(&prompt);
                        let reuse = more % 3 != 0;
                        if let Some(a) = slots.admit(&prompt, prompt.len() + more, reuse) {
                            cache.apply(&a.ops);
                            let held = cache.held.entry(a.seq.0).or_default();
                            prop_assert!(a.n_cached < prompt.len() && (reuse || a.n_cached == 0));
                            prop_assert_eq!(&held[..], &prompt[..a.n_cached], "what is called cached is there, and no more");
                            active.push((a.seq, prompt.len() + more - a.n_cached));
                        } else {
                            prop_assert!(!active.is_empty(), "an idle cache admits anything that fits");
                        }
                    }
                    Act::Push(i, t) if !active.is_empty() => {
                        let i = i % active.len();
                        let (seq, room) = &mut active[i];
                        let t: Vec<Token> = tokens(&t).into_iter().take(*room).collect();
                        *room -= t.len();
                        slots.push(*seq, &t);
                        if !t.is_empty() {
                            cache.taken_back.remove(&seq.0);
                        }
                        cache.held.get_mut(&seq.0).unwrap().extend(t);
                    }
                    Act::Keep(i) if window.is_some() && !active.is_empty() => {
                        let (seq, _) = active[i % active.len()];
                        if !cache.taken_back.contains(&seq.0) {
                            cache.apply(&slots.keep(seq)); // while a prompt is read, nothing is
                        }
                    }
                    Act::TakeBack(i) if has_states && !active.is_empty() => {
                        let (seq, _) = active[i % active.len()];
                        if !cache.held[&seq.0].is_empty() {
                            slots.take_back(seq);
                            cache.taken_back.insert(seq.0);
                        }
                    }
                    Act::Release(i) if !active.is_empty() => {
                        let (seq, _) = active.swap_remove(i % active.len());
                        cache.apply(&slots.release(seq));
                    }
                    Act::Discard(i) if !active.is_empty() => {
                        let (seq, _) = active.swap_remove(i % active.len());
                        cache.apply(&slots.discard(seq));
                    }
                    _ => {}
                }
                slots.check_integrity();
                prop_assert!(!layout.is_pool() || slots.n_cells_retained() <= n_retained);
                prop_assert_eq!(slots.n_active(), active.len());
                for (i, seq) in slots.seqs.iter().enumerate() {
                    let held = cache.held.get(&(i as u32)).map_or(&[][..], Vec::as_slice);
                    prop_assert_eq!(held, &seq.tokens[..], "sequence {}", i);
                }
            }
        }
    }
}
