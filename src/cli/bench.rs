//! `medusa-llama bench`: what drafts are worth on this machine. Each prompt is answered in each
//! mode in turn, by the same engine, so that a change of the machine's speed affects all modes.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail, ensure};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::JoinSet;

use super::fetch;
use super::shared::{bar, write_json};
use crate::config::BenchArgs;
use crate::engine;
use crate::engine::EngineParams;
use crate::engine::drafts::DraftParams;
use crate::engine::handle::Handle;
use crate::engine::thread::spawn_with;
use crate::plot::{self, Series};
use crate::request::{self, Caller, Completion, Request, SamplingParams, Source, Speculation};
use crate::speculate::recording::{Hindsight, Recording};
use crate::speculate::reliability::{Count, N_DEPTHS, Reliability, calibration_error};
use crate::speculate::simulated::{Acceptance, Simulated};
use crate::train::prompts::{self, Prompt};

/// Requests of a group for each that runs at the same time: while one is left, most of the group's time
/// has gone by.
const QUEUE: usize = 4;

/// One mode at one number of parallel requests.
#[derive(Clone, Debug, Default, Serialize)]
struct Figures {
    tokens: usize,
    /// Of all requests together.
    wall_s: f64,
    /// Sum over requests, from the first token to the last.
    decode_s: f64,
    steps: usize,
    drafted: usize,
    accepted: usize,
    /// Tokens per second in each round: of decoding for one stream, of everything for several.
    speeds: Vec<f64>,
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

    fn record(&mut self, done: &Completion) {
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

    /// Tokens per second: of decoding for one stream, of everything for several.
    fn speed(&self, parallel: usize) -> f64 {
        self.tokens as f64 / if parallel == 1 { self.decode_s } else { self.wall_s }.max(1e-9)
    }

    /// By round, how many times as fast as `other`.
    fn ratios(&self, other: &Self) -> Vec<f64> {
        self.speeds.iter().zip(&other.speeds).map(|(own, other)| own / other).collect()
    }
}

/// By mode.
type Modes = BTreeMap<&'static str, Figures>;

#[derive(Serialize)]
struct Report {
    model: String,
    quantization: String,
    n_heads: usize,
    draft_model: Option<String>,
    text_drafts: bool,
    /// Acceptance is simulated at these rates, and texts are meaningless.
    simulated: bool,
    acceptance: Option<Vec<f32>>,
    threads: usize,
    tree_nodes: Option<usize>,
    temperature: f64,
    max_tokens: usize,
    prompts: usize,
    modes: Vec<&'static str>,
    by_parallel: BTreeMap<usize, Modes>,
    /// What other choices among the same candidates would have reached, of every mode that drafts.
    hindsight: BTreeMap<usize, BTreeMap<&'static str, Hindsight>>,
    /// At one parallel request.
    by_category: BTreeMap<String, Modes>,
    calibration: Vec<Calibrated>,
}

/// How well the acceptance of candidates was predicted.
#[derive(Debug, Serialize)]
struct Calibrated {
    sources: Vec<Source>,
    /// `None`: all of them.
    depth: Option<usize>,
    verified: u64,
    predicted: f64,
    accepted: u64,
    error: f64,
    ranges: Vec<Count>,
}

/// Runs the bench and prints its table.
pub(super) fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let mut prompts = prompts::read(&args.prompts.file)?;
    let mut params = params(args)?;
    let recording = Arc::new(Mutex::new(Recording::default()));
    if let Some(drafts) = &mut params.drafts {
        drafts.recording = Some(Arc::clone(&recording));
    }
    let engine = match args.acceptance.clone() {
        None => engine::spawn(params),
        Some(rates) => {
            let acceptance = simulate(&mut params, rates)?;
            spawn_with(params, |model| Simulated::new(model, acceptance))
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        ensure!(
            handle.draft_model.is_some() || !names(args, Speculation::by_model),
            "--modes names a draft model, but there is none, and the model has no draft layers; name a file with --draft-model"
        );
        if !args.prompts.style.raw {
            prompts::render(&mut prompts, &handle.model, args.prompts.style.system.as_deref())?;
        }
        measure(args, &handle, &recording, &prompts).await
    });
    engine.stop();
    let report = report?;
    print(&report)?;
    if let Some(path) = &args.report.json {
        write_json(path, &report)?;
    }
    if let Some(path) = &args.report.svg {
        let line = |&name: &&str| Series {
            name: name.to_owned(),
            points: report
                .by_parallel
                .iter()
                .map(|(&n, modes)| (n as f64, modes[name].rate()))
                .collect(),
        };
        let lines: Vec<Series> = report.modes.iter().map(line).collect();
        let simulated = if report.simulated { ", simulated acceptance" } else { "" };
        let title = format!("{}, {}{simulated}", report.model, report.quantization);
        plot::lines(path, &title, ["parallel requests", "tokens/s"], &lines, true)?;
    }
    Ok(())
}

