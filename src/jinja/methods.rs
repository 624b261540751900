//! The methods of Python's texts, dictionaries and lists. Those that would change a value are not
//! there, as in Jinja2's immutable sandbox.

use std::ops::Range;

use super::args::Args;
use super::error::Error;
use super::format::brace;
use super::text::{Builder, Text};
use super::value::{Key, Value};

const OF_TEXTS: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];
const OF_DICTS: &[&str] = &["copy", "get", "items", "keys", "values"];
const OF_LISTS: &[&str] = &["copy", "count", "index"];
/// Of dictionaries and lists; Jinja2's immutable sandbox has them as undefined values.
const FORBIDDEN: &[&str] = &[
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

/// The method `name` of a value, if its type has it.
pub fn method(value: &Value, name: &str) -> Option<Value> {
    let names = match value {
        Value::Text(_) => OF_TEXTS,
        Value::Dict(_) => OF_DICTS,
        Value::List(_) | Value::Tuple(_) => OF_LISTS,
        _ => return None,
    };
    if names.contains(&name) {
        return Some(Value::Method(std::sync::Arc::new((value.clone(), name.into()))));
    }
    let is_dicts = matches!(name, "clear" | "pop" | "popitem" | "setdefault" | "update");
    let is_forbidden = match value {
        Value::Dict(_) => is_dicts,
        Value::List(_) => {
            FORBIDDEN.contains(&name) && !matches!(name, "popitem" | "setdefault" | "update")
        }
        _ => false,
    };
    is_forbidden.then(|| Value::undefined(name))
}

/// Calls the method `name` of `value`.
pub fn call(value: &Value, name: &str, args: Args) -> Result<Value, Error> {
    match value {
        Value::Text(text) if name == "format" => brace(text, &args).map(Value::Text),
        Value::Text(text) => of_text(text, name, args),
        Value::Dict(dict) => match name {
            "get" => {
                let [key, default] = args.bind(["key", "default"])?;
                let key =
                    Key::new(key.ok_or_else(|| Error::new("get expected at least 1 argument"))?)?;
                Ok(dict.items.get(&key).cloned().or(default).unwrap_or(Value::None))
            }
            "copy" => Ok(value.clone()),
            "keys" => Value::list(dict.items.keys().map(|key| key.value().clone()).collect()),
            "values" => Value::list(dict.items.values().cloned().collect()),
            _ => items(value),
        },
        Value::List(list) | Value::Tuple(list) => {
            if name == "copy" {
                return Ok(value.clone());
            }
            let [item] = args.bind(["value"])?;
            let item = item.ok_or_else(|| Error::new(format!("{name} takes an argument")))?;
            let mut found = list.items.iter().enumerate().filter(|(_, other)| **other == item);
            match name {
                "count" => Ok(Value::Int(found.count() as i128)),
                _ => match found.next() {
                    Some((i, _)) => Ok(Value::Int(i as i128)),
                    None => Err(Error::new("the value is not in the list")),
                },
            }
        }
        _ => Err(Error::new(format!("'{}' object has no method {name}", value.kind()))),
    }
}

/// A dictionary's keys and values in pairs.
pub fn items(value: &Value) -> Result<Value, Error> {
    match value {
        Value::Undefined(_) => Value::list(Vec::new()),
        Value::Dict(dict) => {
            let pair = |(key, value): (&Key, &Value)| {
                Value::tuple(vec![key.value().clone(), value.clone()])
            };
            Value::list(dict.items.iter().map(pair).collect::<Result<_, _>>()?)
        }
        _ => Err(Error::new("Can only get item pairs from a mapping.")),
    }
}

/// Python's white space.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

fn of_text(text: &Text, name: &str, args: Args) -> Result<Value, Error> {
    let all = |test: fn(char) -> bool| Value::Bool(!text.is_empty() && text.chars().all(test));
    let mapped = |map: fn(&str) -> String| text.map(map).map(Value::Text);
    match name {
        "upper" => mapped(str::to_uppercase),
        "lower" | "casefold" => lower(text).map(Value::Text),
        "swapcase" => mapped(|text| {
            let swap = |c: char| {
                if c.is_uppercase() {
                    c.to_lowercase().to_string()
                } else {
                    c.to_uppercase().to_string()
                }
            };
            text.chars().map(swap).collect()
        }),
        "title" => title(text),
        "capitalize" => capitalize(text).map(Value::Text),
        "isalnum" => Ok(all(char::is_alphanumeric)),
        "isalpha" => Ok(all(char::is_alphabetic)),
        "isascii" => Ok(Value::Bool(text.is_ascii())),
        "isdigit" | "isnumeric" | "isdecimal" => Ok(all(char::is_numeric)),
        "isidentifier" => {
            let starts = text.starts_with(|c: char| c.is_alphabetic() || c == '_');
            Ok(Value::Bool(starts && text.chars().all(|c| c.is_alphanumeric() || c == '_')))
        }
        "isprintable" => Ok(Value::Bool(!text.chars().any(char::is_control))),
        "isspace" => Ok(all(is_space)),
        "islower" => Ok(Value::Bool(
            text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        )),
        "isupper" => Ok(Value::Bool(
            text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        )),
        "istitle" => Ok(Value::Bool(
            title(text)? == Value::Text(text.clone()) && text.chars().any(char::is_alphabetic),
        )),
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.bind(["chars"])?;
            strip(text, chars.as_ref(), name != "rstrip", name != "lstrip").map(Value::Text)
        }
        "removeprefix" | "removesuffix" => {
            let [part] = args.bind(["part"])?;
            let part = needed(part.as_ref())?;
            let range = if name == "removeprefix" {
                text.strip_prefix(&**part).map(|rest| text.len() - rest.len()..text.len())
            } else {
                text.strip_suffix(&**part).map(|rest| 0..rest.len())
            };
            Ok(Value::Text(range.map_or_else(|| text.clone(), |range| text.slice(range))))
        }
        "startswith" | "endswith" => starts_or_ends(text, name == "startswith", args),
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, args),
        "replace" => {
            let [old, new, count] = args.bind(["old", "new", "count"])?;
            let count = count.map_or(Some(-1), |count| count.as_int());
            let count = count.ok_or_else(|| Error::new("replace: count must be an integer"))?;
            replace(
                text,
                needed(old.as_ref())?,
                needed(new.as_ref())?,
                usize::try_from(count).unwrap_or(usize::MAX),
            )
        }
        "split" | "rsplit" => {
            let [separator, most] = args.bind(["sep", "maxsplit"])?;
            let most = most.map_or(Some(-1), |most| most.as_int());
            let most = most.ok_or_else(|| Error::new("split: maxsplit must be an integer"))?;
            split(
                text,
                separator.as_ref(),
                usize::try_from(most).unwrap_or(usize::MAX),
                name == "rsplit",
            )
        }
        "splitlines" => {
            let [keep] = args.bind(["keepends"])?;
            let keep = keep.is_some_and(|keep| keep.is_true());
            Value::list(
                lines(text, keep).into_iter().map(|range| Value::Text(text.slice(range))).collect(),
            )
        }
        "partition" | "rpartition" => {
            let [separator] = args.bind(["sep"])?;
            partition(text, needed(separator.as_ref())?, name == "rpartition")
        }
        "join" => {
            let [items] = args.bind(["iterable"])?;
            let mut out = Builder::default();
            for (i, item) in items.unwrap_or(Value::None).iterate()?.iter().enumerate() {
                if i > 0 {
                    out.push(text);
                }
                out.push(needed(Some(item))?);
            }
            out.finish().map(Value::Text)
        }
        "center" | "ljust" | "rjust" | "zfill" => pad(text, name, args),
        _ => {
            let [size] = args.bind(["tabsize"])?;
            let size = size.and_then(|size| size.as_int()).unwrap_or(8);
            expand_tabs(text, usize::try_from(size).unwrap_or(0)).map(Value::Text)
        }
    }
}

