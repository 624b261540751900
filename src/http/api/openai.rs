//! OpenAI's dialect: the bodies of `/v1/completions` and `/v1/chat/completions`.
//!
//! Field names and defaults are those of OpenAI's API reference. Unsupported fields that would
//! change an answer are refused by name, those that would not (`user`, `metadata`) are ignored,
//! and so are those that nobody knows.
//! The fields that all dialects share are extensions.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};
use utoipa::{PartialSchema, ToSchema};

use super::fields::{
    BreakerList, LogitBias, MAX_CHOICES, Prompts, ResponseFormat, Stops, default_breakers, grammar,
    request_body,
};
use crate::chat::{
    Conversation, Ending, Form, Prepared, Syntax, Template, Thoughts, ToolChoice, tools_from_json,
};
use crate::error::Invalid;
use crate::request::{Prompt, Report, Request, SamplingParams, Speculation};

/// What a body asks for.
#[derive(Debug)]
pub struct Choices {
    /// One request for each choice, in order: all of the first prompt, then all of the next.
    pub requests: Vec<Request>,
    /// Choices of each prompt.
    pub n: usize,
    /// Send pieces as they come.
    pub stream: bool,
    /// Close a stream with the counts of tokens.
    pub include_usage: bool,
    /// How to read a chat's answers; `None`: all of each is content.
    pub syntax: Option<Syntax>,
}

impl Choices {
    /// Of one request.
    pub(super) fn of_one(request: Request, stream: bool) -> Self {
        Self { requests: vec![request], n: 1, stream, include_usage: false, syntax: None }
    }

    /// Gives the answers their form.
    pub(super) fn form(&mut self, form: Form) -> Result<(), Invalid> {
        for request in &mut self.requests {
            form.guide(request)?;
        }
        self.syntax = form.syntax;
        Ok(())
    }
}

/// Declares a body with the fields that both of OpenAI's share.
macro_rules! openai_body {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        request_body! {
            $(#[$about])*
            $name {
                $($own)*
                /// 0 is greedy.
                #[schema(default = 1.0, minimum = 0.0, maximum = 2.0)]
                pub temperature: f32,
                /// Keep the most likely tokens up to this probability together; 1 keeps all.
                #[schema(default = 1.0, minimum = 0.0, maximum = 1.0)]
                pub top_p: f32,
                /// Answers to each prompt; with several prompts, at most 16 in all.
                #[schema(default = 1, minimum = 1, maximum = 16)]
                pub n: usize,
                /// Subtracted from a token's logit for each time it occurs in the text.
                #[schema(default = 0.0, minimum = -2.0, maximum = 2.0)]
                pub frequency_penalty: f32,
                /// Subtracted once from the logit of a token that occurs in the text.
                #[schema(default = 0.0, minimum = -2.0, maximum = 2.0)]
                pub presence_penalty: f32,
                /// The penalties' window: this many last tokens, the prompt's included; the
                /// context's size by default, and for -1.
                #[schema(example = 64, minimum = -1, format = "tokens")]
                pub repeat_last_n: Option<usize>,
                /// The same request and seed give the same text; choice i has the seed plus i.
                /// Random by default, and for -1.
                #[schema(example = 7, value_type = Option<i64>, format = "int64-or-uint64")]
                pub seed: Option<Number>,
                /// In a stream, tell how far the prompt is while it is read, in llama.cpp's chunks with
                /// `prompt_progress`.
                #[schema(default = false)]
                pub return_progress: bool,
                /// Of streams only.
                pub stream_options: Option<StreamOptions>,
                /// Not supported: an empty list is taken.
                #[schema(example = json!([]), max_items = 0)]
                pub functions: Option<Vec<Value>>,
                /// Not supported: "none" is taken.
                pub function_call: Option<Nothing>,
                /// Only text.
                #[schema(example = json!(["text"]), min_items = 1, max_items = 1)]
                pub modalities: Option<Vec<PartKind>>,
                /// Not supported: 1 is taken.
                #[schema(example = 1, minimum = 1, maximum = 1)]
                pub best_of: Option<u64>,
                /// Not supported: an empty string is taken.
                #[schema(example = "", max_length = 0)]
                pub suffix: Option<String>,
                /// Ignored.
                pub user: Option<Value>,
                /// Ignored.
                pub metadata: Option<Value>,
                /// Ignored.
                pub store: Option<Value>,
                /// Ignored.
                pub service_tier: Option<Value>,
                /// Ignored.
                pub safety_identifier: Option<Value>,
                /// Ignored.
                pub prompt_cache_key: Option<Value>,
                /// Ignored.
                pub verbosity: Option<Value>,
            }
        }

        impl $name {
            /// `n` requests for each prompt.
            fn choices(
                self,
                prompts: &[Prompt],
                max_tokens: usize,
                n_top: Option<usize>,
                n_ctx: usize,
                random_seed: u64,
            ) -> Result<Choices, Invalid> {
                if self.stream_options.is_some() && !self.stream {
                    let message = "stream_options is for streams; set stream to true";
                    return Err(Invalid::new("stream_options", message));
                }
                let (n, n_prompts, stream) = (self.n, prompts.len(), self.stream);
                if n * n_prompts > MAX_CHOICES {
                    let message =
                        format!("{n_prompts} prompts with n {n} ask for over {MAX_CHOICES} answers");
                    return Err(Invalid::new("n", message));
                }
                let include_usage =
                    self.stream_options.as_ref().is_some_and(|o| o.include_usage == Some(true));
                let seed = match &self.seed {
                    Some(given) if given.as_i64() != Some(-1) => seed(given)?,
                    _ => random_seed,
                };
                // OpenAI's penalties look at the whole text.
                let window = self.repeat_last_n.unwrap_or(n_ctx);
                let progress = self.return_progress && stream;
                let of_all = self.request("".into(), max_tokens, window, seed, n_top)?;
                let request = |prompt: &Prompt, i: usize| {
                    let mut request = Request { prompt: prompt.clone(), progress, ..of_all.clone() };
                    request.sampling.seed = seed.wrapping_add(i as u64);
                    request
                };
                let requests =
                    prompts.iter().flat_map(|prompt| (0..n).map(move |i| request(prompt, i)));
                let requests = requests.collect();
                Ok(Choices { requests, n, stream, include_usage, syntax: None })
            }
        }
    };
}

