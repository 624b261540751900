//! `medusa-llama tune`: a model in several quantizations and with several numbers of threads,
//! measured in turn, and which of them to use.

mod folder;
mod report;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use indicatif::ProgressBar;
use tokio::runtime::Runtime;

use self::folder::Folder;
use self::report::TuneReport;
use super::fetch;
use super::shared::{bar, load, read_text, write_json};
use super::{bench::ask_all, quantize::write};
use crate::config::TuneArgs;
use crate::engine;
use crate::engine::EngineParams;
use crate::engine::forward::LlamaForward;
use crate::engine::plan::Sizes;
use crate::eval;
use crate::files::model_name;
use crate::llama::{ContextParams, Model, Placement, Quantization, Token, model_bytes};
use crate::machine::cores;
use crate::request::{Completion, Request, SamplingParams, Speculation};
use crate::tune::{Candidate, Measured, Parallelism, StepTime, TOGETHER};

/// Row counts of the timed steps.
const ROWS: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Characters of a prompt: short, since this measures decoding.
const PROMPT: usize = 64;
const N_BATCH: usize = 512;

/// Measures all candidates, prints the table and the recommendation, and writes the result files.
pub(super) fn tune(args: &TuneArgs) -> anyhow::Result<()> {
    // Check all arguments first: measuring takes long.
    let source = args.model.source()?;
    let threads = thread_counts(&args.threads)?;
    for path in [&args.report.json, &args.report.svg].into_iter().flatten() {
        check_output(path)?;
    }
    let input = fetch::model(&source, &|| true)?;
    let model = Model::outline(&input, &Placement::default())?;
    let (text, tokens) = read_text(&args.file, &model, 2 * eval::WINDOW)?;
    let quantization = model.quantization();
    let quantized = !["F32", "F16", "BF16"].iter().any(|full| quantization.contains(full));
    let own_type = model.meta("general.file_type").and_then(|t| t.parse().ok());
    let mut report = TuneReport::new(args, &model, quantized);
    drop(model);

    let mut kinds: Vec<Quantization> = vec![];
    for &kind in &args.types {
        if Some(kind.file_type) == own_type {
            eprintln!("the model is {} already: it is not made again", kind.name);
        } else if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    if quantized && !kinds.is_empty() {
        eprintln!("{}", report::QUANTIZED_TWICE);
    }
    let folder = Folder::new(args.keep.as_deref())?;
    let stem = model_name(&input);
    let files: Vec<PathBuf> =
        kinds.iter().map(|kind| folder.path().join(format!("{stem}-{}.gguf", kind.name))).collect();
    if let Some(there) = files.iter().find(|file| file.exists()) {
        bail!(
            "{} is there already: remove it, or name another folder with --keep",
            there.display()
        );
    }

    let n_candidates = 1 + kinds.len();
    let n_measured = kinds.len() + n_candidates * (1 + args.rounds * threads.len());
    let bar = bar(n_measured, "{bar:40} {pos}/{len} {elapsed} {msg}");
    bar.enable_steady_tick(Duration::from_secs(1));
    for (kind, file) in kinds.iter().zip(&files) {
        bar.set_message(format!("quantizing to {}", kind.name));
        let in_folder = || {
            format!(
                "the folder {} must hold it; --keep or TMPDIR names another one",
                folder.path().display()
            )
        };
        write(&input, file, *kind, args.model.threads()).with_context(in_folder)?;
        bar.inc(1);
    }
    let names = std::iter::once(format!("input ({quantization})"))
        .chain(kinds.iter().map(|kind| kind.name.to_owned()));
    let paths: Vec<PathBuf> = std::iter::once(input).chain(files).collect();
    for (i, (name, path)) in names.zip(&paths).enumerate() {
        bar.set_message(format!("perplexity of {name}"));
        report.candidates.push(candidate(args, name, path, quantized && i > 0, &tokens, &threads)?);
        bar.inc(1);
    }
    measure(args, &mut report.candidates, &paths, &prompts(&text), &bar)?;
    bar.finish_and_clear();
    drop(folder);
    report.conclude()?;
    report.print()?;
    if let Some(path) = &args.report.json {
        write_json(path, &report)?;
    }
    if let Some(path) = &args.report.svg {
        report.plot(path)?;
    }
    Ok(())
}

/// The given thread counts, or powers of two below the number of cores, and that number.
fn thread_counts(asked: &[usize]) -> anyhow::Result<Vec<usize>> {
    let cores = cores();
    if let Some(n) = asked.iter().find(|n| **n > cores) {
        bail!(
            "--threads {n}: there are {cores} cores, and more threads than cores only wait for each other"
        );
    }
    let powers = || (0..).map(|i| 1 << i).take_while(|n| *n < cores).chain([cores]);
    let counts: BTreeSet<usize> =
        if asked.is_empty() { powers().collect() } else { asked.iter().copied().collect() };
    Ok(counts.into_iter().collect())
}

/// Fails before measuring if a result cannot be written.
fn check_output(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("cannot write {}: there is no folder {}", path.display(), folder.display());
    }
    Ok(())
}

