//! The rules of a grammar, and what is known of them.

use super::chars::Chars;

/// What a text may be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// One character of these.
    Chars(Chars),
    /// JSON that a schema describes, by the schema's place: an object. Only whole rules are that.
    Json(usize),
    /// A rule, by its place.
    Rule(usize),
    Seq(Vec<Node>),
    Alt(Vec<Node>),
    /// At least, and at most; `None`: any number.
    Repeat(Box<Node>, usize, Option<usize>),
}

impl Node {
    pub fn empty() -> Self {
        Self::Seq(Vec::new())
    }

    /// Whether it holds for all rules that it refers to.
    pub fn all_rules(&self, holds: &impl Fn(usize) -> bool) -> bool {
        match self {
            Self::Chars(_) | Self::Json(_) => true,
            Self::Rule(rule) => holds(*rule),
            Self::Seq(nodes) | Self::Alt(nodes) => nodes.iter().all(|n| n.all_rules(holds)),
            Self::Repeat(node, ..) => node.all_rules(holds),
        }
    }

    /// Whether it may be empty, or can end at all, by what is known of rules: `leaf` is the answer
    /// for a character.
    pub fn holds(&self, leaf: bool, rules: &[bool]) -> bool {
        match self {
            Self::Chars(_) | Self::Json(_) => leaf,
            Self::Rule(rule) => rules[*rule],
            Self::Seq(nodes) => nodes.iter().all(|n| n.holds(leaf, rules)),
            Self::Alt(nodes) => nodes.iter().any(|n| n.holds(leaf, rules)),
            Self::Repeat(node, least, _) => *least == 0 || node.holds(leaf, rules),
        }
    }
}

impl Node {
    /// It without what can never end, by what is known of rules; `None` if nothing is left.
    fn pruned(self, can_end: &[bool]) -> Option<Self> {
        match self {
            Self::Chars(_) | Self::Json(_) => Some(self),
            Self::Rule(rule) => can_end[rule].then_some(self),
            Self::Seq(nodes) => {
                let nodes = nodes.into_iter().map(|node| node.pruned(can_end));
                nodes.collect::<Option<Vec<_>>>().map(Self::Seq)
            }
            Self::Alt(nodes) => {
                let nodes = nodes.into_iter().filter_map(|node| node.pruned(can_end));
                Some(nodes.collect::<Vec<_>>()).filter(|nodes| !nodes.is_empty()).map(Self::Alt)
            }
            Self::Repeat(node, least, most) => match node.pruned(can_end) {
                Some(node) => Some(Self::Repeat(Box::new(node), least, most)),
                None => (least == 0).then(Self::empty),
            },
        }
    }
}

/// One of the texts that a rule may be: what comes before, and whether the rule itself comes last.
type Tail = (Vec<Node>, bool);

/// The texts of a node in which `rule` comes last or not at all; `None` if it comes elsewhere.
fn tails(node: &Node, rule: usize) -> Option<Vec<Tail>> {
    if node.all_rules(&|other| other != rule) {
        return Some(vec![(vec![node.clone()], false)]);
    }
    match node {
        Node::Rule(_) => Some(vec![(Vec::new(), true)]),
        Node::Alt(nodes) => {
            let each: Option<Vec<_>> = nodes.iter().map(|node| tails(node, rule)).collect();
            Some(each?.concat())
        }
        Node::Seq(nodes) => {
            let (last, before) = nodes.split_last()?;
            let alone = before.iter().all(|node| node.all_rules(&|other| other != rule));
            let tails = tails(last, rule).filter(|_| alone)?;
            let with = |(tail, again): Tail| ([before, &tail].concat(), again);
            Some(tails.into_iter().map(with).collect())
        }
        Node::Repeat(node, 0, Some(1)) => {
            let mut tails = tails(node, rule)?;
            tails.push((Vec::new(), false));
            Some(tails)
        }
        Node::Chars(_) | Node::Json(_) | Node::Repeat(..) => None,
    }
}

