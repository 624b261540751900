//! Heads on a device: what they are asked, and what comes back of it, in one queue and one copy.
//!
//! The usual way is [`DeviceHeads::verify`]: right behind a forward pass, whose logits and hidden
//! states are used where they are, it chooses every row's token, walks down the trees, and computes
//! the heads for the next step behind what was accepted. Tokens come back, and candidates with
//! their probabilities. Where the host chose a token, its copy of the hidden state is drafted from.

use std::cell::RefCell;
use std::rc::Rc;

use super::calibration::{Calibration, HIGHEST, LOWEST};
use super::heads::{HeadNets, Heads};
use super::medusa::{WIDTH, pick};
use super::paths::{Candidate, fill, plant};
use super::{Draft, Origin, Tree, Worth};
use crate::engine::filter::Filter;
use crate::engine::sampler::Rule;
use crate::gpu::kernels::{
    self, Finish, Input, MOST_CANDIDATES, N_BINS, NextPaths, Paths, Reliability, RowRule, Rows,
    Span, Verification,
};
use crate::gpu::weights::{Matrices, Precision, Table};
use crate::gpu::{Buffer, Device, GpuError, Slice, SliceMut};
use crate::llama::{LlamaError, Matrix, Model, PathStep, PathWeights, SeqId, Token, Weights};

/// Most sequences of a step that the device takes; with more, the host does the work.
pub const MOST_SEQUENCES: usize = 64;
/// Most rows of them.
pub const MOST_ROWS: usize = 4096;
/// Most paths that a conditioned head goes on from, of all sequences together ...
const MOST_PATHS: usize = 64;
/// ... and least: a product with so many rows takes no longer than one with fewer.
const LEAST_PATHS: usize = 8;

/// Heads in a device's memory.
pub struct DeviceHeads {
    device: Rc<dyn Device>,
    nets: Nets,
    verification: Verification,
    /// What the kernel is asked.
    rules: Vec<RowRule>,
    spans: Vec<Span>,
    scratch: Scratch,
    /// What comes back to the host, all of it.
    mail: Buffer<i32>,
    words: Vec<i32>,
    /// What was drafted behind the last verification, and for which sequences with which roots.
    drafted: Drafted,
    ready: Vec<(SeqId, Token)>,
    n_verified: u64,
}

/// Networks, as [`HeadNets`] has them, and what goes with them.
struct Nets {
    kind: Kind,
    n_heads: usize,
    n_embd: usize,
    /// Rows of the output matrix, and the token of each.
    n_draft_vocab: usize,
    token_map: Option<Buffer<i32>>,
    /// Candidates of each head and path.
    k: usize,
}

enum Kind {
    /// Blocks of all heads, one after the other, and the output matrices: one for all, or one for
    /// each.
    Plain { blocks: Vec<(Matrices, Option<Buffer<f32>>)>, outputs: Matrices },
    /// Heads by depth, the output matrix they share, and the tokens' embeddings.
    Conditioned { steps: Vec<Step>, output: Matrices, embeddings: Table },
}

struct Step {
    /// `[W | U]`
    inner: Matrices,
    v: Matrices,
    b: Buffer<f32>,
}

/// Where heads start from.
#[derive(Clone, Copy)]
struct Start<'a> {
    hidden: Rows<'a>,
    roots: Slice<'a, i32>,
    n: usize,
}

/// Room for what is computed on the way, and for what is told about sequences.
struct Scratch {
    /// Behind each block or head.
    states: Vec<Buffer<f32>>,
    inner: Buffer<f32>,
    logits: Buffer<f32>,
    /// By depth `q` and origins of the paths.
    paths: Vec<(Buffer<f32>, Buffer<i32>)>,
    /// By head the factors of its calibration.
    ratios: Buffer<f32>,
    trust: Buffer<f32>,
}

/// An output row of a forward pass, for verification.
#[derive(Clone, Copy, Debug)]
pub struct OutputRow {
    /// How its token is chosen; `None`: by the host.
    pub rule: Option<Rule>,
    /// The row before it in its tree, counted from the sequence's first; `None` for the root.
    pub parent: Option<usize>,
    /// The token drafted there.
    pub token: Token,
}

/// A sequence whose rows are verified.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// Which.
    pub seq: SeqId,
    /// Its rows, the root's first.
    pub n_rows: usize,
    /// [`Trust::factor`](super::calibration::Trust::factor) of its heads.
    pub trust: f32,
}

