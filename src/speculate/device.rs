//! Heads on a device, and the verification there, with one wait per step.
//!
//! [`DeviceHeads::verify`] comes right after a forward pass, whose logits and hidden states stay in
//! place: it chooses every row's token, walks down the trees, and computes the heads for the next
//! step from the last accepted rows. Tokens and candidates come back in one copy. Where the host
//! chose a token, heads start from its copy of the hidden state.

use std::cell::RefCell;
use std::rc::Rc;

use super::calibration::Calibration;
use super::error::HeadsError;
use super::heads::{HeadNets, Heads};
use super::medusa::pick;
pub use super::nets::device::MOST_SEQUENCES;
use super::nets::device::{DeviceNets, DeviceWeights, Drafted, Offered, PathOffer, Roots, Scratch};
use super::paths::{Candidate, fill, plant, propose};
use super::{Draft, Origin, Tree, Worth};
use crate::engine::filter::Filter;
use crate::engine::sampler::Rule;
use crate::gpu::kernels::{self, RowRule, Rows, Span, Verification};
use crate::gpu::weights::Precision;
use crate::gpu::{Buffer, Device, GpuError, Slice};
use crate::llama::{Model, SeqId, Token};

/// Candidates of a head after a path: with more, fewer paths would fit the kernel that sorts them.
const WIDTH: usize = 10;
/// Most rows of a step that the device verifies.
pub const MOST_ROWS: usize = 4096;

/// Heads in a device's memory.
pub struct DeviceHeads {
    device: Rc<dyn Device>,
    nets: DeviceNets,
    verification: Verification,
    /// What the kernel is asked.
    rules: Vec<RowRule>,
    spans: Vec<Span>,
    scratch: Scratch,
    /// All that comes back to the host.
    mail: Buffer<i32>,
    words: Vec<i32>,
    /// Candidates after the last verification, and the sequences and roots they are for.
    drafted: Drafted,
    ready: Vec<(SeqId, Token)>,
    /// Rows whose tokens the device chose so far.
    pub n_verified: u64,
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
    /// Measured acceptance of heads; `None`: do not draft for the next step.
    pub draft: Option<&'a Calibration>,
}

impl DeviceHeads {
    /// Copies heads to the device, and those of the model's matrices that they need.
    ///
    /// # Errors
    /// [`HeadsError::Llama`] when the model's matrices cannot be read, [`HeadsError::Gpu`] without
    /// memory or for heads of different shapes.
    pub fn new(
        device: Rc<dyn Device>,
        heads: Heads,
        model: &Model,
        precision: Precision,
    ) -> Result<Self, HeadsError> {
        let map = heads.token_map.as_deref();
        let output = || pick(&model.output_rows()?, map);
        let weights = match heads.nets {
            HeadNets::Plain(mut weights) => {
                if weights.outputs.is_empty() {
                    weights.outputs.push(output()?);
                }
                DeviceWeights::medusa(&device, &weights, precision)?
            }
            HeadNets::Conditioned(weights) => {
                let embeddings = model.embedding_rows()?.matrix()?;
                DeviceWeights::conditioned(&device, &weights, &output()?, &embeddings, precision)?
            }
        };
        let nets = DeviceNets::new(&device, weights, model.n_embd(), map, WIDTH)?;
        let mail = Buffer::zeros(&device, MOST_ROWS + nets.most_words())?;
        Ok(Self {
            verification: Verification::new(&device, MOST_ROWS, MOST_SEQUENCES)?,
            rules: vec![],
            spans: vec![],
            scratch: Scratch::new(&device, &nets)?,
            words: vec![0; mail.len()],
            mail,
            nets,
            drafted: Drafted::Levels(vec![]),
            ready: vec![],
            n_verified: 0,
            device,
        })
    }

    /// Chooses the token after each row of a pass whose `logits` and `hidden` states of the output
    /// rows are on the device, and drafts after the last accepted rows if `ask` says so. Returns the
    /// chosen token by row, -1 where the host chooses. Waits once. After an error nothing is drafted.
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
            self.scratch.upload(&self.nets, calibration, &trust)?;
            let hidden = Rows {
                values: hidden,
                index: Some(self.verification.last.slice().first(n)),
                by_net: false,
            };
            let tokens = self.verification.roots.slice().first(n);
            let start = Roots { hidden, tokens, n };
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
        let roots: Vec<Token> = origins.iter().map(|o| o.root()).collect();
        let trust: Vec<f32> = origins.iter().map(|o| o.heads.trust).collect();
        self.scratch.upload(&self.nets, calibration, &trust)?;
        let hidden = Buffer::from_host(&self.device, &hidden)?;
        let on_device =
            Buffer::from_host(&self.device, &roots.iter().map(|t| t.0).collect::<Vec<_>>())?;
        let rows = Rows { values: hidden.slice(), index: None, by_net: false };
        let start = Roots { hidden: rows, tokens: on_device.slice(), n: origins.len() };
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
    let Some(Filter { top_k, top_p, min_p, temperature, .. }) = filter else { return rule };
    RowRule {
        inverse_temperature: 1.0 / temperature,
        top_p,
        min_logit: if min_p > 0.0 { min_p.ln() } else { f32::NEG_INFINITY },
        top_k: i32::try_from(top_k).unwrap_or(i32::MAX),
        ..rule
    }
}

/// The token that a sequence continues with: chosen at the last accepted row; -1 if the host chooses.
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

impl Drafted {
    /// Fills the trees of some origins: `places` are indices of origins, each with its index among
    /// the sequences that were drafted for.
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
                        levels.iter().take(o.heads.max_depth).map(|l| l[place].clone()).collect();
                    fill(&mut trees[origin], &own, calibration, o.heads.trust, n_nodes);
                }
            }
            Self::Paths(depths) => {
                plant(&candidates(depths, places, origins, calibration), n_nodes, trees)
            }
        }
    }
}

/// All candidates after the origins' roots, each after its parent.
fn candidates(
    depths: &[Vec<PathOffer>],
    places: &[(usize, usize)],
    origins: &[Origin<'_>],
    calibration: &Calibration,
) -> Vec<Candidate> {
    let mut nodes: Vec<Candidate> = vec![];
    // For each path of the depth above: its origin, and the index of its first candidate.
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
            if depth >= o.heads.max_depth {
                continue;
            }
            here[path] = Some((origin, nodes.len()));
            let q = parent.map_or(1.0, |node: usize| nodes[node].q);
            let path_end = Candidate { origin, parent, token: offer.token, p: 1.0, q, state: 0 };
            propose(&mut nodes, path_end, offer.best.iter().copied(), 0.0, |rank, p| {
                calibration.estimate(depth + 1, rank, p, o.heads.trust)
            });
        }
        above = here;
    }
    nodes
}

/// Drafts what the last verification drafted, or computes it from the host's hidden states.
impl Draft for Rc<RefCell<DeviceHeads>> {
    fn n_heads(&self) -> usize {
        self.borrow().nets.n_heads
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        let mut heads = self.borrow_mut();
        let (mut ready, mut others) = (vec![], vec![]);
        for (i, o) in origins.iter().enumerate().filter(|(_, o)| o.heads.max_depth > 0) {
            match heads.ready.iter().position(|&known| known == (o.seq, o.root())) {
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
                let places: Vec<_> = others.into_iter().zip(0..).collect();
                drafted.fill(&places, origins, worth.n_nodes, calibration, trees);
            }
            Err(error) => {
                tracing::error!(%error, "heads failed; this step drafts without them")
            }
        }
    }
}
