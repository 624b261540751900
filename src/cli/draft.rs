//! `medusa-llama draft`: a draft model made of a model itself, and what it brings.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{anyhow, bail, ensure};

use super::bench::ask_all;
use super::fetch;
use crate::config::MakeDraftArgs;
use crate::engine::EngineParams;
use crate::engine::drafts::{DraftModelParams, DraftParams};
use crate::engine::{self, Handle};
use crate::files::write_whole;
use crate::llama::{self, Model, Placement, Quantization};
use crate::request::{Request, SamplingParams, Speculation};
use crate::train::prompts::{self, Prompt};

/// What most models are asked now and then.
const PROMPTS: [&str; 8] = [
    "Explain how a rainbow forms to a curious child.",
    "Write a Python function that returns the prime numbers below n.",
    "Summarize the causes of the First World War in five sentences.",
    "A train travels 180 km in 2 hours. How long does it take for 450 km at the same speed? Explain each step.",
    "Write a polite e-mail that asks a landlord to repair the heating.",
    "List the advantages and disadvantages of working from home.",
    "Translate into French: The library opens at nine, and the children are already waiting.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
];
/// Tokens that the draft model drafts at most.
const MAX_DEPTH: usize = 16;
/// Rounds in which the model is timed with the draft model and without.
const ROUNDS: usize = 3;

/// Writes the file, which appears under its name when it is whole, and measures it.
pub(super) fn draft(args: &MakeDraftArgs) -> anyhow::Result<()> {
    let output = &args.output;
    if output.exists() && !args.force {
        bail!("{} is there already: remove it, or give --force", output.display());
    }
    let mut chosen = match &args.prompts {
        Some(path) => prompts::read(path)?,
        None => PROMPTS.map(|text| Prompt::of(text.into())).into(),
    };
    chosen.truncate(args.n_prompts);
    let input = fetch::named_model(&args.model)?;
    let model = Model::outline(&input, &Placement::default())?;
    prompts::render(&mut chosen, &model, args.system.as_deref())?;
    make(args, &input, &model)?;
    drop(model);

    let (fixed, free) = (Some(1), None);
    let share = measured(args, &input, fixed, async |handle| right(args, handle, &chosen).await)?;
    println!("It is right about {:.0}% of the tokens that the model chooses.", 100.0 * share);
    let ratios = measured(args, &input, free, async |handle| timed(args, handle, &chosen).await)?;
    let [least, median, most] = ratios;
    println!(
        "One stream: {median:.2} times as fast as without it ({least:.2} to {most:.2}), {} prompts, up to {} tokens each, greedy.",
        chosen.len(),
        args.max_tokens
    );
    if median > 1.02 {
        println!("Use it: medusa-llama serve -m {} -md {}", input.display(), output.display());
    } else {
        println!(
            "It brings nothing here. A smaller one may: fewer --layers, another --type, or a published model of the same family."
        );
    }
    Ok(())
}

fn make(args: &MakeDraftArgs, input: &Path, model: &Model) -> anyhow::Result<()> {
    let n_all = model.n_layers();
    let n_kept = args.layers.unwrap_or(n_all);
    ensure!(n_kept <= n_all, "--layers is {n_kept}, but the model has {n_all}");
    let by_default = || args.layers.is_none().then(|| Quantization::by_name("Q2_K")).flatten();
    let kind = args.kind.or_else(by_default);
    let n_threads = args.model.threads();
    write_whole(&args.output, |part| {
        anyhow::Ok(llama::convert(input, part, kind, n_kept..n_all, n_threads)?)
    })?;
    let mib = |path| anyhow::Ok(llama::model_bytes(path)? as f64 / f64::from(1 << 20));
    let (name, kept) = (args.output.display(), model_kind(&args.output)?);
    println!(
        "{name}: {n_kept} of {n_all} layers, {kept}, {:.1} MiB (the model has {:.1})",
        mib(&args.output)?,
        mib(input)?
    );
    Ok(())
}

fn model_kind(path: &Path) -> anyhow::Result<String> {
    Ok(Model::outline(path, &Placement::default())?.quantization())
}

/// What `measure` finds with an engine that has the draft model, which verifies `fixed_nodes` tokens in
/// each step, or those that pay.
fn measured<R>(
    args: &MakeDraftArgs,
    input: &Path,
    fixed_nodes: Option<usize>,
    measure: impl AsyncFnOnce(&Handle) -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let params = args.model.engine(PathBuf::from(input), 1)?;
    let model = DraftModelParams {
        path: args.output.clone(),
        placement: params.placement.clone(),
        n_cells: None,
        max_depth: if fixed_nodes.is_some() { 1 } else { MAX_DEPTH },
    };
    let drafts = DraftParams { model: Some(model), fixed_nodes, ..DraftParams::default() };
    let engine = engine::spawn(EngineParams { drafts: Some(drafts), ..params });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let handle = engine.ready().await.map_err(|why| anyhow!(why))?;
        measure(&handle).await
    });
    engine.stop();
    result
}

fn request(args: &MakeDraftArgs, prompt: &Prompt, speculation: Speculation) -> Request {
    Request {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        cache_prompt: false,
        speculation,
        ..Request::new(prompt.prompt.clone(), args.max_tokens)
    }
}

/// The share of drafted tokens, one in each step, that are right.
async fn right(args: &MakeDraftArgs, handle: &Handle, chosen: &[Prompt]) -> anyhow::Result<f64> {
    let (mut drafted, mut accepted) = (0, 0);
    for prompt in chosen {
        for done in ask_all(handle, [request(args, prompt, Speculation::MODEL)], 1).await? {
            drafted += done.speculation.drafted;
            accepted += done.speculation.accepted;
        }
    }
    Ok(accepted as f64 / (drafted as f64).max(1.0))
}

/// How many times as fast answers come with the draft model: the lowest, median and highest of some
/// rounds, of which a first one is not counted.
async fn timed(
    args: &MakeDraftArgs,
    handle: &Handle,
    chosen: &[Prompt],
) -> anyhow::Result<[f64; 3]> {
    let mut ratios = vec![];
    for round in 0..=ROUNDS {
        let mut seconds = [0.0; 2];
        for (i, prompt) in chosen.iter().enumerate() {
            let modes = [Speculation::OFF, Speculation::MODEL];
            // Which goes first changes, since the next one finds a warmer machine.
            for k in [(i + round) % 2, (i + round + 1) % 2] {
                let started = Instant::now();
                ask_all(handle, [request(args, prompt, modes[k])], 1).await?;
                seconds[k] += started.elapsed().as_secs_f64();
            }
        }
        if round > 0 {
            ratios.push(seconds[0] / seconds[1]);
        }
    }
    ratios.sort_by(f64::total_cmp);
    Ok([ratios[0], ratios[ROUNDS / 2], ratios[ROUNDS - 1]])
}
