//! What the engine needs of a model and its cache: llama.cpp's in the server, a stub in tests.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::sharing::{Pass, Sharing};
use super::slots::KvOp;
use crate::llama::{Batch, Context, LlamaError, Model, SeqId, Tapped, Threads, Token};
use crate::speculate::cost;
use crate::speculate::device::{self, Ask, DeviceHeads};

/// One token to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Which.
    pub token: Token,
    /// Its position in the sequence.
    pub pos: usize,
    /// Whose; a node of a tree has an id for each leaf below it. It sees the cells of the first
    /// one.
    pub seqs: &'a [SeqId],
    /// Whether its logits are wanted.
    pub output: bool,
}

/// The rows of a step. Keeps its memory from step to step.
#[derive(Debug, Default)]
pub struct Rows {
    rows: Vec<(Token, usize, bool, Range<usize>)>,
    ids: Vec<SeqId>,
}

impl Rows {
    /// Adds a row.
    pub fn push(
        &mut self,
        token: Token,
        pos: usize,
        seqs: impl IntoIterator<Item = SeqId>,
        output: bool,
    ) {
        let from = self.ids.len();
        self.ids.extend(seqs);
        self.rows.push((token, pos, output, from..self.ids.len()));
    }

    /// All rows, in order.
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        self.slice(0..self.len())
    }

    fn slice(&self, range: Range<usize>) -> impl Iterator<Item = Row<'_>> {
        let row = |&(token, pos, output, ref ids): &(_, _, _, Range<usize>)| Row {
            token,
            pos,
            seqs: &self.ids[ids.clone()],
            output,
        };
        self.rows[range].iter().map(row)
    }

    /// Runs of rows of the same sequence.
    fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = vec![];
        for (i, row) in self.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if self.ids[self.rows[run.start].3.start] == row.seqs[0] => {
                    run.end = i + 1
                }
                _ => runs.push(i..i + 1),
            }
        }
        runs
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// `true` without rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Drops all rows.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.ids.clear();
    }
}

/// Why a step, or one sequence's part in it, failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// llama.cpp failed, or refused.
    #[error(transparent)]
    Llama(#[from] LlamaError),
    /// A row whose logits were asked for has none.
    #[error("row {0} has no logits")]
    NoLogits(usize),
    /// Cells are saved and restored by a sequence id of its own, and there is none.
    #[error("there is no sequence id to save cells with")]
    NoSpare,
}

/// A model with its KV cache.
pub trait Forward {
    /// Values in a row of logits.
    fn n_vocab(&self) -> usize;
    /// Computes all rows and caches them.
    ///
    /// # Errors
    /// When the pass failed; what the cache then holds of these sequences is unknown.
    fn forward(&mut self, rows: &Rows) -> Result<(), StepError>;
    /// Logits of a row of the last pass that wanted them.
    ///
    /// # Errors
    /// For any other row.
    fn logits(&self, row: usize) -> Result<&[f32], StepError>;
    /// Hidden state, after the final norm, of a row of the last pass that wanted logits: what heads
    /// draft from.
    ///
    /// # Errors
    /// For any other row, or a model that does not keep it.
    fn hidden(&self, row: usize) -> Result<&[f32], StepError>;
    /// What the model's draft layers continue from after any row of the last pass; `None` without such
    /// layers.
    ///
    /// # Errors
    /// When the model does not tell.
    fn state(&self, _row: usize) -> Result<Option<&[f32]>, StepError> {
        Ok(None)
    }
    /// `true` if [`verify`](Self::verify) is worth a call.
    fn verifies(&self) -> bool {
        false
    }
    /// Chooses the tokens after the last pass's output rows, and drafts after them, where the
    /// logits are: by row the token, -1 for the rows of sequences that the host is to choose for.
    /// `None` where the host is to choose for all.
    fn verify(&mut self, _ask: Ask<'_>) -> Option<&[i32]> {
        None
    }
    /// Does to the cache what the ledger says.
    ///
    /// # Errors
    /// When the cache cannot do that.
    fn apply(&mut self, op: KvOp) -> Result<(), StepError>;
    /// The cells of a sequence at these positions, to be [restored](Self::restore) later.
    ///
    /// # Errors
    /// When they cannot be read.
    fn save(&mut self, _seq: SeqId, _positions: Range<usize>) -> Result<Vec<u8>, StepError> {
        Err(StepError::NoSpare)
    }
    /// Gives a sequence the cells at `wanted` positions of those that were saved, which end where
    /// `wanted` does.
    ///
    /// # Errors
    /// When there is no room for them, or they are not what was saved; nothing has changed then.
    fn restore(
        &mut self,
        _seq: SeqId,
        _wanted: Range<usize>,
        _cells: &[u8],
    ) -> Result<(), StepError> {
        Err(StepError::NoSpare)
    }
    /// Appends a token's bytes in a text; those of a control token are its name's if `by_name`, else
    /// none.
    fn piece(&self, token: Token, by_name: bool, out: &mut Vec<u8>);
    /// `true` for tokens that end a text.
    fn is_end(&self, token: Token) -> bool;
}

