//! The model's own answers, from the batched engine, with the hidden state and distribution at each
//! token: what its heads learn to predict. Answers go to shards as they end, so a killed run loses
//! one shard at most and resumes with the next answer.

use tokio::task::JoinSet;

use super::TrainError;
use super::features::Writer;
use super::prompts::Prompt;
use crate::engine::handle::Handle;
use crate::request::{self, Caller, Request, SamplingParams, Speculation, Trace};

/// Temperatures in turn: half of the answers are greedy, as are most requests for which speed
/// matters.
const TEMPERATURES: [f32; 4] = [0.0, 0.8, 0.0, 1.0];

/// How much to collect.
#[derive(Clone, Copy)]
pub struct Wanted {
    /// Tokens of all answers.
    pub n_tokens: usize,
    /// Most tokens of one answer.
    pub max_answer: usize,
    /// Orders the prompts and seeds the answers.
    pub seed: u64,
}

/// Answers to one prompt that run at the same time: the prompt's cells are computed once and
/// shared.
const TOGETHER: usize = 2;

/// A prompt, and its answers with their rounds.
type PromptAnswers = (usize, Vec<(usize, Trace)>);

/// Asks until the shards hold the wanted number of tokens, or their disk space is full. `progress`
/// gets the number of tokens so far.
pub async fn collect(
    handle: &Handle,
    prompts: &[Prompt],
    shards: &mut Writer,
    wanted: Wanted,
    mut progress: impl FnMut(usize),
) -> Result<(), TrainError> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    fastrand::Rng::with_seed(wanted.seed).shuffle(&mut order);
    let rounds = (0..).step_by(TOGETHER).map(|first| first..first + TOGETHER);
    let mut open = rounds
        .flat_map(|rounds| order.iter().enumerate().map(move |(k, &id)| (rounds.clone(), k, id)));
    let most_prompt = handle.limits.n_ctx.saturating_sub(wanted.max_answer);
    let most_running = (handle.limits.n_slots + 4).div_ceil(TOGETHER);
    let mut running: JoinSet<Result<PromptAnswers, TrainError>> = JoinSet::new();
    let mut n_refused = 0;
    progress(shards.n_tokens);
    loop {
        while shards.n_tokens < wanted.n_tokens && shards.has_room() && running.len() < most_running
        {
            let (rounds, k, prompt) = open.next().expect("an endless iterator");
            let rounds: Vec<usize> = rounds.filter(|&round| !shards.has(prompt, round)).collect();
            if rounds.is_empty() {
                continue;
            }
            let text = prompts[prompt].prompt.clone();
            let tokens = handle.tokenize(&text).map_err(|e| TrainError::Prompts(e.to_string()))?;
            if tokens.len() > most_prompt {
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
                    let seed = wanted.seed ^ ((round as u64) << 32 | prompt as u64);
                    let seed = fastrand::Rng::with_seed(seed).u64(..);
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
                    answers.push((round, *done.trace.ok_or_else(untraced)?));
                }
                Ok((prompt, answers))
            });
        }
        let Some(asked) = running.join_next().await else { return Ok(shards.flush()?) };
        let (prompt, answers) = asked.map_err(|e| TrainError::Engine(e.to_string()))??;
        for (round, trace) in answers {
            shards.add(prompt, round, trace)?;
        }
        progress(shards.n_tokens);
    }
}

fn request(prompt: request::Prompt, temperature: f32, max_tokens: usize, seed: u64) -> Request {
    Request {
        sampling: SamplingParams { temperature, seed, ..SamplingParams::default() },
        speculation: Speculation::OFF,
        share_text: false,
        ..Request::new(prompt, max_tokens)
    }
}
