//! Medusa heads: head `h` foretells the token `h + 2` places behind the hidden state, whatever stands between. Since the
//! token right behind it, the root, is known, head 0 is about the root's children.
//!
//! T. Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (2024).

use super::calibration::Calibration;
use super::heads::Heads;
use super::{Draft, Origin, Tree};
use crate::llama::{LlamaError, Matrix, Net, Token};

/// Tokens that each head offers.
const WIDTH: usize = 10;

/// Heads ready to draft.
pub struct Medusa {
    net: Net,
    token_map: Option<Vec<Token>>,
    input: Vec<f32>,
    levels: Vec<Vec<(Token, f32)>>,
}

impl Medusa {
    /// From heads; `output` gives the model's own output matrix for those that have none.
    ///
    /// # Errors
    /// What `output` gives, or when there is no memory.
    pub fn new(
        mut heads: Heads,
        output: impl FnOnce() -> Result<Matrix, LlamaError>,
        n_threads: usize,
    ) -> Result<Self, LlamaError> {
        if heads.weights.outputs.is_empty() {
            let full = output()?;
            heads.weights.outputs.push(match &heads.token_map {
                Some(tokens) => pick(&full, tokens),
                None => full,
            });
        }
        let net = Net::new(&heads.weights, n_threads)?;
        Ok(Self { net, token_map: heads.token_map, input: vec![], levels: vec![] })
    }

    /// Number of heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.net.n_nets()
    }
}

/// The rows of these tokens.
fn pick(full: &Matrix, tokens: &[Token]) -> Matrix {
    let row = |t: &Token| &full.values[t.0 as usize * full.n_in..][..full.n_in];
    Matrix { n_out: tokens.len(), n_in: full.n_in, values: tokens.iter().flat_map(row).copied().collect() }
}

impl Draft for Medusa {
    fn draft(&mut self, origins: &[Origin<'_>], n_nodes: usize, calibration: &Calibration, trees: &mut [Tree]) {
        trees.iter_mut().for_each(Tree::clear);
        self.input.clear();
        let wanted: Vec<usize> = (0..origins.len()).filter(|&i| origins[i].max_depth > 0).collect();
        wanted.iter().for_each(|&i| self.input.extend_from_slice(origins[i].hidden));
        let (n_heads, n_out) = (self.net.n_nets(), self.net.n_out());
        let logits = match self.net.forward(&self.input) {
            Ok(logits) => logits,
            Err(error) => {
                tracing::error!(%error, "heads could not be computed; this step goes without drafts");
                return;
            }
        };
        for (row, &i) in wanted.iter().enumerate() {
            let n_levels = origins[i].max_depth.min(n_heads);
            self.levels.resize_with(n_levels, Vec::new);
            for (h, level) in self.levels.iter_mut().enumerate() {
                let at = (h * wanted.len() + row) * n_out;
                largest(&logits[at..at + n_out], level);
                if let Some(map) = &self.token_map {
                    level.iter_mut().for_each(|(token, _)| *token = map[token.0 as usize]);
                }
            }
            trees[i].fill(&self.levels, calibration, n_nodes);
        }
    }
}

/// The [`WIDTH`] most likely entries, best first, with their probabilities.
fn largest(logits: &[f32], out: &mut Vec<(Token, f32)>) {
    out.clear();
    let mut sum = 0.0;
    for (i, &logit) in logits.iter().enumerate() {
        if out.len() < WIDTH || logit > out[WIDTH - 1].1 {
            let place = out.partition_point(|&(_, better)| better >= logit);
            out.truncate(WIDTH - 1);
            out.insert(place, (Token(i as i32), logit));
        }
    }
    let max = out.first().map_or(0.0, |best| best.1);
    logits.iter().for_each(|&logit| sum += (logit - max).exp());
    out.iter_mut().for_each(|(_, p)| *p = (*p - max).exp() / sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_largest_are_the_first_of_all_sorted(logits in prop::collection::vec(-9.0f32..9.0, 1..200)) {
            let mut got = vec![];
            largest(&logits, &mut got);
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
