//! Around every request: the id that its answer and all lines about it carry, and one line in the
//! log, and a trace, when the answer has ended.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use opentelemetry::trace::SpanContext;
use parking_lot::Mutex;
use tracing::{Instrument, Span};

use super::reply::Content;
use super::{App, routes};
use crate::request::{Completion, Usage, span};
use crate::telemetry::{self, Answer, Served};

/// Names a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken from a client.
const MAX_ID: usize = 128;
/// Characters of a path that are logged.
const MAX_PATH: usize = 200;

/// What a request's answers took, by choice, noted as each of them ends.
#[derive(Debug, Default)]
pub struct Tally(Mutex<Vec<Answer>>);

impl Tally {
    /// Notes that the next choice is asked of the engine.
    pub fn submit(&self) {
        self.0.lock().push(Answer { submitted: SystemTime::now(), done: None });
    }

    /// Notes that a choice is complete.
    pub fn note(&self, choice: usize, done: &Completion) {
        if let Some(answer) = self.0.lock().get_mut(choice) {
            answer.done = Some((done.usage, done.timings));
        }
    }
}

/// Answers a request and logs that.
pub async fn answer(app: Arc<App>, request: Request<Incoming>) -> Response<Logged> {
    let id = id_of(request.headers());
    let mut line = Line::begin(&app, &request, &id);
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
    match given
        .filter(|id| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()))
    {
        Some(id) => id.into(),
        None => format!("req-{:016x}", fastrand::u64(..)).into(),
    }
}

/// The line of one request. It is logged on drop: then the answer has ended, or nobody waits for it
/// any more.
struct Line {
    app: Arc<App>,
    id: Arc<str>,
    span: Span,
    method: Method,
    path: String,
    route: Option<&'static str>,
    parent: Option<SpanContext>,
    began: Instant,
    began_at: SystemTime,
    /// `None` while there is no answer.
    status: Option<StatusCode>,
    n_bytes: usize,
    /// All of the body was handed to the connection.
    is_complete: bool,
    tally: Arc<Tally>,
}

impl Line {
    fn begin(app: &Arc<App>, request: &Request<Incoming>, id: &Arc<str>) -> Self {
        // Not the query: it might hold what should stay with the client.
        let path =
            request.uri().path().chars().take(MAX_PATH).flat_map(char::escape_debug).collect();
        let parent = app.telemetry.as_ref().and_then(|_| telemetry::parent(request.headers()));
        Self {
            app: Arc::clone(app),
            id: Arc::clone(id),
            span: span(id),
            method: request.method().clone(),
            path,
            route: routes::known(request.uri().path()).map(|(path, _)| path),
            parent,
            began: Instant::now(),
            began_at: SystemTime::now(),
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
        let done = || answers.iter().filter_map(|answer| answer.done.as_ref());
        let sum = |of: fn(&Usage) -> usize| {
            done().next().map(|_| done().map(|(usage, _)| of(usage)).sum::<usize>())
        };
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
        if let Some(telemetry) = &self.app.telemetry {
            telemetry.record(&Served {
                id: &self.id,
                method: &self.method,
                path: &self.path,
                route: self.route,
                status: self.status,
                n_bytes: self.n_bytes,
                is_aborted: !self.is_complete,
                began: self.began_at,
                parent: self.parent.as_ref(),
                answers: &answers,
            });
        }
    }
}

/// An answer's body, whose end is logged.
pub struct Logged {
    body: Content,
    line: Line,
}

impl Body for Logged {
    type Data = Bytes;
    type Error = <Content as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
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
        for odd in [
            "".as_bytes(),
            b"a b",
            b"tab\t",
            "\u{e9}".as_bytes(),
            "x".repeat(MAX_ID + 1).as_bytes(),
        ] {
            assert!(id(odd).starts_with("req-"), "{odd:?}");
        }
        assert_ne!(id_of(&HeaderMap::new()), id_of(&HeaderMap::new()));
    }
}
