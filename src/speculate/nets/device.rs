//! The networks of heads on a GPU: queued in one go, with candidates as their output.

use std::rc::Rc;

use crate::gpu::kernels::{
    self, Finish, Input, MAX_CANDIDATES, N_BINS, NextPaths, Paths, Reliability, Rows,
};
use crate::gpu::weights::{Matrices, Precision, Table};
use crate::gpu::{Buffer, Device, GpuError, Slice, SliceMut};
use crate::llama::Token;
use crate::matrix::Matrix;
use crate::speculate::calibration::{Calibration, HIGHEST, LOWEST};
use crate::speculate::nets::conditioned::{ConditionedHead, ConditionedWeights};
use crate::speculate::nets::medusa::MedusaWeights;

/// Most sequences of a step that the device takes; with more, the host does the work.
pub const MOST_SEQUENCES: usize = 64;
/// Most paths that a conditioned head continues, of all sequences together ...
const MOST_PATHS: usize = 64;
/// ... and least: a product with this many rows takes no longer than one with fewer.
const LEAST_PATHS: usize = 8;

/// Heads in a device's memory, with what their computation needs.
pub struct DeviceNets {
    weights: DeviceWeights,
    pub n_heads: usize,
    n_embd: usize,
    /// Rows of the output matrix, and the token of each.
    n_draft_vocab: usize,
    token_map: Option<Buffer<i32>>,
    /// Candidates per head and path.
    k: usize,
}

/// Weights in a device's memory.
pub enum DeviceWeights {
    /// By depth the blocks of all heads with their biases, and the output matrices: one for all, or
    /// one for each.
    Medusa { blocks: Vec<(Matrices, Option<Buffer<f32>>)>, outputs: Matrices },
    /// Heads by depth, the output matrix they share, and the tokens' embeddings.
    Conditioned { steps: Vec<Step>, output: Matrices, embeddings: Table },
}

/// One conditioned head.
pub struct Step {
    /// `[W | U]`
    inner: Matrices,
    v: Matrices,
    b: Buffer<f32>,
}

/// The sequences to draft for: their hidden states and roots.
#[derive(Clone, Copy)]
pub struct Roots<'a> {
    pub hidden: Rows<'a>,
    pub tokens: Slice<'a, i32>,
    pub n: usize,
}

/// Intermediate results, and factors of heads and sequences.
pub struct Scratch {
    /// After each block or head.
    states: Vec<Buffer<f32>>,
    inner: Buffer<f32>,
    logits: Buffer<f32>,
    /// By depth `q` and origins of the paths.
    paths: Vec<(Buffer<f32>, Buffer<i32>)>,
    /// By head the factors of its calibration.
    ratios: Buffer<f32>,
    trust: Buffer<f32>,
}

impl DeviceWeights {
    /// Copies Medusa heads, which must include output matrices.
    pub fn medusa(
        device: &Rc<dyn Device>,
        weights: &MedusaWeights,
        precision: Precision,
    ) -> Result<Self, GpuError> {
        let misfit = || GpuError::Shape {
            kernel: "product",
            reason: "heads without blocks, or of different shapes".into(),
        };
        let n_blocks = weights.blocks.first().map_or(0, Vec::len);
        if n_blocks == 0 || weights.blocks.iter().any(|blocks| blocks.len() != n_blocks) {
            return Err(misfit());
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
            return Err(misfit());
        }
        Ok(Self::Medusa { blocks, outputs: Matrices::new(device, &outputs, precision)? })
    }

