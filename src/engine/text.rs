//! From token bytes to text that may be shown: whole characters only, and nothing that could still
//! become a stop string. Pure. The result does not depend on how tokens divide the bytes.

/// Assembles one request's text.
#[derive(Debug)]
pub struct TextAssembler {
    stops: Vec<String>,
    decoder: Decoder,
    /// Text that is, or ends in, a possible beginning of a stop string; shorter than the longest
    /// one.
    held: String,
}

/// What a push brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed {
    /// Text to show, perhaps none.
    Text(String),
    /// The stop string with this index appeared; this is the text before it. Push no more.
    Stopped {
        /// Text to show.
        text: String,
        /// Which one.
        stop: usize,
    },
}

impl TextAssembler {
    /// For an answer that ends before the first of `stops` to be complete. Empty strings among them
    /// are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, decoder: Decoder::default(), held: String::new() }
    }

    /// Takes a token's bytes without looking for stop strings in them.
    pub fn pass(&mut self, bytes: &[u8]) -> Pushed {
        self.decode(bytes);
        Pushed::Text(std::mem::take(&mut self.held))
    }

    /// Takes a token's bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Pushed {
        let scanned = self.held.len();
        self.decode(bytes);
        if let Some((start, stop)) = self.first_stop(scanned) {
            self.held.truncate(start);
            return Pushed::Stopped { text: std::mem::take(&mut self.held), stop };
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        Pushed::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back, at the end of an answer that no stop string ended. Half a character is
    /// not text and goes.
    pub fn finish(&mut self) -> String {
        self.decoder = Decoder::default();
        std::mem::take(&mut self.held)
    }

    fn decode(&mut self, bytes: &[u8]) {
        let Self { decoder, held, .. } = self;
        decoder.push(bytes, |text, _| held.push_str(text));
    }

    /// Start and index of the stop string that is complete first, the longest of those that end
    /// together. A match must end beyond the first `scanned` bytes, which held none before.
    fn first_stop(&self, scanned: usize) -> Option<(usize, usize)> {
        let found = |(index, stop): (usize, &String)| {
            let mut from = (scanned + 1).saturating_sub(stop.len());
            while !self.held.is_char_boundary(from) {
                from -= 1;
            }
            let start = from + self.held[from..].find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        };
        let stops = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        stops.filter_map(found).min().map(|(_, start, index)| (start, index))
    }

    /// Length of the longest suffix of `held` that a stop string begins with.
    fn longest_beginning(&self) -> usize {
        let longest = |stop: &String| {
            let mut lengths = (1..stop.len().min(self.held.len() + 1)).rev();
            lengths.find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

/// Bytes to whole characters.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    /// An incomplete character at the end of the bytes so far: at most 3 bytes.
    partial: Vec<u8>,
}

impl Decoder {
    /// Gives `each` the text that is whole now, in parts, with the number of bytes that each was.
    /// Bytes that can never become a character turn into U+FFFD.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&str, usize)) {
        let joined;
        let all = if self.partial.is_empty() {
            bytes
        } else {
            self.partial.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.partial);
            &joined
        };
        let mut chunks = all.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            each(chunk.valid(), chunk.valid().len());
            let bad = chunk.invalid();
            if chunks.peek().is_none() && may_continue(bad) {
                self.partial.extend_from_slice(bad);
            } else if !bad.is_empty() {
                each("\u{FFFD}", bad.len());
            }
        }
    }

    /// Bytes of the incomplete character at the end.
    pub fn n_partial(&self) -> usize {
        self.partial.len()
    }
}

