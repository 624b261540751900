//! What each path does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONNECTION, HeaderValue, RETRY_AFTER, VARY};
use hyper::{Request, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::access::Tally;
use super::generate::{self, Generate, Pieces};
use super::openai::read::Asked;
use super::openai::write::Envelope;
use super::openai::{self, Endpoint};
use super::reply::{self, Problem, Reply};
use super::tokens::{Spell, Telling};
use super::{App, docs, page};
use crate::chat::Template;
use crate::engine::{Handle, Layout, Stage, SubmitError};
use crate::error::Invalid;
use crate::llama;
use crate::metrics;
use crate::request::{self, Completion, Event, FinishReason, Piece};

/// Paths, and what they take.
pub const PATHS: [(&str, &str); 12] = [
    ("/", "GET, HEAD"),
    ("/health", "GET, HEAD"),
    ("/ready", "GET, HEAD"),
    ("/metrics", "GET, HEAD"),
    ("/generate", "POST"),
    ("/v1/models", "GET, HEAD"),
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/openapi.json", "GET, HEAD"),
    ("/docs", "GET, HEAD"),
    (DOCS_FILE, "GET, HEAD"),
    (PAGE_FILE, "GET, HEAD"),
];
/// Files of the page at `/docs`, and of the one at `/`.
const DOCS_FILE: &str = "/docs/{file}";
const PAGE_FILE: &str = "/page/{file}";

/// What is known of a request beside what it says.
struct Call<'a> {
    id: &'a Arc<str>,
    /// Whose it is.
    owner: u32,
    /// Longest time that a request may have.
    timeout: Option<Duration>,
    /// What its answers take.
    tally: &'a Arc<Tally>,
}

/// Answers one request.
pub async fn answer(
    app: &Arc<App>,
    request: Request<Incoming>,
    id: &Arc<str>,
    tally: &Arc<Tally>,
) -> Reply {
    // Its clients know errors by another shape.
    let is_openai = request.uri().path().starts_with("/v1");
    // A path that nobody knows must not become a label.
    let path = known(request.uri().path()).map_or("other", |(path, _)| path);
    let write = if is_openai { Problem::openai_reply } else { Problem::reply };
    let answer = match (page::answer(&request), app.auth.admit(&request)) {
        (Some(page), _) => Ok(page), // it asks for a key where it needs one
        (None, Ok(owner)) => {
            route(app, request, &Call { id, owner, timeout: app.limits.timeout, tally }).await
        }
        (None, Err(problem)) => Err(problem),
    };
    let reply = answer.unwrap_or_else(|problem| {
        app.metrics.count_refusal(problem.kind);
        write(problem)
    });
    app.metrics.count_answer(path, reply.status().as_u16());
    reply
}

/// The path of [`PATHS`] that this is, and what it takes.
pub fn known(path: &str) -> Option<(&'static str, &'static str)> {
    let path = match path {
        path if path.starts_with("/docs/") => DOCS_FILE,
        path if path.starts_with("/page/") => PAGE_FILE,
        path => path,
    };
    PATHS.into_iter().find(|(known, _)| *known == path)
}

async fn route(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
) -> Result<Reply, Problem> {
    let path = request.uri().path();
    let Some((path, allow)) = known(path) else { return Err(not_found(path)) };
    if !allow.split(", ").any(|allowed| allowed == request.method().as_str()) {
        let message = format!("{path} takes {allow}");
        let mut problem =
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
        problem.header = Some((ALLOW, allow));
        return Err(problem);
    }
    match path {
        "/" => information(app),
        "/health" => Ok(health(app)),
        "/ready" => Ok(ready(app)),
        "/metrics" => Ok(reply::plain(metrics::CONTENT_TYPE, app.metrics.text())),
        "/openapi.json" => Ok(reply::plain("application/json", app.openapi.clone())),
        "/docs" => docs("").ok_or_else(|| not_found(path)),
        DOCS_FILE => {
            let path = request.uri().path();
            let file =
                path.strip_prefix("/docs/").filter(|file| !file.is_empty()).unwrap_or("index.html");
            docs(file).ok_or_else(|| not_found(path))
        }
        "/v1/models" => models(app),
        "/v1/completions" => complete(app, request, call, Endpoint::Text).await,
        "/v1/chat/completions" => complete(app, request, call, Endpoint::Chat).await,
        "/generate" => generate(app, request, call).await,
        _ => Err(not_found(request.uri().path())),
    }
}

fn not_found(path: &str) -> Problem {
    let shown: String = path.chars().take(100).collect();
    let message =
        format!("there is no {shown}; there are {}", PATHS.map(|(path, _)| path).join(", "));
    Problem::new(StatusCode::NOT_FOUND, "not_found", message)
}

fn docs(file: &str) -> Option<Reply> {
    docs::file(file).map(|(bytes, content_type)| reply::plain(&content_type, bytes))
}

/// Whether the process is to be left alone: only one whose engine has failed is worth a restart.
fn health(app: &App) -> Reply {
    let status = status(app);
    let code = if status == "failed" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    reply::json(code, &json!({ "status": status }))
}