/// llama.cpp as the engine's model.
///
/// In a unified cache a step is one pass. In streams it is one for all sequences with a single row,
/// and one for each with more: sequences of one pass must have equally many rows, and a pass reads
/// as many cells of every stream as the longest one has.
pub struct LlamaForward {
    context: Context,
    batch: Batch,
    model: Arc<Model>,
    streams: bool,
    /// For each row of the step, where its logits are.
    places: Vec<Place>,
    /// Logits of earlier passes of the step, row after row.
    kept: Vec<f32>,
    /// For each row of the step, what draft layers continue from; empty without such layers.
    states: Vec<f32>,
    keeps_states: bool,
    /// Heads and verification where the logits are.
    device: Option<Rc<RefCell<DeviceHeads>>>,
    chosen: Vec<i32>,
    /// What sets the number of threads; `None`: it stays.
    sharing: Option<Sharing>,
    /// An id of no sequence, by which cells are saved and restored.
    spare: Option<SeqId>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the context, for this row of the last pass.
    Context(usize),
    /// From this index on in `kept`.
    Kept(usize),
    /// Nowhere: the row wanted none.
    Nowhere,
}

impl LlamaForward {
    /// Takes a context over.
    pub fn new(context: Context) -> Self {
        let (batch, model) = (context.batch(), Arc::clone(context.model()));
        Self {
            batch,
            model,
            streams: !context.is_unified(),
            keeps_states: context.has_states(),
            states: Vec::new(),
            context,
            places: Vec::new(),
            kept: Vec::new(),
            device: None,
            chosen: Vec::new(),
            sharing: None,
            spare: None,
        }
    }

    /// Lets tokens be chosen and drafted on the device that the logits are on. `heads` must be on
    /// that device, too.
    pub fn use_device(&mut self, heads: Rc<RefCell<DeviceHeads>>) {
        self.device = Some(heads);
    }

    /// Lets the number of threads follow what the machine has for them: at most so many for passes
    /// that decode, and for those that read prompts.
    pub fn share_threads(&mut self, n_decoding: usize, n_prompts: usize) {
        self.sharing = Some(Sharing::new(n_decoding, n_prompts));
    }

    /// Lets cells be saved and restored by an id that nobody else uses.
    pub fn use_spare(&mut self, spare: SeqId) {
        self.spare = Some(spare);
    }

    /// A pass, on as many threads as are good for it.
    fn pass(
        &mut self,
        pass: Pass,
        n_rows: usize,
        compute: impl FnOnce(&mut Self) -> Result<(), LlamaError>,
    ) -> Result<(), LlamaError> {
        if let Some(sharing) = &mut self.sharing {
            sharing.begin(pass, n_rows, self.context.threads());
        }
        let began = Instant::now();
        let result = compute(self);
        if let Some(sharing) = &mut self.sharing {
            sharing.end(pass, n_rows, began);
        }
        result
    }

    /// The threads that it computes with.
    pub fn threads(&self) -> &Threads {
        self.context.threads()
    }

    /// Tokens that a sequence can be taken back by after a pass, of a model that keeps states.
    pub fn n_rollback(&self) -> usize {
        self.context.n_rollback()
    }

