//! Values as Python prints them (`str` and `repr`), and as its `json` module writes them.

use super::args::Args;
use super::error::{Error, MAX_TEXT_BYTES};
use super::text::{Builder, Text};
use super::value::{Key, Value};

/// Appends `str(value)`.
pub fn print(value: &Value, out: &mut Builder) {
    match value {
        Value::Undefined(_) => {}
        Value::Text(text) => out.push(text),
        value => represent(value, out),
    }
}

/// `str(value)`.
pub fn text_of(value: &Value) -> Result<Text, Error> {
    if let Value::Text(text) = value {
        return Ok(text.clone());
    }
    let mut out = Builder::default();
    print(value, &mut out);
    out.finish()
}

/// Appends `repr(value)`.
pub fn represent(value: &Value, out: &mut Builder) {
    match value {
        Value::Undefined(_) => out.push_own("Undefined"),
        Value::None => out.push_own("None"),
        Value::Bool(true) => out.push_own("True"),
        Value::Bool(false) => out.push_own("False"),
        Value::Int(n) => out.push_own(&n.to_string()),
        Value::Float(x) => out.push_own(&float(*x)),
        Value::Text(text) => quote(text, out),
        Value::List(list) => {
            out.push_own("[");
            represent_all(&list.items, out);
            out.push_own("]");
        }
        Value::Tuple(list) => {
            out.push_own("(");
            represent_all(&list.items, out);
            out.push_own(if list.items.len() == 1 { ",)" } else { ")" });
        }
        Value::Dict(dict) => {
            out.push_own("{");
            for (i, (key, value)) in dict.items.iter().enumerate() {
                out.push_own(if i > 0 { ", " } else { "" });
                represent(key.value(), out);
                out.push_own(": ");
                represent(value, out);
            }
            out.push_own("}");
        }
        Value::Function(name) => out.push_own(&format!("<function {name}>")),
        value => out.push_own(&format!("<{}>", value.kind())),
    }
}

fn represent_all(items: &[Value], out: &mut Builder) {
    for (i, item) in items.iter().enumerate() {
        out.push_own(if i > 0 { ", " } else { "" });
        represent(item, out);
    }
}

/// A float with the fewest digits that name it.
pub fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let exponent = if x == 0.0 { 0 } else { exponent(&format!("{x:e}")) };
    if (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    scientific(&format!("{x:e}"))
}

/// The exponent that Rust wrote.
pub fn exponent(text: &str) -> i32 {
    text.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0)
}

/// Rust's `1e5` as Python's `1e+05`.
pub fn scientific(text: &str) -> String {
    let (digits, _) = text.split_once('e').unwrap_or((text, ""));
    let exponent = exponent(text);
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn quote(text: &Text, out: &mut Builder) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push_times(quote, 1);
    for (range, outside) in text.runs() {
        let mut escaped = String::with_capacity(range.len());
        for c in text[range].chars() {
            match c {
                '\n' => escaped.push_str("\\n"),
                '\r' => escaped.push_str("\\r"),
                '\t' => escaped.push_str("\\t"),
                '\\' => escaped.push_str("\\\\"),
                c if c == quote => escaped.extend(['\\', c]),
                c if is_printable(c) => escaped.push(c),
                c => escaped.push_str(&match u32::from(c) {
                    n @ ..=0xff => format!("\\x{n:02x}"),
                    n @ ..=0xffff => format!("\\u{n:04x}"),
                    n => format!("\\U{n:08x}"),
                }),
            }
        }
        out.push_as(&escaped, outside);
    }
    out.push_times(quote, 1);
}

/// Neither a control or format character nor a separator other than the space.
fn is_printable(c: char) -> bool {
    !(c.is_control()
        || c != ' ' && c.is_whitespace()
        || matches!(
            c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}'
        )
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}'..='\u{ffff}')
        || c >= '\u{e0000}')
}

