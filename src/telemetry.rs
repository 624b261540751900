//! Traces for OpenTelemetry: a span for each request that has ended, with a child span for each stage
//! of each choice.
//!
//! A thread of OpenTelemetry's SDK sends spans in batches over OTLP (HTTP, protobuf). A slow or
//! absent collector loses spans and nothing else: the queue is bounded. OpenTelemetry's crates read `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use parking_lot::Mutex;
use tokio::net::TcpStream;

use crate::request::{Timings, Usage};

/// A collector's path for traces.
const PATH: &str = "/v1/traces";
/// Time limits to send a batch, and to send what is left at the end.
const SENDING: Duration = Duration::from_secs(5);
const FLUSH: Duration = Duration::from_secs(3);
const MAX_ANSWER: usize = 1 << 16; // bytes

/// A request that was served, or left.
pub(crate) struct Served {
    pub id: Arc<str>,
    pub method: Method,
    /// The request's, or its beginning.
    pub path: String,
    pub route: Option<&'static str>,
    /// `None` while there is no answer.
    pub status: Option<StatusCode>,
    /// Of the answer's body.
    pub n_bytes: usize,
    /// All of the body was handed to the connection.
    pub is_complete: bool,
    pub began: SystemTime,
    /// Holds the span it is a part of, if any; otherwise it begins a trace.
    pub parent: Context,
}

/// One choice of a request, as the engine answered it.
pub struct ChoiceRecord {
    /// The model that answers.
    pub model: Arc<str>,
    /// When it was submitted.
    pub submitted: SystemTime,
    /// What it took; `None` if it did not come to its end.
    pub done: Option<(Usage, Timings)>,
}

impl ChoiceRecord {
    /// Of a choice that is submitted now.
    pub fn new(model: &Arc<str>) -> Self {
        Self { model: Arc::clone(model), submitted: SystemTime::now(), done: None }
    }
}

/// A request's choices, each added when it is submitted and completed when it ends.
pub type ChoiceRecords = Mutex<Vec<ChoiceRecord>>;

/// Tokens of the prompts and answers of all complete choices; `None` if there is none.
pub(crate) fn tokens(choices: &[ChoiceRecord]) -> Option<(usize, usize)> {
    let usages = choices.iter().filter_map(|choice| Some(choice.done?.0));
    let counts = usages.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
    counts.reduce(|a, b| (a.0 + b.0, a.1 + b.1))
}

/// Where spans go.
pub struct Telemetry {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Telemetry {
    /// Begins to send traces to the collector at `endpoint`, on the current runtime, unless the endpoint
    /// or OpenTelemetry's environment variables are invalid.
    pub fn start(endpoint: &Uri) -> Result<Self, String> {
        let base = endpoint.to_string();
        let runtime = tokio::runtime::Handle::current();
        let collector = Collector { runtime, is_down: AtomicBool::new(false) };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(collector)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}{PATH}", base.trim_end_matches('/')))
            .with_timeout(SENDING)
            .build()
            .map_err(|error| {
                format!("traces cannot be sent to OTEL_EXPORTER_OTLP_ENDPOINT {base}: {error}")
            })?;
        let mut resource = Resource::builder()
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("medusa-llama");
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        Ok(Self { tracer: provider.tracer("medusa-llama"), provider })
    }

    /// Queues the spans of a request and of its choices.
    pub(crate) fn record(&self, served: &Served, choices: &[ChoiceRecord]) {
        let method = served.method.as_str();
        let name = served.route.map_or(method.to_owned(), |route| format!("{method} {route}"));
        let span = self.tracer.span_builder(name).with_kind(SpanKind::Server);
        let span =
            span.with_start_time(served.began).with_attributes(self.attributes(served, choices));
        let mut span = span.start_with_context(&self.tracer, &served.parent);
        if served.status.is_some_and(|status| status.is_server_error()) {
            span.set_status(Status::error(""));
        }
        let below = Context::new().with_remote_span_context(span.span_context().clone());
        for (choice, record) in choices.iter().enumerate() {
            let Some((_, timings)) = record.done else { continue };
            let mut at = record.submitted;
            for (name, seconds) in [
                ("queue", timings.queue_s),
                ("prefill", timings.prefill_s),
                ("decode", timings.decode_s),
            ] {
                let stage = self.tracer.span_builder(name).with_start_time(at);
                let stage = stage.with_attributes([KeyValue::new("medusa.choice", choice as i64)]);
                at += Duration::from_secs_f64(seconds);
                stage.start_with_context(&self.tracer, &below).end_with_timestamp(at);
            }
        }
        span.end();
    }

    /// Names are those of OpenTelemetry's semantic conventions, where they have one.
    fn attributes(&self, served: &Served, choices: &[ChoiceRecord]) -> Vec<KeyValue> {
        let mut attributes = vec![
            KeyValue::new("http.request.method", served.method.to_string()),
            KeyValue::new("url.path", served.path.clone()),
            KeyValue::new("http.response.body.size", served.n_bytes as i64),
            KeyValue::new("medusa.request.id", served.id.to_string()),
        ];
        let status = served.status.map(|status| i64::from(status.as_u16()));
        attributes.extend(served.route.map(|route| KeyValue::new("http.route", route)));
        attributes.extend(status.map(|status| KeyValue::new("http.response.status_code", status)));
        if !served.is_complete {
            attributes.push(KeyValue::new("error.type", "aborted"));
        }
        if let Some(first) = choices.first() {
            let (prompt, completion) = tokens(choices).unwrap_or_default();
            attributes.push(KeyValue::new("gen_ai.response.model", first.model.to_string()));
            attributes.push(KeyValue::new("gen_ai.usage.input_tokens", prompt as i64));
            attributes.push(KeyValue::new("gen_ai.usage.output_tokens", completion as i64));
        }
        attributes
    }

    /// Sends what is left, for a short while. Blocks.
    pub fn stop(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// The context of a request with these headers: it holds the span that a valid `traceparent` names.
pub(crate) fn parent(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers))
}

/// The client of a collector. OpenTelemetry's thread, which calls it, has no runtime: it lends one.
#[derive(Debug)]
struct Collector {
    runtime: tokio::runtime::Handle,
    /// Logged once, until it is up again.
    is_down: AtomicBool,
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent =
            self.runtime.spawn(async { tokio::time::timeout(SENDING, send(request)).await }).await;
        let sent = sent.map_err(HttpError::from).and_then(|in_time| in_time?);
        let is_down = !sent.as_ref().is_ok_and(|answer| answer.status().is_success());
        let was_down = self.is_down.swap(is_down, Ordering::Relaxed);
        match &sent {
            _ if is_down == was_down => {}
            Err(error) => {
                tracing::warn!(%error, "traces cannot be sent: they are lost until the collector answers");
            }
            Ok(answer) if is_down => {
                let status = answer.status().as_u16();
                tracing::warn!(status, "the collector refuses traces: they are lost");
            }
            Ok(_) => tracing::info!("traces are sent again"),
        }
        sent
    }
}

/// One request, on a connection of its own: there is one every few seconds.
async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut parts, body) = request.into_parts();
    let authority = parts.uri.authority().ok_or("no host")?.clone();
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection); // it ends with `sender`
    parts.headers.insert(HOST, HeaderValue::from_str(authority.as_str())?);
    parts.uri = parts.uri.path_and_query().map_or(PATH, |path| path.as_str()).parse()?;
    let answer = sender.send_request(Request::from_parts(parts, Full::new(body))).await?;
    let (parts, body) = answer.into_parts();
    Ok(Response::from_parts(parts, Limited::new(body, MAX_ANSWER).collect().await?.to_bytes()))
}
