//! Messages of other dialects as the chat template sees them: OpenAI's objects with `role`, `content`,
//! `reasoning_content`, `tool_calls` and `tool_call_id`.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::error::Invalid;

/// A text, or a list of parts.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum TextOr<T: ToSchema> {
    /// Whole.
    Text(String),
    /// In parts.
    Parts(Vec<T>),
}

/// By hand: an error in a part has the part's path.
impl<'de, T: Deserialize<'de> + ToSchema> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + ToSchema> Visitor<'de> for Either<T> {
            type Value = TextOr<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list")
            }

            fn visit_str<E>(self, text: &str) -> Result<TextOr<T>, E> {
                Ok(TextOr::Text(text.to_owned()))
            }

            fn visit_string<E>(self, text: String) -> Result<TextOr<T>, E> {
                Ok(TextOr::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<TextOr<T>, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(parts)).map(TextOr::Parts)
            }
        }
        reader.deserialize_any(Either(PhantomData))
    }
}

impl<T: ToSchema> TextOr<T> {
    /// The texts; `text` is a part's.
    ///
    /// # Errors
    /// The first of `text`, which gets a part's place, too.
    pub fn texts<E>(
        self,
        mut text: impl FnMut(usize, T) -> Result<String, E>,
    ) -> Result<Vec<String>, E> {
        match self {
            Self::Text(text) => Ok(vec![text]),
            Self::Parts(parts) => parts.into_iter().enumerate().map(|(i, p)| text(i, p)).collect(),
        }
    }
}

/// A conversation as it is read. What an assistant says between two others is one message.
#[derive(Debug, Default)]
pub struct History {
    messages: Vec<Map<String, Value>>,
    /// What the assistant says in the message that is read, if it is its.
    answer: Option<Said>,
}

/// What an assistant says in one message.
#[derive(Debug, Default)]
struct Said {
    texts: Vec<String>,
    thoughts: String,
    calls: Vec<Value>,
}

impl History {
    /// Adds instructions. Those before any other message are one message: many templates take
    /// no second.
    pub fn system(&mut self, role: &str, texts: Vec<String>) {
        self.end_answer();
        let text = without_empty(texts).join("\n\n");
        if let [first] = self.messages.as_mut_slice()
            && (first["role"] == "system" || first["role"] == "developer")
        {
            let before = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{before}\n\n{text}").into();
        } else {
            self.message(role, text.into());
        }
    }

    /// Adds a user's message.
    pub fn user(&mut self, texts: Vec<String>) {
        self.end_answer();
        self.message("user", content(texts));
    }

    /// Adds the result of a call.
    pub fn result(&mut self, id: &str, texts: Vec<String>) {
        self.end_answer();
        self.message("tool", content(texts));
        if let Some(message) = self.messages.last_mut() {
            message.insert("tool_call_id".into(), id.into());
        }
    }

    /// Begins what the assistant says, or goes on with it.
    pub fn begin_answer(&mut self) {
        self.answer.get_or_insert_default();
    }

    /// The assistant says these texts.
    pub fn says(&mut self, texts: Vec<String>) {
        self.answer.get_or_insert_default().texts.extend(texts);
    }

    /// The assistant thinks.
    pub fn thinks(&mut self, thoughts: &str) {
        self.answer.get_or_insert_default().thoughts += thoughts;
    }

    /// The assistant calls a tool; `arguments` are JSON.
    pub fn calls(&mut self, id: &str, name: &str, arguments: &str) {
        let call = json!({
            "id": id, "type": "function", "function": { "name": name, "arguments": arguments },
        });
        self.answer.get_or_insert_default().calls.push(call);
    }

    /// All messages.
    pub fn end(mut self) -> Vec<Map<String, Value>> {
        self.end_answer();
        self.messages
    }

    /// Ends what the assistant says.
    pub fn end_answer(&mut self) {
        let Some(Said { texts, thoughts, calls }) = self.answer.take() else { return };
        let texts = without_empty(texts);
        let is_silent = texts.is_empty() && !calls.is_empty();
        self.message("assistant", if is_silent { Value::Null } else { content(texts) });
        let Some(message) = self.messages.last_mut() else { return };
        if !thoughts.is_empty() {
            message.insert("reasoning_content".into(), thoughts.into());
        }
        if !calls.is_empty() {
            message.insert("tool_calls".into(), calls.into());
        }
    }

    fn message(&mut self, role: &str, content: Value) {
        let fields = [("role".into(), role.into()), ("content".into(), content)];
        self.messages.push(Map::from_iter(fields));
    }
}

fn without_empty(texts: Vec<String>) -> Vec<String> {
    texts.into_iter().filter(|text| !text.is_empty()).collect()
}

/// One text as it is, several as parts, which a template may expect as lines.
fn content(texts: Vec<String>) -> Value {
    let mut texts = without_empty(texts);
    match texts.len() {
        0 => "".into(),
        1 => texts.remove(0).into(),
        _ => texts.into_iter().map(|text| json!({ "type": "text", "text": text })).collect(),
    }
}

/// An error about tools as OpenAI's chats have them, with the names of fields that `names` has for
/// parts of their paths.
pub fn renamed(mut error: Invalid, names: &[(&str, &str)]) -> Invalid {
    for (chats, ours) in names {
        error.message = error.message.replace(chats, ours);
        error.param = error.param.map(|param| param.replace(chats, ours));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_assistant_says_is_one_message_until_another_speaks() {
        let mut history = History::default();
        history.system("system", vec!["a".into(), String::new(), "b".into()]);
        history.system("developer", vec!["c".into()]);
        history.user(vec!["d".into(), "e".into()]);
        history.thinks("hm");
        history.calls("1", "f", "{}");
        history.calls("2", "g", "{}");
        history.result("1", vec!["x".into()]);
        history.says(vec!["y".into()]);
        let call = |id: &str, name: &str| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": "{}" } });
        let expected = json!([
            { "role": "system", "content": "a\n\nb\n\nc" },
            { "role": "user", "content": [{ "type": "text", "text": "d" }, { "type": "text", "text": "e" }] },
            { "role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [call("1", "f"), call("2", "g")] },
            { "role": "tool", "content": "x", "tool_call_id": "1" },
            { "role": "assistant", "content": "y" },
        ]);
        assert_eq!(json!(history.end()), expected);
    }
}
