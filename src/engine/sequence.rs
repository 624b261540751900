//! One request on its way through the engine: its tokens, its sampler, its text, its clock.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::grammar::{Grammar, GrammarError};
use super::sampler::Sampler;
use super::stats::{Ended, Stats, Waited};
use super::text::{Pushed, TextAssembler};
use crate::llama::{SeqId, Token};
use crate::request::{
    Caller, Completion, Event, FinishReason, Piece, Report, Request, Speculation, SpeculationUsage,
    Timings, TokenReport, Trace, Usage,
};
use crate::speculate::Origin;
use crate::speculate::calibration::Trusts;
use crate::speculate::suffix::Suffixes;
use crate::speculate::text::TextOrigin;

/// A request that was accepted and waits for a sequence id.
pub struct Job {
    /// The prompt's tokens: at least one, and at least one less than the context holds.
    pub prompt: Vec<Token>,
    /// The rest of it.
    pub request: Request,
    /// Who sent it.
    pub caller: Caller,
    /// Where its events go, with capacity for all that can ever come. A dropped receiver cancels
    /// the request.
    pub events: mpsc::Sender<Event>,
    /// Its place in the queue, free again when this is dropped.
    pub permit: Option<OwnedSemaphorePermit>,
    /// When it was accepted.
    pub accepted: Instant,
    /// The request's grammar, ready.
    pub grammar: Option<Grammar>,
}

impl Job {
    /// One that is accepted now, outside the queue's count and without a grammar.
    #[must_use]
    pub fn new(prompt: Vec<Token>, request: Request, events: mpsc::Sender<Event>) -> Self {
        let (caller, accepted) = (Caller::default(), Instant::now());
        Self { prompt, request, caller, events, permit: None, accepted, grammar: None }
    }

    /// When its time is over; `None`: never.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let timeout = self.request.timeout.into_iter().chain(self.caller.timeout).min()?;
        self.accepted.checked_add(timeout)
    }

    /// Ends it before it began, because its time is over.
    pub fn expire(mut self, now: Instant) {
        self.permit = None;
        let usage = Usage { prompt_tokens: self.prompt.len(), ..Usage::default() };
        let timings =
            Timings { queue_s: (now - self.accepted).as_secs_f64(), ..Timings::default() };
        let done = Completion {
            tail: Piece::default(),
            finish_reason: FinishReason::Deadline,
            usage,
            timings,
            speculation: SpeculationUsage::default(),
            trace: None,
        };
        let _ = self.events.try_send(Event::Done(done)); // the client may have left
    }

    /// Most tokens this request can generate in a context of `n_ctx` tokens.
    pub fn n_generate(&self, n_ctx: usize) -> usize {
        self.request.max_tokens.min(n_ctx - self.prompt.len())
    }
}

/// A request that runs.
pub struct Sequence {
    /// Names it in the log.
    pub id: Arc<str>,
    /// Its place in the cache.
    pub seq: SeqId,
    /// Admission order.
    pub order: u64,
    /// Prompt and what was generated.
    pub tokens: Vec<Token>,
    /// How many of them are computed and cached.
    pub n_computed: usize,
    /// Its sampler.
    pub sampler: Sampler,
    n_prompt: usize,
    n_cached: usize,
    n_generate: usize,
    /// Whether to draft, and how to accept.
    pub speculation: Speculation,
    /// Of the last row that decided a token; empty before the first.
    hidden: Vec<f32>,
    /// Index of `tokens`, to draft from.
    suffixes: Option<Suffixes>,
    /// The tenant whose other answers are drafted from this one, and this one from them.
    shares_text_with: Option<u32>,
    drafts: SpeculationUsage,
    /// Which tokens may follow; `None`: all.
    pub grammar: Option<Grammar>,
    /// What to report of each token.
    pub report: Option<Report>,
    /// Sent with the next piece: reports, and where their tokens' text begins, in bytes of the
    /// answer.
    reports: Vec<(usize, TokenReport)>,
    /// Bytes of all tokens so far, and of those that were shown.
    n_bytes: usize,
    n_shown: usize,
    deadline: Option<Instant>,
    /// How far its drafts are to be trusted.
    pub trust: Trusts,
    /// Its hidden states and logits so far, where they are recorded.
    pub trace: Option<Trace>,
    text: TextAssembler,
    events: mpsc::Sender<Event>,
    permit: Option<OwnedSemaphorePermit>,
    clock: Clock,
    /// Set when its answer is complete.
    ended: Option<Ended>,
}

