//! Log probabilities and traces, from the rows that a token was chosen from. Pure.

use half::f16;

use crate::llama::Token;
use crate::request::{Logprobs, Trace};
use crate::vector::{largest_k, log_sum_exp};

/// The log probability of `token` in a row of logits, with the `n_top` best.
pub fn logprobs(token: Token, logits: &[f32], n_top: usize) -> Logprobs {
    let norm = log_sum_exp(logits);
    let mut top = Vec::with_capacity(n_top);
    largest_k(logits, n_top, &mut top);
    top.iter_mut().for_each(|(_, logit)| *logit -= norm);
    Logprobs { logprob: logits[token.0 as usize] - norm, top }
}

/// Appends a token to a trace; `best` is a buffer to work in.
pub fn push(
    trace: &mut Trace,
    token: Token,
    hidden: &[f32],
    logits: &[f32],
    best: &mut Vec<(Token, f32)>,
) {
    let norm = log_sum_exp(logits);
    largest_k(logits, Trace::TOP, best);
    trace.tokens.push(token);
    trace.hidden.extend(hidden.iter().map(|&v| f16::from_f32(v)));
    let probabilities =
        best.iter().map(|&(token, logit)| (token, f16::from_f32((logit - norm).exp())));
    trace.top.extend(probabilities);
    trace.top.resize(trace.tokens.len() * Trace::TOP, (Token(0), f16::ZERO));
}
