//! A smaller model with the same vocabulary, or the model's own draft layers (NextN, also called MTP),
//! which draft for all sequences together.
//!
//! It has a cache of its own, in which a *lane* holds what it has read of a sequence. Before it drafts
//! it reads what the sequence gained meanwhile; what was drafted and accepted is in the cache
//! already. Then it goes down level by level, one pass for all sequences, along the paths for which
//! another token is expected to save more than a row of the pass takes. A path that branches off
//! gets a sequence id of its own for the draft, by which it sees the cells of its own past.
//!
//! Draft layers need with each token the model's state at the token before it. On a path that is
//! their own state after its last token, which is not quite the model's: what was drafted is dropped,
//! and is read again with the model's states. Where states of a text's beginning are missing, because it
//! was cached or is long, they see the rest of it.

use std::sync::Arc;
use std::time::Instant;

use super::calibration::Calibration;
use super::cost::{self, Cost};
use super::lanes::{Lane, Lanes};
use super::medusa::top_candidates;
use super::paths::{Candidate, plant, propose};
use super::{Draft, Origin, Tree, Worth};
use crate::llama::{Batch, Context, LlamaError, Model, SeqId, Token, max_sequences};

/// Most paths that one pass continues, of all sequences together.
const MAX_PATHS: usize = 32;
/// Sequence ids for paths that branch off.
const N_BRANCHES: usize = 24;
/// Numbers of rows for which a pass is timed at start, and the time for that in seconds.
const POINTS: [usize; 6] = [1, 2, 4, 8, 16, 32];
const MEASURING_S: f64 = 0.5;
/// Candidates this much less likely than what pays are not proposed, but for the first ones.
const FAR: f64 = 0.25;
/// Tokens of a sequence are read if so many drafts would gain what that takes.
const HORIZON: f64 = 64.0;
/// A step reads at least so many tokens of a sequence that was not read yet.
const LEAST_READ: usize = 32;
/// Tokens of each sequence that a cache has room for at least.
const LEAST_CONTEXT: usize = 256;
/// Tokens at which two vocabularies must agree: all but as many as models pad theirs by.
const PADDING: usize = 128;

/// Sequence ids that [`DraftModel`] needs of its context, for so many lanes.
#[must_use]
pub fn n_ids(n_lanes: usize) -> usize {
    (n_lanes + N_BRANCHES).min(max_sequences())
}

/// Whether a model can draft for another one: both must mean the same by each token.
///
/// # Errors
/// Where they differ.
pub fn check_vocabulary(target: &Model, draft: &Model) -> Result<(), String> {
    let (n_target, n_draft) = (target.n_vocab(), draft.n_vocab());
    if n_target.abs_diff(n_draft) > PADDING {
        return Err(format!("it has {n_draft} tokens, and the model {n_target}"));
    }
    let piece = |model: &Model, token: Token| {
        let mut piece = vec![];
        model.piece(token, true, &mut piece);
        (piece, model.is_end(token))
    };
    for token in (0..n_target.min(n_draft) as i32).map(Token) {
        let (ours, its) = (piece(target, token), piece(draft, token));
        if ours != its {
            let shown = |(piece, is_end): &(Vec<u8>, bool)| {
                let end = if *is_end { ", which ends a text" } else { "" };
                format!("{:?}{end}", String::from_utf8_lossy(piece))
            };
            let (its, ours) = (shown(&its), shown(&ours));
            return Err(format!("its token {} is {its}, and the model's is {ours}", token.0));
        }
    }
    Ok(())
}

/// Most rows of one of its passes that have outputs.
#[must_use]
pub fn n_outputs(n_lanes: usize) -> usize {
    MAX_PATHS.max(n_lanes)
}

/// The fewest cells that are of use: for a short text in each lane.
#[must_use]
pub fn n_least_cells(n_lanes: usize, max_depth: usize) -> usize {
    n_reserved(n_lanes, max_depth) + LEAST_CONTEXT * n_lanes
}

/// Cells that drafts for `n_lanes` sequences take beside what is read of these.
fn n_reserved(n_lanes: usize, max_depth: usize) -> usize {
    MAX_PATHS * max_depth + LEAST_READ * n_lanes
}

