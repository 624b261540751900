//! Around every request: the id that its answer and all its log lines carry; when the answer has
//! ended, a line in the access log and a trace.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use tracing::{Instrument, Span};

use super::app::App;
use super::reply::Content;
use super::routes;
use crate::request::span;
use crate::telemetry::{self, ChoiceRecords, Served};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_ID: usize = 128; // bytes
const MAX_PATH: usize = 200; // characters in the log

/// Handles a request. Its line is logged when the answer has ended.
pub async fn log_access(app: Arc<App>, request: Request<Incoming>) -> Response<Logged> {
    let id = id_of(request.headers());
    let decoded = routes::decoded(request.uri().path()).into_owned();
    let route = routes::find(&decoded);
    // Not the query: it might hold what should stay with the client.
    let path = request.uri().path().chars().take(MAX_PATH);
    let served = Served {
        id: Arc::clone(&id),
        method: request.method().clone(),
        path: path.flat_map(char::escape_debug).collect(),
        route: route.map(|route| route.path.as_str()),
        status: None,
        n_bytes: 0,
        is_complete: false,
        began: SystemTime::now(),
        parent: app
            .telemetry
            .as_ref()
            .map(|_| telemetry::parent(request.headers()))
            .unwrap_or_default(),
    };
    let mut line = Line {
        app: Arc::clone(&app),
        span: span(&id),
        began: Instant::now(),
        served,
        record: Arc::default(),
    };
    let allowed = app.cors.allowed(request.headers());
    let mut reply = routes::dispatch(&app, &decoded, route, request, &id, &line.record)
        .instrument(line.span.clone())
        .await;
    app.cors.mark(allowed, reply.headers_mut());
    reply.headers_mut().insert(REQUEST_ID, HeaderValue::from_str(&id).expect("visible ASCII"));
    line.served.status = Some(reply.status());
    reply.map(|body| Logged { body, line })
}

/// The client's id, if it fits in a header and in a line of a log; otherwise a new one.
fn id_of(headers: &HeaderMap) -> Arc<str> {
    let fits =
        |id: &&str| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(fits);
    given.map_or_else(|| format!("req-{:016x}", fastrand::u64(..)).into(), Into::into)
}

/// The log line of one request. It is written on drop: the answer has ended, or its client left.
struct Line {
    app: Arc<App>,
    span: Span,
    began: Instant,
    served: Served,
    record: Arc<ChoiceRecords>,
}

impl Drop for Line {
    fn drop(&mut self) {
        let (served, choices) = (&self.served, self.record.lock());
        let tokens = telemetry::tokens(&choices);
        tracing::info!(
            parent: &self.span,
            method = %served.method,
            path = %served.path,
            status = served.status.map(|status| status.as_u16()),
            seconds = (self.began.elapsed().as_secs_f64() * 1e3).round() / 1e3,
            bytes = served.n_bytes,
            prompt_tokens = tokens.map(|(prompt, _)| prompt),
            tokens = tokens.map(|(_, completion)| completion),
            "{}",
            if served.is_complete { "answered" } else { "aborted" },
        );
        if let Some(telemetry) = &self.app.telemetry {
            telemetry.record(served, &choices);
        }
    }
}

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
            self.line.served.n_bytes += frame.data_ref().map_or(0, Buf::remaining);
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
        self.line.served.is_complete =
            self.body.is_end_stream() || self.line.served.method == Method::HEAD;
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
        let too_long = "x".repeat(MAX_ID + 1);
        for odd in ["", "a b", "tab\t", "\u{e9}", &too_long] {
            assert!(id(odd.as_bytes()).starts_with("req-"), "{odd:?}");
        }
        assert_ne!(id_of(&HeaderMap::new()), id_of(&HeaderMap::new()));
    }
}
