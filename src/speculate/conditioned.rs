//! Conditioned heads: head `h` foretells the token behind a path of `h + 1` tokens (the root being the first), and sees them.
//! So each head is computed for every path that it goes on from, and only for paths where that promises to pay.
//!
//! After Z. Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (2024).

use std::time::Instant;

use super::calibration::Calibration;
use super::cost::Cost;
use super::medusa::{likeliest, pick};
use super::{Draft, Origin, Tree, Worth};
use crate::llama::{LlamaError, MatrixRows, PathNet, PathWeights, Token};

/// Most paths that one head goes on from, of all sequences together.
const MAX_PATHS: usize = 64;
/// Numbers of paths for which a head is timed at start.
const POINTS: [usize; 5] = [1, 2, 4, 8, 16];

/// Heads ready to draft.
pub struct Conditioned {
    net: PathNet,
    embeddings: MatrixRows,
    token_map: Option<Vec<Token>>,
    /// Seconds of a head, by paths.
    cost: Cost,
    nodes: Vec<Candidate>,
    /// States behind nodes, `n_embd` values each.
    states: Vec<f32>,
    level: Level,
    best: Vec<(Token, f32)>,
}

/// What one head is computed for.
#[derive(Default)]
struct Level {
    paths: Vec<Path>,
    states: Vec<f32>,
    embeddings: Vec<f32>,
}

/// A path that a head goes on from.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// Index of the origin.
    origin: usize,
    /// Its last node; `None` for the root.
    node: Option<usize>,
    /// Where its state is.
    state: usize,
    q: f32,
    token: Token,
}

/// A node that could be.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    origin: usize,
    parent: Option<usize>,
    token: Token,
    p: f32,
    q: f32,
    /// Its parent's state, in `states`, computed with the parent's token.
    state: usize,
}

impl Conditioned {
    /// From heads; `output` and `embeddings` are the model's.
    ///
    /// # Errors
    /// When the model's matrices cannot be read or there is no memory.
    pub fn new(
        weights: &PathWeights,
        token_map: Option<Vec<Token>>,
        output: &MatrixRows,
        embeddings: MatrixRows,
        n_threads: usize,
    ) -> Result<Self, LlamaError> {
        let output = match &weights.output {
            Some(own) => own.clone(),
            None => pick(output, token_map.as_deref())?,
        };
        let mut net = PathNet::new(weights, &output, n_threads)?;
        let cost = Cost::from_points(&measure(&mut net)?);
        let level = Level::default();
        Ok(Self { net, embeddings, token_map, cost, nodes: vec![], states: vec![], level, best: vec![] })
    }

    /// Computes head `depth` for the paths of `level`, and adds what it offers behind each to `nodes`.
    fn go_on(&mut self, depth: usize, calibration: &Calibration) -> Result<(), LlamaError> {
        let level = &mut self.level;
        level.embeddings.clear();
        for path in &level.paths {
            self.embeddings.read(path.token.0 as usize, 1, &mut level.embeddings)?;
        }
        let started = Instant::now();
        let (n_out, d) = (self.net.n_out(), self.net.n_embd());
        let (states, logits) = self.net.forward(depth, &level.states, &level.embeddings)?;
        self.cost.note(level.paths.len(), started.elapsed().as_secs_f64());
        let first_state = self.states.len() / d;
        self.states.extend_from_slice(states);
        for (i, path) in level.paths.iter().enumerate() {
            likeliest(&logits[i * n_out..][..n_out], &mut self.best);
            let mut above = path.q;
            for &(token, p) in &self.best {
                let token = self.token_map.as_ref().map_or(token, |map| map[token.0 as usize]);
                // A calibrated sibling may come out above a better one; the order must hold all the same.
                let q = (path.q * calibration.estimate(depth + 1, p)).min(above);
                above = q;
                self.nodes.push(Candidate { origin: path.origin, parent: path.node, token, p, q, state: first_state + i });
            }
        }
        Ok(())
    }

