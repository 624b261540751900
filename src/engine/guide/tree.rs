//! A tree of candidates under a guide.

use super::{Guide, Next, Place, processor_time};
use crate::engine::grammar::Grammar;
use crate::llama::Token;
use crate::speculate::{MAX_NODES, Node, Tree};

/// Estimated probability that a token that must follow does: a sequence may end before it.
const CERTAIN: f32 = 0.998;
/// After a candidate less likely than this it is not asked what must follow: that takes time.
const LIKELY: f32 = 0.2;

/// A tree on its way to one that a [`Guide`] has prepared.
struct Walk<'t> {
    tree: &'t Tree,
    max_depth: usize,
    bytes: &'t dyn Fn(Token, &mut Vec<u8>),
    nodes: Vec<Node>,
}

impl Guide {
    /// Cuts candidates that may not follow out of a tree, and adds those that must, at most
    /// `max_depth` tokens after the root. `bytes` appends those of a token's text.
    pub fn prepare(
        &mut self,
        tree: &mut Tree,
        max_depth: usize,
        bytes: &dyn Fn(Token, &mut Vec<u8>),
    ) {
        if self.tree_time.is_zero() {
            return;
        }
        let begun = processor_time();
        let mut walk = Walk { tree, max_depth, bytes, nodes: Vec::new() };
        self.walk(&mut walk, Some(None), None, &[]);
        let Walk { nodes, .. } = walk;
        tree.replace(&nodes, MAX_NODES);
        self.tree_time = self.tree_time.saturating_sub(processor_time() - begun);
    }

    /// Adds what may follow `at` among the nodes kept so far (`None`: the root), which is `old` in
    /// the tree as it was, if it was there. Of what must follow, `forced` is known.
    fn walk(
        &mut self,
        walk: &mut Walk<'_>,
        old: Option<Option<usize>>,
        at: Option<usize>,
        forced: &[Token],
    ) {
        let (q, depth) = at.map_or((1.0, 0), |at| (walk.nodes[at].q, walk.nodes[at].depth));
        let is_over = self.place == Place::Following
            && self.grammar.as_ref().is_some_and(Grammar::is_complete);
        if is_over || depth >= walk.max_depth || walk.nodes.len() >= 2 * MAX_NODES {
            return;
        }
        let asked = if forced.is_empty() && q >= LIKELY { self.forced() } else { Vec::new() };
        let forced = if forced.is_empty() { &asked } else { forced };
        if let [token, rest @ ..] = forced {
            let same = old.and_then(|old| walk.tree.child(old, *token));
            let alone = Node { forced: true, ..Node::new(None, *token, q) };
            let node = same.map_or(alone, |i| walk.tree.nodes()[i]);
            let node = Node { parent: at, depth: depth + 1, q: q * CERTAIN, ..node };
            return self.follow(walk, same.map(Some), node, rest);
        }
        let Some(old) = old else { return };
        let children = walk.tree.nodes().iter().enumerate().filter(|(_, n)| n.parent == old);
        let children: Vec<(usize, Node)> = children.map(|(i, node)| (i, *node)).collect();
        for (i, node) in children {
            // The mask holds for the first place only, where it rejects most candidates cheaply.
            if at.is_some() || self.may_begin(node.token) {
                self.follow(walk, Some(Some(i)), Node { parent: at, ..node }, &[]);
            }
        }
    }

    /// Adds a node, if it may follow, and what may come after it.
    fn follow(
        &mut self,
        walk: &mut Walk<'_>,
        old: Option<Option<usize>>,
        node: Node,
        forced: &[Token],
    ) {
        let mut bytes = Vec::new();
        (walk.bytes)(node.token, &mut bytes);
        if let Some((undo, _)) = self.step(node.token, &bytes) {
            walk.nodes.push(node);
            let kept = walk.nodes.len() - 1;
            self.walk(walk, old, Some(kept), forced);
            self.take_back(&undo);
        }
    }

    fn may_begin(&self, token: Token) -> bool {
        match (self.next(), &self.grammar) {
            (Next::Anything, _) | (Next::Grammar(_), None) => true,
            (Next::Only(only), _) => only == token,
            (Next::Grammar(or), Some(grammar)) => or == Some(token) || grammar.allows(token),
        }
    }
}
