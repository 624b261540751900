//! Automata of terminals: how two of them match the same text.

use super::chars::Chars;
use super::rules::{Grammar, Node};

/// States and pairs of states that one grammar may cost.
const BUDGET: usize = 2_000_000;

/// What is left of that.
pub struct Budget(usize);

/// It is spent.
#[derive(Debug)]
pub struct Spent;

impl Budget {
    pub fn new() -> Self {
        Self(BUDGET)
    }

    fn spend(&mut self) -> Result<(), Spent> {
        self.0 = self.0.checked_sub(1).ok_or(Spent)?;
        Ok(())
    }
}

/// State 0 is the start, state 1 the end.
pub struct Nfa {
    steps: Vec<Vec<(Chars, usize)>>,
    silent: Vec<Vec<usize>>,
}

impl Nfa {
    /// Of a node without circles.
    pub fn new(node: &Node, grammar: &Grammar, budget: &mut Budget) -> Result<Self, Spent> {
        let mut nfa = Self { steps: vec![vec![]; 2], silent: vec![vec![]; 2] };
        nfa.add(node, 0, 1, grammar, budget)?;
        Ok(nfa)
    }

    fn state(&mut self, budget: &mut Budget) -> Result<usize, Spent> {
        budget.spend()?;
        self.steps.push(Vec::new());
        self.silent.push(Vec::new());
        Ok(self.steps.len() - 1)
    }

    fn add(
        &mut self,
        node: &Node,
        from: usize,
        to: usize,
        grammar: &Grammar,
        budget: &mut Budget,
    ) -> Result<(), Spent> {
        budget.spend()?;
        match node {
            Node::Chars(chars) => self.steps[from].push((chars.clone(), to)),
            // A lexer of its own goes on from there.
            Node::Json(_) => self.steps[from].push((Chars::one(u32::from('{')), to)),
            Node::Rule(rule) => self.add(&grammar.rules[*rule], from, to, grammar, budget)?,
            Node::Alt(nodes) => {
                for node in nodes {
                    self.add(node, from, to, grammar, budget)?;
                }
            }
            Node::Seq(nodes) => {
                let mut at = from;
                for node in nodes {
                    let next = self.state(budget)?;
                    self.add(node, at, next, grammar, budget)?;
                    at = next;
                }
                self.silent[at].push(to);
            }
            Node::Repeat(node, least, most) => {
                let mut at = from;
                for i in 0..most.unwrap_or(*least) {
                    if i >= *least {
                        self.silent[at].push(to);
                    }
                    let next = self.state(budget)?;
                    self.add(node, at, next, grammar, budget)?;
                    at = next;
                }
                if most.is_none() {
                    // A state of its own: the circle must not lead into what is before.
                    let round = self.state(budget)?;
                    self.silent[at].push(round);
                    self.add(node, round, round, grammar, budget)?;
                    at = round;
                }
                self.silent[at].push(to);
            }
        }
        Ok(())
    }

    /// Whether a text that is not empty leads to the end here and, in `other`, to a state for which
    /// `holds`.
    fn meets(
        &self,
        other: &Self,
        budget: &mut Budget,
        holds: impl Fn(usize) -> bool,
    ) -> Result<bool, Spent> {
        let n = other.steps.len();
        // Whether a character was read, then the pair of states.
        let mut seen = vec![false; 2 * self.steps.len() * n];
        let mut open = vec![(false, 0, 0)];
        while let Some((read, a, b)) = open.pop() {
            let place = (usize::from(read) * self.steps.len() + a) * n + b;
            if std::mem::replace(&mut seen[place], true) {
                continue;
            }
            budget.spend()?;
            if read && a == 1 && holds(b) {
                return Ok(true);
            }
            open.extend(self.silent[a].iter().map(|&next| (read, next, b)));
            open.extend(other.silent[b].iter().map(|&next| (read, a, next)));
            for (here, next) in &self.steps[a] {
                let both = other.steps[b].iter().filter(|(there, _)| here.meets(there));
                open.extend(both.map(|(_, there)| (true, *next, *there)));
            }
        }
        Ok(false)
    }

    /// Whether one text is of both.
    pub fn shares(&self, other: &Self, budget: &mut Budget) -> Result<bool, Spent> {
        self.meets(other, budget, |state| state == 1)
    }

    /// Whether after a text of this one, with one of `next` after it, the other may go on.
    pub fn is_passed_by(
        &self,
        other: &Self,
        next: &Chars,
        budget: &mut Budget,
    ) -> Result<bool, Spent> {
        self.meets(other, budget, |state| {
            other.steps[state].iter().any(|(chars, _)| chars.meets(next))
        })
    }

    /// What its texts begin with.
    pub fn first(&self) -> Chars {
        let (mut first, mut open) = (Chars::default(), vec![0]);
        let mut seen = vec![false; self.steps.len()];
        while let Some(state) = open.pop() {
            if !std::mem::replace(&mut seen[state], true) {
                self.steps[state].iter().for_each(|(chars, _)| first.add(chars));
                open.extend(&self.silent[state]);
            }
        }
        first
    }
}
