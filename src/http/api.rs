//! The JSON of `/generate`: a body to a checked request, a completion to a body.

use serde_json::{Map, Value, json};

use crate::error::Invalid;
use crate::llama::Token;
use crate::request::{Completion, FinishReason, Request, SamplingParams, Speculation};

/// A body that was read.
#[derive(Debug)]
pub struct Generate {
    /// For the engine.
    pub request: Request,
    /// Send pieces as they come.
    pub stream: bool,
}

/// Most stop strings, and the longest one in bytes: each is looked for after every token.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Most tokens with a bias.
const MAX_BIASES: usize = 1024;
/// Integers that JSON numbers hold exactly.
const MAX_SAFE: u64 = (1 << 53) - 1;

/// Reads the fields of `/generate`. `n_ctx` bounds `max_tokens`; `random_seed` is used where none is given.
///
/// # Errors
/// [`Invalid`] names the first field that is unknown, of the wrong type or out of range.
pub fn generate(body: Value, n_ctx: usize, random_seed: u64) -> Result<Generate, Invalid> {
    let Value::Object(map) = body else {
        return Err(Invalid { param: None, message: "the body must be a JSON object".into() });
    };
    let mut fields = Fields(map);
    let prompt = fields.string("prompt")?.ok_or_else(|| Invalid::new("prompt", "prompt is missing: it must be a string"))?;
    let defaults = SamplingParams::default();
    let sampling = SamplingParams {
        temperature: fields.number("temperature", 0.0, 100.0)?.unwrap_or(defaults.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(defaults.top_p),
        top_k: fields.count("top_k", 0, i32::MAX as u64)?.map_or(defaults.top_k, |n| n as usize),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
        repetition_penalty: fields.number("repetition_penalty", 0.01, 100.0)?.unwrap_or(defaults.repetition_penalty),
        frequency_penalty: fields.number("frequency_penalty", -100.0, 100.0)?.unwrap_or(defaults.frequency_penalty),
        presence_penalty: fields.number("presence_penalty", -100.0, 100.0)?.unwrap_or(defaults.presence_penalty),
        repeat_last_n: fields.count("repeat_last_n", 0, n_ctx as u64)?.map_or(defaults.repeat_last_n, |n| n as usize),
        logit_bias: fields.logit_bias()?,
        seed: fields.count("seed", 0, u64::MAX)?.unwrap_or(random_seed),
    };
    let max_tokens = fields.count("max_tokens", 1, n_ctx as u64)?.map_or(128.min(n_ctx), |n| n as usize);
    let stop = fields.stops()?;
    let ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
    let speculation = fields.speculation()?;
    let share_text = fields.boolean("share_text")?.unwrap_or(true);
    let cache_prompt = fields.boolean("cache_prompt")?.unwrap_or(true);
    let stream = fields.boolean("stream")?.unwrap_or(false);
    fields.refuse_the_rest()?;
    let request = Request { prompt, max_tokens, sampling, stop, ignore_eos, cache_prompt, speculation, share_text };
    Ok(Generate { request, stream })
}

/// The fields not yet read. Null counts as absent.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }

    fn string(&mut self, name: &str) -> Result<Option<String>, Invalid> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, &other, "a string")),
        }
    }

    fn boolean(&mut self, name: &str) -> Result<Option<bool>, Invalid> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(other) => Err(wrong(name, &other, "true or false")),
        }
    }

    fn speculation(&mut self) -> Result<Speculation, Invalid> {
        let Some(value) = self.take("speculation") else { return Ok(Speculation::Auto) };
        let names = || Speculation::NAMES.map(|(name, _)| format!("\"{name}\"")).join(", ");
        let known = value.as_str().and_then(Speculation::by_name);
        known.ok_or_else(|| wrong("speculation", &value, &format!("one of {}", names())))
    }

    fn number(&mut self, name: &str, min: f32, max: f32) -> Result<Option<f32>, Invalid> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if (f64::from(min)..=f64::from(max)).contains(&n) => Ok(Some(n as f32)),
            _ => Err(wrong(name, &value, &format!("a number from {min} to {max}"))),
        }
    }

    fn count(&mut self, name: &str, min: u64, max: u64) -> Result<Option<u64>, Invalid> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // 128.0 is a whole number too.
        let whole = |f: f64| (f.fract() == 0.0 && (0.0..=MAX_SAFE as f64).contains(&f)).then_some(f as u64);
        match value.as_u64().or_else(|| value.as_f64().and_then(whole)) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(wrong(name, &value, &format!("a whole number from {min} to {max}"))),
        }
    }

    /// A string, or a list of them.
    fn stops(&mut self) -> Result<Vec<String>, Invalid> {
        let name = "stop";
        let wanted = format!("a string of 1 to {MAX_STOP_BYTES} bytes, or a list of at most {MAX_STOPS} of them");
        let list = match self.take(name) {
            None => return Ok(vec![]),
            Some(Value::Array(list)) if list.len() > MAX_STOPS => {
                return Err(Invalid::new(name, format!("stop has {} entries; it must be {wanted}", list.len())));
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
    fn logit_bias(&mut self) -> Result<Vec<(Token, f32)>, Invalid> {
        let name = "logit_bias";
        let wanted = format!("an object of at most {MAX_BIASES} token ids, each with a number from -100 to 100");
        match self.take(name) {
            None => Ok(vec![]),
            Some(Value::Object(map)) if map.len() <= MAX_BIASES => map
                .iter()
                .map(|(id, bias)| {
                    let token = id.parse::<i32>().ok().filter(|id| *id >= 0).map(Token);
                    let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
                    token.zip(bias.map(|b| b as f32)).ok_or_else(|| wrong(name, &json!({ id: bias }), &wanted))
                })
                .collect(),
            Some(other) => Err(wrong(name, &other, &wanted)),
        }
    }

    /// A field that nobody read is a typing error, or another server's dialect: say so instead of ignoring it.
    fn refuse_the_rest(self) -> Result<(), Invalid> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => {
                let known = "prompt, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, \
                             presence_penalty, repeat_last_n, logit_bias, seed, stop, ignore_eos, cache_prompt, speculation, \
                             share_text, stream";
                let shown: String = name.chars().take(64).collect();
                Err(Invalid::new(&shown, format!("unknown field `{shown}`; known are {known}")))
            }
        }
    }
}

