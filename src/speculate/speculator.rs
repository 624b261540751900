//! Drafts of a step: asks the sources, makes one tree of what they offer, cuts the trees to what
//! pays, and learns from what became of them. Pure: the engine tells what things took.

use super::calibration::{self, Calibration, Trusts};
use super::cost::Cost;
use super::policy::{self, Step};
use super::reliability::Reliability;
use super::simulated::Acceptance;
use super::text::TextDrafts;
use super::{Draft, MAX_NODES, Node, Origin, Tree, Worth};
use crate::llama::Token;

/// Weight of a draft in the mean of what drafts gained.
const GAIN: f64 = 0.1;
/// While drafts lose in the mean, so many steps go by between them that they lose this share of the
/// time.
const LOSS: f64 = 0.01;
/// But never more than this.
const LONGEST_REST: f64 = 64.0;

/// The draft side of an engine.
pub struct Speculator {
    heads: Option<Box<dyn Draft>>,
    text: Option<TextDrafts>,
    /// Most tokens a step may give one sequence, its own choice included; at least 1.
    max_tokens_per_step: usize,
    /// Verify this many candidates whatever they cost, for comparison.
    fixed_nodes: Option<usize>,
    /// What becomes of drafts is simulated.
    acceptance: Option<Acceptance>,
    cost: Cost,
    /// Rows of the last step.
    n_before: usize,
    calibration: Calibration,
    reliability: Reliability,
    /// Heads are asked in this step.
    asks_heads: bool,
    /// What heads offered for each origin of this step.
    by_heads: Vec<Tree>,
    /// What was offered in all, for so many of the origins; what was verified is the first part of
    /// it.
    offered: Vec<Tree>,
    n_offered: usize,
    foreseen: Vec<f32>,
    rest: Rest,
    scratch: Vec<f32>,
}

/// Steps go by in which heads are not asked while what they offer does not pay.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    /// Mean of what they gained, in shares of a step's time.
    gain: f64,
    left: u32,
}

impl Speculator {
    /// From heads and the measured cost of rows.
    #[must_use]
    pub fn new(heads: Box<dyn Draft>, max_tokens_per_step: usize, cost: Cost) -> Self {
        Self { heads: Some(heads), ..Self::without_heads(max_tokens_per_step, cost) }
    }

    /// From the measured cost of rows: a source of drafts is still to come.
    #[must_use]
    pub fn without_heads(max_tokens_per_step: usize, cost: Cost) -> Self {
        Self {
            heads: None,
            text: None,
            max_tokens_per_step: max_tokens_per_step.max(1),
            fixed_nodes: None,
            acceptance: None,
            cost,
            n_before: 0,
            calibration: Calibration::default(),
            reliability: Reliability::default(),
            asks_heads: false,
            by_heads: Vec::new(),
            offered: Vec::new(),
            n_offered: 0,
            foreseen: Vec::new(),
            rest: Rest::default(),
            scratch: Vec::new(),
        }
    }

    /// Drafts from text, too.
    #[must_use]
    pub fn with_text(mut self, text: TextDrafts) -> Self {
        self.text = Some(text);
        self
    }

    /// Verifies `n` candidates for each sequence in every step, whatever they cost: not to serve
    /// with, but to measure.
    #[must_use]
    pub fn with_fixed_nodes(mut self, n: usize) -> Self {
        self.fixed_nodes = Some(n.min(MAX_NODES));
        self
    }

    /// Takes candidates to be right at these rates, whatever the model chooses: not to serve with,
    /// but to measure.
    #[must_use]
    pub fn with_acceptance(mut self, acceptance: Acceptance) -> Self {
        self.calibration = Calibration::given(acceptance.clone());
        self.acceptance = Some(acceptance);
        self
    }

    /// The token that is taken to be right behind node `at` of the `origin`-th origin's tree, where
    /// acceptance is simulated and `chance`, from 0 to 1, has it so.
    #[must_use]
    pub fn forced(
        &self,
        origin: usize,
        at: Option<usize>,
        chance: impl Fn() -> f64,
    ) -> Option<Token> {
        self.acceptance.as_ref()?.right(self.offered(origin)?, at, chance())
    }

