//! Prompts without answers, as llama-server has them: `/tokenize`, `/detokenize` and
//! `/apply-template`.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Request, StatusCode};

use super::api::openai::TemplateRequest;
use super::api::vocabulary::{
    DetokenizeAnswer, DetokenizeRequest, TemplateAnswer, TokenOrPiece, TokenizeAnswer,
    TokenizeRequest,
};
use super::app::RequestContext;
use super::completions::read;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::error::Invalid;
use crate::llama::Token;

/// Tokens of a text, as llama-server has it
#[utoipa::path(post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = TokenizeAnswer),
))]
pub async fn tokenize(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let model = Arc::clone(&handle.model);
    let tokens = read(&cx.app, &handle, request, move |app, body| {
        let TokenizeRequest { content, add_special, parse_special, with_pieces } =
            app.readers.tokenize.read(body)?;
        let tokens = model.tokenize_part(&content, add_special, parse_special);
        let tokens = tokens.map_err(|e| Invalid::new("content", e.to_string()))?;
        let shown = |token: Token| match with_pieces {
            true => TokenOrPiece::Piece { id: token.0, piece: model.bytes(token, true).into() },
            false => TokenOrPiece::Id(token.0),
        };
        Ok(tokens.into_iter().map(shown).collect())
    });
    Ok(reply::json(StatusCode::OK, &TokenizeAnswer { tokens: tokens.await? }))
}

/// Text of tokens, as llama-server has it
#[utoipa::path(post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = DetokenizeAnswer),
))]
pub async fn detokenize(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let model = Arc::clone(&handle.model);
    let content = read(&cx.app, &handle, request, move |app, body| {
        let body = app.readers.detokenize.read(body)?;
        let tokens: Vec<Token> = body.tokens.into_iter().map(Token).collect();
        if let Some(Token(bad)) = tokens.iter().find(|&&token| !model.contains(token)) {
            let n_vocab = model.n_vocab();
            let message = format!("tokens has {bad}, but the vocabulary has {n_vocab}");
            return Err(Invalid::new("tokens", message).into());
        }
        Ok(model.detokenize(&tokens))
    });
    Ok(reply::json(StatusCode::OK, &DetokenizeAnswer { content: content.await? }))
}

/// Prompt of a conversation, as llama-server has it
#[utoipa::path(post, path = "/apply-template", tag = "tokens", request_body = TemplateRequest, responses(
    (status = 200, description = "The prompt", body = TemplateAnswer),
))]
pub async fn apply_template(
    cx: RequestContext,
    request: Request<Incoming>,
) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let model = Arc::clone(&handle.model);
    let (prompt, ignored) = read(&cx.app, &handle, request, move |app, body| {
        let (body, ignored) = app.readers.template.read_noting(body)?;
        let prompt = body.render(app.template(&model))?;
        Ok((prompt.text().unwrap_or_default(), ignored))
    })
    .await?;
    let mut reply = reply::json(StatusCode::OK, &TemplateAnswer { prompt });
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}