/// What a device is asked after a forward pass.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// All output rows, in order.
    pub rows: &'a [OutputRow],
    /// Whose they are, in order.
    pub sequences: &'a [Verified],
    /// To draft for the next step: how far heads are right.
    pub draft: Option<&'a Calibration>,
}

impl DeviceHeads {
    /// Copies heads to the device, and of the model's matrices what they need.
    ///
    /// # Errors
    /// When the model's matrices cannot be read, the device has no memory, or heads have unlike
    /// shapes.
    pub fn new(
        device: Rc<dyn Device>,
        heads: Heads,
        model: &Model,
        precision: Precision,
    ) -> Result<Self, LlamaError> {
        let map = heads.token_map.as_deref();
        let shared = || pick(&model.output_rows()?, map);
        let (kind, n_heads, width) = match heads.nets {
            HeadNets::Plain(mut weights) => {
                if weights.outputs.is_empty() {
                    weights.outputs.push(shared()?);
                }
                (Kind::plain(&device, &weights, precision), weights.blocks.len(), weights.n_embd)
            }
            HeadNets::Conditioned(weights) => {
                let output = weights.output.clone().map_or_else(shared, Ok)?;
                let embeddings = model.embedding_rows()?.matrix()?;
                let width = weights.steps.first().map_or(0, |s| s.b.len());
                (
                    Kind::conditioned(&device, &weights, &output, &embeddings, precision),
                    weights.steps.len(),
                    width,
                )
            }
        };
        let finish = || -> Result<Self, GpuError> {
            let kind = kind?;
            let n_draft_vocab = match &kind {
                Kind::Plain { outputs: m, .. } | Kind::Conditioned { output: m, .. } => m.n_out(),
            };
            let token_map =
                map.map(|m| Buffer::from_host(&device, &m.iter().map(|t| t.0).collect::<Vec<_>>()));
            let nets = Nets {
                kind,
                n_heads,
                n_embd: model.n_embd(),
                n_draft_vocab,
                token_map: token_map.transpose()?,
                k: WIDTH.min(n_draft_vocab),
            };
            let mail = Buffer::zeros(&device, MOST_ROWS + nets.most_words())?;
            Ok(Self {
                verification: Verification::new(&device, MOST_ROWS, MOST_SEQUENCES)?,
                rules: vec![],
                spans: vec![],
                scratch: Scratch::new(&device, &nets, width)?,
                words: vec![0; mail.len()],
                mail,
                nets,
                drafted: Drafted::default(),
                ready: vec![],
                n_verified: 0,
                device: Rc::clone(&device),
            })
        };
        finish().map_err(|e| LlamaError::Misuse(e.to_string()))
    }

