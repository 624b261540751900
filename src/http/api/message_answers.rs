//! The answers of Anthropic's dialect, and the events of its streams.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::http::sections::{Kind, Section};
use crate::request::{Completion, FinishReason, Usage};

/// What thoughts have in place of a signature: this server signs and checks none.
pub const SIGNATURE: &str = "unsigned";

/// An answer to messages.
#[derive(Debug, Serialize, ToSchema)]
pub struct MessageAnswer<'a> {
    /// Of this answer.
    pub id: &'a str,
    /// `message`.
    pub r#type: &'static str,
    /// `assistant`.
    pub role: &'static str,
    /// The served model.
    pub model: &'a str,
    /// Thoughts, texts and calls of tools, in the order in which they were written.
    pub content: Vec<AnswerBlock<'a>>,
    /// Why it ended; null at the beginning of a stream.
    #[schema(required = true)]
    pub stop_reason: Option<MessageStop>,
    /// The one of `stop_sequences` that ended it, if one did.
    #[schema(required = true)]
    pub stop_sequence: Option<&'a str>,
    /// Counts of tokens.
    #[schema(inline)]
    pub usage: MessageUsage,
}

/// A part of an answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AnswerBlock<'a> {
    /// Thoughts.
    Thinking {
        /// The thoughts.
        thinking: &'a str,
        /// Not empty, and of no meaning.
        signature: &'a str,
    },
    /// A text.
    Text {
        /// The text.
        text: &'a str,
    },
    /// A call of a tool.
    ToolUse {
        /// Its own, which its result must name.
        id: &'a str,
        /// The tool's.
        name: &'a str,
        /// The arguments; empty if the answer was cut off within them.
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
}

impl<'a> AnswerBlock<'a> {
    /// Of a whole section.
    pub fn whole(section: &'a Section) -> Self {
        let text = section.text.as_str();
        match &section.kind {
            Kind::Thoughts => Self::Thinking { thinking: text, signature: SIGNATURE },
            Kind::Text => Self::Text { text },
            Kind::Call { id, name } => {
                let input = serde_json::from_str(text).unwrap_or_default();
                Self::ToolUse { id, name, input }
            }
        }
    }

    /// Of a section that begins.
    pub fn begun(section: &'a Section) -> Self {
        match &section.kind {
            Kind::Thoughts => Self::Thinking { thinking: "", signature: "" },
            Kind::Text => Self::Text { text: "" },
            Kind::Call { id, name } => Self::ToolUse { id, name, input: Map::new() },
        }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MessageStop {
    EndTurn,
    MaxTokens,
    StopSequence,
    ToolUse,
}

impl MessageStop {
    /// Why an answer ended, and which of the request's `stops` did it.
    pub fn of<'a>(
        done: &'a Completion,
        stops: &[String],
        has_calls: bool,
    ) -> (Self, Option<&'a str>) {
        match &done.finish_reason {
            FinishReason::StopString(stop) if stops.contains(stop) => {
                (Self::StopSequence, Some(stop))
            }
            FinishReason::Length | FinishReason::Deadline | FinishReason::Grammar(_) => {
                (Self::MaxTokens, None)
            }
            _ if has_calls => (Self::ToolUse, None),
            _ => (Self::EndTurn, None),
        }
    }
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[allow(clippy::struct_field_names)]
pub struct MessageUsage {
    /// Of the prompt, without those found in the cache.
    pub input_tokens: usize,
    /// Of the prompt, found in the cache.
    pub cache_read_input_tokens: usize,
    /// 0: whatever can be is cached.
    pub cache_creation_input_tokens: usize,
    /// Generated.
    pub output_tokens: usize,
}

impl From<Usage> for MessageUsage {
    fn from(usage: Usage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens),
            cache_read_input_tokens: usage.cached_tokens,
            cache_creation_input_tokens: 0,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// How many tokens messages have.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenCount {
    /// Of the prompt that the chat template makes of them.
    pub input_tokens: usize,
}

/// What an event of a stream has beside its type.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum MessageEvent<'a> {
    MessageStart { message: MessageAnswer<'a> },
    Ping {},
    ContentBlockStart { index: usize, content_block: AnswerBlock<'a> },
    ContentBlockDelta { index: usize, delta: BlockDelta<'a> },
    ContentBlockStop { index: usize },
    MessageDelta { delta: EndDelta<'a>, usage: MessageUsage },
    MessageStop {},
}

impl MessageEvent<'_> {
    /// Its `type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::Ping {} => "ping",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop {} => "message_stop",
        }
    }
}

/// More of a block.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(clippy::enum_variant_names)] // Anthropic's
pub enum BlockDelta<'a> {
    ThinkingDelta { thinking: &'a str },
    SignatureDelta { signature: &'a str },
    TextDelta { text: &'a str },
    InputJsonDelta { partial_json: &'a str },
}

impl<'a> BlockDelta<'a> {
    /// More of a section.
    pub fn of(section: &Section, text: &'a str) -> Self {
        match section.kind {
            Kind::Thoughts => Self::ThinkingDelta { thinking: text },
            Kind::Text => Self::TextDelta { text },
            Kind::Call { .. } => Self::InputJsonDelta { partial_json: text },
        }
    }
}

/// What is known at the end.
#[derive(Debug, Serialize)]
pub struct EndDelta<'a> {
    pub stop_reason: MessageStop,
    pub stop_sequence: Option<&'a str>,
}
