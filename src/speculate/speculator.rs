//! Drafts of a step: asks the sources, makes one tree of what they propose, cuts the trees to what
//! pays, and learns from what became of them. Pure: durations come from outside.
//!
//! A step's drafts go through [`Drafting`], [`Drafted`] and [`Verifying`], each of which is made of
//! the one before. What they propose is in the trees, which the caller keeps.

use std::borrow::BorrowMut;
use std::iter::successors;
use std::sync::Arc;

use parking_lot::Mutex;

use super::calibration::{Calibration, Trust, Trusts};
use super::cost::Cost;
use super::joint::Merger;
use super::policy::{self, Step};
use super::recording::Recording;
use super::reliability::Reliability;
use super::text::TextDrafts;
use super::tree::child;
use super::{Draft, MAX_NODES, Node, Origin, Tree, Worth};
use crate::llama::Token;

/// Weight of a draft in the mean of what drafts gained.
const GAIN: f64 = 0.1;
/// While drafts lose in the mean, as many steps go by between them as limit the loss to this share
/// of the time.
const LOSS: f64 = 0.01;
/// But never more than this.
const LONGEST_REST: f64 = 64.0;

/// The draft side of an engine.
pub struct Speculator {
    /// Drafts from hidden states.
    pub heads: Option<Box<dyn Draft>>,
    /// Drafts by a smaller model, from the sequences' tokens.
    pub model: Option<Box<dyn Draft>>,
    /// Drafts from the sequences' text.
    pub text: Option<TextDrafts>,
    /// Most tokens a step may give one sequence, its own choice included; at least 1.
    pub max_tokens_per_step: usize,
    /// Verify this many candidates for each sequence, whatever they cost: not to serve with, but to
    /// measure.
    pub fixed_nodes: Option<usize>,
    /// Where steps are recorded, to measure.
    pub recording: Option<Arc<Mutex<Recording>>>,
    /// How often candidates of heads are right.
    pub calibration: Calibration,
    /// How often those of the draft model are.
    of_model: Calibration,
    merger: Merger,
    /// Whether candidates were right as often as predicted.
    pub reliability: Reliability,
    cost: Cost,
    /// Rows of the last step.
    n_before: usize,
    /// Working memory: what heads, the draft model and both propose for each origin, and
    /// probabilities.
    by_heads: Vec<Tree>,
    by_model: Vec<Tree>,
    by_both: Tree,
    predicted: Vec<f32>,
    scratch: Vec<f32>,
    /// Of heads, and of the draft model.
    rest: Rest,
    model_rest: Rest,
}

/// A step that may draft.
#[must_use = "a step that drafts nothing is skipped"]
pub struct Drafting<'s> {
    speculator: &'s mut Speculator,
    step: Step,
    /// Candidates may pay.
    pub is_due: bool,
    asks_heads: bool,
    asks_model: bool,
    /// Seconds that heads took, and the draft model, without what later drafts need as well.
    heads_s: f64,
    model_s: f64,
    /// Seconds for that.
    invested_s: f64,
}

/// A step with all candidates, of which some may be taken out before the rest is chosen from.
#[must_use = "candidates are chosen before they are verified"]
pub struct Drafted<'s>(Drafting<'s>);

/// A step whose rows are known: to be computed, and finished.
#[must_use = "a step that was computed is finished"]
pub struct Verifying {
    /// No row is a prompt's, so what the step takes says what rows cost.
    is_decode_only: bool,
}

/// Steps go by in which a source is not asked while what it proposes does not pay.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    /// Mean of what it gained, in shares of a step's time.
    gain: f64,
    left: u32,
}

impl Speculator {
    /// From heads, if there are any, and the measured cost of rows.
    #[must_use]
    pub fn new(heads: Option<Box<dyn Draft>>, max_tokens_per_step: usize, cost: Cost) -> Self {
        Self {
            heads,
            model: None,
            text: None,
            max_tokens_per_step: max_tokens_per_step.max(1),
            fixed_nodes: None,
            recording: None,
            calibration: Calibration::default(),
            of_model: Calibration::of_model(),
            merger: Merger::default(),
            reliability: Reliability::default(),
            cost,
            n_before: 0,
            by_heads: Vec::new(),
            by_model: Vec::new(),
            by_both: Tree::default(),
            predicted: Vec::new(),
            scratch: Vec::new(),
            rest: Rest::default(),
            model_rest: Rest::default(),
        }
    }

