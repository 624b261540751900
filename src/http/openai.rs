//! OpenAI's dialect: `/v1/completions` and `/v1/chat/completions`, to checked requests and back.
//!
//! Field names, defaults, object names and the order of chunks are those of OpenAI's API reference. Fields of its that change an
//! answer in a way that is not built here are refused by name; those that do not change it (`user`, `metadata`) are ignored. What
//! `/generate` has beyond them is an extension: `top_k`, `min_p`, `repetition_penalty`, `repeat_last_n`, `ignore_eos`,
//! `cache_prompt`, `speculation`, `share_text`.

use std::hash::{BuildHasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use super::generate::speculation;
use super::reply::{Dialect, Problem, event};
use super::template::ChatTemplate;
use crate::error::Invalid;
use crate::request::{Completion, Event, FinishReason, Request, SamplingParams, Usage};

/// Most answers to one request.
const MAX_CHOICES: u64 = 16;
/// Fields that change nothing here.
const IGNORED: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
];

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Text,
    /// `/v1/chat/completions`.
    Chat,
}

/// A body that was read.
#[derive(Debug)]
pub struct Asked {
    /// One for each choice, in order: all of the first prompt, then all of the next.
    pub requests: Vec<Request>,
    /// Choices of each prompt.
    pub n: usize,
    /// Send pieces as they come.
    pub stream: bool,
    /// Close a stream with the counts of tokens.
    pub include_usage: bool,
}

/// Reads a body. `n_ctx` bounds `max_tokens`; `random_seed` is used where none is given; `template` renders messages.
///
/// # Errors
/// [`Invalid`] names the first field that is unknown, of the wrong type, out of range or not supported.
pub fn read(
    endpoint: Endpoint,
    body: Value,
    n_ctx: usize,
    random_seed: u64,
    template: &Result<ChatTemplate, String>,
) -> Result<Asked, Invalid> {
    let mut fields = Fields::of(body)?;
    let model = fields.take("model");
    if let Some(other) = model.filter(|m| !m.is_string()) {
        return Err(wrong("model", &other, "a string"));
    }
    let prompts = match endpoint {
        Endpoint::Text => prompts(&mut fields)?,
        Endpoint::Chat => vec![chat_prompt(&mut fields, template)?],
    };
    let seed = match fields.take("seed") {
        None => random_seed,
        Some(seed) => {
            let whole = seed.as_u64().or_else(|| seed.as_i64().map(i64::cast_unsigned));
            whole.ok_or_else(|| wrong("seed", &seed, "a whole number of 64 bits"))?
        }
    };
    // OpenAI's penalties look at the whole text.
    let defaults = SamplingParams { temperature: 1.0, top_p: 1.0, repeat_last_n: n_ctx, seed, ..SamplingParams::default() };
    let sampling = fields.sampling(defaults, 2.0, 2.0, n_ctx)?;
    let most = n_ctx as u64;
    let max_tokens = fields.count("max_tokens", 1, most)?;
    let max_tokens = match endpoint {
        Endpoint::Text => max_tokens.unwrap_or(16.min(most)),
        Endpoint::Chat => fields.count("max_completion_tokens", 1, most)?.or(max_tokens).unwrap_or(most),
    } as usize;
    let n = fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1) as usize;
    if n * prompts.len() > MAX_CHOICES as usize {
        let message = format!("{} prompts with n {n} ask for more than {MAX_CHOICES} answers", prompts.len());
        return Err(Invalid::new("n", message));
    }
    let of_all = fields.request(String::new(), max_tokens, sampling)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut fields, stream)?;
    refuse_what_is_not_built(&mut fields)?;
    IGNORED.iter().for_each(|name| drop(fields.take(name)));
    fields.refuse_the_rest()?;

    let request = |prompt: &String, i: usize| {
        let sampling = SamplingParams { seed: seed.wrapping_add(i as u64), ..of_all.sampling.clone() };
        Request { prompt: prompt.clone(), sampling, ..of_all.clone() }
    };
    let requests = prompts.iter().flat_map(|prompt| (0..n).map(move |i| request(prompt, i)));
    Ok(Asked { requests: requests.collect(), n, stream, include_usage })
}