/// A model that drafts.
pub struct DraftModel {
    context: Context,
    batch: Batch,
    lanes: Lanes,
    /// Sequence ids that no path has in this draft.
    free: Vec<SeqId>,
    lent: Vec<SeqId>,
    /// Tokens that both models know.
    n_vocab: usize,
    max_depth: usize,
    /// Of a pass, by its rows.
    cost: Cost,
    nodes: Vec<Candidate>,
    paths: Vec<Path>,
    best: Vec<(Token, f32)>,
    /// Of draft layers, after each row with an output of this draft: `n_embd` values.
    states: Vec<f32>,
    invested_s: f64,
}

/// A path that the next pass continues.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// Index of the origin.
    origin: usize,
    lane: usize,
    /// Its last node; `None` for the root.
    node: Option<usize>,
    /// Sees the cells before its last token.
    id: SeqId,
    q: f32,
}

impl DraftModel {
    /// `context` must have [`n_ids`] sequence ids in a unified cache, for `n_lanes` sequences at a
    /// time, and no rows in use. Drafts have up to `max_depth` tokens, of which the other model
    /// knows the first `n_vocab`.
    ///
    /// # Errors
    /// When a pass fails.
    pub fn new(
        mut context: Context,
        n_lanes: usize,
        n_vocab: usize,
        max_depth: usize,
    ) -> Result<Self, LlamaError> {
        let mut batch = context.batch();
        let n_most = batch.n_most().min(context.n_cells());
        let numbers: Vec<usize> = POINTS.into_iter().filter(|&n| n <= n_most).collect();
        let time = |n: usize| time(&mut context, &mut batch, n);
        let (points, _) = cost::measure(&numbers, MEASURING_S, time)?;
        let n_ids = n_ids(n_lanes);
        Ok(Self {
            batch,
            lanes: Lanes::new(n_lanes),
            free: (n_lanes..n_ids).map(|id| SeqId(id as u32)).collect(),
            lent: vec![],
            n_vocab: n_vocab.min(context.model().n_vocab()),
            max_depth,
            cost: Cost::from_points(&points),
            nodes: vec![],
            paths: vec![],
            best: vec![],
            states: vec![],
            invested_s: 0.0,
            context,
        })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        self.context.model()
    }

    /// Seconds of a pass of `n` rows.
    #[must_use]
    pub fn seconds(&self, n: usize) -> f64 {
        self.cost.seconds(n)
    }

