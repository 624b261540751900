//! One request on its way through the engine: its tokens, its sampler, its text, its clock.

use std::collections::VecDeque;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::dry::{Breakers, Dry};
use super::grammar::GrammarError;
use super::guide::Guide;
use super::pool::Pool;
use super::sampler::Sampler;
use super::stats::{Ended, Stats};
use super::text::{Pushed, TextAssembler};
use crate::llama::{SeqId, Token};
use crate::request::{
    Caller, Completion, Event, FinishReason, Logprobs, Piece, Progress, Request, Restored,
    SpeculationUsage, Timings, TokenReport, Trace, Usage,
};
use crate::speculate::calibration::{Trust, Trusts};
use crate::speculate::states::States;
use crate::speculate::suffix::Suffixes;
use crate::speculate::text::TextOrigin;
use crate::speculate::{Asked, Origin};

/// A request that was accepted.
pub struct Job {
    /// At least one token, and at least one less than the context holds.
    pub prompt: Vec<Token>,
    /// What was asked for.
    pub request: Request,
    /// Who sent it.
    pub caller: Caller,
    /// Has capacity for every event the request can cause. A dropped receiver cancels the request.
    pub events: mpsc::Sender<Event>,
    /// Its place in the queue, free again when this is dropped.
    pub permit: Option<OwnedSemaphorePermit>,
    /// When it was accepted.
    pub accepted: Instant,
    /// What the request's answer must be, if anything guides it.
    pub guide: Option<Guide>,
    /// The control tokens that the text shows.
    pub shown: Vec<Token>,
    /// What [`DryParams`](crate::request::DryParams) ask for.
    pub dry: Option<Dry>,
    /// The prompt's text, if it is echoed.
    pub echo: Option<String>,
}

impl Job {
    /// One that is accepted now, outside the queue's count, without a guide and DRY's breakers.
    pub fn new(prompt: Vec<Token>, request: Request, events: mpsc::Sender<Event>) -> Self {
        let (caller, accepted) = (Caller::default(), Instant::now());
        let dry = request.sampling.dry.as_ref();
        let dry = dry.map(|params| Dry::new(params, Breakers::default(), &prompt));
        let (permit, guide, shown, echo) = (None, None, Vec::new(), None);
        Self { prompt, request, caller, events, permit, accepted, guide, shown, dry, echo }
    }

    /// `true` once its time is over.
    pub fn is_overdue(&self, now: Instant) -> bool {
        let timeout = self.request.timeout.into_iter().chain(self.caller.timeout).min();
        timeout.is_some_and(|timeout| now.saturating_duration_since(self.accepted) >= timeout)
    }

    /// Ends it before it began, because its time is over.
    pub fn expire(self, now: Instant) {
        self.end_unstarted(Piece::default(), FinishReason::Deadline, now);
    }

    /// `true` if it may start from cached cells.
    pub fn reuses_cells(&self) -> bool {
        self.request.reuses_cells()
    }

    /// `true` if the model has nothing to compute for it.
    pub fn is_trivial(&self) -> bool {
        let Request { max_tokens, embed, .. } = &self.request;
        *max_tokens == 0 && embed.is_none() && !self.request.scores_prompt()
    }

    /// Ends it if it [is trivial](Self::is_trivial).
    pub fn answer_trivially(mut self, now: Instant) {
        let echo = self.echoed(Vec::new()).unwrap_or_default();
        self.end_unstarted(echo, FinishReason::Length, now);
    }

    fn end_unstarted(mut self, tail: Piece, finish_reason: FinishReason, now: Instant) {
        let queue_s = (now - self.accepted).as_secs_f64();
        self.end(Event::Done(Completion {
            tail,
            finish_reason,
            usage: Usage { prompt_tokens: self.prompt.len(), ..Usage::default() },
            timings: Timings { queue_s, ..Timings::default() },
            speculation: SpeculationUsage::default(),
            embedding: None,
            trace: None,
        }));
    }

    /// The prompt as the beginning of the answer, if it is echoed and was not yet. `logprobs` are
    /// those of its tokens from the second one on, or none.
    fn echoed(&mut self, logprobs: Vec<Logprobs>) -> Option<Piece> {
        let text = self.echo.take()?;
        let mut logprobs = logprobs.into_iter();
        let report = |(i, &token): (usize, &Token)| {
            let logprobs = if i == 0 { None } else { logprobs.next() };
            TokenReport { token, source: None, step: 0, n_rows: 0, logprobs }
        };
        let is_reported = self.request.report.is_some();
        let tokens = self.prompt.iter().enumerate().map(report);
        Some(Piece { text, tokens: if is_reported { tokens.collect() } else { Vec::new() } })
    }