/// How `tojson` writes.
struct Json {
    indent: Option<Text>,
    between_items: Text,
    after_key: Text,
    ascii: bool,
    sorted: bool,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub fn to_json(value: &Value, args: Args) -> Result<Value, Error> {
    let [ascii, indent, separators, sorted] =
        args.bind(["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let is_set = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let indent = match indent.unwrap_or(Value::None) {
        Value::None => None,
        Value::Text(text) => Some(text),
        value => {
            let n = value
                .as_int()
                .ok_or_else(|| Error::new("tojson: indent must be a number or text"))?;
            let mut spaces = Builder::default();
            spaces.push_times(' ', usize::try_from(n).unwrap_or(0));
            Some(spaces.finish()?)
        }
    };
    let (between_items, after_key) = match separators.unwrap_or(Value::None) {
        Value::None => (Text::own(if indent.is_some() { "," } else { ", " }), Text::own(": ")),
        pair => match &pair.iterate()?[..] {
            [Value::Text(between), Value::Text(after)] => (between.clone(), after.clone()),
            _ => return Err(Error::new("tojson: separators must be two texts")),
        },
    };
    let json =
        Json { indent, between_items, after_key, ascii: is_set(ascii), sorted: is_set(sorted) };
    let mut out = Builder::default();
    json.write(value, 0, &mut out)?;
    Ok(Value::Text(out.finish()?))
}

impl Json {
    fn write(&self, value: &Value, level: usize, out: &mut Builder) -> Result<(), Error> {
        match value {
            Value::None => out.push_own("null"),
            Value::Bool(b) => out.push_own(if *b { "true" } else { "false" }),
            Value::Int(n) => out.push_own(&n.to_string()),
            Value::Float(x) => out.push_own(&json_float(*x)),
            Value::Text(text) => self.quote(text, out),
            Value::List(list) | Value::Tuple(list) => {
                out.push_own("[");
                for (i, item) in list.items.iter().enumerate() {
                    self.next(i, level + 1, out);
                    self.write(item, level + 1, out)?;
                }
                self.close(list.items.len(), level, "]", out);
            }
            Value::Dict(dict) => {
                let mut items: Vec<(&Key, &Value)> = dict.items.iter().collect();
                if self.sorted {
                    let by_key = |a: &(&Key, _), b: &(&Key, _)| a.0.value().compare(b.0.value());
                    for pair in items.windows(2) {
                        by_key(&pair[0], &pair[1])?;
                    }
                    items.sort_by(|a, b| by_key(a, b).unwrap_or(std::cmp::Ordering::Equal));
                }
                out.push_own("{");
                for (i, (key, item)) in items.into_iter().enumerate() {
                    self.next(i, level + 1, out);
                    self.key(key.value(), out)?;
                    out.push(&self.after_key);
                    self.write(item, level + 1, out)?;
                }
                self.close(dict.items.len(), level, "}", out);
            }
            value => {
                let kind = value.kind();
                return Err(Error::new(format!("Object of type {kind} is not JSON serializable")));
            }
        }
        if out.len() > MAX_TEXT_BYTES {
            return Err(Error::new("tojson: the text is too long"));
        }
        Ok(())
    }

    fn key(&self, key: &Value, out: &mut Builder) -> Result<(), Error> {
        match key {
            Value::Text(text) => self.quote(text, out),
            Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                out.push_own("\"");
                self.write(key, 0, out)?;
                out.push_own("\"");
            }
            key => return Err(Error::new(format!("tojson: a key is of type {}", key.kind()))),
        }
        Ok(())
    }

    /// What stands before item `i`.
    fn next(&self, i: usize, level: usize, out: &mut Builder) {
        if i > 0 {
            out.push(&self.between_items);
        }
        self.new_line(level, out);
    }

    /// What stands after `n` items.
    fn close(&self, n: usize, level: usize, bracket: &str, out: &mut Builder) {
        if n > 0 {
            self.new_line(level, out);
        }
        out.push_own(bracket);
    }

    fn new_line(&self, level: usize, out: &mut Builder) {
        if let Some(indent) = &self.indent {
            out.push_own("\n");
            (0..level).for_each(|_| out.push(indent));
        }
    }

    fn quote(&self, text: &Text, out: &mut Builder) {
        out.push_own("\"");
        for (range, outside) in text.runs() {
            let mut escaped = String::with_capacity(range.len());
            for c in text[range].chars() {
                match c {
                    '"' => escaped.push_str("\\\""),
                    '\\' => escaped.push_str("\\\\"),
                    '\n' => escaped.push_str("\\n"),
                    '\r' => escaped.push_str("\\r"),
                    '\t' => escaped.push_str("\\t"),
                    '\u{8}' => escaped.push_str("\\b"),
                    '\u{c}' => escaped.push_str("\\f"),
                    c if c < ' ' || self.ascii && c > '~' => {
                        let mut units = [0; 2];
                        for unit in c.encode_utf16(&mut units) {
                            escaped.push_str(&format!("\\u{unit:04x}"));
                        }
                    }
                    c => escaped.push(c),
                }
            }
            out.push_as(&escaped, outside);
        }
        out.push_own("\"");
    }
}

fn json_float(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        x => float(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_pythons() {
        for (x, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e16, "1e+16"),
            (123_456_789.125, "123456789.125"),
            (0.0001, "0.0001"),
            (0.000_012, "1.2e-05"),
            (1.5e300, "1.5e+300"),
        ] {
            assert_eq!(float(x), text);
        }
    }
}
