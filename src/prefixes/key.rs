//! What a block is found by: a digest of everything that its cells depend on.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::llama::Token;

/// Tokens of a block: few, so that little of a prompt's end is computed again, and enough for cells
/// of a megabyte or more, which disks and networks move well.
pub const BLOCK: usize = 64;

/// What computes cells: model, adapters, kernels, processor, types and context settings. Cells are
/// used only where they would be computed to the same bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of all that matters, each part as bytes; their order matters, too.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self(digest(parts))
    }
}

impl fmt::Display for Fingerprint {
    /// Its first half in hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0[..16], f)
    }
}

/// Whose a prefix is. A block of one is never used for another: the time to a first token would tell
/// what others have asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner([u8; 32]);

impl Owner {
    /// Who has a secret. The secret cannot be found by its owner's names.
    pub fn with(secret: &[u8]) -> Self {
        Self(digest([b"owner".as_slice(), secret]))
    }
}

/// Names a block: its tokens, all tokens before them, what computed them and whose they are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The keys of a prompt's whole blocks, from its beginning.
    pub fn chain(
        fingerprint: Fingerprint,
        owner: Owner,
        tokens: &[Token],
    ) -> impl Iterator<Item = Self> {
        let root = digest([&fingerprint.0[..], &owner.0[..]]);
        tokens.chunks_exact(BLOCK).scan(root, |before, block| {
            let mut hasher = Sha256::new_with_prefix(*before);
            block.iter().for_each(|token| hasher.update(token.0.to_le_bytes()));
            *before = hasher.finalize().into();
            Some(Self(*before))
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Key {
    /// In hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

/// Of parts that cannot run into one another.
fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(model: &str, owner: Owner, n: i32) -> Vec<String> {
        let tokens: Vec<_> = (0..n).map(Token).collect();
        let fingerprint = Fingerprint::of([model.as_bytes()]);
        Key::chain(fingerprint, owner, &tokens).map(|key| key.to_string()).collect()
    }

    #[test]
    fn a_key_depends_on_all_tokens_before_on_the_model_and_on_the_owner() {
        let (nobody, somebody) = (Owner::default(), Owner::with(b"key"));
        let all = keys("a", nobody, 200);
        assert_eq!((all.len(), all[0].len()), (3, 64), "a part of a block has no key");
        assert_eq!(keys("a", nobody, 130), all[..2]);
        for other in [keys("b", nobody, 200), keys("a", somebody, 200)] {
            assert!(all.iter().all(|key| !other.contains(key)));
        }
        let mut tokens: Vec<_> = (0..200).map(Token).collect();
        tokens[0] = Token(7);
        let changed = Key::chain(Fingerprint::of([&b"a"[..]]), nobody, &tokens);
        assert!(changed.zip(&all).all(|(key, other)| key.to_string() != *other));
        let [a, b] =
            [["ab", "c"], ["a", "bc"]].map(|parts| Fingerprint::of(parts.map(str::as_bytes)));
        assert!(a != b, "parts do not run into one another");
    }
}
