//! The model's own answers, from the batched engine, and what it thought at each of their tokens:
//! what its heads learn to predict. Answers go to shards as they end, so a killed run loses a
//! shard at most and goes on with the next answer.

use tokio::task::JoinSet;

use super::TrainError;
use super::features::Writer;
use super::prompts::Prompts;
use crate::engine::handle::Handle;
use crate::request::{Caller, Request, SamplingParams, Speculation, Trace};

/// Temperatures in turn: half of the answers are greedy, as most requests for which speed matters.
const TEMPERATURES: [f32; 4] = [0.0, 0.8, 0.0, 1.0];

/// What to collect.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Answers until they have this many tokens.
    pub n_tokens: usize,
    /// Most tokens of one answer.
    pub max_answer: usize,
    /// Orders the prompts and seeds the answers.
    pub seed: u64,
}

/// Answers to one prompt that run together: its cells are computed for the first one and shared.
const TOGETHER: usize = 2;

/// Rounds in which a prompt is asked, and what came of each.
struct Asked {
    prompt: usize,
    answers: Vec<(usize, Trace)>,
}

/// Asks until the shards hold as many tokens as are wanted, or their disk space is full. `progress`
/// gets the number of tokens there are.
///
/// # Errors
/// When a shard cannot be written, no prompt fits, or the engine fails. What is in shards stays.
pub async fn collect(
    handle: &Handle,
    prompts: &Prompts,
    shards: &mut Writer,
    wanted: Wanted,
    mut progress: impl FnMut(usize),
) -> Result<(), TrainError> {
    let order = shuffled(prompts.len(), wanted.seed);
    let rounds = (0..).step_by(TOGETHER).map(|first| first..first + TOGETHER);
    let mut open = rounds
        .flat_map(|rounds| order.iter().enumerate().map(move |(k, &id)| (rounds.clone(), k, id)));
    let most_prompt = handle.limits().n_ctx.saturating_sub(wanted.max_answer);
    let most_running = (handle.limits().n_slots + 4).div_ceil(TOGETHER);
    let mut running: JoinSet<Result<Asked, TrainError>> = JoinSet::new();
    let mut n_refused = 0;
    progress(shards.n_tokens());
    loop {
        while shards.n_tokens() < wanted.n_tokens
            && shards.has_room()
            && running.len() < most_running
        {
            let (rounds, k, prompt) = open.next().expect("rounds have no end");
            let rounds: Vec<usize> = rounds.filter(|&round| !shards.has(prompt, round)).collect();
            if rounds.is_empty() {
                continue;
            }
            let text = prompts.text(handle.model(), prompt);
            if handle.model().tokenize(&text, true)?.len() > most_prompt {
                n_refused += 1;
                if n_refused > 2 * prompts.len() {
                    return Err(TrainError::Prompts("no prompt fits into the context".into()));
                }
                continue;
            }
            let handle = handle.clone();
            running.spawn(async move {
                let mut started = vec![];
                for round in rounds {
                    let temperature = TEMPERATURES[(k + round) % TEMPERATURES.len()];
                    let seed = wanted.seed
                        ^ ((round as u64) << 32 | prompt as u64)
                            .wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    let request = request(text.clone(), temperature, wanted.max_answer, seed);
                    let submitted = handle.submit(request, Caller::default()).await;
                    let mut answer = submitted.map_err(|e| TrainError::Engine(e.to_string()))?;
                    answer.peek().await; // its prompt is computed then
                    started.push((round, answer));
                }
                let mut answers = vec![];
                for (round, answer) in started {
                    let collected = answer.collect().await;
                    let (_, done) = collected.map_err(|e| TrainError::Engine(e.to_string()))?;
                    let untraced = || TrainError::Engine("it does not trace answers".into());
                    answers.push((round, done.trace.ok_or_else(untraced)?));
                }
                Ok(Asked { prompt, answers })
            });
        }
        let Some(asked) = running.join_next().await else { return shards.flush() };
        let Asked { prompt, answers } = asked.map_err(|e| TrainError::Engine(e.to_string()))??;
        for (round, trace) in answers {
            shards.add(prompt, round, trace)?;
        }
        progress(shards.n_tokens());
    }
}

fn request(prompt: String, temperature: f32, max_tokens: usize, seed: u64) -> Request {
    let sampling = SamplingParams { temperature, seed, ..SamplingParams::default() };
    Request {
        sampling,
        speculation: Speculation::Off,
        share_text: false,
        ..Request::new(prompt, max_tokens)
    }
}

/// 0 to `n - 1`, shuffled by `seed` (Fisher and Yates).
fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let draw = super::mix(seed ^ ((i as u64) << 20));
        order.swap(i, (draw % (i as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_a_permutation_that_the_seed_decides() {
        let order = shuffled(100, 1);
        assert_ne!(order, shuffled(100, 2));
        assert_eq!(order, shuffled(100, 1));
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..100) && order != (0..100).collect::<Vec<_>>());
    }
}
