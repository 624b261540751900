//! A body of OpenAI's, to checked requests.

use serde_json::{Value, json};

use super::Endpoint;
use crate::chat::Template;
use crate::error::Invalid;
use crate::http::fields::{Fields, MAX_LOGPROBS, wrong};
use crate::request::{Request, SamplingParams};

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

/// Reads a body. `n_ctx` bounds `max_tokens`; `random_seed` is used where none is given; `template`
/// renders messages.
///
/// # Errors
/// [`Invalid`] names the first field that is unknown, of the wrong type, out of range or not
/// supported.
pub fn read(
    endpoint: Endpoint,
    body: Value,
    n_ctx: usize,
    random_seed: u64,
    template: &Result<Template, String>,
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
    let defaults = SamplingParams {
        temperature: 1.0,
        top_p: 1.0,
        repeat_last_n: n_ctx,
        seed,
        ..SamplingParams::default()
    };
    let sampling = fields.sampling(defaults, 2.0, 2.0, n_ctx)?;
    let most = n_ctx as u64;
    let max_tokens = fields.count("max_tokens", 1, most)?;
    let max_tokens = match endpoint {
        Endpoint::Text => max_tokens.unwrap_or(16.min(most)),
        Endpoint::Chat => {
            fields.count("max_completion_tokens", 1, most)?.or(max_tokens).unwrap_or(most)
        }
    } as usize;
    let n = fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1) as usize;
    if n * prompts.len() > MAX_CHOICES as usize {
        let message =
            format!("{} prompts with n {n} ask for more than {MAX_CHOICES} answers", prompts.len());
        return Err(Invalid::new("n", message));
    }
    let n_top = n_top(&mut fields, endpoint)?;
    let of_all = fields.request(String::new(), max_tokens, sampling, n_top)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut fields, stream)?;
    refuse_what_is_not_built(&mut fields)?;
    IGNORED.iter().for_each(|name| drop(fields.take(name)));
    fields.refuse_the_rest()?;

    let request = |prompt: &String, i: usize| {
        let sampling =
            SamplingParams { seed: seed.wrapping_add(i as u64), ..of_all.sampling.clone() };
        Request { prompt: prompt.clone(), sampling, ..of_all.clone() }
    };
    let requests = prompts.iter().flat_map(|prompt| (0..n).map(move |i| request(prompt, i)));
    Ok(Asked { requests: requests.collect(), n, stream, include_usage })
}