openai_body! {
    /// Prompts to continue, as OpenAI's clients ask.
    CompletionRequest {
        /// What to continue.
        #[schema(schema_with = Prompts::<MAX_CHOICES>::schema)]
        pub prompt: Prompts,
        /// Most tokens to generate, up to the context's size, which is also -1; with 0 the prompt is
        /// only read.
        #[schema(default = 16, minimum = -1, format = "tokens")]
        pub max_tokens: usize,
        /// Begin the text with the prompt; with `logprobs`, report its tokens too, and the one that
        /// ends the text.
        #[schema(default = false)]
        pub echo: bool,
        /// Report for each token its log probability, as the model gives it, and those of this many
        /// most likely tokens.
        #[schema(example = 3, maximum = 20)]
        pub logprobs: Option<usize>,
        /// Only of chats: an empty list is taken.
        #[schema(example = json!([]), max_items = 0)]
        pub tools: Option<Vec<Value>>,
        /// Only of chats: "none" is taken.
        pub tool_choice: Option<Nothing>,
        /// Ignored.
        pub parallel_tool_calls: Option<Value>,
        /// Ignored.
        pub reasoning_effort: Option<Value>,
    }
}

impl CompletionRequest {
    /// The requests to the engine, unless fields exclude each other or one is not supported.
    /// `random_seed` is the default seed.
    pub fn into_choices(mut self, n_ctx: usize, random_seed: u64) -> Result<Choices, Invalid> {
        let prompts = std::mem::take(&mut self.prompt.0);
        let (max_tokens, n_top, echo) = (self.max_tokens, self.logprobs, self.echo);
        let mut choices = self.choices(&prompts, max_tokens, n_top, n_ctx, random_seed)?;
        choices.requests.iter_mut().for_each(|request| request.echo = echo);
        Ok(choices)
    }
}

