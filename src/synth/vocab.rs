//! A made-up vocabulary that covers any text: three control tokens, all bytes, and then strings of
//! lower-case letters and spaces, the shortest first, up to the vocabulary's size. Pure.
//!
//! English text takes about one token for three letters with a vocabulary of Vicuna's size.

use crate::llama::Meta;

/// Control tokens and bytes, which come first.
pub(super) const N_SPECIAL: usize = 3 + 256;

/// llama.cpp's kinds of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// A space, as SentencePiece writes it, and letters.
const ALPHABET: &str = "▁abcdefghijklmnopqrstuvwxyz";

/// The metadata of a vocabulary of `n` tokens, more than [`N_SPECIAL`].
pub(super) fn metadata(n: usize) -> [(&'static str, Meta); 9] {
    let (tokens, kinds): (Vec<String>, Vec<i32>) = (0..n).map(token).unzip();
    // Earlier pairs are merged first.
    let scores = (0..n).map(|i| -(i as f32)).collect();
    [
        ("tokenizer.ggml.model", Meta::Text("llama".into())),
        ("tokenizer.ggml.pre", Meta::Text("default".into())),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.scores", Meta::Floats(scores)),
        ("tokenizer.ggml.token_type", Meta::Numbers(kinds)),
        ("tokenizer.ggml.unknown_token_id", Meta::Number(0)),
        ("tokenizer.ggml.bos_token_id", Meta::Number(1)),
        ("tokenizer.ggml.eos_token_id", Meta::Number(2)),
        ("tokenizer.ggml.padding_token_id", Meta::Number(0)),
    ]
}

/// The `i`-th token and its kind.
fn token(i: usize) -> (String, i32) {
    match i {
        0 => ("<unk>".into(), UNKNOWN),
        1 => ("<s>".into(), CONTROL),
        2 => ("</s>".into(), CONTROL),
        3..N_SPECIAL => (format!("<0x{:02X}>", i - 3), BYTE),
        _ => (word(i - N_SPECIAL), NORMAL),
    }
}

/// The `i`-th string over the alphabet, shorter ones first.
fn word(mut i: usize) -> String {
    let letters: Vec<char> = ALPHABET.chars().collect();
    let mut n_of_length = letters.len();
    let mut length = 1;
    while i >= n_of_length {
        i -= n_of_length;
        n_of_length *= letters.len();
        length += 1;
    }
    let mut word = vec![];
    for _ in 0..length {
        word.push(letters[i % letters.len()]);
        i /= letters.len();
    }
    word.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_all_different_and_come_in_order_of_length() {
        let words: Vec<String> = (0..25_000).map(word).collect();
        assert_eq!([&words[0], &words[26], &words[27], &words[28]], ["▁", "z", "▁▁", "▁a"]);
        assert_eq!(
            (words[27 + 729].as_str(), words[27 + 729 + 27 * 729].as_str()),
            ("▁▁▁", "▁▁▁▁")
        );
        let mut once = words.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), words.len());
        assert_eq!(token(3 + 10), ("<0x0A>".into(), BYTE));
    }
}
