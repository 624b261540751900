//! Why a model or heads could not be had by name.

use std::path::PathBuf;

/// An error of the Hub, the cache or the network. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// An environment variable is invalid.
    #[error("{0}")]
    Environment(String),
    /// The Hub refused: there is no such thing, or not for this token.
    #[error("{what}: the Hub ({endpoint}) answered {status}: {}", reason(*.status, *.has_token))]
    Refused {
        /// Repository, and file if it is about one.
        what: String,
        /// Whose answer it is.
        endpoint: String,
        /// HTTP's status.
        status: u16,
        /// A token was sent.
        has_token: bool,
    },
    /// The Hub could not be asked, and the cache does not have what is needed.
    #[error("{what}: {why}, and it is not in the cache ({})", cache.display())]
    Unreachable {
        /// Repository, and file if it is about one.
        what: String,
        /// Why the Hub was not asked, or did not answer.
        why: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The Hub answered something else than its API says.
    #[error("{repo}: the Hub's answer is invalid: {reason}")]
    Answer {
        /// The repository.
        repo: String,
        /// What is wrong.
        reason: String,
    },
    /// The repository has no such file.
    #[error("{repo}: {reason}")]
    NoFile {
        /// The repository.
        repo: String,
        /// What was looked for, and what there is.
        reason: String,
    },
    /// A download failed, several times if that could help. The next one goes on where it stopped.
    #[error("{what} could not be downloaded: {reason}")]
    Download {
        /// Repository and file.
        what: String,
        /// Why.
        reason: String,
    },
    /// What arrived is not the file.
    #[error(
        "{what}: the download is damaged and was removed: its SHA-256 is {found}, but the Hub says {expected}"
    )]
    Checksum {
        /// Repository and file.
        what: String,
        /// The Hub's.
        expected: String,
        /// Of what arrived.
        found: String,
    },
    /// The cache cannot be read or written.
    #[error("{}: {reason}", path.display())]
    Cache {
        /// A file or folder of the cache.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Whoever waited for it does not any more.
    #[error("the download was stopped")]
    Stopped,
}

/// What a status of the Hub's means, and what to do about it. It answers 401 for repositories that
/// do not exist, too, so that nobody learns which ones do.
fn reason(status: u16, has_token: bool) -> &'static str {
    match (status, has_token) {
        (401, false) => {
            "the repository is private or gated, or there is none of this name; set HF_TOKEN to a token that may read it"
        }
        (401, true) => "the token is invalid or expired; check HF_TOKEN",
        (403, false) => {
            "the repository is gated; accept its terms on its page, and set HF_TOKEN to a token that may read it"
        }
        (403, true) => {
            "the repository is gated or the token may not read it; accept its terms on its page, or set HF_TOKEN to another token"
        }
        (404, false) => {
            "there is none of this name, or it is private; a private one needs HF_TOKEN"
        }
        (404, true) => "there is none of this name, or it is private and HF_TOKEN may not read it",
        _ => "the request failed",
    }
}
