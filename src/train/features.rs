//! What heads learn from, on the disk: for each token of the answers the hidden state it was chosen
//! from, the token, and the model's own distribution.
//!
//! Features stand in shards, safetensors files of some 32 thousand rows, answers one after the
//! other:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `hidden` | F16, n x n_embd | post-norm hidden state that the token was chosen from |
//! | `next` | U32, n | the token |
//! | `remaining` | U32, n | rows of the same answer that follow |
//! | `top`, `top_p` | U32 and F16, n x [`Trace::TOP`] | the likeliest tokens there, and their probabilities |
//!
//! Shards come in pairs, for answers to train on and for those that are held out: every twentieth
//! prompt's. The metadata of the second one, which is written last, name the model, the answers of
//! the pair, and their tokens.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::{Dtype, SafeTensors};

use super::TrainError;
use crate::llama::Model;
use crate::request::Trace;

/// Rows of a pair of shards: what a kill can cost.
const SHARD: usize = 1 << 15;
/// One prompt in this many is held out.
const HELD_OUT: u64 = 20;

/// Bytes that a row takes on the disk.
#[must_use]
pub fn row_bytes(n_embd: usize) -> usize {
    2 * n_embd + 8 + 6 * Trace::TOP
}

/// Writes shards behind those that are there.
pub struct Writer {
    folder: PathBuf,
    identity: String,
    n_embd: usize,
    /// The next pair's number.
    next: usize,
    /// Answers that are there, by prompt and round.
    answered: HashSet<(usize, usize)>,
    n_tokens: usize,
    max_tokens: usize,
    /// Of the pair that is being filled.
    waiting: Vec<(usize, usize)>,
    train: Rows,
    held: Rows,
}

impl Writer {
    /// Goes on with the shards of a folder. They take up to about `max_bytes`.
    ///
    /// # Errors
    /// When the folder cannot be read, or its shards are another model's.
    pub fn open(folder: &Path, model: &Model, max_bytes: u64) -> Result<Self, TrainError> {
        let identity =
            format!("{} {} {}", model.quantization(), model.size_bytes(), model.n_params());
        Self::resume(folder, identity, model.n_embd(), max_bytes)
    }

    fn resume(
        folder: &Path,
        identity: String,
        n_embd: usize,
        max_bytes: u64,
    ) -> Result<Self, TrainError> {
        std::fs::create_dir_all(folder).map_err(|e| TrainError::file(folder, e))?;
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
            train: Rows::default(),
            held: Rows::default(),
        };
        let entries = std::fs::read_dir(folder).map_err(|e| TrainError::file(folder, e))?;
        for path in entries.flatten().map(|e| e.path()) {
            let name =
                path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let number = name
                .strip_prefix("held-")
                .and_then(|n| n.strip_suffix(".safetensors")?.parse::<usize>().ok());
            if let Some(number) = number {
                writer.note_pair(&path)?;
                writer.next = writer.next.max(number + 1);
            }
        }
        Ok(writer)
    }

    /// Takes in what a pair's metadata say.
    fn note_pair(&mut self, path: &Path) -> Result<(), TrainError> {
        let bytes = std::fs::read(path).map_err(|e| TrainError::file(path, e))?;
        let (_, meta) =
            SafeTensors::read_metadata(&bytes).map_err(|e| TrainError::file(path, e))?;
        let meta = meta.metadata().clone().unwrap_or_default();
        if meta.get("model").is_none_or(|m| *m != self.identity) {
            return Err(TrainError::file(
                path,
                "its features are of another model: remove the folder, or name another",
            ));
        }
        let answers = meta
            .get("answers")
            .and_then(|list| serde_json::from_str::<Vec<(usize, usize)>>(list).ok());
        let n_tokens = meta.get("tokens").and_then(|n| n.parse::<usize>().ok());
        let (Some(answers), Some(n_tokens)) = (answers, n_tokens) else {
            return Err(TrainError::file(path, "is no shard"));
        };
        self.answered.extend(answers);
        self.n_tokens += n_tokens;
        Ok(())
    }

    /// Whether a prompt's answer is there already.
    #[must_use]
    pub fn has(&self, prompt: usize, round: usize) -> bool {
        self.answered.contains(&(prompt, round))
    }

    /// Tokens of all answers.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Whether more answers may come.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.n_tokens < self.max_tokens
    }

    /// Adds an answer.
    ///
    /// # Errors
    /// When a full shard cannot be written.
    pub fn add(&mut self, prompt: usize, round: usize, trace: Trace) -> Result<(), TrainError> {
        self.answered.insert((prompt, round));
        self.n_tokens += trace.tokens.len();
        self.waiting.push((prompt, round));
        let held_out = super::mix(prompt as u64).is_multiple_of(HELD_OUT);
        if held_out { &mut self.held } else { &mut self.train }.push(trace);
        if self.n_waiting() >= SHARD { self.flush() } else { Ok(()) }
    }

    fn n_waiting(&self) -> usize {
        self.train.next.len() + self.held.next.len()
    }

    /// Writes what waits for a full shard.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let answers = serde_json::to_string(&self.waiting).expect("numbers have a JSON form");
        let meta = [
            ("model", self.identity.clone()),
            ("answers", answers),
            ("tokens", self.n_waiting().to_string()),
        ];
        let meta: HashMap<String, String> =
            meta.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
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
struct Rows {
    hidden: Vec<f16>,
    next: Vec<u32>,
    remaining: Vec<u32>,
    top: Vec<u32>,
    top_p: Vec<f16>,
}

impl Rows {
    fn push(&mut self, trace: Trace) {
        self.hidden.extend(trace.hidden);
        self.remaining.extend((0..trace.tokens.len() as u32).rev());
        self.next.extend(trace.tokens.iter().map(|t| t.0 as u32));
        self.top.extend(trace.top.iter().map(|(t, _)| t.0 as u32));
        self.top_p.extend(trace.top.iter().map(|(_, p)| *p));
    }

    /// Writes and empties them. The file appears under its name when it is whole.
    fn write(
        &mut self,
        path: &Path,
        meta: HashMap<String, String>,
        n_embd: usize,
    ) -> Result<(), TrainError> {
        let n = self.next.len();
        let u32s =
            |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let f16s =
            |values: &[f16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tensors = [
            ("hidden", Dtype::F16, vec![n, n_embd], f16s(&self.hidden)),
            ("next", Dtype::U32, vec![n], u32s(&self.next)),
            ("remaining", Dtype::U32, vec![n], u32s(&self.remaining)),
            ("top", Dtype::U32, vec![n, Trace::TOP], u32s(&self.top)),
            ("top_p", Dtype::F16, vec![n, Trace::TOP], f16s(&self.top_p)),
        ];
        super::write_tensors(path, &tensors, Some(meta))?;
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

    fn writer(folder: &Path, identity: &str) -> Result<Writer, TrainError> {
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
    fn answers_come_back_as_they_were_written_and_tell_where_to_go_on() {
        let held_out =
            (0..).find(|&id| super::super::mix(id).is_multiple_of(HELD_OUT)).unwrap() as usize;
        let folder = tempfile::tempdir().unwrap();
        let mut first = writer(folder.path(), "a").unwrap();
        first.add(held_out + 1, 0, trace(&[7, 8])).unwrap();
        first.add(held_out, 2, trace(&[9])).unwrap();
        first.flush().unwrap();
        first.add(held_out + 2, 0, trace(&[1, 2, 3])).unwrap(); // lost: the shard is not full

        let mut second = writer(folder.path(), "a").unwrap();
        assert_eq!((second.n_tokens(), second.next, second.has_room()), (3, 1, true));
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
