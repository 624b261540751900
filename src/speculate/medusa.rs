//! Medusa heads: head `h` predicts the token `h + 2` positions after the hidden state, whatever is
//! between. The token right after it, the root, is known, so head 0 predicts the root's children.
//!
//! T. Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
//! Heads" (2024).

use super::calibration::Calibration;
use super::error::HeadsError;
use super::nets::{MedusaNet, MedusaWeights};
use super::paths::fill;
use super::{Draft, Origin, Tree, Worth};
use crate::llama::{LlamaError, MatrixRows, Threads, Token};
use crate::matrix::Matrix;
use crate::vector::{largest_k, log_sum_exp};

/// Most candidates of a head after a path. In a tree of 64 nodes 32 are worth 5% more tokens per step
/// than 10.
const WIDTH: usize = 32;

/// Heads ready to draft.
pub struct Medusa {
    net: MedusaNet,
    token_map: Option<Vec<Token>>,
    input: Vec<f32>,
    levels: Vec<Vec<(Token, f32)>>,
}

impl Medusa {
    /// Makes heads ready to compute; those without output matrices share the model's, `output`.
    pub fn new(
        mut weights: MedusaWeights,
        token_map: Option<Vec<Token>>,
        output: &MatrixRows,
        threads: &Threads,
    ) -> Result<Self, HeadsError> {
        if weights.outputs.is_empty() {
            weights.outputs.push(pick(output, token_map.as_deref())?);
        }
        let net = MedusaNet::new(&weights, threads)?;
        Ok(Self { net, token_map, input: vec![], levels: vec![] })
    }
}

/// The rows of these tokens; all rows without a map.
pub(super) fn pick(rows: &MatrixRows, tokens: Option<&[Token]>) -> Result<Matrix, LlamaError> {
    let Some(tokens) = tokens else { return rows.matrix() };
    let mut values = Vec::with_capacity(tokens.len() * rows.n_in());
    tokens.iter().try_for_each(|t| rows.read(t.0 as usize, 1, &mut values))?;
    Ok(Matrix { n_out: tokens.len(), n_in: rows.n_in(), values })
}

impl Draft for Medusa {
    fn n_heads(&self) -> usize {
        self.net.n_heads()
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        self.input.clear();
        let wanted: Vec<usize> =
            (0..origins.len()).filter(|&i| origins[i].heads.max_depth > 0).collect();
        wanted.iter().for_each(|&i| self.input.extend_from_slice(origins[i].hidden));
        let (n_heads, n_out) = (self.net.n_heads(), self.net.n_out());
        let logits = match self.net.forward(&self.input) {
            Ok(logits) => logits,
            Err(error) => {
                tracing::error!(%error, "heads failed; this step has no drafts from them");
                return;
            }
        };
        for (row, &i) in wanted.iter().enumerate() {
            let n_levels = origins[i].heads.max_depth.min(n_heads);
            self.levels.resize_with(n_levels, Vec::new);
            for (h, level) in self.levels.iter_mut().enumerate() {
                let at = (h * wanted.len() + row) * n_out;
                top_candidates(&logits[at..at + n_out], level);
                if let Some(map) = &self.token_map {
                    level.iter_mut().for_each(|(token, _)| *token = map[token.0 as usize]);
                }
            }
            fill(&mut trees[i], &self.levels, calibration, origins[i].heads.trust, worth.n_nodes);
        }
    }
}

/// The [`WIDTH`] most likely entries, best first, with their probabilities.
pub(super) fn top_candidates(logits: &[f32], out: &mut Vec<(Token, f32)>) {
    largest_k(logits, WIDTH, out);
    let norm = log_sum_exp(logits);
    out.iter_mut().for_each(|(_, p)| *p = (*p - norm).exp());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn top_candidates_are_the_first_of_all_sorted(logits in prop::collection::vec(-9.0f32..9.0, 1..200)) {
            let mut got = vec![];
            top_candidates(&logits, &mut got);
            let mut all: Vec<usize> = (0..logits.len()).collect();
            all.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            prop_assert_eq!(got.len(), logits.len().min(WIDTH));
            for ((token, p), i) in got.iter().zip(all) {
                prop_assert_eq!(logits[token.0 as usize], logits[i]);
                prop_assert!((f64::from(*p) / (f64::from(logits[i]).exp() / sum) - 1.0).abs() < 1e-3);
            }
        }
    }
}
