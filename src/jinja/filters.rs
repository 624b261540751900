//! Jinja2's filters.

use std::cmp::Ordering;

use super::args::Args;
use super::error::{Error, MAX_ITEMS};
use super::methods::{capitalize, is_space, items, lines, lower, replace, strip};
use super::ops;
use super::print::{print, text_of, to_json};
use super::render::Renderer;
use super::text::{Builder, Text};
use super::value::{Key, Value};

/// `value | name(args)`.
pub fn filter(r: &mut Renderer<'_>, name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    // Jinja2 does not even look into what is false.
    let is_nothing = matches!(name, "map" | "reject" | "select" | "rejectattr" | "selectattr")
        && !value.is_true();
    match name {
        _ if is_nothing => Value::list(Vec::new()),
        "abs" => match (value.as_int(), value.as_float()) {
            (Some(n), _) => Ok(Value::Int(n.wrapping_abs())),
            (_, Some(x)) => Ok(Value::Float(x.abs())),
            _ => Err(Error::new(format!("bad operand type for abs(): '{}'", value.kind()))),
        },
        "attr" => {
            let [name] = args.bind(["name"])?;
            r.attribute(value, &text_of(&name.unwrap_or(Value::None))?)
        }
        "batch" | "slice" => batches(value, name, args),
        "default" | "d" => {
            let [default, also_false] = args.bind(["default_value", "boolean"])?;
            let also_false = also_false.is_some_and(|flag| flag.is_true());
            let is_missing = matches!(value, Value::Undefined(_)) || also_false && !value.is_true();
            Ok(if is_missing { default.unwrap_or_else(|| Value::own("")) } else { value.clone() })
        }
        "dictsort" => dictsort(value, args),
        "first" | "last" => {
            let all = value.iterate()?;
            let found = if name == "first" { all.first() } else { all.last() };
            Ok(found.cloned().unwrap_or_else(|| Value::undefined("item")))
        }
        "float" | "int" => number(value, name, args),
        "groupby" => group(r, value, args),
        "items" => items(value),
        "join" => {
            let [between, attribute] = args.bind(["d", "attribute"])?;
            let between = between.map_or(Ok(Text::own("")), |between| text_of(&between))?;
            let mut out = Builder::default();
            for (i, item) in value.iterate()?.iter().enumerate() {
                if i > 0 {
                    out.push(&between);
                }
                print(&inside(r, item, attribute.as_ref())?, &mut out);
            }
            out.finish().map(Value::Text)
        }
        "length" | "count" => value.len().map(|n| Value::Int(n as i128)),
        "list" => Value::list(value.iterate()?),
        "map" => map(r, value, args),
        "max" | "min" | "sort" | "unique" => sorted(r, value, name, args),
        "reject" | "select" | "rejectattr" | "selectattr" => select(r, value, name, args),
        "reverse" => match value {
            Value::Text(_) => ops::slice(value, [None, None, Some(Value::Int(-1))]),
            value => Value::list(value.iterate()?.into_iter().rev().collect()),
        },
        "round" => round(value, args),
        "sum" => {
            let [attribute, start] = args.bind(["attribute", "start"])?;
            let mut sum = start.unwrap_or(Value::Int(0));
            for item in value.iterate()? {
                sum = ops::binary(
                    super::ast::Operator::Add,
                    &sum,
                    &inside(r, &item, attribute.as_ref())?,
                )?;
            }
            Ok(sum)
        }
        "tojson" => to_json(value, args),
        _ => of_text(name, value, args),
    }
}

