//! A model made of a hash, with a cache that checks what it is told.

use std::collections::HashMap;

use medusa_llama::engine::slots::KvOp;
use medusa_llama::engine::{Forward, Row};
use medusa_llama::llama::{LlamaError, SeqId, Token};

/// The next token is a function of all tokens before it, so any mix-up of cells shows in the text. Token 0 ends a text.
pub struct Stub {
    pub n_vocab: usize,
    cache: HashMap<SeqId, Vec<Token>>,
    logits: Vec<Vec<f32>>,
    /// Fail the pass with this number, counted from 0.
    pub fail_at: Option<usize>,
    pub n_passes: usize,
}

impl Stub {
    pub fn new(n_vocab: usize) -> Self {
        Self { n_vocab, cache: HashMap::new(), logits: vec![], fail_at: None, n_passes: 0 }
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

/// FNV-1a over the tokens.
fn hash(tokens: &[Token]) -> u64 {
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |h, t| (h ^ t.0 as u64).wrapping_mul(0x100_0000_01b3))
}

fn favourite(n_vocab: usize, tokens: &[Token]) -> Token {
    Token((hash(tokens) >> 20) as i32 & i32::MAX).min_mod(n_vocab)
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

    fn forward(&mut self, rows: &[Row]) -> Result<(), LlamaError> {
        assert!(!rows.is_empty());
        self.n_passes += 1;
        self.logits.clear();
        for row in rows {
            let cached = self.cache.entry(row.seq).or_default();
            assert_eq!(row.pos, cached.len(), "positions follow on what is cached for {:?}", row.seq);
            cached.push(row.token);
            let mut logits = vec![];
            if row.output {
                let favourite = favourite(self.n_vocab, cached);
                let h = hash(cached);
                logits = (0..self.n_vocab as u64).map(|i| ((h.rotate_left(i as u32 % 64) ^ i) % 97) as f32 / 97.0).collect();
                logits[favourite.0 as usize] = 2.0;
            }
            self.logits.push(logits);
        }
        if self.fail_at == Some(self.n_passes - 1) {
            return Err(LlamaError::Decode { code: -3, reason: "the stub was told to".into() });
        }
        Ok(())
    }

    fn logits(&self, row: usize) -> Result<&[f32], LlamaError> {
        let logits = self.logits.get(row).filter(|l| !l.is_empty());
        logits.map(Vec::as_slice).ok_or_else(|| LlamaError::Misuse(format!("row {row} has no logits")))
    }

    fn apply(&mut self, op: KvOp) -> Result<(), LlamaError> {
        match op {
            KvOp::Remove { seq, from } => self.cache.entry(seq).or_default().truncate(from),
            KvOp::Share { from, to, n } => {
                let prefix = self.cache[&from][..n].to_vec();
                assert!(self.cache.insert(to, prefix).is_none_or(|old| old.is_empty()), "shared into an empty sequence");
            }
        }
        Ok(())
    }

    fn piece(&self, token: Token, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{} ", token.0).as_bytes());
    }

    fn is_end(&self, token: Token) -> bool {
        token == Token(0)
    }
}
