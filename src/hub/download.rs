//! One file from the Hub into the cache: `hf-hub` transfers and resumes it, on a thread of its own,
//! so that a connection that stalls or a server that is stopped does not wait for it. Here are the
//! checksum, further attempts, and files that the cache has under another commit.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use hf_hub::CacheRepo;
use hf_hub::api::sync::{Api, ApiError};
use rustix::fs::{FlockOperation, flock};

use super::error::HubError;
use super::name::RepoName;
use super::transfer::{Report, Step, Transfer, digest_of};

/// Attempts without a byte of progress before a download fails.
const ATTEMPTS: u32 = 5;
/// Time before the second attempt; it doubles with each.
const PAUSE: Duration = Duration::from_secs(1);
/// Time without a byte after which a connection is given up.
const STALLED: Duration = Duration::from_secs(60);
/// How often whoever watches may stop it.
const TICK: Duration = Duration::from_millis(100);

/// A file that the cache is to have.
pub(super) struct Wanted<'a> {
    pub api: &'a Api,
    pub cache: CacheRepo,
    pub endpoint: &'a str,
    pub has_token: bool,
    pub repo: &'a RepoName,
    /// In the repository.
    pub path: &'a str,
    pub n_bytes: Option<u64>,
    /// As the Hub lists it.
    pub sha256: Option<&'a str>,
    /// Its path in the cache.
    pub place: &'a Path,
}

/// Why an attempt failed.
enum Fault {
    /// Another may succeed.
    Passing(String),
    /// Another process began to download it at the same moment.
    Locked,
    Error(HubError),
}

/// Downloads a file, in several attempts if need be. `watch` as in
/// [`Snapshot::file`](super::Snapshot::file).
pub(super) fn download(
    file: &Wanted<'_>,
    watch: &mut dyn FnMut(Step) -> bool,
) -> Result<(), HubError> {
    let (mut failed, mut pause, mut waits) = (0, PAUSE, false);
    loop {
        let before = file.n_here();
        if file.is_locked() {
            if !std::mem::replace(&mut waits, true) {
                tracing::info!("another process downloads {}; waiting for it", file.what());
            }
            std::thread::sleep(TICK);
            file.tell(watch, file.arrived())?;
            continue;
        }
        let reason = match file.attempt(watch) {
            Ok(()) => return Ok(()),
            Err(Fault::Error(error)) => return Err(error),
            Err(Fault::Locked) => continue,
            Err(Fault::Passing(reason)) => reason,
        };
        if file.n_here() > before {
            (failed, pause) = (0, PAUSE);
        }
        failed += 1;
        if failed == ATTEMPTS {
            return Err(file.failed(reason));
        }
        tracing::warn!("downloading {}: {reason}; attempt {} follows", file.what(), failed + 1);
        let until = Instant::now() + pause;
        while Instant::now() < until {
            std::thread::sleep(TICK);
            file.tell(watch, file.arrived())?;
        }
        pause *= 2;
    }
}