/// Filters that make a text of what they get.
fn of_text(name: &str, value: &Value, args: Args) -> Result<Value, Error> {
    let text = text_of(value)?;
    match name {
        "capitalize" => capitalize(&text).map(Value::Text),
        "center" => {
            let [width] = args.bind(["width"])?;
            let width = width.unwrap_or(Value::Int(80));
            super::methods::call(
                &Value::Text(text),
                "center",
                Args { positional: vec![width], named: Vec::new() },
            )
        }
        "escape" | "e" => text.escaped().map(Value::Text),
        "format" => {
            let values = if args.named.is_empty() {
                Value::tuple(args.positional)?
            } else {
                Value::dict(
                    args.named
                        .into_iter()
                        .map(|(name, value)| Ok((Key::new(Value::own(&name))?, value)))
                        .collect::<Result<_, Error>>()?,
                )?
            };
            super::format::percent(&text, &values).map(Value::Text)
        }
        "indent" => indent(&text, args),
        "lower" => lower(&text).map(Value::Text),
        "replace" => {
            let [old, new, count] = args.bind(["old", "new", "count"])?;
            let (old, new) =
                (text_of(&old.unwrap_or(Value::None))?, text_of(&new.unwrap_or(Value::None))?);
            let count = count.and_then(|count| count.as_int()).unwrap_or(-1);
            replace(&text, &old, &new, usize::try_from(count).unwrap_or(usize::MAX))
        }
        "safe" => Ok(Value::Text(text.into_html())),
        "string" => Ok(Value::Text(text)),
        "title" => title(&text),
        "trim" => {
            let [chars] = args.bind(["chars"])?;
            strip(&text, chars.as_ref(), true, true).map(Value::Text)
        }
        "truncate" => truncate(&text, args),
        "upper" => text.map(str::to_uppercase).map(Value::Text),
        "urlencode" => text.map(quoted_for_url).map(Value::Text),
        "wordcount" => {
            let is_word = |word: &&str| word.chars().any(char::is_alphanumeric);
            let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(is_word);
            Ok(Value::Int(words.count() as i128))
        }
        _ => Err(Error::new(format!("No filter named '{name}'."))),
    }
}

/// `item`, or what is at a path of names and numbers in it.
fn inside(r: &mut Renderer<'_>, item: &Value, path: Option<&Value>) -> Result<Value, Error> {
    match path {
        None | Some(Value::None) => Ok(item.clone()),
        Some(Value::Text(path)) => path.split('.').try_fold(item.clone(), |value, part| {
            let key = part.parse().map_or_else(|_| Value::own(part), Value::Int);
            r.item(&value, &key)
        }),
        Some(key) => r.item(item, key),
    }
}

fn batches(value: &Value, name: &str, args: Args) -> Result<Value, Error> {
    let [n, fill] = args.bind(["n", "fill_with"])?;
    let n = n
        .and_then(|n| n.as_int())
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| (1..=MAX_ITEMS).contains(n));
    let n = n.ok_or_else(|| Error::new(format!("{name} takes a number of items")))?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let all = value.iterate()?;
    let mut groups: Vec<Vec<Value>> = Vec::new();
    if name == "batch" {
        groups.extend(all.chunks(n).map(<[Value]>::to_vec));
        if let (Some(last), Some(fill)) = (groups.last_mut(), fill) {
            last.resize(n, fill);
        }
    } else {
        let (each, longer) = (all.len() / n, all.len() % n);
        let mut rest = all.into_iter();
        for i in 0..n {
            let mut group: Vec<Value> =
                rest.by_ref().take(each + usize::from(i < longer)).collect();
            if i >= longer && longer > 0 {
                group.extend(fill.clone());
            }
            groups.push(group);
        }
    }
    Value::list(groups.into_iter().map(Value::list).collect::<Result<_, _>>()?)
}

/// What to sort by: texts in lower case unless `case` matters.
fn sort_key(value: Value, case: bool) -> Result<Value, Error> {
    match value {
        Value::Text(text) if !case => lower(&text).map(Value::Text),
        value => Ok(value),
    }
}

/// Sorts by the first of each pair.
fn sort_pairs(pairs: &mut [(Value, Value)], reverse: bool) -> Result<(), Error> {
    let mut failure = None;
    pairs.sort_by(|(a, _), (b, _)| {
        let order = a.compare(b).unwrap_or_else(|error| {
            failure = Some(error);
            Ordering::Equal
        });
        if reverse { order.reverse() } else { order }
    });
    failure.map_or(Ok(()), Err)
}

fn dictsort(value: &Value, args: Args) -> Result<Value, Error> {
    let [case, by, reverse] = args.bind(["case_sensitive", "by", "reverse"])?;
    let is_set = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (case, reverse) = (is_set(case), is_set(reverse));
    let by_value = by.is_some_and(|by| by == Value::own("value"));
    let Value::Dict(dict) = value else { return Err(Error::new("dictsort takes a mapping")) };
    let mut pairs = Vec::with_capacity(dict.items.len());
    for (key, value) in &dict.items {
        let by = if by_value { value.clone() } else { key.value().clone() };
        pairs.push((sort_key(by, case)?, Value::tuple(vec![key.value().clone(), value.clone()])?));
    }
    sort_pairs(&mut pairs, reverse)?;
    Value::list(pairs.into_iter().map(|(_, pair)| pair).collect())
}

