//! Where a model and its heads come from: a path, or a name on the Hub.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};

use super::{DEFAULT_HEADS, DEFAULT_MODEL, DraftArgs, ModelArgs};
use crate::files::model_name;
use crate::hub::name::{ModelName, RepoName};

/// Value of MEDUSA_HEADS that turns heads off.
const NO_HEADS: &str = "none";
/// What MEDUSA_HEADS begins with if it is the name of a repository.
const ON_HUB: &str = "hf:";

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ModelSource {
    /// A GGUF file.
    File(PathBuf),
    /// A model on the Hub, and the path of its file there if it was named.
    Hub(ModelName, Option<String>),
}

impl ModelSource {
    /// What clients call the model if nobody gave it another name.
    pub(crate) fn id(&self) -> String {
        match self {
            Self::File(path) => model_name(path),
            Self::Hub(name, _) => name.to_string(),
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Hub(name, None) => name.fmt(f),
            Self::Hub(name, Some(file)) => write!(f, "{}/{file}", name.repo),
        }
    }
}

/// Where heads come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HeadsSource {
    /// A folder.
    Folder(PathBuf),
    /// A repository on the Hub.
    Hub(RepoName),
}

impl ModelArgs {
    /// The model that was named, or else the default one.
    pub(crate) fn source(&self) -> anyhow::Result<ModelSource> {
        match (&self.model_path, &self.hf_repo) {
            (Some(path), Some(name)) => bail!(
                "MODEL_PATH is {} and HF_REPO is {name}: give a file with -m or a name with -hf, not both",
                path.display()
            ),
            (_, Some(name)) => Ok(ModelSource::Hub(name.clone(), self.hf_file.clone())),
            (_, None) if self.hf_file.is_some() => {
                bail!("HF_FILE is given, but not the repository that has it: give -hf user/repo")
            }
            (Some(path), None) if path.as_os_str().is_empty() => {
                bail!("MODEL_PATH is empty: name a GGUF file, or leave it unset")
            }
            (Some(path), None) => Ok(ModelSource::File(path.clone())),
            (None, None) if Path::new(DEFAULT_MODEL).is_file() => {
                Ok(ModelSource::File(DEFAULT_MODEL.into()))
            }
            (None, None) => bail!(
                "MODEL_PATH is not set and {DEFAULT_MODEL} is missing: run `make model`, or name a GGUF file with -m or a model on the Hub with -hf"
            ),
        }
    }
}

impl DraftArgs {
    /// The heads that were named, unless that is `none`, or those that ship for the default model;
    /// if they fit its adapters.
    pub(crate) fn source(&self, model: &ModelArgs) -> anyhow::Result<Option<HeadsSource>> {
        let heads = self.any_source(model)?;
        Ok(heads.and_then(|heads| model.fitting(heads, self.are_named())))
    }

    fn any_source(&self, model: &ModelArgs) -> anyhow::Result<Option<HeadsSource>> {
        let Some(named) = &self.folder else {
            let is_default = model.model_path.is_none() && model.hf_repo.is_none();
            let shipped = Some(Path::new(DEFAULT_HEADS)).filter(|f| is_default && f.is_dir());
            return Ok(shipped.map(|folder| HeadsSource::Folder(folder.to_owned())));
        };
        if !self.are_named() {
            return Ok(None);
        }
        match named.to_str().and_then(|named| named.strip_prefix(ON_HUB)) {
            Some(repo) => match repo.parse() {
                Ok(repo) => Ok(Some(HeadsSource::Hub(repo))),
                Err(why) => Err(anyhow!("MEDUSA_HEADS is {ON_HUB}{repo}; after {ON_HUB} it {why}")),
            },
            None => Ok(Some(HeadsSource::Folder(named.clone()))),
        }
    }

    /// The draft model, if one was named.
    pub(crate) fn model_source(&self) -> anyhow::Result<Option<ModelSource>> {
        match (&self.model, &self.hf) {
            (Some(path), Some(name)) => bail!(
                "DRAFT_MODEL is {} and DRAFT_HF is {name}: give a file or a name, not both",
                path.display()
            ),
            (_, Some(name)) => Ok(Some(ModelSource::Hub(name.clone(), None))),
            (path, None) => Ok(path.clone().map(ModelSource::File)),
        }
    }

    /// Whether heads were named.
    pub(super) fn are_named(&self) -> bool {
        self.folder.as_deref().is_some_and(|folder| folder.as_os_str() != NO_HEADS)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Args, Command, ServeArgs};
    use super::*;

    fn serve(args: &[&str]) -> ServeArgs {
        let all = ["medusa-llama", "serve"].iter().chain(args).map(Into::into);
        match Args::read(all).unwrap().command {
            Command::Serve(args) => *args,
            _ => unreachable!("`serve` was given"),
        }
    }

    #[test]
    fn a_draft_model_is_a_file_or_a_name() {
        let source = |args: &[&str]| {
            serve(args).engine.drafts.model_source().map_err(|error| error.to_string())
        };
        assert_eq!(source(&[]), Ok(None));
        for flag in ["-md", "--draft-model", "--model-draft"] {
            assert_eq!(source(&[flag, "a.gguf"]), Ok(Some(ModelSource::File("a.gguf".into()))));
        }
        for flag in ["-hfd", "--draft-hf", "--hf-repo-draft"] {
            let named = ModelSource::Hub("a/b:Q8_0".parse().unwrap(), None);
            assert_eq!(source(&[flag, "a/b:Q8_0"]), Ok(Some(named)));
        }
        assert!(source(&["-md", "a.gguf", "-hfd", "a/b"]).unwrap_err().contains("not both"));
    }

    #[test]
    fn a_model_is_named_by_its_repository_as_in_llama_server() {
        for flag in ["-hf", "-hfr", "--hf-repo"] {
            let args = serve(&[flag, "a/b:Q8_0", "-hff", "x/y.gguf"]);
            let source = args.engine.model.source().unwrap();
            assert_eq!(
                source,
                ModelSource::Hub("a/b:Q8_0".parse().unwrap(), Some("x/y.gguf".into()))
            );
            assert_eq!(
                (source.id(), source.to_string()),
                ("a/b:Q8_0".into(), "a/b/x/y.gguf".into())
            );
            assert_eq!(
                args.engine.drafts.source(&args.engine.model).unwrap(),
                None,
                "heads of the default model"
            );
        }
    }

    #[test]
    fn a_model_has_one_name() {
        let refused = |args: &[&str]| serve(args).engine.model.source().unwrap_err().to_string();
        assert!(refused(&["-m", "x.gguf", "-hf", "a/b"]).contains("not both"));
        assert!(refused(&["-m", "x.gguf", "--hf-file", "y"]).contains("HF_FILE"));
    }

    #[test]
    fn heads_are_a_folder_or_a_repository() {
        let heads = |name: &str| {
            let args = serve(&["-m", "x.gguf", "--heads", name]);
            args.engine.drafts.source(&args.engine.model)
        };
        assert_eq!(heads("none").unwrap(), None);
        assert_eq!(heads("a/b").unwrap(), Some(HeadsSource::Folder("a/b".into())));
        assert_eq!(heads("hf:a/b").unwrap(), Some(HeadsSource::Hub("a/b".parse().unwrap())));
        let error = heads("hf:b").unwrap_err().to_string();
        assert!(error.contains("MEDUSA_HEADS is hf:b") && error.contains("user/repo"), "{error}");
    }
}