    /// The token behind node `at` of the `origin`-th origin's tree, where the model chose `own` by
    /// `logits`: that, unless acceptance is simulated, where `chance`, from 0 to 1, decides.
    #[must_use]
    pub fn choice(
        &self,
        origin: usize,
        at: Option<usize>,
        own: Token,
        logits: &[f32],
        chance: impl Fn() -> f64,
    ) -> Token {
        match (&self.acceptance, self.offered(origin)) {
            (Some(acceptance), Some(tree)) => acceptance.choose(tree, at, own, logits, chance()),
            _ => own,
        }
    }

    /// What was offered for an origin of this step.
    fn offered(&self, origin: usize) -> Option<&Tree> {
        self.offered[..self.n_offered].get(origin)
    }

    /// Most tokens a step may give one sequence.
    #[must_use]
    pub fn max_tokens_per_step(&self) -> usize {
        self.max_tokens_per_step
    }

    /// `true` if drafts are made of hidden states.
    #[must_use]
    pub fn has_heads(&self) -> bool {
        self.heads.is_some()
    }

    /// `true` if drafts are made of the sequences' text.
    #[must_use]
    pub fn has_text(&self) -> bool {
        self.text.is_some()
    }

    /// Whether candidates were right as often as was said.
    #[must_use]
    pub fn reliability(&self) -> &Reliability {
        &self.reliability
    }

    /// `true` if a step of `n_rows` rows, of which `n_decode` decode, should draft. To be asked
    /// once a step.
    pub fn is_due(&mut self, n_rows: usize, n_decode: usize) -> bool {
        self.n_offered = 0;
        self.asks_heads = self.heads.is_some();
        if self.fixed_nodes.is_some() {
            return true;
        }
        let worth = self.worth(n_rows, n_decode);
        if worth.row_s >= worth.token_s {
            return false; // it cannot pay, however sure
        }
        self.asks_heads &= self.rest.left == 0;
        self.rest.left = self.rest.left.saturating_sub(1);
        self.asks_heads || self.text.is_some()
    }

