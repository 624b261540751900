//! Python's two ways to put values into a text: `text % values` and `text.format(values)`.

use super::args::Args;
use super::error::Error;
use super::print::{exponent, print, represent, scientific, text_of};
use super::text::{Builder, Text};
use super::value::{Value, item};

/// Digits behind a point, at most.
const MAX_PRECISION: usize = 1000;

/// How a value is written.
#[derive(Clone, Debug)]
struct Spec {
    fill: char,
    /// `<`, `>`, `^` or `=`; numbers are otherwise right, texts left.
    align: Option<char>,
    /// `+`, ` ` or `-`.
    sign: char,
    alternate: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    /// `\0` where there is none.
    kind: char,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            fill: ' ',
            align: None,
            sign: '-',
            alternate: false,
            width: 0,
            grouping: None,
            precision: None,
            kind: '\0',
        }
    }
}

/// `format % value`.
pub fn percent(format: &Text, value: &Value) -> Result<Text, Error> {
    let (values, is_tuple) = match value {
        Value::Tuple(list) => (list.items.clone(), true),
        value => (vec![value.clone()], false),
    };
    let mut values = values.into_iter();
    let mut next =
        || values.next().ok_or_else(|| Error::new("not enough arguments for format string"));
    let mut used_by_name = false;
    let mut out = Builder::default();
    let mut at = 0;
    while let Some(n) = format[at..].find('%') {
        out.push_part(format, at..at + n);
        at += n + 1;
        let mut spec = Spec::default();
        let mut named = None;
        if let Some(rest) = format[at..].strip_prefix('(') {
            let end = rest.find(')').ok_or_else(|| Error::new("incomplete format key"))?;
            let key = Value::Text(format.slice(at + 1..at + 1 + end));
            let found = match value {
                Value::Dict(_) => item(value, &key)?,
                _ => return Err(Error::new("format requires a mapping")),
            };
            named =
                Some(found.ok_or_else(|| Error::new(format!("no value for '{}'", &rest[..end])))?);
            used_by_name = true;
            at += end + 2;
        }
        let flags = format[at..].find(|c| !"-+ #0".contains(c)).unwrap_or(0);
        for flag in format[at..at + flags].chars() {
            match flag {
                '-' => spec.align = Some('<'),
                '0' if spec.align.is_none() => (spec.fill, spec.align) = ('0', Some('=')),
                '#' => spec.alternate = true,
                '+' | ' ' => spec.sign = flag,
                _ => {}
            }
        }
        if spec.align == Some('<') {
            spec.fill = ' ';
        }
        at += flags;
        spec.width = match number(format, &mut at)? {
            None if format[at..].starts_with('*') => {
                at += 1;
                size(&next()?)?
            }
            given => given.unwrap_or(0),
        };
        if format[at..].starts_with('.') {
            at += 1;
            spec.precision = match number(format, &mut at)? {
                None if format[at..].starts_with('*') => {
                    at += 1;
                    Some(size(&next()?)?)
                }
                given => Some(given.unwrap_or(0)),
            };
        }
        let kind = format[at..].chars().next().ok_or_else(|| Error::new("incomplete format"))?;
        at += kind.len_utf8();
        if kind == '%' {
            out.push_own("%");
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => next()?,
        };
        percent_value(&value, kind, spec, &mut out)?;
    }
    out.push_part(format, at..format.len());
    let is_left = values.next().is_some();
    if is_left && !used_by_name && (is_tuple || !matches!(value, Value::Dict(_) | Value::List(_))) {
        return Err(Error::new("not all arguments converted during string formatting"));
    }
    out.finish()
}

/// A number of `format` at `at`, which goes behind it.
fn number(format: &str, at: &mut usize) -> Result<Option<usize>, Error> {
    let rest = &format[*at..];
    let n = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    *at += n;
    if n == 0 {
        return Ok(None);
    }
    rest[..n].parse().map(Some).map_err(|_| Error::new("a format has too large a number"))
}

fn size(value: &Value) -> Result<usize, Error> {
    let size = value.as_int().and_then(|n| usize::try_from(n).ok());
    size.ok_or_else(|| Error::new("* wants int"))
}