impl Node {
    /// It with one at most of what leads to rules that are `limited`: repetitions of it come once, and
    /// more of it after the first is left out where it may be.
    fn limited(self, leads: &impl Fn(&Self) -> bool) -> Self {
        match self {
            Self::Alt(nodes) => {
                Self::Alt(nodes.into_iter().map(|node| node.limited(leads)).collect())
            }
            Self::Repeat(node, least, _) if leads(&node) => {
                Self::Repeat(Box::new(node.limited(leads)), least.min(1), Some(1))
            }
            Self::Seq(nodes) => {
                let mut is_first = true;
                let mut limited = |node: Self| {
                    let leads_there = leads(&node);
                    let is_more = leads_there && !is_first;
                    is_first &= !leads_there;
                    match node {
                        Self::Repeat(_, 0, _) if is_more => Self::empty(),
                        node => node.limited(leads),
                    }
                };
                Self::Seq(nodes.into_iter().map(&mut limited).collect())
            }
            node => node,
        }
    }
}

/// Rules; [`Node::Rule`] names them by their place.
pub struct Grammar {
    pub rules: Vec<Node>,
    pub root: usize,
    /// Rules of which a text has one at most; empty: any number.
    pub once: Vec<usize>,
}

impl Grammar {
    /// By rule: whether it [`holds`](Node::holds).
    pub fn fixpoint(&self, leaf: bool) -> Vec<bool> {
        let mut known = vec![false; self.rules.len()];
        loop {
            let next: Vec<bool> = self.rules.iter().map(|rule| rule.holds(leaf, &known)).collect();
            if next == known {
                return known;
            }
            known = next;
        }
    }

    /// Leaves one at most of the rules that come [`once`](Self::once).
    pub fn limit(&mut self) {
        let mut leads: Vec<bool> = (0..self.rules.len()).map(|i| self.once.contains(&i)).collect();
        let leads_there = |node: &Node, leads: &[bool]| !node.all_rules(&|rule| !leads[rule]);
        loop {
            let known = self.rules.iter().zip(&leads).map(|(n, &it)| it || leads_there(n, &leads));
            let known: Vec<bool> = known.collect();
            if known == leads {
                break;
            }
            leads = known;
        }
        for (i, rule) in self.rules.iter_mut().enumerate() {
            if leads[i] && !self.once.contains(&i) {
                let node = std::mem::replace(rule, Node::empty());
                *rule = node.limited(&|node| leads_there(node, &leads));
            }
        }
    }

    /// Makes repetitions of rules that come last in themselves: one terminal can match those.
    pub fn straighten(&mut self) {
        for rule in 0..self.rules.len() {
            let is_plain = self.rules[rule].all_rules(&|other| other != rule);
            let Some(tails) = tails(&self.rules[rule], rule).filter(|_| !is_plain) else {
                continue;
            };
            let (again, ends): (Vec<Tail>, Vec<Tail>) = tails.into_iter().partition(|t| t.1);
            let any = |tails: Vec<Tail>| {
                Node::Alt(tails.into_iter().map(|(nodes, _)| Node::Seq(nodes)).collect())
            };
            let again = Node::Repeat(Box::new(any(again)), 0, None);
            self.rules[rule] = Node::Seq(vec![again, any(ends)]);
        }
    }

    /// Leaves out what can never end, which no text has. Returns `false` if that is the root.
    pub fn prune(&mut self) -> bool {
        let can_end = self.fixpoint(true);
        for rule in &mut self.rules {
            let node = std::mem::replace(rule, Node::empty());
            *rule = node.pruned(&can_end).unwrap_or_else(Node::empty); // nothing refers to it now
        }
        can_end[self.root]
    }

    /// By rule: whether it may be empty.
    pub fn nullable(&self) -> Vec<bool> {
        self.fixpoint(false)
    }

    /// By rule: whether it refers to no circle of rules, so that one terminal can match it.
    pub fn regular(&self) -> Vec<bool> {
        let is_regular = |node: &Node, regular: &[bool]| {
            !matches!(node, Node::Json(_)) && node.all_rules(&|rule| regular[rule])
        };
        let mut regular = vec![false; self.rules.len()];
        loop {
            let next: Vec<bool> =
                self.rules.iter().map(|node| is_regular(node, &regular)).collect();
            if next == regular {
                return regular;
            }
            regular = next;
        }
    }
}
