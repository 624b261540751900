//! What two sources say of the same token, together: counted by what each of them says. Pure.

use std::collections::BinaryHeap;

use super::calibration::{Bin, HIGHEST};
use super::tree::{Node, Offer, Tree};
use crate::llama::Token;

/// Classes of probabilities, equally wide.
const N_CLASSES: usize = 5;

/// How often tokens are right of which two sources, asked at the same place, say so much: by class of
/// the first one's probability, and of the second one's. Class 0 is for tokens that one does not
/// propose.
#[derive(Clone, Debug, Default)]
pub(super) struct Joint {
    bins: [[Bin; N_CLASSES + 1]; N_CLASSES + 1],
}

impl Joint {
    /// The probability of a token, which is `prior` as long as nothing is known.
    pub(super) fn estimate(&self, first: Option<f32>, second: Option<f32>, prior: f32) -> f32 {
        (prior * self.bins[class(first)][class(second)].ratio(1.0)).clamp(0.0, HIGHEST)
    }

    /// Records what became of it.
    pub(super) fn record(
        &mut self,
        first: Option<f32>,
        second: Option<f32>,
        prior: f32,
        is_right: bool,
    ) {
        self.bins[class(first)][class(second)].record(prior, is_right);
    }
}

fn class(p: Option<f32>) -> usize {
    p.map_or(0, |p| 1 + ((p * N_CLASSES as f32) as usize).min(N_CLASSES - 1))
}

/// What to think of a token of which one of two asked models says nothing, and the other so much: as
/// much less ...
const ALONE: f32 = 0.4;
/// ... and this much less of the draft model's, which tends to be the better one.
const MODEL_ALONE: f32 = 0.8;

/// Makes one tree of what heads and a draft model propose.
#[derive(Clone, Debug, Default)]
pub(super) struct Merger {
    joint: Joint,
    open: BinaryHeap<Offer<Open>>,
}

/// A node that could be next, and where it is in the trees that propose it.
#[derive(Clone, Copy, Debug)]
struct Open {
    node: Node,
    heads: Option<usize>,
    model: Option<usize>,
}

/// The place to continue in one of the trees: `None` where it is not in that tree, `Some(None)` at
/// its root.
type Place = Option<Option<usize>>;

impl Merger {
    /// Fills `tree` with the `n_nodes` best candidates of both trees. Where only one source proposes
    /// anything, its estimates stand.
    pub(super) fn merge(&mut self, heads: &Tree, model: &Tree, n_nodes: usize, tree: &mut Tree) {
        tree.clear();
        self.open.clear();
        self.offer((heads, Some(None)), (model, Some(None)), None, tree);
        while tree.len() < n_nodes {
            let Some(Offer { q, of: best, .. }) = self.open.pop() else { return };
            let at = tree.push_node(Node { q, ..best.node });
            let of_heads = best.heads.map(Some);
            self.offer((heads, of_heads), (model, best.model.map(Some)), Some(at), tree);
        }
    }

    /// Opens what both propose after node `at` of `tree`.
    fn offer(
        &mut self,
        (heads, of_heads): (&Tree, Place),
        (model, of_model): (&Tree, Place),
        at: Option<usize>,
        tree: &Tree,
    ) {
        let above = at.map_or(1.0, |i| tree.nodes()[i].q);
        let are_both = has_children(heads, of_heads) && has_children(model, of_model);
        let open = &mut self.open;
        let mut push = |q: f32, node: Node, heads, model| {
            let node = Node { parent: at, ..node };
            let (rank, of) = (node.token.0 as usize, Open { node, heads, model });
            open.push(Offer { q: above * q, parent: at, rank, of });
        };
        for (i, node, h) in children(heads, of_heads) {
            let same = children(model, of_model).find(|(_, n, _)| n.token == node.token);
            let m = same.map(|(.., m)| m);
            let (j, raw) = same.map_or((None, 0.0), |(j, n, _)| (Some(j), n.p));
            let q = if are_both { self.joint.estimate(Some(h), m, prior(Some(h), m)) } else { h };
            let whole = Node { p: node.p, m: raw, ..Node::new(at, node.token, q) };
            push(q, whole, Some(i), j);
        }
        for (j, node, m) in children(model, of_model) {
            if children(heads, of_heads).any(|(_, n, _)| n.token == node.token) {
                continue;
            }
            let joint = || self.joint.estimate(None, Some(m), prior(None, Some(m)));
            let q = if are_both { joint() } else { m };
            push(q, Node { m: node.p, ..Node::new(at, node.token, q) }, None, Some(j));
        }
    }