fn params(args: &BenchArgs) -> anyhow::Result<EngineParams> {
    let n_slots = args.parallel.iter().copied().max().unwrap_or(1);
    let params = args.model.engine(fetch::named_model(&args.model)?, n_slots)?;
    let files = fetch::named_drafts(&args.drafts, &args.model)?;
    let mut drafts = args
        .drafts
        .params(files, &params.placement)
        .context("there is nothing to draft with: no heads, no draft model and no text")?;
    drafts.fixed_nodes = args.tree_nodes;
    if drafts.heads.is_none() && names(args, Speculation::by_heads) {
        bail!("--modes names heads, but there are none; name a folder with --heads");
    }
    Ok(EngineParams { drafts: Some(drafts), ..params })
}

/// Whether one of the modes is to draft from this source and not merely may.
fn names(args: &BenchArgs, by: fn(Speculation) -> bool) -> bool {
    let mut named = args.modes.iter().filter(|of| **of != Speculation::AUTO && !of.is_typical());
    named.any(|of| by(*of))
}

/// Prepares the engine for heads that are right at these rates.
fn simulate(params: &mut EngineParams, rates: Vec<f32>) -> anyhow::Result<Acceptance> {
    let Some(DraftParams { heads: Some(heads), model, n_shared_text, calibration, .. }) =
        &mut params.drafts
    else {
        bail!("--acceptance: there are no heads; name a folder with --heads")
    };
    heads.n_heads = heads.n_heads.min(rates.len()); // others would never be right
    (*n_shared_text, *model) = (None, None); // only heads have rates
    let acceptance = Acceptance::new(rates).context("--acceptance: no rates from 0 to 1")?;
    *calibration = acceptance.calibration();
    Ok(acceptance)
}

/// What is compared; the first is what the others are compared with.
fn modes(args: &BenchArgs) -> Vec<Speculation> {
    let mut modes: Vec<Speculation> = vec![];
    for mode in &args.modes {
        if !modes.contains(mode) {
            modes.push(*mode);
        }
    }
    modes
}

async fn measure(
    args: &BenchArgs,
    handle: &Handle,
    recording: &Mutex<Recording>,
    prompts: &[Prompt],
) -> anyhow::Result<Report> {
    let (n_rates, n_heads) = (args.acceptance.as_ref().map_or(0, Vec::len), handle.n_heads);
    ensure!(n_rates <= n_heads, "acceptance is given for {n_rates} heads, but there are {n_heads}");
    // Every n-th of the file, so that all its parts are there.
    let n = args.n_prompts.min(prompts.len());
    let chosen: Vec<&Prompt> = (0..n).map(|i| &prompts[i * prompts.len() / n]).collect();
    let modes = modes(args);
    let mut report = Report {
        model: handle.model.name().unwrap_or_else(|| "unnamed model".into()),
        quantization: handle.model.quantization(),
        n_heads,
        draft_model: handle.draft_model.clone(),
        text_drafts: handle.drafts_text,
        simulated: args.acceptance.is_some(),
        acceptance: args.acceptance.clone(),
        threads: args.model.threads(),
        tree_nodes: args.tree_nodes,
        temperature: args.temperature,
        max_tokens: args.max_tokens,
        prompts: n,
        modes: modes.iter().map(|mode| mode.name()).collect(),
        by_parallel: BTreeMap::new(),
        hindsight: BTreeMap::new(),
        by_category: BTreeMap::new(),
        calibration: vec![],
    };
    let template = "{bar:40} {pos}/{len} prompts {elapsed}, {eta} left";
    let bar = bar(args.parallel.len() * args.rounds * n, template);
    ask_all(handle, [request(args, "Say hi.".into(), Speculation::AUTO)], 1).await?;
    for &parallel in &args.parallel {
        let all = report.by_parallel.entry(parallel).or_default();
        let mut recorded = BTreeMap::<_, Recording>::new();
        for round in 0..args.rounds {
            let mut of_round = Modes::new();
            let n_group = if parallel > 1 { parallel * QUEUE } else { 1 };
            for (i, group) in chosen.chunks(n_group).enumerate() {
                let category = group[0].category.as_deref().unwrap_or("all").to_owned();
                // Which mode goes first changes, since the next one finds a warmer machine.
                for k in 0..modes.len() {
                    let mode = modes[(round + i + k) % modes.len()];
                    let figures = run(args, handle, group, mode, parallel).await?;
                    if mode != Speculation::OFF {
                        let steps = std::mem::take(&mut *recording.lock());
                        recorded.entry(mode.name()).or_default().append(steps);
                    }
                    of_round.entry(mode.name()).or_default().add(&figures);
                    if parallel == 1 {
                        let of = report.by_category.entry(category.clone()).or_default();
                        of.entry(mode.name()).or_default().add(&figures);
                    }
                }
                bar.inc(group.len() as u64);
            }
            for (mode, figures) in of_round {
                let sum = all.entry(mode).or_default();
                sum.add(&figures);
                sum.speeds.push(figures.speed(parallel));
            }
        }
        let hindsight = recorded.iter().map(|(mode, steps)| (*mode, steps.hindsight()));
        report.hindsight.insert(parallel, hindsight.collect());
    }
    report.calibration = calibrated(&handle.stats.reliability());
    bar.finish_and_clear();
    Ok(report)
}