/// How many of the likeliest tokens are told with each token's log probability; `None`: neither is
/// told.
fn n_top(fields: &mut Fields, endpoint: Endpoint) -> Result<Option<u64>, Invalid> {
    if endpoint == Endpoint::Text {
        return fields.count("logprobs", 0, MAX_LOGPROBS);
    }
    let top = fields.count("top_logprobs", 0, MAX_LOGPROBS)?;
    match (fields.boolean("logprobs")?.unwrap_or(false), top) {
        (true, top) => Ok(top.or(Some(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(Invalid::new("top_logprobs", "top_logprobs is for logprobs; set logprobs to true"))
        }
    }
}

/// A string, or a list of them.
fn prompts(fields: &mut Fields) -> Result<Vec<String>, Invalid> {
    let wanted = format!("a string, or a list of 1 to {MAX_CHOICES} strings");
    match fields.take("prompt") {
        None => Err(Invalid::new("prompt", format!("prompt is missing: it must be {wanted}"))),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(list)) if (1..=MAX_CHOICES as usize).contains(&list.len()) => list
            .iter()
            .map(|v| v.as_str().map(str::to_owned).ok_or_else(|| wrong("prompt", v, &wanted)))
            .collect(),
        Some(other) => Err(wrong("prompt", &other, &wanted)),
    }
}

fn chat_prompt(
    fields: &mut Fields,
    template: &Result<Template, String>,
) -> Result<String, Invalid> {
    let wanted = "a list of messages, each an object with role and content";
    let mut messages = match fields.take("messages") {
        None => {
            return Err(Invalid::new(
                "messages",
                format!("messages is missing: it must be {wanted}"),
            ));
        }
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
    let Some(map) = message.as_object_mut() else {
        return Err(wrong(&name, message, "an object with role and content"));
    };
    let role = map.get("role").unwrap_or(&Value::Null);
    if !role.is_string() {
        return Err(wrong(&format!("{name}.role"), role, "a string: system, user or assistant"));
    }
    let wanted = "a string, or a list of parts of type text";
    let content = map.get("content").unwrap_or(&Value::Null);
    let text: Option<String> = match content {
        Value::String(_) => return Ok(()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| part["text"].as_str().filter(|_| part["type"] == "text"))
            .collect(),
        _ => None,
    };
    let text = text.ok_or_else(|| wrong(&format!("{name}.content"), content, wanted))?;
    map.insert("content".into(), text.into());
    Ok(())
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, Invalid> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(Invalid::new(
            "stream_options",
            "stream_options is for streams; set stream to true",
        ));
    }
    let mut options = Fields::of(options)
        .map_err(|_| Invalid::new("stream_options", "stream_options must be an object"))?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.boolean("include_obfuscation")?;
    options.refuse_the_rest()?;
    Ok(include_usage)
}

/// Fields that would change the answer, and cannot yet: their neutral values are taken.
fn refuse_what_is_not_built(fields: &mut Fields) -> Result<(), Invalid> {
    let neutral = [
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("functions", json!([])),
        ("function_call", json!("none")),
        ("modalities", json!(["text"])),
        ("echo", json!(false)),
        ("best_of", json!(1)),
        ("suffix", json!("")),
    ];
    for (name, neutral) in neutral {
        if let Some(value) = fields.take(name).filter(|value| *value != neutral) {
            let text = value.to_string();
            let shown: String = text.chars().take(60).collect();
            return Err(Invalid::new(
                name,
                format!("{name} is not supported by this server (got {shown})"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(body: Value) -> Result<Asked, Invalid> {
        read(Endpoint::Text, body, 2048, 7, &Err("no template".into()))
    }

    #[test]
    fn openai_defaults_hold() {
        let asked =
            read_text(json!({ "model": "any", "prompt": "x", "user": "me", "logprobs": null }))
                .unwrap();
        let request = &asked.requests[0];
        assert_eq!((asked.requests.len(), request.max_tokens, request.sampling.seed), (1, 16, 7));
        assert_eq!((request.sampling.temperature, request.sampling.top_p), (1.0, 1.0));
        assert!(!asked.stream && !asked.include_usage);
    }

    #[test]
    fn choices_have_seeds_of_their_own_and_prompts_their_order() {
        let asked = read_text(json!({ "prompt": ["a", "b"], "n": 2, "seed": -1 })).unwrap();
        let of: Vec<(&str, u64)> =
            asked.requests.iter().map(|r| (r.prompt.as_str(), r.sampling.seed)).collect();
        assert_eq!(of, [("a", u64::MAX), ("a", 0), ("b", u64::MAX), ("b", 0)]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (name, value) in [
            ("suffix", json!("s")),
            ("best_of", json!(2)),
            ("echo", json!(true)),
            ("max_token", json!(1)),
        ] {
            let error = read_text(json!({ "prompt": "x", name: value })).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name), "{error}");
        }
        assert!(
            read_text(json!({ "prompt": "x", "stream_options": { "include_usage": true } }))
                .is_err(),
            "no stream"
        );
        let chat = |messages: Value| {
            read(Endpoint::Chat, json!({ "messages": messages }), 64, 0, &Err("none".into()))
        };
        for messages in [
            json!([]),
            json!([{ "role": "user" }]),
            json!([{ "content": "x" }]),
            json!("hi"),
            json!([1]),
        ] {
            assert!(
                chat(messages.clone()).unwrap_err().param.unwrap().starts_with("messages"),
                "{messages}"
            );
        }
        assert_eq!(chat(json!([{ "role": "user", "content": "x" }])).unwrap_err().message, "none");
    }
}
