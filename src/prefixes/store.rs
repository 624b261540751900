//! Blocks in a folder or an S3-like store, shared by all servers that are given it.
//!
//! An object is one [`block`], at `<fingerprint>/<key>`. It appears whole or not at all: a
//! folder's files are written beside and renamed, and S3 has no other way. What is used longest ago
//! is deleted first, before a block would exceed the limit; blocks of other fingerprints are counted
//! and deleted like all others. Servers that share a store each count all of it, and learn of each
//! other's blocks every few minutes.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;
use lru::LruCache;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, RetryConfig};
use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use super::block;
use super::client::Connector;
use super::key::{Fingerprint, Key};

/// Blocks that wait to be written; further ones are not.
const QUEUE: usize = 64;
/// Time between two looks at what other servers wrote.
const LOOK: Duration = Duration::from_secs(300);
/// A block that is used is written again if it is older: what others know of its use is its age.
const RENEWED_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Time in which a store that failed is not read.
const PAUSE: Duration = Duration::from_secs(10);
/// Age of a file that was written beside and never renamed, after which it is deleted.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// Where blocks are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A folder, which is made if need be.
    Folder(PathBuf),
    /// `s3://bucket/path`; region, endpoint and credentials are those of the environment.
    S3(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            None if text.is_empty() => Err("must be a folder or s3://BUCKET[/PATH]".into()),
            None => Ok(Self::Folder(text.into())),
            Some(("file", path)) if path.starts_with('/') => Ok(Self::Folder(path.into())),
            Some(("s3", rest)) if !rest.is_empty() && !rest.starts_with('/') => {
                Ok(Self::S3(text.into()))
            }
            Some(_) => Err("must be a folder or s3://BUCKET[/PATH]".into()),
        }
    }
}

/// A store, and how much it may hold.
#[derive(Clone, Debug)]
pub struct StoreParams {
    /// Where it is.
    pub place: Place,
    /// Bytes of all blocks.
    pub most: u64,
}

/// What a store counts.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Blocks written.
    pub written: Counter,
    /// Blocks that could not be used.
    pub skipped: Counter,
    /// Bytes of all blocks.
    pub n_bytes: Gauge,
}

/// A store of blocks. Its work is done by threads of its own.
pub struct Store {
    shared: Arc<Shared>,
    work: mpsc::Sender<Work>,
    runtime: Mutex<Option<Runtime>>,
}

enum Work {
    Write(Key, Bytes),
    /// Answered when all before it is done.
    Flush(oneshot::Sender<()>),
}

struct Shared {
    objects: Box<dyn ObjectStore>,
    /// Objects of this fingerprint are below it.
    folder: String,
    most: u64,
    index: Mutex<Index>,
    failed: Mutex<Option<Instant>>,
    is_down: AtomicBool,
    counters: Counters,
}

/// What is stored, as far as this server knows, the object used longest ago first.
struct Index {
    objects: LruCache<String, Stored>,
    n_bytes: u64,
}

#[derive(Clone, Copy)]
struct Stored {
    n_bytes: u64,
    written: SystemTime,
    used: SystemTime,
}

