//! Arguments to configuration, and then the command they name.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use medusa_llama::cli;
use medusa_llama::config::{Args, Command, LogFormat, LogLevel};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    let in_json =
        matches!(&args.command, Command::Serve(args) if args.log_format == LogFormat::Json);
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if in_json => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Serve(args) => {
            match args.log_format {
                LogFormat::Text => log_to_stderr(args.model.log_level),
                LogFormat::Json => log_json(args.model.log_level),
            }
            cli::serve(args.check().map_err(|e| anyhow!(e))?)
        }
        Command::Generate(args) => {
            log_trouble(args.model.log_level);
            cli::generate(&args)
        }
        Command::Train(args) => {
            log_trouble(args.model.log_level);
            cli::train(&args)
        }
        Command::Bench(args) => {
            log_trouble(args.model.log_level);
            cli::bench(&args)
        }
        Command::Perplexity(args) => {
            log_trouble(args.model.log_level);
            cli::perplexity(&args)
        }
        Command::Tune(args) => {
            log_trouble(args.model.log_level);
            cli::tune(&args)
        }
        Command::Quantize(args) => {
            log_to_stderr(LogLevel::Warn);
            cli::quantize(&args)
        }
        Command::Synth(args) => {
            log_to_stderr(LogLevel::Error);
            cli::synth(&args)
        }
    }
}

/// Where the terminal is for a command's own output: only a level that was asked for shows more
/// than trouble.
fn log_trouble(level: LogLevel) {
    log_to_stderr(if level == LogLevel::Info { LogLevel::Warn } else { level });
}

fn log_to_stderr(level: LogLevel) {
    let colours = std::io::stderr().is_terminal();
    let filter = EnvFilter::new(level.as_str());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
}

/// A JSON object a line, whatever happens.
fn log_json(level: LogLevel) {
    let filter = EnvFilter::new(level.as_str());
    let lines = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false);
    lines.with_env_filter(filter).with_writer(std::io::stderr).init();
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
}
