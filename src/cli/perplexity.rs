//! `medusa-llama perplexity`: how well a model predicts a text.

use super::fetch;
use super::shared::{bar, load, read_text};
use crate::config::PerplexityArgs;
use crate::eval;

/// Prints the perplexity and its standard error.
pub(super) fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let params = args.model.context(eval::WINDOW, eval::WINDOW)?;
    let mut context = load(&args.model, &fetch::named_model(&args.model)?, &params)?;
    let (_, tokens) = read_text(&args.file, context.model(), eval::LEAST)?;
    let bar = bar(tokens.len(), "{bar:40} {pos}/{len} tokens {eta}");
    let found = eval::perplexity(&mut context, &tokens, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let (n, file) = (found.n_tokens, args.file.display());
    println!("perplexity {:.3} +- {:.3} over {n} tokens of {file}", found.value, found.error);
    Ok(())
}
