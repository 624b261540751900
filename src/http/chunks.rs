//! OpenAI's dialect: the engine's events to its objects, whole or in chunks.

use std::time::UNIX_EPOCH;

use bytes::BytesMut;
use hyper::StatusCode;

use super::api::answers::{
    AnswerMessage, CallPart, ChatLogprobs, ChoiceLogprobs, Delta, Detokenize, FinishKind,
    FunctionPart, Offsets, OpenAiAnswer, OpenAiChoice, TextLogprobs, details, finish,
};
use super::api::information::BUILD;
use super::api::openai::Choices;
use super::api::usage::{AnswerTimings, Ended, OpenAiUsage, PromptTokensDetails};
use super::problem::{ErrorShape, Problem};
use super::reply::{self, Dialect, Reply, event};
use crate::chat::{self, AnswerReader, Syntax};
use crate::engine::Failed;
use crate::request::{self, Completion, Event, Piece, Progress, Report, Restored, Usage};

/// A path of the dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Text,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    /// What its body has the prompt in.
    pub fn prompt_field(self) -> &'static str {
        match self {
            Self::Text => "prompt",
            Self::Chat => "messages",
        }
    }
}

/// Where the tokens of a request's answer begin.
fn offsets(request: &request::Request) -> Offsets {
    Offsets::after(request.prompt.text().filter(|_| request.echo).as_deref())
}

/// Why an answer ended, if it may call tools.
fn ended(kind: FinishKind, reader: &AnswerReader) -> FinishKind {
    if kind == FinishKind::Stop && reader.has_calls() { FinishKind::ToolCalls } else { kind }
}

/// Writes an answer whole, or in chunks: for each choice a chat's role, pieces, the finish reason;
/// after all of them, if asked for, the counts; and `[DONE]`.
pub struct Chunks {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    /// Choices of each prompt.
    n: usize,
    report: Report,
    detokenize: Detokenize,
    include_usage: bool,
    /// By choice: whether its role was sent.
    has_begun: Vec<bool>,
    /// By choice: where its next token begins.
    offsets: Vec<Offsets>,
    /// By choice: what a chat's answer says so far.
    readers: Vec<AnswerReader>,
    syntax: Option<Syntax>,
    /// The choices that ended.
    ended: Vec<Ended>,
}

impl Chunks {
    /// An answer that begins now.
    pub fn new(
        endpoint: Endpoint,
        model: String,
        choices: &Choices,
        detokenize: Detokenize,
    ) -> Self {
        let prefix = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let n_choices = choices.requests.len();
        Self {
            endpoint,
            id: format!("{prefix}-{:016x}", fastrand::u64(..)),
            created: UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            model,
            n: choices.n,
            report: choices.requests.first().and_then(|r| r.report).unwrap_or_default(),
            detokenize,
            include_usage: choices.include_usage,
            has_begun: vec![false; n_choices],
            offsets: choices.requests.iter().map(offsets).collect(),
            readers: vec![AnswerReader::new(choices.syntax.clone()); n_choices],
            syntax: choices.syntax.clone(),
            ended: Vec::new(),
        }
    }

