//! How the server is, for orchestrators and for Prometheus.

use bytes::Bytes;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue, RETRY_AFTER, VARY};
use hyper::{Request, StatusCode};

use super::accept::quality;
use super::api::answers::ErrorBody;
use super::api::information::{Health, HealthStatus};
use super::app::RequestContext;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::metrics::Format;

/// Whether the server is alive
///
/// An orchestrator restarts the server when this fails: only where the engine has failed. A pass
/// that does not end (`stalled`) fails `/ready` alone. It may be a slow one, and a restart would
/// drop every request and then run the same pass again; whoever wants one can act on the status.
#[utoipa::path(get, path = "/health", tag = "server", responses(
    (status = 200, description = "It is: `ok`, `loading`, `draining` or `stalled`", body = Health),
    (status = 503, description = "Its engine has `failed`", body = Health),
))]
pub async fn health(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    let status = cx.app.status();
    let is_dead = status == HealthStatus::Failed;
    let code = if is_dead { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    Ok(reply::json(code, &Health { status }))
}

/// Whether the server is alive, below OpenAI's base path
#[utoipa::path(get, path = "/v1/health", tag = "openai", responses(
    (status = 200, description = "It is: `ok`, `loading`, `draining` or `stalled`", body = Health),
    (status = 503, description = "Its engine has `failed`", body = Health),
))]
pub async fn v1_health(cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    health(cx, request).await
}

/// Whether requests are taken
#[utoipa::path(get, path = "/ready", tag = "server", responses(
    (status = 200, description = "They are", body = Health),
    (status = 503, description = "Not yet, or no more: `loading`, `draining`, `failed`, or `stalled`, while a forward pass takes too long; `Retry-After` says when to ask again", body = Health),
))]
pub async fn ready(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    let status = cx.app.status();
    if status == HealthStatus::Ok {
        return Ok(reply::json(StatusCode::OK, &Health { status }));
    }
    let mut reply = reply::json(StatusCode::SERVICE_UNAVAILABLE, &Health { status });
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    Ok(reply)
}

/// Metrics for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "server", responses(
    (status = 200, description = "Prometheus' text format, or OpenMetrics for a client that accepts it", content(
        (String = "text/plain; version=0.0.4; charset=utf-8"),
        (String = "application/openmetrics-text; version=1.0.0; charset=utf-8"),
    )),
    (status = 401, description = "The server asks for a key, and there is none or a wrong one", body = ErrorBody),
    (status = 404, description = "Metrics are off", body = ErrorBody),
))]
pub async fn metrics(cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let format = format(request.headers());
    let text = cx.app.metrics.text(format, &cx.app.models.loaded());
    let mut reply = reply::whole(StatusCode::OK, format.content_type(), text);
    reply.headers_mut().insert(VARY, HeaderValue::from_name(ACCEPT));
    Ok(reply)
}

/// OpenMetrics for clients that name it and do not want the classic format more, as Prometheus'
/// own libraries choose.
fn format(headers: &HeaderMap) -> Format {
    let (weight, specificity) = quality(headers, "application", "openmetrics-text");
    let is_named = specificity == 2 && weight >= quality(headers, "text", "plain").0;
    if is_named { Format::OpenMetrics } else { Format::Classic }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_are_for_those_who_name_them() {
        let cases = [
            ("", Format::Classic),
            ("*/*", Format::Classic),
            ("application/*", Format::Classic),
            ("text/plain", Format::Classic),
            ("application/openmetrics-text;q=0", Format::Classic),
            ("application/openmetrics-text;q=0.1,text/plain", Format::Classic),
            ("application/openmetrics-text", Format::OpenMetrics),
            // Prometheus 2 and 3.
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Format::OpenMetrics,
            ),
        ];
        for (accept, expected) in cases {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(format(&headers), expected, "{accept}");
        }
    }
}
