//! Models and heads by their names: downloads them from the Hub, and shows that.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{HumanBytes, ProgressBar};

use super::shared::bar;
use crate::config::{DraftArgs, DraftFiles, HeadsSource, ModelArgs, ModelSource};
use crate::hub::{Hub, Snapshot, Step};
use crate::speculate::heads;

/// Time between lines of the log about a download.
const LOG_PERIOD: Duration = Duration::from_secs(10);
/// Whatever is in it, heads come with this file.
const HEADS_CONFIG: &str = "config.json";
/// The index of heads among a model's own tensors.
const INDEX: &str = "model.safetensors.index.json";

/// Says whether a download goes on.
pub(super) type GoesOn<'a> = &'a dyn Fn() -> bool;

/// The model's file: of several, the first, and the others are beside it.
pub(super) fn model(source: &ModelSource, goes_on: GoesOn<'_>) -> anyhow::Result<PathBuf> {
    let (name, file) = match source {
        ModelSource::File(path) => return Ok(path.clone()),
        ModelSource::Hub(name, file) => (name, file.as_deref()),
    };
    let hub = Hub::from_env()?;
    let snapshot = hub.open(&name.repo)?;
    let mut first = None;
    for file in snapshot.model_files(name, file)? {
        let path = one(&snapshot, &file, goes_on)?;
        first.get_or_insert(path);
    }
    first.context("a model has at least one file")
}

/// The file of the model that a command names.
pub(super) fn named_model(args: &ModelArgs) -> anyhow::Result<PathBuf> {
    model(&args.source()?, &|| true)
}

/// What a command names to draft with.
pub(super) fn named_drafts(args: &DraftArgs, of: &ModelArgs) -> anyhow::Result<DraftFiles> {
    drafts(args.source(of)?.as_ref(), args.model_source()?.as_ref(), &|| true)
}

/// The files of heads and a draft model.
pub(super) fn drafts(
    of_heads: Option<&HeadsSource>,
    of_model: Option<&ModelSource>,
    goes_on: GoesOn<'_>,
) -> anyhow::Result<DraftFiles> {
    Ok(DraftFiles {
        heads: of_heads.map(|source| heads(source, goes_on)).transpose()?,
        model: of_model.map(|source| model(source, goes_on)).transpose()?,
    })
}

/// The folder of heads.
fn heads(source: &HeadsSource, goes_on: GoesOn<'_>) -> anyhow::Result<PathBuf> {
    let repo = match source {
        HeadsSource::Folder(folder) => return Ok(folder.clone()),
        HeadsSource::Hub(repo) => repo,
    };
    let hub = Hub::from_env()?;
    let snapshot = hub.open(repo)?;
    let name = snapshot.first_of(&heads::FILES)?;
    if snapshot.has(HEADS_CONFIG) {
        one(&snapshot, HEADS_CONFIG, goes_on)?;
    }
    let path = one(&snapshot, name, goes_on)?;
    if name == INDEX {
        for shard in heads::shards(&path)? {
            let name = shard.file_name().unwrap_or_default().to_string_lossy().into_owned();
            one(&snapshot, &name, goes_on)?;
        }
    }
    Ok(snapshot.folder())
}

/// One file of a repository.
fn one(snapshot: &Snapshot<'_>, file: &str, goes_on: GoesOn<'_>) -> anyhow::Result<PathBuf> {
    let mut shown = Shown::new(file);
    let path = snapshot.file(file, &mut |step| {
        shown.show(step);
        goes_on()
    })?;
    shown.end();
    Ok(path)
}

/// What is shown of a download: a bar on a terminal, else a line of the log now and then. Nothing is
/// shown of a file that is here.
struct Shown<'a> {
    file: &'a str,
    bar: Option<ProgressBar>,
    logged: Option<Instant>,
    is_checking: bool,
}

impl<'a> Shown<'a> {
    fn new(file: &'a str) -> Self {
        Self { file, bar: None, logged: None, is_checking: false }
    }

    fn show(&mut self, step: Step) {
        if std::io::stderr().is_terminal() {
            self.draw(step);
        } else {
            self.log(step);
        }
    }

    fn draw(&mut self, step: Step) {
        let template = "{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
        let bar =
            self.bar.get_or_insert_with(|| bar(0, template).with_message(self.file.to_owned()));
        match step {
            Step::Arrived { bytes, of } => {
                bar.set_length(of);
                bar.set_position(bytes);
            }
            Step::Checking => bar.set_message(format!("checking {}", self.file)),
        }
    }

    fn log(&mut self, step: Step) {
        let file = self.file;
        match step {
            Step::Arrived { bytes, of } => {
                let since = self.logged.map(|logged| logged.elapsed());
                if since.is_none() {
                    let here = HumanBytes(bytes);
                    tracing::info!("downloading {file}, {}; {here} are here", HumanBytes(of));
                } else if since > Some(LOG_PERIOD) {
                    tracing::info!(
                        "downloaded {} of {} of {file}",
                        HumanBytes(bytes),
                        HumanBytes(of)
                    );
                } else {
                    return;
                }
                self.logged = Some(Instant::now());
            }
            Step::Checking if !self.is_checking => {
                self.is_checking = true;
                tracing::info!("all of {file} is here; computing its digest");
            }
            Step::Checking => {}
        }
    }

    fn end(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.logged.is_some() || self.is_checking {
            tracing::info!("{} is in the cache", self.file);
        }
    }
}
