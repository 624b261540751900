//! Prompts without answers, as llama-server and vLLM have them: `/tokenize`, `/detokenize`,
//! `/tokenizer_info` and `/apply-template`.

use bytes::Bytes;
use hyper::{Request, StatusCode};

use super::api::information::ModelQuery;
use super::api::openai::TemplateRequest;
use super::api::vocabulary::{
    DetokenizeAnswer, DetokenizeRequest, TemplateAnswer, TokenOrPiece, TokenizeAnswer,
    TokenizeRequest, TokenizerInformation,
};
use super::app::RequestContext;
use super::completions::read;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::error::Invalid;
use crate::llama::Token;

/// Tokens of a text, as llama-server and vLLM have it
#[utoipa::path(post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = TokenizeAnswer),
))]
pub async fn tokenize(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let tokens: Vec<TokenOrPiece> = read(&cx.app, &model, request, |model, readers, body| {
        let model = model.model();
        let mut body = readers.tokenize.read(body)?;
        let (text, add_special) = body.text()?;
        let TokenizeRequest { parse_special, with_pieces, .. } = body;
        let tokens = model.tokenize_part(&text, add_special, parse_special);
        let tokens = tokens.map_err(|e| Invalid::new("content", e.to_string()))?;
        let shown = |token: Token| match with_pieces {
            true => TokenOrPiece::Piece { id: token.0, piece: model.bytes(token, true).into() },
            false => TokenOrPiece::Id(token.0),
        };
        Ok(tokens.into_iter().map(shown).collect())
    })
    .await?;
    let (count, max_model_len) = (tokens.len(), model.n_ctx());
    Ok(reply::json(StatusCode::OK, &TokenizeAnswer { tokens, count, max_model_len }))
}

/// Text of tokens, as llama-server and vLLM have it
#[utoipa::path(post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = DetokenizeAnswer),
))]
pub async fn detokenize(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let content = read(&cx.app, &model, request, |model, readers, body| {
        let model = model.model();
        let body = readers.detokenize.read(body)?;
        let tokens: Vec<Token> = body.tokens.into_iter().map(Token).collect();
        if let Some(Token(bad)) = tokens.iter().find(|&&token| !model.contains(token)) {
            let n_vocab = model.n_vocab();
            let message = format!("tokens has {bad}, but the vocabulary has {n_vocab}");
            return Err(Invalid::new("tokens", message).into());
        }
        Ok(model.detokenize(&tokens))
    })
    .await?;
    let answer = DetokenizeAnswer { prompt: content.clone(), content };
    Ok(reply::json(StatusCode::OK, &answer))
}

/// The tokenizer, as vLLM has it
#[utoipa::path(get, path = "/tokenizer_info", tag = "tokens", params(ModelQuery), responses(
    (status = 200, description = "Its special tokens and the chat template", body = TokenizerInformation),
))]
pub async fn tokenizer_info(
    mut cx: RequestContext,
    request: Request<Bytes>,
) -> Result<Reply, Problem> {
    let loaded = cx.model(&request).await?;
    let model = loaded.model();
    let answer = TokenizerInformation {
        tokenizer_class: model.meta("tokenizer.ggml.model").unwrap_or_default(),
        bos_token: model.bos_text(),
        eos_token: model.eos_text(),
        pad_token: model.pad_text(),
        chat_template: loaded.template_source(),
        model_max_length: loaded.n_ctx(),
    };
    Ok(reply::json(StatusCode::OK, &answer))
}

/// Prompt of a conversation, as llama-server has it
#[utoipa::path(post, path = "/apply-template", tag = "tokens", request_body = TemplateRequest, responses(
    (status = 200, description = "The prompt", body = TemplateAnswer),
))]
pub async fn apply_template(
    mut cx: RequestContext,
    request: Request<Bytes>,
) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let (prompt, ignored) = read(&cx.app, &model, request, |model, readers, body| {
        let (body, ignored) = readers.template.read_noting(body)?;
        let prompt = body.render(model.template())?;
        Ok((prompt.text().unwrap_or_default(), ignored))
    })
    .await?;
    let mut reply = reply::json(StatusCode::OK, &TemplateAnswer { prompt });
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}
