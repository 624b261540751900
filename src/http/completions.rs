//! The handlers of requests for text: a body to the engine's requests, their events to an answer.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use serde_json::Value;
use tokio::sync::mpsc;

use super::app::{App, RequestContext};
use super::generate::{self, Generate, Pieces};
use super::openai::read::Asked;
use super::openai::write::Envelope;
use super::openai::{self, Endpoint};
use super::openapi::answers::{
    ChatCompletion, Completion as CompletionBody, GenerateAnswer, StreamEvent,
};
use super::openapi::requests::{ChatRequest, CompletionRequest, GenerateRequest};
use super::problem::Problem;
use super::reply::{self, Reply};
use super::template::ChatTemplate;
use super::tokens::{Spell, Telling};
use crate::engine::Handle;
use crate::error::Invalid;
use crate::request::{self, Completion, Event, FinishReason, Piece};

/// Text from a prompt
#[utoipa::path(post, path = "/generate", tag = "text", request_body = GenerateRequest, responses(
    (status = 200, description = "The text. A stream has events `{\"generated_text\": piece}`, and a last one like the whole answer; an \
     error after the first piece is an `event: error`", content(
        (GenerateAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn generate(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let body = read_json(&cx.app, request).await?;
    let asked = generate::read(body, handle.limits().n_ctx, fastrand::u64(..))?;
    let Generate { request, stream } = asked;
    let spell = request.report.map(|_| spell(&handle));
    let mut events = submit(&handle, request, &cx).await?;
    if stream {
        let first = first_event(&mut events).await?;
        return Ok(reply::stream(first, vec![events], Box::new(Pieces(spell)), cx.record));
    }
    let (whole, done) = collect(events, 0, &cx).await?;
    if is_too_late(&done) {
        return Err(Problem::Deadline);
    }
    Ok(reply::json(StatusCode::OK, &generate::completion(&done, &whole, spell.as_ref())))
}

/// Text from prompts, as OpenAI has it
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest, responses(
    (status = 200, description = "The texts, or a stream of chunks that ends with `data: [DONE]`", content(
        (CompletionBody = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn complete(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    answer_openai(cx, request, Endpoint::Text).await
}

/// Answers to messages, as OpenAI has it
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest, responses(
    (status = 200, description = "The answers, or a stream of chunks that ends with `data: [DONE]`", content(
        (ChatCompletion = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn chat(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    answer_openai(cx, request, Endpoint::Chat).await
}

async fn answer_openai(
    cx: RequestContext,
    request: Request<Incoming>,
    endpoint: Endpoint,
) -> Result<Reply, Problem> {
    let app = &cx.app;
    let handle = app.engine()?;
    let body = read_json(app, request).await?;
    let template = app.template.get_or_init(|| ChatTemplate::of(handle.model()));
    let asked =
        openai::read::read(endpoint, body, handle.limits().n_ctx, fastrand::u64(..), template);
    let Asked { requests, n, stream, include_usage } = asked?;
    let (asked_for, most) = (requests.len(), handle.most_in_flight());
    if asked_for > most {
        // Not a full queue: waiting would not help.
        let message = format!(
            "n and the prompts ask for {asked_for} answers, but the server takes {most} at once"
        );
        return Err(Invalid::new("n", message).into());
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
        choices.push(submit(&handle, request, &cx).await?);
    }
    let envelope = Envelope::new(endpoint, app.model_id.clone(), n, telling);
    if stream {
        let first = first_event(&mut choices[0]).await?;
        let chunks = envelope.chunks(choices.len(), include_usage);
        return Ok(reply::stream(first, choices, Box::new(chunks), cx.record));
    }
    let mut done = Vec::with_capacity(choices.len());
    for (choice, events) in choices.into_iter().enumerate() {
        done.push(collect(events, choice, &cx).await?);
    }
    if done.iter().all(|(_, done)| is_too_late(done)) {
        return Err(Problem::Deadline);
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

/// Hands over what a body asks for, in the name of who sent it.
async fn submit(
    handle: &Handle,
    asked: request::Request,
    cx: &RequestContext,
) -> Result<mpsc::Receiver<Event>, Problem> {
    cx.record.submit();
    // A request may give itself less time than the server gives any, but not more.
    let timeout = asked.timeout.into_iter().chain(cx.app.limits.timeout).min();
    let request = request::Request { id: Arc::clone(&cx.id), owner: cx.tenant, timeout, ..asked };
    Ok(handle.submit(request).await?)
}

/// An error before the first piece is still a plain one.
async fn first_event(events: &mut mpsc::Receiver<Event>) -> Result<Event, Problem> {
    match events.recv().await {
        Some(Event::Failed { id }) => Err(Problem::Incident(id)),
        Some(Event::Done(done)) if is_too_late(&done) => Err(Problem::Deadline),
        Some(first) => Ok(first),
        None => Err(Problem::Interrupted),
    }
}

/// A whole answer.
async fn collect(
    mut events: mpsc::Receiver<Event>,
    choice: usize,
    cx: &RequestContext,
) -> Result<(Piece, Completion), Problem> {
    let mut whole = Piece::default();
    while let Some(event) = events.recv().await {
        match event {
            Event::Piece(piece) => whole.append(piece),
            Event::Done(mut done) => {
                whole.append(std::mem::take(&mut done.tail));
                cx.record.complete(choice, &done);
                return Ok((whole, done));
            }
            Event::Failed { id } => return Err(Problem::Incident(id)),
        }
    }
    Err(Problem::Interrupted)
}

async fn read_json(app: &App, request: Request<Incoming>) -> Result<Value, Problem> {
    let body = read_body(app, request).await?;
    Ok(serde_json::from_slice(&body)?)
}

async fn read_body(app: &App, request: Request<Incoming>) -> Result<Bytes, Problem> {
    let limit = app.limits.max_body_bytes;
    // What is announced need not be sent.
    let announced = hyper::body::Body::size_hint(request.body()).exact();
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(Problem::BodyTooLarge(limit));
    }
    let body = Limited::new(request.into_body(), limit).collect();
    match tokio::time::timeout(app.limits.read_timeout, body).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(Problem::BodyTooLarge(limit)),
        Ok(Err(e)) => Err(Problem::BrokenBody(e)),
        Err(_) => Err(Problem::BodyTimeout),
    }
}
