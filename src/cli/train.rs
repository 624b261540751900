//! `medusa-llama train`: collects answers with their features, then fits heads to them.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::anyhow;

use super::fetch;
use super::shared::bar;
use crate::config::TrainArgs;
use crate::engine;
use crate::engine::EngineParams;
use crate::engine::plan::Sizes;
use crate::llama::{Model, Placement};
use crate::plot::{self, Series};
use crate::train::answers::{self, Wanted};
use crate::train::features::Writer;
use crate::train::fit::net::NetShape;
use crate::train::fit::shards::{ModelMatrices, Shards};
use crate::train::fit::{self, FitParams, Fitted};
use crate::train::kind::HeadKind;
use crate::train::own;
use crate::train::prompts::{self, Prompt};
use crate::train::save::{self, Provenance};

/// The work folder's folder of features.
const FEATURES: &str = "features";
/// Fewest prompts that the model writes if nobody says how many: every twentieth is held out.
const LEAST_OWN: usize = 64;
/// Most tokens of a passage that a prompt asks about.
const MAX_PASSAGE: usize = 320;

/// Runs all steps.
pub(super) fn train(args: &TrainArgs) -> anyhow::Result<()> {
    restart_with_one_thread_of_candle()?;
    std::fs::create_dir_all(&args.output)?;
    let work = args.work.clone().unwrap_or_else(|| args.output.join("work"));
    std::fs::create_dir_all(&work)?;
    let given = args.prompts.as_deref().map(prompts::read).transpose()?.unwrap_or_default();
    let texts = args.texts.as_deref().map(own::texts_of).transpose()?.unwrap_or_default();
    let path = fetch::named_model(&args.model)?;
    let (n_tokens, collect_s) = collect(args, &path, given, &texts, &work)?;
    let model = Model::load(&path, &Placement::default(), |_| true)?;
    learn(args, &model, &work, n_tokens, collect_s)
}

/// candle's own threads spin while they wait for each other. Parts of a minibatch have threads of ours
/// instead, which takes two thirds of the time; candle reads from the environment alone how many it
/// may have.
fn restart_with_one_thread_of_candle() -> anyhow::Result<()> {
    const NAMES: [&str; 2] = ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"];
    if std::env::var_os(NAMES[0]).is_some() {
        return Ok(());
    }
    let mut again = Command::new(std::env::current_exe()?);
    let error = again.args(std::env::args_os().skip(1)).envs(NAMES.map(|name| (name, "1"))).exec();
    Err(error.into())
}

/// Collects answers with their features. Returns the number of tokens in the work folder, and the
/// seconds that this run spent on collecting.
fn collect(
    args: &TrainArgs,
    model: &Path,
    mut prompts: Vec<Prompt>,
    texts: &[String],
    work: &Path,
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
    let by_default =
        if prompts.is_empty() { (args.tokens / args.max_answer).max(LEAST_OWN) } else { 0 };
    let n_own = args.own_prompts.unwrap_or(by_default);
    let style = &args.style;
    let own = own::Wanted {
        n: n_own,
        system: style.system.as_deref(),
        raw: style.raw,
        texts,
        max_passage: MAX_PASSAGE.min(n_ctx / 4),
        seed: args.seed,
    };
    let started = Instant::now();
    let collected = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        if n_own > 0 {
            let path = work.join("prompts.jsonl");
            let bar = bar(n_own, "prompts {bar:40} {pos}/{len} {elapsed}, {eta} left");
            own::write(&handle, own, &path, |n| bar.set_position(n as u64)).await?;
            bar.finish();
            prompts.extend(prompts::read(&path)?.into_iter().take(n_own));
        }
        if !style.raw {
            prompts::render(&mut prompts, &handle.model, style.system.as_deref())?;
        }
        let max_bytes = (args.max_disk_gib as u64) << 30;
        let mut shards = Writer::open(&work.join(FEATURES), &handle.model, max_bytes)?;
        let bar = bar(args.tokens, "answers {bar:40} {pos}/{len} tokens {elapsed}, {eta} left");
        answers::collect(&handle, &prompts, &mut shards, wanted, |n| bar.set_position(n as u64))
            .await?;
        bar.finish();
        anyhow::Ok(shards.n_tokens)
    });
    engine.stop();
    Ok((collected?, started.elapsed().as_secs()))
}

/// Fits heads to the features and writes them.
fn learn(
    args: &TrainArgs,
    model: &Model,
    work: &Path,
    n_tokens: usize,
    collect_s: u64,
) -> anyhow::Result<()> {
    let (folder, checkpoint) = (work.join(FEATURES), work.join("checkpoint.safetensors"));
    let (train, held) = (Shards::open(&folder, "train-")?, Shards::open(&folder, "held-")?);
    let n_vocab = model.n_vocab();
    let vocab = train.frequent_tokens(args.draft_vocab.min(n_vocab), n_vocab)?;
    let matrices = ModelMatrices::of(model, vocab.iter().map(|(token, _)| *token).collect())?;
    let (kind, n_embd) = (args.kind, model.n_embd());
    let width = match kind {
        HeadKind::Medusa => n_embd,
        HeadKind::Conditioned => args.width.unwrap_or((4 * n_embd / 3).next_multiple_of(32)),
    };
    let device = fit::device()?;
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
        n_parts: if device.is_cpu() { args.model.threads() } else { 1 },
    };
    let bar = bar(0, "heads   {bar:40} {pos}/{len} steps {elapsed}, {eta} left");
    let started = Instant::now();
    let mut progress = |step: usize, n_steps: usize| {
        bar.set_length(n_steps as u64);
        bar.set_position(step as u64);
    };
    let fitted = fit::fit(&train, &held, matrices, &params, &device, &checkpoint, &mut progress)?;
    bar.finish();

    let output = &args.output;
    save::weights(output, kind, &fitted.params, &vocab)?;
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