/// A string, or a list of them.
fn prompts(fields: &mut Fields) -> Result<Vec<String>, Invalid> {
    let wanted = format!("a string, or a list of 1 to {MAX_CHOICES} strings");
    match fields.take("prompt") {
        None => Err(Invalid::new("prompt", format!("prompt is missing: it must be {wanted}"))),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(list)) if (1..=MAX_CHOICES as usize).contains(&list.len()) => {
            list.iter().map(|v| v.as_str().map(str::to_owned).ok_or_else(|| wrong("prompt", v, &wanted))).collect()
        }
        Some(other) => Err(wrong("prompt", &other, &wanted)),
    }
}

fn chat_prompt(fields: &mut Fields, template: &Result<ChatTemplate, String>) -> Result<String, Invalid> {
    let wanted = "a list of messages, each an object with role and content";
    let mut messages = match fields.take("messages") {
        None => return Err(Invalid::new("messages", format!("messages is missing: it must be {wanted}"))),
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(other) => return Err(wrong("messages", &other, wanted)),
    };
    for (i, message) in messages.iter_mut().enumerate() {
        check_message(i, message)?;
    }
    let template = template.as_ref().map_err(|why| Invalid::new("messages", why.as_str()))?;
    template.render(&Value::Array(messages))
}

/// A role, and a content that is or becomes a string.
fn check_message(i: usize, message: &mut Value) -> Result<(), Invalid> {
    let name = format!("messages[{i}]");
    let Some(map) = message.as_object_mut() else { return Err(wrong(&name, message, "an object with role and content")) };
    let role = map.get("role").unwrap_or(&Value::Null);
    if !role.is_string() {
        return Err(wrong(&format!("{name}.role"), role, "a string: system, user or assistant"));
    }
    let wanted = "a string, or a list of parts of type text";
    let content = map.get("content").unwrap_or(&Value::Null);
    let text: Option<String> = match content {
        Value::String(_) => return Ok(()),
        Value::Array(parts) => parts.iter().map(|part| part["text"].as_str().filter(|_| part["type"] == "text")).collect(),
        _ => None,
    };
    let text = text.ok_or_else(|| wrong(&format!("{name}.content"), content, wanted))?;
    map.insert("content".into(), text.into());
    Ok(())
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, Invalid> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(Invalid::new("stream_options", "stream_options is for streams; set stream to true"));
    }
    let mut options = Fields::of(options).map_err(|_| Invalid::new("stream_options", "stream_options must be an object"))?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.boolean("include_obfuscation")?;
    options.refuse_the_rest()?;
    Ok(include_usage)
}

/// Fields that would change the answer, and cannot yet: their neutral values are taken.
fn refuse_what_is_not_built(fields: &mut Fields) -> Result<(), Invalid> {
    let neutral = [
        ("logprobs", json!(false)),
        ("top_logprobs", json!(0)),
        ("response_format", json!({ "type": "text" })),
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("functions", json!([])),
        ("function_call", json!("none")),
        ("modalities", json!(["text"])),
        ("echo", json!(false)),
        ("best_of", json!(1)),
        ("suffix", json!("")),
        ("grammar", json!("")),
    ];
    for (name, neutral) in neutral {
        if let Some(value) = fields.take(name).filter(|value| *value != neutral) {
            let text = value.to_string();
            let shown: String = text.chars().take(60).collect();
            return Err(Invalid::new(name, format!("{name} is not supported by this server (got {shown})")));
        }
    }
    Ok(())
}

/// What stays the same in all objects of one answer.
#[derive(Clone, Debug)]
pub struct Envelope {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    /// Choices of each prompt.
    n: usize,
}

