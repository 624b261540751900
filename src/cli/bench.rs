//! `medusa-llama bench`: what heads are worth on this machine. Each prompt is answered with and without drafts in turn, by the
//! same engine, so that a machine that changes its pace changes both.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::config::BenchArgs;
use crate::engine::handle::{EngineParams, Handle};
use crate::engine::{self, Layout, Limits};
use crate::llama::max_sequences;
use crate::plot::{self, Labels, Line};
use crate::request::{Completion, Event, Request, SamplingParams, Speculation};
use crate::speculate::simulated::Acceptance;
use crate::train::prompts::Prompts;

/// One mode at one number of parallel requests.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Figures {
    tokens: usize,
    /// Of all requests together.
    wall_s: f64,
    /// Sum over requests, from the first token to the last.
    decode_s: f64,
    steps: usize,
    drafted: usize,
    accepted: usize,
}

impl Figures {
    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.wall_s += other.wall_s;
        self.decode_s += other.decode_s;
        self.steps += other.steps;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
    }

    fn note(&mut self, done: &Completion) {
        self.tokens += done.usage.completion_tokens;
        self.decode_s += done.timings.decode_s;
        self.steps += done.speculation.steps;
        self.drafted += done.speculation.drafted;
        self.accepted += done.speculation.accepted;
    }

    fn tokens_per_step(&self) -> f64 {
        self.tokens as f64 / self.steps.max(1) as f64
    }

    /// Candidates verified with each token that a step decides for one sequence.
    fn candidates_per_step(&self) -> f64 {
        self.drafted as f64 / self.steps.max(1) as f64
    }

    fn rate(&self) -> f64 {
        self.tokens as f64 / self.wall_s.max(1e-9)
    }
}

/// With and without drafts.
#[derive(Clone, Debug, Default, Serialize)]
struct Pair {
    plain: Figures,
    heads: Figures,
    /// Speed with drafts over speed without, for each round.
    ratios: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    quantization: String,
    n_heads: usize,
    /// Acceptance is simulated at these rates, and texts are meaningless.
    simulated: bool,
    acceptance: Option<Vec<f32>>,
    threads: usize,
    tree_nodes: Option<usize>,
    temperature: f64,
    max_tokens: usize,
    prompts: usize,
    by_parallel: BTreeMap<usize, Pair>,
    /// At the first number of parallel requests.
    by_category: BTreeMap<String, Pair>,
}

/// Runs the bench and prints its table.
///
/// # Errors
/// When model, heads or prompts cannot be read, a result cannot be written, or the engine fails.
pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let prompts = Prompts::read(&args.prompts, args.system.clone(), args.raw)?;
    let engine = engine::spawn(params(args)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        if handle.n_heads() == 0 {
            bail!("there are no heads: name a folder with --heads");
        }
        measure(args, &handle, &prompts).await
    });
    engine.stop();
    let report = report?;
    print(&report)?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.svg {
        let line = |name: &str, of: fn(&Pair) -> &Figures| Line {
            name: name.to_owned(),
            points: report.by_parallel.iter().map(|(&n, pair)| (n as f64, of(pair).rate())).collect(),
        };
        let lines = [line("plain", |p| &p.plain), line("with heads", |p| &p.heads)];
        let simulated = if report.simulated { ", simulated acceptance" } else { "" };
        let title = format!("{}, {}{simulated}", report.model, report.quantization);
        let labels = Labels { title: &title, x: "parallel requests", y: "tokens/s" };
        plot::lines(path, labels, &lines, true)?;
    }
    Ok(())
}

fn params(args: &BenchArgs) -> anyhow::Result<EngineParams> {
    let n_slots = args.parallel.iter().copied().max().unwrap_or(1);
    let n_ctx = args.model.context_size;
    let n_cells = n_slots * n_ctx;
    let mut heads = args.heads.params(&args.model, args.tree_nodes);
    if let (Some(heads), Some(rates)) = (&mut heads, &args.acceptance) {
        heads.acceptance = Some(Acceptance::new(rates.clone()).context("--acceptance: no rates from 0 to 1")?);
        heads.n_heads = heads.n_heads.min(rates.len()); // others would never be right
    }
    Ok(EngineParams {
        model_path: args.model.path().map_err(|e| anyhow!(e))?,
        n_gpu_layers: args.model.n_gpu_layers,
        n_threads: args.model.threads(),
        limits: Limits {
            n_slots,
            n_ctx,
            n_batch: 512,
            layout: Layout::Unified { n_cells, n_retained: 0, n_seqs: n_slots.min(max_sequences()) },
        },
        heads,
        traces: false,
        n_queue: n_slots + 1,
        max_wait: Duration::ZERO,
    })
}

