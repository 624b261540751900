//! Reading a body's fields: each once, with its type and range, and none left over.
//!
//! Every reader's error names the field, its value and what it must be.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::error::Invalid;
use crate::llama::Token;
use crate::request::{GrammarSource, Report, Request, SamplingParams, Speculation};

/// Most stop strings, and the longest one in bytes: each is looked for after every token.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Most tokens with a bias.
const MAX_BIASES: usize = 1024;
/// Integers that JSON numbers hold exactly.
const MAX_SAFE: u64 = (1 << 53) - 1;
/// Most tokens that are told with a token's log probability.
pub const MAX_LOGPROBS: u64 = 20;
/// Longest time that a request may give itself, in seconds: a day.
const MAX_TIMEOUT: f32 = 86_400.0;

/// The fields not yet read, and the names of those that were asked for. Null counts as absent.
pub struct Fields {
    left: Map<String, Value>,
    known: Vec<String>,
}

impl Fields {
    /// Those of a body.
    ///
    /// # Errors
    /// When it is no object.
    pub fn of(body: Value) -> Result<Self, Invalid> {
        match body {
            Value::Object(left) => Ok(Self { left, known: Vec::new() }),
            _ => Err(Invalid { param: None, message: "the body must be a JSON object".into() }),
        }
    }