    /// Number of heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.nets.n_heads
    }

    /// Rows whose tokens the device chose so far.
    #[must_use]
    pub fn n_verified(&self) -> u64 {
        self.n_verified
    }

    /// Chooses the token behind each row of a pass whose `logits` and `hidden` states of the output
    /// rows are on the device, and drafts behind the last accepted rows if that is asked for.
    /// Returns by row the token chosen, -1 for rows of sequences whose tokens the host chooses.
    /// Waits once.
    ///
    /// # Errors
    /// [`GpuError`]; then nothing is drafted.
    pub fn verify(
        &mut self,
        logits: Slice<'_, f32>,
        hidden: Slice<'_, f32>,
        n_vocab: usize,
        ask: Ask<'_>,
    ) -> Result<&[i32], GpuError> {
        self.ready.clear();
        let (n_rows, n) = (ask.rows.len(), ask.sequences.len());
        if n_rows > MOST_ROWS || n > MOST_SEQUENCES {
            let reason = format!("{n_rows} rows of {n} sequences");
            return Err(GpuError::Shape { kernel: "verify", reason });
        }
        fill_rules(ask, &mut self.rules, &mut self.spans);
        let device = &*self.device;
        let (chosen, offers) = self.mail.slice_mut().split_at(n_rows);
        kernels::verify(
            device,
            logits,
            n_vocab,
            &self.rules,
            &self.spans,
            &mut self.verification,
            chosen,
        )?;
        let mut n_words = n_rows;
        if let Some(calibration) = ask.draft {
            let trust: Vec<f32> = ask.sequences.iter().map(|s| s.trust).collect();
            self.scratch.tell(&self.nets, calibration, &trust)?;
            let hidden = Rows {
                values: hidden,
                index: Some(self.verification.last.slice().first(n)),
                by_net: false,
            };
            let start = Start { hidden, roots: self.verification.roots.slice().first(n), n };
            n_words += self.nets.queue(device, start, &mut self.scratch, offers)?;
        }
        self.mail.download(&mut self.words[..n_words])?;
        let (chosen, offers) = self.words[..n_words].split_at(n_rows);
        self.n_verified += chosen.iter().filter(|&&token| token >= 0).count() as u64;
        if ask.draft.is_some() {
            let roots: Vec<Token> =
                self.spans.iter().map(|&span| next_root(&self.rules, span, chosen)).collect();
            self.drafted = self.nets.read(offers, &roots);
            self.ready.extend(ask.sequences.iter().map(|s| s.seq).zip(roots));
        }
        Ok(&self.words[..n_rows])
    }

    /// Drafts from the host's hidden states.
    fn draft_from_host(
        &mut self,
        origins: &[Origin<'_>],
        calibration: &Calibration,
    ) -> Result<Drafted, GpuError> {
        let hidden: Vec<f32> = origins.iter().flat_map(|o| o.hidden).copied().collect();
        let roots: Vec<Token> = origins.iter().map(|o| o.root).collect();
        let trust: Vec<f32> = origins.iter().map(|o| o.trust).collect();
        self.scratch.tell(&self.nets, calibration, &trust)?;
        let hidden = Buffer::from_host(&self.device, &hidden)?;
        let on_device =
            Buffer::from_host(&self.device, &roots.iter().map(|t| t.0).collect::<Vec<_>>())?;
        let rows = Rows { values: hidden.slice(), index: None, by_net: false };
        let start = Start { hidden: rows, roots: on_device.slice(), n: origins.len() };
        let n_words =
            self.nets.queue(&*self.device, start, &mut self.scratch, self.mail.slice_mut())?;
        self.mail.download(&mut self.words[..n_words])?;
        Ok(self.nets.read(&self.words[..n_words], &roots))
    }
}

/// Fills what the kernel is asked: every output row has a rule, in order.
fn fill_rules(ask: Ask<'_>, rules: &mut Vec<RowRule>, spans: &mut Vec<Span>) {
    rules.clear();
    spans.clear();
    for (sequence, &Verified { n_rows, .. }) in (0..).zip(ask.sequences) {
        let first = rules.len();
        for row in ask.rows.iter().skip(first).take(n_rows) {
            rules.push(RowRule {
                logits_row: rules.len() as i32,
                sequence,
                parent: row.parent.map_or(-1, |parent| (first + parent) as i32),
                token: row.token.0,
                on_host: i32::from(row.rule.is_none()),
                ..row.rule.map_or_else(RowRule::default, row_rule)
            });
        }
        spans.push(Span { first: first as i32, n: (rules.len() - first) as i32 });
    }
}

fn row_rule(Rule { filter, seed, position }: Rule) -> RowRule {
    let halves = |n: u64| [n as u32, (n >> 32) as u32];
    let rule =
        RowRule { seed: halves(seed), position: halves(position as u64), ..RowRule::default() };
    let Some(Filter { top_k, top_p, min_p, temperature }) = filter else { return rule };
    RowRule {
        inverse_temperature: 1.0 / temperature,
        top_p,
        min_logit: if min_p > 0.0 { min_p.ln() } else { f32::NEG_INFINITY },
        top_k: i32::try_from(top_k).unwrap_or(i32::MAX),
        ..rule
    }
}

/// The token that a sequence goes on with: chosen at the last accepted row; -1 if the host chooses.
fn next_root(rules: &[RowRule], span: Span, chosen: &[i32]) -> Token {
    let rows = span.first as usize..(span.first + span.n) as usize;
    let mut at = rows.start;
    while let Some(child) =
        rows.clone().find(|&r| rules[r].parent == at as i32 && rules[r].token == chosen[at])
    {
        at = child;
    }
    Token(chosen[at])
}