    /// Begins a step of `n_rows` rows, of which `n_decode` decode. `is_guided`: a grammar may leave
    /// single tokens to candidates.
    pub fn begin(&mut self, n_rows: usize, n_decode: usize, is_guided: bool) -> Drafting<'_> {
        let worth = self.worth(n_rows, n_decode);
        let is_fixed = self.fixed_nodes.is_some();
        let can_pay = worth.row_s < worth.token_s; // else nothing pays, however certain
        let asks = |is_there: bool, rest: &mut Rest| {
            let is_asked = is_there && (is_fixed || (can_pay && rest.left == 0));
            if can_pay && !is_fixed {
                rest.left = rest.left.saturating_sub(1);
            }
            is_asked
        };
        let asks_heads = asks(self.heads.is_some(), &mut self.rest);
        let asks_model = asks(self.model.is_some(), &mut self.model_rest);
        let may_pay = asks_heads || asks_model || self.text.is_some() || is_guided;
        let is_due = is_fixed || (can_pay && may_pay);
        let step = Step { n_rows, n_before: self.n_before, n_decode, draft_s: 0.0, room: 0 };
        if let Some(recording) = &self.recording {
            recording.lock().begin(step, &self.cost);
        }
        let (heads_s, model_s, invested_s) = (0.0, 0.0, 0.0);
        Drafting {
            speculator: self,
            step,
            is_due,
            asks_heads,
            asks_model,
            heads_s,
            model_s,
            invested_s,
        }
    }

    /// How far heads are right, if they will probably be asked in the next step, of `n_decode`
    /// decoding rows.
    #[must_use]
    pub fn will_draft(&self, n_decode: usize) -> Option<&Calibration> {
        let worth = self.worth(n_decode, n_decode);
        let will =
            self.fixed_nodes.is_some() || (self.rest.left == 0 && worth.row_s < worth.token_s);
        (will && self.heads.is_some()).then_some(&self.calibration)
    }

    fn worth(&self, n_rows: usize, n_decode: usize) -> Worth {
        Worth {
            n_nodes: MAX_NODES,
            token_s: self.cost.seconds(n_decode) / n_decode.max(1) as f64,
            row_s: self.cost.row_seconds(n_rows),
        }
    }

    /// Learns from the walk down a sequence's tree: the accepted nodes, and the `last` token that
    /// the model chose after them. A verified node holds it only if the request ended with it;
    /// there is none if no client waited for it. `trust` is the sequence's, and `request` the number
    /// of its request.
    pub fn learn(
        &mut self,
        request: u64,
        tree: &Tree,
        accepted: &[usize],
        last: Option<Token>,
        trust: &mut Trusts,
    ) {
        // Candidates that were not worth verifying teach as much as those that were.
        let nodes = tree.proposed();
        if let Some(recording) = &self.recording {
            let tokens = accepted.iter().map(|&i| nodes[i].token).chain(last);
            recording.lock().follow(request, tree, tokens);
        }
        if nodes.is_empty() {
            return trust.fade();
        }
        self.record_paths(tree, accepted, last);
        if nodes.iter().all(|n| n.forced) {
            return trust.fade();
        }
        if nodes.iter().all(|n| n.p == 0.0) {
            trust.heads.fade();
        }
        if nodes.iter().all(|n| n.m == 0.0) {
            trust.model.fade();
        }
        let mut parent = None;
        for token in accepted.iter().map(|&i| nodes[i].token).chain(last) {
            let children = || nodes.iter().filter(|n| n.parent == parent);
            if let Some(text) = &mut self.text {
                text.record(children(), token, &mut trust.text);
            }
            self.record_both(children(), token);
            let predicted = &mut self.predicted;
            let (heads, model) = (&mut trust.heads, &mut trust.model);
            record(&mut self.calibration, children(), |n| n.p, token, heads, predicted);
            record(&mut self.of_model, children(), |n| n.m, token, model, predicted);
            parent = child(nodes, parent, token);
        }
    }

    /// Records what became of a place, with these candidates, where heads and the draft model were
    /// asked.
    fn record_both<'a>(&mut self, children: impl Iterator<Item = &'a Node> + Clone, token: Token) {
        let has = |of: fn(&Node) -> f32| children.clone().any(|n| of(n) > 0.0);
        if !has(|n| n.p) || !has(|n| n.m) {
            return;
        }
        let (heads, model) = (&self.calibration, &self.of_model);
        let highest = |of: fn(&Node) -> f32| children.clone().map(of).fold(0.0, f32::max);
        let (best_p, best_m) = (highest(|n| n.p), highest(|n| n.m));
        let said = |calibration: &Calibration, n: &Node, p: f32, best: f32| {
            let rank = usize::from(p != best);
            (p > 0.0).then(|| calibration.estimate(n.depth, rank, p, 1.0))
        };
        let each = children
            .clone()
            .map(|n| (n.token, said(heads, n, n.p, best_p), said(model, n, n.m, best_m)));
        self.merger.record(each, token);
    }

    /// Records which paths were right, as far as that is known whatever the model chose: of candidates
    /// directly after accepted ones or the root, or after others that were verified. After a request's
    /// last token it is not.
    fn record_paths(&mut self, tree: &Tree, accepted: &[usize], last: Option<Token>) {
        let Some(last) = last else { return };
        let nodes = tree.proposed();
        let end = child(nodes, accepted.last().copied(), last);
        for (i, node) in nodes.iter().enumerate() {
            let mut before = successors(node.parent, |&i| nodes[i].parent);
            let is_known = node.parent.is_none_or(|parent| parent < tree.len());
            if !is_known || (end.is_some() && before.any(|i| Some(i) == end)) {
                continue;
            }
            let is_right = accepted.contains(&i) || Some(i) == end;
            if i < tree.len() {
                self.reliability.record(node.source(), node.depth, node.q, is_right);
            }
            if let Some(text) = &mut self.text {
                text.record_path(node, is_right);
            }
        }
    }
}