/// When each stage began.
struct Clock {
    accepted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Instant,
}

impl Sequence {
    /// Starts a job on `seq`, which holds the first `n_cached` tokens of its prompt already.
    pub fn new(
        job: Job,
        sampler: Sampler,
        seq: SeqId,
        n_cached: usize,
        order: u64,
        n_ctx: usize,
    ) -> Self {
        let clock = Clock {
            accepted: job.accepted,
            started: None,
            first_token: None,
            last_token: job.accepted,
        };
        let deadline = job.deadline();
        Self {
            seq,
            order,
            n_prompt: job.prompt.len(),
            n_generate: job.n_generate(n_ctx),
            tokens: job.prompt,
            n_computed: n_cached,
            sampler,
            speculation: job.request.speculation,
            hidden: Vec::new(),
            suffixes: None,
            shares_text_with: job.request.share_text.then_some(job.caller.tenant),
            drafts: SpeculationUsage::default(),
            grammar: job.grammar,
            report: job.request.report,
            reports: Vec::new(),
            n_bytes: 0,
            n_shown: 0,
            deadline,
            trust: Trusts::default(),
            trace: None,
            n_cached,
            text: TextAssembler::new(job.request.stop),
            id: job.caller.id,
            events: job.events,
            permit: job.permit,
            clock,
            ended: None,
        }
    }

    /// Tokens known but not computed.
    pub fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Indexes the tokens, from now on, so that what follows may be drafted from them.
    pub fn index_text(&mut self) {
        let mut suffixes = Suffixes::new(self.n_prompt + self.n_generate);
        self.tokens.iter().for_each(|&token| suffixes.push(token));
        self.suffixes = Some(suffixes);
    }

