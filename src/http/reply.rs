//! How answers are written: JSON, errors, and server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;

use super::api;
use crate::request::Event;

/// Any answer: a whole body or a stream.
pub type Reply = Response<Either<Full<Bytes>, EventStream>>;

/// A JSON answer.
pub fn json(status: StatusCode, body: &impl Serialize) -> Reply {
    let bytes = serde_json::to_vec(body).expect("our types have string keys and no failing parts");
    let mut reply = Response::new(Either::Left(Full::new(bytes.into())));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
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
    pub fn body(&self) -> serde_json::Value {
        let mut error = serde_json::json!({ "type": self.kind, "message": self.message });
        if let Some(param) = &self.param {
            error["param"] = param.as_str().into();
        }
        serde_json::json!({ "error": error })
    }

    /// The answer.
    pub fn reply(self) -> Reply {
        let mut reply = json(self.status, &self.body());
        if let Some((name, value)) = self.header {
            reply.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        reply
    }

    /// The engine failed; the log has the cause under `id`.
    pub fn incident(id: &str) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            format!("the engine failed on this request; the server's log names the cause under {id}"),
        )
    }
}

/// A request's events as server-sent events. Dropping it drops the receiver, which cancels the request.
pub struct EventStream {
    first: Option<Event>,
    events: mpsc::Receiver<Event>,
    ended: bool,
}

/// An answer that streams: `first` has arrived already, the rest is to come.
pub fn stream(first: Event, events: mpsc::Receiver<Event>) -> Reply {
    let body = EventStream { first: Some(first), events, ended: false };
    let mut reply = Response::new(Either::Right(body));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    reply
}

impl EventStream {
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        match self.first.take() {
            Some(event) => Poll::Ready(Some(event)),
            None => self.events.poll_recv(cx),
        }
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    /// One frame for all events that are there already: a slow reader gets few large ones.
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut out = BytesMut::new();
        while !self.ended {
            match self.poll_event(cx) {
                Poll::Ready(Some(event)) => {
                    self.ended = !matches!(event, Event::Piece(_));
                    write_event(&event, &mut out);
                }
                Poll::Ready(None) => {
                    // The engine's thread went away without a last word.
                    self.ended = true;
                    write_event(&Event::Failed { id: "engine-stopped".into() }, &mut out);
                }
                Poll::Pending => break,
            }
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

fn write_event(event: &Event, out: &mut BytesMut) {
    let data = match event {
        Event::Piece(text) => serde_json::json!({ "generated_text": text }),
        Event::Done(completion) => api::completion(completion, &completion.tail),
        Event::Failed { id } => {
            out.extend_from_slice(b"event: error\n");
            Problem::incident(id).body()
        }
    };
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data.to_string().as_bytes()); // one line: JSON escapes line ends
    out.extend_from_slice(b"\n\n");
}
