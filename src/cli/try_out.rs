//! `medusa-llama try-out`: loads a model in a process of its own, where a file that crashes llama.cpp
//! ends nothing else; and the server's side of it.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use crate::config::TryOutArgs;
use crate::llama::{Context, ContextParams, Model, Placement, model_files};
use crate::models::Part;

/// Between two looks at the process.
const LOOK: Duration = Duration::from_millis(10);

/// Loads a file. A context tries out what it is made of.
pub(super) fn try_out(args: &TryOutArgs) -> anyhow::Result<()> {
    if args.outline {
        Model::outline(&args.file, &Placement::default())?;
        return Ok(());
    }
    let model = Arc::new(Model::load(&args.file, &Placement::default(), |_| true)?);
    Context::new(model, &ContextParams::of_one_sequence(64, 4, 1))?;
    Ok(())
}

/// What tells that files are those that were tried: bytes, and when they were written.
pub(super) type Stamp = Vec<(u64, Option<SystemTime>)>;

/// Of all files of a model.
pub(super) fn stamp(path: &Path) -> Result<Stamp, String> {
    let files = model_files(path).map_err(|error| error.to_string())?;
    let of = |file: &Path| {
        let data = file.metadata().map_err(|error| format!("{}: {error}", file.display()))?;
        Ok((data.len(), data.modified().ok()))
    };
    files.iter().map(|file| of(file)).collect()
}

/// Runs the command for a file.
///
/// # Errors
/// What the process said, or how it ended, or that it was not to go on.
pub(super) fn run(path: &Path, part: Part, goes_on: &dyn Fn() -> bool) -> Result<(), String> {
    let fail = |why: std::io::Error| format!("cannot try out {}: {why}", path.display());
    let program = std::env::current_exe().map_err(fail)?;
    let mut command = Command::new(program);
    command.arg("try-out").args((part == Part::Outline).then_some("--outline")).arg(path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(fail)?;
    let mut stderr = child.stderr.take().expect("it is piped");
    // Read as it comes: a process that has much to say would wait for that.
    let said = std::thread::spawn(move || {
        let mut said = Vec::new();
        stderr.read_to_end(&mut said).map(|_| said)
    });
    let status = loop {
        if let Some(status) = child.try_wait().map_err(fail)? {
            break status;
        }
        if !goes_on() {
            let _ = child.kill();
            let _ = child.wait();
            return Err("the server shuts down".into());
        }
        sleep(LOOK);
    };
    if status.success() {
        return Ok(());
    }
    let said = said.join().ok().and_then(Result::ok).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    // An error of ours, or a line of the log where llama.cpp aborted.
    let why = |line: &str| {
        ["error: ", "ERROR "].iter().find_map(|mark| line.split(mark).nth(1).map(str::to_owned))
    };
    let last = said.lines().rev().find_map(why);
    Err(last.unwrap_or_else(|| format!("{}: {}", path.display(), status)))
}
