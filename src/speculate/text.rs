//! Drafts from text: what followed earlier occurrences of the last tokens, in the sequence's own text
//! and in recent answers. How often such matches are right is counted by length and agreement. They
//! share one tree with the heads' candidates. Pure.

use std::collections::BinaryHeap;
use std::iter::successors;

use super::calibration::{Bin, HIGHEST, PathRates, Trust};
use super::joint::Joint;
use super::suffix::{Match, Suffixes};
use super::tree::{Evidence, Node, Offer, Tree};
use crate::llama::Token;

/// Different tokens that one text proposes after a path.
const N_GUESSES: usize = 3;
/// The shortest match of each class of lengths.
const LENGTHS: [usize; 8] = [1, 2, 3, 4, 6, 9, 14, 24];
/// Probability of a match of each class before anything is known, in the sequence's own text ...
const PRIOR: [f32; 8] = [0.05, 0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 0.9];
/// ... and by what it is multiplied where matches agree so far, and for other texts.
const PRIOR_SUPPORT: [f32; N_SUPPORTS] = [1.0, 1.2, 0.8, 0.4];
const PRIOR_SHARED: f32 = 0.8;
const N_SUPPORTS: usize = 4;
/// The least depth of each class of depths: where a path's tokens came true so far, the next one does
/// more often ...
const DEPTHS: [usize; 3] = [1, 3, 7];
/// ... by so many times the odds, before anything is known.
const PRIOR_DEPTH: [f32; DEPTHS.len()] = [1.0, 1.5, 3.0];
/// Evidence without its depth.
const N_PLACES: usize = 2 * LENGTHS.len() * N_SUPPORTS;
const N_EVIDENCE: usize = DEPTHS.len() * N_PLACES;
/// Factor for what text says of a token that no head or draft model proposes, though they were asked,
/// before anything is known.
const NOT_OFFERED: f32 = 0.6;
/// Candidates below this share of what pays are not gone on from.
const WORTH_A_LOOK: f32 = 0.5;

/// Matches about as long as the longest one that speaks for a token.
enum Support {
    /// It is the only one.
    Sole,
    /// All speak for the token.
    Agreed,
    /// Most do.
    Led,
    /// Others are as many.
    Split,
}

/// A sequence's text, to draft from.
#[derive(Clone, Copy, Debug)]
pub struct TextOrigin<'a> {
    /// Its index.
    pub index: &'a Suffixes,
    /// Its tokens; the last one is the root.
    pub tokens: &'a [Token],
    /// Tokens after the root that may be drafted; 0 for none.
    pub max_depth: usize,
    /// [`Trust::factor`] of the sequence's text.
    pub trust: f32,
    /// The tenant whose other answers may be drafted from, too; `None`: only its own text.
    pub shared: Option<u32>,
}

/// A token that may follow.
#[derive(Clone, Copy, Debug)]
struct Guess {
    token: Token,
    evidence: Evidence,
    /// Its probability by text alone.
    t: f32,
}

/// Text as a source of drafts.
#[derive(Debug)]
pub struct TextDrafts {
    /// By tenant: recent answers. Empty if none are kept.
    shared: Vec<Suffixes>,
    /// By evidence.
    rates: [Bin; N_EVIDENCE],
    paths: PathRates,
    /// Where heads or a draft model were asked too: theirs first.
    both: Joint,
    found: Vec<Match>,
    guesses: Vec<Guess>,
    path: Vec<Token>,
    open: BinaryHeap<Offer<Open>>,
}

/// A node that could be next.
#[derive(Clone, Copy, Debug)]
struct Open {
    token: Token,
    text: Option<Evidence>,
    /// [`Node::product`].
    product: f32,
    /// Its probability by the others alone; 0 if they do not propose it.
    h: f32,
    /// The same node in the others' tree.
    other: Option<usize>,
}