    /// What to draft from: at most `deepest` tokens after the last one.
    pub fn origin(&self, deepest: usize) -> Origin<'_> {
        // The answer may end before what is drafted, but not after.
        let left = self.n_generate - (self.tokens.len() - self.n_prompt);
        let n = if self.speculation == Speculation::Off { 0 } else { left.saturating_sub(1) };
        let max_depth = n.min(deepest);
        let (trust, shared) = (self.trust.text.factor(), self.shares_text_with);
        let index = self.suffixes.as_ref().filter(|_| max_depth > 0);
        Origin {
            seq: self.seq,
            hidden: &self.hidden,
            root: self.tokens[self.n_computed],
            max_depth: if self.hidden.is_empty() { 0 } else { max_depth },
            trust: self.trust.heads.factor(),
            open: 1.0,
            text: index.map(|index| TextOrigin {
                index,
                tokens: &self.tokens,
                max_depth,
                trust,
                shared,
            }),
        }
    }

    /// The answer so far and its tenant, if the tenant's others may be drafted from it.
    pub fn shared_answer(&self) -> Option<(u32, &[Token])> {
        let tenant = self.shares_text_with.filter(|_| self.suffixes.is_some())?;
        Some((tenant, &self.tokens[self.n_prompt..]))
    }

    /// Keeps the hidden state of the row that decided the last token.
    pub fn keep_hidden(&mut self, hidden: &[f32]) {
        if self.speculation.by_heads() {
            self.hidden.clear();
            self.hidden.extend_from_slice(hidden);
        }
    }

    /// The step that is decided now; 1 is the first.
    pub fn step(&self) -> usize {
        self.drafts.steps
    }

    /// Records a step that decides a token of this sequence, and how many candidates were computed
    /// with it.
    pub fn record_drafted(&mut self, n: usize) {
        self.drafts.steps += 1;
        self.drafts.drafted += n;
    }

    /// Records that a candidate is the token chosen.
    pub fn record_accepted(&mut self) {
        self.drafts.accepted += 1;
    }

    /// `true` once the client has left.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Records that rows of this sequence are computed in a step that began at `now`.
    pub fn record_step(&mut self, now: Instant) {
        self.clock.started.get_or_insert(now);
    }

    /// Ends the answer as it is if its time is over. Returns `true` if it did.
    pub fn expire(&mut self, now: Instant) -> bool {
        let is_over = self.deadline.is_some_and(|deadline| deadline <= now);
        if is_over {
            let tail = self.text.finish();
            self.complete(tail, FinishReason::Deadline);
        }
        is_over
    }

    /// Records the report of the next token.
    pub fn push_report(&mut self, report: TokenReport) {
        self.reports.push((self.n_bytes, report));
    }

    /// Takes the next token. `bytes` are its text; `is_end` says that it ends the answer and has
    /// none. Returns `true` if the answer is complete and its last event sent.
    ///
    /// # Errors
    /// [`GrammarError`] when the grammar cannot be followed any further; the answer is not complete
    /// then.
    pub fn accept(
        &mut self,
        token: Token,
        bytes: &[u8],
        is_end: bool,
        now: Instant,
    ) -> Result<bool, GrammarError> {
        self.tokens.push(token);
        if let Some(suffixes) = &mut self.suffixes {
            suffixes.push(token);
        }
        self.sampler.accept(token);
        self.clock.first_token.get_or_insert(now);
        self.clock.last_token = now;
        if is_end {
            self.reports.pop_if(|(start, _)| *start == self.n_bytes);
            let tail = self.text.finish();
            self.complete(tail, FinishReason::EndOfText);
            return Ok(true);
        }
        self.n_bytes += bytes.len();
        let text = match self.text.push(bytes) {
            Pushed::Text(text) => text,
            Pushed::Stopped { text, stop } => {
                let stop = self.text.stop(stop).to_owned();
                let n_shown = self.n_shown + text.len();
                self.reports.retain(|(start, _)| *start < n_shown);
                self.complete(text, FinishReason::StopString(stop));
                return Ok(true);
            }
        };
        if !text.is_empty() {
            let piece = self.piece(text);
            self.send(Event::Piece(piece));
        }
        let is_whole = match &mut self.grammar {
            Some(grammar) => grammar.accept(token)?,
            None => false,
        };
        let is_full = self.tokens.len() - self.n_prompt == self.n_generate;
        if is_whole || is_full {
            let tail = self.text.finish();
            self.complete(
                tail,
                if is_whole { FinishReason::EndOfText } else { FinishReason::Length },
            );
        }
        Ok(is_whole || is_full)
    }

    /// Text to show, with its tokens' reports.
    fn piece(&mut self, text: String) -> Piece {
        self.n_shown += text.len();
        Piece { text, tokens: self.reports.drain(..).map(|(_, report)| report).collect() }
    }

    /// What its client waits for, and how long it did, if it gets tokens `now`.
    pub fn waited(&self, now: Instant) -> Waited {
        match self.clock.first_token {
            None => Waited::First((now - self.clock.accepted).as_secs_f64(), self.n_prompt),
            Some(_) => Waited::Next((now - self.clock.last_token).as_secs_f64()),
        }
    }

    /// Records that it ended: with its answer, or because the client left.
    pub fn record_end(&self, stats: &Stats) {
        match self.ended {
            Some(Ended::Deadline) => stats.count_end(Ended::Deadline),
            Some(ended) => {
                stats.note_answer(ended, self.timings(), self.tokens.len() - self.n_prompt)
            }
            None => stats.count_end(Ended::Cancelled),
        }
    }

    fn timings(&self) -> Timings {
        let clock = &self.clock;
        let started = clock.started.unwrap_or(clock.accepted);
        let first = clock.first_token.unwrap_or(started);
        Timings {
            queue_s: (started - clock.accepted).as_secs_f64(),
            prefill_s: (first - started).as_secs_f64(),
            decode_s: (clock.last_token - first).as_secs_f64(),
        }
    }

    fn complete(&mut self, tail: String, finish_reason: FinishReason) {
        let tail = self.piece(tail);
        let usage = Usage {
            prompt_tokens: self.n_prompt,
            cached_tokens: self.n_cached,
            completion_tokens: self.tokens.len() - self.n_prompt,
        };
        let timings = self.timings();
        self.ended = Some(match finish_reason {
            FinishReason::Length => Ended::Length,
            FinishReason::Deadline => Ended::Deadline,
            FinishReason::EndOfText | FinishReason::StopString(_) => Ended::Stop,
        });
        self.permit = None; // before the answer: its client may send the next request at once
        let (speculation, trace) = (self.drafts, self.trace.take());
        self.send(Event::Done(Completion {
            tail,
            finish_reason,
            usage,
            timings,
            speculation,
            trace,
        }));
    }

    /// Ends the answer because the engine failed.
    pub fn fail(&mut self, id: &str) {
        self.permit = None;
        self.send(Event::Failed { id: id.to_owned() });
    }

    /// The channel has capacity for every event a request can cause; a closed one is seen at the next
    /// commit.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}
