//! Heads as a source of drafts on the CPU.

use super::Draft;
use super::conditioned::Conditioned;
use super::heads::{HeadNets, Heads};
use super::medusa::Medusa;
use crate::llama::{LlamaError, Model};

/// Prepares heads, with what they need of their model, to draft.
///
/// # Errors
/// When the model's matrices cannot be read, or there is no memory.
pub fn drafter(
    heads: Heads,
    model: &Model,
    n_threads: usize,
) -> Result<Box<dyn Draft>, LlamaError> {
    let output = model.output_rows()?;
    Ok(match heads.nets {
        HeadNets::Plain(weights) => {
            Box::new(Medusa::new(weights, heads.token_map, &output, n_threads)?)
        }
        HeadNets::Conditioned(weights) => {
            let embeddings = model.embedding_rows()?;
            Box::new(Conditioned::new(
                &weights,
                heads.token_map,
                heads.token_counts,
                &output,
                embeddings,
                n_threads,
            )?)
        }
    })
}