impl TextDrafts {
    /// Drafts from each sequence's own text, and from the last `n_shared` tokens of all answers; 0
    /// for none of them. One tenant's answers are never drafted for another: each has a part of the
    /// tokens.
    #[must_use]
    pub fn new(n_tenants: usize, n_shared: usize) -> Self {
        let shared = if n_shared > 0 { n_tenants } else { 0 };
        Self {
            shared: (0..shared).map(|_| Suffixes::new(n_shared / n_tenants)).collect(),
            rates: [Bin::default(); N_EVIDENCE],
            paths: PathRates::default(),
            both: Joint::default(),
            found: vec![],
            guesses: vec![],
            path: vec![],
            open: BinaryHeap::new(),
        }
    }

    /// Records an answer, for others of the same tenant to be drafted from.
    pub fn remember(&mut self, tenant: u32, answer: &[Token]) {
        if let Some(shared) = self.shared.get_mut(tenant as usize) {
            shared.push_text(answer);
        }
    }

    /// Probability that text knows what follows the root.
    pub fn predict(&mut self, origin: &TextOrigin<'_>) -> f32 {
        if origin.max_depth == 0 {
            return 0.0;
        }
        self.guess(origin, origin.tokens, 1);
        self.guesses.iter().map(|g| g.t).sum()
    }

    /// Fills `tree` with the `n_nodes` best candidates of the `others`, heads and draft model, and of
    /// the text. A path of text is gone on from as long as its probability is not far below `pays`,
    /// what one must have to pay.
    pub fn grow(
        &mut self,
        origin: &TextOrigin<'_>,
        others: &Tree,
        pays: f32,
        n_nodes: usize,
        tree: &mut Tree,
    ) {
        tree.clear();
        self.open.clear();
        self.offer(origin, others, Some(None), None, tree);
        while tree.len() < n_nodes {
            let Some(Offer { q, parent, of: best, .. }) = self.open.pop() else { return };
            let Open { token, text, product, h, other } = best;
            let same = other.map_or(Node::new(parent, token, q), |i| others.nodes()[i]);
            let node = tree.push_node(Node { parent, text, h, product, q, ..same });
            let depth = tree.nodes()[node].depth;
            let by_text = depth < origin.max_depth && q >= WORTH_A_LOOK * pays;
            if by_text || other.is_some() {
                let origin =
                    TextOrigin { max_depth: if by_text { origin.max_depth } else { 0 }, ..*origin };
                self.offer(&origin, others, other.map(Some), Some(node), tree);
            }
        }
    }

    /// Opens the children of node `at` of `tree` (`None`: of the root), which is `other` in the
    /// others' tree if it is there.
    fn offer(
        &mut self,
        origin: &TextOrigin<'_>,
        others: &Tree,
        other: Option<Option<usize>>,
        at: Option<usize>,
        tree: &Tree,
    ) {
        self.guesses.clear();
        let depth = at.map_or(0, |i| tree.nodes()[i].depth) + 1;
        if origin.max_depth > 0 {
            let mut path = std::mem::take(&mut self.path);
            path_to(origin.tokens, tree, at, &mut path);
            self.guess(origin, &path, depth);
            self.path = path;
        }
        let above = at.map_or((1.0, 1.0), |i| (tree.nodes()[i].q, tree.nodes()[i].product));
        let other_above = other.flatten().map_or(1.0, |i| others.nodes()[i].q);
        let proposed = || {
            let children =
                others.nodes().iter().enumerate().filter(|(_, n)| other == Some(n.parent));
            children.map(|(i, n)| (i, n, n.q / other_above.max(f32::MIN_POSITIVE)))
        };
        let asked = proposed().next().is_some();

        let (open, paths) = (&mut self.open, &self.paths);
        let mut push = |q: f32, of: Open| {
            let product = above.1 * q;
            let q = if of.text.is_some() { paths.estimate(depth, product) } else { above.0 * q };
            let of = Open { product, ..of };
            open.push(Offer { q: q.min(above.0), parent: at, rank: of.token.0 as usize, of });
        };
        // What text says of its tokens moves what is left for the others.
        let (mut by_text, mut by_others) = (0.0, 0.0);
        for i in 0..self.guesses.len() {
            let Guess { token, evidence, t } = self.guesses[i];
            let same = proposed().find(|(_, n, _)| n.token == token);
            let h = same.map(|(_, _, h)| h);
            let q = if asked { self.both.estimate(h, Some(t), both(h, t)) } else { t };
            by_text += q;
            by_others += h.unwrap_or(0.0);
            self.guesses[i].t = q;
            let other = same.map(|(i, ..)| i);
            push(q, Open { token, text: Some(evidence), product: 0.0, h: h.unwrap_or(0.0), other });
        }
        let rest = ((1.0 - by_text) / (1.0 - by_others).max(f32::EPSILON)).clamp(0.0, 1.0);
        for (i, n, h) in
            proposed().filter(|(_, n, _)| self.guesses.iter().all(|g| g.token != n.token))
        {
            push(h * rest, Open { token: n.token, text: None, product: 0.0, h, other: Some(i) });
        }
    }

