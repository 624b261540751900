//! Splits a template into tokens, with white space around tags trimmed as transformers asks for
//! (`trim_blocks`, `lstrip_blocks`).

use super::error::Error;

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// Text between tags.
    Data(String),
    /// `{{`.
    PrintBegin,
    /// `}}`.
    PrintEnd,
    /// `{%`.
    BlockBegin,
    /// `%}`.
    BlockEnd,
    Name(String),
    Text(String),
    Int(i128),
    Float(f64),
    Symbol(&'static str),
    End,
}

/// Longest first.
const SYMBOLS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

/// The tokens of `source`, each with its line; the last is [`Token::End`].
pub fn tokens(source: &str) -> Result<Vec<(Token, usize)>, Error> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, at: 0, line: 1, begins_line: true, tokens: Vec::new() };
    while lexer.at < source.len() {
        lexer.data()?;
    }
    lexer.push(Token::End);
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    source: &'s str,
    /// The next byte.
    at: usize,
    line: usize,
    /// The last tag took the end of its line.
    begins_line: bool,
    tokens: Vec<(Token, usize)>,
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    /// Goes on by `n` bytes.
    fn advance(&mut self, n: usize) {
        self.line += self.rest()[..n].matches('\n').count();
        self.at += n;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start().len());
    }

    fn fail<T>(&self, why: &str) -> Result<T, Error> {
        Err(Error::new(format!("line {}: {why}", self.line)))
    }

    /// Text up to the next tag, and the tag.
    fn data(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let is_tag = |at: &usize| matches!(rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
        let Some(n) = rest.match_indices('{').map(|(at, _)| at).find(is_tag) else {
            self.push(Token::Data(rest.to_owned()));
            self.advance(rest.len());
            return Ok(());
        };
        let tag = rest.as_bytes()[n + 1];
        let sign = rest.as_bytes().get(n + 2).copied().filter(|sign| matches!(sign, b'-' | b'+'));
        self.push_data(&rest[..n], sign, tag != b'{');
        self.advance(n + 2 + usize::from(sign.is_some()));
        self.begins_line = false;
        match tag {
            b'{' => {
                self.push(Token::PrintBegin);
                self.expression("}}", Token::PrintEnd)
            }
            b'#' => self.comment(),
            _ => match self.raw_begin() {
                Some(n) => {
                    self.advance(n);
                    self.raw()
                }
                None => {
                    self.push(Token::BlockBegin);
                    self.expression("%}", Token::BlockEnd)
                }
            },
        }
    }

    /// Text before a tag with `sign`.
    fn push_data(&mut self, text: &str, sign: Option<u8>, strips_indent: bool) {
        let line = text.rfind('\n').map_or(0, |at| at + 1);
        let indent = &text[line..];
        let text = match sign {
            Some(b'-') => text.trim_end(),
            None if strips_indent
                && (line > 0 || self.begins_line)
                && !indent.is_empty()
                && indent.trim().is_empty() =>
            {
                &text[..line]
            }
            _ => text,
        };
        if !text.is_empty() {
            self.push(Token::Data(text.to_owned()));
        }
    }

    /// Takes a tag's end, `sign` and `end`, if it is here, with the space that it trims.
    fn take_end(&mut self, end: &str, trims_line: bool) -> bool {
        let rest = self.rest();
        let n = if let Some(after) = rest.strip_prefix('-').and_then(|rest| rest.strip_prefix(end))
        {
            rest.len() - after.trim_start().len()
        } else if let Some(after) = rest.strip_prefix(end) {
            end.len() + usize::from(trims_line && after.starts_with('\n'))
        } else if trims_line && rest.strip_prefix('+').is_some_and(|rest| rest.starts_with(end)) {
            1 + end.len()
        } else {
            return false;
        };
        self.begins_line = rest[..n].ends_with('\n');
        self.advance(n);
        true
    }

    fn comment(&mut self) -> Result<(), Error> {
        let Some(n) = self.rest().find("#}") else { return self.fail("a comment has no end") };
        let sign = self.rest()[..n].ends_with(['-', '+']);
        self.advance(n - usize::from(sign));
        self.take_end("#}", true);
        Ok(())
    }

    /// The length of `raw %}` if it is here.
    fn raw_begin(&self) -> Option<usize> {
        let rest = self.rest();
        let after = rest.trim_start().strip_prefix("raw")?.trim_start();
        let end = match after.strip_prefix("-%}") {
            Some(end) => end.trim_start(),
            None => after.strip_prefix("%}")?,
        };
        Some(rest.len() - end.len())
    }

    /// Text up to `{% endraw %}`.
    fn raw(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        for (n, _) in rest.match_indices("{%") {
            let tag = &rest[n + 2..];
            let sign = tag.bytes().next().filter(|sign| matches!(sign, b'-' | b'+'));
            let tag = &tag[usize::from(sign.is_some())..];
            let Some(after) = tag.trim_start().strip_prefix("endraw") else { continue };
            let after = after.trim_start();
            if !["%}", "-%}", "+%}"].iter().any(|end| after.starts_with(end)) {
                continue;
            }
            self.push_data(&rest[..n], sign, true);
            self.advance(rest.len() - after.len());
            self.take_end("%}", true);
            return Ok(());
        }
        self.fail("a raw block has no end")
    }

    /// Tokens up to `end`, which becomes `token`.
    fn expression(&mut self, end: &str, token: Token) -> Result<(), Error> {
        let mut open = Vec::new();
        loop {
            self.skip_space();
            if open.is_empty() && self.take_end(end, token == Token::BlockEnd) {
                self.push(token);
                return Ok(());
            }
            let Some(c) = self.rest().chars().next() else { return self.fail("a tag has no end") };
            if c.is_ascii_digit() {
                self.number()?;
            } else if c.is_alphanumeric() || c == '_' {
                let rest = self.rest();
                let n =
                    rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                self.push(Token::Name(rest[..n].to_owned()));
                self.advance(n);
            } else if c == '"' || c == '\'' {
                self.text(c)?;
            } else {
                self.symbol(&mut open)?;
            }
        }
    }

    fn symbol(&mut self, open: &mut Vec<&'static str>) -> Result<(), Error> {
        let rest = self.rest();
        let Some(symbol) = SYMBOLS.into_iter().find(|symbol| rest.starts_with(symbol)) else {
            let c = rest.chars().next().unwrap_or_default();
            return self.fail(&format!("unexpected character {c:?}"));
        };
        match symbol {
            "(" => open.push(")"),
            "[" => open.push("]"),
            "{" => open.push("}"),
            ")" | "]" | "}" if open.pop() != Some(symbol) => {
                return self.fail(&format!("unexpected '{symbol}'"));
            }
            _ => {}
        }
        self.push(Token::Symbol(symbol));
        self.advance(symbol.len());
        Ok(())
    }

    fn number(&mut self) -> Result<(), Error> {
        let rest = self.rest();
        let digits = |text: &str| {
            text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_').len()
        };
        if let Some(radix) = match rest.as_bytes().get(1) {
            Some(b'x' | b'X') => Some(16),
            Some(b'o' | b'O') => Some(8),
            Some(b'b' | b'B') => Some(2),
            _ => None,
        }
        .filter(|_| rest.starts_with('0'))
        {
            let n = 2 + rest[2..]
                .find(|c: char| !(c.is_digit(radix) || c == '_'))
                .unwrap_or(rest.len() - 2);
            let Ok(value) = i128::from_str_radix(&rest[2..n].replace('_', ""), radix) else {
                return self.fail("a number is not valid");
            };
            self.push(Token::Int(value));
            self.advance(n);
            return Ok(());
        }
        let mut n = digits(rest);
        let mut is_float = false;
        let after_dot = rest[n..].strip_prefix('.').map_or(0, digits);
        if after_dot > 0 {
            is_float = true;
            n += 1 + after_dot;
        }
        if let Some(power) = rest[n..].strip_prefix(['e', 'E']) {
            let sign = usize::from(power.starts_with(['+', '-']));
            let digits = digits(&power[sign..]);
            if digits > 0 {
                is_float = true;
                n += 1 + sign + digits;
            }
        }
        let text = rest[..n].replace('_', "");
        let token = if is_float {
            text.parse().ok().map(Token::Float)
        } else {
            text.parse().ok().map(Token::Int)
        };
        let Some(token) = token else { return self.fail("a number is not valid") };
        self.push(token);
        self.advance(n);
        Ok(())
    }

    fn text(&mut self, quote: char) -> Result<(), Error> {
        let rest = self.rest();
        let mut chars = rest.char_indices().skip(1);
        let mut text = String::new();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => {
                    let escaped = &rest[at + 1..];
                    let (c, n) = unescape(escaped);
                    match c {
                        Some(c) => text.extend(c),
                        None => text.push('\\'),
                    }
                    let n_chars = escaped[..n].chars().count();
                    chars.by_ref().take(n_chars).for_each(drop);
                }
                c if c == quote => {
                    self.push(Token::Text(text));
                    self.advance(at + 1);
                    return Ok(());
                }
                c => text.push(c),
            }
        }
        self.fail("a text has no end")
    }
}

