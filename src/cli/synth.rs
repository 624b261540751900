//! `medusa-llama synth`: a model of random weights in the shape of a known one, and heads for it.

use std::path::Path;
use std::time::Instant;

use anyhow::bail;
use clap::ValueEnum as _;

use super::shared::bar;
use crate::config::SynthArgs;
use crate::synth::{self, heads};
use crate::train::kind::HeadKind;

/// Writes the files; each appears under its name when it is whole.
pub(super) fn synth(args: &SynthArgs) -> anyhow::Result<()> {
    let kinds = HeadKind::value_variants();
    let of_heads =
        args.heads.iter().flat_map(|folder| kinds.iter().map(move |kind| kind.file(folder)));
    let there = of_heads.chain([args.output.clone()]).filter(|path| path.exists());
    for path in there.collect::<Vec<_>>() {
        if !args.force {
            bail!("{} is there already: remove it, or give --force", path.display());
        }
        // A server might load other heads of the folder instead of these.
        std::fs::remove_file(path)?;
    }
    let started = Instant::now();
    let bar = bar(0, "{bar:40} {bytes}/{total_bytes} {eta}");
    synth::model(&args.output, &args.like, args.quantization, args.seed, &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let n_bytes = std::fs::metadata(&args.output)?.len();
    let what = format!("like {}, {}", args.like.name, args.quantization.name);
    report(&args.output, &what, n_bytes, started);

    let Some(folder) = &args.heads else { return Ok(()) };
    let started = Instant::now();
    let spec =
        heads::Spec { shape: &args.like, kind: args.kind, n_heads: args.n_heads, seed: args.seed };
    let n_bytes = heads::write(folder, spec)?;
    report(folder, &format!("{} heads", args.n_heads), n_bytes, started);
    Ok(())
}

fn report(path: &Path, what: &str, n_bytes: u64, started: Instant) {
    let mib = n_bytes as f64 / f64::from(1 << 20);
    println!(
        "{}: {what}, {mib:.1} MiB in {:.1} s",
        path.display(),
        started.elapsed().as_secs_f64()
    );
}