fn needed(value: Option<&Value>) -> Result<&Text, Error> {
    value.and_then(Value::as_text).ok_or_else(|| {
        let kind = value.map_or("nothing", Value::kind);
        Error::new(format!("a method of texts takes a text, not {kind}"))
    })
}

/// Lower case; the whole text decides about a final sigma.
pub fn lower(text: &Text) -> Result<Text, Error> {
    text.map(str::to_lowercase)
}

/// The first character in upper case, the others in lower case.
pub fn capitalize(text: &Text) -> Result<Text, Error> {
    let n = text.chars().next().map_or(0, char::len_utf8);
    let mut out = Builder::default();
    out.push(&text.slice(0..n).map(str::to_uppercase)?);
    out.push(&lower(&text.slice(n..text.len()))?);
    out.finish()
}

fn title(text: &Text) -> Result<Value, Error> {
    let mut out = Builder::default();
    let mut in_word = false;
    for c in text.chars_of() {
        out.push(&c.map(if in_word { str::to_lowercase } else { str::to_uppercase })?);
        in_word = c.chars().all(char::is_alphabetic);
    }
    out.finish().map(Value::Text)
}

/// Without white space, or `chars`, at the ends that are asked for.
pub fn strip(text: &Text, chars: Option<&Value>, start: bool, end: bool) -> Result<Text, Error> {
    let chars = match chars {
        None | Some(Value::None) => None,
        chars => Some(needed(chars)?),
    };
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let from = if start { text.len() - text.trim_start_matches(goes).len() } else { 0 };
    let to = if end { text.trim_end_matches(goes).len() } else { text.len() };
    Ok(text.slice(from..to.max(from)))
}