    /// Fills `guesses` with what may follow `text`, at this depth of the tree.
    fn guess(&mut self, origin: &TextOrigin<'_>, text: &[Token], depth: usize) {
        self.guesses.clear();
        let shared = origin.shared.and_then(|tenant| self.shared.get(tenant as usize));
        for (index, is_shared) in [(Some(origin.index), false), (shared, true)] {
            let Some(index) = index else { continue };
            self.found.clear();
            index.find(text, &mut self.found);
            self.found.sort_by_key(|m| std::cmp::Reverse(m.n));
            for guess in evidence(&self.found, is_shared, depth) {
                let t = trusted(self.rate(guess.1), origin.trust);
                let guess = Guess { token: guess.0, evidence: guess.1, t };
                match self.guesses.iter_mut().find(|g| g.token == guess.token) {
                    Some(known) if known.t >= t => {}
                    Some(known) => *known = guess,
                    None => self.guesses.push(guess),
                }
            }
        }
        let sum: f32 = self.guesses.iter().map(|g| g.t).sum();
        if sum > HIGHEST {
            self.guesses.iter_mut().for_each(|g| g.t *= HIGHEST / sum);
        }
    }

    /// How often tokens with such evidence are right.
    fn rate(&self, evidence: Evidence) -> f32 {
        evidence.prior() * self.rates[usize::from(evidence.0)].ratio(1.0)
    }

    /// Records whether a candidate's path was right, if text speaks for its last token.
    pub fn record_path(&mut self, node: &Node, is_right: bool) {
        if node.text.is_some() {
            self.paths.record(node.depth, node.product, is_right);
        }
    }

    /// Records what became of a place whose candidates were `children`: `token` was chosen.
    pub fn record<'a>(
        &mut self,
        children: impl Iterator<Item = &'a Node> + Clone,
        token: Token,
        trust: &mut Trust,
    ) {
        let factor = trust.factor();
        let asked = children.clone().any(|n| n.h > 0.0);
        let (mut predicted, mut hit) = (0.0, false);
        for node in children {
            let Some(evidence) = node.text else { continue };
            let t = self.rate(evidence);
            predicted += t;
            let is_right = node.token == token;
            hit |= is_right;
            self.rates[usize::from(evidence.0)].record(evidence.prior(), is_right);
            if asked {
                let (h, t) = (Some(node.h).filter(|h| *h > 0.0), trusted(t, factor));
                self.both.record(h, Some(t), both(h, t), is_right);
            }
        }
        if predicted > 0.0 {
            trust.record(predicted, hit);
        } else {
            trust.fade();
        }
    }
}

/// A probability where its source is to be trusted so far: its odds change by that factor, so that
/// what is sure stays short of certain.
fn trusted(t: f32, trust: f32) -> f32 {
    let odds = t.min(HIGHEST) / (1.0 - t.min(HIGHEST)) * trust;
    (odds / (1.0 + odds)).min(HIGHEST)
}

