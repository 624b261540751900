//! A sequence's candidates for one step: a tree of tokens that may follow its last one.
//!
//! Nodes stand in descending order of `q`, the estimated probability that the model's own choice
//! runs through them. A parent's `q` is never below its child's and it comes first, so every prefix
//! of the nodes is a tree too: what [`policy`](super::policy) leaves out is always the tail.

use std::collections::BinaryHeap;

use super::calibration::Calibration;
use super::text::Evidence;
use crate::llama::Token;
use crate::request::Source;

/// A token that may stand at its place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// Which.
    pub token: Token,
    /// Index of the node before it; `None` directly behind the root, which is the sequence's last
    /// token.
    pub parent: Option<usize>,
    /// Tokens from the root to here; 1 for its children.
    pub depth: usize,
    /// Probability that its head gave it, as it came; 0 if no head offered it.
    pub p: f32,
    /// What speaks for it in the text before, if anything does.
    pub text: Option<Evidence>,
    /// Estimated probability that it is accepted: of the whole path.
    pub q: f32,
}

impl Node {
    /// Where it came from.
    #[must_use]
    pub fn source(&self) -> Source {
        match self.text {
            None => Source::Heads,
            Some(_) if self.p == 0.0 => Source::Text,
            Some(_) => Source::Both,
        }
    }
}

/// For each node of a tree the leaves below it. Keeps its memory from tree to tree.
#[derive(Clone, Debug, Default)]
pub struct Below {
    lists: Vec<Vec<usize>>,
    is_inner: Vec<bool>,
}

impl Below {
    fn reset(&mut self, n: usize) {
        self.lists.iter_mut().for_each(Vec::clear);
        self.lists.resize_with(n.max(self.lists.len()), Vec::new);
        self.is_inner.clear();
        self.is_inner.resize(n, false);
    }

    /// By node.
    #[must_use]
    pub fn lists(&self) -> &[Vec<usize>] {
        &self.lists[..self.is_inner.len()]
    }
}

/// Nodes, best first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// The nodes, best first.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Number of nodes; the root is none of them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// `true` without a node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Drops all nodes.
    pub fn clear(&mut self) {
        self.nodes.clear();
    }

    /// Keeps the best `n` nodes.
    pub fn truncate(&mut self, n: usize) {
        self.nodes.truncate(n);
    }

    /// Keeps the nodes that `keeps` says, in their order. It says so of no node without its parent.
    pub fn retain(&mut self, keeps: &[bool]) {
        let mut places = Vec::with_capacity(self.nodes.len());
        let mut n = 0;
        for (i, &keep) in keeps.iter().enumerate() {
            places.push(n);
            if keep {
                let node = self.nodes[i];
                self.nodes[n] = Node { parent: node.parent.map(|p| places[p]), ..node };
                n += 1;
            }
        }
        self.nodes.truncate(n);
    }

    /// Adds a node that a head offers behind all that are there.
    ///
    /// # Panics
    /// As [`push_with`](Self::push_with).
    pub fn push(&mut self, parent: Option<usize>, token: Token, p: f32, q: f32) -> usize {
        self.push_with(parent, token, p, None, q)
    }

    /// Adds a node behind all that are there.
    ///
    /// # Panics
    /// When its parent is not there yet, its path exists already, or its `q` is above its
    /// predecessor's.
    pub fn push_with(
        &mut self,
        parent: Option<usize>,
        token: Token,
        p: f32,
        text: Option<Evidence>,
        q: f32,
    ) -> usize {
        assert!(parent.is_none_or(|i| i < self.nodes.len()), "a parent comes before its children");
        assert!(self.nodes.last().is_none_or(|last| q <= last.q), "nodes come in descending order");
        assert!(self.child(parent, token).is_none(), "a path stands in a tree once");
        let depth = parent.map_or(0, |i| self.nodes[i].depth) + 1;
        self.nodes.push(Node { token, parent, depth, p, text, q });
        self.nodes.len() - 1
    }

    /// The child of a node (`None`: of the root) that holds `token`.
    #[must_use]
    pub fn child(&self, parent: Option<usize>, token: Token) -> Option<usize> {
        self.nodes.iter().position(|n| n.parent == parent && n.token == token)
    }

    /// Makes this tree a copy of another.
    pub fn copy_from(&mut self, other: &Self) {
        self.nodes.clone_from(&other.nodes);
    }

    /// Numbers the leaves from 0, the one that the best first child leads to being 0, and tells for
    /// each node which are below it (itself if it is one), in ascending order.
    pub fn leaves_below(&self, below: &mut Below) -> usize {
        below.reset(self.nodes.len());
        self.nodes.iter().filter_map(|n| n.parent).for_each(|i| below.is_inner[i] = true);
        let mut first = None;
        for (i, node) in self.nodes.iter().enumerate() {
            if node.parent == first {
                first = Some(i); // children come behind their parents, the best one first
            }
        }
        let others = 0..self.nodes.len();
        let mut n_leaves = 0;
        for leaf in first.into_iter().chain(others) {
            if below.is_inner[leaf] || (n_leaves > 0 && Some(leaf) == first) {
                continue;
            }
            let mut at = Some(leaf);
            while let Some(i) = at {
                below.lists[i].push(n_leaves);
                at = self.nodes[i].parent;
            }
            n_leaves += 1;
        }
        n_leaves
    }

    /// Fills the tree with the `n` best paths through `levels`: for each depth the tokens its head
    /// offers with their probabilities, best first, whatever the path. A path's probability is the
    /// product of its tokens'.
    pub fn fill(
        &mut self,
        levels: &[Vec<(Token, f32)>],
        calibration: &Calibration,
        trust: f32,
        n: usize,
    ) {
        self.clear();
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<Offer>,
                     parent: Option<usize>,
                     above: f32,
                     depth: usize,
                     rank: usize| {
            if let Some(&(token, p)) = levels.get(depth - 1).and_then(|level| level.get(rank)) {
                let q = above * calibration.estimate(depth, rank, p, trust);
                heap.push(Offer { q, parent, above, depth, rank, token, p });
            }
        };
        offer(&mut heap, None, 1.0, 1, 0);
        while self.len() < n {
            let Some(best) = heap.pop() else { return };
            // A calibrated sibling may come out above a better one; the order of the nodes must
            // hold all the same.
            let q = best.q.min(self.nodes.last().map_or(1.0, |last| last.q));
            let node = self.push(best.parent, best.token, best.p, q);
            offer(&mut heap, Some(node), q, best.depth + 1, 0);
            offer(&mut heap, best.parent, best.above, best.depth, best.rank + 1);
        }
    }
}

