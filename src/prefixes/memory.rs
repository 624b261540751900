//! Blocks in the host's memory, the one used longest ago first to go.

use bytes::Bytes;
use lru::LruCache;

use super::key::Key;

/// Where cells of a prompt came from that it did not compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This process computed them, and kept them in memory.
    Memory,
    /// They were stored, here or by another server.
    Store,
}

/// The cells of a block.
#[derive(Clone, Debug)]
pub struct Held {
    /// As llama.cpp writes them.
    pub cells: Bytes,
    /// Where they came from.
    pub origin: Origin,
}

/// Blocks in memory.
pub struct Memory {
    blocks: LruCache<Key, Held>,
    n_bytes: u64,
    most: u64,
}

impl Memory {
    /// Room for `most` bytes.
    pub fn new(most: u64) -> Self {
        Self { blocks: LruCache::unbounded(), n_bytes: 0, most }
    }

    /// Bytes that are held.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Bytes that there is room for.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// Whether a block is here. It counts as a use.
    pub fn touch(&mut self, key: &Key) -> bool {
        self.blocks.get(key).is_some()
    }

    /// A block. It counts as a use.
    pub fn get(&mut self, key: &Key) -> Option<Held> {
        self.blocks.get(key).cloned()
    }

    /// Holds a block, instead of others if need be. One that is larger than the room is not held.
    pub fn put(&mut self, key: Key, held: Held) {
        let n = held.cells.len() as u64;
        if n > self.most {
            return;
        }
        if let Some(before) = self.blocks.put(key, held) {
            self.n_bytes -= before.cells.len() as u64;
        }
        self.n_bytes += n;
        while self.n_bytes > self.most {
            let Some((_, oldest)) = self.blocks.pop_lru() else { return };
            self.n_bytes -= oldest.cells.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::{BLOCK, Fingerprint, Owner};
    use super::*;
    use crate::llama::Token;

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let tokens = [Token(1); 4 * BLOCK];
        let keys: Vec<_> = Key::chain(Fingerprint::of([]), Owner::default(), &tokens).collect();
        let held = |n| Held { cells: Bytes::from(vec![0; n]), origin: Origin::Memory };
        let mut memory = Memory::new(10);
        keys[..2].iter().for_each(|&key| memory.put(key, held(5)));
        assert!(memory.touch(&keys[0]));
        memory.put(keys[2], held(5));
        assert_eq!([0, 1, 2].map(|i| memory.touch(&keys[i])), [true, false, true]);
        memory.put(keys[0], held(2));
        assert_eq!(memory.n_bytes(), 7, "a block that is held again is counted once");
        memory.put(keys[3], held(11));
        assert!(
            !memory.touch(&keys[3]) && memory.touch(&keys[2]),
            "too large: nothing goes for it"
        );
    }
}
