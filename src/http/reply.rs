//! How answers are written: JSON, and server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;

use super::problem::Problem;
use super::record::AccessRecord;
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

/// An error, in OpenAI's shape or this server's own.
pub fn error(problem: &Problem, is_openai: bool) -> Reply {
    let mut reply = json(problem.status_and_kind(is_openai).0, &problem.body(is_openai));
    if let Some((name, value)) = problem.header() {
        reply.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    reply
}

/// How an API writes events.
pub trait Dialect: Send {
    /// Appends what the client gets of an event of choice number `choice`.
    fn write(&mut self, choice: usize, event: &Event, out: &mut BytesMut);

    /// Appends an error, which ends the stream.
    fn fail(&mut self, problem: &Problem, out: &mut BytesMut);

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

/// The events of one or several choices as server-sent events. Dropping it drops the receivers,
/// which cancels what they wait for.
pub struct EventStream {
    /// By choice; `None` for those that ended.
    choices: Vec<Option<mpsc::Receiver<Event>>>,
    dialect: Box<dyn Dialect>,
    record: Arc<AccessRecord>,
    /// Written and not yet sent.
    out: BytesMut,
    ended: bool,
}

/// An answer that streams: `first` of the first choice has arrived already, the rest is to come.
pub fn stream(
    first: Event,
    choices: Vec<mpsc::Receiver<Event>>,
    dialect: Box<dyn Dialect>,
    record: Arc<AccessRecord>,
) -> Reply {
    let choices = choices.into_iter().map(Some).collect();
    let mut body = EventStream { choices, dialect, record, out: BytesMut::new(), ended: false };
    body.write(0, Some(first));
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
    /// Writes the next event of a choice; `None` if the engine stopped without one.
    fn write(&mut self, choice: usize, event: Option<Event>) {
        match &event {
            Some(event) => self.dialect.write(choice, event, &mut self.out),
            None => self.dialect.fail(&Problem::Interrupted, &mut self.out),
        }
        match event {
            Some(Event::Piece(_)) => {}
            Some(Event::Done(done)) => {
                self.record.complete(choice, &done);
                self.choices[choice] = None;
            }
            Some(Event::Failed { .. }) | None => {
                self.choices.clear();
                self.ended = true;
            }
        }
    }

    /// Writes all that has arrived.
    fn drain(&mut self, cx: &mut Context<'_>) {
        let mut choice = 0;
        while let Some(events) = self.choices.get_mut(choice) {
            match events.as_mut().map(|events| events.poll_recv(cx)) {
                Some(Poll::Ready(event)) => self.write(choice, event),
                Some(Poll::Pending) | None => choice += 1,
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
        self.drain(cx);
        if !self.ended && self.choices.iter().all(Option::is_none) {
            let this = &mut *self;
            this.dialect.end(&mut this.out);
            this.ended = true;
        }
        match (self.out.is_empty(), self.ended) {
            (false, _) => Poll::Ready(Some(Ok(Frame::data(self.out.split().freeze())))),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.out.is_empty()
    }
}
