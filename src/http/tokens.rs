//! What a client asked to be reported of its tokens.

use std::sync::Arc;

use crate::llama::Token;

/// A token's bytes; of a control token its name's.
pub type Detokenize = Arc<dyn Fn(Token) -> Vec<u8> + Send + Sync>;

/// What is reported of each token.
#[derive(Clone)]
pub struct TokenOptions {
    /// Log probabilities, in the dialect's own field.
    pub logprobs: bool,
    /// All that is known, in `tokens`.
    pub details: bool,
    /// How tokens become text.
    pub detokenize: Detokenize,
}

impl Default for TokenOptions {
    /// Nothing.
    fn default() -> Self {
        Self { logprobs: false, details: false, detokenize: Arc::new(|_| Vec::new()) }
    }
}
