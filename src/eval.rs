//! The quality of a model: perplexity.

use crate::llama::{Context, LlamaError, SeqId, Token};
use crate::vector::log_sum_exp;

/// Tokens of a window; the model sees nothing before it.
pub const WINDOW: usize = 512;
/// The first tokens of a window are not counted: they have too little context.
const UNCOUNTED: usize = 64;
/// Tokens of a text of which at least one is counted.
pub const LEAST: usize = UNCOUNTED + 2;

/// `exp` of the mean negative log-likelihood.
pub struct Perplexity {
    pub value: f64,
    /// Its standard error, as if tokens were independent. Two models on the same text differ with
    /// far more certainty.
    pub error: f64,
    pub n_tokens: usize,
}

/// The perplexity of a context's model on a text, in windows of [`WINDOW`] tokens, which the context
/// must have room for and compute in one pass. `progress` gets the number of tokens read.
pub fn perplexity(
    context: &mut Context,
    tokens: &[Token],
    mut progress: impl FnMut(usize),
) -> Result<Perplexity, LlamaError> {
    let mut batch = context.batch();
    let mut losses: Vec<f64> = vec![];
    for (i, window) in tokens.chunks(WINDOW).enumerate() {
        context.clear();
        batch.clear();
        for (pos, &token) in window.iter().enumerate() {
            batch.add(token, pos, &[SeqId(0)], pos >= UNCOUNTED)?;
        }
        context.forward(&batch)?;
        for pos in UNCOUNTED..window.len().saturating_sub(1) {
            let logits = context.logits(pos)?;
            losses.push(f64::from(log_sum_exp(logits) - logits[window[pos + 1].0 as usize]));
        }
        progress(i * WINDOW + window.len());
    }
    let n = losses.len().max(1) as f64;
    let mean = losses.iter().sum::<f64>() / n;
    let variance = losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n;
    Ok(Perplexity {
        value: mean.exp(),
        error: mean.exp() * (variance / n).sqrt(),
        n_tokens: losses.len(),
    })
}