openai_body! {
    /// Messages to answer, as OpenAI's clients ask. The model's own template makes a prompt of
    /// them.
    ChatRequest {
        /// The conversation so far.
        #[schema(min_items = 1, example = json!([{ "role": "user", "content": "Why is the sky blue?" }]))]
        pub messages: Vec<Message>,
        /// Most tokens to generate, up to the context's size, which is the default, and also -1;
        /// not 0.
        #[schema(example = 64, minimum = -1, format = "tokens")]
        pub max_completion_tokens: Option<usize>,
        /// The same by its older name.
        #[schema(example = 64, minimum = -1, format = "tokens")]
        pub max_tokens: Option<usize>,
        /// Functions that the model may call.
        #[schema(value_type = Option<Vec<Object>>, max_items = 512, example = json!([{
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] },
            },
        }]))]
        pub tools: Option<Vec<Map<String, Value>>>,
        /// `none`, `auto`, `required`, or a function by name; without tools `none` or `auto`.
        #[schema(value_type = Option<Object>, example = "auto")]
        pub tool_choice: Option<Value>,
        /// The answer may call several functions; by default if the template has that.
        #[schema(example = true)]
        pub parallel_tool_calls: Option<bool>,
        /// How much to think, as the chat template has it: `low`, `medium`, `high`, ...; with `none`
        /// not at all.
        #[schema(example = "low", max_length = 32)]
        pub reasoning_effort: Option<String>,
        /// Most tokens of thoughts, after which they are ended; 0: the answer does not think, and -1:
        /// no limit.
        #[schema(example = 256, minimum = -1, format = "tokens")]
        pub thinking_budget_tokens: Option<usize>,
        /// `none`: thoughts are part of the text; `auto` and `deepseek`: they are in
        /// `reasoning_content`.
        #[schema(example = "auto")]
        pub reasoning_format: Option<ReasoningFormat>,
        /// More variables for the chat template, by name.
        #[schema(value_type = Option<Object>, example = json!({ "enable_thinking": false }))]
        pub chat_template_kwargs: Option<Map<String, Value>>,
        /// Documents for the chat template.
        #[schema(value_type = Option<Vec<Object>>, example = json!([{ "title": "Sky", "text": "It is blue." }]))]
        pub documents: Option<Vec<Map<String, Value>>>,
        /// End the prompt with the beginning of an assistant's message. If neither this nor
        /// `continue_final_message` is given, the answer begins a message, or continues the last
        /// one if that is the assistant's.
        #[schema(example = true)]
        pub add_generation_prompt: Option<bool>,
        /// End the prompt where the text of the last message ends, for the answer to continue it.
        #[schema(example = false)]
        pub continue_final_message: Option<bool>,
        /// Report for each token its log probability, as the model gives it.
        #[schema(default = false)]
        pub logprobs: bool,
        /// And those of this many most likely tokens; with `logprobs` only.
        #[schema(example = 0, maximum = 20)]
        pub top_logprobs: Option<usize>,
        /// Not supported: false is taken.
        #[schema(default = false)]
        pub echo: bool,
    }
}

impl ChatRequest {
    /// The requests to the engine, unless fields exclude each other, one is not supported, or
    /// `template`, which makes a prompt of the messages, refuses them.
    pub fn into_choices(
        mut self,
        n_ctx: usize,
        random_seed: u64,
        template: &Result<Template, String>,
    ) -> Result<Choices, Invalid> {
        let n_top = match (self.logprobs, self.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                let message = "top_logprobs is for logprobs; set logprobs to true";
                return Err(Invalid::new("top_logprobs", message));
            }
        };
        if self.echo {
            return Err(Invalid::new("echo", "echo is not supported in chats"));
        }
        let request = TemplateRequest {
            model: None,
            messages: std::mem::take(&mut self.messages),
            tools: self.tools.take(),
            documents: self.documents.take(),
            chat_template_kwargs: self.chat_template_kwargs.take(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
        };
        let mut conversation = request.conversation()?;
        let tools = tools_from_json(&conversation.tools)?;
        conversation.choice = ToolChoice::from_json(self.tool_choice.as_ref(), &tools)?;
        conversation.parallel = self.parallel_tool_calls;
        let effort = self.reasoning_effort.take();
        conversation.thoughts = Thoughts {
            enabled: effort.as_ref().map(|effort| effort != "none"),
            effort: effort.filter(|effort| effort != "none"),
            budget: self.thinking_budget_tokens.filter(|budget| *budget < n_ctx),
            inline: matches!(self.reasoning_format, Some(ReasoningFormat::None)),
        };
        let template = template.as_ref().map_err(|why| Invalid::new("messages", why.as_str()))?;
        let Prepared { prompt, form } = template.prepare(conversation)?;
        let max_tokens = self.max_completion_tokens.or(self.max_tokens).unwrap_or(n_ctx);
        if max_tokens == 0 {
            let message = "max_tokens is 0; it must be at least 1, or -1 for no limit";
            return Err(Invalid::new("max_tokens", message));
        }
        let mut choices = self.choices(&[prompt], max_tokens, n_top, n_ctx, random_seed)?;
        choices.form(form)?;
        Ok(choices)
    }
}