    /// Finds the lanes of `paths`, which are roots, and reads all but a few of the tokens that are new
    /// to them, for about as long as a token of the other model takes. Keeps the roots that can be
    /// drafted from. Each draft is expected to gain `gain_s`.
    fn read(
        &mut self,
        origins: &[Origin<'_>],
        gain_s: f64,
        token_s: f64,
    ) -> Result<(), LlamaError> {
        let n_rows = self.batch.n_most();
        let roots = std::mem::take(&mut self.paths);
        let is_asked = |lane: &Lane| roots.iter().any(|r| lane.seq == Some(origins[r.origin].seq));
        let mut busy: Vec<bool> = self.lanes.iter().map(is_asked).collect();
        let affordable = |n: &usize| *n <= n_rows && self.cost.seconds(*n) <= token_s;
        let most = (2..).map(|power| 1 << power).take_while(affordable).last().unwrap_or(0);
        let mut left = most.max(LEAST_READ.min(n_rows));
        // So many are read by the first pass of the draft.
        let n_last = LEAST_READ.min(n_rows / roots.len().max(1));
        for root in roots {
            let origin = &origins[root.origin];
            let lane = self.lanes.find(&mut self.context, origin, &busy)?;
            busy[lane] = true;
            if self.context.has_states()
                && !self.lanes.reach_states(&mut self.context, lane, origin)?
            {
                continue;
            }
            let new = &origin.tokens[self.lanes[lane].tokens.len()..];
            let is_known = |t: &Token| usize::try_from(t.0).is_ok_and(|t| t < self.n_vocab);
            let mut n_ahead = new.len().saturating_sub(n_last);
            let pays = n_ahead == 0 || self.cost.seconds(n_ahead) <= HORIZON * gain_s;
            if !pays || !new.iter().all(is_known) {
                continue;
            }
            let n_wanted = new.len() + n_reserved(self.lanes.len(), self.max_depth);
            if !self.lanes.make_room(&mut self.context, n_wanted)? {
                continue;
            }
            while n_ahead > 0 && left > 0 {
                let n = n_ahead.min(left);
                let from = self.lanes[lane].tokens.len();
                let tokens = &origin.tokens[from..from + n];
                self.batch.clear();
                for (pos, &token) in (from..).zip(tokens) {
                    let row = self.batch.add(token, pos, &[SeqId(lane as u32)], false)?;
                    self.set_state(row, pos, origin);
                }
                self.context.forward(&self.batch)?;
                self.lanes[lane].tokens.extend_from_slice(tokens);
                (n_ahead, left) = (n_ahead - n, left - n);
            }
            if n_ahead == 0 {
                self.paths.push(Path { lane, id: SeqId(lane as u32), ..root });
            }
        }
        Ok(())
    }

    /// Gives a row of draft layers the model's state at the token before `pos`.
    fn set_state(&mut self, row: usize, pos: usize, origin: &Origin<'_>) {
        let before = pos.checked_sub(1).filter(|_| self.context.has_states());
        if let Some(state) = before.and_then(|pos| origin.states.at(pos)) {
            self.batch.set_state(row, state);
        }
    }

    /// Keeps the paths after which candidates at `depth` are expected to pay for the pass; returns the
    /// seconds that these gain.
    fn choose_paths(
        &mut self,
        depth: usize,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
    ) -> f64 {
        let value = |path: &Path| {
            let o = &origins[path.origin];
            worth.saved_s(depth, path.q, o.open, o.model.trust, calibration)
        };
        let mut paths: Vec<(f64, Path)> = self.paths.iter().map(|p| (value(p), *p)).collect();
        paths.sort_by(|a, b| b.0.total_cmp(&a.0));
        paths.truncate(MAX_PATHS.min(worth.n_nodes * origins.len()).min(self.batch.n_most()));
        let (mut gained, mut best, mut n) = (0.0, 0.0, 0);
        for (i, (saved, _)) in paths.iter().enumerate() {
            gained += saved;
            let net = gained - self.cost.seconds(i + 1);
            if net > best {
                (best, n) = (net, i + 1);
            }
        }
        self.paths.clear();
        self.paths.extend(paths[..n].iter().map(|(_, path)| *path));
        best
    }

    /// One pass over `paths`, whose nodes' tokens are read; appends to `nodes` what follows each.
    fn extend(
        &mut self,
        depth: usize,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
    ) -> Result<(), LlamaError> {
        self.batch.clear();
        let mut rows = vec![];
        for i in 0..self.paths.len() {
            let Path { origin, lane, node, id, .. } = self.paths[i];
            let tokens = origins[origin].tokens;
            match node {
                None => {
                    let from = self.lanes[lane].tokens.len();
                    for (pos, &token) in (from..).zip(&tokens[from..]) {
                        let row = self.batch.add(token, pos, &[id], pos + 1 == tokens.len())?;
                        self.set_state(row, pos, &origins[origin]);
                    }
                    self.lanes[lane].tokens.extend_from_slice(&tokens[from..]);
                }
                Some(node) => {
                    let Candidate { token, state, .. } = self.nodes[node];
                    let row = self.batch.add(token, tokens.len() + depth - 2, &[id], true)?;
                    if self.context.has_states() {
                        let n = self.context.model().n_embd();
                        self.batch.set_state(row, &self.states[state * n..][..n]);
                    }
                    if id == SeqId(lane as u32) {
                        self.lanes[lane].tokens.push(token);
                        self.lanes[lane].n_drafted += 1;
                    }
                }
            }
            rows.push(self.batch.len() - 1);
        }
        let n_rows = self.batch.len();
        let started = Instant::now();
        self.context.forward(&self.batch)?;
        self.context.logits(rows[0])?; // waits for the device
        let least = (FAR * worth.row_s / worth.token_s) as f32;
        for (&row, path) in rows.iter().zip(&self.paths) {
            top_candidates(&self.context.logits(row)?[..self.n_vocab], &mut self.best);
            let Path { origin, node: parent, q, .. } = *path;
            let mut state = 0;
            if self.context.has_states() {
                state = self.states.len() / self.context.model().n_embd();
                self.states.extend_from_slice(self.context.state(row)?);
            }
            let end = Candidate { origin, parent, token: Token(0), p: 1.0, q, state };
            let trust = origins[origin].model.trust;
            propose(&mut self.nodes, end, self.best.iter().copied(), least, |rank, p| {
                calibration.estimate(depth, rank, p, trust)
            });
        }
        self.cost.record(n_rows, n_rows, started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Makes paths of the nodes from `first` on, which follow those `before`.
    fn branch(&mut self, depth: usize, before: &[Path], first: usize, origins: &[Origin<'_>]) {
        self.paths.clear();
        for (i, node) in self.nodes.iter().enumerate().skip(first) {
            let of = |path: &&Path| path.origin == node.origin && path.node == node.parent;
            let Some(parent) = before.iter().find(of) else { continue };
            if depth < origins[node.origin].model.max_depth {
                self.paths.push(Path { node: Some(i), q: node.q, ..*parent });
            }
        }
    }

    /// Of the paths that follow the same one the best goes on in its cells; the others get ids that see
    /// these cells.
    fn part(&mut self, depth: usize, origins: &[Origin<'_>]) -> Result<(), LlamaError> {
        let mut taken: Vec<SeqId> = vec![];
        let mut kept = 0;
        for i in 0..self.paths.len() {
            let mut path = self.paths[i];
            if taken.contains(&path.id) {
                let Some(id) = self.free.pop() else { continue };
                self.lent.push(id);
                // All cells of its past: the prompt's, the answer's, and the path's.
                let end = origins[path.origin].tokens.len() + depth - 2;
                self.context.share(path.id, id, 0..end)?;
                path.id = id;
            }
            taken.push(path.id);
            self.paths[kept] = path;
            kept += 1;
        }
        self.paths.truncate(kept);
        Ok(())
    }

    fn candidates(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
    ) -> Result<(), LlamaError> {
        self.nodes.clear();
        self.paths.clear();
        self.states.clear();
        self.lanes.begin_draft();
        self.invested_s = 0.0;
        let n_longest = self.context.n_cells_per_sequence();
        let is_asked =
            |o: &Origin<'_>| o.model.max_depth > 0 && o.tokens.len() + self.max_depth < n_longest;
        let asked = origins.iter().enumerate().filter(|(_, o)| is_asked(o));
        let root = |(origin, _)| Path { origin, lane: 0, node: None, id: SeqId(0), q: 1.0 };
        self.paths.extend(asked.map(root).take(self.lanes.len()));
        let gain_s = self.choose_paths(1, origins, worth, calibration);
        if self.paths.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let gain_s = gain_s / self.paths.len() as f64;
        self.read(origins, gain_s, worth.token_s)?;
        self.invested_s = started.elapsed().as_secs_f64();
        for depth in 1..=self.max_depth.min(worth.n_nodes) {
            if self.paths.is_empty() {
                break;
            }
            if depth > 1 {
                self.part(depth, origins)?;
            }
            let first = self.nodes.len();
            self.extend(depth, origins, worth, calibration)?;
            let before = std::mem::take(&mut self.paths);
            self.branch(depth, &before, first, origins);
            let _ = self.choose_paths(depth + 1, origins, worth, calibration);
        }
        Ok(())
    }

    /// Frees the cells of paths that branched off, and of draft layers those of all paths.
    fn settle(&mut self) -> Result<(), LlamaError> {
        if self.context.has_states() {
            for lane in 0..self.lanes.len() {
                let Lane { tokens, n_drafted, .. } = &self.lanes[lane];
                let n_read = tokens.len() - n_drafted;
                self.lanes.truncate(&mut self.context, lane, n_read)?;
            }
        }
        while let Some(id) = self.lent.pop() {
            self.context.remove_from(id, 0)?;
            self.free.push(id);
        }
        Ok(())
    }

    /// Forgets everything: what the cache holds after a failed pass is unknown.
    fn reset(&mut self) {
        self.context.clear();
        self.free.append(&mut self.lent);
        self.lanes.reset();
    }
}

impl Draft for DraftModel {
    fn n_heads(&self) -> usize {
        self.max_depth
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        let drafted = self.candidates(origins, worth, calibration).and_then(|()| self.settle());
        if let Err(error) = drafted {
            tracing::error!(%error, "the draft model failed; this step has no drafts from it");
            return self.reset();
        }
        plant(&self.nodes, worth.n_nodes, trees);
    }

    fn invested_s(&self) -> f64 {
        self.invested_s
    }
}

/// Seconds of a pass of `n` rows, which leaves nothing in the cache.
fn time(context: &mut Context, batch: &mut Batch, n: usize) -> Result<f64, LlamaError> {
    batch.clear();
    for pos in 0..n {
        batch.add(Token(0), pos, &[SeqId(0)], true)?;
    }
    let started = Instant::now();
    context.forward(batch)?;
    context.logits(n - 1)?; // waits for the device
    let seconds = started.elapsed().as_secs_f64();
    context.clear();
    Ok(seconds)
}
