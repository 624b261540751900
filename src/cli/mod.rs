//! The commands.

mod bench;
mod draft;
mod fetch;
mod generate;
mod perplexity;
mod quantize;
mod rows;
mod serve;
mod shared;
mod synth;
mod train;
mod try_out;
mod tune;
mod worker;

use crate::config::Command;
use crate::llama::use_numa;

/// Runs a command to its end.
///
/// # Errors
/// One line that says what cannot be read, written, loaded or bound, or which argument is invalid.
pub fn run(command: Command) -> anyhow::Result<()> {
    command.numa().into_iter().for_each(use_numa);
    match command {
        Command::Serve(args) => serve::serve(args.check()?),
        Command::Worker(args) => worker::worker(&args),
        Command::Generate(args) => generate::generate(&args),
        Command::Train(args) => train::train(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Rows(args) => rows::rows(&args),
        Command::Draft(args) => draft::draft(&args),
        Command::Perplexity(args) => perplexity::perplexity(&args),
        Command::Tune(args) => tune::tune(&args),
        Command::Quantize(args) => quantize::quantize(&args),
        Command::Synth(args) => synth::synth(&args),
        Command::TryOut(args) => try_out::try_out(&args),
    }
}