fn sorted(r: &mut Renderer<'_>, value: &Value, name: &str, args: Args) -> Result<Value, Error> {
    let is_set = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (reverse, case, attribute) = if name == "sort" {
        let [reverse, case, attribute] = args.bind(["reverse", "case_sensitive", "attribute"])?;
        (is_set(reverse), is_set(case), attribute)
    } else {
        let [case, attribute] = args.bind(["case_sensitive", "attribute"])?;
        (name == "max", is_set(case), attribute)
    };
    let mut pairs = Vec::new();
    for item in value.iterate()? {
        let key = match &attribute {
            // Only `sort` has several attributes.
            Some(Value::Text(paths)) if name == "sort" && paths.contains(',') => {
                let mut keys = Vec::new();
                for path in paths.split(',') {
                    keys.push(sort_key(inside(r, &item, Some(&Value::own(path)))?, case)?);
                }
                Value::list(keys)?
            }
            attribute => sort_key(inside(r, &item, attribute.as_ref())?, case)?,
        };
        pairs.push((key, item));
    }
    if name == "unique" {
        let mut seen = std::collections::HashSet::new();
        let mut unique = Vec::new();
        for (key, item) in pairs {
            if seen.insert(Key::new(key)?) {
                unique.push(item);
            }
        }
        return Value::list(unique);
    }
    sort_pairs(&mut pairs, reverse)?;
    let mut items = pairs.into_iter().map(|(_, item)| item);
    match name {
        "sort" => Value::list(items.collect()),
        _ => Ok(items.next().unwrap_or_else(|| Value::undefined("item"))),
    }
}

