//! `/generate`, this server's own dialect.

use std::time::Duration;

use bytes::BytesMut;
use hyper::StatusCode;
use utoipa::PartialSchema;

use super::answers::{Detokenize, GenerateAnswer, GeneratePiece, details};
use super::fields::{
    BreakerList, LogitBias, OnePrompt, ResponseFormat, Stops, default_breakers, grammar,
    request_body,
};
use crate::chat::{self, Template};
use crate::engine::Failed;
use crate::error::Invalid;
use crate::http::problem::{ErrorShape, Problem};
use crate::http::reply::{self, Dialect, Reply, event};
use crate::request::{
    Completion, Event, Piece, Prompt, Report, Request, SamplingParams, Speculation,
};

request_body! {
    /// A prompt to answer or to continue, and how.
    GenerateRequest {
        /// What to continue.
        #[schema(schema_with = OnePrompt::schema)]
        pub prompt: OnePrompt,
        /// A system message before the prompt.
        #[schema(example = "Answer in one sentence.")]
        pub system: Option<String>,
        /// Continue the prompt as it is. Names of control tokens in it become those tokens.
        #[schema(default = false)]
        pub raw: bool,
        /// Most tokens to generate, up to the context's size; the context's end may come first.
        #[schema(default = 128, minimum = 1, format = "tokens")]
        pub max_tokens: usize,
        /// 0 is greedy.
        #[schema(default = 0.8, minimum = 0.0, maximum = 100.0)]
        pub temperature: f32,
        /// Keep the most likely tokens up to this probability together; 1 keeps all.
        #[schema(default = 0.95, minimum = 0.0, maximum = 1.0)]
        pub top_p: f32,
        /// Subtracted from a token's logit for each time it occurs in the window.
        #[schema(default = 0.0, minimum = -100.0, maximum = 100.0)]
        pub frequency_penalty: f32,
        /// Subtracted once from the logit of a token that occurs in the window.
        #[schema(default = 0.0, minimum = -100.0, maximum = 100.0)]
        pub presence_penalty: f32,
        /// The penalties' window: this many last tokens, the prompt's included; up to the context's
        /// size, which is also -1.
        #[schema(default = 64, minimum = -1, format = "tokens")]
        pub repeat_last_n: usize,
        /// The same request and seed give the same text; random by default.
        #[schema(example = 7, format = "uint64")]
        pub seed: Option<u64>,
        /// Report for each token its log probability, as the model gives it, and those of this many
        /// most likely tokens.
        #[schema(example = 3, maximum = 20)]
        pub logprobs: Option<usize>,
    }
}

impl GenerateRequest {
    /// The request to the engine, unless fields exclude each other or `template` refuses the prompt.
    /// `random_seed` is the default seed.
    pub fn into_request(
        mut self,
        random_seed: u64,
        template: &Result<Template, String>,
    ) -> Result<Request, Invalid> {
        let prompt = std::mem::take(&mut self.prompt.0);
        let prompt = chat::turn(template, prompt, self.system.as_deref(), self.raw)?;
        let (max_tokens, window) = (self.max_tokens, self.repeat_last_n);
        let (seed, n_top) = (self.seed.unwrap_or(random_seed), self.logprobs);
        self.request(prompt, max_tokens, window, seed, n_top)
    }
}

/// Writes an answer of `/generate`, whole or in pieces; with a `Detokenize`, tokens' details too.
pub struct Pieces(pub Option<Detokenize>);

impl Dialect for Pieces {
    fn whole(&self, done: &[(Piece, Completion)]) -> Reply {
        let (whole, done) = &done[0];
        reply::json(StatusCode::OK, &GenerateAnswer::new(done, whole, self.0.as_ref()))
    }