/// A node that could be next.
#[derive(PartialEq)]
struct Offer {
    q: f32,
    parent: Option<usize>,
    /// The parent's `q`.
    above: f32,
    depth: usize,
    rank: usize,
    token: Token,
    p: f32,
}

impl Eq for Offer {}

impl Ord for Offer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // Among equals the earlier parent and the better rank, so that the same input gives the
        // same tree.
        self.q
            .total_cmp(&other.q)
            .then_with(|| (other.parent, other.rank).cmp(&(self.parent, self.rank)))
    }
}

impl PartialOrd for Offer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn levels(probabilities: &[&[f32]]) -> Vec<Vec<(Token, f32)>> {
        probabilities
            .iter()
            .map(|level| (0..).zip(*level).map(|(t, &p)| (Token(t), p)).collect())
            .collect()
    }

    #[test]
    fn the_best_paths_come_first() {
        let mut tree = Tree::default();
        tree.fill(&levels(&[&[0.6, 0.3], &[0.9, 0.05]]), &Calibration::exact(), 1.0, 4);
        let path = |i: usize| (tree.nodes[i].parent, tree.nodes[i].token.0);
        assert_eq!(
            [path(0), path(1), path(2), path(3)],
            [(None, 0), (Some(0), 0), (None, 1), (Some(2), 0)]
        );
        let q: Vec<f32> = tree.nodes.iter().map(|n| n.q).collect();
        assert!(q.iter().zip([0.6, 0.54, 0.3, 0.27]).all(|(a, b)| (a - b).abs() < 1e-6), "{q:?}");
    }

    #[test]
    fn leaves_are_numbered_along_the_best_path() {
        let mut tree = Tree::default();
        tree.fill(&levels(&[&[0.6, 0.3], &[0.9, 0.05]]), &Calibration::exact(), 1.0, 4);
        let mut below = Below::default();
        assert_eq!(tree.leaves_below(&mut below), 2);
        assert_eq!(below.lists(), [vec![0], vec![0], vec![1], vec![1]]);
        tree.clear();
        assert_eq!(tree.leaves_below(&mut below), 0);
    }

    proptest! {
        #[test]
        fn every_prefix_is_a_tree(
            levels in prop::collection::vec(prop::collection::vec(0.001f32..1.0, 1..9), 1..5),
            n in 0usize..70,
            cut in 0usize..70,
        ) {
            let levels: Vec<Vec<(Token, f32)>> = levels
                .into_iter()
                .map(|mut level| {
                    level.sort_by(|a, b| b.total_cmp(a));
                    (0..).zip(level).map(|(t, p)| (Token(t), p)).collect()
                })
                .collect();
            let mut tree = Tree::default();
            tree.fill(&levels, &Calibration::default(), 1.0, n);
            let paths: usize = levels.iter().scan(1, |all, level| { *all *= level.len(); Some(*all) }).sum();
            prop_assert_eq!(tree.len(), n.min(paths), "as many as there are");
            tree.truncate(cut);
            let mut below = Below::default();
            let n_leaves = tree.leaves_below(&mut below);
            let mut seen = vec![false; n_leaves];
            let below = below.lists();
            for (i, node) in tree.nodes().iter().enumerate() {
                prop_assert!(node.parent.is_none_or(|p| p < i && tree.nodes()[p].q >= node.q && tree.nodes()[p].depth + 1 == node.depth));
                prop_assert!(!below[i].is_empty() && below[i].is_sorted());
                prop_assert!(node.parent.is_none_or(|p| below[i].iter().all(|leaf| below[p].contains(leaf))));
                below[i].iter().for_each(|&leaf| seen[leaf] = true);
            }
            prop_assert!(seen.into_iter().all(|s| s), "no number is left out");
        }
    }
}
