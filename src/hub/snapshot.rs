//! A repository at one commit: as the Hub lists it, or as the cache has it.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::Api;
use hf_hub::{CacheRepo, Repo};
use serde::Deserialize;

use super::download::{self, Wanted};
use super::error::HubError;
use super::name::{ModelName, RepoName};
use super::transfer::Step;
use super::{Hub, pick};

/// Most time to connect to the Hub, and to get a list of files. Where it takes longer, the cache
/// is asked.
const CONNECTING: Duration = Duration::from_secs(10);
const LISTING: Duration = Duration::from_secs(30);

/// The branch that a name means.
const BRANCH: &str = "main";

/// A repository at one commit.
pub struct Snapshot<'a> {
    hub: &'a Hub,
    repo: RepoName,
    commit: String,
    files: Vec<Listed>,
    /// Why this is what the cache has; `None`: it is what the Hub has.
    cached_for: Option<String>,
}

/// A file of a repository.
struct Listed {
    /// In the repository.
    path: String,
    n_bytes: Option<u64>,
    /// Of files in Git LFS, which all large ones are.
    sha256: Option<String>,
}

/// The Hub's list of a repository's files.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// Why there is no list.
enum NoList {
    /// The Hub cannot be asked at the moment.
    Unreachable(String),
    Error(HubError),
}

impl<'a> Snapshot<'a> {
    pub(super) fn open(hub: &'a Hub, repo: &RepoName) -> Result<Self, HubError> {
        let Some(api) = &hub.api else {
            tracing::info!("HF_HUB_OFFLINE is set: {repo} is taken from the cache");
            return Self::cached(hub, repo, "HF_HUB_OFFLINE is set".into());
        };
        match list(hub, api, repo) {
            Ok(info) => Self::listed(hub, repo, info),
            Err(NoList::Error(error)) => Err(error),
            Err(NoList::Unreachable(why)) => {
                let why = format!("the Hub ({}) cannot be reached: {why}", hub.endpoint);
                let cached = Self::cached(hub, repo, why.clone())?;
                tracing::warn!("{why}; {repo} is taken from the cache");
                Ok(cached)
            }
        }
    }

    fn listed(hub: &'a Hub, repo: &RepoName, info: Info) -> Result<Self, HubError> {
        let Info { sha: commit, siblings } = info;
        if !is_hex(&commit, 40) {
            let reason = format!("{commit:.80} is no commit");
            return Err(HubError::Answer { repo: repo.to_string(), reason });
        }
        let files = siblings.into_iter().filter(|file| is_inside(&file.rfilename));
        let listed = |file: Sibling| {
            let sha256 = file.lfs.map(|lfs| lfs.sha256.to_ascii_lowercase());
            if let Some(wrong) = sha256.as_ref().filter(|digest| !is_hex(digest, 64)) {
                let reason = format!("{}: {wrong:.80} is no SHA-256", file.rfilename);
                return Err(HubError::Answer { repo: repo.to_string(), reason });
            }
            Ok(Listed { path: file.rfilename, n_bytes: file.size, sha256 })
        };
        let files = files.map(listed).collect::<Result<_, _>>()?;
        Ok(Self { hub, repo: repo.clone(), commit, files, cached_for: None })
    }

    fn cached(hub: &'a Hub, repo: &RepoName, why: String) -> Result<Self, HubError> {
        let named = hub.cache.path().join(as_model(repo).folder_name()).join("refs").join(BRANCH);
        let commit = std::fs::read_to_string(named).unwrap_or_default().trim().to_owned();
        let mut files = vec![];
        if is_hex(&commit, 40) {
            let folder = hub.cache.repo(as_model(repo)).pointer_path(&commit);
            find_files(&folder, "", &mut files);
        }
        files.sort();
        let file = |path| Listed { path, n_bytes: None, sha256: None };
        let files: Vec<_> = files.into_iter().map(file).collect();
        let snapshot = Self { hub, repo: repo.clone(), commit, files, cached_for: Some(why) };
        if snapshot.files.is_empty() {
            return Err(snapshot.not_cached(repo.as_str()));
        }
        Ok(snapshot)
    }

