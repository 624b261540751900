//! What Anthropic's messages are made of, and how they become a history for the chat template.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::history::{History, TextOr};
use crate::error::Invalid;

/// A text, or blocks of text.
pub type SystemText = TextOr<SystemBlock>;

/// The texts of the instructions that are for the model.
pub(super) fn instructions(system: SystemText) -> Vec<String> {
    let texts = match system {
        TextOr::Text(text) => vec![text],
        TextOr::Parts(blocks) => {
            blocks.into_iter().map(|SystemBlock::Text { text, .. }| text).collect()
        }
    };
    texts.into_iter().filter(|text| !is_bookkeeping(text)).collect()
}

/// Whether a text of the system's is a line that Claude Code sends to Anthropic's servers, not to the
/// model. It differs in each request, so that nothing after it would be found in the cache.
fn is_bookkeeping(text: &str) -> bool {
    text.starts_with("x-anthropic-billing-header:") && !text.trim_end().contains('\n')
}

/// A part of the instructions.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SystemBlock {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Ignored: whatever can be is cached.
        cache_control: Option<Value>,
        /// Ignored.
        citations: Option<Value>,
    },
}

/// One message.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InputMessage {
    /// Who says it.
    pub role: InputRole,
    /// A text, or blocks.
    pub content: TextOr<InputBlock>,
}

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum InputRole {
    User,
    Assistant,
    System,
}

/// A part of a message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputBlock {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Ignored: whatever can be is cached.
        cache_control: Option<Value>,
        /// Ignored.
        citations: Option<Value>,
    },
    /// An assistant's thoughts, which the chat template may show or leave out.
    Thinking {
        /// The thoughts.
        thinking: String,
        /// Ignored.
        signature: Option<Value>,
    },
    /// Thoughts that only Anthropic's servers can read: ignored.
    RedactedThinking {
        /// Ignored.
        data: Option<Value>,
    },
    /// A call of a tool, by the assistant.
    ToolUse {
        /// Its own.
        id: String,
        /// The tool's.
        name: String,
        /// The arguments.
        #[schema(value_type = Object)]
        input: Map<String, Value>,
        /// Ignored.
        cache_control: Option<Value>,
        /// Ignored.
        caller: Option<Value>,
    },
    /// What a call gave.
    ToolResult {
        /// The call's.
        tool_use_id: String,
        /// A text, or blocks of text; empty by default.
        content: Option<TextOr<ResultBlock>>,
        /// The call failed; the model is told so.
        is_error: Option<bool>,
        /// Ignored.
        cache_control: Option<Value>,
    },
    /// Not supported.
    Image {
        /// Not supported.
        source: Option<Value>,
        /// Ignored.
        cache_control: Option<Value>,
    },
    /// Not supported.
    Document {
        /// Not supported.
        source: Option<Value>,
        /// Ignored.
        cache_control: Option<Value>,
    },
}

/// A part of a result.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResultBlock {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Ignored: whatever can be is cached.
        cache_control: Option<Value>,
    },
    /// Not supported.
    Image {
        /// Not supported.
        source: Option<Value>,
        /// Ignored.
        cache_control: Option<Value>,
    },
    /// Not supported.
    Document {
        /// Not supported.
        source: Option<Value>,
        /// Ignored.
        cache_control: Option<Value>,
    },
}

fn unreadable(at: &str, kind: &str) -> Invalid {
    let message = format!("{at}.type is \"{kind}\", but this server reads only text");
    Invalid::new(&format!("{at}.type"), message)
}

impl InputMessage {
    /// Adds what it says, at `at` in the body.
    pub(super) fn tell(self, at: &str, history: &mut History) -> Result<(), Invalid> {
        let Self { role, content } = self;
        if role == InputRole::Assistant {
            history.begin_answer();
        }
        let mut texts = Vec::new();
        match content {
            TextOr::Text(text) => texts.push(text),
            TextOr::Parts(blocks) => {
                for (i, block) in blocks.into_iter().enumerate() {
                    block.tell(role, &format!("{at}.content[{i}]"), &mut texts, history)?;
                }
            }
        }
        say(role, texts, history);
        if role == InputRole::Assistant {
            history.end_answer();
        }
        Ok(())
    }
}

/// Adds the texts of a message, or of a part of it.
fn say(role: InputRole, texts: Vec<String>, history: &mut History) {
    match role {
        InputRole::Assistant => history.says(texts),
        _ if texts.is_empty() => {}
        InputRole::User => history.user(texts),
        InputRole::System => history.system("system", texts),
    }
}

impl InputBlock {
    /// Adds what it says to the texts that have been read, or to the history after those.
    fn tell(
        self,
        role: InputRole,
        at: &str,
        texts: &mut Vec<String>,
        history: &mut History,
    ) -> Result<(), Invalid> {
        let only = |wanted: InputRole, kind: &str, whose: &str| {
            if role == wanted {
                return Ok(());
            }
            let message = format!("{at}.type is \"{kind}\", which is for {whose} messages");
            Err(Invalid::new(&format!("{at}.type"), message))
        };
        match self {
            Self::Text { text, .. } => texts.push(text),
            Self::Thinking { thinking, .. } => {
                only(InputRole::Assistant, "thinking", "the assistant's")?;
                history.thinks(&thinking);
            }
            Self::RedactedThinking { .. } => {}
            Self::ToolUse { id, name, input, .. } => {
                only(InputRole::Assistant, "tool_use", "the assistant's")?;
                history.calls(&id, &name, &Value::Object(input).to_string());
            }
            Self::ToolResult { tool_use_id, content, is_error, .. } => {
                only(InputRole::User, "tool_result", "the user's")?;
                say(role, std::mem::take(texts), history);
                let content = content.unwrap_or_else(|| TextOr::Text(String::new()));
                let mut texts = content.texts(|i, block| block.text(at, i))?;
                if is_error == Some(true) {
                    let first = texts.first().map(String::as_str).unwrap_or_default();
                    let first = format!("Error: {first}");
                    texts.splice(0..texts.len().min(1), [first]);
                }
                history.result(&tool_use_id, texts);
            }
            Self::Image { .. } => return Err(unreadable(at, "image")),
            Self::Document { .. } => return Err(unreadable(at, "document")),
        }
        Ok(())
    }
}

impl ResultBlock {
    /// Its text, as part `i` of the result at `at`.
    fn text(self, at: &str, i: usize) -> Result<String, Invalid> {
        let at = format!("{at}.content[{i}]");
        match self {
            Self::Text { text, .. } => Ok(text),
            Self::Image { .. } => Err(unreadable(&at, "image")),
            Self::Document { .. } => Err(unreadable(&at, "document")),
        }
    }
}
