//! Anthropic's dialect: the handlers of `/v1/messages`, and the engine's events to its answers.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use hyper::{Request, StatusCode};

use super::api::answers::StreamEvent;
use super::api::message_answers::{
    AnswerBlock, BlockDelta, EndDelta, MessageAnswer, MessageEvent, MessageStop, MessageUsage,
    SIGNATURE, TokenCount,
};
use super::api::messages::{CountRequest, MessagesRequest};
use super::api::openai::Choices;
use super::app::RequestContext;
use super::completions::{answer, read};
use super::problem::{ErrorShape, Problem};
use super::reply::{self, Dialect, Reply, named_event, typed_event};
use super::sections::{Change, Kind, Sections};
use crate::chat::Syntax;
use crate::engine::Failed;
use crate::models::Loaded;
use crate::request::{Completion, Event, Piece, Usage};

/// Names of fields that others call otherwise.
const FIELDS: [(&str, &str); 2] =
    [("prompt", "messages"), ("response_format", "output_config.format")];

/// Answers to messages, as Anthropic has it
#[utoipa::path(post, path = "/v1/messages", tag = "anthropic", request_body = MessagesRequest, responses(
    (status = 200, description = "The answer, or a stream of events from `message_start` to `message_stop`; an error after the first \
     is an `event: error`", content(
        (MessageAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn converse(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let (choices, stops, ignored) = read(&cx.app, &model, request, |model, readers, body| {
        let (body, ignored) = readers.messages.read_noting(body)?;
        let (stops, n_ctx, seed) = (body.stops(), model.n_ctx(), fastrand::u64(..));
        Ok((body.into_choices(n_ctx, seed, model.template())?, stops, ignored))
    })
    .await?;
    cx.app.note_ignored(&ignored);
    let dialect = Messages::new(&cx, &model, &choices, stops);
    let answered = answer(cx, &model, choices.requests, choices.stream, dialect).await;
    let mut reply = answered.map_err(|problem| problem.with_fields_as(&FIELDS))?;
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}

/// Tokens of messages, as Anthropic has it
#[utoipa::path(post, path = "/v1/messages/count_tokens", tag = "anthropic", request_body = CountRequest, responses(
    (status = 200, description = "How many", body = TokenCount),
))]
pub async fn count_tokens(
    mut cx: RequestContext,
    request: Request<Bytes>,
) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let (input_tokens, ignored) = read(&cx.app, &model, request, |model, readers, body| {
        let (body, ignored) = readers.count.read_noting(body)?;
        let prompt = body.prompt(model.n_ctx(), model.template())?;
        Ok((model.handle.tokenize(&prompt)?.len(), ignored))
    })
    .await
    .map_err(|problem| problem.with_fields_as(&FIELDS))?;
    cx.app.note_ignored(&ignored);
    let mut reply = reply::json(StatusCode::OK, &TokenCount { input_tokens });
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}

/// Writes an answer whole, or as events.
struct Messages {
    head: Head,
    /// The request's own stop strings.
    stops: Vec<String>,
    syntax: Option<Syntax>,
    sections: Sections,
    has_begun: bool,
}

/// What all of an answer's events share.
struct Head {
    id: String,
    model: String,
    /// Names the request in errors.
    request_id: Arc<str>,
}

impl Head {
    fn answer<'a>(
        &'a self,
        content: Vec<AnswerBlock<'a>>,
        stop: Option<(MessageStop, Option<&'a str>)>,
        usage: MessageUsage,
    ) -> MessageAnswer<'a> {
        let (stop_reason, stop_sequence) = stop.unzip();
        MessageAnswer {
            id: &self.id,
            r#type: "message",
            role: "assistant",
            model: &self.model,
            content,
            stop_reason,
            stop_sequence: stop_sequence.flatten(),
            usage,
        }
    }
}

fn send(event: &MessageEvent<'_>, out: &mut BytesMut) {
    typed_event(event.name(), event, out);
}

/// Writes what happens to a section.
fn change(change: &Change<'_>, out: &mut BytesMut) {
    match *change {
        Change::Begin(index, section) => {
            let content_block = AnswerBlock::begun(section);
            send(&MessageEvent::ContentBlockStart { index, content_block }, out);
        }
        Change::More(index, section, text) => {
            let delta = BlockDelta::of(section, text);
            send(&MessageEvent::ContentBlockDelta { index, delta }, out);
        }
        Change::End(index, section) => {
            if section.kind == Kind::Thoughts {
                let delta = BlockDelta::SignatureDelta { signature: SIGNATURE };
                send(&MessageEvent::ContentBlockDelta { index, delta }, out);
            }
            send(&MessageEvent::ContentBlockStop { index }, out);
        }
    }
}

impl Messages {
    /// An answer that begins now.
    fn new(cx: &RequestContext, model: &Loaded, choices: &Choices, stops: Vec<String>) -> Self {
        let head = Head {
            id: format!("msg_{:016x}", fastrand::u64(..)),
            model: model.id.to_string(),
            request_id: Arc::clone(&cx.id),
        };
        let syntax = choices.syntax.clone();
        let sections = Sections::new(syntax.clone());
        Self { head, stops, syntax, sections, has_begun: false }
    }

    /// Writes the first events, if they are still to come.
    fn begin(&mut self, usage: MessageUsage, out: &mut BytesMut) {
        if !std::mem::replace(&mut self.has_begun, true) {
            let message = self.head.answer(Vec::new(), None, usage);
            send(&MessageEvent::MessageStart { message }, out);
            send(&MessageEvent::Ping {}, out);
        }
    }

    fn finish(&mut self, done: &Completion, out: &mut BytesMut) {
        self.begin(Usage { completion_tokens: 0, ..done.usage }.into(), out);
        self.sections.push(&done.tail.text, &mut |it| change(&it, out));
        self.sections.end(&mut |it| change(&it, out));
        self.sections.close(&mut |it| change(&it, out));
        let (stop_reason, stop_sequence) =
            MessageStop::of(done, &self.stops, self.sections.has_calls());
        let delta = EndDelta { stop_reason, stop_sequence };
        send(&MessageEvent::MessageDelta { delta, usage: done.usage.into() }, out);
        send(&MessageEvent::MessageStop {}, out);
    }
}

impl Dialect for Messages {
    fn whole(&self, done: &[(Piece, Completion)]) -> Reply {
        let (whole, done) = &done[0];
        let sections = Sections::of(&whole.text, self.syntax.clone());
        let content = sections.list().iter().map(AnswerBlock::whole).collect();
        let stop = MessageStop::of(done, &self.stops, sections.has_calls());
        let answer = self.head.answer(content, Some(stop), done.usage.into());
        reply::json(StatusCode::OK, &answer)
    }

    fn write(&mut self, _: usize, what: &Event, out: &mut BytesMut) {
        match what {
            Event::Progress(progress) => {
                let usage = Usage {
                    prompt_tokens: progress.total,
                    cached_tokens: progress.cache,
                    ..Usage::default()
                };
                self.begin(usage.into(), out);
            }
            Event::Piece(piece) => {
                self.begin(MessageUsage::default(), out);
                self.sections.push(&piece.text, &mut |it| change(&it, out));
            }
            Event::Done(done) => self.finish(done, out),
            Event::Failed { id } => {
                let problem = Problem::from(Failed { id: id.clone() });
                let body = problem.body(ErrorShape::Anthropic, &self.head.request_id);
                named_event("error", &body, out);
            }
        }
    }
}
