//! Models and heads by their names on the Hugging Face Hub.
//!
//! The `hf-hub` crate speaks the Hub's API, resumes downloads, and keeps files where
//! `huggingface_hub`, llama.cpp and others keep theirs: `models--user--repo/{blobs,refs,snapshots}`.
//! Around it: the environment ([`Hub::from_env`]), the choice of a file ([`pick`]), what to do
//! without network ([`snapshot`]), further attempts and stalls (`download`), and checksums
//! (`transfer`).
//!
//! No large file gets its place in the cache before its digest is right. Paths that the Hub lists are
//! checked; names of commits and blobs in its headers go to `hf-hub` as they are.

mod download;
mod error;
pub mod name;
pub mod pick;
pub mod snapshot;
mod transfer;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use hf_hub::Cache;
use hf_hub::api::sync::{Api, ApiBuilder};

pub use error::HubError;
use name::RepoName;
pub use snapshot::Snapshot;
pub use transfer::Step;

/// The Hub's address, unless `HF_ENDPOINT` names another.
const ENDPOINT: &str = "https://huggingface.co";

/// The Hub, or what a cache has of it.
pub struct Hub {
    endpoint: String,
    cache: Cache,
    /// A token was found.
    has_token: bool,
    /// `None`: offline.
    api: Option<Api>,
}

impl Hub {
    /// The Hub that the environment describes, with the variables of `huggingface_hub`:
    /// `HF_ENDPOINT`, `HF_HUB_OFFLINE`; `HF_TOKEN`, `HF_TOKEN_PATH`; `HF_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME`.
    ///
    /// # Errors
    /// [`HubError::Environment`] for a variable that is no address or token, and without a folder
    /// for the cache.
    pub fn from_env() -> Result<Self, HubError> {
        let home = home()?;
        let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        let cache = Cache::new(cache.map_or_else(|| home.join("hub"), PathBuf::from));
        let endpoint = endpoint()?;
        let token = token(&home)?;
        let has_token = token.is_some();
        let api = if is_set("HF_HUB_OFFLINE") {
            None
        } else {
            let api = ApiBuilder::from_cache(cache.clone())
                .with_endpoint(endpoint.clone())
                .with_token(token)
                .with_user_agent("medusa-llama", env!("CARGO_PKG_VERSION"))
                .build();
            Some(api.map_err(|error| HubError::Environment(error.to_string()))?)
        };
        Ok(Self { endpoint, cache, has_token, api })
    }

    /// What a repository has now; without network, what the cache has of it.
    ///
    /// # Errors
    /// [`HubError`] that says how the Hub refused, or that neither it nor the cache has anything.
    pub fn open(&self, repo: &RepoName) -> Result<Snapshot<'_>, HubError> {
        Snapshot::open(self, repo)
    }
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// Whether a variable says yes, in the words that `huggingface_hub` takes.
fn is_set(name: &str) -> bool {
    let value = variable(name).unwrap_or_default().to_string_lossy().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}

/// The folder of `huggingface_hub`, with its cache and its token.
fn home() -> Result<PathBuf, HubError> {
    if let Some(home) = variable("HF_HOME") {
        return Ok(home.into());
    }
    let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| env::home_dir().map(|home| home.join(".cache")));
    let none =
        || HubError::Environment("there is no home folder for the cache: set HF_HOME".into());
    Ok(caches.ok_or_else(none)?.join("huggingface"))
}

fn endpoint() -> Result<String, HubError> {
    let Some(value) = variable("HF_ENDPOINT") else { return Ok(ENDPOINT.into()) };
    let value = value.to_string_lossy().trim_end_matches('/').to_owned();
    let host = value.strip_prefix("https://").or_else(|| value.strip_prefix("http://"));
    if host.is_some_and(|host| !host.is_empty()) {
        return Ok(value);
    }
    let why = format!("HF_ENDPOINT is {value}; it must begin with https:// or http://");
    Err(HubError::Environment(why))
}

/// The token of the environment, or else the one that `hf auth login` keeps.
fn token(home: &Path) -> Result<Option<String>, HubError> {
    let file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
    let (token, source) = match variable("HF_TOKEN") {
        Some(token) => (token.to_string_lossy().into_owned(), "HF_TOKEN".to_owned()),
        None => (std::fs::read_to_string(&file).unwrap_or_default(), file.display().to_string()),
    };
    let token = token.trim();
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        let why = format!("{source} holds a character that no token has (it is not shown)");
        return Err(HubError::Environment(why));
    }
    Ok(Some(token.to_owned()).filter(|token| !token.is_empty()))
}
