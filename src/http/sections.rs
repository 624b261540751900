//! What an answer is made of, in the order in which it is written: thoughts, texts and calls of tools.
//! Dialects whose streams tell where each of these begins and ends write them from here.

use crate::chat::{AnswerReader, Delta, Syntax};

/// One of an answer's thoughts, texts or calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    pub kind: Kind,
    /// The thoughts, the text, or a call's arguments, which are JSON, or the beginning of it where the
    /// answer was cut off.
    pub text: String,
}

/// What a section is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Thoughts,
    Text,
    /// A call with its id and the tool's name.
    Call {
        id: String,
        name: String,
    },
}

/// What happens to a section, with its place.
#[derive(Debug)]
pub enum Change<'a> {
    /// It begins.
    Begin(usize, &'a Section),
    /// It has this more.
    More(usize, &'a Section, &'a str),
    /// It ends.
    End(usize, &'a Section),
}

/// An answer as it is read: the last section is open, those before it have ended.
#[derive(Clone, Debug)]
pub struct Sections {
    reader: AnswerReader,
    list: Vec<Section>,
    /// The sections of calls, in order.
    calls: Vec<usize>,
}

impl Sections {
    /// Of an answer that is about to be written.
    pub fn new(syntax: Option<Syntax>) -> Self {
        Self { reader: AnswerReader::new(syntax), list: Vec::new(), calls: Vec::new() }
    }

    /// Of a whole answer.
    pub fn of(text: &str, syntax: Option<Syntax>) -> Self {
        let mut sections = Self::new(syntax);
        sections.push(text, &mut |_| {});
        sections.end(&mut |_| {});
        sections.close(&mut |_| {});
        sections
    }

    /// Takes more of the text.
    pub fn push(&mut self, text: &str, each: &mut dyn FnMut(Change<'_>)) {
        let mut deltas = Vec::new();
        self.reader.push(text, &mut |delta| deltas.push(delta));
        deltas.into_iter().for_each(|delta| self.take(delta, each));
    }

    /// Ends the text; the last section is still open.
    pub fn end(&mut self, each: &mut dyn FnMut(Change<'_>)) {
        let mut deltas = Vec::new();
        self.reader.end(&mut |delta| deltas.push(delta));
        deltas.into_iter().for_each(|delta| self.take(delta, each));
    }

    /// Begins an empty text, if there is nothing.
    pub fn fill(&mut self, each: &mut dyn FnMut(Change<'_>)) {
        if self.list.is_empty() {
            self.begin(Kind::Text, each);
        }
    }

    /// What there is so far.
    pub fn list(&self) -> &[Section] {
        &self.list
    }

    /// Whether a tool is called.
    pub fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// All thoughts.
    pub fn thoughts(&self) -> &str {
        &self.reader.answer().reasoning
    }

    fn take(&mut self, delta: Delta, each: &mut dyn FnMut(Change<'_>)) {
        match delta {
            Delta::Reasoning(text) => self.more(Kind::Thoughts, &text, each),
            Delta::Content(text) => self.more(Kind::Text, &text, each),
            Delta::Call { id, name, .. } => {
                self.calls.push(self.list.len());
                self.begin(Kind::Call { id, name }, each);
            }
            Delta::Arguments { index, text } => {
                // What ended stays as it is.
                let last = self.list.len().checked_sub(1);
                if last.is_some() && self.calls.get(index).copied() == last {
                    self.add(&text, each);
                }
            }
        }
    }

    /// Adds to the open section, if it is of this kind, or else to a new one.
    fn more(&mut self, kind: Kind, text: &str, each: &mut dyn FnMut(Change<'_>)) {
        if self.list.last().is_none_or(|open| open.kind != kind) {
            self.begin(kind, each);
        }
        self.add(text, each);
    }

    fn begin(&mut self, kind: Kind, each: &mut dyn FnMut(Change<'_>)) {
        self.close(each);
        self.list.push(Section { kind, text: String::new() });
        let place = self.list.len() - 1;
        each(Change::Begin(place, &self.list[place]));
    }

    fn add(&mut self, text: &str, each: &mut dyn FnMut(Change<'_>)) {
        let Some(place) = self.list.len().checked_sub(1) else { return };
        self.list[place].text += text;
        each(Change::More(place, &self.list[place], text));
    }

    /// Ends the last section. A call without arguments has an empty object of them.
    pub fn close(&mut self, each: &mut dyn FnMut(Change<'_>)) {
        let Some(open) = self.list.last() else { return };
        if matches!(open.kind, Kind::Call { .. }) && open.text.is_empty() {
            self.add("{}", each);
        }
        let place = self.list.len() - 1;
        each(Change::End(place, &self.list[place]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_begin_and_end_in_turn() {
        let mut sections = Sections::new(None);
        let mut seen = Vec::new();
        let mut note = |change: Change<'_>| {
            seen.push(match change {
                Change::Begin(place, section) => format!("{place}: {:?}", section.kind),
                Change::More(place, _, text) => format!("{place}+{text}"),
                Change::End(place, section) => format!("{place}={}", section.text),
            });
        };
        let call = |index| Delta::Call { index, id: index.to_string(), name: "f".into() };
        for delta in [
            Delta::Reasoning("a".into()),
            Delta::Content("b".into()),
            Delta::Content("c".into()),
            call(0),
            call(1),
            Delta::Arguments { index: 1, text: "{\"x\": 1}".into() },
            Delta::Arguments { index: 0, text: "{}".into() },
        ] {
            sections.take(delta, &mut note);
        }
        sections.end(&mut note);
        sections.close(&mut note);
        let expected = [
            "0: Thoughts",
            "0+a",
            "0=a",
            "1: Text",
            "1+b",
            "1+c",
            "1=bc",
            "2: Call { id: \"0\", name: \"f\" }",
            "2+{}",
            "2={}",
            "3: Call { id: \"1\", name: \"f\" }",
            "3+{\"x\": 1}",
            "3={\"x\": 1}",
        ];
        assert_eq!(seen, expected);
        assert!(sections.has_calls() && sections.list().len() == 4);
    }
}