fn wrong(name: &str, value: &Value, wanted: &str) -> Invalid {
    let text = value.to_string();
    let shown: String = text.chars().take(60).collect();
    let dots = if shown.len() < text.len() { "..." } else { "" };
    Invalid::new(name, format!("{name} is {shown}{dots}; it must be {wanted}"))
}

/// The answer, or the last event of a stream, with `text`.
#[must_use]
pub fn completion(done: &Completion, text: &str) -> Value {
    let mut body = json!({
        "generated_text": text,
        "finish_reason": match done.finish_reason { FinishReason::Length => "length", _ => "stop" },
        "usage": {
            "prompt_tokens": done.usage.prompt_tokens,
            "cached_tokens": done.usage.cached_tokens,
            "completion_tokens": done.usage.completion_tokens,
            "total_tokens": done.usage.prompt_tokens + done.usage.completion_tokens,
        },
        "timings": {
            "queue_s": micros(done.timings.queue_s),
            "prefill_s": micros(done.timings.prefill_s),
            "decode_s": micros(done.timings.decode_s),
        },
    });
    let drafts = done.speculation;
    body["speculation"] = json!({
        "steps": drafts.steps,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "tokens_per_step": (done.usage.completion_tokens as f64 / drafts.steps.max(1) as f64 * 1e3).round() / 1e3,
    });
    if let FinishReason::StopString(stop) = &done.finish_reason {
        body["stop_reason"] = stop.as_str().into();
    }
    body
}

/// Seconds to the microsecond: the rest is noise on the wire.
fn micros(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Generate, Invalid> {
        generate(body, 2048, 99)
    }

    #[test]
    fn absent_and_null_fields_have_their_defaults() {
        let g = read(json!({ "prompt": "x", "top_k": null, "stop": null })).unwrap();
        assert_eq!(g.request.sampling, SamplingParams { seed: 99, ..SamplingParams::default() });
        assert_eq!((g.request.max_tokens, g.stream, g.request.stop.len()), (128, false, 0));
    }

    #[test]
    fn every_field_is_read() {
        let g = read(json!({
            "prompt": "x", "max_tokens": 5.0, "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
            "repetition_penalty": 1.1, "frequency_penalty": -1, "presence_penalty": 0.5, "repeat_last_n": 7,
            "logit_bias": { "5": -100 }, "seed": u64::MAX, "stop": ["a", "b"], "ignore_eos": true, "cache_prompt": false, "speculation": "off",
            "share_text": false, "stream": true,
        }));
        let g = g.unwrap();
        let s = &g.request.sampling;
        assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.0, 0.5, 3, 0.1));
        assert_eq!((s.repetition_penalty, s.frequency_penalty, s.presence_penalty, s.repeat_last_n), (1.1, -1.0, 0.5, 7));
        assert_eq!((s.logit_bias.as_slice(), s.seed), (&[(Token(5), -100.0)][..], u64::MAX));
        assert_eq!((g.request.max_tokens, g.request.stop.len()), (5, 2));
        assert_eq!((g.request.ignore_eos, g.request.cache_prompt, g.stream), (true, false, true));
        assert_eq!((g.request.speculation, g.request.share_text), (Speculation::Off, false));
        assert_eq!(read(json!({ "prompt": "x", "stop": "one" })).unwrap().request.stop, ["one"]);
    }

    #[test]
    fn a_field_out_of_range_is_named_with_value_and_limit() {
        let e = read(json!({ "prompt": "x", "top_p": 1.5 })).unwrap_err();
        assert_eq!(
            (e.param.as_deref(), e.message.as_str()),
            (Some("top_p"), "top_p is 1.5; it must be a number from 0 to 1")
        );
        let bad = [
            json!({ "prompt": 1 }),
            json!({}),
            json!({ "prompt": "x", "max_tokens": 0 }),
            json!({ "prompt": "x", "max_tokens": 2049 }),
            json!({ "prompt": "x", "max_tokens": 1.5 }),
            json!({ "prompt": "x", "seed": -1 }),
            json!({ "prompt": "x", "stop": [""] }),
            json!({ "prompt": "x", "stop": ["a", 1] }),
            json!({ "prompt": "x", "stop": vec!["a"; 17] }),
            json!({ "prompt": "x", "logit_bias": { "-1": 1 } }),
            json!({ "prompt": "x", "logit_bias": { "1": 101 } }),
            json!({ "prompt": "x", "repetition_penalty": 0 }),
            json!({ "prompt": "x", "stream": "yes" }),
            json!({ "prompt": "x", "speculation": true }),
            json!({ "prompt": "x", "speculation": "some" }),
            json!({ "prompt": "x", "max_token": 5 }),
        ];
        for body in bad {
            assert!(read(body.clone()).unwrap_err().param.is_some(), "{body}");
        }
        assert!(read(json!([1])).unwrap_err().param.is_none());
    }
}
