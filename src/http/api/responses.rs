//! OpenAI's newer dialect: the body of `/v1/responses`.
//!
//! Field names and defaults are those of OpenAI's API reference; the fields that all dialects share
//! are extensions. Nothing is stored: what refers to an earlier response is refused by name. Tools
//! other than functions are left out, since clients such as Codex always send some.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};
use utoipa::{PartialSchema, ToSchema};

use super::fields::{
    BreakerList, LogitBias, NamedSchema, ResponseFormat, Stops, default_breakers, grammar,
    request_body,
};
use super::history::{History, TextOr, renamed};
use super::openai::{Choices, StreamOptions, seed};
use super::response_items::{Input, InputItem};
use super::shape::Unknown;
use crate::chat::{
    Conversation, Ending, Prepared, Template, Thoughts, ToolChoice, tools_from_json,
};
use crate::error::{Invalid, shortened};
use crate::request::{Prompt, Report, Request, SamplingParams, Speculation};

/// The value of `include` that asks for log probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";

request_body! {
    /// A text or items to answer, as OpenAI's clients ask. The model's own template makes a prompt of
    /// them.
    ResponsesRequest {
        /// The conversation so far: a user's text, or items.
        #[schema(value_type = TextOr<InputItem>, example = "Why is the sky blue?")]
        pub input: Input,
        /// Instructions, before all items.
        #[schema(example = "Be brief.")]
        pub instructions: Option<String>,
        /// Most tokens to generate; the context's end may come first.
        #[schema(minimum = 1, example = 64)]
        pub max_output_tokens: Option<u64>,
        /// Functions that the model may call. Tools of other types are left out.
        #[schema(value_type = Option<Vec<Object>>, max_items = 512, example = json!([{
            "type": "function", "name": "get_weather",
            "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] },
        }]))]
        pub tools: Option<Vec<Map<String, Value>>>,
        /// `none`, `auto`, `required`, or a function by name; without tools `none` or `auto`.
        #[schema(value_type = Option<Object>, example = "auto")]
        pub tool_choice: Option<Value>,
        /// The answer may call several functions; by default if the template has that.
        #[schema(example = true)]
        pub parallel_tool_calls: Option<bool>,
        /// What the answer must be.
        pub text: Option<TextConfig>,
        /// How to think.
        pub reasoning: Option<Reasoning>,
        /// 0 is greedy.
        #[schema(default = 1.0, minimum = 0.0, maximum = 2.0)]
        pub temperature: f32,
        /// Keep the most likely tokens up to this probability together; 1 keeps all.
        #[schema(default = 1.0, minimum = 0.0, maximum = 1.0)]
        pub top_p: f32,
        /// Subtracted from a token's logit for each time it occurs in the text.
        #[schema(default = 0.0, minimum = -2.0, maximum = 2.0)]
        pub frequency_penalty: f32,
        /// Subtracted once from the logit of a token that occurs in the text.
        #[schema(default = 0.0, minimum = -2.0, maximum = 2.0)]
        pub presence_penalty: f32,
        /// The same request and seed give the same text. Random by default, and for -1.
        #[schema(example = 7, value_type = Option<i64>, format = "int64-or-uint64")]
        pub seed: Option<Number>,
        /// Report the log probabilities of a text's tokens, and those of this many most likely ones.
        #[schema(example = 2, maximum = 20)]
        pub top_logprobs: Option<usize>,
        /// With `message.output_text.logprobs`, report log probabilities. Others have no effect.
        #[schema(example = json!(["message.output_text.logprobs"]))]
        pub include: Option<Vec<String>>,
        /// More variables for the chat template, by name.
        #[schema(value_type = Option<Object>, example = json!({ "enable_thinking": false }))]
        pub chat_template_kwargs: Option<Map<String, Value>>,
        /// Of streams only.
        pub stream_options: Option<StreamOptions>,
        /// Repeated in the answer.
        #[schema(value_type = Option<Object>, example = json!({ "purpose": "test" }))]
        pub metadata: Option<Map<String, Value>>,
        /// Not supported, as nothing is stored: an empty string is taken.
        #[schema(example = "", max_length = 0)]
        pub previous_response_id: Option<String>,
        /// Not supported, as nothing is stored.
        #[schema(value_type = Option<String>, example = "", max_length = 0)]
        pub conversation: Option<Value>,
        /// Not supported: send what the template holds.
        #[schema(value_type = Option<String>, example = "", max_length = 0)]
        pub prompt: Option<Value>,
        /// Not supported: false is taken.
        #[schema(default = false)]
        pub background: bool,
        /// Taken and ignored: nothing is stored.
        pub store: Option<bool>,
        /// Ignored: a prompt that is too long is refused.
        pub truncation: Option<Value>,
        /// Ignored: functions are called by the client.
        pub max_tool_calls: Option<Value>,
        /// Ignored.
        pub user: Option<Value>,
        /// Ignored.
        pub service_tier: Option<Value>,
        /// Ignored.
        pub safety_identifier: Option<Value>,
        /// Ignored.
        pub prompt_cache_key: Option<Value>,
        /// Ignored.
        pub prompt_cache_retention: Option<Value>,
        /// Ignored.
        pub client_metadata: Option<Value>,
    }
}

