//! The bodies of requests, as documented. They describe only: [`generate`](crate::http::generate)
//! and [`openai`](crate::http::openai) read, and a test in the folder's root holds the two against
//! each other.
//!
//! A new field is one line with its doc comment: in `request_body!` if all dialects have it, else
//! in its body. Its default, or an example where it has none (on its type, if that is one of
//! these), is tried by the test.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa::openapi::schema::{
    ArrayBuilder, Object, ObjectBuilder, OneOfBuilder, Schema, SchemaType, Type,
};

/// A body: its own fields, and those that all dialects share. Null is a field's default, and a
/// field that is not there is refused.
macro_rules! request_body {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($own)*
            /// Keep this many of the likeliest tokens; 0 keeps all.
            #[schema(default = 0, maximum = 2147483647)]
            pub top_k: Option<u64>,
            /// Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
            #[schema(default = 0.0, minimum = 0.0, maximum = 1.0)]
            pub min_p: Option<f64>,
            /// Divides the logits of tokens in the penalties' window; 1 is off.
            #[schema(default = 1.0, minimum = 0.01, maximum = 100.0)]
            pub repetition_penalty: Option<f64>,
            /// Added to the logits of single tokens.
            #[schema(schema_with = logit_bias)]
            pub logit_bias: Option<Value>,
            /// The text ends before the first of these to appear.
            #[schema(schema_with = stop)]
            pub stop: Option<Value>,
            /// Never choose a token that ends the text.
            #[schema(default = false)]
            pub ignore_eos: Option<bool>,
            /// Start from what the cache still holds of the prompt's beginning.
            #[schema(default = true)]
            pub cache_prompt: Option<bool>,
            /// Where drafts come from. They change the pace of a text and, but for `typical`, not
            /// the text.
            #[schema(default = "auto")]
            pub speculation: Option<Speculation>,
            /// false: draft no other answer from this one, and this one from no other.
            #[schema(default = true)]
            pub share_text: Option<bool>,
            /// What the answer must be.
            pub response_format: Option<ResponseFormat>,
            /// What the answer must be, in llguidance's dialect of Lark; not beside
            /// `response_format`.
            #[schema(example = "start: \"yes\" | \"no\"")]
            pub grammar: Option<String>,
            /// Tell of each token who drafted it, and which step decided it.
            #[schema(default = false)]
            pub details: Option<bool>,
            /// Seconds from acceptance, after which the answer ends where it stands; without a
            /// token until then: 408. The server may have a limit of its own.
            #[schema(example = 60.0, minimum = 0.0, maximum = 86400.0)]
            pub timeout_s: Option<f64>,
            /// Send pieces as server-sent events.
            #[schema(default = false)]
            pub stream: Option<bool>,
        }
    };
}

request_body! {
    /// A prompt to continue, and how.
    GenerateRequest {
        /// The text to continue. Control tokens may stand in it by name.
        #[schema(example = "The old lighthouse", min_length = 1)]
        pub prompt: String,
        /// Most tokens to generate, up to the context's size; the context's end may come first.
        #[schema(default = 128, minimum = 1)]
        pub max_tokens: Option<u64>,
        /// 0 is greedy.
        #[schema(default = 0.8, minimum = 0.0, maximum = 100.0)]
        pub temperature: Option<f64>,
        /// Keep the likeliest tokens up to this probability together; 1 keeps all.
        #[schema(default = 0.95, minimum = 0.0, maximum = 1.0)]
        pub top_p: Option<f64>,
        /// Subtracted from a token's logit for each time it stands in the window.
        #[schema(default = 0.0, minimum = -100.0, maximum = 100.0)]
        pub frequency_penalty: Option<f64>,
        /// Subtracted once from the logit of a token that stands in the window.
        #[schema(default = 0.0, minimum = -100.0, maximum = 100.0)]
        pub presence_penalty: Option<f64>,
        /// The penalties' window: so many last tokens, the prompt's included; up to the context's
        /// size.
        #[schema(default = 64)]
        pub repeat_last_n: Option<u64>,
        /// The same request and seed give the same text; random by default.
        #[schema(example = 7, format = "uint64")]
        pub seed: Option<u64>,
        /// Tell of each token its log probability, as the model gives it, and those of so many
        /// likeliest.
        #[schema(example = 3, maximum = 20)]
        pub logprobs: Option<u64>,
    }
}

