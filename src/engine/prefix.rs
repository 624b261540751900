//! What an engine keeps of prefixes beside its cache: how much, where, and for which arithmetic.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::slots::Layout;
use super::stats::Stats;
use crate::llama::{self, cpu_features};
use crate::machine::available_memory;
use crate::prefixes::Prefixes;
use crate::prefixes::key::{Fingerprint, Owner};
use crate::prefixes::store::{Counters, Store, StoreParams};

/// Time that blocks have to be written when an engine ends.
pub const FINISH: Duration = Duration::from_secs(10);

/// What is kept beside the cache.
#[derive(Clone, Debug, Default)]
pub struct PrefixParams {
    /// How much of it in memory.
    pub memory: Room,
    /// Where it outlives the process.
    pub store: Option<StoreParams>,
    /// Whose prefixes are whose, by the number of the tenant.
    pub owners: Vec<Owner>,
}

/// Bytes of memory for blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Room {
    /// None: prefixes are not kept.
    #[default]
    None,
    /// A part of what is left beside the model.
    Auto,
    /// So many.
    Most(u64),
}

impl PrefixParams {
    /// Where other models want the memory, too: only what was asked for, or a store needs.
    #[must_use]
    pub fn beside_others(mut self) -> Self {
        if self.store.is_none() && self.memory == Room::Auto {
            self.memory = Room::None;
        }
        self
    }
}

/// The part of the memory that is left beside the model, and the most of it, that blocks take.
const AUTO_PART: u64 = 4;
const AUTO_MOST: u64 = 8 << 30;

/// Why prefixes cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum PrefixError {
    /// The store cannot be opened.
    #[error("{0}")]
    Store(String),
    /// The model's files cannot be read.
    #[error("{path} cannot be read for PREFIX_STORE: {error}")]
    Model {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Whether prefixes are kept beside a cache of this layout. States and windows are not taken apart.
pub fn are_kept(params: &PrefixParams, layout: Layout) -> bool {
    params.memory != Room::None && matches!(layout, Layout::Unified { .. })
}

/// The digest of all files that hold weights, while it is computed.
pub struct WeightsDigest(Option<JoinHandle<Result<Vec<[u8; 32]>, PrefixError>>>);

/// Begins to read the files whose weights decide what cells are, beside the loading of the model. Without
/// a store there is no need: nothing outlives this process.
pub fn begin(params: &PrefixParams, files: impl FnOnce() -> Vec<PathBuf>) -> WeightsDigest {
    if params.store.is_none() {
        return WeightsDigest(None);
    }
    let files = files();
    let read = move || files.iter().map(|path| digest(path)).collect();
    WeightsDigest(std::thread::Builder::new().name("digest".into()).spawn(read).ok())
}

fn digest(path: &Path) -> Result<[u8; 32], PrefixError> {
    let read = || {
        let (mut file, mut hasher) = (File::open(path)?, Sha256::new());
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finalize().into()),
                n => hasher.update(&buffer[..n]),
            }
        }
    };
    read().map_err(|error| PrefixError::Model { path: path.into(), error })
}

/// What is kept for an engine whose model is loaded; `None`: nothing. `settings` are those that decide
/// the bits of a cell, beside the weights and this program. `planned` bytes of memory are the engine's.
///
/// # Errors
/// [`PrefixError`]
pub fn open(
    params: &PrefixParams,
    layout: Layout,
    planned: u64,
    settings: String,
    weights: WeightsDigest,
    stats: &Stats,
) -> Result<Option<Arc<Prefixes>>, PrefixError> {
    let PrefixParams { memory, store, owners } = params;
    if !are_kept(params, layout) {
        if store.is_some() {
            tracing::warn!("PREFIX_STORE is not used: this model's cache keeps states or windows");
        }
        return Ok(None);
    }
    let most = match *memory {
        Room::None => 0,
        Room::Auto => {
            let left = available_memory().map_or(0, |free| free.saturating_sub(planned));
            (left / AUTO_PART).min(AUTO_MOST)
        }
        Room::Most(bytes) => bytes,
    };
    let weights = weights.0.map_or(Ok(vec![]), |thread| thread.join().expect("it cannot panic"))?;
    let texts = [llama::version(), llama::ARITHMETIC.into(), cpu_features(), settings];
    let texts = texts.iter().map(String::as_bytes);
    let fingerprint = Fingerprint::of(texts.chain(weights.iter().map(|digest| &digest[..])));
    let counters = Counters {
        written: stats.blocks_written.clone(),
        skipped: stats.blocks_skipped.clone(),
        n_bytes: stats.blocks_store.clone(),
    };
    let store = store.as_ref().map(|of| Store::open(of, fingerprint, counters));
    let store = store.transpose().map_err(PrefixError::Store)?;
    let gauge = stats.blocks_memory.clone();
    tracing::info!(
        mib = most >> 20,
        stored = store.is_some(),
        "prefixes are kept beside the cache"
    );
    Ok(Some(Prefixes::new(fingerprint, owners.clone(), most, store, gauge)))
}