/// `true` for bytes that more bytes could complete to a character.
fn may_continue(bad: &[u8]) -> bool {
    std::str::from_utf8(bad).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pushes the pieces; returns the text shown and the stop found.
    fn run(stops: &[&str], pieces: &[&[u8]]) -> (String, Option<usize>) {
        let mut text = TextAssembler::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut shown = String::new();
        for piece in pieces {
            match text.push(piece) {
                Pushed::Text(t) => shown += &t,
                Pushed::Stopped { text, stop } => return (shown + &text, Some(stop)),
            }
        }
        (shown + &text.finish(), None)
    }

    #[test]
    fn a_character_across_tokens_is_shown_once_whole() {
        let mut text = TextAssembler::new(vec![]);
        assert_eq!(text.push(&[0xF0, 0x9F]), Pushed::Text(String::new()));
        assert_eq!(text.push(&[0x98]), Pushed::Text(String::new()));
        assert_eq!(text.push(&[0x80, b'!']), Pushed::Text("😀!".into()));
    }

    #[test]
    fn bytes_that_are_no_character_become_a_replacement() {
        assert_eq!(run(&[], &[b"a\xFF", b"b"]), ("a\u{FFFD}b".into(), None));
        assert_eq!(
            run(&[], &[b"a\xE2\x82", b"b"]),
            ("a\u{FFFD}b".into(), None),
            "a character cut short by another"
        );
        assert_eq!(
            run(&[], &[b"a\xE2\x82"]),
            ("a".into(), None),
            "half a character at the end is not text"
        );
    }

    #[test]
    fn a_stop_string_across_tokens_ends_the_text_before_it() {
        assert_eq!(run(&["END"], &[b"one E", b"N", b"D two"]), ("one ".into(), Some(0)));
        assert_eq!(run(&["END"], &[b"one E", b"N", b"C"]), ("one ENC".into(), None));
        assert_eq!(
            run(&["bcd", "c"], &[b"abcd"]),
            ("ab".into(), Some(1)),
            "the first to be complete"
        );
        assert_eq!(
            run(&["c", "abc"], &[b"xabc"]),
            ("x".into(), Some(1)),
            "the longest of those that end together"
        );
    }

    fn cut<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> =
            cuts.iter().map(|c| c % (bytes.len() + 1)).chain([0, bytes.len()]).collect();
        at.sort_unstable();
        at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect()
    }

    proptest! {
        /// However tokens divide the bytes, the text is the same, and it is the text before the
        /// first stop string.
        #[test]
        fn the_text_does_not_depend_on_token_borders(
            text in "[ab€😀]{0,24}",
            stops in prop::collection::vec("[ab€😀]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<usize>(), 0..12),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (shown, stop) = run(&stops, &cut(text.as_bytes(), &cuts));
            let first = stops.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at))).min();
            let expected = first.map_or(text.as_str(), |(_, start)| &text[..start]);
            prop_assert_eq!(&shown, expected);
            prop_assert_eq!(stop.is_some(), first.is_some());
            if let (Some(i), Some((end, start))) = (stop, first) {
                prop_assert_eq!(stops[i], &text[start..end]);
            }
        }

        /// Any bytes in any pieces: the text is what a lossy decoding of all of them gives, but for
        /// half a character at the end.
        #[test]
        fn any_bytes_decode_as_they_would_at_once(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            cuts in prop::collection::vec(any::<usize>(), 0..12),
        ) {
            let (shown, _) = run(&[], &cut(&bytes, &cuts));
            let whole = String::from_utf8_lossy(&bytes);
            let cut_short = format!("{}{}", shown, char::REPLACEMENT_CHARACTER);
            prop_assert!(shown == whole || cut_short == whole);
        }

        /// Nothing is shown that a later stop string would have to take back, and little is held
        /// back.
        #[test]
        fn what_is_held_back_is_shorter_than_a_stop_string(text in "[ab]{0,30}", stop in "[ab]{1,5}") {
            let mut assembler = TextAssembler::new(vec![stop.clone()]);
            for byte in text.bytes() {
                if matches!(assembler.push(&[byte]), Pushed::Stopped { .. }) { break }
                prop_assert!(assembler.held.len() < stop.len());
            }
        }
    }
}
