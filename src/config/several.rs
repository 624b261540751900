//! The part of `serve`'s table that is about several models: a folder or a list of them.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use clap::{Args as ClapArgs, CommandFactory as _, FromArgMatches as _, Parser};
use serde::Deserialize;
use toml::{Table, Value};

use super::engine::EngineArgs;
use super::values::between;
use super::{Args, Command};
use crate::files::model_name;
use crate::hub::pick::is_model;
use crate::models::ModelLimits;

/// Flags beside those of a model that are not its own.
const OF_SERVER: [&str; 2] = ["log-level", "numa"];

/// Flags about several models.
#[derive(Clone, Debug, ClapArgs)]
pub struct SeveralArgs {
    /// Folder with GGUF files, also in its subfolders: requests choose one by `model`, and it is loaded
    /// when one does [default: none]
    #[arg(long, env = "MODEL_DIR", alias = "models-dir")]
    pub model_dir: Option<PathBuf>,
    /// TOML file with a table [[model]] for each model, whose keys are flags of `serve` about models,
    /// such as `model`, `hf-repo`, `alias`, `ctx`, `heads` and `draft-model` [default: none]
    #[arg(long, env = "MODEL_LIST", value_name = "FILE.toml")]
    pub model_list: Option<PathBuf>,
    /// Most models of MODEL_DIR and MODEL_LIST that are loaded at a time. The one that was used longest
    /// ago is unloaded for another
    #[arg(long, env = "MODELS_MAX", default_value_t = 4, value_parser = between(1, 256))]
    pub models_max: usize,
    /// Memory of the host that loaded models may take together, in GiB [default: what is available at
    /// the start]
    #[arg(long, env = "MODEL_MEMORY", value_name = "GIB", value_parser = gib)]
    pub model_memory: Option<u64>,
}

/// The file of [`SeveralArgs::model_list`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    model: Vec<Table>,
}

/// What a table of the list may have.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Entry {
    #[command(flatten)]
    engine: EngineArgs,
}

impl SeveralArgs {
    /// What of it limits the models that are loaded.
    pub(super) fn limits(&self) -> ModelLimits {
        ModelLimits { n_loaded: self.models_max, memory: self.model_memory }
    }

    /// The models, each with the flags of `words`, a command line of `serve`, and its own, which take
    /// precedence. `None` if neither a folder nor a list is given.
    ///
    /// # Errors
    /// An unreadable folder or file, an invalid flag, no model, or two of one name.
    pub(super) fn models(&self, words: &[OsString]) -> anyhow::Result<Option<Vec<EngineArgs>>> {
        if self.model_dir.is_none() && self.model_list.is_none() {
            return Ok(None);
        }
        refuse_one(&with(words, &[])?)?;
        let mut models = Vec::new();
        if let Some(path) = &self.model_list {
            let fail = |why: &dyn Display| anyhow!("MODEL_LIST is {}: {why}", path.display());
            let text = std::fs::read_to_string(path).map_err(|error| fail(&error))?;
            let list: List = toml::from_str(&text).map_err(|error| fail(&error))?;
            for (i, table) in list.model.into_iter().enumerate() {
                let args = args_of(words, table).map_err(|why| {
                    fail(&format!("[[model]] number {} is invalid: {why:#}", i + 1))
                })?;
                models.push(args);
            }
        }
        if let Some(folder) = &self.model_dir {
            for path in files_in(folder)? {
                let name = path.strip_prefix(folder).unwrap_or(&path).with_file_name("");
                let alias = name.join(model_name(&path)).display().to_string();
                let own = [flag("model", path.as_os_str()), flag("alias", alias.as_ref())];
                models.push(with(words, &own)?);
            }
        }
        Ok(Some(models))
    }
}

/// Refuses what names one model, or belongs to one.
fn refuse_one(args: &EngineArgs) -> anyhow::Result<()> {
    let named = [
        ("MODEL_PATH", args.model.model_path.is_some()),
        ("HF_REPO", args.model.hf_repo.is_some()),
        ("HF_FILE", args.model.hf_file.is_some()),
        ("MODEL_ALIAS", args.alias.is_some()),
        ("MEDUSA_HEADS", args.drafts.are_named()),
        ("DRAFT_MODEL", args.drafts.model.is_some()),
        ("DRAFT_HF", args.drafts.hf.is_some()),
    ];
    match named.iter().find(|(_, is_named)| *is_named) {
        Some((name, _)) => bail!(
            "{name} is of one model, but MODEL_DIR or MODEL_LIST names several: leave it unset, or put it into MODEL_LIST"
        ),
        None => Ok(()),
    }
}

/// The flags of a model from a table of the list.
fn args_of(words: &[OsString], table: Table) -> anyhow::Result<EngineArgs> {
    let is_named = ["model", "hf-repo"].iter().any(|key| table.contains_key(*key));
    ensure!(is_named, "it needs `model`, a GGUF file, or `hf-repo`");
    let of_server = OF_SERVER.iter().find(|key| table.contains_key(**key));
    if let Some(key) = of_server {
        bail!("`{key}` is the whole server's");
    }
    let mut own = Vec::new();
    for (key, value) in table {
        match value {
            Value::Array(values) => {
                for value in &values {
                    own.extend(word(&key, value)?);
                }
            }
            value => own.extend(word(&key, &value)?),
        }
    }
    Entry::try_parse_from(&own).map_err(|error| first_line(&error))?;
    with(words, &own)
}

