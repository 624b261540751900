//! Reads GBNF.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::chars::Chars;
use super::rules::{Grammar, Node};

/// Groups in groups.
const MAX_DEPTH: usize = 100;
/// Rules of a grammar.
const MAX_RULES: usize = 4000;
/// The largest number in `{m,n}`.
const MAX_TIMES: usize = 2000;

/// # Errors
/// What is wrong, and in which line.
pub fn parse(
    text: &str,
    schemas: &BTreeMap<String, Value>,
    once: &[String],
) -> Result<Grammar, String> {
    let mut parser = Parser { text, at: 0, depth: 0, names: HashMap::new(), rules: Vec::new() };
    let parsed = parser.rules();
    parsed.map_err(|why| {
        let line = 1 + text[..parser.at].matches('\n').count();
        format!("line {line}: {why}")
    })?;
    let undefined = parser.rules.iter().zip(&parser.names_in_order()).find_map(|(rule, name)| {
        rule.is_none().then(|| format!("rule `{name}` is used, but not defined"))
    });
    if let Some(why) = undefined {
        return Err(why);
    }
    for (i, name) in schemas.keys().enumerate() {
        if let Some(&place) = parser.names.get(name.as_str()) {
            parser.rules[place] = Some(Node::Json(i));
        }
    }
    let root = *parser.names.get("root").ok_or("there is no rule `root`")?;
    let once = once.iter().filter_map(|name| parser.names.get(name.as_str()).copied()).collect();
    let rules = parser.rules.into_iter().flatten().collect();
    Ok(Grammar { rules, root, once })
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
    names: HashMap<&'t str, usize>,
    /// By the order in which their names appear.
    rules: Vec<Option<Node>>,
}

impl<'t> Parser<'t> {
    fn names_in_order(&self) -> Vec<&'t str> {
        let mut names: Vec<_> = self.names.iter().collect();
        names.sort_unstable_by_key(|(_, place)| **place);
        names.into_iter().map(|(name, _)| *name).collect()
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn take(&mut self, token: &str) -> bool {
        let is_next = self.text[self.at..].starts_with(token);
        self.at += if is_next { token.len() } else { 0 };
        is_next
    }

    fn take_while(&mut self, holds: impl Fn(char) -> bool) -> &'t str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !holds(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// White space and comments; line ends only where a rule cannot end.
    fn space(&mut self, lines: bool) {
        loop {
            let passed =
                self.take_while(|c| matches!(c, ' ' | '\t') || lines && matches!(c, '\r' | '\n'));
            if self.peek() == Some('#') {
                self.take_while(|c| !matches!(c, '\r' | '\n'));
            } else if passed.is_empty() {
                return;
            }
        }
    }

    fn rules(&mut self) -> Result<(), String> {
        self.space(true);
        while self.at < self.text.len() {
            let place = self.name().ok_or("a rule's name should be here")?;
            self.space(false);
            if !self.take("::=") {
                return Err("`::=` should be here".into());
            }
            self.space(true);
            let node = self.alternatives(false)?;
            if !matches!(self.peek(), None | Some('\r' | '\n')) {
                return Err(format!("{:?} is not expected here", self.peek().unwrap_or_default()));
            }
            self.rules[place] = Some(node);
            if self.rules.len() > MAX_RULES {
                return Err(format!("there are more than {MAX_RULES} rules"));
            }
            self.space(true);
        }
        Ok(())
    }