impl Kind {
    fn plain(
        device: &Rc<dyn Device>,
        weights: &Weights,
        precision: Precision,
    ) -> Result<Self, GpuError> {
        let unlike = || GpuError::Shape {
            kernel: "product",
            reason: "heads with no block, or unlike ones".into(),
        };
        let n_blocks = weights.blocks.first().map_or(0, Vec::len);
        if n_blocks == 0 || weights.blocks.iter().any(|blocks| blocks.len() != n_blocks) {
            return Err(unlike());
        }
        let mut blocks = vec![];
        for l in 0..n_blocks {
            let matrices: Vec<Vec<&Matrix>> =
                weights.blocks.iter().map(|head| vec![&head[l].weight]).collect();
            let biases: Vec<f32> = weights
                .blocks
                .iter()
                .filter_map(|head| head[l].bias.as_deref())
                .flatten()
                .copied()
                .collect();
            let bias =
                (!biases.is_empty()).then(|| Buffer::from_host(device, &biases)).transpose()?;
            blocks.push((Matrices::new(device, &matrices, precision)?, bias));
        }
        let outputs: Vec<Vec<&Matrix>> = weights.outputs.iter().map(|m| vec![m]).collect();
        if ![1, weights.blocks.len()].contains(&outputs.len()) {
            return Err(unlike());
        }
        Ok(Self::Plain { blocks, outputs: Matrices::new(device, &outputs, precision)? })
    }

    fn conditioned(
        device: &Rc<dyn Device>,
        weights: &PathWeights,
        output: &Matrix,
        embeddings: &Matrix,
        precision: Precision,
    ) -> Result<Self, GpuError> {
        let step = |s: &PathStep| {
            Ok(Step {
                inner: Matrices::new(device, &[vec![&s.w, &s.u]], precision)?,
                v: Matrices::new(device, &[vec![&s.v]], precision)?,
                b: Buffer::from_host(device, &s.b)?,
            })
        };
        Ok(Self::Conditioned {
            steps: weights.steps.iter().map(step).collect::<Result<_, GpuError>>()?,
            output: Matrices::new(device, &[vec![output]], precision)?,
            embeddings: Table::new(device, embeddings)?,
        })
    }
}

impl Scratch {
    fn new(device: &Rc<dyn Device>, nets: &Nets, width: usize) -> Result<Self, GpuError> {
        let n = nets.most_rows();
        let floats = |len: usize| Buffer::zeros(device, len);
        let path = |_| Ok((Buffer::zeros(device, MOST_PATHS)?, Buffer::zeros(device, MOST_PATHS)?));
        Ok(Self {
            states: (0..nets.n_steps())
                .map(|_| floats(n * nets.n_embd))
                .collect::<Result<_, _>>()?,
            inner: floats(n * width)?,
            logits: floats(n * nets.n_draft_vocab)?,
            paths: (0..nets.n_heads).map(path).collect::<Result<_, GpuError>>()?,
            ratios: floats(nets.n_heads * N_BINS)?,
            trust: floats(MOST_SEQUENCES)?,
        })
    }

    /// Tells the device what is known of heads and sequences: each sequence's first path is its
    /// root.
    fn tell(
        &mut self,
        nets: &Nets,
        calibration: &Calibration,
        trust: &[f32],
    ) -> Result<(), GpuError> {
        let ratios: Vec<f32> =
            (1..=nets.n_heads).flat_map(|depth| calibration.ratios(depth)).collect();
        self.ratios.upload(0, &ratios)?;
        self.trust.upload(0, trust)?;
        let (q, origins) = &mut self.paths[0];
        q.upload(0, &vec![1.0; trust.len()])?;
        origins.upload(0, &(0..trust.len() as i32).collect::<Vec<_>>())
    }
}

impl Nets {
    /// Rows that one product can have.
    fn most_rows(&self) -> usize {
        match self.kind {
            Kind::Plain { .. } => MOST_SEQUENCES * self.n_heads,
            Kind::Conditioned { .. } => MOST_PATHS.max(MOST_SEQUENCES),
        }
    }

    /// Steps that each leave states: blocks, or heads.
    fn n_steps(&self) -> usize {
        match &self.kind {
            Kind::Plain { blocks, .. } => blocks.len(),
            Kind::Conditioned { steps, .. } => steps.len(),
        }
    }

    fn most_words(&self) -> usize {
        let n = if matches!(self.kind, Kind::Plain { .. }) { 1 } else { self.n_heads };
        n * self.most_rows() * (2 + 2 * self.k)
    }

