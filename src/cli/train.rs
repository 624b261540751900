//! `medusa-llama train`: answers, features, heads, each with a progress bar and time left.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::TrainArgs;
use crate::engine::handle::EngineParams;
use crate::engine::{self, Layout, Limits};
use crate::llama::{Model, ModelParams, max_sequences};
use crate::train::answers::{self, Wanted};
use crate::train::features::{self, FeatureParams};
use crate::train::prompts::Prompts;

/// Runs all steps.
///
/// # Errors
/// When a file cannot be read or written, the model cannot be loaded, or the work folder belongs to another model.
pub fn train(args: &TrainArgs) -> anyhow::Result<()> {
    let work = args.work.clone().unwrap_or_else(|| args.output.join("work"));
    std::fs::create_dir_all(&work)?;
    let prompts = Prompts::read(&args.prompts, args.system.clone(), args.raw)?;
    let path = work.join("answers.jsonl");
    collect(args, &prompts, &path)?;

    let answers = answers::read(&path)?;
    let model = Model::load(&args.model.path().map_err(|e| anyhow!(e))?, &ModelParams::default(), |_| true)?;
    let model = Arc::new(model);
    let params = FeatureParams { n_ctx: args.model.context_size, n_threads: args.model.threads() };
    let bar = bar("features", answers.len(), "answers");
    features::compute(&model, &prompts, &answers, &work.join("features"), params, |n| bar.set_position(n as u64))?;
    bar.finish();
    Ok(())
}

fn collect(args: &TrainArgs, prompts: &Prompts, path: &Path) -> anyhow::Result<()> {
    let n_ctx = args.model.context_size;
    let n_cells = args.batch_size * n_ctx.min(2 * args.max_answer + 256);
    let params = EngineParams {
        model_path: args.model.path().map_err(|e| anyhow!(e))?,
        n_gpu_layers: args.model.n_gpu_layers,
        n_threads: args.model.threads(),
        limits: Limits {
            n_slots: args.batch_size,
            n_ctx,
            n_batch: 512,
            layout: Layout::Unified {
                n_cells: n_cells.max(n_ctx),
                n_retained: n_ctx,
                n_seqs: (args.batch_size + 1).min(max_sequences()),
            },
        },
        heads: None,
        n_queue: args.batch_size + 8,
        max_wait: Duration::ZERO,
    };
    let wanted = Wanted { n_tokens: args.tokens, max_answer: args.max_answer, seed: args.seed };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let engine = engine::spawn(params);
    let bar = bar("answers", args.tokens, "tokens");
    let collected = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        answers::collect(&handle, prompts, path, wanted, |n| bar.set_position(n as u64)).await?;
        anyhow::Ok(())
    });
    bar.finish();
    engine.stop();
    collected
}

fn bar(what: &str, n: usize, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(n as u64);
    let template = format!("{what:9} {{bar:40}} {{pos}}/{{len}} {unit} {{elapsed}}, {{eta}} left");
    bar.set_style(ProgressStyle::with_template(&template).expect("a valid template"));
    bar
}
