//! `medusa-llama synth`: a model of random weights in a known one's shape, and heads for it.

use std::path::Path;
use std::time::Instant;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::{HeadKind, SynthArgs};
use crate::synth::{self, heads};

/// Writes the files; each appears under its name when it is whole.
///
/// # Errors
/// When a file is there already, or cannot be written.
pub fn synth(args: &SynthArgs) -> anyhow::Result<()> {
    let of_heads = |folder: &Path| {
        [HeadKind::Medusa, HeadKind::Conditioned].map(|kind| heads::file(folder, kind))
    };
    let there = args
        .heads
        .as_deref()
        .into_iter()
        .flat_map(of_heads)
        .chain([args.output.clone()])
        .filter(|p| p.exists());
    for path in there.collect::<Vec<_>>() {
        if !args.force {
            bail!("{} is there already: remove it, or give --force", path.display());
        }
        // Other heads in the folder might be taken for these.
        std::fs::remove_file(path)?;
    }
    let started = Instant::now();
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {eta}")
            .expect("a valid template"),
    );
    synth::model(&args.output, &args.like, args.quantization, args.seed, &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let n_bytes = std::fs::metadata(&args.output)?.len();
    let what = format!("like {}, {}", args.like.name, args.quantization.name());
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
