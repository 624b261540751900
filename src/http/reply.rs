//! How answers are written: JSON, errors, and server-sent events.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::time::{Instant, Interval, interval_at};

use super::problem::{ErrorShape, Problem};
use crate::engine::Answer;
use crate::request::{Completion, Event, Piece};
use crate::telemetry::ChoiceRecords;

/// Fields of a request that were ignored as nobody knows them.
pub const IGNORED_FIELDS: HeaderName = HeaderName::from_static("x-ignored-fields");

/// Asks nginx, and proxies that follow it, to pass events on as they come.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Any answer's body: whole, or a stream.
pub type Content = Either<Full<Bytes>, EventStream>;

/// Any answer.
pub type Reply = Response<Content>;

/// A whole answer. `content_type` is visible ASCII.
pub fn whole(status: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Either::Left(Full::new(body.into())));
    *reply.status_mut() = status;
    let content_type = HeaderValue::from_str(content_type).expect("names of types are plain text");
    reply.headers_mut().insert(CONTENT_TYPE, content_type);
    reply
}

/// An answer without a body.
pub fn no_content() -> Reply {
    let mut reply = Response::new(Either::Left(Full::new(Bytes::new())));
    *reply.status_mut() = StatusCode::NO_CONTENT;
    reply
}

/// A JSON answer.
pub fn json(status: StatusCode, body: &impl Serialize) -> Reply {
    whole(status, "application/json", to_json(body))
}

fn to_json(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("our types have string keys and no failing parts")
}

/// An error, in the dialect's shape; `id` is the request's.
pub fn error(problem: &Problem, shape: ErrorShape, id: &str) -> Reply {
    let mut reply = json(problem.status_and_kind(shape).0, &problem.body(shape, id));
    if let Some((name, value)) = problem.header() {
        reply.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    reply
}

/// Names the fields of a request that nobody knew. A path's characters that are of no known field
/// become question marks, so that nothing of a client's choice gets into the head.
pub fn name_ignored(paths: &BTreeSet<String>, headers: &mut HeaderMap) {
    if paths.is_empty() {
        return;
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.[]".contains(c);
    let plain = |path: &String| -> String {
        path.chars().map(|c| if is_plain(c) { c } else { '?' }).collect()
    };
    let names: Vec<String> = paths.iter().map(plain).collect();
    let names = HeaderValue::from_str(&names.join(",")).expect("visible ASCII");
    headers.insert(IGNORED_FIELDS, names);
}

/// How an API writes events.
pub trait Dialect: Send {
    /// Writes the whole answer: each choice's text, and how it ended.
    fn whole(&self, done: &[(Piece, Completion)]) -> Reply;

    /// Appends what the client gets of an event of choice number `choice`.
    fn write(&mut self, choice: usize, event: &Event, out: &mut BytesMut);

    /// Appends what comes after all choices.
    fn end(&mut self, _out: &mut BytesMut) {}
}

/// Appends one server-sent event.
pub fn event(data: &impl Serialize, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(&to_json(data)); // one line: JSON escapes line ends
    out.extend_from_slice(b"\n\n");
}

/// Appends one server-sent event with a name.
pub fn named_event(name: &str, data: &impl Serialize, out: &mut BytesMut) {
    for part in ["event: ", name, "\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    event(data, out);
}

/// Appends one server-sent event whose data has its name as `type`, and the fields of `data`.
pub fn typed_event(name: &str, data: &impl Serialize, out: &mut BytesMut) {
    #[derive(Serialize)]
    struct Typed<'a, T> {
        r#type: &'a str,
        #[serde(flatten)]
        data: &'a T,
    }
    named_event(name, &Typed { r#type: name, data }, out);
}

/// A comment, which clients skip: it shows proxies and clients that an answer is still to come.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// The events of one or several choices as server-sent events. Dropping it drops their answers,
/// which cancels the requests.
pub struct EventStream {
    /// By choice; `None` for those that ended.
    choices: Vec<Option<Answer>>,
    dialect: Box<dyn Dialect>,
    record: Arc<ChoiceRecords>,
    ended: bool,
    /// When the next comment is due, if no event comes before.
    keep_alive: Option<Interval>,
}

/// An answer that streams, with a comment wherever no event came for the time of `keep_alive`.
pub fn stream(
    choices: Vec<Answer>,
    dialect: Box<dyn Dialect>,
    record: Arc<ChoiceRecords>,
    keep_alive: Option<Duration>,
) -> Reply {
    let choices = choices.into_iter().map(Some).collect();
    let keep_alive = keep_alive.map(|period| interval_at(Instant::now() + period, period));
    let body = EventStream { choices, dialect, record, ended: false, keep_alive };
    let mut reply = Response::new(Either::Right(body));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    reply
}

impl EventStream {
    fn drain(&mut self, choice: usize, cx: &mut Context<'_>, out: &mut BytesMut) {
        while let Some(Some(answer)) = self.choices.get_mut(choice) {
            let Poll::Ready(event) = answer.poll_next(cx) else { return };
            self.dialect.write(choice, &event, out);
            match event {
                Event::Progress(_) | Event::Piece(_) => {}
                Event::Done(done) => {
                    if let Some(record) = self.record.lock().get_mut(choice) {
                        record.done = Some((done.usage, done.timings));
                    }
                    self.choices[choice] = None;
                }
                Event::Failed { .. } => {
                    self.choices.clear();
                    self.ended = true;
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
        for choice in 0..self.choices.len() {
            self.drain(choice, cx, &mut out);
        }
        if !self.ended && self.choices.iter().all(Option::is_none) {
            self.ended = true;
            self.dialect.end(&mut out);
        }
        match (out.is_empty(), self.ended, &mut self.keep_alive) {
            (false, _, keep_alive) => {
                keep_alive.iter_mut().for_each(Interval::reset);
                Poll::Ready(Some(Ok(Frame::data(out.freeze()))))
            }
            (true, true, _) => Poll::Ready(None),
            (true, false, None) => Poll::Pending,
            (true, false, Some(keep_alive)) => {
                let due = keep_alive.poll_tick(cx);
                due.map(|_| Some(Ok(Frame::data(Bytes::from_static(KEEP_ALIVE)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