/// The word of a command line for a key and its value; none for a flag that is off.
fn word(key: &str, value: &Value) -> anyhow::Result<Option<OsString>> {
    match value {
        Value::Boolean(false) => Ok(None),
        Value::Boolean(true) => Ok(Some(format!("--{key}").into())),
        Value::String(text) => Ok(Some(flag(key, text.as_ref()))),
        Value::Integer(n) => Ok(Some(flag(key, n.to_string().as_ref()))),
        Value::Float(x) => Ok(Some(flag(key, x.to_string().as_ref()))),
        _ => bail!("`{key}` must be a text, a number, true or false, or a list of these"),
    }
}

fn flag(key: &str, value: &std::ffi::OsStr) -> OsString {
    let mut word = OsString::from(format!("--{key}="));
    word.push(value);
    word
}

/// The flags of `words` and then of `own`.
fn with(words: &[OsString], own: &[OsString]) -> anyhow::Result<EngineArgs> {
    let program = Args::command().mut_subcommand("serve", |serve| serve.args_override_self(true));
    let parsed = program.try_get_matches_from(words.iter().chain(own));
    let args = parsed.and_then(|matches| Args::from_arg_matches(&matches));
    match args.map_err(|error| first_line(&error))?.command {
        Command::Serve(serve) => Ok(serve.engine),
        _ => bail!("only `serve` has several models"),
    }
}

fn first_line(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).collect();
    anyhow!("{}", lines.join(" ").trim_start_matches("error: ").to_owned())
}

/// The models' files in a folder and its subfolders, of one in several files the first, in order.
fn files_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let read = |folder: &Path| -> anyhow::Result<Vec<PathBuf>> {
        let fail = || format!("MODEL_DIR is {}: it cannot be read", folder.display());
        let entries = std::fs::read_dir(folder).with_context(fail)?;
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().with_context(fail)
    };
    for path in read(folder)? {
        if path.is_dir() {
            found.extend(read(&path).unwrap_or_default());
        } else {
            found.push(path);
        }
    }
    found.retain(|path| is_model(&path.to_string_lossy()) && path.is_file());
    found.sort();
    ensure!(!found.is_empty(), "MODEL_DIR is {}: it has no GGUF files", folder.display());
    Ok(found)
}

/// Bytes from GiB, with fractions.
fn gib(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(n) if (0.01..=1e6).contains(&n) => Ok((n * f64::from(1 << 30)) as u64),
        _ => Err("must be a number of GiB from 0.01 to 1000000".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn models(extra: &[&str], list: &str) -> anyhow::Result<Vec<EngineArgs>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("models.toml");
        std::fs::write(&file, list).unwrap();
        let file = file.display().to_string();
        let all = ["medusa-llama", "serve", "--model-list", &file];
        let words = all.iter().chain(extra).map(Into::into);
        let Command::Serve(args) = Args::read(words)?.command else { unreachable!() };
        args.several.models(&args.words).map(|models| models.expect("a list was given"))
    }

    #[test]
    fn a_table_has_flags_that_take_precedence_over_the_command_lines() {
        let list = r#"
            [[model]]
            model = "a.gguf"
            ctx = 512
            [[model]]
            hf-repo = "u/r:Q8_0"
            alias = "b"
            batch-size = 3
        "#;
        let models = models(&["--ctx", "4096", "-b", "2", "--port", "0"], list).unwrap();
        let sizes: Vec<_> =
            models.iter().map(|args| (args.model.context_size, args.batch_size)).collect();
        assert_eq!(sizes, [(Some(512), 2), (Some(4096), 3)]);
        assert_eq!(models[0].check(&[]).unwrap().id, "a");
        assert_eq!(models[1].check(&[]).unwrap().id, "b");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused =
            |extra: &[&str], list: &str| format!("{:#}", models(extra, list).err().unwrap());
        let one = "[[model]]\nmodel = \"a.gguf\"\n";
        for (list, why) in [
            ("[[model]]\nctx = 512", "number 1 is invalid: it needs `model`"),
            ("[[model]]\nmodel = \"a\"\nport = 1", "'--port'"),
            ("[[model]]\nmodel = \"a\"\nctx = \"x\"", "MODEL_CONTEXT_SIZE"),
            ("[[model]]\nmodel = \"a\"\nlog-level = \"WARN\"", "`log-level`"),
            ("[models]\n", "models.toml"),
            ("model = ", "line 1"),
        ] {
            let text = refused(&[], list);
            assert!(text.contains("MODEL_LIST is ") && text.contains(why), "{text}");
        }
        assert!(refused(&["-m", "b.gguf"], one).contains("MODEL_PATH is of one model"));
        assert!(refused(&["--heads", "h"], one).contains("MEDUSA_HEADS is of one model"));
        models(&["--heads", "none"], one).unwrap();
    }

    #[test]
    fn a_folder_has_models_by_their_paths() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        std::fs::create_dir(dir.join("sub")).unwrap();
        for name in [
            "b.gguf",
            "mmproj-b.gguf",
            "notes.txt",
            "sub/a-00001-of-00002.gguf",
            "sub/a-00002-of-00002.gguf",
        ] {
            std::fs::write(dir.join(name), "").unwrap();
        }
        let words = ["medusa-llama", "serve", "--model-dir", &dir.display().to_string()];
        let Command::Serve(args) = Args::read(words.into_iter().map(Into::into)).unwrap().command
        else {
            unreachable!()
        };
        let models = args.several.models(&args.words).unwrap().unwrap();
        let names: Vec<_> = models.iter().map(|args| args.alias.clone().unwrap()).collect();
        assert_eq!(names, ["b", "sub/a"]);
    }
}
