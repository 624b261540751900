//! Prefixes of prompts that outlive the cache: [blocks](key::BLOCK) of cells in the host's memory, and
//! in a folder or an S3-like store, from which they come back after a restart and in other servers.
//!
//! The engine saves the cells of sequences that have ended, block after block, and restores those that a
//! new prompt begins with and its cache has not. A request's blocks are [fetched](Prefixes::fetch) from
//! the store into memory before the engine gets it, so that the engine never waits for a disk.
//!
//! A block's [key](key::Key) covers its tokens, all tokens before them, whose they are, and the
//! [fingerprint](key::Fingerprint) of what computes them.

pub mod block;
mod client;
pub mod key;
pub mod memory;
pub mod store;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;

use crate::llama::Token;
use key::{Fingerprint, Key, Owner};
use memory::{Held, Memory, Origin};
use store::Store;

/// Blocks that are read from the store at a time.
const ABREAST: usize = 8;
/// The longest that a request waits for its blocks.
const FETCH: Duration = Duration::from_secs(5);

/// Blocks in memory, and in a store.
pub struct Prefixes {
    fingerprint: Fingerprint,
    /// By the number of the tenant; none: all have the same.
    owners: Vec<Owner>,
    memory: Mutex<Memory>,
    store: Option<Store>,
    memory_bytes: Gauge,
}

impl Prefixes {
    /// Nothing in memory, which has room for `most` bytes.
    pub fn new(
        fingerprint: Fingerprint,
        owners: Vec<Owner>,
        most: u64,
        store: Option<Store>,
        memory_bytes: Gauge,
    ) -> Arc<Self> {
        let memory = Mutex::new(Memory::new(most));
        Arc::new(Self { fingerprint, owners, memory, store, memory_bytes })
    }

    /// The keys of the whole blocks that a tenant's text begins with.
    pub fn keys(&self, tenant: u32, tokens: &[Token]) -> Vec<Key> {
        let owner = self.owners.get(tenant as usize).copied().unwrap_or_default();
        Key::chain(self.fingerprint, owner, tokens).collect()
    }

    /// `true` if blocks outlive this process.
    pub fn is_stored(&self) -> bool {
        self.store.is_some()
    }

    /// `true` if a block need not be saved: it is in memory. It counts as a use.
    pub fn has(&self, key: &Key) -> bool {
        self.memory.lock().touch(key)
    }

    /// `true` while what is put is kept as it should be: the store is not behind.
    pub fn keeps_up(&self) -> bool {
        self.store.as_ref().is_none_or(Store::has_room)
    }

    /// A block, if it is in memory.
    pub fn get(&self, key: &Key) -> Option<Held> {
        self.memory.lock().get(key)
    }

    /// Keeps a block that was computed here.
    pub fn put(&self, key: Key, cells: Bytes) {
        if let Some(store) = &self.store {
            store.write(key, cells.clone());
        }
        self.hold(key, Held { cells, origin: Origin::Memory });
    }

    /// Counts a use of all these blocks, so that the first of them go last.
    pub fn used(&self, keys: &[Key]) {
        let mut memory = self.memory.lock();
        for key in keys.iter().rev() {
            memory.touch(key);
        }
    }

    fn hold(&self, key: Key, held: Held) {
        let mut memory = self.memory.lock();
        memory.put(key, held);
        self.memory_bytes.set(memory.n_bytes() as i64);
    }

    /// Brings the blocks that a prompt begins with from the store into memory, as far as they are there,
    /// come in time, and have room.
    pub async fn fetch(&self, tenant: u32, prompt: &[Token]) {
        let Some(store) = &self.store else { return };
        let keys = self.keys(tenant, &prompt[..prompt.len().saturating_sub(1)]);
        let n_held = keys.iter().take_while(|key| self.has(key)).count();
        let most = self.memory.lock().most() / 2; // others' blocks are wanted, too
        let _ = tokio::time::timeout(FETCH, async {
            let mut n_bytes = 0;
            for keys in keys[n_held..].chunks(ABREAST) {
                let read = join_all(keys.iter().map(|&key| store.read(key))).await;
                for (&key, cells) in keys.iter().zip(read) {
                    let Some(cells) = cells else { return };
                    n_bytes += cells.len() as u64;
                    if n_bytes > most {
                        return;
                    }
                    store.write(key, cells.clone()); // only if it is old
                    self.hold(key, Held { cells, origin: Origin::Store });
                }
            }
        })
        .await;
        self.used(&keys);
    }

    /// Waits until what is to be stored is, at most for `limit`.
    pub fn flush(&self, limit: Duration) {
        if self.store.as_ref().is_some_and(|store| !store.flush(limit)) {
            tracing::warn!("the prefix store is slow: some blocks are not written");
        }
    }
}
