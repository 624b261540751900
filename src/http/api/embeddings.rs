//! The body and the answer of `/v1/embeddings`, as OpenAI has them.

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{PartialSchema as _, ToSchema};

use super::fields::Prompts;
use crate::error::Invalid;
use crate::llama::Pooling;
use crate::request::{Prompt, Request};

/// Texts of one body, as OpenAI limits them.
const MAX_INPUTS: usize = 2048;

/// Texts to embed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingRequest {
    /// What to embed. Names of control tokens in a text are text.
    #[schema(schema_with = Prompts::<MAX_INPUTS>::schema)]
    pub input: Prompts<MAX_INPUTS>,
    /// The model that answers, where there are several; a single one answers to any name.
    #[schema(example = "any")]
    pub model: Option<String>,
    /// As numbers, or as the bytes of little-endian floats of 32 bits in base64.
    #[schema(default = "float")]
    pub encoding_format: Option<Encoding>,
    /// Values of an embedding. Only the model's own number of them is supported.
    #[schema(minimum = 1)]
    pub dimensions: Option<usize>,
    /// The length that an embedding is scaled to, as llama-server has it: 2 for 1 in Euclid's norm, -1
    /// for its own.
    #[schema(default = 2, minimum = -1, maximum = 2)]
    pub embd_normalize: i64,
    /// Seconds from acceptance, after which the answer is 408. The server may have a limit of its own.
    #[schema(example = 60.0, minimum = 0.0, maximum = 86400.0)]
    pub timeout_s: Option<f32>,
    /// Ignored.
    pub user: Option<Value>,
}

/// How an embedding is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Encoding {
    #[default]
    Float,
    Base64,
}

/// How the embeddings that a body asks for are to be written.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    encoding: Encoding,
    is_normalized: bool,
}

impl EmbeddingRequest {
    /// A request for each text, and how to write the results, which have `n_embd` values.
    ///
    /// # Errors
    /// [`Invalid`] for what this model cannot give.
    pub fn into_requests(
        self,
        pooling: Pooling,
        n_embd: usize,
    ) -> Result<(Vec<Request>, Form), Invalid> {
        if let Some(n) = self.dimensions.filter(|&n| n != n_embd) {
            let message = format!("dimensions is {n}; this model's embeddings have {n_embd}");
            return Err(Invalid::new("dimensions", message));
        }
        if !matches!(self.embd_normalize, -1 | 2) {
            let message = format!("embd_normalize is {}; it must be 2 or -1", self.embd_normalize);
            return Err(Invalid::new("embd_normalize", message));
        }
        let form = Form {
            encoding: self.encoding_format.unwrap_or_default(),
            is_normalized: self.embd_normalize == 2,
        };
        let timeout = self.timeout_s.map(Duration::from_secs_f32);
        let request = |prompt: Prompt| Request {
            timeout,
            ..Request::embedding(prompt.without_controls(), pooling)
        };
        Ok((self.input.0.into_iter().map(request).collect(), form))
    }
}

/// An answer of `/v1/embeddings`.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingAnswer<'a> {
    /// `list`.
    pub object: &'static str,
    /// One for each text, in order.
    pub data: Vec<EmbeddingEntry>,
    /// The served model.
    pub model: &'a str,
    /// Counts of tokens.
    pub usage: EmbeddingUsage,
}

/// An embedding.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingEntry {
    /// `embedding`.
    pub object: &'static str,
    /// The text's place in `input`.
    pub index: usize,
    /// Its values.
    pub embedding: Vector,
}

/// Numbers, or their bytes in base64.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

impl Vector {
    /// An embedding in the form that was asked for.
    pub fn new(mut values: Vec<f32>, form: Form) -> Self {
        if form.is_normalized {
            let norm = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            if norm > 0.0 {
                values.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
            }
        }
        match form.encoding {
            Encoding::Float => Self::Float(values),
            Encoding::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                Self::Base64(BASE64_STANDARD.encode(bytes))
            }
        }
    }
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    /// Of all texts.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}
