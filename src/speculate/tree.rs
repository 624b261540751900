//! A sequence's candidates for one step: a tree of tokens that may follow its last one.
//!
//! Nodes are in descending order of `q`, the estimated probability that the model's own choice
//! runs through them. A parent's `q` is never below its child's and it comes first, so every prefix
//! of the nodes is a tree too: what `policy` leaves out is always the tail.

use std::iter::successors;

use crate::llama::Token;
use crate::request::Source;

/// What speaks for a token in the text before: which text, how many tokens match, how far matches
/// agree, and how deep in the tree that is, as `text` encodes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence(pub(super) u8);

/// A token that may follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// Which.
    pub token: Token,
    /// Index of the node before it; `None` directly after the root, which is the sequence's last
    /// token.
    pub parent: Option<usize>,
    /// Tokens from the root to here; 1 for its children.
    pub depth: usize,
    /// Probability that its head gave it, as it came; 0 if no head proposed it.
    pub p: f32,
    /// The same of the draft model.
    pub m: f32,
    /// Estimated probability that it follows its parent, by heads and draft model; 0 if neither
    /// proposed it. Set where text was asked, too.
    pub h: f32,
    /// What speaks for it in the text before, if anything does.
    pub text: Option<Evidence>,
    /// A grammar leaves nothing else, and no other source proposed it.
    pub forced: bool,
    /// Product of the probabilities of its path's tokens, each after the ones before it. Set where
    /// text was asked.
    pub product: f32,
    /// Estimated probability that it is accepted: of the whole path.
    pub q: f32,
}

impl Node {
    /// Where it came from.
    #[must_use]
    pub fn source(&self) -> Source {
        match (self.p > 0.0, self.text.is_some(), self.m > 0.0) {
            _ if self.forced => Source::Grammar,
            (_, false, false) => Source::Heads,
            (false, true, false) => Source::Text,
            (true, true, false) => Source::Both,
            (false, false, true) => Source::Model,
            (_, _, true) => Source::Several,
        }
    }

    /// One after `parent`, proposed by nobody yet.
    #[must_use]
    pub(crate) fn new(parent: Option<usize>, token: Token, q: f32) -> Self {
        Self {
            token,
            parent,
            depth: 0,
            p: 0.0,
            m: 0.0,
            h: 0.0,
            text: None,
            forced: false,
            product: 0.0,
            q,
        }
    }
}

/// A node that could be a tree's next. The largest has the highest `q`, and among equals the earlier
/// parent and the lower rank, so that the same input gives the same tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer<T> {
    pub q: f32,
    pub parent: Option<usize>,
    pub rank: usize,
    pub of: T,
}

impl<T> PartialEq for Offer<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for Offer<T> {}

impl<T> Ord for Offer<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.q
            .total_cmp(&other.q)
            .then_with(|| (other.parent, other.rank).cmp(&(self.parent, self.rank)))
    }
}

impl<T> PartialOrd for Offer<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// For each node of a tree the leaves below it. Keeps its memory from tree to tree.
#[derive(Clone, Debug, Default)]
pub struct Below {
    lists: Vec<Vec<usize>>,
    is_inner: Vec<bool>,
}

impl Below {
    /// By node.
    #[must_use]
    pub fn lists(&self) -> &[Vec<usize>] {
        &self.lists[..self.is_inner.len()]
    }
}

/// Nodes, best first: those that are verified, and after them those that were only proposed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tree {
    nodes: Vec<Node>,
    n_verified: usize,
}

/// The child of a node (`None`: of the root) that holds `token`.
#[must_use]
pub fn child(nodes: &[Node], parent: Option<usize>, token: Token) -> Option<usize> {
    nodes.iter().position(|n| n.parent == parent && n.token == token)
}

