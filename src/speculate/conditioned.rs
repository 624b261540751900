//! Conditioned heads: head `h` predicts the token after a path of `h + 1` tokens (the root being the
//! first), and sees them. So each head is computed once per path that it continues, and only for
//! paths where that is expected to pay.
//!
//! After Z. Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (2024).

use std::time::Instant;

use super::calibration::Calibration;
use super::cost::Cost;
use super::error::HeadsError;
use super::medusa::{pick, top_candidates};
use super::nets::{ConditionedNet, ConditionedWeights};
use super::paths::{Candidate, plant, propose};
use super::{Draft, Origin, Tree, Worth};
use crate::llama::{MatrixRows, Threads, Token};

/// Most paths that one head continues, of all sequences together.
const MAX_PATHS: usize = 64;
/// Candidates this much less likely than what pays are not proposed, but for the first ones.
const FAR: f64 = 0.25;
/// Numbers of paths for which a head is timed at start.
const POINTS: [usize; 5] = [1, 2, 4, 8, 16];
/// A head may be limited to this many of the most frequent draft tokens.
const CUTS: [usize; 4] = [1024, 2048, 4096, 8192];

/// Heads ready to draft.
pub struct Conditioned {
    net: ConditionedNet,
    embeddings: MatrixRows,
    token_map: Option<Vec<Token>>,
    /// Ascending by number of tokens.
    cuts: Vec<Cut>,
    nodes: Vec<Candidate>,
    /// States of nodes, `n_embd` values each.
    states: Vec<f32>,
    level: Level,
    best: Vec<(Token, f32)>,
}

/// A limit to the first draft tokens, which are the most frequent ones.
struct Cut {
    n_tokens: usize,
    /// Their share of a text's draft tokens.
    share: f64,
    /// Seconds of a head by number of paths.
    cost: Cost,
}

/// Input of one head.
#[derive(Default)]
struct Level {
    paths: Vec<Path>,
    /// Index of the cut.
    cut: usize,
    states: Vec<f32>,
    embeddings: Vec<f32>,
}

/// A path that a head continues.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// Index of the origin.
    origin: usize,
    /// Its last node; `None` for the root.
    node: Option<usize>,
    /// Index of its state.
    state: usize,
    q: f32,
    token: Token,
    /// The sequence's factor.
    trust: f32,
    open: f32,
}

impl Conditioned {
    /// Makes heads ready to compute; `output` and `embeddings` are the model's. Without counts of the
    /// draft tokens there are no cuts.
    pub fn new(
        weights: &ConditionedWeights,
        token_map: Option<Vec<Token>>,
        token_counts: Option<Vec<f64>>,
        output: &MatrixRows,
        embeddings: MatrixRows,
        threads: &Threads,
    ) -> Result<Self, HeadsError> {
        let output = pick(output, token_map.as_deref())?;
        let cuts: &[usize] = if token_counts.is_some() { &CUTS } else { &[] };
        let mut net = ConditionedNet::new(weights, &output, cuts, threads)?;
        let counts = token_counts.unwrap_or_else(|| vec![1.0; output.n_out]);
        let share = |n: usize| counts[..n].iter().sum::<f64>() / counts.iter().sum::<f64>();
        let mut cuts = vec![];
        for (cut, n_tokens) in net.n_outs().collect::<Vec<_>>().into_iter().enumerate() {
            let points = measure(&mut net, cut)?;
            tracing::debug!(
                n_tokens,
                share = share(n_tokens),
                ?points,
                "draft vocabulary: seconds of a head by paths"
            );
            cuts.push(Cut { n_tokens, share: share(n_tokens), cost: Cost::from_points(&points) });
        }
        let level = Level::default();
        Ok(Self {
            net,
            embeddings,
            token_map,
            cuts,
            nodes: vec![],
            states: vec![],
            level,
            best: vec![],
        })
    }

    /// Computes head `depth` for all paths of `level`, and appends its candidates to `nodes`.
    fn extend(
        &mut self,
        depth: usize,
        worth: Worth,
        calibration: &Calibration,
    ) -> Result<(), HeadsError> {
        let least = (FAR * worth.row_s / worth.token_s) as f32;
        let level = &mut self.level;
        level.embeddings.clear();
        for path in &level.paths {
            self.embeddings.read(path.token.0 as usize, 1, &mut level.embeddings)?;
        }
        let started = Instant::now();
        let d = self.net.n_embd();
        let (states, logits) =
            self.net.forward(depth, level.cut, &level.states, &level.embeddings)?;
        let Cut { n_tokens, ref mut cost, .. } = self.cuts[level.cut];
        let (n_out, n) = (n_tokens, level.paths.len());
        cost.record(n, n, started.elapsed().as_secs_f64());
        let first_state = self.states.len() / d;
        self.states.extend_from_slice(states);
        for (i, path) in level.paths.iter().enumerate() {
            top_candidates(&logits[i * n_out..][..n_out], &mut self.best);
            if let Some(map) = &self.token_map {
                self.best.iter_mut().for_each(|(token, _)| *token = map[token.0 as usize]);
            }
            let Path { origin, node: parent, token, q, .. } = *path;
            let path_end = Candidate { origin, parent, token, p: 1.0, q, state: first_state + i };
            propose(&mut self.nodes, path_end, self.best.iter().copied(), least, |rank, p| {
                calibration.estimate(depth + 1, rank, p, path.trust)
            });
        }
        Ok(())
    }

