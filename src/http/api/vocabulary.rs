//! The bodies of `/tokenize` and `/detokenize`, and the answer of `/apply-template`, with
//! llama-server's fields.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A text to split into tokens.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// The text.
    #[schema(example = "The old lighthouse")]
    pub content: String,
    /// Add the tokens that begin a text, where the model has them.
    #[schema(default = false)]
    pub add_special: bool,
    /// Names of control tokens in the text become those tokens.
    #[schema(default = true)]
    pub parse_special: bool,
    /// Answer with each token's text, too.
    #[schema(default = false)]
    pub with_pieces: bool,
}

/// The tokens of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizeAnswer {
    /// In the text's order.
    pub tokens: Vec<TokenOrPiece>,
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
    #[schema(example = json!([504, 2725]))]
    pub tokens: Vec<i32>,
}

/// The text of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct DetokenizeAnswer {
    /// Control tokens by name; bytes that are no text as U+FFFD.
    pub content: String,
}

/// A conversation as the chat template writes it.
#[derive(Debug, Serialize, ToSchema)]
pub struct TemplateAnswer {
    /// The prompt, without the token that begins a text where the model adds that.
    pub prompt: String,
}
