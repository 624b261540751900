//! What the input of `/v1/responses` is made of, and how it becomes a history for the chat template.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::history::{History, TextOr};
use crate::error::Invalid;

/// A user's text, or items.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct Input(TextOr<InputItem>);

impl Default for Input {
    fn default() -> Self {
        Self(TextOr::Parts(Vec::new()))
    }
}

impl Input {
    /// Adds what its items say.
    pub(super) fn tell(self, history: &mut History) -> Result<(), Invalid> {
        match self.0 {
            TextOr::Text(text) => history.user(vec![text]),
            TextOr::Parts(items) if items.is_empty() => {
                return Err(Invalid::new("input", "input is []; it must be a list of at least 1"));
            }
            TextOr::Parts(items) => {
                for (i, item) in items.into_iter().enumerate() {
                    item.tell(&format!("input[{i}]"), history)?;
                }
            }
        }
        Ok(())
    }
}

/// An item of a conversation; one without a type is a message.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum InputItem {
    /// With its type.
    Typed(TypedItem),
    /// A message.
    Message(ItemMessage),
}

/// By hand: an error says what is wrong with an item of its type.
impl<'de> Deserialize<'de> for InputItem {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        let item = Value::Object(Map::deserialize(reader)?);
        let read = match item.get("type") {
            Some(_) => TypedItem::deserialize(item).map(Self::Typed),
            None => ItemMessage::deserialize(item).map(Self::Message),
        };
        read.map_err(D::Error::custom)
    }
}

/// An item with its type.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TypedItem {
    /// A message.
    Message(ItemMessage),
    /// A call of a function, by the assistant.
    FunctionCall {
        /// What its result names it by.
        call_id: String,
        /// The function's.
        name: String,
        /// JSON.
        arguments: String,
        /// Ignored.
        id: Option<Value>,
        /// Ignored.
        status: Option<Value>,
    },
    /// What a call gave.
    FunctionCallOutput {
        /// The call's.
        call_id: String,
        /// A text, or parts of text.
        output: TextOr<ItemPart>,
        /// Ignored.
        id: Option<Value>,
        /// Ignored.
        status: Option<Value>,
    },
    /// The assistant's thoughts, which the chat template may show or leave out.
    Reasoning {
        /// The thoughts.
        content: Option<Vec<ReasoningPart>>,
        /// A summary, which takes the place of thoughts that are not there.
        summary: Option<Vec<ReasoningPart>>,
        /// Ignored: only OpenAI's servers can read it.
        encrypted_content: Option<Value>,
        /// Ignored.
        id: Option<Value>,
        /// Ignored.
        status: Option<Value>,
    },
    /// Not supported, as nothing is stored.
    ItemReference {
        /// Not supported.
        id: Option<Value>,
    },
}

/// A message.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ItemMessage {
    /// Who says it.
    pub role: ItemRole,
    /// A text, or parts of text.
    pub content: TextOr<ItemPart>,
    /// Ignored.
    pub id: Option<Value>,
    /// Ignored.
    pub status: Option<Value>,
    /// Ignored.
    pub phase: Option<Value>,
}

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum ItemRole {
    System,
    Developer,
    User,
    Assistant,
}

/// A part of a message, or of a result.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ItemPart {
    /// A text.
    InputText {
        /// The text.
        text: String,
    },
    /// A text of the assistant's.
    OutputText {
        /// The text.
        text: String,
        /// Ignored.
        annotations: Option<Value>,
        /// Ignored.
        logprobs: Option<Value>,
    },
    /// A text.
    Text {
        /// The text.
        text: String,
    },
    /// Why the assistant does not answer.
    Refusal {
        /// The text.
        refusal: String,
    },
    /// Not supported.
    InputImage {
        /// Not supported.
        image_url: Option<Value>,
        /// Not supported.
        file_id: Option<Value>,
        /// Ignored.
        detail: Option<Value>,
    },
    /// Not supported.
    InputFile {
        /// Not supported.
        file_data: Option<Value>,
        /// Not supported.
        file_id: Option<Value>,
        /// Not supported.
        file_url: Option<Value>,
        /// Ignored.
        filename: Option<Value>,
    },
}

/// A part of thoughts.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ReasoningPart {
    /// `reasoning_text`, or `summary_text`.
    pub r#type: Option<String>,
    /// The text.
    pub text: String,
}

impl InputItem {
    /// Adds what it says, at `at` in the body.
    fn tell(self, at: &str, history: &mut History) -> Result<(), Invalid> {
        match self {
            Self::Message(message) | Self::Typed(TypedItem::Message(message)) => {
                return message.tell(at, history);
            }
            Self::Typed(TypedItem::FunctionCall { call_id, name, arguments, .. }) => {
                history.calls(&call_id, &name, &arguments);
            }
            Self::Typed(TypedItem::FunctionCallOutput { call_id, output, .. }) => {
                let texts = output.texts(|i, part| part.text(&format!("{at}.output[{i}]")))?;
                history.result(&call_id, texts);
            }
            Self::Typed(TypedItem::Reasoning { content, summary, .. }) => {
                let parts = content.filter(|parts| !parts.is_empty()).or(summary);
                let texts: Vec<_> = parts.into_iter().flatten().map(|part| part.text).collect();
                history.thinks(&texts.join("\n"));
            }
            Self::Typed(TypedItem::ItemReference { .. }) => {
                let message = format!(
                    "{at}.type is \"item_reference\", but nothing is stored; send the item itself"
                );
                return Err(Invalid::new(&format!("{at}.type"), message));
            }
        }
        Ok(())
    }
}

impl ItemMessage {
    fn tell(self, at: &str, history: &mut History) -> Result<(), Invalid> {
        let texts = self.content.texts(|i, part| part.text(&format!("{at}.content[{i}]")))?;
        match self.role {
            ItemRole::System => history.system("system", texts),
            ItemRole::Developer => history.system("developer", texts),
            ItemRole::User => history.user(texts),
            ItemRole::Assistant => history.says(texts),
        }
        Ok(())
    }
}

impl ItemPart {
    /// Its text; it is at `at` in the body.
    fn text(self, at: &str) -> Result<String, Invalid> {
        let kind = match self {
            Self::InputText { text } | Self::OutputText { text, .. } | Self::Text { text } => {
                return Ok(text);
            }
            Self::Refusal { refusal } => return Ok(refusal),
            Self::InputImage { .. } => "input_image",
            Self::InputFile { .. } => "input_file",
        };
        let message = format!("{at}.type is \"{kind}\", but this server reads only text");
        Err(Invalid::new(&format!("{at}.type"), message))
    }
}
