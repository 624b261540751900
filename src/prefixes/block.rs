//! A block as it is stored: a header, the cells as llama.cpp writes them, and a digest of both.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `MLPREFIX` |
//! | 4 | version, little-endian |
//! | 4 | tokens of the block |
//! | 32 | its [`Key`] |
//! | 8 | bytes of the cells |
//! | … | the cells |
//! | 32 | SHA-256 of all before |

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::key::{BLOCK, Key};

const MAGIC: &[u8; 8] = b"MLPREFIX";
/// Of this form of block.
const VERSION: u32 = 1;
const HEADER: usize = 8 + 4 + 4 + 32 + 8;
const DIGEST: usize = 32;

/// Why bytes are no block that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// It ends early, or goes on after its end.
    #[error("it has {found} bytes, where {expected} are expected")]
    Length {
        /// Bytes that there are.
        found: usize,
        /// Bytes that there should be, at least.
        expected: usize,
    },
    /// Its beginning is that of something else.
    #[error("it is no block of a prefix")]
    Foreign,
    /// A later version of this program wrote it.
    #[error("its form is version {0}, where this program knows up to {VERSION}")]
    Newer(u32),
    /// It was written under another name.
    #[error("it is another block than its name says")]
    Misnamed,
    /// A bit differs from what was written.
    #[error("its digest does not match its contents")]
    Broken,
}

/// A block with these cells.
pub fn encode(key: &Key, cells: &[u8]) -> Vec<u8> {
    let mut block = Vec::with_capacity(HEADER + cells.len() + DIGEST);
    block.extend(MAGIC);
    block.extend(VERSION.to_le_bytes());
    block.extend((BLOCK as u32).to_le_bytes());
    block.extend(key.bytes());
    block.extend((cells.len() as u64).to_le_bytes());
    block.extend(cells);
    let digest = Sha256::digest(&block);
    block.extend(digest);
    block
}

/// The cells of a block that was stored under `key`.
///
/// # Errors
/// Why it cannot be used.
pub fn decode(key: &Key, block: &Bytes) -> Result<Bytes, BlockError> {
    let found = block.len();
    if !block.starts_with(&MAGIC[..found.min(MAGIC.len())]) {
        return Err(BlockError::Foreign);
    }
    if found < HEADER + DIGEST {
        return Err(BlockError::Length { found, expected: HEADER + DIGEST });
    }
    let four = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"));
    let version = four(8);
    if version > VERSION {
        return Err(BlockError::Newer(version));
    }
    let n_cells = u64::from_le_bytes(block[48..56].try_into().expect("eight bytes"));
    let n_cells = usize::try_from(n_cells).unwrap_or(usize::MAX);
    let expected = n_cells.saturating_add(HEADER + DIGEST);
    if found != expected {
        return Err(BlockError::Length { found, expected });
    }
    let (written, digest) = block.split_at(found - DIGEST);
    if Sha256::digest(written)[..] != *digest {
        return Err(BlockError::Broken);
    }
    if block[16..48] != key.bytes()[..] || four(12) as usize != BLOCK {
        return Err(BlockError::Misnamed);
    }
    Ok(block.slice(HEADER..HEADER + n_cells))
}

#[cfg(test)]
mod tests {
    use super::super::key::{Fingerprint, Owner};
    use super::*;
    use crate::llama::Token;

    #[test]
    fn what_is_not_a_whole_block_of_its_name_is_refused() {
        let tokens = [Token(1); 2 * BLOCK];
        let keys: Vec<_> = Key::chain(Fingerprint::of([]), Owner::default(), &tokens).collect();
        let whole = encode(&keys[0], b"some cells");
        assert_eq!(decode(&keys[0], &whole.clone().into()).unwrap(), &b"some cells"[..]);
        assert_eq!(decode(&keys[1], &whole.clone().into()), Err(BlockError::Misnamed));
        for n in 0..whole.len() {
            let cut = decode(&keys[0], &Bytes::copy_from_slice(&whole[..n]));
            assert!(matches!(cut, Err(BlockError::Length { .. })), "{n} bytes: {cut:?}");
        }
        for bit in 0..8 * whole.len() {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&keys[0], &flipped.into()).is_err(), "bit {bit}");
        }
        let mut newer = whole.clone();
        newer[8] = 2;
        assert_eq!(decode(&keys[0], &newer.into()), Err(BlockError::Newer(2)));
        assert_eq!(decode(&keys[0], &Bytes::from_static(b"GGUF")), Err(BlockError::Foreign));
    }
}