    /// The place of the rule whose name is here.
    fn name(&mut self) -> Option<usize> {
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '-');
        if name.is_empty() {
            return None;
        }
        let next = self.rules.len();
        let place = *self.names.entry(name).or_insert(next);
        if place == next {
            self.rules.push(None);
        }
        Some(place)
    }

    fn alternatives(&mut self, nested: bool) -> Result<Node, String> {
        let mut nodes = vec![self.sequence(nested)?];
        while self.take("|") {
            self.space(true);
            nodes.push(self.sequence(nested)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Alt(nodes) })
    }

    fn sequence(&mut self, nested: bool) -> Result<Node, String> {
        let mut nodes = Vec::new();
        while let Some(node) = self.item()? {
            self.space(nested);
            nodes.push(self.repeated(node, nested)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Seq(nodes) })
    }

    fn item(&mut self) -> Result<Option<Node>, String> {
        if self.take("\"") {
            return self.literal().map(Some);
        }
        if self.take("[") {
            return self.class().map(Some);
        }
        if self.take("(") {
            return self.group().map(Some);
        }
        if self.take(".") {
            return Ok(Some(Node::Chars(Chars::any())));
        }
        if matches!(self.peek(), Some('<' | '!')) {
            return Err("tokens cannot be named here; characters can".into());
        }
        Ok(self.name().map(Node::Rule))
    }

    fn group(&mut self) -> Result<Node, String> {
        if self.depth == MAX_DEPTH {
            return Err(format!("groups are more than {MAX_DEPTH} deep"));
        }
        self.depth += 1;
        self.space(true);
        let node = self.alternatives(true)?;
        self.depth -= 1;
        if self.take(")") { Ok(node) } else { Err("`)` should be here".into()) }
    }

    /// A node with the `*`, `+`, `?` and `{m,n}` after it.
    fn repeated(&mut self, mut node: Node, nested: bool) -> Result<Node, String> {
        loop {
            let (least, most) = if self.take("*") {
                (0, None)
            } else if self.take("+") {
                (1, None)
            } else if self.take("?") {
                (0, Some(1))
            } else if self.take("{") {
                self.times(nested)?
            } else {
                return Ok(node);
            };
            self.space(nested);
            node = Node::Repeat(Box::new(node), least, most);
        }
    }

    /// What is after `{`, with the brace that closes it. As in llama.cpp, a large maximum is none.
    fn times(&mut self, nested: bool) -> Result<(usize, Option<usize>), String> {
        self.space(nested);
        let least = self.number().ok_or("a number should be here")?;
        self.space(nested);
        let mut most = Some(least);
        if self.take(",") {
            self.space(nested);
            most = self.number().filter(|&n| n <= MAX_TIMES);
            self.space(nested);
        }
        if !self.take("}") {
            return Err("`}` should be here".into());
        }
        if least > MAX_TIMES {
            return Err(format!("{least} times are too many: {MAX_TIMES} is the most"));
        }
        match most {
            Some(most) if most < least => Err(format!("{least} is more than {most}")),
            _ => Ok((least, most)),
        }
    }

    fn number(&mut self) -> Option<usize> {
        let digits = self.take_while(|c| c.is_ascii_digit());
        (!digits.is_empty()).then(|| digits.parse().unwrap_or(usize::MAX))
    }

    fn literal(&mut self) -> Result<Node, String> {
        let mut nodes = Vec::new();
        while !self.take("\"") {
            nodes.push(Node::Chars(Chars::one(self.char()?)));
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Seq(nodes) })
    }

    fn class(&mut self) -> Result<Node, String> {
        let negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            let first = self.char()?;
            let rest = &self.text[self.at..];
            let mut last = first;
            if rest.starts_with('-') && !rest.starts_with("-]") {
                self.at += 1;
                last = self.char()?;
            }
            if last < first {
                return Err("a range ends before it begins".into());
            }
            ranges.push((first, last));
        }
        let chars = Chars::new(ranges);
        let chars = if negated { chars.negated() } else { chars };
        if chars.is_empty() {
            Err("no character is in this class".into())
        } else {
            Ok(Node::Chars(chars))
        }
    }

    /// A character of a literal or a class.
    fn char(&mut self) -> Result<u32, String> {
        let c = self.peek().ok_or("the grammar ends in a literal or a class")?;
        self.at += c.len_utf8();
        if c != '\\' {
            return Ok(c.into());
        }
        let escape = self.peek().ok_or("the grammar ends in an escape")?;
        self.at += escape.len_utf8();
        match escape {
            'n' => Ok('\n'.into()),
            'r' => Ok('\r'.into()),
            't' => Ok('\t'.into()),
            '\\' | '"' | '[' | ']' | '-' => Ok(escape.into()),
            'x' => self.hex(2),
            'u' => self.hex(4),
            'U' => self.hex(8),
            _ => Err(format!("`\\{escape}` is no escape")),
        }
    }

    fn hex(&mut self, n: usize) -> Result<u32, String> {
        let digits = self.text.get(self.at..self.at + n).unwrap_or_default();
        let is_hex = digits.len() == n && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let code = u32::from_str_radix(digits, 16).ok().filter(|_| is_hex);
        let c = code
            .and_then(char::from_u32)
            .ok_or(format!("{n} hexadecimal digits of a character should be here"))?;
        self.at += n;
        Ok(c.into())
    }
}