impl Wanted<'_> {
    fn what(&self) -> String {
        format!("{}/{}", self.repo, self.path)
    }

    fn failed(&self, reason: String) -> HubError {
        HubError::Download { what: self.what(), reason }
    }

    /// Where `hf-hub` puts the file, and a part of it; known for files with a digest.
    fn blob(&self) -> Option<PathBuf> {
        self.sha256.map(|sha256| self.cache.blob_path(sha256))
    }

    fn part(&self) -> Option<PathBuf> {
        self.blob().map(|blob| blob.with_extension("part"))
    }

    /// Whether another process downloads the file. `hf-hub` would wait for its lock, too, but then
    /// download the file again.
    fn is_locked(&self) -> bool {
        let Some(blob) = self.blob() else { return false };
        let Ok(lock) = File::open(blob.with_extension("lock")) else { return false };
        flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
    }

    /// Bytes of the part.
    fn n_here(&self) -> u64 {
        self.part().and_then(|part| fs::metadata(part).ok()).map_or(0, |found| found.len())
    }

    fn arrived(&self) -> Step {
        Step::Arrived { bytes: self.n_here(), of: self.n_bytes.unwrap_or(0) }
    }

    fn tell(&self, watch: &mut dyn FnMut(Step) -> bool, step: Step) -> Result<(), HubError> {
        if watch(step) { Ok(()) } else { Err(HubError::Stopped) }
    }

    fn in_cache(&self, error: io::Error) -> Fault {
        let path = self.blob().unwrap_or_else(|| self.place.to_owned());
        Fault::Error(HubError::Cache { path, reason: error.to_string() })
    }

    fn attempt(&self, watch: &mut dyn FnMut(Step) -> bool) -> Result<(), Fault> {
        if self.is_here(watch)? {
            return Ok(());
        }
        let (sender, reports) = channel();
        let transfer = Transfer::new(sender.clone(), self.part());
        let (api, path) = (self.api.model(self.repo.to_string()), self.path.to_owned());
        let run = move || {
            let ended = api.download_with_progress(&path, transfer);
            let _ = sender.send(Report::Ended(ended));
        };
        std::thread::Builder::new()
            .name("download".into())
            .spawn(run)
            .map_err(|error| Fault::Error(self.failed(error.to_string())))?;
        let (ended, digest) = self.follow(&reports, watch)?;
        self.settle(ended, digest)
    }

    /// Uses what earlier downloads left: the file under another commit, or all of its bytes.
    fn is_here(&self, watch: &mut dyn FnMut(Step) -> bool) -> Result<bool, Fault> {
        let (Some(sha256), Some(blob), Some(part), Some(n_bytes)) =
            (self.sha256, self.blob(), self.part(), self.n_bytes)
        else {
            return Ok(false);
        };
        let size = |path: &Path| fs::metadata(path).map(|found| found.len()).ok();
        if size(&part).is_some_and(|n| n >= n_bytes) {
            watch(Step::Checking);
            let found = digest_of(&part, &mut || ()).map_err(|error| self.in_cache(error))?;
            let done =
                if found == sha256 { fs::rename(&part, &blob) } else { fs::remove_file(&part) };
            done.map_err(|error| self.in_cache(error))?;
        }
        match size(&blob) {
            Some(n) if n == n_bytes => {
                self.link(&blob).map_err(|error| self.in_cache(error))?;
                Ok(true)
            }
            Some(_) => {
                fs::remove_file(&blob).map_err(|error| self.in_cache(error))?;
                Ok(false)
            }
            None => Ok(false),
        }
    }

    /// Makes the file's path lead to its bytes.
    fn link(&self, blob: &Path) -> io::Result<()> {
        let up = "../".repeat(2 + self.path.matches('/').count());
        let name = blob.file_name().unwrap_or_default().to_string_lossy();
        fs::create_dir_all(self.place.parent().unwrap_or(self.place))?;
        let _ = fs::remove_file(self.place); // a link to what is not there
        symlink(format!("{up}blobs/{name}"), self.place)
    }

    /// Passes on what the transfer reports, until its end.
    fn follow(
        &self,
        reports: &Receiver<Report>,
        watch: &mut dyn FnMut(Step) -> bool,
    ) -> Result<(Result<PathBuf, ApiError>, Option<String>), Fault> {
        let (mut step, mut heard) = (self.arrived(), Instant::now());
        let mut digest = None;
        loop {
            match reports.recv_timeout(TICK) {
                Ok(Report::Ended(ended)) => return Ok((ended, digest)),
                Ok(Report::Digest(found)) => digest = Some(found),
                Ok(Report::Step(next)) => (step, heard) = (next, Instant::now()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let why = "its thread panicked; the log above says where";
                    return Err(Fault::Error(self.failed(why.into())));
                }
            }
            self.tell(watch, step).map_err(Fault::Error)?;
            if heard.elapsed() > STALLED {
                let n = STALLED.as_secs();
                let why =
                    format!("nothing arrived for {n} s; a new start goes on where it stopped");
                return Err(Fault::Error(self.failed(why)));
            }
        }
    }

    /// What an ended transfer means.
    fn settle(
        &self,
        ended: Result<PathBuf, ApiError>,
        digest: Option<String>,
    ) -> Result<(), Fault> {
        // A file that is not where its digest says was not read at the end of the transfer.
        let digest = match (digest, &ended, self.sha256) {
            (None, Ok(path), Some(_)) => {
                Some(digest_of(path, &mut || ()).map_err(|error| self.in_cache(error))?)
            }
            (digest, ..) => digest,
        };
        if let (Some(expected), Some(found)) = (self.sha256, digest)
            && expected != found
        {
            let arrived = ended.ok().and_then(|path| fs::canonicalize(path).ok());
            let damaged = [self.part(), self.blob(), arrived, Some(self.place.to_owned())];
            damaged.iter().flatten().for_each(|path| drop(fs::remove_file(path)));
            let expected = expected.to_owned();
            return Err(Fault::Error(HubError::Checksum { what: self.what(), expected, found }));
        }
        ended.map_err(|error| self.fault(error))?;
        let n = fs::metadata(self.place).map(|found| found.len()).ok();
        if n.is_none_or(|n| self.n_bytes.is_some_and(|expected| n != expected)) {
            let why = "the repository changed meanwhile; start again";
            return Err(Fault::Error(self.failed(why.into())));
        }
        Ok(())
    }

    fn fault(&self, error: ApiError) -> Fault {
        let refused = |status| {
            Fault::Error(HubError::Refused {
                what: self.what(),
                endpoint: self.endpoint.to_owned(),
                status,
                has_token: self.has_token,
            })
        };
        match error {
            ApiError::LockAcquisition(_) => Fault::Locked,
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(status @ (401 | 403 | 404)) => refused(status),
                ureq::Error::StatusCode(status @ 400..500)
                    if ![408, 416, 429].contains(&status) =>
                {
                    Fault::Error(self.failed(format!("the Hub answered {status}")))
                }
                error => Fault::Passing(error.to_string()),
            },
            ApiError::IoError(error) => match error.kind() {
                ErrorKind::StorageFull
                | ErrorKind::QuotaExceeded
                | ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem => self.in_cache(error),
                _ => Fault::Passing(error.to_string()),
            },
            ApiError::MissingHeader(_)
            | ApiError::InvalidHeader(_)
            | ApiError::ParseIntError(_) => {
                let (repo, reason) = (self.repo.to_string(), error.to_string());
                Fault::Error(HubError::Answer { repo, reason })
            }
            error => Fault::Passing(error.to_string()),
        }
    }
}