/// Whether work may be sent here now.
fn ready(app: &App) -> Reply {
    let status = status(app);
    if status == "ok" {
        return reply::json(StatusCode::OK, &json!({ "status": status }));
    }
    let mut reply = reply::json(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": status }));
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    reply
}

fn status(app: &App) -> &'static str {
    match &*app.stage.borrow() {
        Stage::Failed(_) => "failed",
        _ if app.draining.load(Ordering::Relaxed) => "draining",
        Stage::Loading(_) => "loading",
        Stage::Ready(_) => "ok",
    }
}

/// The engine, if it takes work.
fn engine(app: &App) -> Result<Handle, Problem> {
    let unavailable = |kind, message: &str| {
        let mut problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, kind, message);
        problem.header = Some((RETRY_AFTER, "1"));
        problem
    };
    if app.draining.load(Ordering::Relaxed) {
        return Err(unavailable(
            "draining",
            "the server is shutting down and takes no new requests",
        ));
    }
    match &*app.stage.borrow() {
        Stage::Ready(handle) => Ok(handle.clone()),
        Stage::Loading(_) => Err(unavailable(
            "loading",
            "the model is still loading; GET /ready tells when it takes work",
        )),
        Stage::Failed(_) => Err(unavailable("stopped", "the engine has stopped")),
    }
}

fn information(app: &App) -> Result<Reply, Problem> {
    let mut body = json!({
        "name": "medusa-llama",
        "version": env!("CARGO_PKG_VERSION"),
        "llama_cpp": llama::version(),
        "backend": if llama::supports_gpu_offload() { "cuda" } else { "cpu" },
        "endpoints": PATHS.map(|(path, allow)| format!("{} {path}", allow.split(',').next().unwrap_or(allow))),
    });
    let stage = app.stage.borrow().clone();
    if let Stage::Loading(progress) = stage {
        body["loading"] = progress.into();
    }
    if let Stage::Ready(handle) = stage {
        let (model, limits, load) = (handle.model(), handle.limits(), handle.stats());
        body["model"] = json!({
            "name": model.name(),
            "quantization": model.quantization(),
            "parameters": model.n_params(),
            "size_bytes": model.size_bytes(),
            "n_ctx_train": model.n_ctx_train(),
            "n_vocab": model.n_vocab(),
        });
        body["context_size"] = limits.n_ctx.into();
        body["slots"] = limits.n_slots.into();
        body["kv"] = match limits.layout {
            Layout::Unified { n_cells, .. } => json!({ "layout": "unified", "cells": n_cells }),
            Layout::Streams { n_cells } => {
                json!({ "layout": "streams", "cells": n_cells * limits.n_slots })
            }
        };
        body["heads"] = handle.n_heads().into();
        body["text_drafts"] = handle.drafts_from_text().into();
        body["drafting_on"] = handle.side().name().into();
        body["load"] = json!({
            "in_flight": handle.n_in_flight(),
            "running": load.running,
            "waiting": load.waiting,
            "kv_cells_running": load.cells_active,
            "kv_cells_kept": load.cells_retained,
            "steps": load.steps,
            "tokens_generated": load.tokens,
        });
    }
    let mut reply = reply::json(StatusCode::OK, &body);
    reply.headers_mut().insert(VARY, HeaderValue::from_name(ACCEPT)); // browsers get the page
    Ok(reply)
}

async fn generate(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
) -> Result<Reply, Problem> {
    let handle = engine(app)?;
    let body = read_json(app, request).await?;
    let asked = generate::read(body, handle.limits().n_ctx, fastrand::u64(..)).map_err(invalid)?;
    let Generate { request, stream } = asked;
    let spell = request.report.map(|_| spell(&handle));
    let mut events = submit(&handle, request, call).await.map_err(refused)?;
    if stream {
        let first = first_event(&mut events).await?;
        return Ok(reply::stream(
            first,
            vec![events],
            Box::new(Pieces(spell)),
            Arc::clone(call.tally),
        ));
    }
    let (whole, done) = collect(events, 0, call).await?;
    if is_too_late(&done) {
        return Err(too_late());
    }
    Ok(reply::json(StatusCode::OK, &generate::completion(&done, &whole, spell.as_ref())))
}

fn models(app: &App) -> Result<Reply, Problem> {
    let handle = engine(app)?;
    Ok(reply::json(StatusCode::OK, &openai::models(&app.model_id, handle.limits().n_ctx)))
}

