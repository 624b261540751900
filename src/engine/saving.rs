//! Cells that outlive the cache: which sequences are still to be saved, a block at a time, and what a
//! new sequence gets back. [`prefixes`](crate::prefixes) keeps the blocks.

use std::collections::VecDeque;
use std::sync::Arc;

use super::forward::Forward;
use super::slots::Slots;
use super::stats::Stats;
use crate::llama::{SeqId, Token};
use crate::prefixes::Prefixes;
use crate::prefixes::key::{BLOCK, Key};
use crate::prefixes::memory::Origin;
use crate::request::Restored;

/// Saves and restores.
pub struct Saving {
    prefixes: Arc<Prefixes>,
    /// Sequences that have ended, in that order. At most one entry for each id.
    ended: VecDeque<Ended>,
}

/// A sequence that has ended, whose cells are retained.
struct Ended {
    seq: SeqId,
    /// All of its whole blocks.
    tokens: Vec<Token>,
    keys: Vec<Key>,
    /// Blocks that are saved.
    n_saved: usize,
}

impl Saving {
    /// Nothing is to be saved yet.
    pub fn new(prefixes: Arc<Prefixes>) -> Self {
        Self { prefixes, ended: VecDeque::new() }
    }

    /// Where blocks are kept.
    pub fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    /// A tenant's sequence has ended with these tokens in the cache.
    pub fn end(&mut self, seq: SeqId, tenant: u32, tokens: &[Token]) {
        self.ended.retain(|ended| ended.seq != seq);
        let keys = self.prefixes.keys(tenant, tokens);
        if !keys.is_empty() {
            let tokens = tokens[..keys.len() * BLOCK].to_vec();
            self.ended.push_back(Ended { seq, tokens, keys, n_saved: 0 });
        }
    }

    /// Saves the next block, if one is to be saved now: with a store always, since a process may end at
    /// any time, else before cells become scarce. Returns whether there may be more to do.
    pub fn save(&mut self, ledger: &Slots, forward: &mut impl Forward, stats: &Stats) -> bool {
        let prefixes = &self.prefixes;
        if !(prefixes.is_stored() && prefixes.keeps_up() || ledger.is_scarce()) {
            return false;
        }
        while let Some(ended) = self.ended.front_mut() {
            let left = &ended.keys[ended.n_saved..];
            ended.n_saved += left.iter().take_while(|key| prefixes.has(key)).count();
            let (start, end) = (ended.n_saved * BLOCK, (ended.n_saved + 1) * BLOCK);
            let is_whole = ended.n_saved == ended.keys.len();
            // Another prompt may have taken the id, or the cells.
            if is_whole || !ledger.holds(ended.seq, &ended.tokens[..end]) {
                prefixes.used(&ended.keys[..ended.n_saved]);
                self.ended.pop_front();
                continue;
            }
            match forward.save(ended.seq, start..end) {
                Ok(cells) => {
                    prefixes.put(ended.keys[ended.n_saved], cells.into());
                    stats.blocks_saved.inc();
                    ended.n_saved += 1;
                }
                Err(error) => {
                    tracing::warn!(%error, "cells cannot be saved");
                    self.ended.pop_front();
                }
            }
            return true;
        }
        false
    }

    /// Gives a new sequence, whose first `n_cached` tokens are in the cache, the cells of further ones
    /// of its prompt: never the last token's. Returns how many, by where they were.
    pub fn restore(
        &self,
        seq: SeqId,
        tenant: u32,
        prompt: &[Token],
        n_cached: usize,
        forward: &mut impl Forward,
        stats: &Stats,
    ) -> Restored {
        let mut restored = Restored::default();
        let reusable = &prompt[..prompt.len() - 1];
        if n_cached / BLOCK == reusable.len() / BLOCK {
            return restored;
        }
        let keys = self.prefixes.keys(tenant, reusable);
        for (i, key) in keys.iter().enumerate().skip(n_cached / BLOCK) {
            let Some(held) = self.prefixes.get(key) else { break };
            let start = n_cached + restored.total();
            let end = (i + 1) * BLOCK;
            if let Err(error) = forward.restore(seq, start..end, &held.cells) {
                tracing::warn!(%error, "a block of cells is skipped");
                stats.blocks_skipped.inc();
                break;
            }
            let (n, name) = match held.origin {
                Origin::Memory => (&mut restored.memory, "memory"),
                Origin::Store => (&mut restored.store, "store"),
            };
            *n += end - start;
            stats.restored.get_or_create(&[("source", name)]).inc_by((end - start) as u64);
        }
        if restored.total() > 0 {
            self.prefixes.used(&keys);
        }
        restored
    }
}
