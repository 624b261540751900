//! `medusa-llama quantize`: a GGUF file in another quantization.

use std::path::Path;

use anyhow::{Context, bail};

use crate::config::QuantizeArgs;
use crate::llama::{self, Quantization};

/// Writes the file; it appears under its name when it is whole.
///
/// # Errors
/// When the input cannot be read or quantized, or the output cannot be written.
pub fn quantize(args: &QuantizeArgs) -> anyhow::Result<()> {
    let (input, output) = (&args.input, &args.output);
    if output.exists() && !args.force {
        bail!("{} is there already: remove it, or give --force", output.display());
    }
    write(input, output, args.kind, args.n_threads)?;
    let mib =
        |path: &Path| std::fs::metadata(path).map_or(0.0, |m| m.len() as f64 / f64::from(1 << 20));
    println!(
        "{}: {}, {:.1} MiB (was {:.1})",
        output.display(),
        args.kind.name(),
        mib(output),
        mib(input)
    );
    Ok(())
}

/// Writes the file under another name, which it has until it is whole.
pub(super) fn write(
    input: &Path,
    output: &Path,
    kind: Quantization,
    n_threads: usize,
) -> anyhow::Result<()> {
    let mut part = output.to_owned().into_os_string();
    part.push(".part");
    let written = llama::quantize(input, part.as_ref(), kind, n_threads)
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            std::fs::rename(&part, output)
                .with_context(|| format!("cannot write {}", output.display()))
        });
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}
