//! The JSON of `/generate`: a body to a checked request, a completion to a body.

use bytes::BytesMut;
use serde_json::{Value, json};

use super::fields::Fields;
use super::reply::{Dialect, Problem, event};
use crate::error::Invalid;
use crate::request::{Completion, Event, FinishReason, Request, SamplingParams};

/// A body that was read.
#[derive(Debug)]
pub struct Generate {
    /// For the engine.
    pub request: Request,
    /// Send pieces as they come.
    pub stream: bool,
}

/// Reads the fields of `/generate`. `n_ctx` bounds `max_tokens`; `random_seed` is used where none is given.
///
/// # Errors
/// [`Invalid`] names the first field that is unknown, of the wrong type or out of range.
pub fn read(body: Value, n_ctx: usize, random_seed: u64) -> Result<Generate, Invalid> {
    let mut fields = Fields::of(body)?;
    let prompt = fields.string("prompt")?.ok_or_else(|| Invalid::new("prompt", "prompt is missing: it must be a string"))?;
    let defaults = SamplingParams::default();
    let sampling = fields.sampling(defaults, 100.0, 100.0, n_ctx)?;
    let sampling = SamplingParams { seed: fields.count("seed", 0, u64::MAX)?.unwrap_or(random_seed), ..sampling };
    let max_tokens = fields.count("max_tokens", 1, n_ctx as u64)?.map_or(128.min(n_ctx), |n| n as usize);
    let request = fields.request(prompt, max_tokens, sampling)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    fields.refuse_the_rest()?;
    Ok(Generate { request, stream })
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
    body["speculation"] = speculation(done);
    if let FinishReason::StopString(stop) = &done.finish_reason {
        body["stop_reason"] = stop.as_str().into();
    }
    body
}

/// What a draft did for a request.
#[must_use]
pub fn speculation(done: &Completion) -> Value {
    let drafts = done.speculation;
    json!({
        "steps": drafts.steps,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "tokens_per_step": (done.usage.completion_tokens as f64 / drafts.steps.max(1) as f64 * 1e3).round() / 1e3,
    })
}

/// Pieces as `/generate` streams them.
pub struct Pieces;

impl Dialect for Pieces {
    fn write(&mut self, _: usize, what: &Event, out: &mut BytesMut) {
        match what {
            Event::Piece(text) => event(&json!({ "generated_text": text }), out),
            Event::Done(done) => event(&completion(done, &done.tail), out),
            Event::Failed { id } => {
                out.extend_from_slice(b"event: error\n");
                event(&Problem::incident(id).body(), out);
            }
        }
    }
}

/// Seconds to the microsecond: the rest is noise on the wire.
fn micros(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::Token;
    use crate::request::Speculation;

    fn read(body: Value) -> Result<Generate, Invalid> {
        super::read(body, 2048, 99)
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