    /// Where the last pass left its logits and hidden states.
    pub fn tapped(&self) -> Option<Tapped<'_>> {
        self.context.tapped()
    }

    /// What steps take, as [`cost::measure`] has it, in about `limit` beside the first pass, which
    /// reads the model's weights into memory.
    ///
    /// # Errors
    /// When a pass fails.
    pub fn measure(
        &mut self,
        numbers: &[usize],
        limit: Duration,
    ) -> Result<(Vec<(usize, f64)>, f64), LlamaError> {
        self.time(0, 1, true)?;
        cost::measure(numbers, limit.as_secs_f64(), |n| self.time(0, n, true))
    }

    /// Puts `n` tokens into the empty cache.
    ///
    /// # Errors
    /// When a pass fails.
    pub fn fill(&mut self, n: usize) -> Result<(), LlamaError> {
        let n_rows = self.batch.n_most();
        (0..n).step_by(n_rows).try_for_each(|from| {
            self.set_batch(from, n_rows.min(n - from), false)?;
            self.context.forward(&self.batch)
        })
    }

    /// Seconds of a pass of `n` rows, with logits of all or of the last one, after the first
    /// `n_before` tokens in the cache. It leaves only those there.
    ///
    /// # Errors
    /// When the pass fails.
    pub fn time(&mut self, n_before: usize, n: usize, all: bool) -> Result<f64, LlamaError> {
        self.set_batch(n_before, n, all)?;
        let started = Instant::now();
        if let Some(sharing) = &mut self.sharing {
            sharing.begin_measured(self.context.threads());
        }
        let result = self.context.forward(&self.batch);
        if let Some(sharing) = &mut self.sharing {
            sharing.end_measured();
        }
        result?;
        if self.tapped().is_none_or(|tapped| tapped.on_host) {
            self.context.logits(n - 1)?; // of all rows: they cross to the host together
        }
        let seconds = started.elapsed().as_secs_f64();
        self.context.remove_from(SeqId(0), n_before)?;
        Ok(seconds)
    }

    /// Makes a batch of `n` rows of one sequence from a position on, with logits of all or of the
    /// last one.
    fn set_batch(&mut self, from: usize, n: usize, all: bool) -> Result<(), LlamaError> {
        self.batch.clear();
        (from..from + n).try_for_each(|pos| {
            let output = all || pos + 1 == from + n;
            self.batch.add(Token(0), pos, &[SeqId(0)], output).map(|_| ())
        })
    }

    /// Adds `row`, which is the step's `index`-th, to the next pass.
    fn add(&mut self, index: usize, row: Row<'_>) -> Result<(), LlamaError> {
        let at = self.batch.add(row.token, row.pos, row.seqs, row.output)?;
        self.places[index] = if row.output { Place::Context(at) } else { Place::Nowhere };
        Ok(())
    }

    /// Copies out the states of the last pass, whose rows are these of the step.
    fn keep_states(&mut self, rows: impl Iterator<Item = usize>) -> Result<(), LlamaError> {
        if self.keeps_states {
            let n = self.model.n_embd();
            for (at, row) in rows.enumerate() {
                self.states[row * n..][..n].copy_from_slice(self.context.state(at)?);
            }
        }
        Ok(())
    }

    /// Copies out what the next pass would overwrite.
    fn keep_logits(&mut self) -> Result<(), LlamaError> {
        for place in &mut self.places {
            if let Place::Context(at) = *place {
                *place = Place::Kept(self.kept.len());
                self.kept.extend_from_slice(self.context.logits(at)?);
            }
        }
        Ok(())
    }

    /// One pass for each sequence with several rows, and then one for the others.
    fn forward_streams(&mut self, rows: &Rows) -> Result<(), LlamaError> {
        let (single, several): (Vec<_>, Vec<_>) =
            rows.runs().into_iter().partition(|run| run.len() == 1);
        for run in several {
            self.batch.clear();
            run.clone().zip(rows.slice(run.clone())).try_for_each(|(i, row)| self.add(i, row))?;
            self.context.forward(&self.batch)?;
            self.keep_logits()?;
            self.keep_states(run)?;
        }
        self.batch.clear();
        for run in &single {
            run.clone().zip(rows.slice(run.clone())).try_for_each(|(i, row)| self.add(i, row))?;
        }
        if self.batch.is_empty() {
            return Ok(());
        }
        self.context.forward(&self.batch)?;
        self.keep_states(single.into_iter().flatten())
    }
}

