//! Texts that remember which of their bytes came from outside the template.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use super::error::{Error, MAX_TEXT_BYTES};

/// A text of a rendering.
#[derive(Clone, Debug)]
pub struct Text {
    text: Arc<str>,
    outside: Outside,
    /// HTML, as `safe` has it: what is joined to it is escaped.
    is_html: bool,
}

/// Which bytes came from outside, as ranges in order that do not touch.
#[derive(Clone, Debug)]
enum Outside {
    None,
    All,
    Ranges(Arc<[Range<usize>]>),
}

impl Text {
    /// A text of the template, or of the renderer itself.
    pub fn own(text: &str) -> Self {
        Self { text: text.into(), outside: Outside::None, is_html: false }
    }

    /// A text that came from outside.
    pub fn outside(text: &str) -> Self {
        Self { text: text.into(), outside: Outside::All, is_html: false }
    }

    /// Whether it is HTML: what is joined to it is escaped.
    pub fn is_html(&self) -> bool {
        self.is_html
    }

    /// The text as HTML that needs no escapes.
    pub fn into_html(self) -> Self {
        Self { is_html: true, ..self }
    }

    /// The text as HTML: escaped, unless it is HTML.
    pub fn escaped(&self) -> Result<Self, Error> {
        if self.is_html {
            return Ok(self.clone());
        }
        let escape = |text: &str| {
            let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            text.replace('\'', "&#39;").replace('"', "&#34;")
        };
        self.map(escape).map(Self::into_html)
    }

    /// Several texts as one, which is HTML if one of them is.
    pub fn joined(texts: &[Self]) -> Result<Self, Error> {
        let is_html = texts.iter().any(|text| text.is_html);
        let mut out = Builder { is_html, ..Builder::default() };
        for text in texts {
            if is_html { out.push(&text.escaped()?) } else { out.push(text) }
        }
        out.finish()
    }

    /// Its stretches, each from one side: `true` for outside.
    pub fn runs(&self) -> Vec<(Range<usize>, bool)> {
        let whole = 0..self.text.len();
        match &self.outside {
            Outside::None => vec![(whole, false)],
            Outside::All => vec![(whole, true)],
            Outside::Ranges(ranges) => {
                let mut runs = Vec::with_capacity(2 * ranges.len() + 1);
                let mut at = 0;
                for range in ranges.iter() {
                    runs.push((at..range.start, false));
                    runs.push((range.clone(), true));
                    at = range.end;
                }
                runs.push((at..whole.end, false));
                runs.retain(|(range, _)| !range.is_empty());
                runs
            }
        }
    }

    /// The text `n` times.
    pub fn repeated(&self, n: usize) -> Result<Self, Error> {
        let mut out = Builder { is_html: self.is_html, ..Builder::default() };
        match &self.runs()[..] {
            [(_, outside)] => out.push_as(&self.text.repeat(n), *outside),
            _ => (0..n).for_each(|_| out.push(self)),
        }
        out.finish()
    }

    /// Whether some of the bytes in `range` came from outside.
    pub fn has_outside(&self, range: Range<usize>) -> bool {
        self.slice(range).runs().iter().any(|(_, outside)| *outside)
    }

    /// The text with another from outside behind it.
    pub fn with_outside(&self, more: &str) -> Result<Self, Error> {
        let mut out = Builder::default();
        out.push(self);
        out.push_as(more, true);
        out.finish()
    }

    /// The text with one of the template's own behind it.
    pub fn with_own(&self, more: &str) -> Result<Self, Error> {
        let mut out = Builder::default();
        out.push(self);
        out.push_as(more, false);
        out.finish()
    }