fn percent_value(
    value: &Value,
    kind: char,
    mut spec: Spec,
    out: &mut Builder,
) -> Result<(), Error> {
    spec.align = spec.align.or(Some('>'));
    match kind {
        's' | 'r' | 'a' => {
            let mut text = Builder::default();
            if kind == 's' {
                print(value, &mut text)
            } else {
                represent(value, &mut text)
            }
            if spec.align == Some('=') {
                (spec.fill, spec.align) = (' ', Some('>'));
            }
            padded_text(&text.finish()?, &spec, out);
            Ok(())
        }
        'c' => {
            let c = match value {
                Value::Text(text) if text.chars().count() == 1 => text.clone(),
                value => {
                    let code =
                        value.as_int().and_then(|n| u32::try_from(n).ok()).and_then(char::from_u32);
                    let c = code.ok_or_else(|| Error::new("%c requires int or char"))?;
                    Text::own(&c.to_string())
                }
            };
            padded_text(&c, &spec, out);
            Ok(())
        }
        'd' | 'i' | 'u' => {
            let n = match value {
                Value::Float(x) if x.is_finite() => Some(x.trunc() as i128),
                value => value.as_int(),
            };
            let n = n.ok_or_else(|| Error::new(format!("%{kind} format: a number is required")))?;
            let n = Value::Int(n);
            formatted_number(&n, &Spec { kind: 'd', precision: None, ..spec }, out)
        }
        'o' | 'x' | 'X' if value.as_int().is_some() => {
            formatted_number(value, &Spec { kind, precision: None, ..spec }, out)
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' if value.as_float().is_some() => {
            formatted_number(value, &Spec { kind, ..spec }, out)
        }
        _ => Err(Error::new(format!("%{kind} cannot format a value of type '{}'", value.kind()))),
    }
}

/// `format.format(args)`.
pub fn brace(format: &Text, args: &Args) -> Result<Text, Error> {
    let mut out = Builder::default();
    brace_into(format, args, &mut 0, 0, &mut out)?;
    out.finish()
}

fn brace_into(
    format: &Text,
    args: &Args,
    next: &mut usize,
    level: usize,
    out: &mut Builder,
) -> Result<(), Error> {
    let mut at = 0;
    while let Some(n) = format[at..].find(['{', '}']) {
        out.push_part(format, at..at + n);
        at += n;
        let rest = &format[at..];
        if rest.starts_with("{{") || rest.starts_with("}}") {
            out.push_part(format, at..at + 1);
            at += 2;
            continue;
        }
        let end = field_end(rest).ok_or_else(|| Error::new("a format has a single brace"))?;
        let field = &rest[1..end];
        let (name, spec) = match field.find([':', '!']) {
            Some(n) => (&field[..n], &field[n..]),
            None => (field, ""),
        };
        let (conversion, spec_at) = match spec.strip_prefix('!') {
            Some(rest) => (rest.chars().next(), spec.find(':')),
            None => (None, spec.find(':')),
        };
        let mut value = field_value(name, args, next)?;
        match conversion {
            None => {}
            Some('r' | 'a') => {
                let mut text = Builder::default();
                represent(&value, &mut text);
                value = Value::Text(text.finish()?);
            }
            Some('s') => value = Value::Text(text_of(&value)?),
            Some(_) => return Err(Error::new("a format has an unknown conversion")),
        }
        let spec = spec_at.map_or("", |n| &spec[n + 1..]);
        let mut inner = Builder::default();
        if spec.contains('{') && level == 0 {
            brace_into(&Text::own(spec), args, next, level + 1, &mut inner)?;
        } else {
            inner.push_own(spec);
        }
        formatted(&value, &parse_spec(&inner.finish()?)?, out)?;
        at += end + 1;
    }
    out.push_part(format, at..format.len());
    Ok(())
}

/// Where the brace that `text` begins with closes.
fn field_end(text: &str) -> Option<usize> {
    let mut level = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => level += 1,
            '}' if level == 1 => return Some(at),
            '}' if level == 0 => return None,
            '}' => level -= 1,
            _ => {}
        }
    }
    None
}

/// The value of `0.name[key]`, say.
fn field_value(name: &str, args: &Args, next: &mut usize) -> Result<Value, Error> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let missing = || Error::new(format!("a format names '{first}', which is not given"));
    let mut value = if first.is_empty() {
        *next += 1;
        args.positional.get(*next - 1).cloned().ok_or_else(missing)?
    } else if let Ok(i) = first.parse::<usize>() {
        args.positional.get(i).cloned().ok_or_else(missing)?
    } else {
        args.named.iter().find(|(name, _)| **name == *first).ok_or_else(missing)?.1.clone()
    };
    while let Some(inside) = rest.strip_prefix('[') {
        let end = inside.find(']').ok_or_else(|| Error::new("a format lacks ']'"))?;
        let key = inside[..end].parse().map_or_else(|_| Value::own(&inside[..end]), Value::Int);
        value = item(&value, &key)?.ok_or_else(|| Error::new("a format names a missing item"))?;
        rest = &inside[end + 1..];
    }
    if rest.is_empty() { Ok(value) } else { Err(Error::new("a format reads an attribute")) }
}