impl<'s> Drafting<'s> {
    /// Drafts nothing.
    pub fn skip(self) -> Verifying {
        Verifying { is_decode_only: self.step.n_rows == self.step.n_decode }
    }

    /// Fills `trees` with all candidates for `origins`. `clock` tells seconds.
    pub fn draft<T: BorrowMut<Tree>>(
        mut self,
        origins: &mut [Origin<'_>],
        trees: &mut [T],
        clock: impl Fn() -> f64,
    ) -> Drafted<'s> {
        let Step { n_rows, n_decode, .. } = self.step;
        let s = &mut *self.speculator;
        let worth = match s.fixed_nodes {
            Some(n) => Worth { n_nodes: n.min(MAX_NODES), token_s: f64::MAX.sqrt(), row_s: 0.0 },
            None => s.worth(n_rows, n_decode),
        };
        self.asks_heads &= origins.iter().any(|o| o.heads.max_depth > 0);
        self.asks_model &= origins.iter().any(|o| o.model.max_depth > 0);
        if let Some(text) = s.text.as_mut().filter(|_| self.asks_heads || self.asks_model) {
            for origin in origins.iter_mut() {
                origin.open = 1.0 - origin.text.map_or(0.0, |o| text.predict(&o));
            }
        }
        let n = origins.len();
        let began = clock();
        let by_heads = cleared(&mut s.by_heads, n);
        ask(&mut s.heads, self.asks_heads, origins, worth, &mut s.calibration, by_heads);
        let between = clock();
        let by_model = cleared(&mut s.by_model, n);
        ask(&mut s.model, self.asks_model, origins, worth, &mut s.of_model, by_model);
        let asked = s.model.as_ref().filter(|_| self.asks_model);
        self.invested_s = asked.map_or(0.0, |model| model.invested_s());
        self.heads_s = between - began;
        self.model_s = (clock() - between - self.invested_s).max(0.0);
        let pays = (worth.row_s / worth.token_s) as f32;
        for (i, (origin, tree)) in origins.iter().zip(trees).enumerate() {
            let (tree, heads, model) = (tree.borrow_mut(), &mut s.by_heads[i], &s.by_model[i]);
            if !model.is_empty() {
                s.merger.merge(heads, model, worth.n_nodes, &mut s.by_both);
                std::mem::swap(heads, &mut s.by_both);
            }
            match (&mut s.text, &origin.text) {
                (Some(text), Some(o)) => text.grow(o, heads, pays, worth.n_nodes, tree),
                _ => std::mem::swap(heads, tree),
            }
        }
        Drafted(self)
    }
}