    fn object<'a>(
        &'a self,
        is_chunk: bool,
        choices: Vec<OpenAiChoice<'a>>,
        usage: Option<Option<OpenAiUsage>>,
    ) -> OpenAiAnswer<'a> {
        let object = match (self.endpoint, is_chunk) {
            (Endpoint::Text, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        };
        let (id, model) = (&self.id, &self.model);
        let (created, system_fingerprint) = (self.created, BUILD);
        let (prompt_progress, timings) = (None, None);
        OpenAiAnswer {
            id,
            object,
            created,
            model,
            system_fingerprint,
            choices,
            usage,
            prompt_progress,
            timings,
        }
    }

    /// A choice, or a part of one, without its text.
    fn choice<'a>(
        &self,
        index: usize,
        piece: Option<&Piece>,
        offsets: &mut Offsets,
        done: Option<&'a Completion>,
    ) -> OpenAiChoice<'a> {
        let (report, detokenize) = (self.report, &self.detokenize);
        let tokens = piece.map(|piece| piece.tokens.as_slice());
        let reported = tokens.filter(|_| report.n_top.is_some());
        let logprobs = reported.and_then(|tokens| match self.endpoint {
            Endpoint::Text => {
                TextLogprobs::new(tokens, detokenize, offsets).map(ChoiceLogprobs::Text)
            }
            Endpoint::Chat => ChatLogprobs::new(tokens, detokenize).map(ChoiceLogprobs::Chat),
        });
        let (finish_reason, stop_reason) = done.map(finish).unzip();
        OpenAiChoice {
            index,
            logprobs,
            finish_reason,
            stop_reason: stop_reason.flatten(),
            tokens: tokens.filter(|_| report.details).map(|tokens| details(tokens, detokenize)),
            speculation: done.map(Into::into),
            ..OpenAiChoice::default()
        }
    }

    /// A prompt counts once for all choices that have it.
    fn usage(&self, ended: &[Ended]) -> OpenAiUsage {
        let of_prompts = |count: fn(&Usage) -> usize| -> usize {
            let firsts = ended.iter().filter(|ended| ended.index % self.n == 0);
            firsts.map(|ended| count(&ended.usage)).sum()
        };
        let prompt_tokens = of_prompts(|usage| usage.prompt_tokens);
        let cached_tokens = of_prompts(|usage| usage.cached_tokens);
        let completion_tokens = ended.iter().map(|ended| ended.usage.completion_tokens).sum();
        let total_tokens = prompt_tokens + completion_tokens;
        let restored = Restored {
            memory: of_prompts(|usage| usage.restored.memory),
            store: of_prompts(|usage| usage.restored.store),
        };
        let prompt_tokens_details =
            PromptTokensDetails { cached_tokens, restored_tokens: restored.any() };
        OpenAiUsage { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details }
    }

    /// What all choices took, once all have ended.
    fn timings(&self) -> Option<AnswerTimings> {
        let is_whole = self.ended.len() == self.offsets.len();
        is_whole.then(|| AnswerTimings::new(&self.ended, self.usage(&self.ended)))
    }

    /// Writes a part of a choice: of a chat `delta`, else the piece's text.
    fn chunk(
        &mut self,
        index: usize,
        delta: Delta<'_>,
        piece: Option<&Piece>,
        done: Option<&Completion>,
        out: &mut BytesMut,
    ) {
        let mut offsets = std::mem::take(&mut self.offsets[index]);
        let mut choice = self.choice(index, piece, &mut offsets, done);
        let reader = &self.readers[index];
        choice.finish_reason = choice.finish_reason.map(|kind| ended(kind, reader));
        match self.endpoint {
            Endpoint::Text => choice.text = Some(delta.content.unwrap_or_default()),
            Endpoint::Chat => choice.delta = Some(delta),
        }
        let usage = self.include_usage.then_some(None);
        let timings = self.timings().filter(|_| !self.include_usage);
        event(&OpenAiAnswer { timings, ..self.object(true, vec![choice], usage) }, out);
        self.offsets[index] = offsets;
    }

    fn progress(&self, index: usize, progress: Progress, out: &mut BytesMut) {
        let mut choice = OpenAiChoice { index, ..OpenAiChoice::default() };
        match self.endpoint {
            Endpoint::Text => choice.text = Some(""),
            Endpoint::Chat => choice.delta = Some(Delta::default()),
        }
        let usage = self.include_usage.then_some(None);
        let chunk = self.object(true, vec![choice], usage);
        event(&OpenAiAnswer { prompt_progress: Some(progress), ..chunk }, out);
    }

    fn piece(&mut self, index: usize, piece: &Piece, out: &mut BytesMut) {
        if self.syntax.is_none() {
            let delta = Delta { content: Some(&piece.text), ..Delta::default() };
            return self.chunk(index, delta, Some(piece), None, out);
        }
        let mut deltas = Vec::new();
        self.readers[index].push(&piece.text, &mut |delta| deltas.push(delta));
        self.deltas(index, &deltas, Some(piece), out);
    }

    /// Writes what an answer says more; the first part has the report of the piece's tokens.
    fn deltas(
        &mut self,
        index: usize,
        deltas: &[chat::Delta],
        piece: Option<&Piece>,
        out: &mut BytesMut,
    ) {
        let mut piece = piece.filter(|piece| !piece.tokens.is_empty());
        if deltas.is_empty() && piece.is_some() {
            self.chunk(index, Delta::default(), piece, None, out);
        }
        for delta in deltas {
            self.chunk(index, Delta::from(delta), piece.take(), None, out);
        }
    }
}