    /// The folder that its files are in, once they were asked for.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.cache_repo().pointer_path(&self.commit)
    }

    /// Whether it has a file.
    #[must_use]
    pub fn has(&self, path: &str) -> bool {
        self.files.iter().any(|file| file.path == path)
    }

    /// The files of the model that a name means, as [`pick::model_files`].
    ///
    /// # Errors
    /// [`HubError::NoFile`], or [`HubError::Unreachable`] if the cache has no such model and the
    /// Hub cannot be asked.
    pub fn model_files(
        &self,
        name: &ModelName,
        file: Option<&str>,
    ) -> Result<Vec<String>, HubError> {
        let what = || file.map_or(name.to_string(), |file| format!("{}/{file}", self.repo));
        pick::model_files(&self.paths(), name, file)
            .map_err(|error| self.unless_cached(error, what))
    }

    /// The first of these names that it has.
    ///
    /// # Errors
    /// As [`model_files`](Self::model_files).
    pub fn first_of<'n>(&self, names: &[&'n str]) -> Result<&'n str, HubError> {
        let found = pick::first_of(&self.paths(), &self.repo, names);
        found.map_err(|error| self.unless_cached(error, || self.repo.to_string()))
    }

    /// A file of the repository, downloaded unless the cache has it. `watch` learns what happens,
    /// several times a second, and stops it by returning `false`; the next attempt then goes on
    /// where this one stopped.
    ///
    /// # Errors
    /// [`HubError`]: refused, failed, damaged, stopped, or no place for it.
    pub fn file(
        &self,
        path: &str,
        watch: &mut dyn FnMut(Step) -> bool,
    ) -> Result<PathBuf, HubError> {
        let what = || format!("{}/{path}", self.repo);
        let place = self.folder().join(path);
        let Some(listed) = self.files.iter().find(|file| file.path == path) else {
            let reason = format!("it has no file {path}");
            return Err(
                self.unless_cached(HubError::NoFile { repo: self.repo.to_string(), reason }, what)
            );
        };
        let n_bytes = std::fs::metadata(&place).map(|found| found.len()).ok();
        let is_here = n_bytes.is_some_and(|n| listed.n_bytes.is_none_or(|expected| n == expected));
        match &self.hub.api {
            _ if is_here => {}
            Some(api) if self.cached_for.is_none() => {
                let wanted = Wanted {
                    api,
                    cache: self.cache_repo(),
                    endpoint: &self.hub.endpoint,
                    has_token: self.hub.has_token,
                    repo: &self.repo,
                    path,
                    n_bytes: listed.n_bytes,
                    sha256: listed.sha256.as_deref(),
                    place: &place,
                };
                download::download(&wanted, watch)?;
            }
            _ => return Err(self.not_cached(&what())),
        }
        if self.cached_for.is_none() {
            // What is used without network. A cache that cannot be written has what it has.
            let _ = self.cache_repo().create_ref(&self.commit);
        }
        Ok(place)
    }

    fn cache_repo(&self) -> CacheRepo {
        self.hub.cache.repo(as_model(&self.repo))
    }

    fn paths(&self) -> Vec<&str> {
        self.files.iter().map(|file| file.path.as_str()).collect()
    }

    /// The error, unless the reason is that the cache has only a part of the repository.
    fn unless_cached(&self, error: HubError, what: impl Fn() -> String) -> HubError {
        if self.cached_for.is_some() { self.not_cached(&what()) } else { error }
    }

    fn not_cached(&self, what: &str) -> HubError {
        HubError::Unreachable {
            what: what.to_owned(),
            why: self.cached_for.clone().unwrap_or_default(),
            cache: self.hub.cache.path().clone(),
        }
    }
}

/// Asks the Hub.
fn list(hub: &Hub, api: &Api, repo: &RepoName) -> Result<Info, NoList> {
    let request = api
        .model(repo.to_string())
        .info_request()
        .query("blobs", "true") // with sizes and digests
        .config()
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECTING))
        .timeout_global(Some(LISTING))
        .build();
    let unreachable = |error: ureq::Error| NoList::Unreachable(error.to_string());
    let mut response = request.call().map_err(unreachable)?;
    match response.status().as_u16() {
        200 => {}
        status @ (401 | 403 | 404) => {
            return Err(NoList::Error(HubError::Refused {
                what: repo.to_string(),
                endpoint: hub.endpoint.clone(),
                status,
                has_token: hub.has_token,
            }));
        }
        status => return Err(NoList::Unreachable(format!("it answered {status}"))),
    }
    let text = response.body_mut().read_to_string().map_err(unreachable)?;
    serde_json::from_str(&text).map_err(|error| {
        let (repo, reason) = (repo.to_string(), error.to_string());
        NoList::Error(HubError::Answer { repo, reason })
    })
}

fn as_model(repo: &RepoName) -> Repo {
    Repo::model(repo.to_string()) // at its branch `main`
}

/// Adds the paths of all files below a folder that are there as a whole: a link may lead to a file
/// that was removed.
fn find_files(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        if path.is_file() {
            files.push(name);
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find_files(&path, &format!("{name}/"), files);
        }
    }
}

/// A relative path that leads nowhere else.
fn is_inside(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    !path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn is_hex(text: &str, n: usize) -> bool {
    text.len() == n && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        for path in ["a.gguf", "x/y/a.gguf"] {
            assert!(is_inside(path), "{path}");
        }
        for path in ["", "/etc/passwd", "../a", "x/../../a", "./a"] {
            assert!(!is_inside(path), "{path}");
        }
    }
}
