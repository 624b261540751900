//! Trees from what heads propose: from levels of tokens, or from paths that were computed one by
//! one. Pure.

use std::collections::BinaryHeap;

use super::calibration::Calibration;
use super::tree::{Offer, Tree};
use crate::llama::Token;

/// A path's last token, proposed by a head that saw the path.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Index of its sequence's tree.
    pub origin: usize,
    /// Index of the candidate before it.
    pub parent: Option<usize>,
    /// Which.
    pub token: Token,
    /// Probability that the head gave it.
    pub p: f32,
    /// Estimated probability of the path; never above the parent's.
    pub q: f32,
    /// Index of its parent's state, computed with the parent's token.
    pub state: usize,
}

/// So many candidates of a head are proposed, however unlikely: what becomes of them teaches how far
/// it is right.
const ALWAYS: usize = 10;

/// Appends what a head proposes after a path, best first: its tokens with its probabilities of them,
/// of which `estimate` makes estimated ones, given the rank. After the first ones it ends where a
/// candidate's is below `least`. `path` has what all have in common, and the path's own `q`.
pub fn propose(
    nodes: &mut Vec<Candidate>,
    path: Candidate,
    best: impl Iterator<Item = (Token, f32)>,
    least: f32,
    estimate: impl Fn(usize, f32) -> f32,
) {
    let mut above = path.q;
    for (rank, (token, p)) in best.enumerate() {
        // Calibration may put a sibling above a better one. The minimum keeps the head's order.
        above = (path.q * estimate(rank, p)).min(above);
        if rank >= ALWAYS && above < least {
            return;
        }
        nodes.push(Candidate { token, p, q: above, ..path });
    }
}

/// Fills trees with candidates, best first: a parent comes before its children, as its `q` is not
/// lower and among equals it is older.
pub fn plant(nodes: &[Candidate], n_nodes: usize, trees: &mut [Tree]) {
    let mut order: Vec<usize> = (0..nodes.len()).collect();
    order.sort_by(|&a, &b| nodes[b].q.total_cmp(&nodes[a].q));
    let mut place: Vec<Option<usize>> = vec![None; nodes.len()];
    for i in order {
        let n = nodes[i];
        let tree = &mut trees[n.origin];
        let parent = n.parent.map(|p| place[p]);
        if tree.len() == n_nodes || parent == Some(None) {
            continue;
        }
        place[i] = Some(tree.push(parent.flatten(), n.token, n.p, n.q));
    }
}

/// Fills the tree with the `n` best paths through `levels`: for each depth the tokens its head
/// proposes with their probabilities, best first, whatever the path. A path's probability is the
/// product of its tokens'.
pub fn fill(
    tree: &mut Tree,
    levels: &[Vec<(Token, f32)>],
    calibration: &Calibration,
    trust: f32,
    n: usize,
) {
    tree.clear();
    let mut heap = BinaryHeap::new();
    // Offers a token after a path of probability `above`, if its head proposes so many.
    let offer = |heap: &mut BinaryHeap<_>, parent, above: f32, depth: usize, rank: usize| {
        if let Some(&(token, p)) = levels.get(depth - 1).and_then(|level| level.get(rank)) {
            let q = above * calibration.estimate(depth, rank, p, trust);
            heap.push(Offer { q, parent, rank, of: (above, depth, token, p) });
        }
    };
    offer(&mut heap, None, 1.0, 1, 0);
    while tree.len() < n {
        let Some(Offer { q, parent, rank, of: (above, depth, token, p) }) = heap.pop() else {
            return;
        };
        // A calibrated sibling may come out above a better one; the order of the nodes must
        // hold all the same.
        let q = q.min(tree.nodes().last().map_or(1.0, |last| last.q));
        let node = tree.push(parent, token, p, q);
        offer(&mut heap, Some(node), q, depth + 1, 0);
        offer(&mut heap, parent, above, depth, rank + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::Below;
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
        fill(&mut tree, &levels(&[&[0.6, 0.3], &[0.9, 0.05]]), &Calibration::exact(), 1.0, 4);
        let path = |i: usize| (tree.nodes()[i].parent, tree.nodes()[i].token.0);
        assert_eq!(
            [path(0), path(1), path(2), path(3)],
            [(None, 0), (Some(0), 0), (None, 1), (Some(2), 0)]
        );
        let q: Vec<f32> = tree.nodes().iter().map(|n| n.q).collect();
        assert!(q.iter().zip([0.6, 0.54, 0.3, 0.27]).all(|(a, b)| (a - b).abs() < 1e-6), "{q:?}");
    }

    #[test]
    fn leaves_are_numbered_along_the_best_path() {
        let mut tree = Tree::default();
        fill(&mut tree, &levels(&[&[0.6, 0.3], &[0.9, 0.05]]), &Calibration::exact(), 1.0, 4);
        let mut below = Below::default();
        assert_eq!(tree.leaves_below(&mut below), 2);
        assert_eq!(below.lists(), [vec![0], vec![0], vec![1], vec![1]]);
        tree.clear();
        assert_eq!(tree.leaves_below(&mut below), 0);
    }

    #[test]
    fn proposals_end_where_they_are_too_unlikely() {
        let path =
            Candidate { origin: 3, parent: Some(7), token: Token(0), p: 1.0, q: 0.5, state: 2 };
        let likely = [(Token(4), 0.6), (Token(1), 0.2), (Token(9), 0.3)];
        let best = likely.into_iter().chain((20..40).map(|t| (Token(t), 0.01)));
        let proposed = |least: f32| {
            let mut nodes = vec![];
            propose(&mut nodes, path, best.clone(), least, |_, p| p);
            assert!(nodes.iter().all(|n| (n.origin, n.parent, n.state) == (3, Some(7), 2)));
            nodes.iter().map(|n| (n.token.0, n.q)).collect::<Vec<_>>()
        };
        let all = proposed(0.0);
        assert_eq!(all[..3], [(4, 0.3), (1, 0.1), (9, 0.1)], "none is above a better one");
        assert_eq!(all.len(), 23);
        assert_eq!(proposed(0.005), all, "as likely as that");
        assert_eq!(proposed(0.01), all[..ALWAYS]);
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
            fill(&mut tree, &levels, &Calibration::default(), 1.0, n);
            let paths: usize = levels.iter().scan(1, |all, level| { *all *= level.len(); Some(*all) }).sum();
            prop_assert_eq!(tree.len(), n.min(paths), "as many as there are");
            tree.cut(cut);
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