/// The fields of a request that its answer repeats.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // the request says it
pub struct Echo {
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u64>,
    pub metadata: Map<String, Value>,
    pub parallel_tool_calls: bool,
    pub reasoning: Reasoning,
    pub temperature: f32,
    pub text: TextConfig,
    pub tool_choice: Value,
    pub tools: Vec<Map<String, Value>>,
    pub top_logprobs: usize,
    pub top_p: f32,
}

impl ResponsesRequest {
    /// Takes the tools out that are no functions, and names their types as fields that nobody knows.
    ///
    /// # Errors
    /// [`Invalid`] if such fields are refused, or a tool has no type.
    pub fn drop_tools(
        &mut self,
        unknown: Unknown,
        ignored: &mut BTreeSet<String>,
    ) -> Result<(), Invalid> {
        let mut kept = Vec::new();
        for (i, tool) in self.tools.take().unwrap_or_default().into_iter().enumerate() {
            let at = format!("tools[{i}].type");
            match tool.get("type").and_then(Value::as_str) {
                Some("function") => kept.push(tool),
                Some(kind) if unknown == Unknown::Ignored => {
                    ignored.insert(format!("tools[].{}", shortened(kind, 40)));
                }
                kind => {
                    let shown = shortened(kind.unwrap_or("missing"), 40).into_owned();
                    let message = format!("{at} is {shown}; it must be \"function\"");
                    return Err(Invalid::new(&at, message));
                }
            }
        }
        self.tools = Some(kept);
        Ok(())
    }

    /// What the answer repeats.
    pub fn echo(&self) -> Echo {
        let choice = self.tool_choice.clone();
        let mut text = self.text.clone().unwrap_or_default();
        text.format.get_or_insert(TextFormat::Text {});
        Echo {
            instructions: self.instructions.clone(),
            max_output_tokens: self.max_output_tokens,
            metadata: self.metadata.clone().unwrap_or_default(),
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            reasoning: self.reasoning.clone().unwrap_or_default(),
            temperature: self.temperature,
            text,
            tool_choice: choice.unwrap_or_else(|| "auto".into()),
            tools: self.tools.clone().unwrap_or_default(),
            top_logprobs: self.top_logprobs.unwrap_or_default(),
            top_p: self.top_p,
        }
    }

    /// The request to the engine, unless a field is not supported, or `template`, which makes a prompt
    /// of the items, refuses them. `random_seed` is the default seed.
    pub fn into_choices(
        mut self,
        n_ctx: usize,
        random_seed: u64,
        template: &Result<Template, String>,
    ) -> Result<Choices, Invalid> {
        self.check()?;
        self.set_format()?;
        let Prepared { prompt, form } = self.prepare(template)?;
        let seed = match self.seed.take() {
            Some(given) if given.as_i64() != Some(-1) => seed(&given)?,
            _ => random_seed,
        };
        let most = self.max_output_tokens.and_then(|most| usize::try_from(most).ok());
        let max_tokens = most.map_or(n_ctx, |most| most.min(n_ctx));
        let asks = self.include.iter().flatten().any(|what| what == LOGPROBS);
        let n_top = self.top_logprobs.or(asks.then_some(0));
        let stream = self.stream;
        let mut request = self.request(prompt, max_tokens, n_ctx, seed, n_top)?;
        // A stream begins as soon as the prompt is read.
        request.progress = stream;
        let mut choices = Choices::of_one(request, stream);
        choices.form(form)?;
        Ok(choices)
    }

