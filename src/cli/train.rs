//! `medusa-llama train`: collects answers with their features, then fits heads to them.

use std::path::Path;
use std::time::Instant;

use anyhow::anyhow;

use super::fetch;
use super::shared::bar;
use crate::config::TrainArgs;
use crate::engine;
use crate::engine::plan::Sizes;
use crate::engine::thread::EngineParams;
use crate::llama::{Model, Placement};
use crate::plot::{self, Series};
use crate::train::answers::{self, Wanted};
use crate::train::features::Writer;
use crate::train::fit::net::{FitNet, NetShape};
use crate::train::fit::shards::{ModelMatrices, Shards};
use crate::train::fit::{self, FitParams, Fitted};
use crate::train::kind::HeadKind;
use crate::train::prompts::{self, Prompt};
use crate::train::save::{self, Provenance};

/// Runs all steps.
pub(super) fn train(args: &TrainArgs) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.output)?;
    let work = args.work.clone().unwrap_or_else(|| args.output.join("work"));
    let prompts = prompts::read(&args.prompts.file)?;
    let folder = work.join("features");
    let path = fetch::named_model(&args.model)?;
    let (n_tokens, collect_s) = collect(args, &path, prompts, &folder)?;
    let model = Model::load(&path, &Placement::default(), |_| true)?;
    learn(args, &model, &folder, &work.join("checkpoint.safetensors"), n_tokens, collect_s)
}

/// Collects answers with their features. Returns the number of tokens in the work folder, and the
/// seconds that this run spent on collecting.
fn collect(
    args: &TrainArgs,
    model: &Path,
    mut prompts: Vec<Prompt>,
    folder: &Path,
) -> anyhow::Result<(usize, u64)> {
    let n_ctx = args.model.n_ctx();
    let n_cells = args.batch_size * n_ctx.min(2 * args.max_answer + 256);
    let params = args.model.engine(model.to_owned(), args.batch_size)?;
    let params = EngineParams {
        sizes: Sizes { n_cells: Some(n_cells.max(n_ctx)), n_retained: Some(n_ctx), ..params.sizes },
        traces: true,
        n_queue: args.batch_size + 8,
        ..params
    };
    let wanted = Wanted { n_tokens: args.tokens, max_answer: args.max_answer, seed: args.seed };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let engine = engine::spawn(params);
    let bar = bar(args.tokens, "answers {bar:40} {pos}/{len} tokens {elapsed}, {eta} left");
    let started = Instant::now();
    let collected = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        if !args.prompts.raw {
            prompts::render(&mut prompts, &handle.model, args.prompts.system.as_deref())?;
        }
        let mut shards = Writer::open(folder, &handle.model, (args.max_disk_gib as u64) << 30)?;
        answers::collect(&handle, &prompts, &mut shards, wanted, |n| bar.set_position(n as u64))
            .await?;
        anyhow::Ok(shards.n_tokens)
    });
    bar.finish();
    engine.stop();
    Ok((collected?, started.elapsed().as_secs()))
}

/// Fits heads to the features and writes them.
fn learn(
    args: &TrainArgs,
    model: &Model,
    folder: &Path,
    checkpoint: &Path,
    n_tokens: usize,
    collect_s: u64,
) -> anyhow::Result<()> {
    let (train, held) = (Shards::open(folder, "train-")?, Shards::open(folder, "held-")?);
    let n_vocab = model.n_vocab();
    let vocab = train.frequent_tokens(args.draft_vocab.min(n_vocab), n_vocab)?;
    let matrices = ModelMatrices::of(model, vocab.iter().map(|(token, _)| *token).collect())?;
    let (kind, n_embd) = (args.kind, model.n_embd());
    let width = args.width.filter(|_| kind == HeadKind::Conditioned).unwrap_or(n_embd);
    let params = FitParams {
        shape: NetShape { kind, n_embd, width, n_heads: args.heads },
        epochs: args.epochs,
        batch: 256,
        learning_rate: 1e-3,
        weight_decay: 0.01,
        decay: 0.8,
        n_classes: 4096,
        max_held_rows: 20_000,
        seed: args.seed,
        n_threads: args.model.threads(),
    };
    let bar = bar(0, "heads   {bar:40} {pos}/{len} steps {elapsed}, {eta} left");
    let started = Instant::now();
    let fitted = fit::fit(&train, &held, &matrices, &params, checkpoint, &mut |step, n_steps| {
        bar.set_length(n_steps as u64);
        bar.set_position(step as u64);
    })?;
    bar.finish();

    let output = &args.output;
    save::weights(output, kind, &FitNet::new(&params.shape), &fitted.params, &vocab)?;
    let origin = Provenance {
        model: format!(
            "{} ({})",
            model.name().unwrap_or_else(|| "unnamed model".into()),
            model.quantization()
        ),
        heads: kind,
        n_heads: args.heads,
        lora: !args.model.adapters().is_empty(),
        width,
        n_draft_vocab: vocab.len(),
        answer_tokens: n_tokens,
        collect_s,
        fit_s: started.elapsed().as_secs(),
        command: command_line(),
    };
    save::card(output, &origin, &fitted)?;
    draw_loss(&output.join("loss.svg"), &fitted)?;
    report(&fitted);
    Ok(())
}

/// The command line, quoted for a shell.
fn command_line() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    std::env::args().skip(1).fold("medusa-llama".to_owned(), |line, arg| {
        if arg.chars().all(plain) && !arg.is_empty() {
            line + " " + &arg
        } else {
            format!("{line} '{}'", arg.replace('\'', r"'\''"))
        }
    })
}

fn draw_loss(path: &Path, fitted: &Fitted) -> anyhow::Result<()> {
    let loss = |(i, epoch): (usize, &fit::Epoch)| {
        let n = epoch.train_loss.len() as f64;
        let at = move |j: usize| i as f64 + (j as f64 + 0.5) / n;
        epoch.train_loss.iter().enumerate().map(|(j, &l)| (at(j), f64::from(l))).collect::<Vec<_>>()
    };
    let points = fitted.history.iter().enumerate().flat_map(loss).collect();
    let (title, axes) = ("Loss of all heads, weighted", ["epochs", "cross entropy"]);
    plot::lines(path, title, axes, &[Series { name: "training".into(), points }], false)
}

/// Prints the heads' accuracy on held-out answers.
fn report(fitted: &Fitted) {
    println!("epoch   head   top-1   top-5");
    for (i, epoch) in fitted.history.iter().enumerate() {
        for (h, score) in epoch.held.iter().enumerate() {
            println!("{:5} {h:6} {:7.3} {:7.3}", i + 1, score.top(1), score.top(5));
        }
    }
}
