//! What happens while `hf-hub` transfers a file, and its digest at the end.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use hf_hub::api::Progress;
use hf_hub::api::sync::ApiError;
use sha2::{Digest, Sha256};

/// Bytes that are read at once to compute a digest.
const BLOCK: usize = 1 << 20;

/// What happens to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This many of all bytes are here.
    Arrived {
        /// Including those of earlier attempts.
        bytes: u64,
        /// Of the file.
        of: u64,
    },
    /// All are, and the digest is being computed.
    Checking,
}

/// What the thread that transfers reports.
pub(super) enum Report {
    Step(Step),
    /// The digest of what arrived.
    Digest(String),
    Ended(Result<PathBuf, ApiError>),
}

/// A transfer, as `hf-hub` reports it.
pub(super) struct Transfer {
    reports: Sender<Report>,
    /// Where its bytes go; `None` if it has no digest.
    part: Option<PathBuf>,
    n_here: u64,
    of: u64,
}

impl Transfer {
    pub fn new(reports: Sender<Report>, part: Option<PathBuf>) -> Self {
        Self { reports, part, n_here: 0, of: 0 }
    }
}

impl Progress for Transfer {
    fn init(&mut self, size: usize, _: &str) {
        (self.n_here, self.of) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.n_here += size as u64;
        let _ = self.reports.send(Report::Step(Step::Arrived { bytes: self.n_here, of: self.of }));
    }

    /// All bytes are in the part, which gets its place in the cache after this: not if its digest is
    /// wrong, since then there is no such file any more.
    fn finish(&mut self) {
        let Some(part) = &self.part else { return };
        let mut checking = || drop(self.reports.send(Report::Step(Step::Checking)));
        let Ok(found) = digest_of(part, &mut checking) else { return };
        let expected = part.file_stem().is_some_and(|name| name.to_string_lossy() == found);
        if !expected {
            let _ = fs::remove_file(part);
        }
        let _ = self.reports.send(Report::Digest(found));
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub(super) fn digest_of(path: &Path, on_block: &mut dyn FnMut()) -> io::Result<String> {
    let (mut file, mut hash, mut block) = (File::open(path)?, Sha256::new(), vec![0; BLOCK]);
    loop {
        on_block();
        match file.read(&mut block)? {
            0 => break,
            n => hash.update(&block[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
