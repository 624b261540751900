//! Training data on the disk: for each token of the answers the hidden state it was chosen from, the
//! token, and the model's own distribution.
//!
//! Shards are safetensors files of about 32 thousand rows, answers one after the other:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `hidden` | F16, n x n_embd | post-norm hidden state that the token was chosen from |
//! | `next` | U32, n | the token |
//! | `remaining` | U32, n | rows of the same answer that follow |
//! | `top`, `top_p` | U32 and F16, n x [`Trace::TOP`] | the most likely tokens there, and their probabilities |
//!
//! Shards come in pairs, one to train on and one held out with the answers of every twentieth
//! prompt. The metadata of the held-out shard, which is written last, name the model, the answers
//! of the pair, and their tokens.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::Dtype;

use super::{le_bytes, read_header, write_tensors};
use crate::files::FileError;
use crate::llama::Model;
use crate::request::Trace;

/// Rows of a pair of shards, the most that a killed run loses.
const SHARD: usize = 1 << 15;
/// One prompt in this many is held out.
const HELD_OUT: u64 = 20;

/// Whether a prompt's answers are for measuring, not for training.
fn is_held_out(prompt: usize) -> bool {
    fastrand::Rng::with_seed(prompt as u64).u64(..HELD_OUT) == 0
}

/// Bytes of a row on the disk.
pub fn row_bytes(n_embd: usize) -> usize {
    2 * n_embd + 8 + 6 * Trace::TOP
}

/// Writes shards after those that exist.
pub struct Writer {
    folder: PathBuf,
    identity: String,
    n_embd: usize,
    /// The next pair's number.
    next: usize,
    /// Answers that exist, by prompt and round.
    answered: HashSet<(usize, usize)>,
    /// Tokens of all answers.
    pub n_tokens: usize,
    max_tokens: usize,
    /// Answers of the pair that is being filled.
    waiting: Vec<(usize, usize)>,
    train: ShardRows,
    held: ShardRows,
}

impl Writer {
    /// Continues the shards of a folder, which take up to about `max_bytes`.
    pub fn open(folder: &Path, model: &Model, max_bytes: u64) -> Result<Self, FileError> {
        let identity =
            format!("{} {} {}", model.quantization(), model.size_bytes(), model.n_params());
        Self::resume(folder, identity, model.n_embd(), max_bytes)
    }

    fn resume(
        folder: &Path,
        identity: String,
        n_embd: usize,
        max_bytes: u64,
    ) -> Result<Self, FileError> {
        std::fs::create_dir_all(folder).map_err(|e| FileError::new(folder, e))?;
        let max_tokens = (max_bytes / row_bytes(n_embd) as u64) as usize;
        let mut writer = Self {
            folder: folder.to_owned(),
            identity,
            n_embd,
            next: 0,
            answered: HashSet::new(),
            n_tokens: 0,
            max_tokens,
            waiting: vec![],
            train: ShardRows::default(),
            held: ShardRows::default(),
        };
        let entries = std::fs::read_dir(folder).map_err(|e| FileError::new(folder, e))?;
        for path in entries.flatten().map(|e| e.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let number = name.strip_prefix("held-").and_then(|n| n.strip_suffix(".safetensors"));
            if let Some(number) = number.and_then(|n| n.parse::<usize>().ok()) {
                writer.add_pair(&path)?;
                writer.next = writer.next.max(number + 1);
            }
        }
        Ok(writer)
    }

    /// Adds the answers that a held-out shard's metadata list.
    fn add_pair(&mut self, path: &Path) -> Result<(), FileError> {
        let meta = read_header(path)?.metadata().clone().unwrap_or_default();
        if meta.get("model").is_none_or(|m| *m != self.identity) {
            let why = "its features belong to another model: remove the folder, or name another";
            return Err(FileError::new(path, why));
        }
        let answers = meta.get("answers");
        let answers = answers.and_then(|l| serde_json::from_str::<Vec<(usize, usize)>>(l).ok());
        let n_tokens = meta.get("tokens").and_then(|n| n.parse::<usize>().ok());
        let (Some(answers), Some(n_tokens)) = (answers, n_tokens) else {
            return Err(FileError::new(path, "is not a shard"));
        };
        self.answered.extend(answers);
        self.n_tokens += n_tokens;
        Ok(())
    }

    pub fn has(&self, prompt: usize, round: usize) -> bool {
        self.answered.contains(&(prompt, round))
    }

    /// Whether more answers may come.
    pub fn has_room(&self) -> bool {
        self.n_tokens < self.max_tokens
    }

    pub fn add(&mut self, prompt: usize, round: usize, trace: Trace) -> Result<(), FileError> {
        self.answered.insert((prompt, round));
        self.n_tokens += trace.tokens.len();
        self.waiting.push((prompt, round));
        if is_held_out(prompt) { &mut self.held } else { &mut self.train }.push(trace);
        if self.n_waiting() >= SHARD { self.flush() } else { Ok(()) }
    }