    /// How far heads are right, if they will be asked in the step after this one, of so many rows
    /// that decode, as things stand.
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
            row_s: self.cost.seconds(n_rows + 1) - self.cost.seconds(n_rows),
        }
    }

    /// Fills `trees` with all candidates for `origins`, in a step of `n_rows` rows of which
    /// `n_decode` decode.
    pub fn draft(
        &mut self,
        origins: &mut [Origin<'_>],
        n_rows: usize,
        n_decode: usize,
        trees: &mut [Tree],
    ) {
        let worth = match self.fixed_nodes {
            Some(n_nodes) => Worth { n_nodes, token_s: f64::MAX.sqrt(), row_s: 0.0 },
            None => self.worth(n_rows, n_decode),
        };
        self.asks_heads &= origins.iter().any(|o| o.max_depth > 0);
        if let Some(text) = self.text.as_mut().filter(|_| self.asks_heads) {
            for origin in origins.iter_mut() {
                origin.open = 1.0 - origin.text.map_or(0.0, |o| text.foresee(&o));
            }
        }
        self.by_heads.resize_with(origins.len().max(self.by_heads.len()), Tree::default);
        let by_heads = &mut self.by_heads[..origins.len()];
        by_heads.iter_mut().for_each(Tree::clear);
        if let Some(heads) = self.heads.as_mut().filter(|_| self.asks_heads) {
            heads.draft(origins, worth, &self.calibration, by_heads);
            if by_heads.iter().all(Tree::is_empty) {
                self.calibration.fade();
            }
        }
        let pays = (worth.row_s / worth.token_s) as f32;
        for ((origin, by_heads), tree) in origins.iter().zip(by_heads).zip(trees.iter_mut()) {
            match (&mut self.text, &origin.text) {
                (Some(text), Some(o)) => text.grow(o, by_heads, pays, worth.n_nodes, tree),
                _ => std::mem::swap(by_heads, tree),
            }
        }
    }

    /// Cuts the trees to what pays in a step of `n_rows` rows of which `n_decode` decode, with
    /// `room` for more. They are what [`draft`](Self::draft) made of them, or a part of it.
    /// `seconds` is what drafting took.
    pub fn choose(
        &mut self,
        trees: &mut [Tree],
        n_rows: usize,
        n_decode: usize,
        room: usize,
        seconds: f64,
    ) -> usize {
        self.offered.resize_with(trees.len().max(self.offered.len()), Tree::default);
        self.offered
            .iter_mut()
            .zip(trees.iter())
            .for_each(|(offered, tree)| offered.copy_from(tree));
        self.n_offered = trees.len();
        if self.fixed_nodes.is_some() {
            let each = room / trees.len().max(1);
            trees.iter_mut().for_each(|t| t.truncate(each));
            return trees.iter().map(Tree::len).sum();
        }
        let step = Step { n_rows, n_before: self.n_before, n_decode, draft_s: seconds, room };
        // Heads are judged by what they add: against steps of as many rows as before, with what
        // text alone offers.
        let without = Step { draft_s: 0.0, n_before: n_rows, ..step };
        let by_text = trees.iter().flat_map(Tree::nodes).filter(|n| n.text.is_some()).map(|n| n.q);
        let without = policy::best_rate(by_text, without, &self.cost, &mut self.scratch);
        let n = policy::choose(trees, step, &self.cost, &mut self.scratch);
        if self.asks_heads {
            let hoped: f64 = trees.iter().flat_map(Tree::nodes).map(|n| f64::from(n.q)).sum();
            self.rest.note((n_decode as f64 + hoped) / step.seconds(&self.cost, n) / without - 1.0);
        }
        n
    }

    /// Notes a step of `n_rows` rows, and what it took if that says what rows cost: if none was a
    /// prompt's.
    pub fn note_step(&mut self, n_rows: usize, seconds: Option<f64>) {
        if let Some(seconds) = seconds {
            self.cost.note(self.n_before, n_rows, seconds);
        }
        self.n_before = n_rows;
    }

    /// Notes an answer that is complete, for its owner's others to be drafted from.
    pub fn remember(&mut self, owner: u32, answer: &[Token]) {
        if let Some(text) = &mut self.text {
            text.remember(owner, answer);
        }
    }

    /// Notes the walk down the tree of the `origin`-th origin, of which `n_verified` nodes were
    /// computed: the accepted nodes, and the `last` token that the model chose behind them. A
    /// verified node holds it only if the request ended with it; there is none if nobody waited for
    /// it any more. `trust` is the sequence's.
    pub fn note_walk(
        &mut self,
        origin: usize,
        n_verified: usize,
        accepted: &[usize],
        last: Option<Token>,
        trust: &mut Trusts,
    ) {
        // Candidates that were not worth verifying teach as much as those that were.
        if self.offered(origin).is_none_or(Tree::is_empty) {
            return trust.fade();
        }
        self.note_verified(origin, n_verified, accepted, last);
        let tree = &self.offered[origin];
        let factor = trust.heads.factor();
        if tree.nodes().iter().all(|n| n.p == 0.0) {
            trust.heads.fade();
        }
        let mut parent = None;
        for token in accepted.iter().map(|&i| tree.nodes()[i].token).chain(last) {
            let children = || tree.nodes().iter().filter(|n| n.parent == parent);
            let by_heads = || children().filter(|n| n.p > 0.0);
            let estimate =
                |(rank, n): (usize, &Node)| self.calibration.estimate(n.depth, rank, n.p, 1.0);
            let foreseen = &mut self.foreseen;
            foreseen.clear();
            foreseen.extend(by_heads().enumerate().map(estimate));
            if let Some(text) = &mut self.text {
                let mut of_heads = foreseen.iter().map(|h| (h * factor).min(calibration::HIGHEST));
                let each = children().map(|n| (n, (n.p > 0.0).then(|| of_heads.next()).flatten()));
                text.note(each, !foreseen.is_empty(), token, &mut trust.text);
            }
            if !foreseen.is_empty() {
                trust.heads.note(foreseen.iter().sum(), by_heads().any(|n| n.token == token));
                let depth = parent.map_or(0, |i| tree.nodes()[i].depth) + 1;
                self.calibration.note_offer(depth, foreseen.iter().copied());
            }
            by_heads().for_each(|n| self.calibration.note(n.depth, n.p, n.token == token));
            parent = tree.child(parent, token);
        }
    }

    /// Notes whether each verified candidate was accepted, as far as that is known: behind a
    /// request's last token it is not.
    fn note_verified(
        &mut self,
        origin: usize,
        n_verified: usize,
        accepted: &[usize],
        last: Option<Token>,
    ) {
        let Some(last) = last else { return };
        let tree = &self.offered[origin];
        let end = tree.child(accepted.last().copied(), last).filter(|&node| node < n_verified);
        let is_behind_end = |mut at: Option<usize>| loop {
            match at {
                Some(i) if Some(i) == end => return true,
                Some(i) => at = tree.nodes()[i].parent,
                None => return false,
            }
        };
        for (i, node) in tree.nodes()[..n_verified].iter().enumerate() {
            if end.is_none() || !is_behind_end(node.parent) {
                let is_right = accepted.contains(&i) || Some(i) == end;
                self.reliability.note(node.source(), node.depth, node.q, is_right);
            }
        }
    }
}