    /// Refuses what is not supported.
    fn check(&self) -> Result<(), Invalid> {
        let refused = |name: &str, why: &str| {
            Err(Invalid::new(name, format!("{name} is not supported: {why}")))
        };
        let is_given = |value: &Option<Value>| value.as_ref().is_some_and(|value| *value != "");
        if is_given(&self.conversation) {
            return refused("conversation", "nothing is stored; send all items as input");
        }
        if is_given(&self.prompt) {
            return refused("prompt", "nothing is stored; send instructions and input");
        }
        if self.background {
            return refused("background", "nothing is stored; wait for the answer");
        }
        Ok(())
    }

    /// Makes `text.format` the form that all dialects have.
    fn set_format(&mut self) -> Result<(), Invalid> {
        let format = self.text.as_ref().and_then(|text| text.format.clone());
        let format = match format {
            None | Some(TextFormat::Text {}) => return Ok(()),
            Some(TextFormat::JsonObject {}) => {
                ResponseFormat::JsonObject { json_schema: None, schema: None }
            }
            Some(TextFormat::JsonSchema { name, schema, .. }) => ResponseFormat::JsonSchema {
                json_schema: NamedSchema { name, description: None, strict: None, schema },
            },
        };
        if self.response_format.replace(format).is_some() {
            let message = "text.format and response_format are one: give one of them";
            return Err(Invalid::new("text.format", message));
        }
        Ok(())
    }

    /// The prompt and the form of its answer; takes the conversation's fields.
    fn prepare(&mut self, template: &Result<Template, String>) -> Result<Prepared, Invalid> {
        let tools: Vec<_> =
            self.tools.take().unwrap_or_default().into_iter().map(as_in_chats).collect();
        let known = tools_from_json(&tools).map_err(|e| renamed(e, &[(".function.", ".")]))?;
        let choice = ToolChoice::from_json(self.tool_choice.as_ref(), &known)?;
        let effort = self.reasoning.take().and_then(|reasoning| reasoning.effort);
        let thoughts = Thoughts {
            enabled: effort.as_ref().map(|effort| effort != "none"),
            effort: effort.filter(|effort| effort != "none"),
            ..Thoughts::default()
        };
        let mut history = History::default();
        if let Some(instructions) = self.instructions.take().filter(|text| !text.is_empty()) {
            history.system("system", vec![instructions]);
        }
        std::mem::take(&mut self.input).tell(&mut history)?;
        let conversation = Conversation {
            messages: history.end(),
            tools,
            choice,
            parallel: self.parallel_tool_calls,
            thoughts,
            variables: self.chat_template_kwargs.take().unwrap_or_default(),
            ending: Ending::Answer,
            ..Conversation::default()
        };
        let template = template.as_ref().map_err(|why| Invalid::new("input", why.as_str()))?;
        template.prepare(conversation)
    }
}

/// A function as chats describe it: its fields are an object of their own.
fn as_in_chats(mut tool: Map<String, Value>) -> Map<String, Value> {
    tool.remove("type");
    let kind = ("type".into(), "function".into());
    Map::from_iter([kind, ("function".into(), tool.into())])
}

/// What the answer must be.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct TextConfig {
    /// Any text, any JSON object, or JSON that follows a schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<TextFormat>,
    /// Ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verbosity: Option<String>,
}

/// Any text, any JSON object, or JSON that follows a schema.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TextFormat {
    /// Any text.
    Text {},
    /// Any JSON object.
    JsonObject {},
    /// JSON that follows a schema.
    JsonSchema {
        /// Any.
        name: Option<String>,
        /// The JSON schema, as far as llguidance can follow it. It is always followed strictly.
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
        /// Ignored.
        #[serde(skip_serializing_if = "Option::is_none")]
        description: Option<String>,
        /// Ignored.
        #[serde(skip_serializing_if = "Option::is_none")]
        strict: Option<bool>,
    },
}

/// How to think.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct Reasoning {
    /// How much, as the chat template has it: `low`, `medium`, `high`, ...; with `none` not at all.
    pub effort: Option<String>,
    /// Ignored: thoughts are shown as they are.
    pub summary: Option<String>,
}
