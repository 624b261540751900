//! `medusa-llama perplexity`: how well a model foretells a text.

use anyhow::{Context as _, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::PerplexityArgs;
use crate::eval;
use crate::llama::{Model, ModelParams};

/// Prints the perplexity and its standard error.
///
/// # Errors
/// When model or text cannot be read, or the text is too short.
pub fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read {}", args.file.display()))?;
    let path = args.model.path().map_err(|e| anyhow!(e))?;
    let model =
        Model::load(&path, &ModelParams { n_gpu_layers: args.model.n_gpu_layers }, |_| true)?;
    let tokens = model.tokenize(&text, false)?;
    if tokens.len() < 2 * eval::WINDOW {
        bail!(
            "{} has {} tokens; at least {} are needed",
            args.file.display(),
            tokens.len(),
            2 * eval::WINDOW
        );
    }
    let bar = ProgressBar::new(tokens.len() as u64);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} tokens {eta}")
            .expect("a valid template"),
    );
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
