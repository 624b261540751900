//! A model made of a hash, with a cache that checks what it is told.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use medusa_llama::engine::slots::KvOp;
use medusa_llama::engine::{Forward, Rows, StepError};
use medusa_llama::llama::{LlamaError, SeqId, Token};
use medusa_llama::speculate::calibration::Calibration;
use medusa_llama::speculate::paths::fill;
use medusa_llama::speculate::{Draft, Origin, Tree, Worth};

/// The next token is a function of all tokens before it, so any mix-up of cells shows in the text.
/// Token 0 ends a text.
pub struct Stub {
    pub n_vocab: usize,
    cache: HashMap<SeqId, Vec<Token>>,
    logits: Vec<Vec<f32>>,
    /// For each row the tokens it sees, as numbers: all there is to know.
    hidden: Vec<Vec<f32>>,
    /// It keeps a state of each sequence, which goes back by at most so many tokens, once after each
    /// pass.
    pub n_rollback: Option<usize>,
    taken_back: HashSet<SeqId>,
    /// Of each so many blocks one is not restored.
    pub restores_but: Option<usize>,
    n_restored: usize,
    /// Fail the pass with this number, counted from 0.
    pub fail_at: Option<usize>,
    pub n_passes: usize,
}

impl Stub {
    pub fn new(n_vocab: usize) -> Self {
        Self {
            n_vocab,
            cache: HashMap::new(),
            logits: vec![],
            hidden: vec![],
            n_rollback: None,
            taken_back: HashSet::new(),
            restores_but: None,
            n_restored: 0,
            fail_at: None,
            n_passes: 0,
        }
    }

    /// The logits after these tokens.
    pub fn logits_of(n_vocab: usize, seen: &[Token]) -> Vec<f32> {
        let h = hash(seen);
        let mut logits: Vec<f32> = (0..n_vocab as u64)
            .map(|i| ((h.rotate_left(i as u32 % 64) ^ i) % 97) as f32 / 97.0)
            .collect();
        logits[favourite(n_vocab, seen).0 as usize] = 2.0;
        logits
    }

    /// What greedy decoding gives after `prompt`: up to `n` tokens, the end token included.
    pub fn greedy(n_vocab: usize, prompt: &[Token], n: usize) -> Vec<Token> {
        let mut tokens = prompt.to_vec();
        for _ in 0..n {
            let next = favourite(n_vocab, &tokens);
            tokens.push(next);
            if next == Token(0) {
                break;
            }
        }
        tokens.split_off(prompt.len())
    }
}

/// Heads that know the stub: their levels hold its favourites more often than not, among other
/// tokens.
pub struct Guess {
    pub n_vocab: usize,
    pub n_levels: usize,
    pub width: usize,
}

impl Draft for Guess {
    fn n_heads(&self) -> usize {
        self.n_levels
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        for (origin, tree) in origins.iter().zip(trees) {
            let mut tokens: Vec<Token> = origin.hidden.iter().map(|&t| Token(t as i32)).collect();
            tokens.push(origin.root());
            let n_levels = self.n_levels.min(origin.heads.max_depth);
            let mut level = |_| {
                let (right, h) = (favourite(self.n_vocab, &tokens), hash(&tokens));
                tokens.push(right);
                let mut offered: Vec<Token> = (0..self.width as u64)
                    .map(|i| Token(((h >> 7) + i) as i32 & 0xff).min_mod(self.n_vocab))
                    .collect();
                if h % 4 != 0 && !offered.contains(&right) {
                    offered[h as usize % self.width] = right;
                }
                offered.into_iter().zip((1..).map(|rank| 0.6 / rank as f32)).collect()
            };
            let levels: Vec<Vec<(Token, f32)>> = (0..n_levels).map(&mut level).collect();
            fill(tree, &levels, calibration, origin.heads.trust, worth.n_nodes);
        }
    }
}

/// A draft model that knows the stub as heads do.
pub struct GuessModel(pub Guess);

impl Draft for GuessModel {
    fn n_heads(&self) -> usize {
        self.0.n_levels
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        let origins: Vec<Origin<'_>> =
            origins.iter().map(|origin| Origin { heads: origin.model, ..*origin }).collect();
        self.0.draft(&origins, worth, calibration, trees);
    }
}

/// FNV-1a over the tokens.
fn hash(tokens: &[Token]) -> u64 {
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |h, t| (h ^ t.0 as u64).wrapping_mul(0x100_0000_01b3))
}