impl Drafted<'_> {
    /// Cuts the trees to what pays, with `room` for candidates; drafting took `seconds`.
    pub fn choose<T: BorrowMut<Tree>>(
        self,
        trees: &mut [T],
        room: usize,
        seconds: f64,
    ) -> Verifying {
        let Drafting { speculator: s, step, asks_heads, asks_model, .. } = self.0;
        let Drafting { heads_s, model_s, invested_s, .. } = self.0;
        let verifying = Verifying { is_decode_only: step.n_rows == step.n_decode };
        if s.fixed_nodes.is_some() {
            let each = room / trees.len().max(1);
            trees.iter_mut().for_each(|tree| tree.borrow_mut().cut(each));
            return verifying;
        }
        let step = Step { draft_s: (seconds - invested_s).max(0.0), room, ..step };
        // A source is judged by what it adds: against steps of as many rows as before, with what the
        // others alone propose.
        let mut without = |draft_s: f64, others: fn(&Node) -> bool| {
            let step = Step { draft_s: draft_s.max(0.0), n_before: step.n_rows, ..step };
            let nodes = trees.iter().flat_map(|tree| (*tree).borrow().nodes());
            let q = nodes.filter(|n| n.text.is_some() || n.forced || others(n)).map(|n| n.q);
            policy::best(q, step, &s.cost, &mut s.scratch).1
        };
        let no_heads = without(step.draft_s - heads_s, |n| n.m > 0.0);
        let no_model = without(step.draft_s - model_s, |n| n.p > 0.0);
        if let Some(recording) = &s.recording {
            let n = trees.iter().map(|tree| (*tree).borrow().len()).sum();
            recording.lock().offer(step, &s.cost, n);
        }
        let n = policy::choose(trees, step, &s.cost, &mut s.scratch);
        let nodes = trees.iter().flat_map(|tree| (*tree).borrow().nodes());
        let hoped: f64 = nodes.map(|n| f64::from(n.q)).sum();
        let rate = (step.n_decode as f64 + hoped) / step.seconds(&s.cost, n);
        if asks_heads {
            s.rest.record(rate / no_heads - 1.0);
        }
        if asks_model {
            s.model_rest.record(rate / no_model - 1.0);
        }
        verifying
    }
}

/// As many empty trees, of which the memory is kept.
fn cleared(trees: &mut Vec<Tree>, n: usize) -> &mut [Tree] {
    trees.resize_with(n.max(trees.len()), Tree::default);
    let trees = &mut trees[..n];
    trees.iter_mut().for_each(Tree::clear);
    trees
}

/// Asks a source, if it is to be asked.
fn ask(
    source: &mut Option<Box<dyn Draft>>,
    is_asked: bool,
    origins: &[Origin<'_>],
    worth: Worth,
    calibration: &mut Calibration,
    trees: &mut [Tree],
) {
    let Some(source) = source.as_mut().filter(|_| is_asked) else { return };
    source.draft(origins, worth, calibration, trees);
    if trees.iter().all(Tree::is_empty) {
        calibration.fade();
    }
}

/// Records what became of a place: which of the `children` that a source proposed, with these
/// probabilities (0: not), was right.
fn record<'a>(
    calibration: &mut Calibration,
    children: impl Iterator<Item = &'a Node> + Clone,
    p: fn(&Node) -> f32,
    token: Token,
    trust: &mut Trust,
    predicted: &mut Vec<f32>,
) {
    let proposed = children.filter(|n| p(n) > 0.0);
    predicted.clear();
    let each = proposed.clone().enumerate();
    predicted.extend(each.map(|(rank, n)| calibration.estimate(n.depth, rank, p(n), 1.0)));
    let Some(depth) = proposed.clone().next().map(|n| n.depth) else { return };
    trust.record(predicted.iter().sum(), proposed.clone().any(|n| n.token == token));
    calibration.record_proposals(depth, predicted.iter().copied());
    let highest = proposed.clone().map(p).fold(0.0, f32::max);
    proposed.for_each(|n| calibration.record(n.depth, p(n) == highest, p(n), n.token == token));
}

