//! Sets of characters.

/// Ranges of code points, in order, that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Chars(Vec<(u32, u32)>);

/// The last code point.
const LAST: u32 = 0x10_FFFF;

impl Chars {
    pub fn new(mut ranges: Vec<(u32, u32)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    pub fn any() -> Self {
        Self(vec![(0, LAST)])
    }

    pub fn one(c: u32) -> Self {
        Self(vec![(c, c)])
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All other characters.
    pub fn negated(&self) -> Self {
        let mut rest = Vec::new();
        let mut next = 0;
        for &(first, last) in &self.0 {
            if next < first {
                rest.push((next, first - 1));
            }
            next = last.saturating_add(1);
        }
        if next <= LAST {
            rest.push((next, LAST));
        }
        Self(rest)
    }

    pub fn add(&mut self, other: &Self) {
        let all = self.0.iter().chain(&other.0).copied().collect();
        *self = Self::new(all);
    }

    pub fn meets(&self, other: &Self) -> bool {
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(&&(a_first, a_last)), Some(&&(b_first, b_last))) = (a.peek(), b.peek()) {
            if a_first <= b_last && b_first <= a_last {
                return true;
            }
            if a_last < b_last {
                a.next()
            } else {
                b.next()
            };
        }
        false
    }

    /// As a class of a regular expression. Surrogates, which no text has, are left out.
    pub fn class(&self) -> String {
        let mut class = String::from("[");
        let mut push = |first: u32, last: u32| {
            if first <= last {
                class += &format!("\\x{{{first:X}}}-\\x{{{last:X}}}");
            }
        };
        for &(first, last) in &self.0 {
            push(first, last.min(0xD7FF));
            push(first.max(0xE000), last);
        }
        class + "]"
    }
}