/// The fields that OpenAI's two endpoints share, in front of those of all dialects.
macro_rules! openai_body {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        request_body! {
            $(#[$about])*
            $name {
                $($own)*
                /// Any name will do: the served model answers.
                #[schema(example = "any")]
                pub model: Option<String>,
                /// 0 is greedy.
                #[schema(default = 1.0, minimum = 0.0, maximum = 2.0)]
                pub temperature: Option<f64>,
                /// Keep the likeliest tokens up to this probability together; 1 keeps all.
                #[schema(default = 1.0, minimum = 0.0, maximum = 1.0)]
                pub top_p: Option<f64>,
                /// Answers to each prompt; with several prompts, at most 16 in all.
                #[schema(default = 1, minimum = 1, maximum = 16)]
                pub n: Option<u64>,
                /// Subtracted from a token's logit for each time it stands in the text.
                #[schema(default = 0.0, minimum = -2.0, maximum = 2.0)]
                pub frequency_penalty: Option<f64>,
                /// Subtracted once from the logit of a token that stands in the text.
                #[schema(default = 0.0, minimum = -2.0, maximum = 2.0)]
                pub presence_penalty: Option<f64>,
                /// The penalties' window: so many last tokens, the prompt's included; the context's
                /// size by default.
                #[schema(example = 64)]
                pub repeat_last_n: Option<u64>,
                /// The same request and seed give the same text; choice i has the seed plus i.
                /// Random by default.
                #[schema(example = 7, format = "int64-or-uint64")]
                pub seed: Option<i64>,
                /// Of streams only.
                pub stream_options: Option<StreamOptions>,
                /// Not built: an empty list is taken.
                #[schema(example = json!([]), max_items = 0)]
                pub tools: Option<Vec<Value>>,
                /// Not built: "none" is taken.
                pub tool_choice: Option<Nothing>,
                /// Not built: an empty list is taken.
                #[schema(example = json!([]), max_items = 0)]
                pub functions: Option<Vec<Value>>,
                /// Not built: "none" is taken.
                pub function_call: Option<Nothing>,
                /// Only text.
                #[schema(example = json!(["text"]), min_items = 1, max_items = 1)]
                pub modalities: Option<Vec<PartKind>>,
                /// Not built: false is taken.
                #[schema(example = false)]
                pub echo: Option<bool>,
                /// Not built: 1 is taken.
                #[schema(example = 1, minimum = 1, maximum = 1)]
                pub best_of: Option<u64>,
                /// Not built: an empty string is taken.
                #[schema(example = "", max_length = 0)]
                pub suffix: Option<String>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub user: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub metadata: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub store: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub service_tier: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub safety_identifier: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub prompt_cache_key: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub parallel_tool_calls: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub reasoning_effort: Option<Value>,
                /// Changes nothing.
                #[schema(schema_with = anything)]
                pub verbosity: Option<Value>,
            }
        }
    };
}

openai_body! {
    /// Prompts to continue, as OpenAI's clients ask.
    CompletionRequest {
        /// The texts to continue.
        #[schema(schema_with = prompts)]
        pub prompt: Value,
        /// Most tokens to generate, up to the context's size.
        #[schema(default = 16, minimum = 1)]
        pub max_tokens: Option<u64>,
        /// Tell of each token its log probability, as the model gives it, and those of so many
        /// likeliest.
        #[schema(example = 3, maximum = 20)]
        pub logprobs: Option<u64>,
    }
}

openai_body! {
    /// Messages to answer, as OpenAI's clients ask. The model's own template makes a prompt of
    /// them.
    ChatRequest {
        /// The conversation so far.
        #[schema(min_items = 1, example = json!([{ "role": "user", "content": "Why is the sky blue?" }]))]
        pub messages: Vec<Message>,
        /// Most tokens to generate, up to the context's size, which is the default.
        #[schema(example = 64, minimum = 1)]
        pub max_completion_tokens: Option<u64>,
        /// The same by its older name.
        #[schema(example = 64, minimum = 1)]
        pub max_tokens: Option<u64>,
        /// Tell of each token its log probability, as the model gives it.
        #[schema(default = false)]
        pub logprobs: Option<bool>,
        /// And those of so many likeliest; with `logprobs` only.
        #[schema(example = 0, maximum = 20)]
        pub top_logprobs: Option<u64>,
    }
}