impl<'a> From<&'a chat::Delta> for Delta<'a> {
    fn from(delta: &'a chat::Delta) -> Self {
        let part = |index, id: Option<&'a str>, name, arguments| {
            let (r#type, function) = (id.map(|_| "function"), FunctionPart { name, arguments });
            Some([CallPart { index, id, r#type, function }])
        };
        match delta {
            chat::Delta::Reasoning(text) => {
                Self { reasoning_content: Some(text), ..Self::default() }
            }
            chat::Delta::Content(text) => Self { content: Some(text), ..Self::default() },
            chat::Delta::Call { index, id, name } => {
                Self { tool_calls: part(*index, Some(id), Some(name), ""), ..Self::default() }
            }
            chat::Delta::Arguments { index, text } => {
                Self { tool_calls: part(*index, None, None, text), ..Self::default() }
            }
        }
    }
}

impl Dialect for Chunks {
    fn whole(&self, done: &[(Piece, Completion)]) -> Reply {
        let read = |(whole, _): &(Piece, Completion)| {
            let mut reader = AnswerReader::new(self.syntax.clone());
            reader.push(&whole.text, &mut |_| {});
            reader.end(&mut |_| {});
            reader
        };
        let readers: Vec<AnswerReader> = match self.endpoint {
            Endpoint::Text => Vec::new(),
            Endpoint::Chat => done.iter().map(read).collect(),
        };
        let choices = done.iter().enumerate().map(|(index, (whole, done))| {
            let offsets = &mut self.offsets[index].clone();
            let mut choice = self.choice(index, Some(whole), offsets, Some(done));
            match readers.get(index) {
                None => choice.text = Some(&whole.text),
                Some(reader) => {
                    choice.finish_reason = choice.finish_reason.map(|kind| ended(kind, reader));
                    choice.message = Some(AnswerMessage::new(reader.answer()));
                }
            }
            choice
        });
        let ended = done.iter().enumerate().map(|(index, (_, done))| Ended::new(index, done));
        let ended: Vec<_> = ended.collect();
        let usage = self.usage(&ended);
        let timings = Some(AnswerTimings::new(&ended, usage));
        let answer = self.object(false, choices.collect(), Some(Some(usage)));
        reply::json(StatusCode::OK, &OpenAiAnswer { timings, ..answer })
    }

    fn write(&mut self, index: usize, what: &Event, out: &mut BytesMut) {
        let is_chat = self.endpoint == Endpoint::Chat;
        let is_failed = matches!(what, Event::Failed { .. });
        if is_chat && !is_failed && !std::mem::replace(&mut self.has_begun[index], true) {
            let begin = Delta {
                role: Some("assistant"),
                content: Some(""),
                refusal: Some(None),
                ..Delta::default()
            };
            self.chunk(index, begin, None, None, out);
        }
        match what {
            Event::Progress(progress) => self.progress(index, *progress, out),
            Event::Piece(piece) => self.piece(index, piece, out),
            Event::Done(done) => {
                if !done.tail.text.is_empty() || !done.tail.tokens.is_empty() {
                    self.piece(index, &done.tail, out);
                }
                let mut deltas = Vec::new();
                self.readers[index].end(&mut |delta| deltas.push(delta));
                self.deltas(index, &deltas, None, out);
                self.ended.push(Ended::new(index, done));
                self.chunk(index, Delta::default(), None, Some(done), out);
            }
            Event::Failed { id } => {
                let problem = Problem::from(Failed { id: id.clone() });
                event(&problem.body(ErrorShape::OpenAi, ""), out);
            }
        }
    }

    fn end(&mut self, out: &mut BytesMut) {
        if self.include_usage {
            let usage = self.usage(&self.ended);
            let chunk = self.object(true, vec![], Some(Some(usage)));
            event(&OpenAiAnswer { timings: self.timings(), ..chunk }, out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{FinishReason, SpeculationUsage, Timings, Usage};
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn done(tail: &str, completion_tokens: usize) -> Completion {
        Completion {
            tail: Piece { text: tail.into(), tokens: vec![] },
            finish_reason: FinishReason::EndOfText,
            usage: Usage { prompt_tokens: 5, completion_tokens, ..Usage::default() },
            timings: Timings::default(),
            speculation: SpeculationUsage::default(),
            embedding: None,
            trace: None,
        }
    }

    #[test]
    fn a_stream_has_role_pieces_reason_counts_and_done_in_this_order() {
        let requests = vec![request::Request::new("x", 1); 2];
        let choices = Choices { requests, n: 2, stream: true, include_usage: true, syntax: None };
        let detokenize = Arc::new(|_, _| Vec::new());
        let mut chunks = Chunks::new(Endpoint::Chat, "m".into(), &choices, detokenize);
        let mut out = BytesMut::new();
        chunks.write(0, &Event::Piece(Piece { text: "Hi".into(), tokens: vec![] }), &mut out);
        chunks.write(1, &Event::Done(done("you", 2)), &mut out);
        chunks.write(0, &Event::Done(done("", 3)), &mut out);
        chunks.end(&mut out);
        let text = String::from_utf8(out.to_vec()).unwrap();
        let mut events: Vec<&str> =
            text.split("\n\n").filter(|e| !e.is_empty()).map(|e| &e[6..]).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        let events: Vec<Value> =
            events.into_iter().map(|e| serde_json::from_str(e).unwrap()).collect();
        let seen = events.iter().map(|e| {
            let choice = &e["choices"][0];
            json!([choice["index"], choice["delta"]["content"], choice["finish_reason"]])
        });
        let expected = json!([
            [0, "", null],
            [0, "Hi", null],
            [1, "", null],
            [1, "you", null],
            [1, null, "stop"],
            [0, null, "stop"],
            [null, null, null],
        ]);
        assert_eq!(Value::from_iter(seen), expected);
        let usage = &events.last().unwrap()["usage"];
        assert_eq!(usage["prompt_tokens"], 5, "the prompt counts once");
        assert_eq!(usage["completion_tokens"], 5);
        assert!(events[0]["usage"].is_null() && events[0]["object"] == "chat.completion.chunk");
    }
}