impl Store {
    /// Opens a store for blocks of a fingerprint.
    ///
    /// # Errors
    /// When a folder cannot be made, or a URL or the environment's settings are invalid. A store that
    /// does not answer is no error: it is tried again.
    pub fn open(
        params: &StoreParams,
        fingerprint: Fingerprint,
        counters: Counters,
    ) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(4)
            .thread_name("prefix-store")
            .enable_all()
            .build()
            .map_err(|error| format!("there is no thread for the prefix store: {error}"))?;
        let shared = Arc::new(Shared {
            objects: objects(&params.place)?,
            folder: fingerprint.to_string(),
            most: params.most,
            index: Mutex::new(Index { objects: LruCache::unbounded(), n_bytes: 0 }),
            failed: Mutex::new(None),
            is_down: AtomicBool::new(false),
            counters,
        });
        let (work, receiver) = mpsc::channel(QUEUE);
        runtime.spawn(Arc::clone(&shared).work(receiver));
        Ok(Self { shared, work, runtime: Mutex::new(Some(runtime)) })
    }

    /// Stores a block, in some time, if it is not stored yet. It is not if too many wait.
    pub fn write(&self, key: Key, cells: Bytes) {
        if !self.shared.is_fresh(&key) {
            let _ = self.work.try_send(Work::Write(key, cells)); // a full queue: the store is slow
        }
    }

    /// `true` while a block can be [written](Self::write).
    pub fn has_room(&self) -> bool {
        self.work.capacity() > 0
    }

    /// The cells of a block; `None` if there is none that can be used.
    pub async fn read(&self, key: Key) -> Option<Bytes> {
        let shared = Arc::clone(&self.shared);
        let reading = self.runtime.lock().as_ref()?.spawn(async move { shared.read(key).await });
        reading.await.ok()?
    }

    /// Waits until what was to be written is, at most for `limit`. Returns whether it is. Not for async
    /// code.
    pub fn flush(&self, limit: Duration) -> bool {
        let runtime = self.runtime.lock();
        let Some(runtime) = &*runtime else { return false };
        let (done, all) = oneshot::channel();
        let flush = async {
            self.work.send(Work::Flush(done)).await.ok()?;
            all.await.ok()
        };
        let in_time = runtime.block_on(async { tokio::time::timeout(limit, flush).await });
        in_time.is_ok_and(|flushed| flushed.is_some())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }
}

/// What `object_store` makes of a place.
fn objects(place: &Place) -> Result<Box<dyn ObjectStore>, String> {
    match place {
        Place::Folder(folder) => {
            let fail = |error: &dyn std::fmt::Display| {
                format!("PREFIX_STORE is {}: {error}", folder.display())
            };
            fs::create_dir_all(folder).map_err(|error| fail(&error))?;
            remove_abandoned(folder);
            let store = LocalFileSystem::new_with_prefix(folder).map_err(|error| fail(&error))?;
            Ok(Box::new(store))
        }
        Place::S3(url) => {
            let fail = |error: object_store::Error| format!("PREFIX_STORE is {url}: {error}");
            let retry = RetryConfig { max_retries: 2, ..RetryConfig::default() };
            let store = AmazonS3Builder::from_env()
                .with_url(url)
                .with_http_connector(Connector)
                .with_retry(retry)
                .build()
                .map_err(fail)?;
            let path = url.splitn(4, '/').nth(3).unwrap_or_default();
            Ok(Box::new(PrefixStore::new(store, path)))
        }
    }
}

/// Deletes what was written beside and never renamed, since its writer was ended.
fn remove_abandoned(folder: &std::path::Path) {
    let entries = |folder: &std::path::Path| {
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
    };
    let files = entries(folder).flat_map(|below| entries(&below).collect::<Vec<_>>());
    for file in files.filter(|file| file.to_string_lossy().contains('#')) {
        let age = file.metadata().and_then(|of| of.modified()).map(|at| at.elapsed());
        if age.is_ok_and(|age| age.is_ok_and(|age| age > ABANDONED_AFTER)) {
            let _ = fs::remove_file(file);
        }
    }
}

impl Shared {
    fn path(&self, key: &Key) -> String {
        format!("{}/{key}", self.folder)
    }

    /// Whether a block is stored and needs no new writing. It counts as a use.
    fn is_fresh(&self, key: &Key) -> bool {
        let now = SystemTime::now();
        let mut index = self.index.lock();
        let Some(stored) = index.objects.get_mut(&self.path(key)) else { return false };
        stored.used = now;
        now.duration_since(stored.written).is_ok_and(|age| age < RENEWED_AFTER)
    }