    /// Paths that the head at `depth` goes on from, where there are `n_before` above; at the first,
    /// the sequences.
    fn n_paths(&self, depth: usize, n_sequences: usize, n_before: usize) -> usize {
        if depth == 0 {
            return n_sequences;
        }
        (2 * n_sequences)
            .clamp(LEAST_PATHS, MOST_PATHS)
            .min(n_before * self.k)
            .min(MOST_CANDIDATES / self.k)
    }

    /// Queues the heads; what they offer goes to `out`. Returns how much of it that takes.
    fn queue(
        &self,
        device: &dyn Device,
        start: Start<'_>,
        scratch: &mut Scratch,
        out: SliceMut<'_, i32>,
    ) -> Result<usize, GpuError> {
        match &self.kind {
            Kind::Plain { blocks, outputs } => {
                self.queue_plain(device, blocks, outputs, start, scratch, out)
            }
            Kind::Conditioned { steps, output, embeddings } => {
                self.queue_conditioned(device, steps, output, embeddings, start, scratch, out)
            }
        }
    }

    fn queue_plain(
        &self,
        device: &dyn Device,
        blocks: &[(Matrices, Option<Buffer<f32>>)],
        outputs: &Matrices,
        start: Start<'_>,
        scratch: &mut Scratch,
        out: SliceMut<'_, i32>,
    ) -> Result<usize, GpuError> {
        let (n, n_all) = (start.n, self.n_heads * start.n);
        for (i, (weights, bias)) in blocks.iter().enumerate() {
            let (before, to) = scratch.states.split_at_mut(i);
            let x = before.last().map_or(start.hidden, |own| {
                let values = own.slice().first(n_all * self.n_embd);
                Rows { values, index: None, by_net: true }
            });
            let bias = bias.as_ref().map(Buffer::slice);
            let input = Input {
                x,
                table: None,
                n_rows: n,
                bias,
                residual: Some(x),
                finish: Finish::SiluResidual,
            };
            kernels::product(device, weights, input, to[0].slice_mut())?;
        }
        // One matrix for all: one product over the rows of all heads.
        let by_net = outputs.n_nets() > 1;
        let states =
            scratch.states.last().expect("there is a block").slice().first(n_all * self.n_embd);
        let input = Input {
            x: Rows { values: states, index: None, by_net },
            table: None,
            n_rows: if by_net { n } else { n_all },
            bias: None,
            residual: None,
            finish: Finish::Plain,
        };
        kernels::product(device, outputs, input, scratch.logits.slice_mut())?;
        self.queue_top_k(device, scratch.logits.slice(), n_all, out)?;
        Ok(2 * n_all * self.k)
    }