impl Forward for LlamaForward {
    fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    fn forward(&mut self, rows: &Rows) -> Result<(), StepError> {
        self.places.clear();
        self.places.resize(rows.len(), Place::Nowhere);
        self.kept.clear();
        if self.keeps_states {
            self.states.resize(rows.len() * self.model.n_embd(), 0.0);
        }
        let reads_prompts = rows.iter().any(|row| !row.output);
        let pass = if reads_prompts { Pass::Prompts } else { Pass::Decoding };
        if self.streams {
            return Ok(self.pass(pass, rows.len(), |this| this.forward_streams(rows))?);
        }
        self.batch.clear();
        rows.iter().enumerate().try_for_each(|(i, row)| self.add(i, row))?;
        self.pass(pass, rows.len(), |this| this.context.forward(&this.batch))?;
        Ok(self.keep_states(0..rows.len())?)
    }

    fn logits(&self, row: usize) -> Result<&[f32], StepError> {
        match self.places.get(row) {
            Some(&Place::Context(at)) => Ok(self.context.logits(at)?),
            Some(&Place::Kept(from)) => Ok(&self.kept[from..from + self.model.n_vocab()]),
            Some(Place::Nowhere) | None => Err(StepError::NoLogits(row)),
        }
    }

    fn hidden(&self, row: usize) -> Result<&[f32], StepError> {
        Ok(self.context.hidden(row)?)
    }

    fn state(&self, row: usize) -> Result<Option<&[f32]>, StepError> {
        let n = self.model.n_embd();
        Ok(self.keeps_states.then(|| &self.states[row * n..][..n]))
    }

    fn verifies(&self) -> bool {
        self.device.is_some()
    }

    fn verify(&mut self, ask: Ask<'_>) -> Option<&[i32]> {
        let heads = Rc::clone(self.device.as_ref()?);
        if ask.sequences.len() > device::MOST_SEQUENCES || ask.rows.len() > device::MOST_ROWS {
            return None;
        }
        let n_outputs = self.places.iter().filter(|p| matches!(p, Place::Context(_))).count();
        let tapped = self
            .context
            .tapped()
            .filter(|t| t.n_rows == n_outputs && ask.rows.len() <= n_outputs)?;
        self.chosen.clear();
        match heads.borrow_mut().verify(tapped.logits, tapped.hidden, self.model.n_vocab(), ask) {
            Ok(chosen) => self.chosen.extend_from_slice(chosen),
            Err(error) => {
                tracing::error!(%error, "the device failed to verify; from now on the host does");
                self.device = None;
                return None;
            }
        }
        Some(&self.chosen)
    }

    fn apply(&mut self, op: KvOp) -> Result<(), StepError> {
        match op {
            KvOp::Remove { seq, from } => self.context.remove_from(seq, from)?,
            KvOp::Share { from, to, start, end } => self.context.share(from, to, start..end)?,
        }
        Ok(())
    }

    fn save(&mut self, seq: SeqId, positions: Range<usize>) -> Result<Vec<u8>, StepError> {
        let spare = self.spare.ok_or(StepError::NoSpare)?;
        Ok(self.context.save_cells(seq, positions, spare)?)
    }

    fn restore(&mut self, seq: SeqId, wanted: Range<usize>, cells: &[u8]) -> Result<(), StepError> {
        let spare = self.spare.ok_or(StepError::NoSpare)?;
        Ok(self.context.restore_cells(seq, wanted, cells, spare)?)
    }

    fn piece(&self, token: Token, by_name: bool, out: &mut Vec<u8>) {
        self.model.piece(token, by_name, out);
    }

    fn is_end(&self, token: Token) -> bool {
        self.model.is_end(token)
    }
}
