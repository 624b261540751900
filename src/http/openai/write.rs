//! Completions to OpenAI's objects: whole, or in chunks.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use serde_json::{Value, json};

use super::Endpoint;
use crate::http::generate::{finish_reason, speculation, stop_reason};
use crate::http::reply::{Dialect, Problem, event};
use crate::http::tokens::{self, Telling};
use crate::request::{Completion, Event, Piece, Usage};

/// What stays the same in all objects of one answer.
#[derive(Clone)]
pub struct Envelope {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    /// Choices of each prompt.
    n: usize,
    telling: Telling,
}

impl Envelope {
    /// Of an answer that begins now, with `n` choices of each prompt.
    #[must_use]
    pub fn new(endpoint: Endpoint, model: String, n: usize, telling: Telling) -> Self {
        let prefix = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:016x}", fastrand::u64(..));
        let created =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { endpoint, id, created, model, n, telling }
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
    pub fn answer(&self, done: &[(Piece, Completion)]) -> Value {
        let choice = |(index, (whole, done)): (usize, &(Piece, Completion))| {
            let text = whole.text.as_str();
            let (name, text) = match self.endpoint {
                Endpoint::Text => ("text", text.into()),
                Endpoint::Chat => {
                    ("message", json!({ "role": "assistant", "content": text, "refusal": null }))
                }
            };
            let mut choice = self.choice(index, name, text);
            self.tell(whole, &mut 0, &mut choice);
            end(done, &mut choice);
            choice
        };
        let mut body = self.object(false, done.iter().enumerate().map(choice).collect());
        body["usage"] = self.usage(done.iter().map(|(_, done)| done.usage).enumerate());
        body
    }

    /// A choice, or a part of it, of which nothing is told yet and that has not ended.
    fn choice(&self, index: usize, name: &str, text: Value) -> Value {
        json!({ "index": index, name: text, "logprobs": null, "finish_reason": null })
    }

    /// Adds what is told of a part's tokens; it begins at `offset` of the text, in characters,
    /// which is moved to its end.
    fn tell(&self, piece: &Piece, offset: &mut usize, choice: &mut Value) {
        let Telling { logprobs, details, spell } = &self.telling;
        if *logprobs {
            choice["logprobs"] = match self.endpoint {
                Endpoint::Text => tokens::of_text(&piece.tokens, spell, offset),
                Endpoint::Chat => tokens::of_chat(&piece.tokens, spell),
            };
        }
        if *details {
            choice["tokens"] = tokens::details(&piece.tokens, spell);
        }
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
        let (has_begun, offsets) = (vec![false; n_choices], vec![0; n_choices]);
        Chunks { envelope: self, has_begun, offsets, include_usage, usages: Vec::new() }
    }
}

/// Adds how a choice ended.
fn end(done: &Completion, choice: &mut Value) {
    choice["finish_reason"] = finish_reason(&done.finish_reason).into();
    if let Some(reason) = stop_reason(&done.finish_reason) {
        choice["stop_reason"] = reason.into();
    }
    choice["speculation"] = speculation(done);
}

/// Writes chunks: for each choice of a chat first the role, then pieces, then the reason of the
/// end; behind all of them, if asked for, the counts; and `[DONE]`.
pub struct Chunks {
    envelope: Envelope,
    /// By choice: whether its role was sent.
    has_begun: Vec<bool>,
    /// By choice: characters of its tokens so far.
    offsets: Vec<usize>,
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

    fn piece(&mut self, index: usize, piece: &Piece, out: &mut BytesMut) {
        let text = piece.text.as_str();
        let (name, text) = match self.envelope.endpoint {
            Endpoint::Text => ("text", text.into()),
            Endpoint::Chat => ("delta", json!({ "content": text })),
        };
        let mut choice = self.envelope.choice(index, name, text);
        self.envelope.tell(piece, &mut self.offsets[index], &mut choice);
        self.chunk(choice, out);
    }
}

impl Dialect for Chunks {
    fn write(&mut self, index: usize, what: &Event, out: &mut BytesMut) {
        let is_chat = self.envelope.endpoint == Endpoint::Chat;
        if is_chat
            && !std::mem::replace(&mut self.has_begun[index], true)
            && !matches!(what, Event::Failed { .. })
        {
            let delta = json!({ "role": "assistant", "content": "", "refusal": null });
            self.chunk(self.envelope.choice(index, "delta", delta), out);
        }
        match what {
            Event::Piece(piece) => self.piece(index, piece, out),
            Event::Done(done) => {
                if !done.tail.text.is_empty() || !done.tail.tokens.is_empty() {
                    self.piece(index, &done.tail, out);
                }
                let (name, nothing) =
                    if is_chat { ("delta", json!({})) } else { ("text", json!("")) };
                let mut choice = self.envelope.choice(index, name, nothing);
                end(done, &mut choice);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{FinishReason, SpeculationUsage, Timings};

    fn done(tail: &str, prompt_tokens: usize, completion_tokens: usize) -> Completion {
        Completion {
            tail: Piece { text: tail.into(), tokens: vec![] },
            finish_reason: FinishReason::EndOfText,
            usage: Usage { prompt_tokens, cached_tokens: 0, completion_tokens },
            timings: Timings::default(),
            speculation: SpeculationUsage::default(),
            trace: None,
        }
    }

    #[test]
    fn a_stream_has_role_pieces_reason_counts_and_done_in_this_order() {
        let mut chunks =
            Envelope::new(Endpoint::Chat, "m".into(), 2, Telling::default()).chunks(2, true);
        let mut out = BytesMut::new();
        chunks.write(0, &Event::Piece(Piece { text: "Hi".into(), tokens: vec![] }), &mut out);
        chunks.write(1, &Event::Done(done("you", 5, 2)), &mut out);
        chunks.write(0, &Event::Done(done("", 5, 3)), &mut out);
        chunks.end(&mut out);
        let text = String::from_utf8(out.to_vec()).unwrap();
        let mut events: Vec<&str> =
            text.split("\n\n").filter(|e| !e.is_empty()).map(|e| &e[6..]).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        let events: Vec<Value> =
            events.into_iter().map(|e| serde_json::from_str(e).unwrap()).collect();
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
        assert_eq!(
            (&usage["prompt_tokens"], &usage["completion_tokens"]),
            (&json!(5), &json!(5)),
            "the prompt counts once"
        );
        assert!(events[0]["usage"].is_null() && events[0]["object"] == "chat.completion.chunk");
    }
}
