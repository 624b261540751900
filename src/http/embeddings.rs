//! The handler of `/v1/embeddings`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Request, StatusCode};

use super::api::embeddings::{
    EmbeddingAnswer, EmbeddingEntry, EmbeddingRequest, EmbeddingUsage, Form, Vector,
};
use super::app::RequestContext;
use super::completions::read;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::engine::{Answer, SubmitError};
use crate::models::Loaded;
use crate::request::{self, Caller};
use crate::telemetry::ChoiceRecord;

/// Embeddings of texts, as OpenAI has it
///
/// Where the model's GGUF or `--pooling` says how a vector is made of a text's tokens.
#[utoipa::path(post, path = "/v1/embeddings", tag = "openai", request_body = EmbeddingRequest, responses(
    (status = 200, description = "The embeddings", body = EmbeddingAnswer),
))]
pub async fn embed(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let pooling = model.handle.pooling.ok_or(Problem::NoEmbeddings)?;
    let ((requests, form), ignored) =
        read(&cx.app, &model, request, move |model, readers, body| {
            let (body, ignored) = readers.embedding.read_noting(body)?;
            Ok((body.into_requests(pooling, model.model().n_embd())?, ignored))
        })
        .await?;
    cx.app.note_ignored(&ignored);
    let (data, n_tokens) = collect(&cx, &model, requests, form)
        .await
        .map_err(|e| e.with_fields_as(&[("prompt", "input")]))?;
    let usage = EmbeddingUsage { prompt_tokens: n_tokens, total_tokens: n_tokens };
    let answer = EmbeddingAnswer { object: "list", data, model: &model.id, usage };
    let mut reply = reply::json(StatusCode::OK, &answer);
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}

/// Embeds all texts, and counts their tokens. A few are in the queue at a time, so that a long list
/// leaves room for others.
async fn collect(
    cx: &RequestContext,
    model: &Loaded,
    requests: Vec<request::Request>,
    form: Form,
) -> Result<(Vec<EmbeddingEntry>, usize), Problem> {
    let (handle, id, started) = (&model.handle, &model.id, Instant::now());
    let most = handle.limits.n_slots.min(handle.n_queue / 2).max(1);
    let mut running: VecDeque<Answer> = VecDeque::new();
    let mut done = Done { cx, form, data: Vec::with_capacity(requests.len()), n_tokens: 0 };
    for mut request in requests {
        if running.len() == most
            && let Some(answer) = running.pop_front()
        {
            done.take(answer).await?;
        }
        let left = |limit: Duration| limit.saturating_sub(started.elapsed());
        request.timeout = cx.left(request.timeout).map(left);
        loop {
            let timeout = cx.left(cx.app.limits.timeout).map(left);
            let caller = Caller { id: Arc::clone(&cx.id), tenant: cx.tenant, timeout };
            match handle.submit(request.clone(), caller).await {
                Ok(answer) => {
                    cx.record.lock().push(ChoiceRecord::new(id));
                    running.push_back(answer);
                    break;
                }
                // The others' place is this request's, too.
                Err(full @ SubmitError::QueueFull { .. }) => match running.pop_front() {
                    Some(answer) => done.take(answer).await?,
                    None => return Err(full.into()),
                },
                Err(error) => return Err(error.into()),
            }
        }
    }
    for answer in running {
        done.take(answer).await?;
    }
    Ok((done.data, done.n_tokens))
}

/// The embeddings so far.
struct Done<'a> {
    cx: &'a RequestContext,
    form: Form,
    data: Vec<EmbeddingEntry>,
    n_tokens: usize,
}

impl Done<'_> {
    /// Waits for the next one.
    async fn take(&mut self, answer: Answer) -> Result<(), Problem> {
        let (_, end) = answer.collect().await?;
        let index = self.data.len();
        self.cx.record.lock()[index].done = Some((end.usage, end.timings));
        let embedding = Vector::new(end.embedding.ok_or(Problem::Deadline)?, self.form);
        self.n_tokens += end.usage.prompt_tokens;
        self.data.push(EmbeddingEntry { object: "embedding", index, embedding });
        Ok(())
    }
}
