//! The bodies of `/tokenize` and `/detokenize`, and the answers of `/apply-template` and
//! `/tokenizer_info`, with llama-server's fields and vLLM's.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::Invalid;

/// A text to split into tokens.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// The text.
    #[schema(example = "The old lighthouse")]
    pub content: Option<String>,
    /// The text, as vLLM calls it; not with `content`.
    #[schema(example = "The old lighthouse")]
    pub prompt: Option<String>,
    /// Add the tokens that begin a text, where the model has them; false by default.
    #[schema(example = false)]
    pub add_special: Option<bool>,
    /// The same, as vLLM calls it; by default true with `prompt`.
    #[schema(example = false)]
    pub add_special_tokens: Option<bool>,
    /// The model that answers, where there are several; a single one answers to any name.
    #[schema(example = "any")]
    pub model: Option<String>,
    /// Names of control tokens in the text become those tokens.
    #[schema(default = true)]
    pub parse_special: bool,
    /// Answer with each token's text, too.
    #[schema(default = false)]
    pub with_pieces: bool,
}

impl TokenizeRequest {
    /// The text, and whether to add the tokens that begin one.
    ///
    /// # Errors
    /// [`Invalid`] unless there is one text, and at most one answer to the question.
    pub fn text(&mut self) -> Result<(String, bool), Invalid> {
        if self.add_special.is_some() && self.add_special_tokens.is_some() {
            let message = "add_special and add_special_tokens are one: give one of them";
            return Err(Invalid::new("add_special_tokens", message));
        }
        let adds = self.add_special.or(self.add_special_tokens);
        match (self.content.take(), self.prompt.take()) {
            (Some(text), None) => Ok((text, adds.unwrap_or(false))),
            (None, Some(text)) => Ok((text, adds.unwrap_or(true))),
            (None, None) => Err(Invalid::new("content", "content is missing")),
            (Some(_), Some(_)) => {
                let message = "content and prompt are one: give one of them";
                Err(Invalid::new("prompt", message))
            }
        }
    }
}

/// The tokens of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizeAnswer {
    /// In the text's order.
    pub tokens: Vec<TokenOrPiece>,
    /// How many.
    pub count: usize,
    /// The context's size.
    pub max_model_len: usize,
}

/// A token: its id, or with `with_pieces` its id and text.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum TokenOrPiece {
    Id(i32),
    Piece { id: i32, piece: TextOrBytes },
}

/// A token's text, or its bytes if they are no text: a part of a character, for example.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum TextOrBytes {
    Text(String),
    Bytes(Vec<u32>),
}

impl From<Vec<u8>> for TextOrBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let numbers = |bytes: Vec<u8>| bytes.into_iter().map(u32::from).collect();
        String::from_utf8(bytes).map_or_else(|e| Self::Bytes(numbers(e.into_bytes())), Self::Text)
    }
}

/// Tokens to join to a text.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeRequest {
    /// By id.
    #[schema(example = json!([504, 1573]))]
    pub tokens: Vec<i32>,
    /// The model that answers, where there are several; a single one answers to any name.
    #[schema(example = "any")]
    pub model: Option<String>,
}

/// The text of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct DetokenizeAnswer {
    /// Control tokens by name; bytes that are no text as U+FFFD.
    pub content: String,
    /// The same, as vLLM calls it.
    pub prompt: String,
}

/// What evaluators ask of a tokenizer, as vLLM has it.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizerInformation {
    /// The GGUF's name of its kind.
    pub tokenizer_class: String,
    /// The token that begins a text, or nothing.
    pub bos_token: String,
    /// The token that ends a text.
    pub eos_token: String,
    /// The token that fills up, or nothing.
    pub pad_token: String,
    /// Jinja; nothing without one.
    pub chat_template: String,
    /// The context's size.
    pub model_max_length: usize,
}

/// A conversation as the chat template writes it.
#[derive(Debug, Serialize, ToSchema)]
pub struct TemplateAnswer {
    /// The prompt, without the token that begins a text where the model adds that.
    pub prompt: String,
}
