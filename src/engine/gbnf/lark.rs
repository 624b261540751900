//! Writes llguidance's Lark.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use serde_json::Value;

use super::rules::{Grammar, Node};
use super::split::{Item, Split};

/// Writes a grammar: `start`, rules `r0`, `r1`, ..., and terminals `T0`, `T1`, ... of parts `P0`,
/// `P1`, ..., and schemas in place of terminals. Groups have names of their own, since Lark's may not be deep.
pub fn write(grammar: &Grammar, split: &Split, schemas: &BTreeMap<String, Value>) -> String {
    let (text, n_parts, of_rules) = (String::new(), 0, HashMap::new());
    let mut writer = Writer { grammar, split, text, n_parts, of_rules };
    writer.line("start", |writer| writer.item(&split.root));
    let mut rules: Vec<_> = split.rules.iter().collect();
    rules.sort_unstable_by_key(|(rule, _)| **rule);
    for (rule, item) in rules {
        writer.line(&format!("r{rule}"), |writer| writer.item(item));
    }
    for (i, node) in split.terminals.iter().enumerate() {
        if let Node::Json(schema) = node {
            let schema = schemas.values().nth(*schema).unwrap_or(&Value::Null);
            writer.line(&terminal(split, i), |_| format!("%json {schema}"));
            continue;
        }
        // A terminal is never empty: where it may be left out, the rules say so.
        writer.line(&format!("T{i}"), |writer| format!("{} & /(?s:.+)/", writer.part(node)));
    }
    writer.text
}

struct Writer<'g> {
    grammar: &'g Grammar,
    split: &'g Split,
    text: String,
    n_parts: usize,
    /// Parts that match whole rules.
    of_rules: HashMap<usize, String>,
}

impl Writer<'_> {
    fn line(&mut self, name: &str, body: impl FnOnce(&mut Self) -> String) {
        let body = body(self);
        let _ = writeln!(self.text, "{name}: {body}"); // a string takes all
    }

    fn name(&mut self, letter: char) -> String {
        self.n_parts += 1;
        format!("{letter}{}", self.n_parts)
    }

    /// An item by one name, or in one line.
    fn item(&mut self, item: &Item) -> String {
        match item {
            Item::Terminal(place) => terminal(self.split, *place),
            Item::Rule(rule) => format!("r{rule}"),
            Item::Seq(items) => {
                let items: Vec<String> = items.iter().map(|item| self.item(item)).collect();
                self.rule(if items.is_empty() { "\"\"".into() } else { items.join(" ") })
            }
            Item::Alt(items) => {
                let items: Vec<String> = items.iter().map(|item| self.item(item)).collect();
                self.rule(items.join(" | "))
            }
            Item::Repeat(item, least, most) => {
                let item = self.item(item);
                self.rule(repeated(&item, *least, *most))
            }
        }
    }

    /// A rule of its own.
    fn rule(&mut self, body: String) -> String {
        let name = self.name('g');
        self.line(&name, |_| body);
        name
    }

    /// A node of a terminal by one name.
    fn part(&mut self, node: &Node) -> String {
        let body = match node {
            Node::Chars(chars) => return format!("/{}/", chars.class()),
            Node::Json(_) => "\"\"".into(), // never: it is no part of a terminal
            Node::Rule(rule) => {
                if let Some(name) = self.of_rules.get(rule) {
                    return name.clone();
                }
                let name = self.part(&self.grammar.rules[*rule]);
                self.of_rules.insert(*rule, name.clone());
                return name;
            }
            Node::Seq(nodes) if nodes.is_empty() => return "\"\"".into(),
            Node::Seq(nodes) => {
                nodes.iter().map(|node| self.part(node)).collect::<Vec<_>>().join(" ")
            }
            Node::Alt(nodes) => {
                nodes.iter().map(|node| self.part(node)).collect::<Vec<_>>().join(" | ")
            }
            Node::Repeat(node, least, most) => repeated(&self.part(node), *least, *most),
        };
        let name = self.name('P');
        self.line(&name, |_| body);
        name
    }
}

/// The name of a terminal, or of the rule for JSON in its place.
fn terminal(split: &Split, place: usize) -> String {
    let letter = if matches!(split.terminals[place], Node::Json(_)) { 'j' } else { 'T' };
    format!("{letter}{place}")
}

/// What is repeated, as one expression.
fn repeated(name: &str, least: usize, most: Option<usize>) -> String {
    match (least, most) {
        (0, None) => format!("{name}*"),
        (1, None) => format!("{name}+"),
        (least, None) => format!("{name}{{{least},}}"),
        (_, Some(0)) => "\"\"".into(),
        (0, Some(1)) => format!("{name}?"),
        (least, Some(most)) => format!("{name}{{{least},{most}}}"),
    }
}
