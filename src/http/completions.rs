//! The handlers of requests for text: a body to the engine's requests, their events to an answer.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, RETRY_AFTER};
use hyper::{Request, StatusCode};
use serde_json::Value;
use tokio::sync::mpsc;

use super::generate::{self, Generate, Pieces};
use super::openai::read::Asked;
use super::openai::write::Envelope;
use super::openai::{self, Endpoint};
use super::reply::{self, Problem, Reply};
use super::routes::{Call, engine};
use super::template::ChatTemplate;
use super::tokens::{Spell, Telling};
use super::{App, random};
use crate::engine::{Handle, SubmitError};
use crate::error::Invalid;
use crate::request::{self, Completion, Event, FinishReason, Piece};

/// `POST /generate`.
pub async fn generate(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
) -> Result<Reply, Problem> {
    let handle = engine(app)?;
    let body = read_json(app, request).await?;
    let asked = generate::read(body, handle.limits().n_ctx, random()).map_err(invalid)?;
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

/// `POST /v1/completions` and `POST /v1/chat/completions`.
pub async fn complete(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
    endpoint: Endpoint,
) -> Result<Reply, Problem> {
    let bad_request = |error| Problem { status: StatusCode::BAD_REQUEST, ..invalid(error) };
    let handle = engine(app)?;
    let body = read_json(app, request).await?;
    let template = app.template.get_or_init(|| ChatTemplate::of(handle.model()));
    let asked = openai::read::read(endpoint, body, handle.limits().n_ctx, random(), template);
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