fn favourite(n_vocab: usize, tokens: &[Token]) -> Token {
    Token((hash(tokens) >> 20) as i32 & i32::MAX).min_mod(n_vocab)
}

impl Stub {
    /// Checks what may be done to a state.
    fn check_state(&mut self, op: KvOp, n_rollback: usize) {
        let n_cached = |seq| self.cache.get(&seq).map_or(0, Vec::len);
        match op {
            KvOp::Remove { seq, from: 0 } => drop(self.taken_back.remove(&seq)),
            KvOp::Remove { seq, from } if from < n_cached(seq) => {
                assert!(n_cached(seq) - from <= n_rollback, "{op:?} goes back too far");
                assert!(self.taken_back.insert(seq), "{op:?} goes back twice");
            }
            KvOp::Remove { .. } => {}
            KvOp::Share { from, to, start, end } => {
                assert!((start, end) == (0, n_cached(from)), "{op:?} shares a part of a state");
                assert!(!self.taken_back.contains(&from), "{op:?} shares what was taken back");
                assert_eq!(n_cached(to), 0, "{op:?} shares into a state");
            }
        }
    }
}

trait MinMod {
    fn min_mod(self, n: usize) -> Token;
}

impl MinMod for Token {
    fn min_mod(self, n: usize) -> Token {
        Token(self.0 % n as i32)
    }
}

impl Forward for Stub {
    fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    fn forward(&mut self, rows: &Rows) -> Result<(), StepError> {
        assert!(!rows.is_empty());
        self.n_passes += 1;
        self.logits.clear();
        self.hidden.clear();
        for row in rows.iter() {
            for seq in row.seqs {
                let cached = self.cache.entry(*seq).or_default();
                assert_eq!(row.pos, cached.len(), "positions follow on what is cached for {seq:?}");
                cached.push(row.token);
                self.taken_back.remove(seq);
            }
            let seen = &self.cache[&row.seqs[0]];
            assert!(
                row.seqs.iter().all(|s| self.cache[s] == *seen),
                "ids of a row have the same past"
            );
            let mut logits = vec![];
            if row.output {
                logits = Self::logits_of(self.n_vocab, seen);
            }
            self.logits.push(logits);
            self.hidden.push(seen.iter().map(|t| t.0 as f32).collect());
        }
        if self.fail_at == Some(self.n_passes - 1) {
            return Err(
                LlamaError::Decode { code: -3, reason: "the stub was told to".into() }.into()
            );
        }
        Ok(())
    }

    fn logits(&self, row: usize) -> Result<&[f32], StepError> {
        let logits = self.logits.get(row).filter(|l| !l.is_empty());
        logits.map(Vec::as_slice).ok_or(StepError::NoLogits(row))
    }

    fn hidden(&self, row: usize) -> Result<&[f32], StepError> {
        self.logits(row)?;
        Ok(&self.hidden[row])
    }

    fn apply(&mut self, op: KvOp) -> Result<(), StepError> {
        if let Some(n_rollback) = self.n_rollback {
            self.check_state(op, n_rollback);
        }
        match op {
            KvOp::Remove { seq, from } => self.cache.entry(seq).or_default().truncate(from),
            KvOp::Share { from, to, start, end } => {
                let given = self.cache[&from][..end].to_vec();
                let old = self.cache.entry(to).or_default();
                assert_eq!(*old, given[..start], "what the receiver has is what stands before");
                *old = given;
            }
        }
        Ok(())
    }

    fn save(&mut self, seq: SeqId, positions: Range<usize>) -> Result<Vec<u8>, StepError> {
        Ok(self.cache[&seq][positions].iter().flat_map(|token| token.0.to_le_bytes()).collect())
    }

    fn restore(&mut self, seq: SeqId, wanted: Range<usize>, cells: &[u8]) -> Result<(), StepError> {
        self.n_restored += 1;
        if self.restores_but.is_some_and(|n| self.n_restored.is_multiple_of(n)) {
            return Err(StepError::NoSpare);
        }
        let cells: Vec<Token> = cells
            .chunks(4)
            .map(|token| Token(i32::from_le_bytes(token.try_into().unwrap())))
            .collect();
        let cached = self.cache.entry(seq).or_default();
        assert_eq!(cached.len(), wanted.start, "cells follow on what is cached");
        cached.extend(&cells[cells.len() - wanted.len()..]);
        Ok(())
    }

    fn piece(&self, token: Token, _: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{} ", token.0).as_bytes());
    }

    fn is_end(&self, token: Token) -> bool {
        token == Token(0)
    }
}
