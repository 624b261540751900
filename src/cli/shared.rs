//! What several commands use.

use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::sync::watch;

use crate::config::ModelArgs;
use crate::engine::{offload, plan};
use crate::llama::{Context, ContextParams, LlamaError, Model, Token};

/// A progress bar of `n` units, in indicatif's template language.
pub(super) fn bar(n: usize, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("a valid template");
    ProgressBar::new(n as u64).with_style(style)
}

/// A context of a model and its adapters.
pub(super) fn load(
    args: &ModelArgs,
    path: &Path,
    params: &ContextParams,
) -> anyhow::Result<Context> {
    let adapters = args.adapters();
    let placement = offload::settle(path, &args.placement()?, |model| {
        Ok::<_, LlamaError>(plan::fits_devices(&Context::new(model.into(), params)?, &adapters))
    })?;
    let mut model = Model::load(path, &placement, |_| true)?;
    model.adapt(&adapters)?;
    Ok(Context::new(model.into(), params)?)
}

/// A text to measure perplexity on, with its tokens, of which there are to be at least `least`.
pub(super) fn read_text(
    file: &Path,
    model: &Model,
    least: usize,
) -> anyhow::Result<(String, Vec<Token>)> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    let tokens = model.tokenize(&text, false)?;
    let n = tokens.len();
    ensure!(n >= least, "{shown} has {n} tokens; at least {least} are needed");
    Ok((text, tokens))
}

pub(super) fn write_json(path: &Path, report: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// Shows a progress bar on a terminal as long as `progress` tells how much of the model is read.
pub(super) async fn show_loading<T>(
    mut stage: watch::Receiver<T>,
    progress: impl Fn(&T) -> Option<f32>,
) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let bar = bar(100, "loading model {bar:40} {percent:>3}% {eta}");
    loop {
        let Some(progress) = progress(&stage.borrow_and_update()) else { break };
        if progress > 0.0 {
            bar.set_position((progress * 100.0) as u64); // before, a download may have its own bar
        }
        if stage.changed().await.is_err() {
            break;
        }
    }
    bar.finish_and_clear();
}