/// The bytes of the characters from `start` to `end`, two optional arguments.
fn window(
    text: &str,
    start: Option<&Value>,
    end: Option<&Value>,
) -> Result<Option<Range<usize>>, Error> {
    let n = text.chars().count() as i128;
    let place = |value: Option<&Value>, default: i128| match value {
        None | Some(Value::None) => Ok(default),
        Some(value) => {
            let i = value.as_int().ok_or_else(|| Error::new("slice indices must be integers"))?;
            Ok(if i < 0 { (i + n).max(0) } else { i })
        }
    };
    let (from, to) = (place(start, 0)?, place(end, n)?.min(n));
    if from > to {
        return Ok(None);
    }
    let byte = |i: i128| text.char_indices().nth(i as usize).map_or(text.len(), |(at, _)| at);
    Ok(Some(byte(from)..byte(to)))
}

fn starts_or_ends(text: &Text, at_start: bool, args: Args) -> Result<Value, Error> {
    let [parts, start, end] = args.bind(["part", "start", "end"])?;
    let Some(range) = window(text, start.as_ref(), end.as_ref())? else {
        return Ok(Value::Bool(false));
    };
    let text = &text[range];
    let is = |part: &Value| {
        let part = needed(Some(part))?;
        Ok(if at_start { text.starts_with(&**part) } else { text.ends_with(&**part) })
    };
    match parts {
        Some(Value::Tuple(parts)) => {
            for part in &parts.items {
                if is(part)? {
                    return Ok(Value::Bool(true));
                }
            }
            Ok(Value::Bool(false))
        }
        part => is(&part.unwrap_or(Value::None)).map(Value::Bool),
    }
}

fn search(text: &Text, name: &str, args: Args) -> Result<Value, Error> {
    let [part, start, end] = args.bind(["sub", "start", "end"])?;
    let part = needed(part.as_ref())?;
    let range = window(text, start.as_ref(), end.as_ref())?;
    let inside = range.clone().map(|range| &text[range]);
    if name == "count" {
        let n = inside.map_or(0, |inside| match part.is_empty() {
            true => inside.chars().count() + 1,
            false => inside.matches(&**part).count(),
        });
        return Ok(Value::Int(n as i128));
    }
    let found = inside.and_then(|inside| match name.starts_with('r') {
        true => inside.rfind(&**part),
        false => inside.find(&**part),
    });
    match (found, range) {
        (Some(at), Some(range)) => Ok(Value::Int(text[..range.start + at].chars().count() as i128)),
        _ if name.ends_with("index") => Err(Error::new("substring not found")),
        _ => Ok(Value::Int(-1)),
    }
}

/// With at most `most` occurrences of `old` replaced.
pub fn replace(text: &Text, old: &Text, new: &Text, most: usize) -> Result<Value, Error> {
    let mut out = Builder::default();
    let mut at = 0;
    if old.is_empty() {
        // Before each character, and at the end.
        for (i, c) in text.char_indices().take(most) {
            out.push(new);
            at = i + c.len_utf8();
            out.push_part(text, i..at);
        }
        out.push_part(text, at..text.len());
        if text.chars().count() < most {
            out.push(new);
        }
    } else {
        for (i, _) in text.match_indices(&**old).take(most) {
            out.push_part(text, at..i);
            out.push(new);
            at = i + old.len();
        }
        out.push_part(text, at..text.len());
    }
    out.finish().map(Value::Text)
}

