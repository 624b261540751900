//! Traces for OpenTelemetry: of each request one span, when its answer has ended, with what it
//! spent where below it.
//!
//! Spans go to a collector over OTLP (HTTP, protobuf) in batches, from a thread of their own. A
//! collector that is slow or not there costs its spans and nothing else: the queue before it is
//! bounded. OpenTelemetry's own crates read `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*`.

use std::fmt;
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
use opentelemetry::trace::{
    Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::net::TcpStream;

use crate::request::{Timings, Usage};

/// Where a collector takes traces, below its address.
const PATH: &str = "/v1/traces";
/// Longest time that a batch may take, and that spans have at the end to leave.
const SENDING: Duration = Duration::from_secs(5);
const FLUSH: Duration = Duration::from_secs(3);
/// Longest answer of a collector, in bytes.
const MAX_ANSWER: usize = 1 << 16;

/// A request that was served, or left.
#[derive(Debug)]
pub struct Served {
    /// Its id.
    pub id: Arc<str>,
    /// As it was asked.
    pub method: Method,
    /// As it was asked, or its beginning.
    pub path: String,
    /// The path, if it is one of the server's.
    pub route: Option<&'static str>,
    /// `None` while there is no answer.
    pub status: Option<StatusCode>,
    /// Of the answer's body.
    pub n_bytes: usize,
    /// All of the body was handed to the connection.
    pub is_complete: bool,
    /// When its head had arrived.
    pub began: SystemTime,
    /// Of whose trace it is a part; else it begins one.
    pub parent: Option<SpanContext>,
}

/// One choice of a request, as the engine answered it.
#[derive(Clone, Copy, Debug)]
pub struct ChoiceRecord {
    /// When it was submitted.
    pub submitted: SystemTime,
    /// What it took; `None` if it did not come to its end.
    pub done: Option<(Usage, Timings)>,
}

/// Tokens of the prompts and answers of all complete choices; `None` if there is none.
#[must_use]
pub fn tokens(choices: &[ChoiceRecord]) -> Option<(usize, usize)> {
    let usages = choices.iter().filter_map(|choice| Some(choice.done?.0));
    usages
        .map(|usage| (usage.prompt_tokens, usage.completion_tokens))
        .reduce(|a, b| (a.0 + b.0, a.1 + b.1))
}

/// Where spans go.
pub struct Telemetry {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    model: String,
}

impl Telemetry {
    /// Begins to send, from the runtime this is called in. `endpoint` is a collector's address,
    /// `model` the name of what is served.
    ///
    /// # Errors
    /// When what the environment says of OpenTelemetry cannot be.
    pub fn start(endpoint: &Uri, model: &str) -> Result<Self, String> {
        let base = endpoint.to_string();
        let collector = Collector {
            runtime: tokio::runtime::Handle::current(),
            is_down: AtomicBool::new(false),
        };
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
        Ok(Self { tracer: provider.tracer("medusa-llama"), provider, model: model.to_owned() })
    }

    /// Takes the spans of a request and of its choices; they are sent later.
    pub fn record(&self, served: &Served, choices: &[ChoiceRecord]) {
        let name = served.route.map_or_else(
            || served.method.to_string(),
            |route| format!("{} {route}", served.method),
        );
        let parent = served
            .parent
            .clone()
            .map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent));
        let span = self
            .tracer
            .span_builder(name)
            .with_kind(SpanKind::Server)
            .with_start_time(served.began);
        let mut span = span
            .with_attributes(self.attributes(served, choices))
            .start_with_context(&self.tracer, &parent);
        if served.status.is_some_and(|status| status.is_server_error()) {
            span.set_status(Status::error(""));
        }
        let below = Context::new().with_remote_span_context(span.span_context().clone());
        for (choice, record) in choices.iter().enumerate() {
            self.record_stages(choice, record, &below);
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
        if let Some(route) = served.route {
            attributes.push(KeyValue::new("http.route", route));
        }
        if let Some(status) = served.status {
            attributes.push(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
        }
        if !served.is_complete {
            attributes.push(KeyValue::new("error.type", "aborted"));
        }
        if !choices.is_empty() {
            let (prompt, completion) = tokens(choices).unwrap_or_default();
            attributes.push(KeyValue::new("gen_ai.response.model", self.model.clone()));
            attributes.push(KeyValue::new("gen_ai.usage.input_tokens", prompt as i64));
            attributes.push(KeyValue::new("gen_ai.usage.output_tokens", completion as i64));
        }
        attributes
    }

    fn record_stages(&self, choice: usize, record: &ChoiceRecord, below: &Context) {
        let Some((_, timings)) = record.done else { return };
        let mut at = record.submitted;
        for (name, seconds) in [
            ("queue", timings.queue_s),
            ("prefill", timings.prefill_s),
            ("decode", timings.decode_s),
        ] {
            let span = self.tracer.span_builder(name).with_start_time(at);
            let span = span.with_attributes([KeyValue::new("medusa.choice", choice as i64)]);
            at += Duration::from_secs_f64(seconds);
            span.start_with_context(&self.tracer, below).end_with_timestamp(at);
        }
    }

    /// Sends what is left, for a short while. Blocks.
    pub fn stop(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").field("model", &self.model).finish_non_exhaustive()
    }
}

/// Of whose trace a request is a part: its `traceparent`, if it has a valid one.
#[must_use]
pub fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    Some(context.span().span_context().clone()).filter(SpanContext::is_valid)
}

/// The way to a collector. OpenTelemetry's thread calls it and has no runtime: the network's own
/// does the work.
#[derive(Debug)]
struct Collector {
    runtime: tokio::runtime::Handle,
    /// Told once, until it is up again.
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
    let stream = TcpStream::connect((
        authority.host().trim_matches(['[', ']']),
        authority.port_u16().unwrap_or(80),
    ))
    .await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection); // it ends with `sender`
    parts.headers.insert(HOST, HeaderValue::from_str(authority.as_str())?);
    parts.uri = parts.uri.path_and_query().map_or(PATH, |path| path.as_str()).parse()?;
    let answer = sender.send_request(Request::from_parts(parts, Full::new(body))).await?;
    let (parts, body) = answer.into_parts();
    Ok(Response::from_parts(parts, Limited::new(body, MAX_ANSWER).collect().await?.to_bytes()))
}
