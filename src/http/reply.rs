//! How answers are written: JSON, errors, and server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::access::Tally;
use super::api::answers;
use crate::engine::Answer;
use crate::request::Event;

/// Any answer's body: whole, or a stream.
pub type Content = Either<Full<Bytes>, EventStream>;

/// Any answer.
pub type Reply = Response<Content>;

/// A JSON answer.
pub fn json(status: StatusCode, body: &impl Serialize) -> Reply {
    let bytes = serde_json::to_vec(body).expect("our types have string keys and no failing parts");
    let mut reply = Response::new(Either::Left(Full::new(bytes.into())));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

/// An answer of another type.
pub fn plain(content_type: &str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Either::Left(Full::new(body.into())));
    let content_type = HeaderValue::from_str(content_type).expect("names of types are plain text");
    reply.headers_mut().insert(CONTENT_TYPE, content_type);
    reply
}

/// What went wrong, as every client gets it.
#[derive(Debug)]
pub struct Problem {
    /// The status.
    pub status: StatusCode,
    /// `type` of the body.
    pub kind: &'static str,
    /// For people.
    pub message: String,
    /// The field to blame.
    pub param: Option<String>,
    /// A header that the status calls for.
    pub header: Option<(HeaderName, &'static str)>,
}

impl Problem {
    /// Without a field or a header.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, header: None }
    }

    /// The body.
    pub fn body(&self) -> answers::Problem<'_> {
        let Self { kind, message, param, .. } = self;
        let param = param.as_deref().map(Some);
        answers::Problem {
            error: answers::ProblemDetails { r#type: kind, message, param, code: None },
        }
    }

    /// The body as OpenAI's clients expect it.
    pub fn openai_body(&self) -> answers::Problem<'_> {
        let r#type = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let Self { kind, message, param, .. } = self;
        let (param, code) = (Some(param.as_deref()), Some(*kind));
        answers::Problem { error: answers::ProblemDetails { r#type, message, param, code } }
    }

    /// The answer.
    pub fn reply(self) -> Reply {
        self.reply_with(&self.body())
    }

    /// The answer to an OpenAI client.
    pub fn openai_reply(self) -> Reply {
        self.reply_with(&self.openai_body())
    }

    fn reply_with(&self, body: &answers::Problem<'_>) -> Reply {
        let mut reply = json(self.status, body);
        if let Some((name, value)) = &self.header {
            reply.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        reply
    }

    /// The engine failed; the log has the cause under `id`.
    pub fn incident(id: &str) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            format!(
                "the engine failed on this request; the server's log names the cause under {id}"
            ),
        )
    }
}

/// How an API writes events.
pub trait Dialect: Send {
    /// Appends what the client of choice number `choice` is told.
    fn write(&mut self, choice: usize, event: &Event, out: &mut BytesMut);

    /// Appends what comes after all choices.
    fn end(&mut self, _out: &mut BytesMut) {}
}

/// Appends one server-sent event.
pub fn event(data: &impl Serialize, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    // One line: JSON escapes line ends.
    out.extend_from_slice(
        &serde_json::to_vec(data).expect("our types have string keys and no failing parts"),
    );
    out.extend_from_slice(b"\n\n");
}

/// The events of one or several choices as server-sent events. Dropping it drops their answers,
/// which cancels the requests.
pub struct EventStream {
    /// By choice; `None` for those that ended.
    choices: Vec<Option<Answer>>,
    dialect: Box<dyn Dialect>,
    tally: Arc<Tally>,
    ended: bool,
}

/// An answer that streams.
pub fn stream(choices: Vec<Answer>, dialect: Box<dyn Dialect>, tally: Arc<Tally>) -> Reply {
    let choices = choices.into_iter().map(Some).collect();
    let body = EventStream { choices, dialect, tally, ended: false };
    let mut reply = Response::new(Either::Right(body));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    reply
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl EventStream {
    /// Writes what has arrived for a choice.
    fn drain(&mut self, choice: usize, cx: &mut Context<'_>, out: &mut BytesMut) {
        while let Some(answer) = &mut self.choices[choice] {
            let Poll::Ready(event) = answer.poll_next(cx) else { return };
            self.dialect.write(choice, &event, out);
            match event {
                Event::Piece(_) => {}
                Event::Done(done) => {
                    self.tally.note(choice, &done);
                    self.choices[choice] = None;
                }
                Event::Failed { .. } => {
                    self.choices.clear();
                    self.ended = true;
                    return;
                }
            }
        }
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    /// One frame for all events that are there already: a slow reader gets few large ones.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut out = BytesMut::new();
        let mut choice = 0;
        while choice < self.choices.len() {
            self.drain(choice, cx, &mut out);
            choice += 1;
        }
        if !self.ended && self.choices.iter().all(Option::is_none) {
            self.ended = true;
            self.dialect.end(&mut out);
        }
        match (out.is_empty(), self.ended) {
            (false, _) => Poll::Ready(Some(Ok(Frame::data(out.freeze())))),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
