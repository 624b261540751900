//! Parses the arguments, starts logging and runs the command.

use std::io::IsTerminal;
use std::process::ExitCode;

use medusa_llama::cli;
use medusa_llama::config::{Args, Command, LogFormat};
use tracing::Level;

fn main() -> ExitCode {
    let command = Args::read(std::env::args_os()).unwrap_or_else(|error| error.exit()).command;
    let in_json = matches!(&command, Command::Serve(args) if args.log_format == LogFormat::Json);
    if in_json {
        log_json(command.log_level())
    } else {
        log_text(command.log_level())
    }
    match cli::run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if in_json {
                tracing::error!("{error:#}")
            } else {
                eprintln!("error: {error:#}")
            }
            ExitCode::FAILURE
        }
    }
}

fn log_text(level: Level) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// One JSON object per line, also for panics.
fn log_json(level: Level) {
    let lines = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false);
    lines.with_max_level(level).with_writer(std::io::stderr).init();
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
}
