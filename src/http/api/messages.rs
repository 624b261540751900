//! Anthropic's dialect: the bodies of `/v1/messages` and `/v1/messages/count_tokens`.
//!
//! Field names and defaults are those of Anthropic's API reference; the fields that all dialects share
//! are extensions. What this server cannot do, such as images and tools that Anthropic's servers run,
//! is refused by name.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Number, Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

use super::fields::{
    BreakerList, LogitBias, NamedSchema, ResponseFormat, Stops, default_breakers, grammar,
    request_body,
};
use super::history::{History, renamed};
use super::message_blocks::{InputMessage, SystemText, instructions};
use super::openai::{Choices, seed};
use crate::chat::{Conversation, Prepared, Template, Thoughts, ToolChoice, tools_from_json};
use crate::error::{Invalid, shortened};
use crate::request::{Prompt, Report, Request, SamplingParams, Speculation};

request_body! {
    /// Messages to answer, as Anthropic's clients ask. The model's own template makes a prompt of
    /// them.
    MessagesRequest {
        /// The conversation so far. An assistant's message at its end is continued.
        #[schema(min_items = 1, example = json!([{ "role": "user", "content": "Why is the sky blue?" }]))]
        pub messages: Vec<InputMessage>,
        /// Most tokens to generate; the context's end may come first.
        #[schema(required = true, value_type = u64, minimum = 1, example = 64)]
        pub max_tokens: Option<u64>,
        /// Instructions.
        pub system: Option<SystemText>,
        /// Functions that the model may call.
        #[schema(max_items = 512)]
        pub tools: Option<Vec<InputTool>>,
        /// Whether it is to call them.
        pub tool_choice: Option<InputChoice>,
        /// Whether the answer is to think, where the chat template has that; without this it does not.
        pub thinking: Option<InputThinking>,
        /// How much to think, and what the answer must be.
        pub output_config: Option<OutputConfig>,
        /// The text ends before the first of these strings to appear.
        #[serde(default)]
        #[schema(schema_with = Stops::schema)]
        pub stop_sequences: Stops,
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
        /// More variables for the chat template, by name.
        #[schema(value_type = Option<Object>, example = json!({ "enable_thinking": false }))]
        pub chat_template_kwargs: Option<Map<String, Value>>,
        /// Not supported: an empty list is taken.
        #[schema(example = json!([]), max_items = 0)]
        pub mcp_servers: Option<Vec<Value>>,
        /// Ignored.
        pub cache_control: Option<Value>,
        /// Ignored.
        pub context_management: Option<Value>,
        /// Ignored.
        pub diagnostics: Option<Value>,
        /// Ignored.
        pub inference_geo: Option<Value>,
        /// Ignored.
        pub metadata: Option<Value>,
        /// Ignored.
        pub service_tier: Option<Value>,
        /// Ignored.
        pub speed: Option<Value>,
        /// Ignored.
        pub user_profile_id: Option<Value>,
        /// Ignored.
        pub workspace_id: Option<Value>,
    }
}

impl MessagesRequest {
    /// The request to the engine, unless a field is not supported, or `template`, which makes a prompt
    /// of the messages, refuses them. `random_seed` is the default seed.
    pub fn into_choices(
        mut self,
        n_ctx: usize,
        random_seed: u64,
        template: &Result<Template, String>,
    ) -> Result<Choices, Invalid> {
        let Prepared { prompt, form } = self.prepare(n_ctx, template)?;
        let seed = match self.seed.take() {
            Some(given) if given.as_i64() != Some(-1) => seed(&given)?,
            _ => random_seed,
        };
        let most = self.max_tokens.and_then(|most| usize::try_from(most).ok());
        let max_tokens = most.map_or(n_ctx, |most| most.min(n_ctx));
        if !self.stop.0.is_empty() && !self.stop_sequences.0.is_empty() {
            let message = "stop_sequences and stop are one: give one of them";
            return Err(Invalid::new("stop_sequences", message));
        }
        self.stop.0.append(&mut self.stop_sequences.0);
        let (stream, report) = (self.stream, None);
        let mut request = self.request(prompt, max_tokens, n_ctx, seed, report)?;
        // The first event of a stream has the counts of the prompt's tokens.
        request.progress = stream;
        let mut choices = Choices::of_one(request, stream);
        choices.form(form)?;
        Ok(choices)
    }