impl Verifying {
    /// Records what the step took, of `n_rows` rows with its candidates.
    pub fn finish(self, speculator: &mut Speculator, n_rows: usize, seconds: f64) {
        if self.is_decode_only {
            speculator.cost.record(speculator.n_before, n_rows, seconds);
        }
        speculator.n_before = n_rows;
    }
}

impl Rest {
    /// Records what a draft gained; sets how many steps go by without one.
    fn record(&mut self, gain: f64) {
        self.gain += GAIN * (gain - self.gain);
        self.left = (-self.gain / LOSS).clamp(0.0, LONGEST_REST) as u32;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::llama::SeqId;
    use crate::speculate::Asked;
    use crate::speculate::paths::fill;
    use crate::speculate::states::States;

    /// Proposes `p` of token 1, and half of that of token 2.
    struct Sure(f32);

    impl Draft for Sure {
        fn n_heads(&self) -> usize {
            1
        }

        fn draft(
            &mut self,
            origins: &[Origin<'_>],
            _: Worth,
            calibration: &Calibration,
            trees: &mut [Tree],
        ) {
            let level = vec![(Token(1), self.0), (Token(2), self.0 / 2.0)];
            origins.iter().zip(trees).for_each(|(_, tree)| {
                fill(tree, std::slice::from_ref(&level), calibration, 1.0, 2)
            });
        }
    }

    /// Heads that propose `p`, where 64 rows cost `most`.
    fn speculator(p: f32, most: f64) -> Speculator {
        Speculator::new(Some(Box::new(Sure(p))), 2, Cost::from_points(&[(1, 1.0), (64, most)]))
    }

    /// One step of one sequence; returns how many candidates were verified, or `None` without a
    /// draft.
    fn step(speculator: &mut Speculator, model: Token) -> Option<usize> {
        let drafting = speculator.begin(1, 1, false);
        if !drafting.is_due {
            let _ = drafting.skip();
            return None;
        }
        let mut trees = [Tree::default()];
        let origin = Origin {
            seq: SeqId(0),
            hidden: &[],
            states: &States::default(),
            tokens: &[Token(0)],
            heads: Asked { max_depth: 1, trust: 1.0 },
            model: Asked { max_depth: 0, trust: 1.0 },
            open: 1.0,
            text: None,
        };
        let seconds = Cell::new(0.0);
        let clock = || seconds.replace(seconds.get() + 0.05);
        let _ = drafting.draft(&mut [origin], &mut trees, clock).choose(&mut trees, 64, 0.05);
        let accepted = trees[0].child(None, model);
        let last = accepted.is_none().then_some(model);
        speculator.learn(0, &trees[0], accepted.as_slice(), last, &mut Trusts::default());
        Some(trees[0].len())
    }

    #[test]
    fn drafts_that_lose_become_rare_and_come_back_when_they_pay() {
        let mut speculator = speculator(0.6, 20.0);
        let mut drafts =
            |model: i32| (0..400).filter(|_| step(&mut speculator, Token(model)).is_some()).count();
        assert_eq!(drafts(1), 400, "right and cheap");
        let rare = drafts(9);
        assert!((10..300).contains(&rare), "never right, yet tried now and then: {rare}");
        assert!((10..120).contains(&drafts(9)), "and still");
        drafts(1);
        assert_eq!(drafts(1), 400, "right again");
    }

    #[test]
    fn what_was_not_verified_teaches_too() {
        let mut speculator = speculator(0.3, 30.0);
        let n: usize = (0..400).filter_map(|_| step(&mut speculator, Token(1))).sum();
        assert!(n > 100, "the head said 0.3, but is always right: {n}");
    }

    #[test]
    fn a_row_as_expensive_as_a_token_is_never_drafted_for() {
        let mut speculator = speculator(0.99, 64.0);
        assert!((0..100).all(|_| step(&mut speculator, Token(1)).is_none()));
    }
}
