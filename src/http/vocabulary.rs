//! Tokens of texts and texts of tokens: `/tokenize` and `/detokenize`.

use hyper::body::Incoming;
use hyper::{Request, StatusCode};

use super::api::vocabulary::{
    DetokenizeAnswer, DetokenizeRequest, TokenOrPiece, TokenizeAnswer, TokenizeRequest,
};
use super::app::RequestContext;
use super::completions::read_json;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::engine::SubmitError;
use crate::error::Invalid;
use crate::llama::{Model, Token};

/// Tokens of a text, as llama-server has it
#[utoipa::path(post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = TokenizeAnswer),
))]
pub async fn tokenize(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let body = cx.app.readers.tokenize.read(read_json(&cx.app, request).await?)?;
    let TokenizeRequest { content, add_special, parse_special, with_pieces } = body;
    let model = handle.model.clone();
    let split = move || model.tokenize_part(&content, add_special, parse_special);
    let tokens = tokio::task::spawn_blocking(split).await.map_err(|_| SubmitError::Stopped)?;
    let tokens = tokens.map_err(|e| Invalid::new("content", e.to_string()))?;
    let shown = |token: Token| match with_pieces {
        true => TokenOrPiece::Piece { id: token.0, piece: bytes(&handle.model, token).into() },
        false => TokenOrPiece::Id(token.0),
    };
    let tokens = tokens.into_iter().map(shown).collect();
    Ok(reply::json(StatusCode::OK, &TokenizeAnswer { tokens }))
}

/// Text of tokens, as llama-server has it
#[utoipa::path(post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = DetokenizeAnswer),
))]
pub async fn detokenize(cx: RequestContext, request: Request<Incoming>) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let body = cx.app.readers.detokenize.read(read_json(&cx.app, request).await?)?;
    let tokens: Vec<Token> = body.tokens.into_iter().map(Token).collect();
    if let Some(Token(bad)) = tokens.iter().find(|&&token| !handle.model.contains(token)) {
        let n_vocab = handle.model.n_vocab();
        let message = format!("tokens has {bad}, but the vocabulary has {n_vocab}");
        return Err(Invalid::new("tokens", message).into());
    }
    let content = handle.model.detokenize(&tokens);
    Ok(reply::json(StatusCode::OK, &DetokenizeAnswer { content }))
}

fn bytes(model: &Model, token: Token) -> Vec<u8> {
    let mut bytes = Vec::new();
    model.piece(token, true, &mut bytes);
    bytes
}
