//! `medusa-llama quantize`: a GGUF file in another quantization.

use std::path::Path;

use anyhow::bail;

use crate::config::QuantizeArgs;
use crate::files::write_whole;
use crate::llama::{self, LlamaError, Quantization};

/// Writes the file; it appears under its name when it is whole.
pub(super) fn quantize(args: &QuantizeArgs) -> anyhow::Result<()> {
    let (input, output) = (&args.input, &args.output);
    if output.exists() && !args.force {
        bail!("{} is there already: remove it, or give --force", output.display());
    }
    write(input, output, args.kind, args.n_threads)?;
    let mib = |path| Ok::<_, LlamaError>(llama::model_bytes(path)? as f64 / f64::from(1 << 20));
    let (name, kind, from, to) = (output.display(), args.kind.name, mib(input)?, mib(output)?);
    println!("{name}: {kind}, {to:.1} MiB (was {from:.1})");
    Ok(())
}

/// Quantizes a file; the output appears under its name when it is whole.
pub(super) fn write(
    input: &Path,
    output: &Path,
    kind: Quantization,
    n_threads: usize,
) -> anyhow::Result<()> {
    write_whole(output, |part| Ok(llama::quantize(input, part, kind, n_threads)?))
}