fn split(
    text: &Text,
    separator: Option<&Value>,
    most: usize,
    from_end: bool,
) -> Result<Value, Error> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    match separator {
        None | Some(Value::None) => {
            let mut words: Vec<Range<usize>> = Vec::new();
            let mut begin = None;
            for (at, c) in text.char_indices() {
                match (is_space(c), begin) {
                    (true, Some(from)) => {
                        words.push(from..at);
                        begin = None;
                    }
                    (false, None) => begin = Some(at),
                    _ => {}
                }
            }
            words.extend(begin.map(|from| from..text.len()));
            let n = words.len();
            if n <= most {
                parts = words;
            } else if from_end {
                // What is left over keeps its inner spaces.
                parts.push(words[0].start..words[n - 1 - most].end);
                parts.extend_from_slice(&words[n - most..]);
            } else {
                parts.extend_from_slice(&words[..most]);
                parts.push(words[most].start..text.len());
            }
        }
        separator => {
            let separator = needed(separator)?;
            if separator.is_empty() {
                return Err(Error::new("empty separator"));
            }
            if from_end {
                let mut end = text.len();
                for (at, _) in text.rmatch_indices(&**separator).take(most) {
                    parts.push(at + separator.len()..end);
                    end = at;
                }
                parts.push(0..end);
                parts.reverse();
            } else {
                let mut from = 0;
                for (at, _) in text.match_indices(&**separator).take(most) {
                    parts.push(from..at);
                    from = at + separator.len();
                }
                parts.push(from..text.len());
            }
        }
    }
    Value::list(parts.into_iter().map(|range| Value::Text(text.slice(range))).collect())
}

/// The lines of a text, without their ends unless `keep`.
pub fn lines(text: &str, keep: bool) -> Vec<Range<usize>> {
    let mut lines = Vec::new();
    let mut from = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let is_end = matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        );
        if is_end {
            let mut next = at + c.len_utf8();
            if c == '\r' && chars.next_if(|(_, c)| *c == '\n').is_some() {
                next += 1;
            }
            lines.push(from..if keep { next } else { at });
            from = next;
        }
    }
    if from < text.len() {
        lines.push(from..text.len());
    }
    lines
}

fn partition(text: &Text, separator: &Text, from_end: bool) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(Error::new("empty separator"));
    }
    let found = if from_end { text.rfind(&**separator) } else { text.find(&**separator) };
    let (a, b, n) = match found {
        Some(at) => (at, at + separator.len(), text.len()),
        None if from_end => (0, 0, text.len()),
        None => (text.len(), text.len(), text.len()),
    };
    let parts = [0..a, a..b, b..n];
    Value::tuple(parts.into_iter().map(|range| Value::Text(text.slice(range))).collect())
}

fn pad(text: &Text, name: &str, args: Args) -> Result<Value, Error> {
    let [width, fill] = args.bind(["width", "fillchar"])?;
    let width = width.and_then(|width| width.as_int());
    let width = width.ok_or_else(|| Error::new(format!("{name}: width must be an integer")))?;
    let fill = match &fill {
        None => ' ',
        fill => needed(fill.as_ref())?.chars().next().unwrap_or(' '),
    };
    let len = text.chars().count();
    let n = usize::try_from(width).unwrap_or(0).saturating_sub(len);
    let mut out = Builder::default();
    match name {
        "zfill" => {
            let sign = usize::from(text.starts_with(['+', '-']));
            out.push_part(text, 0..sign);
            out.push_times('0', n);
            out.push_part(text, sign..text.len());
        }
        _ => {
            let before = match name {
                "ljust" => 0,
                "rjust" => n,
                _ => n / 2 + (n & (n + len) & 1),
            };
            out.push_times(fill, before);
            out.push(text);
            out.push_times(fill, n - before);
        }
    }
    out.finish().map(Value::Text)
}

fn expand_tabs(text: &Text, size: usize) -> Result<Text, Error> {
    let mut out = Builder::default();
    let mut column = 0;
    for c in text.chars_of() {
        match &*c {
            "\t" => {
                let n = if size == 0 { 0 } else { size - column % size };
                out.push_times(' ', n);
                column += n;
            }
            "\n" | "\r" => {
                column = 0;
                out.push(&c);
            }
            _ => {
                column += 1;
                out.push(&c);
            }
        }
    }
    out.finish()
}
