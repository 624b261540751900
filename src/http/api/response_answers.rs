//! The answer of `/v1/responses`, and the events of its streams.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::answers::ChatToken;
use super::responses::{Reasoning, TextConfig};
use crate::http::sections::{Kind, Section};
use crate::request::{Completion, FinishReason, Usage};

/// An answer to items.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResponseAnswer<'a> {
    /// Of this answer, which is stored nowhere.
    pub id: &'a str,
    /// `response`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created_at: u64,
    /// Whether it is whole.
    pub status: ResponseStatus,
    /// Why it failed, if it did.
    #[schema(required = true, inline)]
    pub error: Option<ResponseError>,
    /// Why it is incomplete, if it is.
    #[schema(required = true, inline)]
    pub incomplete_details: Option<IncompleteDetails>,
    /// The served model.
    pub model: &'a str,
    /// Thoughts, messages and calls of functions, in the order in which they were written.
    pub output: Vec<OutputItem<'a>>,
    /// Counts of tokens; null until it ends.
    #[schema(required = true, inline)]
    pub usage: Option<ResponseUsage>,
    /// As in the request.
    #[schema(required = true)]
    pub instructions: Option<&'a str>,
    /// As in the request.
    #[schema(required = true)]
    pub max_output_tokens: Option<u64>,
    /// As in the request.
    #[schema(value_type = Object)]
    pub metadata: &'a Map<String, Value>,
    /// As in the request; true by default.
    pub parallel_tool_calls: bool,
    /// As in the request.
    pub reasoning: &'a Reasoning,
    /// As in the request.
    pub temperature: f32,
    /// As in the request.
    pub text: &'a TextConfig,
    /// As in the request; `auto` by default.
    #[schema(value_type = Value)]
    pub tool_choice: &'a Value,
    /// The functions of the request.
    #[schema(value_type = Vec<Object>)]
    pub tools: &'a [Map<String, Value>],
    /// As in the request; 0 by default.
    pub top_logprobs: usize,
    /// As in the request.
    pub top_p: f32,
    /// False.
    pub background: bool,
    /// Null.
    #[schema(required = true)]
    pub previous_response_id: Option<&'a str>,
    /// False: nothing is stored.
    pub store: bool,
    /// `disabled`.
    pub truncation: &'static str,
}

/// How far an answer, or a part of it, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseStatus {
    InProgress,
    Completed,
    /// It ended before the model ended it.
    Incomplete,
    Failed,
}

impl ResponseStatus {
    /// How an answer ended.
    pub fn of(done: &Completion) -> Self {
        match &done.finish_reason {
            FinishReason::Length | FinishReason::Deadline | FinishReason::Grammar(_) => {
                Self::Incomplete
            }
            FinishReason::EndOfText | FinishReason::StopString(_) | FinishReason::StopToken(_) => {
                Self::Completed
            }
        }
    }
}

/// Why an answer failed.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResponseError {
    /// `server_error`.
    pub code: &'static str,
    /// For people.
    pub message: String,
}

/// Why an answer is incomplete.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`, also where its time was over, or its grammar could not be followed any
    /// further.
    pub reason: &'static str,
}

/// A part of an answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem<'a> {
    /// Thoughts.
    Reasoning {
        /// Of this item.
        id: String,
        /// Empty: thoughts are shown as they are.
        #[schema(value_type = Vec<Object>)]
        summary: [Value; 0],
        /// The thoughts.
        content: Vec<ReasoningText<'a>>,
        /// Whether it is whole.
        status: ResponseStatus,
    },
    /// A message.
    Message {
        /// Of this item.
        id: String,
        /// `assistant`.
        role: &'static str,
        /// The text.
        content: Vec<OutputText<'a>>,
        /// Whether it is whole.
        status: ResponseStatus,
    },
    /// A call of a function.
    FunctionCall {
        /// Of this item.
        id: String,
        /// What its result must name it by.
        call_id: &'a str,
        /// The function's.
        name: &'a str,
        /// JSON; if the answer was cut off within it the beginning.
        arguments: &'a str,
        /// Whether it is whole.
        status: ResponseStatus,
    },
}

impl<'a> OutputItem<'a> {
    /// A section that has ended, or else is whole so far.
    pub fn of(
        section: &'a Section,
        id: String,
        status: ResponseStatus,
        logprobs: &'a [ChatToken],
    ) -> Self {
        let text = section.text.as_str();
        match &section.kind {
            Kind::Thoughts => {
                let content = vec![ReasoningText::new(text)];
                Self::Reasoning { id, summary: [], content, status }
            }
            Kind::Text => {
                let content = vec![OutputText::new(text, logprobs)];
                Self::Message { id, role: "assistant", content, status }
            }
            Kind::Call { id: call_id, name } => {
                Self::FunctionCall { id, call_id, name, arguments: text, status }
            }
        }
    }