    /// A field as it came; `None` if it is absent or null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.known.push(name.to_owned());
        self.left.remove(name).filter(|v| !v.is_null())
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, Invalid> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, &other, "a string")),
        }
    }

    /// True or false.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, Invalid> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(other) => Err(wrong(name, &other, "true or false")),
        }
    }

    /// Where drafts come from; `Auto` if it is absent.
    pub fn speculation(&mut self) -> Result<Speculation, Invalid> {
        let Some(value) = self.take("speculation") else { return Ok(Speculation::Auto) };
        let names = || Speculation::NAMES.map(|(name, _)| format!("\"{name}\"")).join(", ");
        let known = value.as_str().and_then(Speculation::by_name);
        known.ok_or_else(|| wrong("speculation", &value, &format!("one of {}", names())))
    }

    /// A number in a range.
    pub fn number(&mut self, name: &str, min: f32, max: f32) -> Result<Option<f32>, Invalid> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if (f64::from(min)..=f64::from(max)).contains(&n) => Ok(Some(n as f32)),
            _ => Err(wrong(name, &value, &format!("a number from {min} to {max}"))),
        }
    }

    /// A whole number in a range.
    pub fn count(&mut self, name: &str, min: u64, max: u64) -> Result<Option<u64>, Invalid> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // 128.0 is a whole number too.
        let whole =
            |f: f64| (f.fract() == 0.0 && (0.0..=MAX_SAFE as f64).contains(&f)).then_some(f as u64);
        match value.as_u64().or_else(|| value.as_f64().and_then(whole)) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(wrong(name, &value, &format!("a whole number from {min} to {max}"))),
        }
    }

    /// A string, or a list of them.
    pub fn stops(&mut self) -> Result<Vec<String>, Invalid> {
        let name = "stop";
        let wanted = format!(
            "a string of 1 to {MAX_STOP_BYTES} bytes, or a list of at most {MAX_STOPS} of them"
        );
        let list = match self.take(name) {
            None => return Ok(vec![]),
            Some(Value::Array(list)) if list.len() > MAX_STOPS => {
                return Err(Invalid::new(
                    name,
                    format!("stop has {} entries; it must be {wanted}", list.len()),
                ));
            }
            Some(Value::Array(list)) => list,
            Some(one) => vec![one],
        };
        let check = |value| match value {
            Value::String(s) if (1..=MAX_STOP_BYTES).contains(&s.len()) => Ok(s),
            other => Err(wrong(name, &other, &wanted)),
        };
        list.into_iter().map(check).collect()
    }

    /// `{"token id": bias}`.
    pub fn logit_bias(&mut self) -> Result<Vec<(Token, f32)>, Invalid> {
        let name = "logit_bias";
        let wanted = format!(
            "an object of at most {MAX_BIASES} token ids, each with a number from -100 to 100"
        );
        match self.take(name) {
            None => Ok(vec![]),
            Some(Value::Object(map)) if map.len() <= MAX_BIASES => map
                .iter()
                .map(|(id, bias)| {
                    let token = id.parse::<i32>().ok().filter(|id| *id >= 0).map(Token);
                    let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
                    token
                        .zip(bias.map(|b| b as f32))
                        .ok_or_else(|| wrong(name, &json!({ id: bias }), &wanted))
                })
                .collect(),
            Some(other) => Err(wrong(name, &other, &wanted)),
        }
    }

    /// How to choose tokens, but for the seed. `defaults` stand where a field is absent.
    pub fn sampling(
        &mut self,
        defaults: SamplingParams,
        max_temperature: f32,
        max_penalty: f32,
        n_ctx: usize,
    ) -> Result<SamplingParams, Invalid> {
        Ok(SamplingParams {
            temperature: self
                .number("temperature", 0.0, max_temperature)?
                .unwrap_or(defaults.temperature),
            top_p: self.number("top_p", 0.0, 1.0)?.unwrap_or(defaults.top_p),
            top_k: self.count("top_k", 0, i32::MAX as u64)?.map_or(defaults.top_k, |n| n as usize),
            min_p: self.number("min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
            repetition_penalty: self
                .number("repetition_penalty", 0.01, 100.0)?
                .unwrap_or(defaults.repetition_penalty),
            frequency_penalty: self
                .number("frequency_penalty", -max_penalty, max_penalty)?
                .unwrap_or(defaults.frequency_penalty),
            presence_penalty: self
                .number("presence_penalty", -max_penalty, max_penalty)?
                .unwrap_or(defaults.presence_penalty),
            repeat_last_n: self
                .count("repeat_last_n", 0, n_ctx as u64)?
                .map_or(defaults.repeat_last_n, |n| n as usize),
            logit_bias: self.logit_bias()?,
            seed: defaults.seed,
        })
    }

    /// `response_format` as OpenAI has it, or `grammar`.
    pub fn grammar(&mut self) -> Result<Option<GrammarSource>, Invalid> {
        let name = "response_format";
        let wanted = "{\"type\": \"text\"}, {\"type\": \"json_object\"} or \
                      {\"type\": \"json_schema\", \"json_schema\": {\"name\": ..., \"schema\": {...}}}";
        let by_format = match self.take(name) {
            None => None,
            Some(format) => {
                let named = &format["json_schema"];
                let is_named = named["schema"].is_object()
                    && (named["name"].is_null() || named["name"].is_string());
                match format["type"].as_str() {
                    Some("json_schema") if is_named => {
                        Some(GrammarSource::JsonSchema(named["schema"].clone()))
                    }
                    Some("json_object") if is_named || named.is_null() => {
                        Some(GrammarSource::JsonSchema(json!({ "type": "object" })))
                    }
                    Some("text") if is_named || named.is_null() => None,
                    _ => return Err(wrong(name, &format, wanted)),
                }
            }
        };
        let by_grammar =
            self.string("grammar")?.filter(|lark| !lark.is_empty()).map(GrammarSource::Lark);
        if by_format.is_some() && by_grammar.is_some() {
            return Err(Invalid::new(
                "grammar",
                "grammar and response_format both say what the answer must be: give one of them",
            ));
        }
        Ok(by_format.or(by_grammar))
    }

    /// A request, with what both dialects call the same. `n_top` is what they say of log
    /// probabilities.
    pub fn request(
        &mut self,
        prompt: String,
        max_tokens: usize,
        sampling: SamplingParams,
        n_top: Option<u64>,
    ) -> Result<Request, Invalid> {
        let n_top = n_top.map(|n| n as usize);
        let report = Report { details: self.boolean("details")?.unwrap_or(false), n_top };
        Ok(Request {
            sampling,
            stop: self.stops()?,
            ignore_eos: self.boolean("ignore_eos")?.unwrap_or(false),
            cache_prompt: self.boolean("cache_prompt")?.unwrap_or(true),
            speculation: self.speculation()?,
            share_text: self.boolean("share_text")?.unwrap_or(true),
            grammar: self.grammar()?,
            report: Some(report).filter(|r| r.details || r.n_top.is_some()),
            timeout: self.number("timeout_s", 0.0, MAX_TIMEOUT)?.map(Duration::from_secs_f32),
            ..Request::new(prompt, max_tokens)
        })
    }

    /// A field that nobody read is a typing error, or another server's dialect: say so instead of
    /// ignoring it.
    pub fn refuse_the_rest(self) -> Result<(), Invalid> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => {
                let shown: String = name.chars().take(64).collect();
                Err(Invalid::new(
                    &shown,
                    format!("unknown field `{shown}`; known are {}", self.known.join(", ")),
                ))
            }
        }
    }
}

/// Says what `name` is and what it must be.
pub fn wrong(name: &str, value: &Value, wanted: &str) -> Invalid {
    let text = value.to_string();
    let shown: String = text.chars().take(60).collect();
    let dots = if shown.len() < text.len() { "..." } else { "" };
    Invalid::new(name, format!("{name} is {shown}{dots}; it must be {wanted}"))
}
