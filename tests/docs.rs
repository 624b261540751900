//! The documentation follows the command line: `docs/configuration.md` is rendered from clap's
//! declarations (`MEDUSA_UPDATE_DOCS=1` rewrites it), and the commands in README and `docs/` parse.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory};
use medusa_llama::config::Args;

/// The rendered tables follow this line.
const MARK: &str = "<!-- Rendered from the command line by tests/docs.rs; do not edit below. -->\n";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_configuration_chapter_follows_the_command_line() {
    let path = root().join("docs/configuration.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (intro, _) = text.split_once(MARK).expect("the chapter has the mark");
    let expected = format!("{intro}{MARK}{}", render(Args::command()));
    if std::env::var_os("MEDUSA_UPDATE_DOCS").is_some() {
        std::fs::write(&path, expected).unwrap();
    } else {
        assert!(text == expected, "stale: run `MEDUSA_UPDATE_DOCS=1 cargo test --test docs`");
    }
}

#[test]
fn documented_commands_parse() {
    let chapters = std::fs::read_dir(root().join("docs")).unwrap().map(|e| e.unwrap().path());
    let chapters = chapters.filter(|path| path.extension().is_some_and(|e| e == "md"));
    let pages: Vec<PathBuf> = chapters.chain([root().join("README.md")]).collect();
    let mut n_commands = 0;
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for line in text
            .split("```sh\n")
            .skip(1)
            .flat_map(|block| block.split("```").next().unwrap_or_default().lines())
        {
            let words = words(line);
            let program = words.iter().position(|word| word.ends_with("medusa-llama"));
            // Before it there may be variables.
            let Some(at) = program.filter(|&at| words[..at].iter().all(|w| w.contains('='))) else {
                continue;
            };
            n_commands += 1;
            if let Err(error) = Args::read(words[at..].iter().map(Into::into)) {
                panic!("{}: {line}\n{error}", page.display());
            }
        }
    }
    assert!(n_commands >= 10, "{n_commands} commands were found");
}

#[test]
fn the_readme_is_short() {
    let n = std::fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(n <= 150, "README.md has {n} lines: what a stranger does not need first goes to docs/");
}

/// The words of a shell command, without its comment.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quoted) = (vec![String::new()], false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            '#' if !quoted && words.last().is_some_and(String::is_empty) => break,
            c => words.last_mut().expect("never empty").push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// A section with a table for each command. What `serve` has too is only named for the others.
fn render(mut program: Command) -> String {
    program.build();
    let mut out = String::new();
    for command in program.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set())
    {
        let name = command.get_name();
        let about = command.get_about().unwrap_or_default();
        write!(out, "\n## `medusa-llama {name}`\n\n{about}.\n").unwrap();
        let (shared, own): (Vec<_>, Vec<_>) = command
            .get_arguments()
            .filter(|arg| arg.get_id() != "help")
            .partition(|arg| name != "serve" && arg.get_env().is_some());
        if !shared.is_empty() {
            let flags: Vec<_> = shared.into_iter().map(flag).collect();
            writeln!(out, "As in `serve`: {}.", flags.join("; ")).unwrap();
        }
        out.push_str("\n| flag | variable | default | meaning |\n|---|---|---|---|\n");
        for arg in own {
            writeln!(out, "| {} |", row(arg).join(" | ")).unwrap();
        }
    }
    out
}

fn flag(arg: &Arg) -> String {
    let short = arg.get_short().map(|c| format!("`-{c}`"));
    let long = arg.get_long().map(|name| format!("`--{name}`"));
    let place = arg.get_value_names().filter(|_| arg.is_positional());
    let place = place.and_then(|names| names.first()).map(|name| format!("`{name}`"));
    let names: Vec<String> = [short, long, place].into_iter().flatten().collect();
    names.join(", ")
}

/// Flag, variable, default and meaning.
fn row(arg: &Arg) -> [String; 4] {
    let variable = arg.get_env().map(|name| format!("`{}`", name.display()));
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    // A default that depends on other values is part of the help.
    let (meaning, described) = match help.split_once(" [default: ") {
        Some((meaning, default)) => (meaning, default.trim_end_matches(']').to_owned()),
        None => (help.as_str(), String::new()),
    };
    let takes_values = arg.get_action().takes_values();
    let describe = |value: &clap::builder::PossibleValue| {
        Some(format!("`{}`: {}", value.get_name(), value.get_help()?))
    };
    let values = arg.get_possible_values();
    let values: Vec<_> = values.iter().filter(|_| takes_values).filter_map(describe).collect();
    let values =
        if values.is_empty() { String::new() } else { format!(" ({})", values.join("; ")) };
    let defaults = arg.get_default_values().iter().filter(|_| takes_values);
    let defaults: Vec<_> = defaults.map(|value| format!("`{}`", value.display())).collect();
    let default = if defaults.is_empty() { described } else { defaults.join(", ") };
    let cells = [flag(arg), variable.unwrap_or_default(), default, meaning.to_owned() + &values];
    cells.map(|cell| cell.replace('|', "\\|"))
}