    /// The part at `range` of bytes.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let mut part = Builder { is_html: self.is_html, ..Builder::default() };
        part.push_part(self, range);
        part.finish_within()
    }

    /// The text whose stretches are `map` of its own.
    pub fn map(&self, map: impl Fn(&str) -> String) -> Result<Self, Error> {
        let mut out = Builder { is_html: self.is_html, ..Builder::default() };
        self.runs()
            .into_iter()
            .for_each(|(range, outside)| out.push_as(&map(&self[range]), outside));
        out.finish()
    }

    /// The characters as texts.
    pub fn chars_of(&self) -> Vec<Self> {
        let mut buffer = [0; 4];
        let mut chars = Vec::new();
        for (range, outside) in self.runs() {
            chars.extend(self[range].chars().map(|c| {
                let text: &str = c.encode_utf8(&mut buffer);
                if outside { Self::outside(text) } else { Self::own(text) }
            }));
        }
        chars
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

/// Builds a text of pieces. What is beyond the limit is dropped, and [`finish`](Self::finish) fails.
#[derive(Debug, Default)]
pub struct Builder {
    text: String,
    ranges: Vec<Range<usize>>,
    is_html: bool,
    is_too_long: bool,
}

impl Builder {
    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Appends a text of the renderer's own.
    pub fn push_own(&mut self, text: &str) {
        self.push_as(text, false);
    }

    /// Appends a text.
    pub fn push(&mut self, text: &Text) {
        self.push_part(text, 0..text.len());
    }

    /// Appends a character `n` times.
    pub fn push_times(&mut self, c: char, n: usize) {
        if n > MAX_TEXT_BYTES {
            self.is_too_long = true;
        } else {
            self.push_own(&String::from(c).repeat(n));
        }
    }

    /// Appends what is at `part` of a text.
    pub fn push_part(&mut self, text: &Text, part: Range<usize>) {
        match &text.outside {
            Outside::None => self.push_as(&text[part], false),
            Outside::All => self.push_as(&text[part], true),
            Outside::Ranges(ranges) => {
                let start = self.text.len();
                self.push_as(&text[part.clone()], false);
                if self.is_too_long {
                    return;
                }
                let first = ranges.partition_point(|range| range.end <= part.start);
                for range in &ranges[first..] {
                    let (from, to) = (range.start.max(part.start), range.end.min(part.end));
                    if from >= to {
                        break;
                    }
                    self.mark(start + from - part.start..start + to - part.start);
                }
            }
        }
    }

    /// Appends a text from one side.
    pub fn push_as(&mut self, text: &str, outside: bool) {
        if self.is_too_long || self.text.len() + text.len() > MAX_TEXT_BYTES {
            self.is_too_long = true;
            return;
        }
        let start = self.text.len();
        self.text.push_str(text);
        if outside {
            self.mark(start..self.text.len());
        }
    }

    fn mark(&mut self, range: Range<usize>) {
        match self.ranges.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }

    /// The text, unless it became too long.
    pub fn finish(self) -> Result<Text, Error> {
        if self.is_too_long {
            return Err(Error::new(format!("a text has over {MAX_TEXT_BYTES} bytes")));
        }
        Ok(self.finish_within())
    }

    /// The text of pieces that are not too long together.
    fn finish_within(self) -> Text {
        let outside = match &self.ranges[..] {
            [] => Outside::None,
            [whole] if *whole == (0..self.text.len()) => Outside::All,
            _ => Outside::Ranges(self.ranges.into()),
        };
        Text { text: self.text.into(), outside, is_html: self.is_html }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_side() {
        let mut builder = Builder::default();
        builder.push_own("ab");
        builder.push(&Text::outside("cd"));
        builder.push(&Text::outside("ef"));
        builder.push_own("g");
        let text = builder.finish().unwrap();
        assert_eq!(
            (&*text, text.runs()),
            ("abcdefg", vec![(0..2, false), (2..6, true), (6..7, false)])
        );
        let part = text.slice(1..4);
        assert_eq!((&*part, part.runs()), ("bcd", vec![(0..1, false), (1..3, true)]));
        assert_eq!(text.slice(2..6).runs(), [(0..4, true)]);
        assert_eq!(text.map(str::to_uppercase).unwrap().runs(), text.runs());
    }
}