    /// The strings that end the text.
    pub fn stops(&self) -> Vec<String> {
        self.stop.0.iter().chain(&self.stop_sequences.0).cloned().collect()
    }

    /// The prompt and the form of its answer; takes the conversation's fields.
    fn prepare(
        &mut self,
        n_ctx: usize,
        template: &Result<Template, String>,
    ) -> Result<Prepared, Invalid> {
        let thoughts = self.thoughts(n_ctx)?;
        let tools = self.tools.take().unwrap_or_default();
        let tools = tools.into_iter().enumerate().map(|(i, tool)| tool.into_object(i));
        let tools: Vec<_> = tools.collect::<Result<_, _>>()?;
        let in_tools = [(".function.parameters", ".input_schema"), (".function.", ".")];
        let known = tools_from_json(&tools).map_err(|error| renamed(error, &in_tools))?;
        let choice = self.tool_choice.take();
        let parallel = choice.as_ref().and_then(InputChoice::parallel);
        let choice = choice.map_or(ToolChoice::Auto, InputChoice::into_choice);
        choice.check(&known)?;
        let conversation = Conversation {
            messages: self.history()?,
            tools,
            choice,
            parallel,
            thoughts,
            variables: self.chat_template_kwargs.take().unwrap_or_default(),
            ..Conversation::default()
        };
        let template = template.as_ref().map_err(|why| Invalid::new("messages", why.as_str()))?;
        template.prepare(conversation)
    }

    /// How to think; takes what the answer must be, too.
    fn thoughts(&mut self, n_ctx: usize) -> Result<Thoughts, Invalid> {
        let OutputConfig { effort, format } = self.output_config.take().unwrap_or_default();
        if let Some(OutputFormat::JsonSchema { schema }) = format {
            if self.response_format.is_some() {
                let message = "output_config.format and response_format are one: give one of them";
                return Err(Invalid::new("output_config.format", message));
            }
            let json_schema = NamedSchema { name: None, description: None, strict: None, schema };
            self.response_format = Some(ResponseFormat::JsonSchema { json_schema });
        }
        let budget = match &self.thinking {
            Some(InputThinking::Enabled { budget_tokens, .. }) => Some(*budget_tokens),
            _ => None,
        };
        let thinks = !matches!(self.thinking, None | Some(InputThinking::Disabled {}));
        Ok(Thoughts {
            enabled: Some(thinks),
            effort,
            budget: budget.and_then(|n| usize::try_from(n).ok()).filter(|n| *n < n_ctx),
            inline: false,
        })
    }

    fn history(&mut self) -> Result<Vec<Map<String, Value>>, Invalid> {
        let mut history = History::default();
        if let Some(system) = self.system.take() {
            let texts = instructions(system);
            if !texts.is_empty() {
                history.system("system", texts);
            }
        }
        for (i, message) in std::mem::take(&mut self.messages).into_iter().enumerate() {
            message.tell(&format!("messages[{i}]"), &mut history)?;
        }
        Ok(history.end())
    }
}

/// Messages whose tokens are to be counted: a [`MessagesRequest`] that needs no `max_tokens`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct CountRequest(MessagesRequest);

impl PartialSchema for CountRequest {
    fn schema() -> RefOr<Schema> {
        let mut schema = MessagesRequest::schema();
        if let RefOr::T(Schema::Object(body)) = &mut schema {
            body.required.retain(|name| name != "max_tokens");
            body.description = Some("Messages whose tokens are to be counted".into());
        }
        schema
    }
}

impl ToSchema for CountRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        MessagesRequest::schemas(schemas);
    }
}

impl CountRequest {
    /// The prompt that an answer would continue.
    ///
    /// # Errors
    /// As [`MessagesRequest::into_choices`].
    pub fn prompt(
        mut self,
        n_ctx: usize,
        template: &Result<Template, String>,
    ) -> Result<Prompt, Invalid> {
        self.0.prepare(n_ctx, template).map(|prepared| prepared.prompt)
    }
}