/// What `\` and the beginning of `rest` stand for, and the length of that beginning; `None`: a plain
/// backslash. A line's end stands for nothing.
fn unescape(rest: &str) -> (Option<Option<char>>, usize) {
    let digits = |n: usize, radix: u32| {
        let digits = rest.get(1..1 + n)?;
        let all = digits.chars().all(|c| c.is_digit(radix));
        let c = u32::from_str_radix(digits, radix).ok().filter(|_| all).and_then(char::from_u32)?;
        Some((Some(Some(c)), 1 + n))
    };
    let simple = |c: char| (Some(Some(c)), 1);
    let Some(c) = rest.chars().next() else { return (None, 0) };
    match c {
        '\n' => (Some(None), 1),
        '\\' | '\'' | '"' => simple(c),
        'a' => simple('\u{7}'),
        'b' => simple('\u{8}'),
        'f' => simple('\u{c}'),
        'n' => simple('\n'),
        'r' => simple('\r'),
        't' => simple('\t'),
        'v' => simple('\u{b}'),
        'x' => digits(2, 16).unwrap_or((None, 0)),
        'u' => digits(4, 16).unwrap_or((None, 0)),
        'U' => digits(8, 16).unwrap_or((None, 0)),
        '0'..='7' => {
            let n = rest.bytes().take(3).take_while(|b| matches!(b, b'0'..=b'7')).count();
            let c = u32::from_str_radix(&rest[..n], 8).ok().and_then(char::from_u32);
            (c.map(Some), if c.is_some() { n } else { 0 })
        }
        _ => (None, 0),
    }
}
