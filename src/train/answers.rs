//! The model's own answers, from the batched engine: what its heads learn to foretell. One JSON object a line; a killed run
//! goes on where it was.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::TrainError;
use super::prompts::Prompts;
use crate::engine::handle::Handle;
use crate::request::{Event, FinishReason, Request, SamplingParams, Speculation};

/// Temperatures in turn: half of the answers are greedy, as most requests for which speed matters.
const TEMPERATURES: [f32; 4] = [0.0, 0.8, 0.0, 1.0];

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Which prompt, from 0.
    pub id: usize,
    /// How many answers the prompt had before.
    pub round: usize,
    /// How it was sampled.
    pub temperature: f32,
    /// The text.
    pub answer: String,
    /// `stop` where the model ended it, else `length`.
    pub finish: String,
    /// Tokens of it.
    pub n: usize,
}

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

/// All whole lines of the file; a last one that a kill cut off is not.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Answer>, TrainError> {
    Ok(read_whole(path)?.0)
}

/// The answers, and the bytes they take.
fn read_whole(path: &Path) -> Result<(Vec<Answer>, u64), TrainError> {
    let Ok(file) = File::open(path) else { return Ok((vec![], 0)) };
    let (mut answers, mut bytes, mut reader, mut line) = (vec![], 0, BufReader::new(file), String::new());
    while reader.read_line(&mut line).map_err(|e| TrainError::file(path, e))? > 0 {
        match serde_json::from_str(&line) {
            Ok(answer) if line.ends_with('\n') => answers.push(answer),
            Ok(_) => break,
            Err(_) if !line.ends_with('\n') => break,
            Err(e) => return Err(TrainError::file(path, format!("line {}: {e}", answers.len() + 1))),
        }
        bytes += line.len() as u64;
        line.clear();
    }
    Ok((answers, bytes))
}

/// Asks until the file holds as many tokens as are wanted. `progress` gets the number of tokens there are.
///
/// # Errors
/// When the file cannot be written or the engine fails. What is in the file stays.
pub async fn collect(
    handle: &Handle,
    prompts: &Prompts,
    path: &Path,
    wanted: Wanted,
    mut progress: impl FnMut(usize),
) -> Result<(), TrainError> {
    let (have, bytes) = read_whole(path)?;
    let mut file = OpenOptions::new().create(true).append(false).write(true).truncate(false).open(path);
    let file = file.as_mut().map_err(|e| TrainError::file(path, &*e))?;
    file.set_len(bytes).and_then(|()| file.seek(SeekFrom::Start(bytes))).map_err(|e| TrainError::file(path, e))?;

    let mut n_tokens: usize = have.iter().map(|a| a.n).sum();
    progress(n_tokens);
    let done: HashSet<(usize, usize)> = have.into_iter().map(|a| (a.id, a.round)).collect();
    let order = shuffled(prompts.len(), wanted.seed);
    let all = (0..).flat_map(|round| order.iter().enumerate().map(move |(k, &id)| (round, k, id)));
    let mut open = all.filter(|&(round, _, id)| !done.contains(&(id, round)));
    let most_prompt = handle.limits().n_ctx.saturating_sub(wanted.max_answer);

    let mut running: JoinSet<Result<Answer, TrainError>> = JoinSet::new();
    let mut n_refused = 0;
    loop {
        while n_tokens < wanted.n_tokens && running.len() < handle.limits().n_slots + 4 {
            let (round, k, id) = open.next().expect("rounds have no end");
            let text = prompts.text(handle.model(), id);
            if handle.model().tokenize(&text, true)?.len() > most_prompt {
                n_refused += 1;
                if n_refused > 2 * prompts.len() {
                    return Err(TrainError::Prompts("no prompt fits into the context".into()));
                }
                continue;
            }
            let temperature = TEMPERATURES[(k + round) % TEMPERATURES.len()];
            let seed = wanted.seed ^ ((round as u64) << 32 | id as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let request = request(text, temperature, wanted.max_answer, seed);
            let handle = handle.clone();
            running.spawn(async move { ask(&handle, request, id, round).await });
        }
        let Some(answer) = running.join_next().await else { return Ok(()) };
        let answer = answer.map_err(|e| TrainError::Engine(e.to_string()))??;
        n_tokens += answer.n;
        let mut line = serde_json::to_string(&answer).map_err(|e| TrainError::file(path, e))?;
        line.push('\n');
        file.write_all(line.as_bytes()).map_err(|e| TrainError::file(path, e))?;
        progress(n_tokens);
    }
}

fn request(prompt: String, temperature: f32, max_tokens: usize, seed: u64) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: SamplingParams { temperature, seed, ..SamplingParams::default() },
        stop: vec![],
        ignore_eos: false,
        cache_prompt: true,
        speculation: Speculation::Auto,
    }
}

async fn ask(handle: &Handle, request: Request, id: usize, round: usize) -> Result<Answer, TrainError> {
    let temperature = request.sampling.temperature;
    let mut events = handle.submit(request).await.map_err(|e| TrainError::Engine(e.to_string()))?;
    let mut answer = String::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Piece(piece) => answer.push_str(&piece),
            Event::Done(done) => {
                answer.push_str(&done.tail);
                let finish = if done.finish_reason == FinishReason::Length { "length" } else { "stop" };
                return Ok(Answer {
                    id,
                    round,
                    temperature,
                    answer,
                    finish: finish.into(),
                    n: done.usage.completion_tokens,
                });
            }
            Event::Failed { id } => return Err(TrainError::Engine(format!("the log names the cause under {id}"))),
        }
    }
    Err(TrainError::Engine("it stopped".into()))
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

    #[test]
    fn a_line_that_was_cut_off_is_left_out_and_a_broken_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        let line = |id| {
            let answer = Answer { id, round: 0, temperature: 0.0, answer: "Yes.\n".into(), finish: "stop".into(), n: 3 };
            serde_json::to_string(&answer).unwrap() + "\n"
        };
        let whole = line(0) + &line(1);
        std::fs::write(&path, whole.clone() + &line(2)[..20]).unwrap();
        let (answers, bytes) = read_whole(&path).unwrap();
        assert_eq!((answers.len(), bytes as usize), (2, whole.len()));
        std::fs::write(&path, line(0) + "{}\n" + &line(1)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 2"));
    }
}