    /// Keeps the paths of `level` after which candidates at `depth` are expected to pay, and gathers
    /// their states.
    fn choose_paths(&mut self, depth: usize, worth: Worth, calibration: &Calibration) {
        let d = self.net.n_embd();
        let level = &mut self.level;
        let expected = |path: &Path| path.q * path.trust * path.open;
        level.paths.sort_by(|a, b| expected(b).total_cmp(&expected(a)));
        level.paths.truncate(MAX_PATHS);
        let value = |path: &Path| worth.saved_s(depth, path.q, path.open, path.trust, calibration);
        let (n, cut) = most_gain(&self.cuts, level.paths.iter().map(value));
        level.paths.truncate(n);
        level.cut = cut;
        level.states.clear();
        for path in &level.paths {
            level.states.extend_from_slice(&self.states[path.state * d..][..d]);
        }
    }

    fn candidates(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
    ) -> Result<(), HeadsError> {
        self.nodes.clear();
        self.states.clear();
        // The hidden states of the roots are the states before the first head.
        let paths = &mut self.level.paths;
        paths.clear();
        for (origin, o) in origins.iter().enumerate().filter(|(_, o)| o.heads.max_depth > 0) {
            let state = self.states.len() / self.net.n_embd();
            self.states.extend_from_slice(o.hidden);
            paths.push(Path {
                origin,
                node: None,
                state,
                q: 1.0,
                token: o.root(),
                trust: o.heads.trust,
                open: o.open,
            });
        }
        self.choose_paths(1, worth, calibration);
        for depth in 0..self.n_heads() {
            if self.level.paths.is_empty() {
                break;
            }
            let first = self.nodes.len();
            self.extend(depth, worth, calibration)?;
            let continued = |(i, n): (usize, &Candidate)| {
                let o = &origins[n.origin];
                let &Candidate { origin, state, q, token, .. } = n;
                let path = Path {
                    origin,
                    node: Some(i),
                    state,
                    q,
                    token,
                    trust: o.heads.trust,
                    open: o.open,
                };
                (o.heads.max_depth > depth + 1).then_some(path)
            };
            self.level.paths.clear();
            self.level
                .paths
                .extend(self.nodes.iter().enumerate().skip(first).filter_map(continued));
            self.choose_paths(depth + 2, worth, calibration);
        }
        Ok(())
    }
}

/// The number of paths that a head should continue, and the cut, that gain most; `seconds` is what
/// its candidates after each path save, best first.
fn most_gain(cuts: &[Cut], seconds: impl Iterator<Item = f64> + Clone) -> (usize, usize) {
    let (mut best, mut choice) = (0.0, (0, 0));
    for (i, cut) in cuts.iter().enumerate() {
        let mut gained = 0.0;
        for (n, saved) in seconds.clone().enumerate() {
            gained += saved * cut.share;
            let net = gained - cut.cost.seconds(n + 1);
            if net > best {
                (best, choice) = (net, (n + 1, i));
            }
        }
    }
    choice
}

/// Seconds of the first head by number of paths, with a cut: the best of eight runs.
fn measure(net: &mut ConditionedNet, cut: usize) -> Result<Vec<(usize, f64)>, HeadsError> {
    let time = |&n: &usize| {
        let rows = vec![0.5; n * net.n_embd()];
        let mut best = f64::INFINITY;
        for _ in 0..8 {
            let started = Instant::now();
            net.forward(0, cut, &rows, &rows)?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        Ok((n, best))
    };
    POINTS.iter().map(time).collect()
}

impl Draft for Conditioned {
    fn n_heads(&self) -> usize {
        self.net.n_heads()
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        if let Err(error) = self.candidates(origins, worth, calibration) {
            tracing::error!(%error, "heads failed; this step has no drafts from them");
            return;
        }
        plant(&self.nodes, worth.n_nodes, trees);
    }
}