fn parse_spec(spec: &str) -> Result<Spec, Error> {
    let mut parsed = Spec::default();
    let mut chars = spec.chars();
    let (first, second) = (chars.next(), chars.next());
    let is_align = |c: Option<char>| c.filter(|c| "<>^=".contains(*c));
    let mut at = 0;
    if let (Some(fill), Some(align)) = (first, is_align(second)) {
        (parsed.fill, parsed.align) = (fill, Some(align));
        at = fill.len_utf8() + 1;
    } else if let Some(align) = is_align(first) {
        parsed.align = Some(align);
        at = 1;
    }
    let take = |at: &mut usize, set: &str| {
        let c = spec[*at..].chars().next().filter(|c| set.contains(*c));
        *at += c.map_or(0, char::len_utf8);
        c
    };
    parsed.sign = take(&mut at, "+- ").unwrap_or('-');
    parsed.alternate = take(&mut at, "#").is_some();
    if take(&mut at, "0").is_some() && parsed.align.is_none() {
        (parsed.fill, parsed.align) = ('0', Some('='));
    }
    parsed.width = number(spec, &mut at)?.unwrap_or(0);
    parsed.grouping = take(&mut at, ",_");
    if take(&mut at, ".").is_some() {
        let precision = number(spec, &mut at)?;
        parsed.precision =
            Some(precision.ok_or_else(|| Error::new("Format specifier missing precision"))?);
    }
    parsed.kind = take(&mut at, "bcdeEfFgGnosxX%").unwrap_or('\0');
    if at == spec.len() { Ok(parsed) } else { Err(Error::new("Invalid format specifier")) }
}

/// Appends a value as a format's field writes it.
fn formatted(value: &Value, spec: &Spec, out: &mut Builder) -> Result<(), Error> {
    match value {
        Value::Text(text) if matches!(spec.kind, '\0' | 's') => {
            padded_text(text, spec, out);
            Ok(())
        }
        Value::Int(_) | Value::Float(_) if spec.kind != 's' => formatted_number(value, spec, out),
        Value::Bool(b) if spec.kind != '\0' => {
            formatted_number(&Value::Int((*b).into()), spec, out)
        }
        value => {
            let text = text_of(value)?;
            let is_plain =
                spec.width == 0 && matches!(spec.kind, '\0' | 's') && spec.precision.is_none();
            if !is_plain && !matches!(value, Value::Bool(_)) {
                let kind = value.kind();
                return Err(Error::new(format!(
                    "unsupported format string passed to {kind}.__format__"
                )));
            }
            padded_text(&text, spec, out);
            Ok(())
        }
    }
}

fn padded_text(text: &Text, spec: &Spec, out: &mut Builder) {
    let end =
        spec.precision.and_then(|n| text.char_indices().nth(n)).map_or(text.len(), |(at, _)| at);
    let n = spec.width.saturating_sub(text[..end].chars().count());
    let before = match spec.align {
        Some('>') => n,
        Some('^') => n / 2,
        _ => 0,
    };
    out.push_times(spec.fill, before);
    out.push_part(text, 0..end);
    out.push_times(spec.fill, n - before);
}

