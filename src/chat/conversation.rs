//! A conversation as all dialects bring it: what to answer, and how.

use serde_json::{Map, Value};

use super::tools::ToolChoice;

/// What to render.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// Objects with `role` and `content`, as OpenAI's clients send them.
    pub messages: Vec<Map<String, Value>>,
    /// Descriptions of tools, as OpenAI's clients send them.
    pub tools: Vec<Map<String, Value>>,
    /// Whether the answer is to call them.
    pub choice: ToolChoice,
    /// It may call several; `None`: if the template has that.
    pub parallel: Option<bool>,
    /// How it is to think.
    pub thoughts: Thoughts,
    /// Documents to answer from.
    pub documents: Option<Value>,
    /// More variables for the template.
    pub variables: Map<String, Value>,
    /// What the prompt ends with.
    pub ending: Ending,
}

/// How an answer is to think, as far as the template has it.
#[derive(Clone, Debug, Default)]
pub struct Thoughts {
    /// Whether; `None`: if the template can.
    pub enabled: Option<bool>,
    /// How much, in the template's words.
    pub effort: Option<String>,
    /// Most tokens, after which they are ended.
    pub budget: Option<usize>,
    /// They are part of the text, as the model writes them.
    pub inline: bool,
}

/// What a prompt ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// The beginning of an assistant's message, and after it the text of the last message if that
    /// is an assistant's, which the answer continues.
    #[default]
    Prefill,
    /// The beginning of an assistant's message.
    Answer,
    /// The end of the last message.
    Closed,
    /// The text of the last message, which the answer continues.
    Continue,
}
