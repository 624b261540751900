//! What heads learn from: for each position of the answers (and of the prompts, which are text too) the model's hidden state,
//! the token that follows, and the model's own distribution of it.
//!
//! Features stand in shards, safetensors files of up to [`SHARD`] rows, sequences one after the other:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `hidden` | F16, n x n_embd | post-norm hidden state at the row's position |
//! | `next` | U32, n | the token behind it |
//! | `remaining` | U32, n | rows of the same sequence that follow |
//! | `top`, `top_p` | U32 and F16, n x [`TOP`] | the likeliest tokens there, and their probabilities |
//!
//! Every twentieth prompt is held out: its answers are in shards of their own, without the prompts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use safetensors::{Dtype, SafeTensors};

use super::TrainError;
use super::answers::Answer;
use super::fit::FitError;
use super::fit::shards::Shards;
use super::prompts::Prompts;
use crate::llama::{Context, ContextParams, Model, SeqId, Token};
use crate::vector::{largest_k, log_sum_exp};

/// Rows of a shard.
pub const SHARD: usize = 1 << 16;
/// Likeliest tokens that are kept.
pub const TOP: usize = 16;
/// One prompt in this many is held out.
const HELD_OUT: u64 = 20;
/// Rows of one forward pass.
const N_BATCH: usize = 512;

