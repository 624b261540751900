//! The handlers of requests for text: a body to the engine's requests, their events to an answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Request;
use serde_json::Value;

use super::api::answers::{Detokenize, GenerateAnswer, OpenAiAnswer, StreamEvent};
use super::api::generate::{GenerateRequest, Pieces};
use super::api::openai::{ChatRequest, Choices, CompletionRequest};
use super::api::{Readers, json};
use super::app::{App, RequestContext};
use super::chunks::{Chunks, Endpoint};
use super::problem::Problem;
use super::reply::{self, Dialect, Reply};
use crate::engine::{Answer, Failed};
use crate::error::Invalid;
use crate::models::Loaded;
use crate::request::{self, Caller, Completion, Event, FinishReason};
use crate::telemetry::ChoiceRecord;

/// Text from a prompt
#[utoipa::path(post, path = "/generate", tag = "text", request_body = GenerateRequest, responses(
    (status = 200, description = "The text. A stream has events `{\"generated_text\": piece}`, and a last one like the whole answer; an \
     error after the first piece is an `event: error`", content(
        (GenerateAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn generate(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let (request, stream) = read(&cx.app, &model, request, |model, readers, body| {
        let body = readers.generate.read(body)?;
        let stream = body.stream;
        Ok((body.into_request(fastrand::u64(..), model.template())?, stream))
    })
    .await?;
    let dialect = Pieces(request.report.map(|_| detokenize(&model)));
    answer(cx, &model, vec![request], stream, dialect).await
}

/// Text from prompts, as OpenAI has it
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest, responses(
    (status = 200, description = "The texts, or a stream of chunks that ends with `data: [DONE]`", content(
        (OpenAiAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn complete(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let (choices, ignored) = read(&cx.app, &model, request, |model, readers, body| {
        let (body, ignored) = readers.completion.read_noting(body)?;
        Ok((body.into_choices(model.n_ctx(), fastrand::u64(..))?, ignored))
    })
    .await?;
    cx.app.note_ignored(&ignored);
    let mut reply = answer_openai(cx, &model, choices, Endpoint::Text).await?;
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}

/// Answers to messages, as OpenAI has it
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest, responses(
    (status = 200, description = "The answers, or a stream of chunks that ends with `data: [DONE]`", content(
        (OpenAiAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn chat(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let (choices, ignored) = read(&cx.app, &model, request, |model, readers, body| {
        let (body, ignored) = readers.chat.read_noting(body)?;
        let (n_ctx, seed) = (model.n_ctx(), fastrand::u64(..));
        Ok((body.into_choices(n_ctx, seed, model.template())?, ignored))
    })
    .await?;
    cx.app.note_ignored(&ignored);
    let mut reply = answer_openai(cx, &model, choices, Endpoint::Chat).await?;
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}

async fn answer_openai(
    cx: RequestContext,
    model: &Loaded,
    choices: Choices,
    endpoint: Endpoint,
) -> Result<Reply, Problem> {
    let (asked, most) = (choices.requests.len(), model.handle.n_queue);
    if asked > most {
        // Not a full queue: waiting would not help.
        let message = format!(
            "n and the prompts ask for {asked} answers, but the server takes {most} at once"
        );
        return Err(Invalid::new("n", message).into());
    }
    let dialect = Chunks::new(endpoint, model.id.to_string(), &choices, detokenize(model));
    let answered = answer(cx, model, choices.requests, choices.stream, dialect).await;
    answered.map_err(|problem| problem.with_fields_as(&[("prompt", endpoint.prompt_field())]))
}

/// Submits the requests, and writes their answers as one, whole or as it comes.
pub(super) async fn answer(
    cx: RequestContext,
    model: &Loaded,
    requests: Vec<request::Request>,
    stream: bool,
    dialect: impl Dialect + 'static,
) -> Result<Reply, Problem> {
    let mut answers = Vec::with_capacity(requests.len());
    for mut request in requests {
        cx.record.lock().push(ChoiceRecord::new(&model.id));
        request.timeout = cx.left(request.timeout);
        let (id, timeout) = (Arc::clone(&cx.id), cx.left(cx.app.limits.timeout));
        let caller = Caller { id, tenant: cx.tenant, timeout };
        // Those that were taken are cancelled if one is refused.
        answers.push(model.handle.submit(request, caller).await?);
    }
    if stream {
        let keep_alive = cx.app.limits.sse_keep_alive;
        // An error before the first piece is still a plain one, unless that takes too long.
        match first_event(&mut answers[0], keep_alive).await {
            Some(Event::Failed { id }) => return Err(Failed { id: id.clone() }.into()),
            Some(Event::Done(done)) if is_too_late(done) => return Err(Problem::Deadline),
            Some(Event::Progress(_) | Event::Piece(_) | Event::Done(_)) | None => {}
        }
        return Ok(reply::stream(answers, Box::new(dialect), cx.record, keep_alive));
    }
    let mut done = Vec::with_capacity(answers.len());
    for (choice, answer) in answers.into_iter().enumerate() {
        let (whole, end) = answer.collect().await?;
        cx.record.lock()[choice].done = Some((end.usage, end.timings));
        done.push((whole, end));
    }
    if done.iter().all(|(_, done)| is_too_late(done)) {
        return Err(Problem::Deadline);
    }
    Ok(dialect.whole(&done))
}

/// Waits for the first event; `None` if there is none in this time.
async fn first_event(answer: &mut Answer, limit: Option<Duration>) -> Option<&Event> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, answer.peek()).await.ok(),
        None => Some(answer.peek().await),
    }
}

pub(super) fn detokenize(model: &Loaded) -> Detokenize {
    let model = Arc::clone(model.model());
    Arc::new(move |token, by_name| model.bytes(token, by_name))
}

/// The request's time was over before its first token.
fn is_too_late(done: &Completion) -> bool {
    done.finish_reason == FinishReason::Deadline && done.usage.completion_tokens == 0
}

/// Parses a JSON body, and makes of it what `make` does. A megabyte takes long to parse, to check
/// and to render, so none of that happens on the network's threads.
pub async fn read<T: Send + 'static>(
    app: &Arc<App>,
    model: &Arc<Loaded>,
    request: Request<Bytes>,
    make: impl FnOnce(&Loaded, &Readers, Value) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let (body, app, this) = (request.into_body(), Arc::clone(app), Arc::clone(model));
    let n_bytes = body.len();
    let read = move || make(&this, &app.readers(this.n_ctx()), json::parse(&body)?);
    model.handle.read(n_bytes, read).await?
}