impl Rest {
    /// Notes what a draft gained; sets how many steps go by without one.
    fn note(&mut self, gain: f64) {
        self.gain += GAIN * (gain - self.gain);
        self.left = (-self.gain / LOSS).clamp(0.0, LONGEST_REST) as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::SeqId;

    /// Offers `p` of token 1, and half of that of token 2.
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
            origins
                .iter()
                .zip(trees)
                .for_each(|(_, tree)| tree.fill(std::slice::from_ref(&level), calibration, 1.0, 2));
        }
    }

    /// One step of one sequence; returns how many candidates were verified, or `None` without a
    /// draft.
    fn step(speculator: &mut Speculator, model: Token) -> Option<usize> {
        if !speculator.is_due(1, 1) {
            return None;
        }
        let mut trees = vec![Tree::default()];
        speculator.draft(
            &mut [Origin {
                seq: SeqId(0),
                hidden: &[],
                root: Token(0),
                max_depth: 1,
                trust: 1.0,
                open: 1.0,
                text: None,
            }],
            1,
            1,
            &mut trees,
        );
        let n = speculator.choose(&mut trees, 1, 1, 64, 0.05);
        let accepted = trees[0].child(None, model);
        speculator.note_walk(
            0,
            n,
            accepted.as_slice(),
            accepted.is_none().then_some(model),
            &mut Trusts::default(),
        );
        Some(n)
    }

    #[test]
    fn drafts_that_lose_become_rare_and_come_back_when_they_pay() {
        let mut speculator =
            Speculator::new(Box::new(Sure(0.6)), 2, Cost::from_points(&[(1, 1.0), (64, 20.0)]));
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
        let mut speculator =
            Speculator::new(Box::new(Sure(0.3)), 2, Cost::from_points(&[(1, 1.0), (64, 30.0)]));
        let n: usize = (0..400).filter_map(|_| step(&mut speculator, Token(1))).sum();
        assert!(n > 100, "the head said 0.3, but is always right: {n}");
    }

    #[test]
    fn a_row_as_dear_as_a_token_is_never_drafted_for() {
        let mut speculator =
            Speculator::new(Box::new(Sure(0.99)), 2, Cost::from_points(&[(1, 1.0), (64, 64.0)]));
        assert!((0..100).all(|_| step(&mut speculator, Token(1)).is_none()));
    }
}
