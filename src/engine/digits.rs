//! How many digits a number in JSON may have. A schema rarely says, and a model that finds no end
//! (0.333...) writes them until its tokens run out. Pure.

/// Digits before a number's point: those of the largest 64-bit integer.
const INTEGER: usize = 20;
/// Digits after its point: as many as a double tells apart.
const FRACTION: usize = 17;
/// Digits of its exponent: all of them are doubles.
const EXPONENT: usize = 2;

/// Where in JSON a text ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digits {
    part: Part,
    /// Digits of that part so far.
    n: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    /// Between values, or in a word.
    #[default]
    Outside,
    String,
    /// In a string, after a backslash.
    Escape,
    Integer,
    Fraction,
    Exponent,
}

impl Digits {
    /// Reads on.
    pub fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let part = self.after(byte);
            let goes_on = part == self.part && byte.is_ascii_digit();
            self.n = if goes_on { self.n + 1 } else { usize::from(part == Part::Integer) };
            self.part = part;
        }
    }

    /// Digits that may follow; `None` where no number has begun.
    pub fn left(&self) -> Option<usize> {
        let most = match self.part {
            Part::Integer => INTEGER,
            Part::Fraction => FRACTION,
            Part::Exponent => EXPONENT,
            Part::Outside | Part::String | Part::Escape => return None,
        };
        Some(most.saturating_sub(self.n))
    }

    /// The text ends within a string, and not after a backslash.
    pub fn is_in_string(&self) -> bool {
        self.part == Part::String
    }

    fn after(&self, byte: u8) -> Part {
        match (self.part, byte) {
            (Part::String, b'\\') => Part::Escape,
            (Part::String, b'"') => Part::Outside,
            (Part::String | Part::Escape, _) => Part::String,
            (_, b'"') => Part::String,
            (Part::Outside, b'0'..=b'9') => Part::Integer,
            (Part::Integer, b'.') => Part::Fraction,
            (Part::Integer | Part::Fraction, b'e' | b'E') => Part::Exponent,
            (Part::Exponent, b'+' | b'-') => Part::Exponent,
            (part, b'0'..=b'9') => part,
            _ => Part::Outside,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_of_a_number_has_its_own_room_and_strings_have_none() {
        for (text, left) in [
            ("", None),
            ("-", None),
            ("[12, 3", Some(INTEGER - 1)),
            ("-120", Some(INTEGER - 3)),
            ("0.", Some(FRACTION)),
            ("0.33", Some(FRACTION - 2)),
            ("1.5e", Some(EXPONENT)),
            ("1E-12", Some(EXPONENT - 2)),
            ("1E-123", Some(0)),
            (r#"{"a": "12"#, None),
            (r#"{"a": "1\"2", "b": 3"#, Some(INTEGER - 1)),
            ("[true, 1, fal", None),
        ] {
            let mut digits = Digits::default();
            digits.push(text.as_bytes());
            assert_eq!(digits.left(), left, "{text}");
        }
    }
}