/// A conversation to render, with the fields of a [`ChatRequest`].
#[derive(Debug, Deserialize, ToSchema)]
pub struct TemplateRequest {
    /// The model whose template renders, where there are several.
    #[schema(example = "any")]
    pub model: Option<String>,
    /// The conversation so far.
    #[schema(min_items = 1, example = json!([{ "role": "user", "content": "Why is the sky blue?" }]))]
    pub messages: Vec<Message>,
    /// Descriptions of tools for the template.
    #[schema(value_type = Option<Vec<Object>>, example = json!([]))]
    pub tools: Option<Vec<Map<String, Value>>>,
    /// Documents for the template.
    #[schema(value_type = Option<Vec<Object>>, example = json!([{ "title": "Sky", "text": "It is blue." }]))]
    pub documents: Option<Vec<Map<String, Value>>>,
    /// More variables for the template, by name.
    #[schema(value_type = Option<Object>, example = json!({ "enable_thinking": false }))]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// As in a chat.
    #[schema(example = true)]
    pub add_generation_prompt: Option<bool>,
    /// As in a chat.
    #[schema(example = false)]
    pub continue_final_message: Option<bool>,
}

impl TemplateRequest {
    /// The prompt that `template` makes of the conversation, unless fields exclude each other or it
    /// refuses the messages.
    pub fn render(self, template: &Result<Template, String>) -> Result<Prompt, Invalid> {
        let conversation = self.conversation()?;
        let template = template.as_ref().map_err(|why| Invalid::new("messages", why.as_str()))?;
        template.prompt(conversation)
    }

    fn conversation(self) -> Result<Conversation, Invalid> {
        let ending = match (self.continue_final_message, self.add_generation_prompt) {
            (Some(true), Some(true)) => {
                let message = "continue_final_message and add_generation_prompt exclude each other";
                return Err(Invalid::new("continue_final_message", message));
            }
            (Some(true), _) => Ending::Continue,
            (_, Some(false)) => Ending::Closed,
            (None, None) => Ending::Prefill,
            (Some(false), None) | (_, Some(true)) => Ending::Answer,
        };
        let messages =
            self.messages.into_iter().enumerate().map(|(i, message)| message.into_object(i));
        Ok(Conversation {
            messages: messages.collect::<Result<_, _>>()?,
            tools: self.tools.unwrap_or_default(),
            documents: self.documents.map(|documents| json!(documents)),
            variables: self.chat_template_kwargs.unwrap_or_default(),
            ending,
            ..Conversation::default()
        })
    }
}

/// Where thoughts are, as llama-server names it.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum ReasoningFormat {
    None,
    Auto,
    Deepseek,
}

/// A seed of 64 bits, with or without a sign.
pub(super) fn seed(given: &Number) -> Result<u64, Invalid> {
    let seed = given.as_u64().or_else(|| given.as_i64().map(i64::cast_unsigned));
    seed.ok_or_else(|| {
        Invalid::new("seed", format!("seed is {given}; it must be a whole number of 64 bits"))
    })
}

/// Of streams only.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({ "include_usage": true }))]
pub struct StreamOptions {
    /// Close the stream with a chunk that has the counts of tokens.
    #[schema(default = false)]
    pub include_usage: Option<bool>,
    /// Ignored.
    pub include_obfuscation: Option<bool>,
}

/// What is not supported must not be asked for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(example = "none")]
#[allow(missing_docs)]
pub enum Nothing {
    None,
}

/// One message. The template sees its other fields, too.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant`, `tool`, `function`, or what else the template
    /// knows.
    #[schema(example = "user")]
    pub role: String,
    /// Its text. Only an assistant's message with `tool_calls` may have none.
    pub content: Option<TextOrParts>,
    /// Whatever else the template knows.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Message {
    /// The message `i` as the template sees it.
    fn into_object(self, i: usize) -> Result<Map<String, Value>, Invalid> {
        let calls = self.more.get("tool_calls").and_then(Value::as_array);
        let has_calls = self.role == "assistant" && calls.is_some_and(|calls| !calls.is_empty());
        if self.content.is_none() && !has_calls {
            let message =
                "content is missing: only an assistant's message with tool_calls has none";
            return Err(Invalid::new(&format!("messages[{i}].content"), message));
        }
        let mut object = Map::from_iter([
            ("role".into(), self.role.into()),
            ("content".into(), json!(self.content)),
        ]);
        object.extend(self.more);
        Ok(object)
    }
}