    #[allow(clippy::too_many_arguments)]
    fn queue_conditioned(
        &self,
        device: &dyn Device,
        steps: &[Step],
        output: &Matrices,
        embeddings: &Table,
        start: Start<'_>,
        scratch: &mut Scratch,
        mut out: SliceMut<'_, i32>,
    ) -> Result<usize, GpuError> {
        let (mut n_words, mut n_before) = (0, 0);
        // The paths at hand: what they go on from, and their tokens.
        let mut chosen: Option<(SliceMut<'_, i32>, SliceMut<'_, i32>)> = None;
        for (depth, step) in steps.iter().enumerate() {
            let n = self.n_paths(depth, start.n, n_before);
            let (before, to) = scratch.states.split_at_mut(depth);
            let (x, tokens) = match &chosen {
                None => (start.hidden, start.roots),
                Some((parents, tokens)) => {
                    let values = before[depth - 1].slice().first(n_before * self.n_embd);
                    (Rows { values, index: Some(parents.slice()), by_net: false }, tokens.slice())
                }
            };
            let input = Input {
                x,
                table: Some((embeddings, tokens)),
                n_rows: n,
                bias: Some(step.b.slice()),
                residual: None,
                finish: Finish::Silu,
            };
            kernels::product(device, &step.inner, input, scratch.inner.slice_mut())?;
            let whole = |values| Rows { values, index: None, by_net: false };
            let inner = whole(scratch.inner.slice().first(n * step.b.len()));
            let plain = Input { x: inner, table: None, bias: None, ..input };
            kernels::product(
                device,
                &step.v,
                Input { residual: Some(x), finish: Finish::Residual, ..plain },
                to[0].slice_mut(),
            )?;
            let state = whole(to[0].slice().first(n * self.n_embd));
            let input = Input { x: state, finish: Finish::Plain, ..plain };
            kernels::product(device, output, input, scratch.logits.slice_mut())?;

            let (mut offers, rest) = out.split_at(2 * n * self.k);
            self.queue_top_k(device, scratch.logits.slice(), n, offers.again())?;
            n_words += 2 * n * self.k;
            if depth + 1 == steps.len() {
                break;
            }
            let n_next = self.n_paths(depth + 1, start.n, n);
            let (parents, rest) = rest.split_at(n_next);
            let (next_tokens, rest) = rest.split_at(n_next);
            let (at_hand, next) = scratch.paths.split_at_mut(depth + 1);
            let offered = Paths {
                q: at_hand[depth].0.slice().first(n),
                origins: at_hand[depth].1.slice().first(n),
                candidates: offers.slice().first(n * self.k),
                p: offers.slice().part(n * self.k, n * self.k).cast(),
                k: self.k,
            };
            let reliability = Reliability {
                ratios: scratch.ratios.slice().part(depth * N_BINS, N_BINS),
                lowest: LOWEST,
                highest: HIGHEST,
                trust: scratch.trust.slice().first(start.n),
            };
            let (q, origins) = &mut next[0];
            let (q, origins) =
                (q.slice_mut().split_at(n_next).0, origins.slice_mut().split_at(n_next).0);
            let mut room = NextPaths { q, origins, parents, tokens: next_tokens };
            kernels::choose_paths(device, offered, reliability, &mut room)?;
            n_words += 2 * n_next;
            chosen = Some((room.parents, room.tokens));
            (out, n_before) = (rest, n);
        }
        Ok(n_words)
    }

    /// The likeliest tokens of `n` rows of logits, and then their probabilities.
    fn queue_top_k(
        &self,
        device: &dyn Device,
        logits: Slice<'_, f32>,
        n: usize,
        out: SliceMut<'_, i32>,
    ) -> Result<(), GpuError> {
        let (tokens, p) = out.split_at(n * self.k);
        let map = self.token_map.as_ref().map(Buffer::slice);
        let logits = logits.first(n * self.n_draft_vocab);
        kernels::top_k(device, logits, self.n_draft_vocab, map, self.k, tokens, p.cast())
    }

    /// What [`queue`](Self::queue) has put there, for sequences with these roots.
    fn read(&self, mut words: &[i32], roots: &[Token]) -> Drafted {
        let mut take = |n: usize| {
            let (taken, rest) = words.split_at(n);
            words = rest;
            taken
        };
        let offers = |words: &[i32]| -> Vec<Vec<Offered>> {
            let (tokens, p) = words.split_at(words.len() / 2);
            let pair = |(&t, &p): (&i32, &i32)| (Token(t), f32::from_bits(p as u32));
            tokens
                .chunks(self.k)
                .zip(p.chunks(self.k))
                .map(|(t, p)| t.iter().zip(p).map(pair).collect())
                .collect()
        };
        if matches!(self.kind, Kind::Plain { .. }) {
            let all = offers(take(2 * self.n_heads * roots.len() * self.k));
            return Drafted::Levels(all.chunks(roots.len()).map(<[_]>::to_vec).collect());
        }
        let mut depths: Vec<Vec<PathOffer>> = vec![];
        for depth in 0..self.n_heads {
            let n = self.n_paths(depth, roots.len(), depths.last().map_or(0, Vec::len));
            let paths: Vec<(usize, Token)> = if depth == 0 {
                roots.iter().copied().enumerate().collect()
            } else {
                let (parents, tokens) = take(2 * n).split_at(n);
                parents
                    .iter()
                    .zip(tokens)
                    .map(|(&parent, &token)| (parent as usize, Token(token)))
                    .collect()
            };
            let best = offers(take(2 * n * self.k));
            let offer = |((parent, token), best)| PathOffer { parent, token, best };
            depths.push(paths.into_iter().zip(best).map(offer).collect());
        }
        Drafted::Paths(depths)
    }
}

/// A token and what its head says of it.
type Offered = (Token, f32);