async fn measure(args: &BenchArgs, handle: &Handle, prompts: &Prompts) -> anyhow::Result<Report> {
    // Every n-th of the file, so that all its parts are there.
    let n = args.n_prompts.min(prompts.len());
    let chosen: Vec<usize> = (0..n).map(|i| i * prompts.len() / n).collect();
    let mut report = Report {
        model: handle.model().name().unwrap_or_else(|| "unnamed model".into()),
        quantization: handle.model().quantization(),
        n_heads: handle.n_heads(),
        simulated: args.acceptance.is_some(),
        acceptance: args.acceptance.clone(),
        threads: args.model.threads(),
        tree_nodes: args.tree_nodes,
        temperature: args.temperature,
        max_tokens: args.max_tokens,
        prompts: n,
        by_parallel: BTreeMap::new(),
        by_category: BTreeMap::new(),
    };
    let bar = ProgressBar::new((args.parallel.len() * args.rounds * n) as u64);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} prompts {elapsed}, {eta} left").expect("a valid template"),
    );
    ask(handle, &request(args, "Say hi.".into(), 0, Speculation::Auto)).await?;
    for (i, &parallel) in args.parallel.iter().enumerate() {
        let mut all = Pair::default();
        for round in 0..args.rounds {
            let mut of_round = Pair::default();
            // Together as many as run in parallel, so that both modes see the same company.
            for group in chosen.chunks(parallel.max(1)) {
                let mut pair = Pair::default();
                // Which mode goes first changes, since the second one finds a warmer machine.
                let order = if (round + group[0]) % 2 == 0 { [false, true] } else { [true, false] };
                for with_heads in order {
                    let figures = run(args, handle, prompts, group, with_heads).await?;
                    *(if with_heads { &mut pair.heads } else { &mut pair.plain }) = figures;
                }
                of_round.plain.add(&pair.plain);
                of_round.heads.add(&pair.heads);
                if i == 0 && parallel == 1 {
                    let category = prompts.category(group[0]).unwrap_or("all").to_owned();
                    let of = report.by_category.entry(category).or_default();
                    of.plain.add(&pair.plain);
                    of.heads.add(&pair.heads);
                }
                bar.inc(group.len() as u64);
            }
            all.ratios.push(ratio(&of_round, parallel));
            all.plain.add(&of_round.plain);
            all.heads.add(&of_round.heads);
        }
        report.by_parallel.insert(parallel, all);
    }
    bar.finish_and_clear();
    Ok(report)
}

/// Speed with drafts over speed without: of decoding for one stream, of everything for several.
fn ratio(pair: &Pair, parallel: usize) -> f64 {
    let speed = |f: &Figures| f.tokens as f64 / if parallel == 1 { f.decode_s } else { f.wall_s }.max(1e-9);
    speed(&pair.heads) / speed(&pair.plain)
}

async fn run(
    args: &BenchArgs,
    handle: &Handle,
    prompts: &Prompts,
    group: &[usize],
    with_heads: bool,
) -> anyhow::Result<Figures> {
    let mode = if with_heads { Speculation::Auto } else { Speculation::Off };
    let started = Instant::now();
    let mut running = JoinSet::new();
    for &i in group {
        let (handle, request) = (handle.clone(), request(args, prompts.text(handle.model(), i), i, mode));
        running.spawn(async move { ask(&handle, &request).await });
    }
    let mut figures = Figures::default();
    while let Some(done) = running.join_next().await {
        figures.note(&done??);
    }
    figures.wall_s = started.elapsed().as_secs_f64();
    Ok(figures)
}

/// `i` is the prompt's number.
fn request(args: &BenchArgs, prompt: String, i: usize, speculation: Speculation) -> Request {
    // Simulated acceptance follows the seed: the same for all prompts, they would be lucky at the same positions.
    let seed = if args.acceptance.is_some() { i as u64 } else { 1 };
    let sampling = SamplingParams { temperature: args.temperature as f32, seed, ..SamplingParams::default() };
    let max_tokens = args.max_tokens;
    Request { prompt, max_tokens, sampling, stop: vec![], ignore_eos: false, cache_prompt: false, speculation }
}

async fn ask(handle: &Handle, request: &Request) -> anyhow::Result<Completion> {
    let mut events = handle.submit(request.clone()).await?;
    while let Some(event) = events.recv().await {
        match event {
            Event::Piece(_) => {}
            Event::Done(done) => return Ok(done),
            Event::Failed { id } => bail!("the engine failed; the log names the cause under {id}"),
        }
    }
    bail!("the engine stopped")
}

fn print(report: &Report) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let Report { model, quantization, n_heads, threads, prompts, .. } = report;
    writeln!(out, "{model} ({quantization}), {n_heads} heads, {threads} threads, {prompts} prompts")?;
    if let Some(rates) = &report.acceptance {
        writeln!(out, "simulated: heads are taken to be right at the rates {rates:?}; texts are meaningless")?;
    }
    writeln!(
        out,
        "\nparallel   plain tok/s   heads tok/s   ratio (lowest to highest)   tokens/step   candidates/step   accepted/drafted   batched/sequential"
    )?;
    let sequential = report.by_parallel.get(&1);
    for (parallel, pair) in &report.by_parallel {
        let mut ratios = pair.ratios.clone();
        ratios.sort_by(f64::total_cmp);
        let middle = ratios[ratios.len() / 2];
        let (plain, heads) = (&pair.plain, &pair.heads);
        // Against the same mode's requests one after the other.
        let gains = sequential.map(|one| [plain.rate() / one.plain.rate(), heads.rate() / one.heads.rate()]);
        let gains = gains.map_or_else(|| "-".into(), |[plain, heads]| format!("plain {plain:.2}, heads {heads:.2}"));
        writeln!(
            out,
            "{parallel:8} {:13.1} {:13.1}   {middle:5.3} ({:.3} to {:.3})      {:11.3}   {:15.2}   {:>16}   {gains}",
            plain.rate(),
            heads.rate(),
            ratios[0],
            ratios[ratios.len() - 1],
            heads.tokens_per_step(),
            heads.candidates_per_step(),
            format!("{}/{}", heads.accepted, heads.drafted),
        )?;
    }
    if !report.by_category.is_empty() {
        writeln!(out, "\none stream, by category      ratio of decoding speed   tokens/step")?;
    }
    for (category, pair) in &report.by_category {
        writeln!(out, "{category:28} {:23.3} {:13.3}", ratio(pair, 1), pair.heads.tokens_per_step())?;
    }
    Ok(())
}
