//! What a draft model has read of each sequence, and where that is in its cache.

use std::ops::{Index, IndexMut};

use super::Origin;
use crate::llama::{Context, LlamaError, SeqId, Token};

/// What the draft model has read of a sequence, under the sequence id that is the lane's index.
#[derive(Default)]
pub(super) struct Lane {
    /// Whose it is.
    pub seq: Option<SeqId>,
    pub tokens: Vec<Token>,
    /// How many of them, the last ones, are drafted.
    pub n_drafted: usize,
    /// The draft that it was last needed for.
    used: u64,
}

/// The lanes of a draft model.
pub(super) struct Lanes {
    all: Vec<Lane>,
    n_drafts: u64,
}

impl Index<usize> for Lanes {
    type Output = Lane;

    fn index(&self, lane: usize) -> &Lane {
        &self.all[lane]
    }
}

impl IndexMut<usize> for Lanes {
    fn index_mut(&mut self, lane: usize) -> &mut Lane {
        &mut self.all[lane]
    }
}

impl Lanes {
    /// So many, all empty.
    pub fn new(n: usize) -> Self {
        Self { all: (0..n).map(|_| Lane::default()).collect(), n_drafts: 0 }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Lane> {
        self.all.iter()
    }

    /// Counts another draft: what it does not need may be dropped for it.
    pub fn begin_draft(&mut self) {
        self.n_drafts += 1;
    }

    /// Empties all, after the cache was cleared.
    pub fn reset(&mut self) {
        self.all.fill_with(Lane::default);
    }

    /// The lane of an origin's sequence, with what is right of what it holds: all but the last token
    /// at most. A new one begins with what another lane has read of the same text.
    pub fn find(
        &mut self,
        context: &mut Context,
        origin: &Origin<'_>,
        busy: &[bool],
    ) -> Result<usize, LlamaError> {
        let known = self.all.iter().position(|lane| lane.seq == Some(origin.seq));
        let most = origin.tokens.len() - 1;
        let common = |lane: &Lane| common_prefix(&lane.tokens, &origin.tokens[..most]);
        let lane = if let Some(lane) = known {
            self.truncate(context, lane, common(&self.all[lane]))?;
            lane
        } else {
            let free = (0..self.all.len()).filter(|&i| !busy[i]);
            let lane = free.min_by_key(|&i| self.all[i].used).expect("as many lanes as sequences");
            let all = (0..self.all.len()).map(|i| (i, common(&self.all[i])));
            let (other, shared) = all.max_by_key(|&(i, n)| (n, i == lane)).expect("lanes");
            if other == lane {
                self.truncate(context, lane, shared)?;
            } else {
                self.truncate(context, lane, 0)?;
                context.share(SeqId(other as u32), SeqId(lane as u32), 0..shared)?;
                self.all[lane].tokens.extend_from_slice(&origin.tokens[..shared]);
            }
            lane
        };
        self.all[lane].seq = Some(origin.seq);
        self.all[lane].used = self.n_drafts;
        Ok(lane)
    }

    /// Drops what a lane holds from the `n`-th token on.
    pub fn truncate(
        &mut self,
        context: &mut Context,
        lane: usize,
        n: usize,
    ) -> Result<(), LlamaError> {
        if n < self.all[lane].tokens.len() {
            context.remove_from(SeqId(lane as u32), n)?;
            self.all[lane].tokens.truncate(n);
        }
        self.all[lane].n_drafted = 0;
        Ok(())
    }

    /// Makes room for `n` more tokens: drops what is held of sequences that this draft is not for.
    /// Returns `false` if there is no room.
    pub fn make_room(&mut self, context: &mut Context, n: usize) -> Result<bool, LlamaError> {
        loop {
            // Shared cells are counted for each lane, so this is an upper limit.
            let held: usize = self.all.iter().map(|lane| lane.tokens.len()).sum();
            if held + n <= context.n_cells() {
                return Ok(true);
            }
            let idle =
                |i: &usize| self.all[*i].used < self.n_drafts && !self.all[*i].tokens.is_empty();
            let oldest = (0..self.all.len()).filter(idle).min_by_key(|&i| self.all[i].used);
            let Some(oldest) = oldest else { return Ok(false) };
            self.truncate(context, oldest, 0)?;
            self.all[oldest].seq = None;
        }
    }

    /// Makes a lane begin where there are states, if it does not go on from there. Returns `false` if
    /// there is none for the root.
    pub fn reach_states(
        &mut self,
        context: &mut Context,
        lane: usize,
        origin: &Origin<'_>,
    ) -> Result<bool, LlamaError> {
        let states = origin.states;
        let most = origin.tokens.len() - 1;
        if most == 0 || states.at(most - 1).is_none() {
            return Ok(false);
        }
        let n_held = self.all[lane].tokens.len();
        if n_held <= states.first() && (n_held > 0 || states.first() > 0) {
            self.truncate(context, lane, 0)?;
            self.all[lane].tokens.extend_from_slice(&origin.tokens[..=states.first()]);
        }
        Ok(true)
    }
}

fn common_prefix(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