    /// Fills `level` with the nodes from `first` on behind which the next head promises to pay.
    fn choose_paths(&mut self, first: usize, origins: &[Origin<'_>], depth: usize, worth: Worth) {
        let d = self.net.n_embd();
        let level = &mut self.level;
        level.paths.clear();
        level.states.clear();
        for (i, n) in self.nodes.iter().enumerate().skip(first) {
            if origins[n.origin].max_depth > depth {
                level.paths.push(Path { origin: n.origin, node: Some(i), state: n.state, q: n.q, token: n.token });
            }
        }
        level.paths.sort_by(|a, b| b.q.total_cmp(&a.q));
        level.paths.truncate(MAX_PATHS);
        // The head's best candidate behind a path is right about as often as the path itself; what it then saves is a
        // token's time, less the row's.
        let mut gain = 0.0;
        let (mut best, mut best_n) = (0.0, 0);
        for (i, path) in level.paths.iter().enumerate() {
            let q = f64::from(path.q);
            gain += (q * EXPECTED * worth.token_s - worth.row_s).max(0.0);
            let net = gain - self.cost.seconds(i + 1);
            if net > best {
                (best, best_n) = (net, i + 1);
            }
        }
        level.paths.truncate(best_n);
        for path in &level.paths {
            level.states.extend_from_slice(&self.states[path.state * d..][..d]);
        }
    }

    fn candidates(&mut self, origins: &[Origin<'_>], worth: Worth, calibration: &Calibration) -> Result<(), LlamaError> {
        self.nodes.clear();
        self.states.clear();
        let level = &mut self.level;
        level.paths.clear();
        level.states.clear();
        for (origin, o) in origins.iter().enumerate().filter(|(_, o)| o.max_depth > 0) {
            level.paths.push(Path { origin, node: None, state: 0, q: 1.0, token: o.root });
            level.states.extend_from_slice(o.hidden);
        }
        for depth in 0..self.n_heads() {
            if self.level.paths.is_empty() {
                break;
            }
            let first = self.nodes.len();
            self.go_on(depth, calibration)?;
            self.choose_paths(first, origins, depth + 1, worth);
        }
        Ok(())
    }
}

/// How likely a head's best candidates are right if the path before is: about what heads reach.
const EXPECTED: f64 = 0.5;

/// Seconds of the first head by paths: the best of a few.
fn measure(net: &mut PathNet) -> Result<Vec<(usize, f64)>, LlamaError> {
    let time = |&n: &usize| {
        let rows = vec![0.5; n * net.n_embd()];
        let mut best = f64::INFINITY;
        for _ in 0..8 {
            let started = Instant::now();
            net.forward(0, &rows, &rows)?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        Ok((n, best))
    };
    POINTS.iter().map(time).collect()
}

impl Draft for Conditioned {
    fn n_heads(&self) -> usize {
        self.net.n_steps()
    }

    fn draft(&mut self, origins: &[Origin<'_>], worth: Worth, calibration: &Calibration, trees: &mut [Tree]) {
        trees.iter_mut().for_each(Tree::clear);
        if let Err(error) = self.candidates(origins, worth, calibration) {
            tracing::error!(%error, "heads could not be computed; this step goes without drafts");
            return;
        }
        // Best first; a parent comes before its children, as its q is higher and among equals it is older.
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        order.sort_by(|&a, &b| self.nodes[b].q.total_cmp(&self.nodes[a].q));
        let mut place: Vec<Option<usize>> = vec![None; self.nodes.len()];
        for i in order {
            let n = self.nodes[i];
            let tree = &mut trees[n.origin];
            let parent = n.parent.map(|p| place[p]);
            if tree.len() == worth.n_nodes || parent == Some(None) {
                continue;
            }
            place[i] = Some(tree.push(parent.flatten(), n.token, n.p, n.q));
        }
    }
}