/// Each source, at all depths and at each, and all together.
fn calibrated(reliability: &Reliability) -> Vec<Calibrated> {
    let of = |sources: &[Source], depth| {
        let ranges = reliability.ranges(sources, depth);
        Calibrated {
            sources: sources.to_vec(),
            depth,
            verified: ranges.iter().map(|c| c.n).sum(),
            predicted: ranges.iter().map(|c| c.predicted).sum(),
            accepted: ranges.iter().map(|c| c.accepted).sum(),
            error: calibration_error(&ranges),
            ranges: ranges.to_vec(),
        }
    };
    let depths = || std::iter::once(None).chain((1..=N_DEPTHS).map(Some));
    let each = Source::ALL.iter().flat_map(|source| depths().map(|depth| of(&[*source], depth)));
    each.chain([of(&Source::ALL, None)]).filter(|c| c.verified > 0).collect()
}

async fn run(
    args: &BenchArgs,
    handle: &Handle,
    group: &[&Prompt],
    mode: Speculation,
    parallel: usize,
) -> anyhow::Result<Figures> {
    let started = Instant::now();
    let mut figures = Figures::default();
    let requests = group.iter().map(|prompt| request(args, prompt.prompt.clone(), mode));
    for done in ask_all(handle, requests, parallel).await? {
        figures.record(&done);
    }
    figures.wall_s = started.elapsed().as_secs_f64();
    Ok(figures)
}

fn request(args: &BenchArgs, prompt: request::Prompt, speculation: Speculation) -> Request {
    let temperature = args.temperature as f32;
    let sampling = SamplingParams { temperature, seed: 1, ..SamplingParams::default() };
    Request {
        sampling,
        cache_prompt: false,
        speculation,
        // Each prompt is asked several times: an answer must not be drafted from another mode's
        // answer to the same prompt.
        share_text: false,
        ..Request::new(prompt, args.max_tokens)
    }
}

/// The answers to requests, of which at most `parallel` run at the same time.
pub(super) async fn ask_all(
    handle: &Handle,
    requests: impl IntoIterator<Item = Request>,
    parallel: usize,
) -> anyhow::Result<Vec<Completion>> {
    let mut asked = requests.into_iter().map(|request| {
        let handle = handle.clone();
        async move {
            let answer = handle.submit(request, Caller::default()).await?;
            anyhow::Ok(answer.collect().await?.1)
        }
    });
    let mut running: JoinSet<_> = asked.by_ref().take(parallel).collect();
    let mut answers = vec![];
    while let Some(done) = running.join_next().await {
        answers.push(done??);
        if let Some(next) = asked.next() {
            running.spawn(next);
        }
    }
    Ok(answers)
}