    /// Copies conditioned heads, with the output matrix and the embeddings they read.
    pub fn conditioned(
        device: &Rc<dyn Device>,
        weights: &ConditionedWeights,
        output: &Matrix,
        embeddings: &Matrix,
        precision: Precision,
    ) -> Result<Self, GpuError> {
        let step = |s: &ConditionedHead| {
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
    /// Allocates for the largest step.
    pub fn new(device: &Rc<dyn Device>, nets: &DeviceNets) -> Result<Self, GpuError> {
        let n = nets.most_rows();
        let (n_steps, width) = match &nets.weights {
            DeviceWeights::Medusa { blocks, .. } => (blocks.len(), 0),
            DeviceWeights::Conditioned { steps, .. } => (steps.len(), steps[0].b.len()),
        };
        let floats = |len: usize| Buffer::zeros(device, len);
        let path = |_| Ok((Buffer::zeros(device, MOST_PATHS)?, Buffer::zeros(device, MOST_PATHS)?));
        Ok(Self {
            states: (0..n_steps).map(|_| floats(n * nets.n_embd)).collect::<Result<_, _>>()?,
            inner: floats(n * width)?,
            logits: floats(n * nets.n_draft_vocab)?,
            paths: (0..nets.n_heads).map(path).collect::<Result<_, GpuError>>()?,
            ratios: floats(nets.n_heads * N_BINS)?,
            trust: floats(MOST_SEQUENCES)?,
        })
    }

    /// Uploads the factors of heads and sequences, and the sequences' roots as their first paths.
    pub fn upload(
        &mut self,
        nets: &DeviceNets,
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

impl DeviceNets {
    /// Heads with `k` candidates per head and path, of tokens by `token_map`.
    pub fn new(
        device: &Rc<dyn Device>,
        weights: DeviceWeights,
        n_embd: usize,
        token_map: Option<&[Token]>,
        k: usize,
    ) -> Result<Self, GpuError> {
        let (n_heads, n_draft_vocab) = match &weights {
            DeviceWeights::Medusa { blocks, outputs } => (blocks[0].0.n_nets, outputs.n_out),
            DeviceWeights::Conditioned { steps, output, .. } => (steps.len(), output.n_out),
        };
        let map = token_map.map(|map| map.iter().map(|t| t.0).collect::<Vec<_>>());
        let token_map = map.map(|map| Buffer::from_host(device, &map)).transpose()?;
        let k = k.min(n_draft_vocab);
        Ok(Self { weights, n_heads, n_embd, n_draft_vocab, token_map, k })
    }

    /// Rows that one product can have.
    fn most_rows(&self) -> usize {
        match self.weights {
            DeviceWeights::Medusa { .. } => MOST_SEQUENCES * self.n_heads,
            DeviceWeights::Conditioned { .. } => MOST_PATHS.max(MOST_SEQUENCES),
        }
    }

    /// Words that [`queue`](Self::queue) can write.
    pub fn most_words(&self) -> usize {
        let n = if matches!(self.weights, DeviceWeights::Medusa { .. }) { 1 } else { self.n_heads };
        n * self.most_rows() * (2 + 2 * self.k)
    }

    /// Number of paths that the head at `depth` continues, after `n_before` at the depth above; at
    /// the first, one per sequence.
    fn n_paths(&self, depth: usize, n_sequences: usize, n_before: usize) -> usize {
        if depth == 0 {
            return n_sequences;
        }
        (2 * n_sequences)
            .clamp(LEAST_PATHS, MOST_PATHS)
            .min(n_before * self.k)
            .min(MAX_CANDIDATES / self.k)
    }

    /// Queues the heads; their candidates go to `out`. Returns how many words of it they take.
    pub fn queue(
        &self,
        device: &dyn Device,
        roots: Roots<'_>,
        scratch: &mut Scratch,
        out: SliceMut<'_, i32>,
    ) -> Result<usize, GpuError> {
        match &self.weights {
            DeviceWeights::Medusa { blocks, outputs } => {
                self.queue_medusa(device, blocks, outputs, roots, scratch, out)
            }
            DeviceWeights::Conditioned { steps, output, embeddings } => {
                self.queue_conditioned(device, steps, output, embeddings, roots, scratch, out)
            }
        }
    }

    fn queue_medusa(
        &self,
        device: &dyn Device,
        blocks: &[(Matrices, Option<Buffer<f32>>)],
        outputs: &Matrices,
        roots: Roots<'_>,
        scratch: &mut Scratch,
        out: SliceMut<'_, i32>,
    ) -> Result<usize, GpuError> {
        let (n, n_all) = (roots.n, self.n_heads * roots.n);
        for (i, (weights, bias)) in blocks.iter().enumerate() {
            let (before, to) = scratch.states.split_at_mut(i);
            let x = before.last().map_or(roots.hidden, |own| {
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
        // One matrix for all heads: one product over the rows of all.
        let by_net = outputs.n_nets > 1;
        let states =
            scratch.states.last().expect("heads have blocks").slice().first(n_all * self.n_embd);
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
        roots: Roots<'_>,
        scratch: &mut Scratch,
        mut out: SliceMut<'_, i32>,
    ) -> Result<usize, GpuError> {
        let (mut n_words, mut n_before) = (0, 0);
        // The current paths: their parents, and their tokens.
        let mut chosen: Option<(SliceMut<'_, i32>, SliceMut<'_, i32>)> = None;
        for (depth, step) in steps.iter().enumerate() {
            let n = self.n_paths(depth, roots.n, n_before);
            let (before, to) = scratch.states.split_at_mut(depth);
            let (x, tokens) = match &chosen {
                None => (roots.hidden, roots.tokens),
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
            self.queue_top_k(device, scratch.logits.slice(), n, offers.reborrow())?;
            n_words += 2 * n * self.k;
            if depth + 1 == steps.len() {
                break;
            }
            let n_next = self.n_paths(depth + 1, roots.n, n);
            let (parents, rest) = rest.split_at(n_next);
            let (next_tokens, rest) = rest.split_at(n_next);
            let (current, next) = scratch.paths.split_at_mut(depth + 1);
            let offered = Paths {
                q: current[depth].0.slice().first(n),
                origins: current[depth].1.slice().first(n),
                candidates: offers.slice().first(n * self.k),
                p: offers.slice().part(n * self.k, n * self.k).cast(),
                k: self.k,
            };
            let reliability = Reliability {
                ratios: scratch.ratios.slice().part(depth * N_BINS, N_BINS),
                lowest: LOWEST,
                highest: HIGHEST,
                trust: scratch.trust.slice().first(roots.n),
            };
            let (q, origins) = &mut next[0];
            let (q, origins) =
                (q.slice_mut().split_at(n_next).0, origins.slice_mut().split_at(n_next).0);
            let mut next_paths = NextPaths { q, origins, parents, tokens: next_tokens };
            kernels::choose_paths(device, offered, reliability, &mut next_paths)?;
            n_words += 2 * n_next;
            chosen = Some((next_paths.parents, next_paths.tokens));
            (out, n_before) = (rest, n);
        }
        Ok(n_words)
    }

    /// The top tokens of `n` rows of logits, and then their probabilities.
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

    /// Reads the words of [`queue`](Self::queue), for sequences with these roots.
    pub fn read(&self, mut words: &[i32], roots: &[Token]) -> Drafted {
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
        if matches!(self.weights, DeviceWeights::Medusa { .. }) {
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

/// A token and its head's probability of it.
pub type Offered = (Token, f32);

/// The candidates of all heads.
pub enum Drafted {
    /// By head and sequence.
    Levels(Vec<Vec<Vec<Offered>>>),
    /// By depth and path.
    Paths(Vec<Vec<PathOffer>>),
}

/// A head's candidates after one path.
pub struct PathOffer {
    /// Index of the path that it continues, one depth above; of the sequence at the first.
    pub parent: usize,
    /// Its last token; the root at the first.
    pub token: Token,
    /// Best first.
    pub best: Vec<Offered>,
}
