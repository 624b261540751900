//! One request on its way through the engine: its tokens, its sampler, its text, its clock.

use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::sampler::Sampler;
use super::stats::{Ended, Stats, Waited};
use super::text::{Pushed, TextAssembler};
use crate::llama::{SeqId, Token};
use crate::request::{Completion, Event, FinishReason, Request, Speculation, SpeculationUsage, Timings, Trace, Usage};
use crate::speculate::calibration::Trusts;
use crate::speculate::suffix::Suffixes;
use crate::speculate::text::TextOrigin;

/// A request that was accepted and waits for a sequence id.
pub struct Job {
    /// The prompt's tokens: at least one, and at least one less than the context holds.
    pub prompt: Vec<Token>,
    /// The rest of it.
    pub request: Request,
    /// Where its events go; room for all that can ever come. A dropped receiver cancels the request.
    pub events: mpsc::Sender<Event>,
    /// Its place in the queue, free again when this is dropped.
    pub permit: Option<OwnedSemaphorePermit>,
    /// When it was accepted.
    pub accepted: Instant,
}

impl Job {
    /// Most tokens this request can generate in a context of `n_ctx` tokens.
    pub fn n_generate(&self, n_ctx: usize) -> usize {
        self.request.max_tokens.min(n_ctx - self.prompt.len())
    }
}

/// A request that runs.
pub struct Sequence {
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
    share_text: bool,
    drafts: SpeculationUsage,
    /// How far its drafts are to be trusted.
    pub trust: Trusts,
    /// What the model thought so far, where that is wanted.
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
    /// Starts a job on `seq`, where the first `n_cached` tokens of its prompt stand already.
    pub fn new(job: Job, sampler: Sampler, seq: SeqId, n_cached: usize, order: u64, n_ctx: usize) -> Self {
        let clock = Clock { accepted: job.accepted, started: None, first_token: None, last_token: job.accepted };
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
            share_text: job.request.share_text,
            drafts: SpeculationUsage::default(),
            trust: Trusts::default(),
            trace: None,
            n_cached,
            text: TextAssembler::new(job.request.stop),
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

    /// The text to draft from, at most `max_depth` tokens behind the last one.
    pub fn text_origin(&self, max_depth: usize) -> Option<TextOrigin<'_>> {
        let index = self.suffixes.as_ref()?;
        let (trust, shared) = (self.trust.text.factor(), self.share_text);
        Some(TextOrigin { index, tokens: &self.tokens, max_depth, trust, shared })
    }

    /// The answer so far, if others may be drafted from it.
    pub fn shared_answer(&self) -> Option<&[Token]> {
        (self.suffixes.is_some() && self.share_text).then(|| &self.tokens[self.n_prompt..])
    }

    /// Tokens behind the next one that it makes sense to draft: the answer may end before, but not after.
    pub fn n_draftable(&self) -> usize {
        let left = self.n_generate - (self.tokens.len() - self.n_prompt);
        if self.speculation == Speculation::Off { 0 } else { left.saturating_sub(1) }
    }

    /// The hidden state to draft from, as far as one was kept.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// Keeps the hidden state of the row that decided the last token.
    pub fn keep_hidden(&mut self, hidden: &[f32]) {
        if self.speculation.by_heads() {
            self.hidden.clear();
            self.hidden.extend_from_slice(hidden);
        }
    }

    /// Notes a step that decides a token of this sequence, and how many candidates were computed with it.
    pub fn note_drafted(&mut self, n: usize) {
        self.drafts.steps += 1;
        self.drafts.drafted += n;
    }

    /// Notes that a candidate is the token chosen.
    pub fn note_accepted(&mut self) {
        self.drafts.accepted += 1;
    }

    /// `true` once nobody waits for the answer.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Notes that rows of this sequence are computed in a step that began at `now`.
    pub fn note_step(&mut self, now: Instant) {
        self.clock.started.get_or_insert(now);
    }

    /// Takes the next token. `bytes` are its text; `is_end` says that it ends the answer and has none. Returns `true` if the
    /// answer is complete and its last event sent.
    pub fn accept(&mut self, token: Token, bytes: &[u8], is_end: bool, now: Instant) -> bool {
        self.tokens.push(token);
        if let Some(suffixes) = &mut self.suffixes {
            suffixes.push(token);
        }
        self.sampler.accept(token);
        self.clock.first_token.get_or_insert(now);
        self.clock.last_token = now;
        if is_end {
            let tail = self.text.finish();
            self.complete(tail, FinishReason::EndOfText);
            return true;
        }
        match self.text.push(bytes) {
            Pushed::Stopped { text, stop } => {
                let stop = self.text.stop(stop).to_owned();
                self.complete(text, FinishReason::StopString(stop));
                true
            }
            Pushed::Text(piece) => {
                if !piece.is_empty() {
                    self.send(Event::Piece(piece));
                }
                let full = self.tokens.len() - self.n_prompt == self.n_generate;
                if full {
                    let tail = self.text.finish();
                    self.complete(tail, FinishReason::Length);
                }
                full
            }
        }
    }

    /// What its client waits for, and how long it did, if it gets tokens `now`.
    pub fn waited(&self, now: Instant) -> Waited {
        match self.clock.first_token {
            None => Waited::First((now - self.clock.accepted).as_secs_f64(), self.n_prompt),
            Some(_) => Waited::Next((now - self.clock.last_token).as_secs_f64()),
        }
    }

    /// Notes that it ended: with its answer, or because nobody waits for that any more.
    pub fn note_end(&self, stats: &Stats) {
        match self.ended {
            Some(ended) => stats.note_answer(ended, self.timings(), self.tokens.len() - self.n_prompt),
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
        let usage = Usage {
            prompt_tokens: self.n_prompt,
            cached_tokens: self.n_cached,
            completion_tokens: self.tokens.len() - self.n_prompt,
        };
        let timings = self.timings();
        self.ended = Some(if finish_reason == FinishReason::Length { Ended::Length } else { Ended::Stop });
        self.permit = None; // before the answer: its client may send the next request at once
        let (speculation, trace) = (self.drafts, self.trace.take());
        self.send(Event::Done(Completion { tail, finish_reason, usage, timings, speculation, trace }));
    }

    /// Ends the answer because the engine failed.
    pub fn fail(&mut self, id: &str) {
        self.permit = None;
        self.send(Event::Failed { id: id.to_owned() });
    }

    /// The channel has room for every event a request can cause; a closed one is seen at the next commit.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}
