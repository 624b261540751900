//! What an answer of OpenAI's dialect took: tokens as OpenAI counts them, times as llama-server tells them.

use serde::Serialize;
use utoipa::ToSchema;

use crate::request::{Completion, Restored, SpeculationUsage, Timings, Usage};

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct OpenAiUsage {
    /// Of the prompts, each once.
    pub prompt_tokens: usize,
    /// Of all choices.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Of the prompts' tokens.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Of the prompts' tokens.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Found in the cache.
    pub cached_tokens: usize,
    /// Of those, brought back into the cache, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_tokens: Option<Restored>,
}

/// What an answer took, with llama-server's fields. Of several choices tokens are counted together, and
/// the longest time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct AnswerTimings {
    /// Tokens of the prompt that were in the cache.
    pub cache_n: usize,
    /// Its other tokens.
    pub prompt_n: usize,
    /// Milliseconds until the first token.
    pub prompt_ms: f64,
    /// For each token of `prompt_n`.
    pub prompt_per_token_ms: f64,
    /// Tokens of `prompt_n`.
    pub prompt_per_second: f64,
    /// Tokens of the answer.
    pub predicted_n: usize,
    /// Milliseconds from the first to the last token.
    pub predicted_ms: f64,
    /// For each token after the first; 0 without one.
    pub predicted_per_token_ms: f64,
    /// Tokens after the first; 0 without one.
    pub predicted_per_second: f64,
    /// Candidates verified, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft_n: Option<usize>,
    /// Of those, accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft_n_accepted: Option<usize>,
}

impl AnswerTimings {
    /// Of the choices that ended, with the counts of their tokens.
    pub fn new(ended: &[Ended], usage: OpenAiUsage) -> Self {
        let longest = |seconds: fn(&Timings) -> f64| {
            let all = ended.iter().map(|ended| seconds(&ended.timings));
            all.fold(0.0, f64::max) * 1e3
        };
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let cache_n = usage.prompt_tokens_details.cached_tokens;
        let prompt_n = usage.prompt_tokens - cache_n;
        let predicted_n = usage.completion_tokens;
        let after_first = predicted_n.saturating_sub(ended.len()) as f64;
        let (prompt_ms, predicted_ms) = (longest(|t| t.prefill_s), longest(|t| t.decode_s));
        let drafted: usize = ended.iter().map(|ended| ended.speculation.drafted).sum();
        let accepted = ended.iter().map(|ended| ended.speculation.accepted).sum();
        Self {
            cache_n,
            prompt_n,
            prompt_ms,
            prompt_per_token_ms: over(prompt_ms, prompt_n as f64),
            prompt_per_second: over(prompt_n as f64 * 1e3, prompt_ms),
            predicted_n,
            predicted_ms,
            predicted_per_token_ms: over(predicted_ms, after_first),
            predicted_per_second: over(after_first * 1e3, predicted_ms),
            draft_n: (drafted > 0).then_some(drafted),
            draft_n_accepted: (drafted > 0).then_some(accepted),
        }
    }
}

/// What a choice that ended took.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Its number.
    pub index: usize,
    pub usage: Usage,
    pub timings: Timings,
    pub speculation: SpeculationUsage,
}

impl Ended {
    pub fn new(index: usize, done: &Completion) -> Self {
        let &Completion { usage, timings, speculation, .. } = done;
        Self { index, usage, timings, speculation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings(n_answers: [usize; 2]) -> AnswerTimings {
        let ended = n_answers.map(|completion_tokens| Ended {
            index: 0,
            usage: Usage {
                prompt_tokens: 12,
                cached_tokens: 2,
                completion_tokens,
                ..Usage::default()
            },
            timings: Timings { queue_s: 9.0, prefill_s: 0.5, decode_s: completion_tokens as f64 },
            speculation: SpeculationUsage::default(),
        });
        let completion_tokens = n_answers.iter().sum();
        let prompt_tokens_details = PromptTokensDetails { cached_tokens: 2, restored_tokens: None };
        let usage = OpenAiUsage {
            prompt_tokens: 12,
            completion_tokens,
            total_tokens: 12 + completion_tokens,
            prompt_tokens_details,
        };
        AnswerTimings::new(&ended, usage)
    }

    #[test]
    fn rates_are_of_what_was_computed_and_never_infinite() {
        let both = timings([3, 5]);
        assert_eq!((both.cache_n, both.prompt_n, both.predicted_n), (2, 10, 8));
        assert_eq!((both.prompt_per_token_ms, both.prompt_per_second), (50.0, 20.0));
        assert_eq!((both.predicted_ms, both.predicted_per_second), (5000.0, 6.0 / 5.0));
        let one = timings([1, 1]);
        assert_eq!((one.predicted_per_token_ms, one.predicted_per_second), (0.0, 0.0));
        assert_eq!(one.draft_n, None);
    }
}