/// What to think of a token of which the others (if they propose it) and text say so much, before it
/// is known.
fn both(h: Option<f32>, t: f32) -> f32 {
    match h {
        None => NOT_OFFERED * t,
        Some(h) => 1.0 - (1.0 - h) * (1.0 - t),
    }
}

/// The tokens that matches, longest first, speak for.
fn evidence(
    found: &[Match],
    is_shared: bool,
    depth: usize,
) -> impl Iterator<Item = (Token, Evidence)> {
    let is_first = move |i: usize| found[..i].iter().all(|m| m.token != found[i].token);
    (0..found.len()).filter(move |&i| is_first(i)).take(N_GUESSES).map(move |i| {
        let Match { token, n } = found[i];
        let rivals = found.iter().filter(|m| 2 * m.n >= n);
        let (same, all) = (rivals.clone().filter(|m| m.token == token).count(), rivals.count());
        let support = match all - same {
            0 if same == 1 => Support::Sole,
            0 => Support::Agreed,
            others if same > others => Support::Led,
            _ => Support::Split,
        };
        (token, Evidence::new(is_shared, n, support, depth))
    })
}

impl Evidence {
    fn new(is_shared: bool, n: usize, support: Support, depth: usize) -> Self {
        let length = LENGTHS.partition_point(|&least| least <= n).max(1) - 1;
        let place =
            (usize::from(is_shared) * LENGTHS.len() + length) * N_SUPPORTS + support as usize;
        let depth = DEPTHS.partition_point(|&least| least <= depth).max(1) - 1;
        Self((depth * N_PLACES + place) as u8)
    }

    fn prior(self) -> f32 {
        let (depth, place) = (usize::from(self.0) / N_PLACES, usize::from(self.0) % N_PLACES);
        let (place, support) = (place / N_SUPPORTS, place % N_SUPPORTS);
        let shared = if place >= LENGTHS.len() { PRIOR_SHARED } else { 1.0 };
        trusted(PRIOR[place % LENGTHS.len()] * PRIOR_SUPPORT[support] * shared, PRIOR_DEPTH[depth])
    }
}

