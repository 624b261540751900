//! Finds terminals for which a lexer's longest match is always the right one.
//!
//! It begins with the largest parts that are regular. Where a text of one terminal, followed by
//! what the grammar allows there, is also the beginning of a text of a terminal that may stand in
//! the same place, the lexer would go on where the grammar need not; so the terminal is taken apart.
//! At worst each terminal is one character, for which the longest match is the only one.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::chars::Chars;
use super::nfa::{Budget, Nfa, Spent};
use super::rules::{Grammar, Node};

/// What Lark's rules are made of.
#[derive(Clone, Debug)]
pub enum Item {
    /// A terminal that is not empty, or JSON, by its place.
    Terminal(usize),
    /// A rule of the grammar.
    Rule(usize),
    Seq(Vec<Item>),
    Alt(Vec<Item>),
    Repeat(Box<Item>, usize, Option<usize>),
}

/// A grammar as rules over terminals.
pub struct Split {
    pub terminals: Vec<Node>,
    /// Bodies of those rules of the grammar that are still rules.
    pub rules: HashMap<usize, Item>,
    pub root: Item,
}

/// Splits a grammar.
pub fn split(grammar: &Grammar) -> Split {
    let mut taken_apart = HashSet::new();
    let mut budget = Budget::new();
    loop {
        let split = Splitter::new(grammar, &taken_apart, false).split();
        match wrong(&split, grammar, &mut budget) {
            Ok(None) => return split,
            Ok(Some(terminal)) => taken_apart.insert(split.terminals[terminal].clone()),
            Err(Spent) => return Splitter::new(grammar, &taken_apart, true).split(),
        };
    }
}

struct Splitter<'g> {
    grammar: &'g Grammar,
    taken_apart: &'g HashSet<Node>,
    /// Every terminal is one character.
    only_chars: bool,
    regular: Vec<bool>,
    nullable: Vec<bool>,
    places: HashMap<Node, usize>,
    open: Vec<usize>,
    rules: HashMap<usize, Item>,
}

impl<'g> Splitter<'g> {
    fn new(grammar: &'g Grammar, taken_apart: &'g HashSet<Node>, only_chars: bool) -> Self {
        Self {
            grammar,
            taken_apart,
            only_chars,
            regular: grammar.regular(),
            nullable: grammar.nullable(),
            places: HashMap::new(),
            open: Vec::new(),
            rules: HashMap::new(),
        }
    }

    fn split(mut self) -> Split {
        let root = self.item(&Node::Rule(self.grammar.root));
        while let Some(rule) = self.open.pop() {
            if !self.rules.contains_key(&rule) {
                self.rules.insert(rule, Item::Seq(Vec::new())); // it may refer to itself
                let item = self.item(&self.grammar.rules[rule]);
                self.rules.insert(rule, item);
            }
        }
        let mut terminals: Vec<(Node, usize)> = self.places.into_iter().collect();
        terminals.sort_unstable_by_key(|(_, place)| *place);
        let terminals = terminals.into_iter().map(|(node, _)| node).collect();
        Split { terminals, rules: self.rules, root }
    }

    /// The node as one terminal, if it is one.
    fn terminal(&mut self, node: &Node) -> Option<Item> {
        let mut node = node;
        while let Node::Rule(rule) = node {
            node = &self.grammar.rules[*rule];
        }
        let is_char = matches!(node, Node::Chars(_));
        let may_be = is_char || !self.only_chars && !self.taken_apart.contains(node);
        let is_empty = *node == Node::empty();
        if is_empty || !may_be || !node.all_rules(&|rule| self.regular[rule]) {
            return None;
        }
        let next = self.places.len();
        let terminal = Item::Terminal(*self.places.entry(node.clone()).or_insert(next));
        let may_be_empty = node.holds(false, &self.nullable);
        Some(if may_be_empty { Item::Repeat(Box::new(terminal), 0, Some(1)) } else { terminal })
    }

    fn is_regular(&self, node: &Node) -> bool {
        node.all_rules(&|rule| self.regular[rule])
    }

    fn item(&mut self, node: &Node) -> Item {
        if self.is_regular(node)
            && let Some(terminal) = self.terminal(node)
        {
            return terminal;
        }
        match node {
            Node::Chars(_) => Item::Seq(Vec::new()), // never: it is a terminal
            Node::Json(_) => {
                let next = self.places.len();
                Item::Terminal(*self.places.entry(node.clone()).or_insert(next))
            }
            Node::Rule(rule) if matches!(self.grammar.rules[*rule], Node::Json(_)) => {
                self.item(&self.grammar.rules[*rule])
            }
            Node::Rule(rule) => {
                self.open.push(*rule);
                Item::Rule(*rule)
            }
            Node::Repeat(node, least, most) => {
                Item::Repeat(Box::new(self.item(node)), *least, *most)
            }
            Node::Alt(nodes) => {
                let (regular, others): (Vec<Node>, Vec<Node>) =
                    nodes.iter().cloned().partition(|node| self.is_regular(node));
                let mut items = self.items(&regular, Node::Alt, regular.len() == nodes.len());
                items.extend(others.iter().map(|node| self.item(node)));
                Item::Alt(items)
            }
            Node::Seq(nodes) => {
                let runs = nodes.chunk_by(|a, b| self.is_regular(a) == self.is_regular(b));
                let runs: Vec<&[Node]> = runs.collect();
                let is_all = runs.len() == 1;
                Item::Seq(
                    runs.into_iter().flat_map(|run| self.items(run, Node::Seq, is_all)).collect(),
                )
            }
        }
    }

