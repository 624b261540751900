//! Heads ready to draft on the CPU.

use super::Draft;
use super::conditioned::Conditioned;
use super::error::HeadsError;
use super::heads::{HeadNets, Heads};
use super::medusa::Medusa;
use crate::llama::Model;

/// Prepares heads for drafting, with the matrices of their model that they need.
///
/// # Errors
/// [`HeadsError::Llama`] when the model's matrices cannot be read, or without memory;
/// [`HeadsError::Shape`] for weights that do not match.
pub fn drafter(
    heads: Heads,
    model: &Model,
    n_threads: usize,
) -> Result<Box<dyn Draft>, HeadsError> {
    let output = model.output_rows()?;
    Ok(match heads.nets {
        HeadNets::Plain(weights) => {
            Box::new(Medusa::new(weights, heads.token_map, &output, n_threads)?)
        }
        HeadNets::Conditioned(weights) => Box::new(Conditioned::new(
            &weights,
            heads.token_map,
            heads.token_counts,
            &output,
            model.embedding_rows()?,
            n_threads,
        )?),
    })
}