/// What heads offered.
enum Drafted {
    /// By head and sequence.
    Levels(Vec<Vec<Vec<Offered>>>),
    /// By depth and path.
    Paths(Vec<Vec<PathOffer>>),
}

/// What a head offered behind one path.
struct PathOffer {
    /// Index of the path that it goes on from, one depth above; of the sequence at the first.
    parent: usize,
    /// Its last token; the root at the first.
    token: Token,
    best: Vec<Offered>,
}

impl Default for Drafted {
    fn default() -> Self {
        Self::Levels(vec![])
    }
}

impl Drafted {
    /// Fills the trees of some origins: each with its place among the sequences that were drafted
    /// for.
    fn fill(
        &self,
        places: &[(usize, usize)],
        origins: &[Origin<'_>],
        n_nodes: usize,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        match self {
            Self::Levels(levels) => {
                for &(origin, place) in places {
                    let o = &origins[origin];
                    let own: Vec<Vec<Offered>> =
                        levels.iter().take(o.max_depth).map(|l| l[place].clone()).collect();
                    fill(&mut trees[origin], &own, calibration, o.trust, n_nodes);
                }
            }
            Self::Paths(depths) => {
                plant(&candidates(depths, places, origins, calibration), n_nodes, trees)
            }
        }
    }
}

/// All candidates behind the origins' roots, each behind its parent.
fn candidates(
    depths: &[Vec<PathOffer>],
    places: &[(usize, usize)],
    origins: &[Origin<'_>],
    calibration: &Calibration,
) -> Vec<Candidate> {
    let mut nodes: Vec<Candidate> = vec![];
    // For each path of the depth above: its origin, and where its candidates begin among the nodes.
    let mut above: Vec<Option<(usize, usize)>> = vec![];
    for (depth, paths) in depths.iter().enumerate() {
        let mut here = vec![None; paths.len()];
        for (path, offer) in paths.iter().enumerate() {
            let (origin, parent) = if depth == 0 {
                let Some(&(origin, _)) = places.iter().find(|(_, place)| *place == offer.parent)
                else {
                    continue;
                };
                (origin, None)
            } else {
                let Some((origin, first)) = above[offer.parent] else { continue };
                let node = (first..).zip(&nodes[first..]).find(|(_, n)| n.token == offer.token);
                let Some((node, _)) = node else { continue };
                (origin, Some(node))
            };
            let o = &origins[origin];
            if depth >= o.max_depth {
                continue;
            }
            here[path] = Some((origin, nodes.len()));
            let q = parent.map_or(1.0, |node: usize| nodes[node].q);
            let mut above = q;
            for (rank, &(token, p)) in offer.best.iter().enumerate() {
                // A calibrated sibling may come out above a better one; the order must hold all the
                // same.
                above = (q * calibration.estimate(depth + 1, rank, p, o.trust)).min(above);
                nodes.push(Candidate { origin, parent, token, p, q: above, state: 0 });
            }
        }
        above = here;
    }
    nodes
}

/// Drafts with what a device has, or has ready.
pub struct DeviceDraft(pub Rc<RefCell<DeviceHeads>>);

impl Draft for DeviceDraft {
    fn n_heads(&self) -> usize {
        self.0.borrow().n_heads()
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        trees.iter_mut().for_each(Tree::clear);
        let mut heads = self.0.borrow_mut();
        let (mut ready, mut others) = (vec![], vec![]);
        for (i, o) in origins.iter().enumerate().filter(|(_, o)| o.max_depth > 0) {
            match heads.ready.iter().position(|&known| known == (o.seq, o.root)) {
                Some(place) => ready.push((i, place)),
                None => others.push(i),
            }
        }
        heads.drafted.fill(&ready, origins, worth.n_nodes, calibration, trees);
        others.truncate(MOST_SEQUENCES);
        if others.is_empty() {
            return;
        }
        let theirs: Vec<Origin<'_>> = others.iter().map(|&i| origins[i]).collect();
        match heads.draft_from_host(&theirs, calibration) {
            Ok(drafted) => {
                let places: Vec<_> =
                    others.into_iter().enumerate().map(|(place, i)| (i, place)).collect();
                drafted.fill(&places, origins, worth.n_nodes, calibration, trees);
            }
            Err(error) => {
                tracing::error!(%error, "heads could not be computed; this step goes without their drafts")
            }
        }
    }
}
