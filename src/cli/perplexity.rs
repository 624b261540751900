//! `medusa-llama perplexity`: how well a model predicts a text.

use anyhow::anyhow;

use super::{bar, read_text};
use crate::config::PerplexityArgs;
use crate::eval;
use crate::llama::Model;

/// Prints the perplexity and its standard error.
///
/// # Errors
/// The model or the text cannot be read, or the text is too short.
pub fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let path = args.model.path().map_err(|e| anyhow!(e))?;
    let model = Model::load(&path, args.model.n_gpu_layers, |_| true)?;
    let (_, tokens) = read_text(&args.file, &model)?;
    let bar = bar(tokens.len(), "{bar:40} {pos}/{len} tokens {eta}");
    let found = eval::perplexity(&model.into(), &tokens, args.model.threads(), |done| {
        bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    println!(
        "perplexity {:.3} +- {:.3} over {} tokens of {}",
        found.value,
        found.error,
        found.n_tokens,
        args.file.display()
    );
    Ok(())
}