/// A text, whole or in parts, which are joined unless the template expects parts.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged, expecting = "it must be a string, or a list of parts of type text")]
pub enum TextOrParts {
    /// Whole.
    Text(String),
    /// In parts.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct Part {
    /// Only text.
    #[serde(rename = "type")]
    pub kind: PartKind,
    /// The text.
    pub text: String,
}

/// What parts there are.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum PartKind {
    Text,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::api::{Readers, Unknown};
    use crate::llama::Token;

    fn read_text(body: Value) -> Result<Choices, Invalid> {
        Readers::new(2048).completion.read(body)?.into_choices(2048, 7)
    }

    #[test]
    fn openai_defaults_hold() {
        let body = json!({ "model": "any", "prompt": "x", "user": "me", "logprobs": null });
        let choices = read_text(body).unwrap();
        let request = &choices.requests[0];
        assert_eq!((choices.requests.len(), request.max_tokens, request.sampling.seed), (1, 16, 7));
        assert_eq!((request.sampling.temperature, request.sampling.top_p), (1.0, 1.0));
        assert!(!choices.stream && !choices.include_usage);
    }

    #[test]
    fn choices_have_seeds_of_their_own_and_prompts_their_order() {
        let choices = read_text(json!({ "prompt": ["a", "b"], "n": 2, "seed": u64::MAX })).unwrap();
        let of: Vec<(Prompt, u64)> =
            choices.requests.into_iter().map(|r| (r.prompt, r.sampling.seed)).collect();
        let expected = [("a", u64::MAX), ("a", 0), ("b", u64::MAX), ("b", 0)];
        assert_eq!(of, expected.map(|(prompt, seed)| (prompt.into(), seed)));
    }

    /// The values of llama-server's clients, and integers as JavaScript's and Lua's write them.
    #[test]
    fn minus_one_is_what_it_is_elsewhere_and_whole_floats_are_integers() {
        let body = json!({
            "prompt": "x", "max_tokens": -1, "seed": -1, "top_k": -1, "repeat_last_n": -1.0,
        });
        let request = read_text(body).unwrap().requests.remove(0);
        let s = &request.sampling;
        assert_eq!((request.max_tokens, s.seed, s.top_k, s.repeat_last_n), (2048, 7, 0, 2048));
        let body = json!({
            "prompt": "x", "max_tokens": 8.0, "seed": 2.0, "top_k": 3.0, "n": 1.0, "min_tokens": 1.0,
            "stop_token_ids": [5.0], "logprobs": 2.0, "best_of": 1.0,
        });
        let request = read_text(body).unwrap().requests.remove(0);
        let s = &request.sampling;
        assert_eq!((request.max_tokens, s.seed, s.top_k), (8, 2, 3));
        assert_eq!(request.stop_token_ids, [crate::llama::Token(5)]);
        for (seed, expected) in [
            (json!(-2), (-2i64).cast_unsigned()),
            (json!(-2.0), (-2i64).cast_unsigned()),
            (json!(1e19), 10_000_000_000_000_000_000),
        ] {
            let choices = read_text(json!({ "prompt": "x", "seed": seed })).unwrap();
            assert_eq!(choices.requests[0].sampling.seed, expected);
        }
        for (name, bad) in [
            ("max_tokens", json!(-2)),
            ("repeat_last_n", json!(-2)),
            ("seed", json!(2e19)),
            ("top_k", json!(0.5)),
            ("stop_token_ids", json!([0.5])),
        ] {
            let error = read_text(json!({ "prompt": "x", name: bad })).unwrap_err();
            assert!(error.param.unwrap().starts_with(name));
        }
    }

    #[test]
    fn what_nobody_knows_is_ignored_and_named_or_refused() {
        let body = json!({
            "prompt": "x", "zzz": 1, "id_slot": 3, "stream": true, "n_predict": null,
            "stream_options": { "include_usage": true, "zzz": 1, "more": [1] },
            "response_format": { "type": "text", "zzz": {} },
        });
        let (read, ignored) = Readers::new(64).completion.read_noting(body.clone()).unwrap();
        let ignored: Vec<&str> = ignored.iter().map(String::as_str).collect();
        let nested = ["response_format.zzz", "stream_options.more", "stream_options.zzz", "zzz"];
        assert_eq!(ignored, nested);
        assert!(read.into_choices(64, 0).unwrap().include_usage);
        let message = json!({ "role": "user", "name": "me", "content": [{ "type": "text", "text": "x", "zzz": 1 }] });
        let chat = json!({ "messages": [message, message] });
        let (_, ignored) = Readers::new(64).chat.read_noting(chat).unwrap();
        assert_eq!(ignored.into_iter().collect::<Vec<_>>(), ["messages[].content[].zzz"]);
        let many: serde_json::Map<_, _> = (0..99).map(|i| (format!("z{i}"), json!(i))).collect();
        let body_of_many = json!({ "prompt": "x", "many": 1 }).as_object().unwrap().clone();
        let body_of_many = body_of_many.into_iter().chain(many).collect::<Value>();
        assert_eq!(Readers::new(64).completion.read_noting(body_of_many).unwrap().1.len(), 16);

        let strict = Readers::with_policy(64, Unknown::Refused).completion;
        let refused = |body: Value| strict.read(body).unwrap_err().param.unwrap();
        assert_eq!(refused(body), "zzz");
        let nested = json!({ "prompt": "x", "stream_options": { "zzz": 1 } });
        assert_eq!(refused(nested.clone()), "stream_options.zzz");
        assert!(Readers::new(64).generate.read(json!({ "prompt": "x", "user": 1 })).is_ok());
        let own = json!({ "prompt": "x", "response_format": { "type": "text", "zzz": 1 } });
        let error = Readers::new(64).generate.read(own).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("response_format.zzz"));
    }

    #[test]
    fn prompts_are_texts_or_tokens_one_or_several() {
        let prompts = |prompt: Value| {
            let choices = read_text(json!({ "prompt": prompt }))?;
            Ok::<_, Invalid>(choices.requests.into_iter().map(|r| r.prompt).collect::<Vec<_>>())
        };
        let tokens = |ids: &[i32]| Prompt::Tokens(ids.iter().map(|&id| Token(id)).collect());
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), ["a", "b"].map(Prompt::from));
        assert_eq!(prompts(json!([1, 2])).unwrap(), [tokens(&[1, 2])]);
        assert_eq!(prompts(json!([[1, 2], [3]])).unwrap(), [tokens(&[1, 2]), tokens(&[3])]);
        for bad in [json!([]), json!([[]]), json!([1, "a"]), json!(["a", [1]]), json!([1.5])] {
            assert_eq!(prompts(bad).unwrap_err().param.as_deref(), Some("prompt"));
        }
        let beyond = prompts(json!([1, 3_000_000_000_u64])).unwrap_err();
        assert!(beyond.message.contains("3000000000"), "{beyond}");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (name, value) in [
            ("suffix", json!("s")),
            ("best_of", json!(2)),
            ("tools", json!([{}])),
            ("tool_choice", json!("auto")),
            ("seed", json!(1.5)),
            ("mirostat", json!(2)),
            ("stream_options", json!({ "include_usage": true })),
        ] {
            let error = read_text(json!({ "prompt": "x", name: value })).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name), "{error}");
        }
        let chat = |messages: Value| {
            let body = Readers::new(64).chat.read(json!({ "messages": messages }))?;
            body.into_choices(64, 0, &Err("none".into()))
        };
        for messages in [
            json!([]),
            json!([{ "role": "user" }]),
            json!([{ "role": "user", "content": null }]),
            json!([{ "role": "assistant", "content": null, "tool_calls": [] }]),
            json!([{ "content": "x" }]),
            json!([{ "role": "user", "content": [{ "type": "image", "text": "x" }] }]),
            json!("hi"),
            json!([1]),
        ] {
            let param = chat(messages.clone()).unwrap_err().param.unwrap();
            assert!(param.starts_with("messages"), "{messages}");
        }
        assert_eq!(chat(json!([{ "role": "user", "content": "x" }])).unwrap_err().message, "none");
    }
}