    /// Records what became of a place where both were asked: `token` was chosen. For each candidate
    /// what heads, and what the draft model say of it, if they propose it.
    pub(super) fn record(
        &mut self,
        candidates: impl Iterator<Item = (Token, Option<f32>, Option<f32>)>,
        token: Token,
    ) {
        for (candidate, h, m) in candidates {
            self.joint.record(h, m, prior(h, m), candidate == token);
        }
    }
}

/// What to think of a token of which heads and a draft model say so much, before it is known.
fn prior(h: Option<f32>, m: Option<f32>) -> f32 {
    match (h, m) {
        (Some(h), Some(m)) => h.midpoint(m),
        (Some(h), None) => ALONE * h,
        (None, m) => MODEL_ALONE * m.unwrap_or(0.0),
    }
}

/// The children of a place, each with its probability given that place.
fn children(tree: &Tree, at: Place) -> impl Iterator<Item = (usize, &Node, f32)> {
    let above = at.flatten().map_or(1.0, |i| tree.nodes()[i].q).max(f32::MIN_POSITIVE);
    let all = tree.nodes().iter().enumerate();
    all.filter(move |(_, n)| at == Some(n.parent)).map(move |(i, n)| (i, n, n.q / above))
}

fn has_children(tree: &Tree, at: Place) -> bool {
    children(tree, at).next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(nodes: &[(Option<usize>, i32, f32)]) -> Tree {
        let mut tree = Tree::default();
        nodes.iter().for_each(|&(parent, token, q)| {
            tree.push(parent, Token(token), q / 2.0, q);
        });
        tree
    }

    fn merged(merger: &mut Merger, heads: &Tree, model: &Tree, n: usize) -> Tree {
        let mut tree = Tree::default();
        merger.merge(heads, model, n, &mut tree);
        tree
    }

    #[test]
    fn one_tree_has_what_both_propose() {
        let heads = tree(&[(None, 1, 0.5), (None, 2, 0.3), (Some(0), 5, 0.1)]);
        let model = tree(&[(None, 1, 0.7), (Some(0), 3, 0.6), (Some(1), 4, 0.5), (None, 6, 0.1)]);
        let both = merged(&mut Merger::default(), &heads, &model, 64);
        let path = |i: usize| (both.nodes()[i].parent, both.nodes()[i].token.0);
        let first = both.nodes()[0];
        assert_eq!(path(0), (None, 1));
        assert!((first.q - 0.6).abs() < 1e-6 && first.p == 0.25 && first.m == 0.35, "{first:?}");
        assert_eq!([path(1), path(2)], [(Some(0), 3), (Some(1), 4)], "the model goes on alone");
        assert_eq!(both.len(), 6);
        let alone = both.nodes().iter().find(|n| n.token == Token(2)).unwrap();
        assert!((alone.q - ALONE * 0.3).abs() < 1e-6 && alone.m == 0.0, "{alone:?}");
    }

    #[test]
    fn one_source_alone_stands() {
        let one = tree(&[(None, 1, 0.5), (Some(0), 2, 0.4), (None, 3, 0.2)]);
        let by_heads = merged(&mut Merger::default(), &one, &Tree::default(), 64);
        assert_eq!(by_heads, one);
        let by_model = merged(&mut Merger::default(), &Tree::default(), &one, 2);
        let expected = one.nodes()[..2].iter().map(|n| (n.parent, n.token, n.q, 0.0, n.p));
        assert!(by_model.nodes().iter().map(|n| (n.parent, n.token, n.q, n.p, n.m)).eq(expected));
    }

    #[test]
    fn what_they_say_together_is_learned() {
        let (heads, model) = (tree(&[(None, 1, 0.9)]), tree(&[(None, 2, 0.6)]));
        let mut merger = Merger::default();
        for _ in 0..200 {
            let all = [(Token(1), Some(0.9), None), (Token(2), None, Some(0.6))];
            merger.record(all.into_iter(), Token(2));
        }
        let both = merged(&mut merger, &heads, &model, 64);
        assert_eq!(both.nodes()[0].token, Token(2));
        assert!(both.nodes()[0].q > 0.9 && both.nodes()[1].q < 0.05, "{both:?}");
    }
}