    fn write(&mut self, _: usize, what: &Event, out: &mut BytesMut) {
        let detokenize = self.0.as_ref();
        match what {
            Event::Progress(_) => {}
            Event::Piece(piece) => {
                let tokens = detokenize.map(|text| details(&piece.tokens, text));
                event(&GeneratePiece { generated_text: &piece.text, tokens }, out);
            }
            Event::Done(done) => event(&GenerateAnswer::new(done, &done.tail, detokenize), out),
            Event::Failed { id } => {
                out.extend_from_slice(b"event: error\n");
                let problem = Problem::from(Failed { id: id.clone() });
                event(&problem.body(ErrorShape::Own, ""), out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::api::Readers;
    use crate::llama::Token;
    use serde_json::{Value, json};

    fn read(body: Value) -> Result<(Request, bool), Invalid> {
        let body = Readers::new(2048).generate.read(body)?;
        let stream = body.stream;
        Ok((body.into_request(99, &Err("no template".into()))?, stream))
    }

    #[test]
    fn absent_and_null_fields_have_their_defaults() {
        let (request, stream) =
            read(json!({ "prompt": "x", "top_k": null, "stop": null })).unwrap();
        assert_eq!(request.sampling, SamplingParams { seed: 99, ..SamplingParams::default() });
        assert_eq!((request.max_tokens, stream, request.stop.len()), (128, false, 0));
    }

    #[test]
    fn every_field_is_read() {
        let (request, stream) = read(json!({
            "prompt": "x", "max_tokens": 5.0, "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
            "repetition_penalty": 1.1, "frequency_penalty": -1, "presence_penalty": 0.5, "repeat_last_n": 7,
            "logit_bias": { "5": -100 }, "seed": u64::MAX, "stop": ["a", "b"], "ignore_eos": true, "cache_prompt": false, "speculation": "off",
            "share_text": false, "stream": true,
        }))
        .unwrap();
        let s = &request.sampling;
        assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.0, 0.5, 3, 0.1));
        assert_eq!(
            (s.repetition_penalty, s.frequency_penalty, s.presence_penalty, s.repeat_last_n),
            (1.1, -1.0, 0.5, 7)
        );
        assert_eq!((s.logit_bias.as_slice(), s.seed), (&[(Token(5), -100.0)][..], u64::MAX));
        assert_eq!((request.max_tokens, request.stop.len()), (5, 2));
        assert_eq!((request.ignore_eos, request.cache_prompt, stream), (true, false, true));
        assert_eq!((request.speculation, request.share_text), (Speculation::OFF, false));
        assert_eq!(read(json!({ "prompt": "x", "stop": "one" })).unwrap().0.stop, ["one"]);
    }

    #[test]
    fn a_field_out_of_range_is_named_with_value_and_limit() {
        let e = read(json!({ "prompt": "x", "top_p": 1.5 })).unwrap_err();
        assert_eq!(
            (e.param.as_deref(), e.message.as_str()),
            (Some("top_p"), "top_p is 1.5; it must be a number from 0 to 1")
        );
        let bad = [
            ("prompt", json!({ "prompt": 1 })),
            ("prompt", json!({ "prompt": "" })),
            ("prompt", json!({ "prompt": [] })),
            ("prompt", json!({ "prompt": ["x"] })),
            ("prompt", json!({})),
            ("max_tokens", json!({ "prompt": "x", "max_tokens": 0 })),
            ("max_tokens", json!({ "prompt": "x", "max_tokens": 2049 })),
            ("max_tokens", json!({ "prompt": "x", "max_tokens": 1.5 })),
            ("seed", json!({ "prompt": "x", "seed": -1 })),
            ("stop", json!({ "prompt": "x", "stop": [""] })),
            ("stop", json!({ "prompt": "x", "stop": ["a", 1] })),
            ("stop", json!({ "prompt": "x", "stop": vec!["a"; 17] })),
            ("logit_bias", json!({ "prompt": "x", "logit_bias": { "-1": 1 } })),
            ("logit_bias", json!({ "prompt": "x", "logit_bias": { "1": 101 } })),
            ("repetition_penalty", json!({ "prompt": "x", "repetition_penalty": 0 })),
            ("stream", json!({ "prompt": "x", "stream": "yes" })),
            ("speculation", json!({ "prompt": "x", "speculation": true })),
            ("speculation", json!({ "prompt": "x", "speculation": "some" })),
            (
                "response_format",
                json!({ "prompt": "x", "response_format": { "type": "json_schema" } }),
            ),
            ("max_token", json!({ "prompt": "x", "max_token": 5 })),
        ];
        for (name, body) in bad {
            assert_eq!(read(body.clone()).unwrap_err().param.as_deref(), Some(name), "{body}");
        }
        assert!(read(json!([1])).unwrap_err().param.is_none());
    }
}