/// Bytes that a row takes on the disk.
#[must_use]
pub fn row_bytes(n_embd: usize) -> usize {
    2 * n_embd + 8 + 6 * TOP
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

/// Computes the features of all answers that have none yet. `progress` gets the number of answers done.
///
/// # Errors
/// When a forward pass fails, a file cannot be written, or the shards are of another model.
pub fn compute(
    model: &Arc<Model>,
    prompts: &Prompts,
    answers: &[Answer],
    folder: &Path,
    params: FeatureParams,
    mut progress: impl FnMut(usize),
) -> Result<(), TrainError> {
    let identity = format!("{} {} {}", model.quantization(), model.size_bytes(), model.n_params());
    let (mut index, mut done) = resume(folder, &identity)?;
    let mut reader = Reader::new(Arc::clone(model), params)?;
    let n_common = prompts.n_common(model);
    let (mut train, mut held) = (Rows::default(), Rows::default());
    progress(done);
    let mut room = (params.max_bytes / row_bytes(model.n_embd()) as u64).saturating_sub(rows_on_disk(folder)?);
    while done < answers.len() && room > 0 {
        let answer = &answers[done];
        let held_out = super::mix(answer.id as u64).is_multiple_of(HELD_OUT);
        let prompt = prompts.text(model, answer.id);
        let n_prompt = model.tokenize(&prompt, true)?.len();
        let mut tokens = model.tokenize(&(prompt + &answer.answer), true)?;
        tokens.truncate(params.n_ctx - 1);
        if answer.finish == "stop" {
            tokens.extend(model.end_token());
        }
        let first = if held_out { n_prompt.saturating_sub(1) } else { n_common.min(n_prompt.saturating_sub(1)) };
        reader.read(&tokens, first, if held_out { &mut held } else { &mut train })?;
        done += 1;
        room = room.saturating_sub(tokens.len() as u64);
        if train.next.len() + held.next.len() >= SHARD || done == answers.len() || room == 0 {
            for (rows, kind) in [(&mut train, "train"), (&mut held, "held")] {
                let meta = [("model", identity.clone()), ("answers", done.to_string())];
                let meta = meta.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
                rows.write(&folder.join(format!("{kind}-{index:05}.safetensors")), meta, model.n_embd())?;
            }
            index += 1;
        }
        progress(done);
    }
    Ok(())
}

/// How to compute features.
#[derive(Clone, Copy, Debug)]
pub struct FeatureParams {
    /// Longest sequence; what is longer is cut.
    pub n_ctx: usize,
    /// Threads.
    pub n_threads: usize,
    /// Bytes that all shards together may take, about.
    pub max_bytes: u64,
}

/// Rows that stand in shards already.
fn rows_on_disk(folder: &Path) -> Result<u64, TrainError> {
    let n = |prefix| Shards::open(folder, prefix).map(|shards| shards.n_rows() as u64);
    Ok(n("train-").map_err(FitError::from)? + n("held-").map_err(FitError::from)?)
}

/// The next shard's number, and the answers that stand in shards already.
fn resume(folder: &Path, identity: &str) -> Result<(usize, usize), TrainError> {
    std::fs::create_dir_all(folder).map_err(|e| TrainError::file(folder, e))?;
    let mut next = (0, 0);
    // A shard of held-out rows is written last, so it closes its number.
    for path in shards(folder, "held")? {
        let bytes = std::fs::read(&path).map_err(|e| TrainError::file(&path, e))?;
        let (_, meta) = SafeTensors::read_metadata(&bytes).map_err(|e| TrainError::file(&path, e))?;
        let meta = meta.metadata().clone().unwrap_or_default();
        if meta.get("model").is_none_or(|m| m != identity) {
            return Err(TrainError::file(&path, "its features are of another model: remove the folder, or name another"));
        }
        let number = |text: &str| text.parse::<usize>().ok();
        let index = path.file_stem().and_then(|s| s.to_str()).and_then(|s| number(s.trim_start_matches("held-")));
        let done = meta.get("answers").and_then(|n| number(n));
        let (Some(index), Some(done)) = (index, done) else { return Err(TrainError::file(&path, "is no shard")) };
        next = next.max((index + 1, done));
    }
    Ok(next)
}

/// The shards of a kind, in order.
///
/// # Errors
/// When the folder cannot be read.
pub fn shards(folder: &Path, kind: &str) -> Result<Vec<PathBuf>, TrainError> {
    let entries = std::fs::read_dir(folder).map_err(|e| TrainError::file(folder, e))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    let name = |p: &PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    paths.retain(|p| name(p).starts_with(&format!("{kind}-")) && name(p).ends_with(".safetensors"));
    paths.sort();
    Ok(paths)
}

/// Runs texts through the model.
struct Reader {
    context: Context,
    model: Arc<Model>,
    best: Vec<(Token, f32)>,
}

impl Reader {
    fn new(model: Arc<Model>, params: FeatureParams) -> Result<Self, TrainError> {
        let context = ContextParams {
            n_cells: params.n_ctx,
            n_batch: N_BATCH.min(params.n_ctx),
            n_ubatch: N_BATCH,
            n_seq_max: 1,
            n_threads: params.n_threads,
            unified: true,
            tap_hidden: true,
            embeddings: false,
        };
        Ok(Self { context: Context::new(Arc::clone(&model), &context)?, model, best: vec![] })
    }

    /// Appends the rows of `tokens` from position `first` on; the last token is no row, since nothing follows it.
    fn read(&mut self, tokens: &[Token], first: usize, rows: &mut Rows) -> Result<(), TrainError> {
        let Some(n_rows) = tokens.len().checked_sub(1).filter(|&n| n > first) else { return Ok(()) };
        let n_batch = N_BATCH.min(self.context.n_cells());
        self.context.clear();
        let mut batch = self.context.batch();
        for start in (0..n_rows).step_by(n_batch) {
            batch.clear();
            let end = n_rows.min(start + n_batch);
            for (pos, &token) in tokens.iter().enumerate().take(end).skip(start) {
                batch.add(token, pos, &[SeqId(0)], pos >= first)?;
            }
            self.context.forward(&batch)?;
            for pos in start.max(first)..end {
                let logits = self.context.logits(pos - start)?;
                let norm = log_sum_exp(logits);
                largest_k(logits, TOP, &mut self.best);
                rows.top.extend(self.best.iter().map(|(t, _)| t.0 as u32));
                rows.top_p.extend(self.best.iter().map(|(_, l)| f16::from_f32((l - norm).exp())));
                let missing = TOP - self.best.len();
                rows.top.extend(std::iter::repeat_n(0, missing));
                rows.top_p.extend(std::iter::repeat_n(f16::ZERO, missing));
                rows.hidden.extend(self.context.hidden(pos - start)?.iter().map(|&v| f16::from_f32(v)));
                rows.next.push(tokens[pos + 1].0 as u32);
                rows.remaining.push((n_rows - 1 - pos) as u32);
            }
        }
        debug_assert_eq!(rows.hidden.len(), rows.next.len() * self.model.n_embd());
        Ok(())
    }
}

impl Rows {
    /// Writes and empties them. The file appears under its name when it is whole.
    fn write(&mut self, path: &Path, meta: HashMap<String, String>, n_embd: usize) -> Result<(), TrainError> {
        let n = self.next.len();
        let u32s = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let f16s = |values: &[f16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tensors = [
            ("hidden", Dtype::F16, vec![n, n_embd], f16s(&self.hidden)),
            ("next", Dtype::U32, vec![n], u32s(&self.next)),
            ("remaining", Dtype::U32, vec![n], u32s(&self.remaining)),
            ("top", Dtype::U32, vec![n, TOP], u32s(&self.top)),
            ("top_p", Dtype::F16, vec![n, TOP], f16s(&self.top_p)),
        ];
        super::write_tensors(path, &tensors, Some(meta))?;
        *self = Self::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_written_and_tell_where_to_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let meta = |n: usize| HashMap::from([("model".into(), "a".into()), ("answers".into(), n.to_string())]);
        let mut rows = Rows {
            hidden: vec![f16::from_f32(0.5); 6],
            next: vec![7, 8],
            remaining: vec![1, 0],
            top: vec![3; 2 * TOP],
            top_p: vec![f16::from_f32(0.25); 2 * TOP],
        };
        rows.write(&folder.path().join("train-00000.safetensors"), meta(5), 3).unwrap();
        Rows::default().write(&folder.path().join("held-00000.safetensors"), meta(5), 3).unwrap();
        assert_eq!(resume(folder.path(), "a").unwrap(), (1, 5));
        assert!(resume(folder.path(), "b").unwrap_err().to_string().contains("another model"));
        let bytes = std::fs::read(&shards(folder.path(), "train").unwrap()[0]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("next").unwrap().data(), [7, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(file.tensor("hidden").unwrap().shape(), [2, 3]);
    }
}