    /// A section that begins.
    pub fn begun(section: &'a Section, id: String) -> Self {
        let status = ResponseStatus::InProgress;
        match &section.kind {
            Kind::Thoughts => Self::Reasoning { id, summary: [], content: Vec::new(), status },
            Kind::Text => Self::Message { id, role: "assistant", content: Vec::new(), status },
            Kind::Call { id: call_id, name } => {
                Self::FunctionCall { id, call_id, name, arguments: "", status }
            }
        }
    }
}

/// The text of thoughts.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReasoningText<'a> {
    /// `reasoning_text`.
    pub r#type: &'static str,
    /// The text.
    pub text: &'a str,
}

impl<'a> ReasoningText<'a> {
    pub fn new(text: &'a str) -> Self {
        Self { r#type: "reasoning_text", text }
    }
}

/// The text of a message.
#[derive(Debug, Serialize, ToSchema)]
pub struct OutputText<'a> {
    /// `output_text`.
    pub r#type: &'static str,
    /// The text.
    pub text: &'a str,
    /// Empty.
    #[schema(value_type = Vec<Object>)]
    pub annotations: [Value; 0],
    /// Log probabilities of its tokens, if they were asked for. If the answer has thoughts or calls,
    /// too, only a stream has them.
    #[schema(value_type = Vec<ChatToken>)]
    pub logprobs: &'a [ChatToken],
}

impl<'a> OutputText<'a> {
    pub fn new(text: &'a str, logprobs: &'a [ChatToken]) -> Self {
        Self { r#type: "output_text", text, annotations: [], logprobs }
    }
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[allow(clippy::struct_field_names)]
pub struct ResponseUsage {
    /// Of the prompt.
    pub input_tokens: usize,
    /// Of the prompt's tokens.
    #[schema(inline)]
    pub input_tokens_details: InputTokensDetails,
    /// Generated.
    pub output_tokens: usize,
    /// Of those.
    #[schema(inline)]
    pub output_tokens_details: OutputTokensDetails,
    /// Both.
    pub total_tokens: usize,
}

/// Of the prompt's tokens.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct InputTokensDetails {
    /// Found in the cache.
    pub cached_tokens: usize,
    /// 0: whatever can be is cached.
    pub cache_write_tokens: usize,
}

/// Of the generated tokens.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct OutputTokensDetails {
    /// Of thoughts, as far as their text tells.
    pub reasoning_tokens: usize,
}

impl ResponseUsage {
    /// Of an answer with thoughts of so many tokens.
    pub fn new(usage: Usage, reasoning_tokens: usize) -> Self {
        let Usage { prompt_tokens, cached_tokens, completion_tokens, .. } = usage;
        let reasoning_tokens = reasoning_tokens.min(completion_tokens);
        Self {
            input_tokens: prompt_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens, cache_write_tokens: 0 },
            output_tokens: completion_tokens,
            output_tokens_details: OutputTokensDetails { reasoning_tokens },
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// What an event of a stream has beside its type and number.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum ResponseEvent<'a> {
    Whole {
        response: &'a ResponseAnswer<'a>,
    },
    Item {
        output_index: usize,
        item: OutputItem<'a>,
    },
    Part {
        item_id: String,
        output_index: usize,
        content_index: usize,
        part: ContentPart<'a>,
    },
    Content {
        item_id: String,
        output_index: usize,
        content_index: usize,
        #[serde(flatten)]
        more: ContentMore<'a>,
    },
    Arguments {
        item_id: String,
        output_index: usize,
        #[serde(flatten)]
        more: ArgumentsMore<'a>,
    },
}

/// A part of an item.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum ContentPart<'a> {
    Text(OutputText<'a>),
    Reasoning(ReasoningText<'a>),
}

impl<'a> ContentPart<'a> {
    /// Of a section with this text; `None` of a call.
    pub fn of(kind: &Kind, text: &'a str, logprobs: &'a [ChatToken]) -> Option<Self> {
        match kind {
            Kind::Thoughts => Some(Self::Reasoning(ReasoningText::new(text))),
            Kind::Text => Some(Self::Text(OutputText::new(text, logprobs))),
            Kind::Call { .. } => None,
        }
    }
}

/// More of a text, or all of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum ContentMore<'a> {
    Delta {
        delta: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<&'a [ChatToken]>,
    },
    Done {
        text: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<&'a [ChatToken]>,
    },
}

/// More of arguments, or all of them.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum ArgumentsMore<'a> {
    Delta { delta: &'a str },
    Done { name: &'a str, arguments: &'a str },
}