impl Envelope {
    /// Of an answer that begins now, with `n` choices of each prompt.
    #[must_use]
    pub fn new(endpoint: Endpoint, model: String, n: usize) -> Self {
        let prefix = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:016x}", RandomState::new().hash_one(0));
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { endpoint, id, created, model, n }
    }

    fn object(&self, is_chunk: bool, choices: Vec<Value>) -> Value {
        let object = match (self.endpoint, is_chunk) {
            (Endpoint::Text, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        };
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    /// The whole answer: for each choice its text and how it ended.
    #[must_use]
    pub fn answer(&self, done: &[(String, Completion)]) -> Value {
        let choice = |(index, (text, done)): (usize, &(String, Completion))| {
            let mut choice =
                json!({ "index": index, "logprobs": null, "finish_reason": finish_reason(&done.finish_reason) });
            match self.endpoint {
                Endpoint::Text => choice["text"] = text.as_str().into(),
                Endpoint::Chat => choice["message"] = json!({ "role": "assistant", "content": text, "refusal": null }),
            }
            choice["speculation"] = speculation(done);
            choice
        };
        let mut body = self.object(false, done.iter().enumerate().map(choice).collect());
        body["usage"] = self.usage(done.iter().map(|(_, done)| done.usage).enumerate());
        body
    }

    /// A prompt counts once for all choices that have it.
    fn usage(&self, by_choice: impl Iterator<Item = (usize, Usage)>) -> Value {
        let (mut prompt, mut cached, mut completion) = (0, 0, 0);
        for (index, usage) in by_choice {
            if index % self.n == 0 {
                prompt += usage.prompt_tokens;
                cached += usage.cached_tokens;
            }
            completion += usage.completion_tokens;
        }
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": { "cached_tokens": cached },
        })
    }

    /// What writes the answer as a stream of `n_choices` in all.
    #[must_use]
    pub fn chunks(self, n_choices: usize, include_usage: bool) -> Chunks {
        Chunks { envelope: self, has_begun: vec![false; n_choices], include_usage, usages: Vec::new() }
    }
}

fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EndOfText | FinishReason::StopString(_) => "stop",
    }
}

/// Writes chunks: for each choice of a chat first the role, then pieces, then the reason of the end; behind all of them, if asked for,
/// the counts; and `[DONE]`.
#[derive(Debug)]
pub struct Chunks {
    envelope: Envelope,
    /// By choice: whether its role was sent.
    has_begun: Vec<bool>,
    include_usage: bool,
    /// Of the choices that ended, with their numbers.
    usages: Vec<(usize, Usage)>,
}

impl Chunks {
    fn chunk(&self, choice: Value, out: &mut BytesMut) {
        let mut chunk = self.envelope.object(true, vec![choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        event(&chunk, out);
    }

    fn piece(&self, index: usize, text: &str, out: &mut BytesMut) {
        let (name, piece) = match self.envelope.endpoint {
            Endpoint::Text => ("text", text.into()),
            Endpoint::Chat => ("delta", json!({ "content": text })),
        };
        self.chunk(json!({ "index": index, name: piece, "logprobs": null, "finish_reason": null }), out);
    }
}

impl Dialect for Chunks {
    fn write(&mut self, index: usize, what: &Event, out: &mut BytesMut) {
        let is_chat = self.envelope.endpoint == Endpoint::Chat;
        if is_chat && !std::mem::replace(&mut self.has_begun[index], true) && !matches!(what, Event::Failed { .. }) {
            let delta = json!({ "role": "assistant", "content": "", "refusal": null });
            self.chunk(json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null }), out);
        }
        match what {
            Event::Piece(text) => self.piece(index, text, out),
            Event::Done(done) => {
                if !done.tail.is_empty() {
                    self.piece(index, &done.tail, out);
                }
                let mut choice =
                    json!({ "index": index, "logprobs": null, "finish_reason": finish_reason(&done.finish_reason) });
                match self.envelope.endpoint {
                    Endpoint::Text => choice["text"] = "".into(),
                    Endpoint::Chat => choice["delta"] = json!({}),
                }
                choice["speculation"] = speculation(done);
                self.chunk(choice, out);
                self.usages.push((index, done.usage));
            }
            Event::Failed { id } => event(&Problem::incident(id).openai_body(), out),
        }
    }