    /// Sends the last event. The permit is free before: the client may send its next request at once.
    pub fn end(&mut self, event: Event) {
        self.permit = None;
        self.send(event);
    }

    /// A closed channel is noticed at the next commit.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Most tokens this request can generate in a context of `n_ctx` tokens.
    pub fn n_generate(&self, n_ctx: usize) -> usize {
        self.request.max_tokens.min(n_ctx - self.prompt.len())
    }
}

/// A request that runs.
pub struct Sequence {
    pub job: Job,
    /// Its place in the cache.
    pub seq: SeqId,
    /// Admission order.
    pub order: u64,
    /// Prompt and what was generated.
    pub tokens: Vec<Token>,
    /// How many of them are computed and cached.
    pub n_computed: usize,
    /// The values of `n_computed` at which its state is to be kept, those to come.
    pub keep: VecDeque<usize>,
    pub sampler: Sampler,
    pub drafts: SpeculationUsage,
    /// How far its drafts are to be trusted.
    pub trust: Trusts,
    /// Its hidden states and logits so far, where they are recorded.
    pub trace: Option<Box<Trace>>,
    /// When its first step began.
    pub started: Option<Instant>,
    n_cached: usize,
    /// Of those that were cached when it began.
    pub restored: Restored,
    n_generate: usize,
    /// Of the last row that decided a token; empty before the first.
    hidden: Vec<f32>,
    /// For the model's draft layers.
    states: States,
    /// Index of `tokens`, to draft from.
    suffixes: Option<Suffixes>,
    /// Of the prompt's tokens from the second one on, if they are scored and not yet sent.
    prompt_logprobs: Vec<Logprobs>,
    /// The prompt's embedding, if it is asked for.
    pool: Option<Pool>,
    /// Sent with the next piece: reports, and where their tokens' text begins, in bytes of the
    /// answer.
    reports: Vec<(usize, TokenReport)>,
    /// Bytes of all tokens so far, and of those that were shown.
    n_bytes: usize,
    n_shown: usize,
    text: TextAssembler,
    first_token: Option<Instant>,
    last_token: Instant,
    /// Its answer, once it is complete.
    completion: Option<Completion>,
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
        Self {
            seq,
            order,
            tokens: job.prompt.clone(),
            n_computed: n_cached,
            keep: VecDeque::new(),
            sampler,
            drafts: SpeculationUsage::default(),
            trust: Trusts::default(),
            trace: None,
            started: None,
            n_cached,
            restored: Restored::default(),
            n_generate: job.n_generate(n_ctx),
            hidden: Vec::new(),
            states: States::default(),
            suffixes: None,
            prompt_logprobs: Vec::new(),
            pool: job.request.embed.map(|pooling| Pool::new(pooling, job.prompt.len())),
            reports: Vec::new(),
            n_bytes: 0,
            n_shown: 0,
            text: TextAssembler::new(job.request.stop.clone()),
            first_token: None,
            last_token: job.accepted,
            completion: None,
            job,
        }
    }

    /// Tokens known but not computed.
    pub fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    fn n_answer(&self) -> usize {
        self.tokens.len() - self.job.prompt.len()
    }

    /// Indexes the tokens, from now on, so that what follows may be drafted from them.
    pub fn index_text(&mut self) {
        let mut suffixes = Suffixes::new(self.job.prompt.len() + self.n_generate);
        self.tokens.iter().for_each(|&token| suffixes.push(token));
        self.suffixes = Some(suffixes);
    }

    /// Tokens after the last one that may be drafted, at most `deepest`.
    pub fn draft_depth(&self, deepest: usize) -> usize {
        // The answer may end before what is drafted, but not after.
        let left = (self.n_generate - self.n_answer()).saturating_sub(1);
        let is_off = self.job.request.speculation.is_off();
        if is_off { 0 } else { left.min(deepest) }
    }

    /// What to draft from: at most `deepest` tokens after the last one.
    pub fn origin(&self, deepest: usize) -> Origin<'_> {
        let max_depth = self.draft_depth(deepest);
        let (trust, shared) = (self.trust.text.factor(), self.tenant());
        let index = self.suffixes.as_ref().filter(|_| max_depth > 0);
        let by_model = self.job.request.speculation.by_model() && max_depth > 0;
        let asked = |is_asked: bool, trust: &Trust| Asked {
            max_depth: if is_asked { max_depth } else { 0 },
            trust: trust.factor(),
        };
        Origin {
            seq: self.seq,
            tokens: &self.tokens,
            hidden: &self.hidden,
            states: &self.states,
            heads: asked(!self.hidden.is_empty(), &self.trust.heads),
            model: asked(by_model, &self.trust.model),
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

    /// The tenant whose other answers are drafted from this one, and this one from them.
    fn tenant(&self) -> Option<u32> {
        self.job.request.share_text.then_some(self.job.caller.tenant)
    }

    /// The answer so far and its tenant, if the tenant's others may be drafted from it.
    pub fn shared_answer(&self) -> Option<(u32, &[Token])> {
        let tenant = self.tenant().filter(|_| self.suffixes.is_some())?;
        Some((tenant, &self.tokens[self.job.prompt.len()..]))
    }

    /// Keeps the hidden state of the row that decided the last token.
    pub fn keep_hidden(&mut self, hidden: &[f32]) {
        if self.job.request.speculation.by_heads() {
            self.hidden.clear();
            self.hidden.extend_from_slice(hidden);
        }
    }

    /// Keeps the state of the token at `position`, which is computed now, for draft layers.
    pub fn keep_state(&mut self, position: usize, state: &[f32]) {
        if self.job.request.speculation.by_model() {
            self.states.push(position, state);
        }
    }

    /// Ends the answer as it is if its time is over. Returns `true` if it did.
    pub fn expire(&mut self, now: Instant) -> bool {
        let is_over = self.job.is_overdue(now);
        if is_over {
            self.finish(FinishReason::Deadline);
        }
        is_over
    }

    /// `true` if the row at `position` has a result beside the answer's: a token of the prompt to
    /// score, or a state of its embedding.
    pub fn reads(&self, position: usize) -> bool {
        self.scored_after(position).is_some() || self.embeds(position)
    }

    /// `true` if the hidden state of the row at `position` is part of the prompt's embedding.
    pub fn embeds(&self, position: usize) -> bool {
        self.pool.as_ref().is_some_and(|pool| pool.reads(position))
    }

    /// Takes a hidden state of the prompt's embedding.
    pub fn push_hidden(&mut self, hidden: &[f32]) {
        if let Some(pool) = &mut self.pool {
            pool.push(hidden);
        }
    }

    /// The token after `position` if it is the prompt's and its log probability is asked for.
    pub fn scored_after(&self, position: usize) -> Option<Token> {
        let next = self.job.prompt.get(position + 1).filter(|_| self.job.request.scores_prompt());
        next.copied()
    }

    /// Records the log probabilities at the next of the prompt's tokens.
    pub fn push_prompt_logprobs(&mut self, logprobs: Logprobs) {
        self.prompt_logprobs.push(logprobs);
    }

    /// Tells that `processed` tokens of the prompt are computed, if that was asked for.
    pub fn tell_progress(&self, processed: usize, now: Instant) {
        let (total, cache) = (self.job.prompt.len(), self.n_cached);
        if self.job.request.progress && self.n_computed < total {
            let elapsed = now - self.started.unwrap_or(now);
            let time_ms = elapsed.as_millis() as u64;
            self.job.send(Event::Progress(Progress { total, cache, processed, time_ms }));
        }
    }

    /// Sends the prompt, now computed, if it is echoed. Ends the answer if it is to have no more,
    /// and returns `true` then.
    pub fn begin_answer(&mut self, stats: &Stats, now: Instant) -> bool {
        if let Some(echo) = self.job.echoed(std::mem::take(&mut self.prompt_logprobs)) {
            self.job.send(Event::Piece(echo));
        }
        let is_all = self.n_generate == 0;
        if is_all {
            stats.prompt_tokens.inc_by(self.job.prompt.len() as u64);
            (self.first_token, self.last_token) = (Some(now), now);
            self.finish(FinishReason::Length);
        }
        is_all
    }

    /// Records the report of the next token.
    pub fn push_report(&mut self, report: TokenReport) {
        self.reports.push((self.n_bytes, report));
    }

    /// Takes the next token. `bytes` are its text; `is_end` says that it ends any answer and has
    /// none. Returns `true` if the answer is complete.
    pub fn accept(&mut self, token: Token, bytes: &[u8], is_end: bool, now: Instant) -> bool {
        self.tokens.push(token);
        if let Some(suffixes) = &mut self.suffixes {
            suffixes.push(token);
        }
        self.sampler.accept(token);
        self.first_token.get_or_insert(now);
        self.last_token = now;
        let is_stop = self.job.request.stop_token_ids.contains(&token);
        if is_end || is_stop {
            if !self.job.request.scores_prompt() {
                self.reports.pop_if(|(start, _)| *start == self.n_bytes);
            }
            let reason = FinishReason::StopToken(token);
            self.finish(if is_end { FinishReason::EndOfText } else { reason });
            return true;
        }
        self.n_bytes += bytes.len();
        let may_stop = self.n_answer() > self.job.request.min_tokens;
        let text = &mut self.text;
        let text = match if may_stop { text.push(bytes) } else { text.pass(bytes) } {
            Pushed::Text(text) => text,
            Pushed::Stopped { text, stop } => {
                let stop = self.job.request.stop[stop].clone();
                let n_shown = self.n_shown + text.len();
                self.reports.retain(|(start, _)| *start < n_shown);
                self.complete(text, FinishReason::StopString(stop));
                return true;
            }
        };
        if !text.is_empty() {
            let piece = self.piece(text);
            self.job.send(Event::Piece(piece));
        }
        let followed = self.job.guide.as_mut().map_or(Ok(false), |g| g.accept(token, bytes));
        let is_full = self.n_answer() == self.n_generate;
        let is_cut = self.job.guide.as_ref().is_some_and(Guide::is_cut);
        let end = match followed {
            Ok(true) if is_cut => FinishReason::Length,
            Ok(true) => FinishReason::EndOfText,
            _ if is_full => FinishReason::Length,
            Err(GrammarError(why)) => {
                tracing::debug!(why, "a grammar cannot be followed any further");
                FinishReason::Grammar(why)
            }
            Ok(false) => return false,
        };
        self.finish(end);
        true
    }

    /// Text to show, with its tokens' reports.
    fn piece(&mut self, text: String) -> Piece {
        self.n_shown += text.len();
        Piece { text, tokens: self.reports.drain(..).map(|(_, report)| report).collect() }
    }

    /// Records how long the client waited for the tokens that it gets `now`.
    pub fn record_wait(&self, stats: &Stats, now: Instant) {
        let seconds = (now - self.last_token).as_secs_f64(); // since acceptance before the first
        if self.first_token.is_some() {
            stats.inter_token.observe(seconds);
        } else {
            stats.first_token.observe(seconds);
            stats.prompt_tokens.inc_by(self.job.prompt.len() as u64);
        }
    }

    /// Ends it: with its answer, or because the client left. It is counted before the client knows.
    pub fn end(&mut self, stats: &Stats) {
        let Some(completion) = self.completion.take() else {
            return stats.count_end(Ended::Cancelled);
        };
        let n_answer = self.n_answer();
        match Ended::from(&completion.finish_reason) {
            ended @ (Ended::Deadline | Ended::Grammar) => stats.count_end(ended),
            ended => stats.record_answer(ended, completion.timings, n_answer),
        }
        self.job.end(Event::Done(completion));
    }

    fn timings(&self) -> Timings {
        let accepted = self.job.accepted;
        let started = self.started.unwrap_or(accepted);
        let first = self.first_token.unwrap_or(started);
        Timings {
            queue_s: (started - accepted).as_secs_f64(),
            prefill_s: (first - started).as_secs_f64(),
            decode_s: (self.last_token - first).as_secs_f64(),
        }
    }

    /// Completes the answer with the text that was held back.
    fn finish(&mut self, reason: FinishReason) {
        let tail = self.text.finish();
        self.complete(tail, reason);
    }

    fn complete(&mut self, tail: String, finish_reason: FinishReason) {
        let is_whole = finish_reason != FinishReason::Deadline;
        let embedding = self.pool.take().filter(|_| is_whole).map(Pool::finish);
        self.completion = Some(Completion {
            tail: self.piece(tail),
            finish_reason,
            usage: Usage {
                prompt_tokens: self.job.prompt.len(),
                cached_tokens: self.n_cached,
                restored: self.restored,
                completion_tokens: self.n_answer(),
            },
            timings: self.timings(),
            speculation: self.drafts,
            embedding,
            trace: self.trace.take(),
        });
    }
}
