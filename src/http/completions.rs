//! The handlers of requests for text: a body to the engine's requests, their events to an answer.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, RETRY_AFTER};
use hyper::{Request, StatusCode};
use serde_json::Value;

use super::api::answers::{Detokenize, GenerateAnswer};
use super::api::generate::Pieces;
use super::api::openai::Choices;
use super::openai::{Endpoint, Envelope};
use super::reply::{self, Problem, Reply};
use super::routes::{Call, engine};
use super::template::ChatTemplate;
use super::{App, random};
use crate::engine::{Answer, Handle, SubmitError};
use crate::error::Invalid;
use crate::request::{self, Caller, Completion, Event, FinishReason, Piece};

/// `POST /generate`.
pub async fn generate(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
) -> Result<Reply, Problem> {
    let handle = engine(app)?;
    let body = read_json(app, request).await?;
    let body = app.readers.generate.read(body).map_err(invalid)?;
    let stream = body.stream;
    let request = body.into_request(random()).map_err(invalid)?;
    let detokenize = request.report.map(|_| detokenize(&handle));
    let mut answer = submit(&handle, request, call).await.map_err(refused)?;
    if stream {
        check_first(&mut answer).await?;
        let dialect = Box::new(Pieces(detokenize));
        return Ok(reply::stream(vec![answer], dialect, Arc::clone(call.tally)));
    }
    let (whole, done) = collect(answer, 0, call).await?;
    if is_too_late(&done) {
        return Err(too_late());
    }
    let body = GenerateAnswer::new(&done, &whole, detokenize.as_ref());
    Ok(reply::json(StatusCode::OK, &body))
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
    let Choices { requests, n, stream, include_usage } =
        choices(app, &handle, body, endpoint).map_err(bad_request)?;
    let report = requests.first().and_then(|r| r.report).unwrap_or_default();
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        // Those that were taken are cancelled if one is refused.
        answers.push(submit(&handle, request, call).await.map_err(|error| match error {
            SubmitError::Invalid(error) => bad_request(error),
            other => refused(other),
        })?);
    }
    let (model, detokenize) = (app.model_id.clone(), detokenize(&handle));
    let envelope = Envelope::new(endpoint, model, n, report, detokenize);
    if stream {
        check_first(&mut answers[0]).await?;
        let chunks = envelope.chunks(answers.len(), include_usage);
        return Ok(reply::stream(answers, Box::new(chunks), Arc::clone(call.tally)));
    }
    let mut done = Vec::with_capacity(answers.len());
    for (choice, answer) in answers.into_iter().enumerate() {
        done.push(collect(answer, choice, call).await?);
    }
    if done.iter().all(|(_, done)| is_too_late(done)) {
        return Err(too_late());
    }
    Ok(envelope.answer(&done))
}

/// What a body of OpenAI's asks for: as many answers as the server takes at once, at most.
fn choices(
    app: &App,
    handle: &Handle,
    body: Value,
    endpoint: Endpoint,
) -> Result<Choices, Invalid> {
    let (n_ctx, seed) = (handle.limits().n_ctx, random());
    let choices = match endpoint {
        Endpoint::Text => app.readers.completion.read(body)?.into_choices(n_ctx, seed)?,
        Endpoint::Chat => {
            let template = app.template.get_or_init(|| ChatTemplate::of(handle.model()));
            app.readers.chat.read(body)?.into_choices(n_ctx, seed, template)?
        }
    };
    let (n, most) = (choices.requests.len(), handle.most_in_flight());
    if n > most {
        // Not a full queue: waiting would not help.
        let message =
            format!("n and the prompts ask for {n} answers, but the server takes {most} at once");
        return Err(Invalid::new("n", message));
    }
    Ok(choices)
}

/// How this model's tokens become text.
fn detokenize(handle: &Handle) -> Detokenize {
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
    request: request::Request,
    call: &Call<'_>,
) -> Result<Answer, SubmitError> {
    call.tally.submit();
    let caller = Caller { id: Arc::clone(call.id), tenant: call.owner, timeout: call.timeout };
    handle.submit(request, caller).await
}

/// An error before the first piece is still a plain one.
async fn check_first(answer: &mut Answer) -> Result<(), Problem> {
    match answer.peek().await {
        Event::Failed { id } => Err(Problem::incident(id)),
        Event::Done(done) if is_too_late(done) => Err(too_late()),
        Event::Piece(_) | Event::Done(_) => Ok(()),
    }
}

/// A whole answer.
async fn collect(
    answer: Answer,
    choice: usize,
    call: &Call<'_>,
) -> Result<(Piece, Completion), Problem> {
    let (whole, done) = answer.collect().await.map_err(|failed| Problem::incident(&failed.id))?;
    call.tally.note(choice, &done);
    Ok((whole, done))
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