    /// Nodes as one terminal, unless they are `all` of a node that is none; or each by itself.
    fn items(&mut self, nodes: &[Node], join: fn(Vec<Node>) -> Node, all: bool) -> Vec<Item> {
        let joined = (nodes.len() > 1 && !all && self.is_regular(&nodes[0]))
            .then(|| self.terminal(&join(nodes.to_vec())))
            .flatten();
        match joined {
            Some(terminal) => vec![terminal],
            None => nodes.iter().map(|node| self.item(node)).collect(),
        }
    }
}

type Terminals = BTreeSet<usize>;

/// A terminal that must be taken apart.
fn wrong(split: &Split, grammar: &Grammar, budget: &mut Budget) -> Result<Option<usize>, Spent> {
    let n = split.terminals.len();
    let nfa = |node| Nfa::new(node, grammar, budget);
    let nfas: Vec<Nfa> = split.terminals.iter().map(nfa).collect::<Result<_, _>>()?;
    let order = Order::of(split);
    let begins = |terminals: &Terminals| {
        let mut chars = Chars::default();
        terminals.iter().for_each(|&t| chars.add(&nfas[t].first()));
        chars
    };
    let next: Vec<Chars> = order.next.iter().map(begins).collect();
    let together = order.together(&nfas, budget)?;
    for a in 0..n {
        for b in (0..n).filter(|b| together.contains(&(a, *b))) {
            let is_char = |t: usize| matches!(split.terminals[t], Node::Chars(_) | Node::Json(_));
            if !is_char(b) && nfas[a].is_passed_by(&nfas[b], &next[a], budget)? {
                return Ok(Some(if is_char(a) { b } else { a }));
            }
        }
    }
    Ok(None)
}

/// Which terminals come first, and after which.
struct Order {
    first: Terminals,
    next: Vec<Terminals>,
}

/// What is known of each rule.
#[derive(Clone, Default, PartialEq)]
struct Known {
    first: Terminals,
    /// It may be empty.
    nullable: bool,
    /// What may come after it.
    next: Terminals,
}

impl Order {
    fn of(split: &Split) -> Self {
        let mut rules: HashMap<usize, Known> =
            split.rules.keys().map(|&rule| (rule, Known::default())).collect();
        let mut next = vec![Terminals::new(); split.terminals.len()];
        loop {
            let before = (rules.clone(), next.clone());
            for (rule, item) in &split.rules {
                let (first, nullable) = first(item, &rules);
                let known = rules.entry(*rule).or_default();
                (known.first, known.nullable) = (first, nullable);
                let after = known.next.clone();
                follow(item, &after, &mut rules, &mut next);
            }
            follow(&split.root, &Terminals::new(), &mut rules, &mut next);
            if before == (rules.clone(), next.clone()) {
                return Self { first: first(&split.root, &rules).0, next };
            }
        }
    }

    /// Pairs of terminals that may begin in one place.
    fn together(
        &self,
        nfas: &[Nfa],
        budget: &mut Budget,
    ) -> Result<HashSet<(usize, usize)>, Spent> {
        let mut pairs = HashSet::new();
        let mut open = Vec::new();
        let mut add = |these: &Terminals, those: &Terminals, open: &mut Vec<(usize, usize)>| {
            for &a in these {
                for &b in those {
                    if pairs.insert((a, b)) {
                        pairs.insert((b, a));
                        open.push((a, b));
                    }
                }
            }
        };
        add(&self.first, &self.first, &mut open);
        while let Some((a, b)) = open.pop() {
            if a == b || nfas[a].shares(&nfas[b], budget)? {
                add(&self.next[a], &self.next[b], &mut open);
            }
        }
        Ok(pairs)
    }
}

/// The terminals that an item may begin with, and whether it may be empty.
fn first(item: &Item, rules: &HashMap<usize, Known>) -> (Terminals, bool) {
    match item {
        Item::Terminal(terminal) => (Terminals::from([*terminal]), false),
        Item::Rule(rule) => (rules[rule].first.clone(), rules[rule].nullable),
        Item::Repeat(item, least, _) => {
            let (terminals, nullable) = first(item, rules);
            (terminals, nullable || *least == 0)
        }
        Item::Alt(items) => items
            .iter()
            .map(|item| first(item, rules))
            .fold((Terminals::new(), false), |all, one| (&all.0 | &one.0, all.1 || one.1)),
        Item::Seq(items) => {
            let mut terminals = Terminals::new();
            for item in items {
                let (more, nullable) = first(item, rules);
                terminals.extend(more);
                if !nullable {
                    return (terminals, false);
                }
            }
            (terminals, true)
        }
    }
}

/// Records what comes after the terminals and rules of an item, which `after` comes after.
fn follow(
    item: &Item,
    after: &Terminals,
    rules: &mut HashMap<usize, Known>,
    next: &mut [Terminals],
) {
    match item {
        Item::Terminal(terminal) => next[*terminal].extend(after),
        Item::Rule(rule) => rules.entry(*rule).or_default().next.extend(after),
        Item::Alt(items) => items.iter().for_each(|item| follow(item, after, rules, next)),
        Item::Repeat(item, _, most) => {
            let mut after = after.clone();
            if *most != Some(1) {
                after.extend(first(item, rules).0);
            }
            follow(item, &after, rules, next);
        }
        Item::Seq(items) => {
            let mut after = after.clone();
            for item in items.iter().rev() {
                follow(item, &after, rules, next);
                let (terminals, nullable) = first(item, rules);
                if !nullable {
                    after.clear();
                }
                after.extend(terminals);
            }
        }
    }
}
