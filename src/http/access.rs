//! Around every request: the id that its answer and all lines about it carry, and one line in the log when the answer has ended.

use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use parking_lot::Mutex;
use tracing::{Instrument, Span};

use super::reply::Content;
use super::{App, routes};
use crate::request::{Completion, Timings, Usage, span};

/// Names a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken from a client.
const MAX_ID: usize = 128;
/// Characters of a path that are logged.
const MAX_PATH: usize = 200;

/// What a request's answers took, noted as each of them ends.
#[derive(Debug, Default)]
pub struct Tally(Mutex<Vec<(Usage, Timings)>>);

impl Tally {
    /// Notes an answer that is complete.
    pub fn note(&self, done: &Completion) {
        self.0.lock().push((done.usage, done.timings));
    }
}

/// Answers a request and logs that.
pub async fn answer(app: Arc<App>, request: Request<Incoming>) -> Response<Logged> {
    let id = id_of(request.headers());
    let mut line = Line::begin(&request, &id);
    let allowed = app.cors.allowed(request.headers());
    let mut reply = match app.cors.preflight(&request) {
        Some(reply) => reply,
        None => routes::answer(&app, request, &id, &line.tally).instrument(line.span.clone()).await,
    };
    app.cors.mark(allowed, reply.headers_mut());
    reply.headers_mut().insert(REQUEST_ID, HeaderValue::from_str(&id).expect("visible ASCII"));
    line.status = Some(reply.status());
    reply.map(|body| Logged { body, line })
}

/// The client's id, if it can stand in a header and in a line of a log; otherwise a new one.
fn id_of(headers: &HeaderMap) -> Arc<str> {
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    match given.filter(|id| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())) {
        Some(id) => id.into(),
        // The standard library's keys are random, and differ with each call.
        None => format!("req-{:016x}", RandomState::new().hash_one(0)).into(),
    }
}

/// The line of one request. It is logged on drop: then the answer has ended, or nobody waits for it any more.
#[derive(Debug)]
struct Line {
    span: Span,
    method: Method,
    path: String,
    began: Instant,
    /// `None` while there is no answer.
    status: Option<StatusCode>,
    n_bytes: usize,
    /// All of the body was handed to the connection.
    is_complete: bool,
    tally: Arc<Tally>,
}

impl Line {
    fn begin(request: &Request<Incoming>, id: &str) -> Self {
        // Not the query: it might hold what should stay with the client.
        let path = request.uri().path().chars().take(MAX_PATH).flat_map(char::escape_debug).collect();
        Self {
            span: span(id),
            method: request.method().clone(),
            path,
            began: Instant::now(),
            status: None,
            n_bytes: 0,
            is_complete: false,
            tally: Arc::default(),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let answers = self.tally.0.lock();
        let sum = |of: fn(&Usage) -> usize| (!answers.is_empty()).then(|| answers.iter().map(|(u, _)| of(u)).sum::<usize>());
        tracing::info!(
            parent: &self.span,
            method = %self.method,
            path = %self.path,
            status = self.status.map(|status| status.as_u16()),
            seconds = (self.began.elapsed().as_secs_f64() * 1e3).round() / 1e3,
            bytes = self.n_bytes,
            prompt_tokens = sum(|usage| usage.prompt_tokens),
            tokens = sum(|usage| usage.completion_tokens),
            "{}",
            if self.is_complete { "answered" } else { "aborted" },
        );
    }
}

/// An answer's body, whose end is logged.
#[derive(Debug)]
pub struct Logged {
    body: Content,
    line: Line,
}

impl Body for Logged {
    type Data = Bytes;
    type Error = <Content as Body>::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame {
            self.line.n_bytes += frame.data_ref().map_or(0, Buf::remaining);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        // Of HEAD's answer nobody asks for the body.
        self.line.is_complete = self.body.is_end_stream() || self.line.method == Method::HEAD;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_kept_if_it_is_short_and_visible() {
        let id = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            id_of(&headers)
        };
        let longest = "x".repeat(MAX_ID);
        for kept in ["a", "7f2b-{\"}~!", &longest] {
            assert_eq!(&*id(kept.as_bytes()), kept);
        }
        for odd in ["".as_bytes(), b"a b", b"tab\t", "\u{e9}".as_bytes(), "x".repeat(MAX_ID + 1).as_bytes()] {
            assert!(id(odd).starts_with("req-"), "{odd:?}");
        }
        assert_ne!(id_of(&HeaderMap::new()), id_of(&HeaderMap::new()));
    }
}