async fn complete(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
    endpoint: Endpoint,
) -> Result<Reply, Problem> {
    let bad_request = |error| Problem { status: StatusCode::BAD_REQUEST, ..invalid(error) };
    let handle = engine(app)?;
    let body = read_json(app, request).await?;
    let template = app.template.get_or_init(|| Template::of(handle.model()));
    let asked =
        openai::read::read(endpoint, body, handle.limits().n_ctx, fastrand::u64(..), template);
    let Asked { requests, n, stream, include_usage } = asked.map_err(bad_request)?;
    let (asked_for, most) = (requests.len(), handle.most_in_flight());
    if asked_for > most {
        // Not a full queue: waiting would not help.
        let message = format!(
            "n and the prompts ask for {asked_for} answers, but the server takes {most} at once"
        );
        return Err(bad_request(Invalid::new("n", message)));
    }
    let report = requests.first().and_then(|r| r.report).unwrap_or_default();
    let telling = Telling {
        logprobs: report.n_top.is_some(),
        details: report.details,
        spell: spell(&handle),
    };
    let mut choices = Vec::with_capacity(requests.len());
    for request in requests {
        // Those that were taken are cancelled if one is refused.
        choices.push(submit(&handle, request, call).await.map_err(|error| match error {
            SubmitError::Invalid(error) => bad_request(error),
            other => refused(other),
        })?);
    }
    let envelope = Envelope::new(endpoint, app.model_id.clone(), n, telling);
    if stream {
        let first = first_event(&mut choices[0]).await?;
        let chunks = envelope.chunks(choices.len(), include_usage);
        return Ok(reply::stream(first, choices, Box::new(chunks), Arc::clone(call.tally)));
    }
    let mut done = Vec::with_capacity(choices.len());
    for (choice, events) in choices.into_iter().enumerate() {
        done.push(collect(events, choice, call).await?);
    }
    if done.iter().all(|(_, done)| is_too_late(done)) {
        return Err(too_late());
    }
    Ok(reply::json(StatusCode::OK, &envelope.answer(&done)))
}

/// How this model's tokens are written.
fn spell(handle: &Handle) -> Spell {
    let handle = handle.clone();
    Arc::new(move |token| {
        let mut bytes = Vec::new();
        handle.model().piece(token, true, &mut bytes);
        bytes
    })
}

/// The request's time was over before its first token.
fn is_too_late(done: &Completion) -> bool {
    done.finish_reason == FinishReason::Deadline && done.usage.completion_tokens == 0
}

fn too_late() -> Problem {
    let message = "the request's time was over before its first token; the server may be busy, or timeout_s too short";
    Problem::new(StatusCode::REQUEST_TIMEOUT, "deadline", message)
}

/// Hands over what a body asks for, in the name of who sent it.
async fn submit(
    handle: &Handle,
    asked: request::Request,
    call: &Call<'_>,
) -> Result<mpsc::Receiver<Event>, SubmitError> {
    call.tally.submit();
    // A request may give itself less time than the server gives any, but not more.
    let timeout = asked.timeout.into_iter().chain(call.timeout).min();
    handle
        .submit(request::Request { id: Arc::clone(call.id), owner: call.owner, timeout, ..asked })
        .await
}

/// An error before the first piece is still a plain one.
async fn first_event(events: &mut mpsc::Receiver<Event>) -> Result<Event, Problem> {
    match events.recv().await {
        Some(Event::Failed { id }) => Err(Problem::incident(&id)),
        Some(Event::Done(done)) if is_too_late(&done) => Err(too_late()),
        Some(first) => Ok(first),
        None => Err(Problem::incident("engine-stopped")),
    }
}

/// A whole answer.
async fn collect(
    mut events: mpsc::Receiver<Event>,
    choice: usize,
    call: &Call<'_>,
) -> Result<(Piece, Completion), Problem> {
    let mut whole = Piece::default();
    while let Some(event) = events.recv().await {
        match event {
            Event::Piece(piece) => whole.append(piece),
            Event::Done(mut done) => {
                whole.append(std::mem::take(&mut done.tail));
                call.tally.note(choice, &done);
                return Ok((whole, done));
            }
            Event::Failed { id } => return Err(Problem::incident(&id)),
        }
    }
    Err(Problem::incident("engine-stopped"))
}

async fn read_json(app: &App, request: Request<Incoming>) -> Result<Value, Problem> {
    let body = read_body(app, request).await?;
    serde_json::from_slice(&body).map_err(|e| {
        Problem::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {e}"))
    })
}

async fn read_body(app: &App, request: Request<Incoming>) -> Result<Bytes, Problem> {
    let limit = app.limits.max_body_bytes;
    let too_large = || {
        let message = format!("the body is larger than {limit} bytes");
        let mut problem = Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message);
        problem.header = Some((CONNECTION, "close")); // the rest of the body is not worth reading
        problem
    };
    // What is announced need not be sent.
    let announced = hyper::body::Body::size_hint(request.body()).exact();
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), limit).collect();
    match tokio::time::timeout(app.limits.read_timeout, body).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "broken_body",
            format!("the body could not be read: {e}"),
        )),
        Err(_) => {
            let mut problem = Problem::new(
                StatusCode::REQUEST_TIMEOUT,
                "timeout",
                "the body took too long to arrive",
            );
            problem.header = Some((CONNECTION, "close"));
            Err(problem)
        }
    }
}

fn invalid(error: Invalid) -> Problem {
    let mut problem =
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request", error.message);
    problem.param = error.param;
    problem
}

fn refused(error: SubmitError) -> Problem {
    match error {
        SubmitError::Invalid(error) => invalid(error),
        SubmitError::QueueFull { .. } => {
            let mut problem =
                Problem::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", error.to_string());
            problem.header = Some((RETRY_AFTER, "1"));
            problem
        }
        SubmitError::Stopped => {
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "stopped", error.to_string())
        }
    }
}