    async fn work(self: Arc<Self>, mut work: mpsc::Receiver<Work>) {
        let mut looked = None::<Instant>;
        while let Some(next) = work.recv().await {
            match next {
                Work::Write(key, cells) => {
                    if looked.is_none_or(|at| at.elapsed() > LOOK) {
                        looked = Some(Instant::now());
                        let listed = self.list().await;
                        self.tell("list", listed);
                    }
                    if !self.is_fresh(&key) {
                        let written = self.write(&key, &cells).await;
                        self.tell("write", written);
                    }
                }
                Work::Flush(done) => drop(done.send(())),
            }
        }
    }

    /// Learns what is stored.
    async fn list(&self) -> object_store::Result<()> {
        let listed: Vec<_> = self.objects.list(None).try_collect().await?;
        let mut index = self.index.lock();
        let mut all: Vec<(String, Stored)> = (listed.into_iter())
            .map(|object| {
                let (path, written) = (object.location.to_string(), object.last_modified.into());
                let used = index.objects.peek(&path).map_or(written, |known| known.used);
                (path, Stored { n_bytes: object.size, written, used })
            })
            .collect();
        all.sort_by_key(|(_, stored)| stored.used);
        index.n_bytes = all.iter().map(|(_, stored)| stored.n_bytes).sum();
        index.objects.clear();
        for (path, stored) in all {
            index.objects.put(path, stored);
        }
        self.counters.n_bytes.set(index.n_bytes as i64);
        Ok(())
    }

    async fn write(&self, key: &Key, cells: &[u8]) -> object_store::Result<()> {
        let block = block::encode(key, cells);
        let n_bytes = block.len() as u64;
        if n_bytes > self.most {
            return Ok(());
        }
        while let Some(oldest) = self.next_to_go(n_bytes) {
            match self.objects.delete(&Path::from(oldest)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let path = self.path(key);
        self.objects.put(&Path::from(path.as_str()), block.into()).await?;
        self.counters.written.inc();
        let now = SystemTime::now();
        let mut index = self.index.lock();
        let stored = Stored { n_bytes, written: now, used: now };
        let before = index.objects.put(path, stored).map_or(0, |before| before.n_bytes);
        index.n_bytes = index.n_bytes + n_bytes - before;
        self.counters.n_bytes.set(index.n_bytes as i64);
        Ok(())
    }

    /// The object to delete before one of `n_bytes` is written; `None`: there is room.
    fn next_to_go(&self, n_bytes: u64) -> Option<String> {
        let mut index = self.index.lock();
        if index.n_bytes + n_bytes <= self.most {
            return None;
        }
        let (path, stored) = index.objects.pop_lru()?;
        index.n_bytes -= stored.n_bytes;
        Some(path)
    }

    async fn read(&self, key: Key) -> Option<Bytes> {
        if self.failed.lock().is_some_and(|at| at.elapsed() < PAUSE) {
            return None;
        }
        let path = self.path(&key);
        let location = Path::from(path.as_str());
        let object = async { self.objects.get(&location).await?.bytes().await };
        let block = match object.await {
            Ok(block) => block,
            Err(object_store::Error::NotFound { .. }) => {
                self.tell("read", Ok(()));
                return None;
            }
            Err(error) => {
                self.tell("read", Err(error));
                return None;
            }
        };
        self.tell("read", Ok(()));
        let checked =
            tokio::task::spawn_blocking(move || block::decode(&key, &block)).await.ok()?;
        match checked {
            Ok(cells) => Some(cells),
            Err(error) => {
                tracing::warn!(block = path, %error, "a stored block is skipped");
                self.counters.skipped.inc();
                None
            }
        }
    }

    /// Logs when the store fails, and when it works again.
    fn tell(&self, what: &'static str, done: object_store::Result<()>) {
        let was_down = self.is_down.swap(done.is_err(), Ordering::Relaxed);
        *self.failed.lock() = done.is_err().then(Instant::now);
        match done {
            Err(error) if !was_down => {
                tracing::warn!(%error, "the prefix store fails to {what}; prompts are computed");
            }
            Ok(()) if was_down => tracing::info!("the prefix store works again"),
            _ => {}
        }
    }
}