/// Fills `path` with the last tokens of `text` and those on the way to node `at`.
fn path_to(text: &[Token], tree: &Tree, at: Option<usize>, path: &mut Vec<Token>) {
    path.clear();
    path.extend_from_slice(&text[text.len().saturating_sub(super::suffix::MAX_MATCH)..]);
    let from = path.len();
    path.extend(successors(at, |&i| tree.nodes()[i].parent).map(|i| tree.nodes()[i].token));
    path[from..].reverse();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<Token> {
        text.bytes().map(|b| Token(i32::from(b))).collect()
    }

    struct Text {
        index: Suffixes,
        tokens: Vec<Token>,
    }

    impl Text {
        fn new(text: &str) -> Self {
            let mut index = Suffixes::new(256);
            tokens(text).into_iter().for_each(|t| index.push(t));
            Self { index, tokens: tokens(text) }
        }

        fn origin(&self, max_depth: usize) -> TextOrigin<'_> {
            TextOrigin {
                index: &self.index,
                tokens: &self.tokens,
                max_depth,
                trust: 1.0,
                shared: Some(0),
            }
        }
    }

    /// The paths of a tree as strings, best first, each with its `q`.
    fn paths(tree: &Tree) -> Vec<(String, f32)> {
        let path = |i: usize| {
            let mut path = vec![];
            path_to(&[], tree, Some(i), &mut path);
            path.iter().map(|t| t.0 as u8 as char).collect()
        };
        tree.nodes().iter().enumerate().map(|(i, n)| (path(i), n.q)).collect()
    }

    fn grown(drafts: &mut TextDrafts, origin: &TextOrigin<'_>, heads: &Tree) -> Tree {
        let mut tree = Tree::default();
        drafts.grow(origin, heads, 0.02, 64, &mut tree);
        tree
    }

    #[test]
    fn what_followed_before_is_proposed_as_a_path() {
        let text = Text::new("abcdefghi, abcdef");
        let tree = grown(&mut TextDrafts::new(1, 0), &text.origin(5), &Tree::default());
        let found = paths(&tree);
        assert_eq!(
            found.iter().map(|p| p.0.as_str()).collect::<Vec<_>>(),
            ["g", "gh", "ghi", "ghi,", "ghi, "]
        );
        assert!(
            found.is_sorted_by(|a, b| a.1 >= b.1) && (found[0].1 - PRIOR[4]).abs() < 1e-6,
            "{found:?}"
        );
        assert!(grown(&mut TextDrafts::new(1, 0), &text.origin(0), &Tree::default()).is_empty());
    }

    #[test]
    fn heads_and_text_share_nodes_and_what_both_say_is_likelier() {
        let text = Text::new("one two three. one tw");
        let mut heads = Tree::default();
        let same = heads.push(None, Token(i32::from(b'o')), 0.4, 0.4);
        heads.push(None, Token(i32::from(b'a')), 0.3, 0.3);
        heads.push(Some(same), Token(i32::from(b'!')), 0.5, 0.2);
        let mut drafts = TextDrafts::new(1, 0);
        let tree = grown(&mut drafts, &text.origin(3), &heads);
        let q: std::collections::HashMap<String, f32> = paths(&tree).into_iter().collect();
        assert_eq!(q.len(), tree.len(), "each path once: {q:?}");
        assert!(q["o"] > PRIOR[4].max(0.4) && q["a"] < 0.3, "{q:?}");
        assert!(
            q["o"] + q["a"] <= 1.0 && q["o!"] + q["o "] <= q["o"] && q.contains_key("o t"),
            "{q:?}"
        );
        let both = &tree.nodes()[tree.child(None, Token(i32::from(b'o'))).unwrap()];
        assert!(both.p == 0.4 && both.text.is_some());
        assert_eq!(
            paths(&grown(&mut drafts, &text.origin(0), &heads)),
            paths(&heads),
            "without text the heads' tree stays"
        );
    }

    #[test]
    fn matches_are_believed_as_far_as_they_were_right() {
        let text = Text::new("one two three. one tw");
        let mut drafts = TextDrafts::new(1, 0);
        let first =
            |drafts: &mut TextDrafts| grown(drafts, &text.origin(1), &Tree::default()).nodes()[0];
        let before = first(&mut drafts).q;
        for (right, token) in [(false, Token(1)), (true, Token(i32::from(b'o')))] {
            for _ in 0..400 {
                let node = first(&mut drafts);
                drafts.record([&node].into_iter(), token, &mut Trust::default());
            }
            let after = first(&mut drafts).q;
            assert!(if right { after > 0.95 } else { after < 0.05 }, "{before} became {after}");
        }
    }

    #[test]
    fn other_answers_are_drafted_from_only_where_that_is_wanted() {
        let text = Text::new("what is the cap");
        let mut drafts = TextDrafts::new(1, 64);
        drafts.remember(0, &tokens("it is the capital of"));
        let shared = grown(&mut drafts, &text.origin(4), &Tree::default());
        assert!(paths(&shared).iter().any(|p| p.0 == "ital"), "{shared:?}");
        let own = TextOrigin { shared: None, ..text.origin(4) };
        assert!(grown(&mut drafts, &own, &Tree::default()).is_empty());
        assert!(grown(&mut TextDrafts::new(1, 0), &text.origin(4), &Tree::default()).is_empty());
    }

    #[test]
    fn trust_moves_odds_and_never_makes_certain() {
        assert!(
            (trusted(0.5, 2.0) - 2.0 / 3.0).abs() < 1e-6 && (trusted(0.9, 1.0) - 0.9).abs() < 1e-6
        );
        assert!(
            trusted(1.0, 100.0) <= HIGHEST && trusted(0.0, 5.0) == 0.0 && trusted(0.9, 0.0) == 0.0
        );
    }
}