/// A candidate with what does not change from round to round.
fn candidate(
    args: &TuneArgs,
    name: String,
    path: &Path,
    quantized_twice: bool,
    tokens: &[Token],
    threads: &[usize],
) -> anyhow::Result<Candidate> {
    let params = args.model.context(eval::WINDOW, eval::WINDOW)?;
    let mut context = load(&args.model, path, &params)?;
    let found = eval::perplexity(&mut context, tokens, |_| ())?;
    let steps = ROWS.map(|rows| StepTime { rows, seconds: Default::default() });
    let measured = |&threads| Measured { threads, steps: steps.to_vec(), ..Measured::default() };
    Ok(Candidate {
        name,
        quantization: context.model().quantization(),
        quantized_twice,
        bytes: model_bytes(path)?,
        perplexity: found.value,
        perplexity_error: found.error,
        by_threads: threads.iter().map(measured).collect(),
    })
}

/// Prompts from places spread over the text.
fn prompts(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let n_starts = chars.len().saturating_sub(PROMPT);
    (0..TOGETHER).map(|i| chars[i * n_starts / TOGETHER..].iter().take(PROMPT).collect()).collect()
}

/// Measures all rounds. Each round measures every candidate, so that a change of the machine's speed
/// affects all. Only one is in memory at a time, since several large models might not fit.
fn measure(
    args: &TuneArgs,
    candidates: &mut [Candidate],
    paths: &[PathBuf],
    prompts: &[String],
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (n, n_counts) = (candidates.len(), candidates[0].by_threads.len());
    for round in 0..args.rounds {
        for t in 0..n_counts {
            // The order rotates, since later candidates run on a warmer machine.
            for i in (0..n).map(|k| (round + k) % n) {
                let (name, own) = (&candidates[i].name, &mut candidates[i].by_threads[t]);
                let what = format!("round {}: {name}, threads: {}", round + 1, own.threads);
                bar.set_message(what.clone());
                time_steps(args, &paths[i], own)?;
                time_decoding(args, &paths[i], prompts, own, &runtime)?;
                let [alone, together] = Parallelism::ALL
                    .map(|load| own.speed(load).rounds.last().copied().unwrap_or_default());
                let line = format!("{what}: {alone:.1} and {together:.1} tokens/s");
                // Above the bar if there is one.
                if bar.is_hidden() {
                    eprintln!("{line}")
                } else {
                    bar.println(line)
                }
                bar.inc(1);
            }
        }
    }
    Ok(())
}

/// Measures step times by rows.
fn time_steps(args: &TuneArgs, path: &Path, own: &mut Measured) -> anyhow::Result<()> {
    let params = args.model.context(N_BATCH, N_BATCH)?;
    let params = ContextParams { n_threads: own.threads, ..params };
    let mut forward = LlamaForward::new(load(&args.model, path, &params)?);
    let (points, change_s) = forward.measure(&ROWS, Duration::MAX)?;
    for (step, (_, seconds)) in own.steps.iter_mut().zip(points) {
        step.seconds.add(seconds);
    }
    own.change_s.add(change_s);
    Ok(())
}

/// Measures decoding without drafts in the serving engine, of one sequence and of several.
fn time_decoding(
    args: &TuneArgs,
    path: &Path,
    prompts: &[String],
    own: &mut Measured,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let n_ctx = 4 * PROMPT + 16 + args.max_tokens; // a character may be four tokens
    let params = args.model.engine(path.to_owned(), TOGETHER)?;
    let engine = engine::spawn(EngineParams {
        n_threads: own.threads,
        n_threads_batch: own.threads,
        sizes: Sizes::new(TOGETHER, n_ctx),
        ..params
    });
    let measured = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        // The first request touches memory for the first time.
        ask_all(&handle, [request(&prompts[0], 2)], 1).await?;
        for load in Parallelism::ALL {
            let prompts = prompts[..load.parallel()].iter();
            let requests = prompts.map(|prompt| request(prompt, args.max_tokens));
            // From the first token to the last: one less than there are.
            let rate = |done: Completion| {
                let n = done.usage.completion_tokens.saturating_sub(1);
                n as f64 / done.timings.decode_s.max(1e-9)
            };
            let speed = match load {
                Parallelism::Alone => &mut own.alone,
                Parallelism::Together => &mut own.together,
            };
            speed.add(
                ask_all(&handle, requests, load.parallel()).await?.into_iter().map(rate).sum(),
            );
        }
        anyhow::Ok(())
    });
    engine.stop();
    measured
}

fn request(prompt: &str, max_tokens: usize) -> Request {
    Request {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ignore_eos: true,
        cache_prompt: false,
        speculation: Speculation::OFF,
        share_text: false,
        ..Request::new(prompt, max_tokens)
    }
}