/// A field that changes nothing is not looked at.
fn anything() -> Object {
    ObjectBuilder::new()
        .schema_type(SchemaType::AnyValue)
        .description(Some("Changes nothing"))
        .examples([json!({})])
        .build()
}

fn text(longest: Option<usize>) -> Object {
    ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(longest).build()
}

fn null() -> Object {
    ObjectBuilder::new().schema_type(Type::Null).build()
}

fn prompts() -> Schema {
    let list = ArrayBuilder::new().items(text(None)).min_items(Some(1)).max_items(Some(16));
    let examples = ["The old lighthouse"];
    OneOfBuilder::new()
        .item(text(None))
        .item(list)
        .description(Some("A text to continue, or a list of up to 16"))
        .examples(examples)
        .into()
}

fn stop() -> Schema {
    let list = ArrayBuilder::new().items(text(Some(1024))).max_items(Some(16));
    let about = "The text ends before this string, of 1 to 1024 bytes, or before the first of up to 16 to appear";
    let examples = [json!(["\n\n", "END"])];
    OneOfBuilder::new()
        .item(text(Some(1024)))
        .item(list)
        .item(null())
        .description(Some(about))
        .examples(examples)
        .into()
}

fn logit_bias() -> Schema {
    let bias =
        ObjectBuilder::new().schema_type(Type::Number).minimum(Some(-100.0)).maximum(Some(100.0));
    let id = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[0-9]{1,9}$"));
    let biases = ObjectBuilder::new()
        .property_names(Some(id))
        .additional_properties(Some(bias))
        .max_properties(Some(1024));
    let about = "Added to the logits of single tokens, by token id";
    OneOfBuilder::new()
        .item(biases)
        .item(null())
        .description(Some(about))
        .examples([json!({ "5": -100 })])
        .into()
}

/// Where drafts come from: `heads`, `text`, both (`auto`) or neither (`off`); `typical`: both, with
/// Medusa's lossy acceptance, where a drafted token need only be typical of what the model would
/// sample.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Speculation {
    Auto,
    Heads,
    Text,
    Off,
    Typical,
}

/// Of streams only.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "include_usage": true }))]
pub struct StreamOptions {
    /// Close the stream with a chunk that has the counts of tokens.
    #[schema(default = false)]
    pub include_usage: Option<bool>,
    /// Changes nothing.
    pub include_obfuscation: Option<bool>,
}

/// What is not built must not be asked for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(example = "none")]
#[allow(missing_docs)]
pub enum Nothing {
    None,
}

/// Any text, any JSON object, or JSON that follows a schema.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": { "enum": ["yes", "no"] } } }))]
pub struct ResponseFormat {
    /// Which of them.
    #[serde(rename = "type")]
    pub kind: FormatKind,
    /// For `json_schema`.
    pub json_schema: Option<NamedSchema>,
}

/// What an answer may be asked to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum FormatKind {
    Text,
    JsonObject,
    JsonSchema,
}

/// A schema with a name, as OpenAI has it. It is followed strictly, whatever is said beside it.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NamedSchema {
    /// Any.
    pub name: Option<String>,
    /// The JSON schema, as far as llguidance can follow it.
    pub schema: BTreeMap<String, Value>,
}

/// One message. The template sees its other fields, too.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Message {
    /// `system`, `user` or `assistant`; the template decides what there is.
    #[schema(example = "user")]
    pub role: String,
    /// Its text.
    pub content: Content,
}

/// A text, whole or in parts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// Whole.
    Text(String),
    /// In parts, which are joined.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Part {
    /// Only text.
    #[serde(rename = "type")]
    pub kind: PartKind,
    /// The text.
    pub text: String,
}

/// What parts there are.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum PartKind {
    Text,
}