    fn end(&mut self, out: &mut BytesMut) {
        if self.include_usage {
            let mut chunk = self.envelope.object(true, vec![]);
            chunk["usage"] = self.envelope.usage(self.usages.iter().copied());
            event(&chunk, out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// The list of models: the one that is served.
#[must_use]
pub fn models(model: &str, n_ctx: usize) -> Value {
    let model = json!({ "id": model, "object": "model", "created": 0, "owned_by": "medusa-llama", "max_model_len": n_ctx });
    json!({ "object": "list", "data": [model] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{SpeculationUsage, Timings};

    fn read_text(body: Value) -> Result<Asked, Invalid> {
        read(Endpoint::Text, body, 2048, 7, &Err("no template".into()))
    }

    #[test]
    fn openai_defaults_hold() {
        let asked = read_text(json!({ "model": "any", "prompt": "x", "user": "me", "logprobs": null })).unwrap();
        let request = &asked.requests[0];
        assert_eq!((asked.requests.len(), request.max_tokens, request.sampling.seed), (1, 16, 7));
        assert_eq!((request.sampling.temperature, request.sampling.top_p), (1.0, 1.0));
        assert!(!asked.stream && !asked.include_usage);
    }

    #[test]
    fn choices_have_seeds_of_their_own_and_prompts_their_order() {
        let asked = read_text(json!({ "prompt": ["a", "b"], "n": 2, "seed": -1 })).unwrap();
        let of: Vec<(&str, u64)> = asked.requests.iter().map(|r| (r.prompt.as_str(), r.sampling.seed)).collect();
        assert_eq!(of, [("a", u64::MAX), ("a", 0), ("b", u64::MAX), ("b", 0)]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (name, value) in [("logprobs", json!(3)), ("best_of", json!(2)), ("echo", json!(true)), ("max_token", json!(1))]
        {
            let error = read_text(json!({ "prompt": "x", name: value })).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name), "{error}");
        }
        assert!(read_text(json!({ "prompt": "x", "stream_options": { "include_usage": true } })).is_err(), "no stream");
        let chat = |messages: Value| read(Endpoint::Chat, json!({ "messages": messages }), 64, 0, &Err("none".into()));
        for messages in [json!([]), json!([{ "role": "user" }]), json!([{ "content": "x" }]), json!("hi"), json!([1])] {
            assert!(chat(messages.clone()).unwrap_err().param.unwrap().starts_with("messages"), "{messages}");
        }
        assert_eq!(chat(json!([{ "role": "user", "content": "x" }])).unwrap_err().message, "none");
    }

    fn done(tail: &str, prompt_tokens: usize, completion_tokens: usize) -> Completion {
        Completion {
            tail: tail.into(),
            finish_reason: FinishReason::EndOfText,
            usage: Usage { prompt_tokens, cached_tokens: 0, completion_tokens },
            timings: Timings::default(),
            speculation: SpeculationUsage::default(),
            trace: None,
        }
    }

    #[test]
    fn a_stream_has_role_pieces_reason_counts_and_done_in_this_order() {
        let mut chunks = Envelope::new(Endpoint::Chat, "m".into(), 2).chunks(2, true);
        let mut out = BytesMut::new();
        chunks.write(0, &Event::Piece("Hi".into()), &mut out);
        chunks.write(1, &Event::Done(done("you", 5, 2)), &mut out);
        chunks.write(0, &Event::Done(done("", 5, 3)), &mut out);
        chunks.end(&mut out);
        let text = String::from_utf8(out.to_vec()).unwrap();
        let mut events: Vec<&str> = text.split("\n\n").filter(|e| !e.is_empty()).map(|e| &e[6..]).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        let events: Vec<Value> = events.into_iter().map(|e| serde_json::from_str(e).unwrap()).collect();
        let seen: Vec<(Option<u64>, Value, Option<&str>)> = events
            .iter()
            .map(|e| {
                (
                    e["choices"][0]["index"].as_u64(),
                    e["choices"][0]["delta"]["content"].clone(),
                    e["choices"][0]["finish_reason"].as_str(),
                )
            })
            .collect();
        let null = Value::Null;
        assert_eq!(
            seen,
            [
                (Some(0), json!(""), None),
                (Some(0), json!("Hi"), None),
                (Some(1), json!(""), None),
                (Some(1), json!("you"), None),
                (Some(1), null.clone(), Some("stop")),
                (Some(0), null.clone(), Some("stop")),
                (None, null, None),
            ]
        );
        let usage = &events.last().unwrap()["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(5), &json!(5)), "the prompt counts once");
        assert!(events[0]["usage"].is_null() && events[0]["object"] == "chat.completion.chunk");
    }
}