/// A function that the model may call.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InputTool {
    /// `custom`, which is the default; others, such as `web_search_20250305`, are not supported.
    pub r#type: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// What it does.
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object.
    #[schema(value_type = Option<Object>)]
    pub input_schema: Option<Map<String, Value>>,
    /// Ignored: arguments follow the schema as far as the model's form of calls allows.
    pub strict: Option<Value>,
    /// Ignored.
    pub cache_control: Option<Value>,
    /// Ignored.
    pub eager_input_streaming: Option<Value>,
    /// Ignored.
    pub defer_loading: Option<Value>,
    /// Ignored.
    pub allowed_callers: Option<Value>,
    /// Ignored.
    pub input_examples: Option<Value>,
}

impl InputTool {
    /// Tool `i`, as OpenAI's clients describe it.
    fn into_object(self, i: usize) -> Result<Map<String, Value>, Invalid> {
        if let Some(kind) = self.r#type.filter(|kind| kind != "custom") {
            let (at, kind) = (format!("tools[{i}].type"), shortened(&kind, 40).into_owned());
            let message = format!(
                "{at} is {kind:?}, a tool that this server does not have; \
                 describe a function with name and input_schema"
            );
            return Err(Invalid::new(&at, message));
        }
        let mut function = Map::from_iter([("name".into(), json!(self.name.unwrap_or_default()))]);
        if let Some(description) = self.description {
            function.insert("description".into(), description.into());
        }
        let Some(schema) = self.input_schema else {
            let at = format!("tools[{i}].input_schema");
            return Err(Invalid::new(&at, format!("{at} is missing")));
        };
        function.insert("parameters".into(), schema.into());
        let kind = ("type".into(), "function".into());
        Ok(Map::from_iter([kind, ("function".into(), function.into())]))
    }
}

/// Whether the model is to call tools.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputChoice {
    /// It may.
    Auto {
        /// At most one call.
        disable_parallel_tool_use: Option<bool>,
    },
    /// It must call one or more.
    Any {
        /// Exactly one call.
        disable_parallel_tool_use: Option<bool>,
    },
    /// It must call this one.
    Tool {
        /// The tool's.
        name: String,
        /// Exactly one call.
        disable_parallel_tool_use: Option<bool>,
    },
    /// It is told of none.
    None {},
}

impl InputChoice {
    /// Whether the answer may call several, where that is said.
    fn parallel(&self) -> Option<bool> {
        match self {
            Self::Auto { disable_parallel_tool_use: disabled }
            | Self::Any { disable_parallel_tool_use: disabled }
            | Self::Tool { disable_parallel_tool_use: disabled, .. } => disabled.map(|is| !is),
            Self::None {} => None,
        }
    }

    fn into_choice(self) -> ToolChoice {
        match self {
            Self::Auto { .. } => ToolChoice::Auto,
            Self::Any { .. } => ToolChoice::Required,
            Self::Tool { name, .. } => ToolChoice::Named(name),
            Self::None {} => ToolChoice::None,
        }
    }
}

/// Whether the answer is to think.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputThinking {
    /// It thinks.
    Enabled {
        /// Most tokens of thoughts, after which they are ended.
        budget_tokens: u64,
        /// Ignored: thoughts are shown as they are.
        display: Option<Value>,
    },
    /// It thinks, without a limit.
    Adaptive {
        /// Ignored: thoughts are shown as they are.
        display: Option<Value>,
    },
    /// It does not think, unless the chat template has no way to say so.
    Disabled {},
}

/// How much to think, and what the answer must be.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct OutputConfig {
    /// How much to think, as the chat template has it: `low`, `medium`, `high`, ...
    #[schema(example = "low")]
    pub effort: Option<String>,
    /// What the answer must be.
    pub format: Option<OutputFormat>,
}

/// What an answer must be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputFormat {
    /// JSON that follows a schema.
    JsonSchema {
        /// The JSON schema, as far as llguidance can follow it.
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    },
}