    fn n_waiting(&self) -> usize {
        self.train.next.len() + self.held.next.len()
    }

    /// Writes the answers that wait for a full shard.
    pub fn flush(&mut self) -> Result<(), FileError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let answers = serde_json::to_string(&self.waiting).expect("numbers have a JSON form");
        let meta = HashMap::from([
            ("model".to_owned(), self.identity.clone()),
            ("answers".to_owned(), answers),
            ("tokens".to_owned(), self.n_waiting().to_string()),
        ]);
        for (rows, kind) in [(&mut self.train, "train"), (&mut self.held, "held")] {
            let path = self.folder.join(format!("{kind}-{:05}.safetensors", self.next));
            rows.write(&path, meta.clone(), self.n_embd)?;
        }
        self.next += 1;
        self.waiting.clear();
        Ok(())
    }
}

/// Rows that wait to be written.
#[derive(Default)]
struct ShardRows {
    hidden: Vec<f16>,
    next: Vec<u32>,
    remaining: Vec<u32>,
    top: Vec<u32>,
    top_p: Vec<f16>,
}

impl ShardRows {
    fn push(&mut self, trace: Trace) {
        self.hidden.extend(trace.hidden);
        self.remaining.extend((0..trace.tokens.len() as u32).rev());
        self.next.extend(trace.tokens.iter().map(|t| t.0 as u32));
        self.top.extend(trace.top.iter().map(|(t, _)| t.0 as u32));
        self.top_p.extend(trace.top.iter().map(|(_, p)| *p));
    }

    /// Writes the rows to a file and clears them.
    fn write(
        &mut self,
        path: &Path,
        meta: HashMap<String, String>,
        n_embd: usize,
    ) -> Result<(), FileError> {
        let n = self.next.len();
        let tensors = [
            ("hidden", Dtype::F16, vec![n, n_embd], le_bytes!(self.hidden)),
            ("next", Dtype::U32, vec![n], le_bytes!(self.next)),
            ("remaining", Dtype::U32, vec![n], le_bytes!(self.remaining)),
            ("top", Dtype::U32, vec![n, Trace::TOP], le_bytes!(self.top)),
            ("top_p", Dtype::F16, vec![n, Trace::TOP], le_bytes!(self.top_p)),
        ];
        write_tensors(path, &tensors, Some(meta))?;
        *self = Self::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::report::push;
    use crate::llama::Token;
    use crate::train::fit::shards::Shards;

    fn writer(folder: &Path, identity: &str) -> Result<Writer, FileError> {
        Writer::resume(folder, identity.into(), 3, 10 * row_bytes(3) as u64)
    }

    fn trace(tokens: &[i32]) -> Trace {
        let mut trace = Trace::default();
        tokens.iter().for_each(|&t| {
            push(&mut trace, Token(t), &[0.5, 1.0, t as f32], &[0.0, 3.0], &mut vec![])
        });
        trace
    }

    #[test]
    fn answers_are_read_as_written_and_a_run_resumes_after_them() {
        let held_out = (0..).find(|&prompt| is_held_out(prompt)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut first = writer(folder.path(), "a").unwrap();
        first.add(held_out + 1, 0, trace(&[7, 8])).unwrap();
        first.add(held_out, 2, trace(&[9])).unwrap();
        first.flush().unwrap();
        first.add(held_out + 2, 0, trace(&[1, 2, 3])).unwrap(); // lost: the shard is not full

        let mut second = writer(folder.path(), "a").unwrap();
        assert_eq!((second.n_tokens, second.next, second.has_room()), (3, 1, true));
        assert!(
            second.has(held_out + 1, 0) && second.has(held_out, 2) && !second.has(held_out + 2, 0)
        );
        second.add(held_out + 2, 0, trace(&[1, 2, 3, 4, 5, 6, 7])).unwrap();
        second.flush().unwrap();
        assert!(!second.has_room(), "ten rows fit");

        let of = |prefix: &str| {
            let shards = Shards::open(folder.path(), prefix).unwrap();
            (0..shards.len()).map(|i| shards.load(i).unwrap()).collect::<Vec<_>>()
        };
        let (train, held) = (of("train-"), of("held-"));
        assert_eq!(
            [train[0].n_rows(), train[1].n_rows(), held[0].n_rows(), held[1].n_rows()],
            [2, 7, 1, 0]
        );
        assert_eq!(
            (train[0].path(0, 1), train[0].n_targets(0), train[0].path(1, 2)),
            (Some(7), 1, None)
        );
        let likely: Vec<_> = held[0].likely(0).take(3).collect();
        assert_eq!((likely[0].0, likely[1].0, likely[2]), (1, 0, (0, 0.0)));
        assert!((likely[0].1 + likely[1].1 - 1.0).abs() < 1e-3 && likely[0].1 > 0.9);
        assert!(writer(folder.path(), "b").err().unwrap().to_string().contains("another model"));
    }
}