fn group(r: &mut Renderer<'_>, value: &Value, args: Args) -> Result<Value, Error> {
    let [attribute, default, case] = args.bind(["attribute", "default", "case_sensitive"])?;
    let case = case.is_some_and(|flag| flag.is_true());
    let mut pairs = Vec::new();
    for item in value.iterate()? {
        let mut key = inside(r, &item, attribute.as_ref())?;
        if let (Value::Undefined(_), Some(default)) = (&key, &default) {
            key = default.clone();
        }
        pairs.push((sort_key(key, case)?, item));
    }
    sort_pairs(&mut pairs, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in pairs {
        match groups.last_mut() {
            Some((last, items)) if *last == key => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let group = |(_, items): (Value, Vec<Value>)| {
        let key = inside(r, &items[0], attribute.as_ref())?;
        let key =
            if matches!(key, Value::Undefined(_)) { default.clone().unwrap_or(key) } else { key };
        Value::tuple(vec![key, Value::list(items)?])
    };
    Value::list(groups.into_iter().map(group).collect::<Result<_, _>>()?)
}

fn map(r: &mut Renderer<'_>, value: &Value, mut args: Args) -> Result<Value, Error> {
    let mut mapped = Vec::new();
    if args.positional.is_empty() {
        let [attribute, default] = args.bind_named(["attribute", "default"])?;
        let attribute = attribute.ok_or_else(|| Error::new("map requires a filter argument"))?;
        for item in value.iterate()? {
            let found = inside(r, &item, Some(&attribute))?;
            mapped.push(match (found, &default) {
                (Value::Undefined(_), Some(default)) => default.clone(),
                (found, _) => found,
            });
        }
    } else {
        let name = text_of(&args.positional.remove(0))?;
        for item in value.iterate()? {
            mapped.push(r.filter(&name, &item, args.clone())?);
        }
    }
    Value::list(mapped)
}

fn select(r: &mut Renderer<'_>, value: &Value, name: &str, mut args: Args) -> Result<Value, Error> {
    let attribute = if name.ends_with("attr") {
        if args.positional.is_empty() {
            return Err(Error::new("Missing parameter for attribute name"));
        }
        Some(args.positional.remove(0))
    } else {
        None
    };
    let test =
        if args.positional.is_empty() { None } else { Some(text_of(&args.positional.remove(0))?) };
    let wanted = name.starts_with("select");
    let mut chosen = Vec::new();
    for item in value.iterate()? {
        let tested = inside(r, &item, attribute.as_ref())?;
        let holds = match &test {
            Some(test) => r.test(test, &tested, args.clone())?,
            None => tested.is_true(),
        };
        if holds == wanted {
            chosen.push(item);
        }
    }
    Value::list(chosen)
}

fn number(value: &Value, name: &str, args: Args) -> Result<Value, Error> {
    if name == "float" {
        let [default] = args.bind(["default"])?;
        let parsed = match value {
            Value::Text(text) => parse_float(text),
            value => value.as_float(),
        };
        return Ok(parsed.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)));
    }
    let [default, base] = args.bind(["default", "base"])?;
    let base =
        base.and_then(|base| base.as_int()).and_then(|base| u32::try_from(base).ok()).unwrap_or(10);
    let whole = |x: f64| (x.is_finite() && x.abs() < 1e38).then(|| x.trunc() as i128);
    let parsed = match value {
        Value::Text(text) => {
            let digits = text.trim_matches(is_space).replace('_', "");
            let digits = match base {
                16 => digits.trim_start_matches("0x"),
                8 => digits.trim_start_matches("0o"),
                2 => digits.trim_start_matches("0b"),
                _ => &digits,
            };
            let int = if (2..=36).contains(&base) {
                i128::from_str_radix(digits, base).ok()
            } else {
                None
            };
            int.or_else(|| parse_float(text).and_then(whole))
        }
        Value::Float(x) => whole(*x),
        value => value.as_int(),
    };
    Ok(parsed.map(Value::Int).or(default).unwrap_or(Value::Int(0)))
}

fn parse_float(text: &str) -> Option<f64> {
    text.trim_matches(is_space).replace('_', "").parse().ok()
}

fn round(value: &Value, args: Args) -> Result<Value, Error> {
    let [precision, method] = args.bind(["precision", "method"])?;
    let precision = precision.and_then(|n| n.as_int()).unwrap_or(0).clamp(-300, 300) as i32;
    let method = method.map_or(Ok(Text::own("common")), |method| text_of(&method))?;
    let x = value.as_float();
    let x = x.ok_or_else(|| Error::new(format!("round takes a number, not {}", value.kind())))?;
    let scale = 10f64.powi(precision);
    if let (Value::Int(n), "common") = (value, &*method) {
        let rounded = (x * scale).round_ties_even() / scale;
        return Ok(Value::Int(if precision < 0 { rounded as i128 } else { *n }));
    }
    Ok(Value::Float(match &*method {
        "ceil" => (x * scale).ceil() / scale,
        "floor" => (x * scale).floor() / scale,
        "common" if precision < 0 => (x * scale).round_ties_even() / scale,
        "common" => format!("{x:.*}", precision as usize).parse().unwrap_or(x),
        _ => return Err(Error::new("method must be common, ceil or floor")),
    }))
}

fn quoted_for_url(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                out.push(byte.into())
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn indent(text: &Text, args: Args) -> Result<Value, Error> {
    let [width, first, blank] = args.bind(["width", "first", "blank"])?;
    let is_set = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (first, blank) = (is_set(first), is_set(blank));
    let indent = match width.unwrap_or(Value::Int(4)) {
        Value::Text(text) => text,
        width => {
            let n = width.as_int().ok_or_else(|| Error::new("indent takes a number or a text"))?;
            let mut spaces = Builder::default();
            spaces.push_times(' ', usize::try_from(n).unwrap_or(0));
            spaces.finish()?
        }
    };
    let mut lines = lines(text, false);
    if text.is_empty() || text.ends_with(['\n', '\r']) {
        lines.push(text.len()..text.len());
    }
    let mut out = Builder::default();
    for (i, line) in lines.into_iter().enumerate() {
        if i > 0 {
            out.push_own("\n");
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push(&indent);
        }
        out.push_part(text, line);
    }
    out.finish().map(Value::Text)
}

/// Each word with its first letter in upper case, and the others in lower case. Words begin after
/// white space, hyphens and opening brackets.
fn title(text: &Text) -> Result<Value, Error> {
    let mut out = Builder::default();
    let mut begins = true;
    for c in text.chars_of() {
        out.push(&c.map(if begins { str::to_uppercase } else { str::to_lowercase })?);
        begins = c.chars().all(|c| is_space(c) || "-({[<".contains(c));
    }
    out.finish().map(Value::Text)
}

fn truncate(text: &Text, args: Args) -> Result<Value, Error> {
    let [length, kill_words, end, leeway] = args.bind(["length", "killwords", "end", "leeway"])?;
    let size = |value: Option<Value>, default: usize| {
        value.and_then(|n| n.as_int()).and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    };
    let (length, leeway) = (size(length, 255), size(leeway, 5));
    let end = end.map_or(Ok(Text::own("...")), |end| text_of(&end))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(Value::Text(text.clone()));
    }
    let n = length.saturating_sub(end.chars().count());
    let mut cut = text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
    if !kill_words.is_some_and(|flag| flag.is_true()) {
        cut = text[..cut].rfind(' ').unwrap_or(cut);
    }
    let mut out = Builder::default();
    out.push_part(text, 0..cut);
    out.push(&end);
    out.finish().map(Value::Text)
}