impl Tree {
    /// The nodes to verify, best first.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes[..self.n_verified]
    }

    /// All nodes that were proposed, best first; [`nodes`](Self::nodes) are the first of them.
    #[must_use]
    pub fn proposed(&self) -> &[Node] {
        &self.nodes
    }

    /// Number of nodes to verify; the root is none of them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.n_verified
    }

    /// `true` without a node to verify.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n_verified == 0
    }

    /// Drops all nodes.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.n_verified = 0;
    }

    /// Verifies the best `n` nodes only; the others stay [`proposed`](Self::proposed).
    pub fn cut(&mut self, n: usize) {
        self.n_verified = self.n_verified.min(n);
    }

    /// Drops all nodes but those of one path from the root: each the best child of the one before.
    pub fn keep_path(&mut self) {
        let mut end = None;
        let mut n = 0;
        for i in 0..self.n_verified {
            if self.nodes[i].parent == end {
                // Its parent is the node of the path before it; children come best first.
                self.nodes[n] = Node { parent: n.checked_sub(1), ..self.nodes[i] };
                end = Some(i);
                n += 1;
            }
        }
        self.nodes.truncate(n);
        self.n_verified = n;
    }

    /// Replaces all nodes, of which each comes after its parent, by the best `most` of these. A node
    /// that is said to be likelier than its parent is as likely as that.
    pub fn replace(&mut self, nodes: &[Node], most: usize) {
        let mut q: Vec<f32> = vec![];
        for node in nodes {
            q.push(node.parent.map_or(node.q, |parent| node.q.min(q[parent])));
        }
        let mut order: Vec<usize> = (0..nodes.len()).collect();
        order.sort_by(|&a, &b| q[b].total_cmp(&q[a])); // stable: parents stay first
        order.truncate(most);
        let mut places = vec![0; nodes.len()];
        self.nodes.clear();
        for i in order {
            places[i] = self.nodes.len();
            let parent = nodes[i].parent.map(|parent| places[parent]);
            self.nodes.push(Node { parent, q: q[i], ..nodes[i] });
        }
        self.n_verified = self.nodes.len();
    }

    /// Adds a node that a head proposes after all others; panics as [`push_node`](Self::push_node).
    pub fn push(&mut self, parent: Option<usize>, token: Token, p: f32, q: f32) -> usize {
        self.push_node(Node { p, ..Node::new(parent, token, q) })
    }

    /// Adds a node after all others; its depth follows from its parent.
    ///
    /// # Panics
    /// When its parent is missing, its path exists already, its `q` is above its predecessor's, or
    /// the tree was cut.
    pub fn push_node(&mut self, node: Node) -> usize {
        let Node { parent, token, q, .. } = node;
        assert!(parent.is_none_or(|i| i < self.nodes.len()), "a parent comes before its children");
        assert!(self.nodes.last().is_none_or(|last| q <= last.q), "nodes come in descending order");
        assert!(self.child(parent, token).is_none(), "a path is in a tree once");
        assert_eq!(self.n_verified, self.nodes.len(), "a tree grows before it is cut");
        let depth = parent.map_or(0, |i| self.nodes[i].depth) + 1;
        self.nodes.push(Node { depth, ..node });
        self.n_verified += 1;
        self.nodes.len() - 1
    }

    /// The child of a node (`None`: of the root) that holds `token`, if it is verified.
    #[must_use]
    pub fn child(&self, parent: Option<usize>, token: Token) -> Option<usize> {
        child(self.nodes(), parent, token)
    }

    /// Numbers the leaves from 0, the one that the best first child leads to being 0, and lists for
    /// each node which are below it (itself if it is one), in ascending order.
    pub fn leaves_below(&self, below: &mut Below) -> usize {
        let nodes = self.nodes();
        below.lists.iter_mut().for_each(Vec::clear);
        below.lists.resize_with(nodes.len().max(below.lists.len()), Vec::new);
        below.is_inner.clear();
        below.is_inner.resize(nodes.len(), false);
        nodes.iter().filter_map(|n| n.parent).for_each(|i| below.is_inner[i] = true);
        let mut first = None;
        for (i, node) in nodes.iter().enumerate() {
            if node.parent == first {
                first = Some(i); // children come after their parents, the best one first
            }
        }
        let mut n_leaves = 0;
        for leaf in first.into_iter().chain(0..nodes.len()) {
            if below.is_inner[leaf] || (n_leaves > 0 && Some(leaf) == first) {
                continue;
            }
            successors(Some(leaf), |&i| nodes[i].parent)
                .for_each(|i| below.lists[i].push(n_leaves));
            n_leaves += 1;
        }
        n_leaves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_stays_behind_its_parent_however_likely_it_is_said_to_be() {
        let node = |parent, token, depth, q| Node { depth, ..Node::new(parent, Token(token), q) };
        let nodes = [node(None, 1, 1, 0.5), node(Some(0), 2, 2, 0.9), node(None, 3, 1, 0.6)];
        let mut tree = Tree::default();
        tree.replace(&nodes, 3);
        let found: Vec<_> = tree.nodes().iter().map(|n| (n.token.0, n.parent, n.q)).collect();
        assert_eq!(found, [(3, None, 0.6), (1, None, 0.5), (2, Some(1), 0.5)]);
        tree.replace(&nodes, 2);
        assert_eq!(tree.nodes().len(), 2);
    }
}