fn formatted_number(value: &Value, spec: &Spec, out: &mut Builder) -> Result<(), Error> {
    if spec.precision.is_some_and(|n| n > MAX_PRECISION) {
        return Err(Error::new("a format asks for too many digits"));
    }
    let x = value.as_float().unwrap_or(f64::NAN);
    let n = value.as_int();
    let is_negative = n.map_or(x.is_sign_negative() && !x.is_nan(), |n| n < 0);
    let mut prefix = "";
    let precision = spec.precision.unwrap_or(6);
    let digits = match (spec.kind, n) {
        ('\0' | 'd' | 'n', Some(n)) => n.unsigned_abs().to_string(),
        ('b', Some(n)) => {
            prefix = "0b";
            format!("{:b}", n.unsigned_abs())
        }
        ('o', Some(n)) => {
            prefix = "0o";
            format!("{:o}", n.unsigned_abs())
        }
        ('x', Some(n)) => {
            prefix = "0x";
            format!("{:x}", n.unsigned_abs())
        }
        ('X', Some(n)) => {
            prefix = "0X";
            format!("{:X}", n.unsigned_abs())
        }
        _ if !x.is_finite() => super::print::float(x.abs()),
        ('f' | 'F', _) => format!("{:.precision$}", x.abs()),
        ('e', _) => scientific(&format!("{:.precision$e}", x.abs())),
        ('E', _) => scientific(&format!("{:.precision$e}", x.abs())).to_uppercase(),
        ('%', _) => format!("{:.precision$}%", x.abs() * 100.0),
        ('g' | 'n', _) => general(x.abs(), precision),
        ('G', _) => general(x.abs(), precision).to_uppercase(),
        ('\0', _) if spec.precision.is_some() => general(x.abs(), precision),
        ('\0', _) => super::print::float(x.abs()),
        (kind, _) => {
            return Err(Error::new(format!(
                "Unknown format code '{kind}' for object of type '{}'",
                value.kind()
            )));
        }
    };
    let sign = match spec.sign {
        _ if is_negative => "-",
        '+' => "+",
        ' ' => " ",
        _ => "",
    };
    let prefix = if spec.alternate { prefix } else { "" };
    let digits = match spec.grouping {
        Some(separator) => grouped(&digits, separator),
        None => digits,
    };
    let text = format!("{sign}{prefix}{digits}");
    if spec.align == Some('=') {
        out.push_own(&text[..text.len() - digits.len()]);
        out.push_times(spec.fill, spec.width.saturating_sub(text.len()));
        out.push_own(&digits);
    } else {
        let align = spec.align.or(Some('>'));
        padded_text(&Text::own(&text), &Spec { align, precision: None, ..spec.clone() }, out);
    }
    Ok(())
}

/// With a separator between groups of three digits before the point.
fn grouped(digits: &str, separator: char) -> String {
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let mut out = String::new();
    for (i, c) in digits[..end].chars().enumerate() {
        if i > 0 && (end - i) % 3 == 0 {
            out.push(separator);
        }
        out.push(c);
    }
    out + &digits[end..]
}

/// `%g`: `precision` digits, without zeros at the end.
fn general(x: f64, precision: usize) -> String {
    let precision = precision.max(1);
    let text = format!("{x:.*e}", precision - 1);
    let power = exponent(&text);
    let short = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if power < -4 || power >= precision as i32 {
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return scientific(&format!("{}e{power}", short(digits)));
    }
    short(&format!("{x:.*}", (precision as i32 - 1 - power).max(0) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_python_writes_them() {
        let (n, x) = (Value::Int(-42), Value::Float(2.71459));
        for (format, value, text) in [
            ("%s|%%", n.clone(), "-42|%"),
            ("%5d|", n.clone(), "  -42|"),
            ("%-5d|", n.clone(), "-42  |"),
            ("%05d|", n.clone(), "-0042|"),
            ("%.2f", x.clone(), "2.71"),
            ("%+.1e", x.clone(), "+2.7e+00"),
            ("%g", Value::Float(1e20), "1e+20"),
            ("%r", Value::own("it's"), "\"it's\""),
            ("%x", Value::Int(255), "ff"),
        ] {
            assert_eq!(&*percent(&Text::own(format), &value).unwrap(), text, "{format}");
        }
        for (format, text) in [
            ("{}-{}", "-42-2.71459"),
            ("{1:.3f}|{0:>6}|{0:<6}|{0:^7}|", "2.715|   -42|-42   |  -42  |"),
            ("{x!r}{{}}", "'a'{}"),
            ("{0:+,}", "-42"),
            ("{1:{w}.1f}", "  2.7"),
        ] {
            let named = vec![("x".into(), Value::own("a")), ("w".into(), Value::Int(5))];
            let args = Args { positional: vec![n.clone(), x.clone()], named };
            assert_eq!(&*brace(&Text::own(format), &args).unwrap(), text, "{format}");
        }
        assert!(percent(&Text::own("%d"), &Value::own("x")).is_err());
        assert!(percent(&Text::own("%.999999999f"), &x).is_err());
        assert!(
            brace(&Text::own("{:>99999999999}"), &Args { positional: vec![x], named: vec![] })
                .is_err()
        );
    }
}