fn print(report: &Report) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let Report { model, quantization, n_heads, threads, prompts, modes, .. } = report;
    let mut sources = format!("{n_heads} heads");
    if let Some(drafter) = &report.draft_model {
        sources += &format!(", draft model {drafter}");
    }
    if report.text_drafts {
        sources += ", text drafts";
    }
    writeln!(out, "{model} ({quantization}), {sources}, {threads} threads, {prompts} prompts")?;
    if let Some(rates) = &report.acceptance {
        writeln!(
            out,
            "simulated: heads are taken to be right at the rates {rates:?}; texts are meaningless"
        )?;
    }
    let base = modes[0];
    let title = format!("ratio to {base} (lowest to highest)");
    writeln!(
        out,
        "\nparallel   mode       tok/s   {title:>32}   tokens/step   candidates/step   accepted/drafted   batched/sequential"
    )?;
    for (parallel, figures) in &report.by_parallel {
        for name in modes {
            let own = &figures[name];
            // Against the same mode's requests one after the other.
            let alone = report
                .by_parallel
                .get(&1)
                .map(|one| format!("{:.2}", own.rate() / one[name].rate()));
            writeln!(
                out,
                "{parallel:8}   {name:8} {:7.1}   {:>32}   {:11.3}   {:15.2}   {:>16}   {:>18}",
                own.rate(),
                spread(own.ratios(&figures[base])),
                own.tokens_per_step(),
                own.candidates_per_step(),
                format!("{}/{}", own.accepted, own.drafted),
                alone.as_deref().unwrap_or("-"),
            )?;
        }
        if let [_, between @ .., last] = &modes[..] {
            for name in between {
                writeln!(
                    out,
                    "{:11}{last} / {name}: {}",
                    "",
                    spread(figures[last].ratios(&figures[name]))
                )?;
            }
        }
    }
    print_hindsight(&mut out, report)?;
    if !report.by_category.is_empty() {
        let columns: String = modes.iter().map(|name| format!("{name:>17}")).collect();
        writeln!(
            out,
            "\none stream: ratio of decoding speed, tokens per step\n{:28}{columns}",
            ""
        )?;
    }
    for (category, figures) in &report.by_category {
        let column = |name: &&str| {
            let own = &figures[*name];
            format!("{:9.3} {:7.2}", own.speed(1) / figures[base].speed(1), own.tokens_per_step())
        };
        writeln!(out, "{category:28}{}", modes.iter().map(column).collect::<String>())?;
    }
    writeln!(
        out,
        "\ncandidates by source and depth   verified  predicted   accepted   expected calibration error"
    )?;
    for c in &report.calibration {
        let sources = if c.sources.len() == 1 {
            format!("{:?}", c.sources[0]).to_lowercase()
        } else {
            "all".into()
        };
        let depth = match c.depth {
            None => "all depths".into(),
            Some(depth) if depth == N_DEPTHS => format!("{depth} and deeper"),
            Some(depth) => depth.to_string(),
        };
        let share = |x: f64| x / c.verified as f64;
        let (predicted, accepted) = (share(c.predicted), share(c.accepted as f64));
        writeln!(
            out,
            "{sources:6} {depth:24} {:10} {predicted:10.3} {accepted:10.3} {:28.3}",
            c.verified, c.error
        )?;
    }
    Ok(())
}

/// How far the choices were from those that would have been best.
fn print_hindsight(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    if report.hindsight.values().all(BTreeMap::is_empty) {
        return Ok(());
    }
    writeln!(
        out,
        "\nregret of what was verified, by predicted times: against estimates without error, and who knows what is right\nparallel   mode       tok/s   calibrated   regret   oracle"
    )?;
    for (parallel, modes) in &report.hindsight {
        for (name, hindsight) in modes {
            writeln!(
                out,
                "{parallel:8}   {name:8} {:7.1}   {:10.1}   {:5.1}%   {:6.1}",
                hindsight.chosen.per_second(),
                hindsight.calibrated.per_second(),
                100.0 * hindsight.regret(),
                hindsight.oracle.per_second(),
            )?;
        }
    }
    Ok(())
}

/// The median, and the lowest and highest.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let Some((first, last)) = values.first().zip(values.last()) else { return "-".into() };
    format!("{:.3} ({first:.3} to {last:.3})", values[values.len() / 2])
}
