//! The engine seen from outside: hand it requests, ask how it is.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::task::{Context, Poll};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc};

use super::dry::{Breakers, Dry};
use super::grammar::Grammars;
use super::guide::Guide;
use super::lanes::{Lane, Lanes};
use super::leaves::DraftShape;
use super::rate::Rate;
use super::stats::Stats;
use super::{Job, Limits};
use crate::error::{Invalid, incident_id};
use crate::llama::{Model, Pooling, Token};
use crate::prefixes::Prefixes;
use crate::request::{Caller, Completion, Event, Piece, Prompt, Request};

/// Why a request was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// A field cannot be served; the client must change it.
    #[error("{0}")]
    Invalid(#[from] Invalid),
    /// The queue is full.
    #[error("{limit} requests are running or waiting already; try again later")]
    QueueFull {
        /// Requests that may run or wait.
        limit: usize,
    },
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// The engine failed on a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine failed on this request; the log names the cause under {id}")]
pub struct Failed {
    /// Names the failure in the log.
    pub id: String,
}

/// A request's answer as it arrives. Dropping it cancels the request.
#[derive(Debug)]
pub struct Answer {
    events: mpsc::Receiver<Event>,
    /// An event that arrived and was only looked at.
    peeked: Option<Event>,
}

impl From<mpsc::Receiver<Event>> for Answer {
    fn from(events: mpsc::Receiver<Event>) -> Self {
        Self { events, peeked: None }
    }
}

impl Answer {
    /// The next event, or what wakes the task when there is one. There is none after
    /// [`Event::Done`] or [`Event::Failed`].
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if let Some(event) = self.peeked.take() {
            return Poll::Ready(event);
        }
        self.events.poll_recv(cx).map(|event| {
            event.unwrap_or_else(|| {
                let id = incident_id();
                tracing::error!(id, "the engine's thread ended before the answer");
                Event::Failed { id }
            })
        })
    }

    /// The next event. There is none after [`Event::Done`] or [`Event::Failed`].
    pub async fn next(&mut self) -> Event {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next event, which stays the next one.
    pub async fn peek(&mut self) -> &Event {
        let next = self.next().await;
        self.peeked.insert(next)
    }

    /// The whole answer, and how it ended.
    ///
    /// # Errors
    /// [`Failed`]; what there was of the answer is lost.
    pub async fn collect(mut self) -> Result<(Piece, Completion), Failed> {
        let mut whole = Piece::default();
        loop {
            match self.next().await {
                Event::Progress(_) => {}
                Event::Piece(piece) => whole.append(piece),
                Event::Done(mut done) => {
                    whole.append(std::mem::take(&mut done.tail));
                    return Ok((whole, done));
                }
                Event::Failed { id } => return Err(Failed { id }),
            }
        }
    }
}

/// What compiles grammars where these control tokens are text.
type Known = (Vec<Token>, Arc<Grammars>);

/// Hands requests to a running engine. When the last clone is dropped the engine finishes what it
/// has and ends.
#[derive(Clone)]
pub struct Handle {
    /// The model served.
    pub model: Arc<Model>,
    /// The engine's sizes.
    pub limits: Limits,
    /// The longest context that the model was trained for, in tokens, as [`Rope`] extends it.
    ///
    /// [`Rope`]: crate::llama::Rope
    pub n_ctx_trained: usize,
    /// Heads that draft; 0 without any.
    pub n_heads: usize,
    /// Name of the model that drafts, if one does.
    pub draft_model: Option<String>,
    /// `true` if text drafts.
    pub drafts_text: bool,
    /// Where heads and verification are computed: `cpu` or `cuda`.
    pub drafting_on: &'static str,
    /// What of a sequence's candidates one pass can verify.
    pub draft_shape: DraftShape,
    /// How prompts are embedded; `None`: they are not.
    pub pooling: Option<Pooling>,
    /// Requests that may run or wait.
    pub n_queue: usize,
    /// Bytes of the host's memory that model, cache and buffers were planned to take.
    pub host_memory: u64,
    /// What the engine counts.
    pub stats: Arc<Stats>,
    /// Requests that were accepted.
    pub arrivals: Arc<Rate>,
    pub(super) prefixes: Option<Arc<Prefixes>>,
    pub(super) jobs: SyncSender<Job>,
    pub(super) permits: Arc<Semaphore>,
    /// What compiles grammars, by the control tokens that are text; the first few.
    pub(super) grammars: Arc<Mutex<Vec<Known>>>,
    /// Where requests are read; it ends with the last clone.
    pub(super) lanes: Arc<Lanes>,
}

impl Handle {
    /// Requests accepted and not yet ended.
    pub fn n_in_flight(&self) -> usize {
        self.n_queue - self.permits.available_permits()
    }

    /// Share of the cache's cells that running requests hold, from 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        self.stats.cells_active.get() as f64 / self.limits.n_cells() as f64
    }

    /// Hands a request to the engine.
    ///
    /// # Errors
    /// [`SubmitError`], and then nothing was taken.
    pub async fn submit(&self, request: Request, caller: Caller) -> Result<Answer, SubmitError> {
        let accepted = Instant::now();
        // The place first: a full server must not spend time on tokenising.
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let permit = permit.map_err(|_| SubmitError::QueueFull { limit: self.n_queue })?;
        self.check_fields(&request)?;
        let this = self.clone();
        // Off the network's threads: a long prompt, or a large grammar, takes milliseconds.
        let read = self.lanes.run(lane(&request), move || {
            let mut request = request;
            let prompt = this.fitting(&request.prompt)?;
            if request.max_tokens >= this.limits.n_ctx {
                request.max_tokens = this.limits.longest_answer(prompt.len());
            }
            let shown = this.shown(&request)?;
            let guide = match is_guided(&request) {
                true => Guide::of(&request, &*this.grammars(&shown)?)?,
                false => None,
            };
            let n_most = request.max_tokens.min(this.limits.n_ctx - prompt.len());
            let guide = guide.map(|guide| guide.limited(n_most));
            let dry = request.sampling.dry.as_ref().map(|params| {
                let breakers = Breakers::new(&this.model, &params.breakers);
                let breakers =
                    breakers.map_err(|e| Invalid::new("dry_sequence_breakers", e.to_string()))?;
                Ok::<_, Invalid>(Dry::new(params, breakers, &prompt))
            });
            let detokenized = || this.model.detokenize(&prompt);
            let echo = request.echo.then(|| request.prompt.text().unwrap_or_else(detokenized));
            Ok::<_, Invalid>((prompt, guide, shown, dry.transpose()?, echo, request))
        });
        let (prompt, guide, shown, dry, echo, request) =
            read.await.ok_or(SubmitError::Stopped)??;
        if let Some(prefixes) = self.prefixes.as_ref().filter(|_| request.reuses_cells()) {
            prefixes.fetch(caller.tenant, &prompt).await;
        }
        // Every event this request can cause: the prompt, a piece a token, and an end; before them
        // its progress, with at least a row of the prompt each.
        let n_progress = if request.progress { prompt.len() + 1 } else { 0 };
        let most = n_progress + request.max_tokens.min(self.limits.n_ctx - prompt.len()) + 2;
        let (events, receiver) = mpsc::channel(most);
        let permit = Some(permit);
        let job =
            Job { prompt, request, caller, events, permit, accepted, guide, shown, dry, echo };
        // The channel has a place for every permit.
        self.jobs.try_send(job).map_err(|_| SubmitError::Stopped)?;
        self.arrivals.count(accepted);
        Ok(Answer::from(receiver))
    }

    /// Does what comes before a request is handed over, where neither the network nor shorter work
    /// waits for it: reading `n_bytes`.
    ///
    /// # Errors
    /// [`SubmitError::Stopped`] if it panicked.
    pub async fn read<T: Send + 'static>(
        &self,
        n_bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, SubmitError> {
        let lane = if n_bytes > SHORT { Lane::Long } else { Lane::Short };
        self.lanes.run(lane, work).await.ok_or(SubmitError::Stopped)
    }

    /// What compiles grammars for this model where these control tokens are text; made when it is
    /// first asked for.
    fn grammars(&self, shown: &[Token]) -> Result<Arc<Grammars>, Invalid> {
        let mut known = self.grammars.lock();
        if let Some((_, grammars)) = known.iter().find(|(tokens, _)| tokens == shown) {
            return Ok(Arc::clone(grammars));
        }
        let grammars = Grammars::new(&self.model, shown).map_err(|why| {
            Invalid::new("grammar", format!("this model's tokens can follow no grammar: {why}"))
        })?;
        let grammars = Arc::new(grammars);
        if known.len() < MOST_GRAMMARS {
            known.push((shown.to_vec(), Arc::clone(&grammars)));
        }
        Ok(grammars)
    }

    /// The control tokens that the text shows, in order.
    fn shown(&self, request: &Request) -> Result<Vec<Token>, Invalid> {
        let mut shown = Vec::new();
        for name in &request.shown {
            let tokens = self.model.tokenize_part(name, false, true);
            let tokens = tokens.map_err(|e| Invalid::new("tools", e.to_string()))?;
            // Other names are texts like any.
            shown.extend(tokens.iter().filter(|_| tokens.len() == 1).copied());
        }
        shown.sort_unstable();
        shown.dedup();
        Ok(shown)
    }

    /// The tokens of a prompt. Only a text's first part gets the token that begins a text.
    ///
    /// # Errors
    /// [`Invalid`] for a token that is not in the vocabulary, or a text that is too long.
    pub fn tokenize(&self, prompt: &Prompt) -> Result<Vec<Token>, Invalid> {
        let parts = match prompt {
            Prompt::Tokens(tokens) => {
                return match tokens.iter().find(|&&token| !self.model.contains(token)) {
                    None => Ok(tokens.clone()),
                    Some(Token(bad)) => {
                        let n_vocab = self.model.n_vocab();
                        let message =
                            format!("prompt has token {bad}, but the vocabulary has {n_vocab}");
                        Err(Invalid::new("prompt", message))
                    }
                };
            }
            Prompt::Text(parts) => parts,
        };
        let mut tokens = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            let of_part = self.model.tokenize_part(&part.text, i == 0, part.special);
            tokens.extend(of_part.map_err(|e| Invalid::new("prompt", e.to_string()))?);
        }
        Ok(tokens)
    }

    /// Checks the tokens that fields name.
    fn check_fields(&self, request: &Request) -> Result<(), Invalid> {
        let biased = request.sampling.logit_bias.iter().map(|(token, _)| ("logit_bias", *token));
        let stops = request.stop_token_ids.iter().map(|token| ("stop_token_ids", *token));
        let unknown = biased.chain(stops).find(|&(_, token)| !self.model.contains(token));
        let Some((field, Token(bad))) = unknown else { return Ok(()) };
        let n_vocab = self.model.n_vocab();
        let message = format!("{field} names token {bad}, but the vocabulary has {n_vocab}");
        Err(Invalid::new(field, message))
    }

    /// The tokens of a prompt that the context has room for. A longer one is refused before it is
    /// tokenised if its bytes tell.
    fn fitting(&self, prompt: &Prompt) -> Result<Vec<Token>, Invalid> {
        let n_ctx = self.limits.n_ctx;
        let most = n_ctx - 1;
        let n_least = n_bytes(prompt).div_ceil(self.model.longest_token());
        if n_least > most {
            return Err(Invalid::too_long(n_ctx, n_least, false));
        }
        let tokens = self.tokenize(prompt)?;
        match tokens.len() {
            0 => {
                let message = "prompt is empty: it must have at least one token";
                Err(Invalid::new("prompt", message))
            }
            n if n > most => Err(Invalid::too_long(n_ctx, n, true)),
            _ => Ok(tokens),
        }
    }
}

/// Vocabularies for grammars that are kept: a chat template has one or two.
const MOST_GRAMMARS: usize = 4;

/// Whether anything guides the answer.
fn is_guided(request: &Request) -> bool {
    request.grammar.is_some() || request.thinking.as_ref().is_some_and(|t| t.budget.is_some())
}

/// Bytes of a prompt's text; none if it is tokens.
fn n_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(parts) => parts.iter().map(|part| part.text.len()).sum(),
        Prompt::Tokens(_) => 0,
    }
}

/// Bytes that are read, and tokenised, in less time than a step takes.
const SHORT: usize = 16 << 10;

fn lane(request: &Request) -> Lane {
    if n_bytes(&request.prompt) > SHORT {
        Lane::Long
    } else if is_guided(request) {
        Lane::Grammar
    } else {
        Lane::Short
    }
}
