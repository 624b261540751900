//! The JSON of `/generate`: a body to a checked request, a completion to a body.

use bytes::BytesMut;
use serde_json::{Value, json};

use super::fields::{Fields, MAX_LOGPROBS};
use super::problem::Problem;
use super::reply::{Dialect, event};
use super::tokens::{self, Spell};
use crate::error::Invalid;
use crate::request::{Completion, Event, FinishReason, Piece, Request, SamplingParams};

/// A body that was read.
#[derive(Debug)]
pub struct Generate {
    /// For the engine.
    pub request: Request,
    /// Send pieces as they come.
    pub stream: bool,
}

/// Reads the fields of `/generate`. `n_ctx` bounds `max_tokens`; `random_seed` is used where none
/// is given.
///
/// # Errors
/// [`Invalid`] names the first field that is unknown, of the wrong type or out of range.
pub fn read(body: Value, n_ctx: usize, random_seed: u64) -> Result<Generate, Invalid> {
    let mut fields = Fields::of(body)?;
    let prompt = fields
        .string("prompt")?
        .ok_or_else(|| Invalid::new("prompt", "prompt is missing: it must be a string"))?;
    let defaults = SamplingParams::default();
    let sampling = fields.sampling(defaults, 100.0, 100.0, n_ctx)?;
    let sampling = SamplingParams {
        seed: fields.count("seed", 0, u64::MAX)?.unwrap_or(random_seed),
        ..sampling
    };
    let max_tokens =
        fields.count("max_tokens", 1, n_ctx as u64)?.map_or(128.min(n_ctx), |n| n as usize);
    let n_top = fields.count("logprobs", 0, MAX_LOGPROBS)?;
    let request = fields.request(prompt, max_tokens, sampling, n_top)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    fields.refuse_the_rest()?;
    Ok(Generate { request, stream })
}

/// The answer, or the last event of a stream, with `piece`, which is all of it or the rest.
#[must_use]
pub fn completion(done: &Completion, piece: &Piece, spell: Option<&Spell>) -> Value {
    let mut body = json!({
        "generated_text": piece.text,
        "finish_reason": finish_reason(&done.finish_reason),
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
    if let Some(reason) = stop_reason(&done.finish_reason) {
        body["stop_reason"] = reason.into();
    }
    if let Some(spell) = spell {
        body["tokens"] = tokens::details(&piece.tokens, spell);
    }
    body
}

/// Why the answer ended, in the two words that clients know.
#[must_use]
pub fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Length | FinishReason::Deadline => "length",
        FinishReason::EndOfText | FinishReason::StopString(_) => "stop",
    }
}

/// What ended it, where those do not say: the stop string, or `deadline`.
#[must_use]
pub fn stop_reason(reason: &FinishReason) -> Option<&str> {
    match reason {
        FinishReason::StopString(stop) => Some(stop),
        FinishReason::Deadline => Some("deadline"),
        FinishReason::EndOfText | FinishReason::Length => None,
    }
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

/// Pieces as `/generate` streams them; with what is told of their tokens if there is a way to spell
/// them.
pub struct Pieces(pub Option<Spell>);

impl Dialect for Pieces {
    fn write(&mut self, _: usize, what: &Event, out: &mut BytesMut) {
        match what {
            Event::Piece(piece) => {
                let mut body = json!({ "generated_text": piece.text });
                if let Some(spell) = &self.0 {
                    body["tokens"] = tokens::details(&piece.tokens, spell);
                }
                event(&body, out);
            }
            Event::Done(done) => event(&completion(done, &done.tail, self.0.as_ref()), out),
            Event::Failed { id } => self.fail(&Problem::Incident(id.clone()), out),
        }
    }

    fn fail(&mut self, problem: &Problem, out: &mut BytesMut) {
        out.extend_from_slice(b"event: error\n");
        event(&problem.body(false), out);
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
        assert_eq!(
            (s.repetition_penalty, s.frequency_penalty, s.presence_penalty, s.repeat_last_n),
            (1.1, -1.0, 0.5, 7)
        );
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
