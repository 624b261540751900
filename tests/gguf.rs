//! GGUF files that are no models: each is refused with one line that says why, and exit status 1.
//! None ends the process with a signal.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};

use common::gguf::{ARRAY, Bytes, File, U32, random, tiny};
use common::run;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const F32: u32 = 6;

/// Changes that make a file no model.
trait Spoiled: Sized {
    fn cut(self, key: &str, n: u64) -> Self;
    fn with_token_twice(self) -> Self;
}

impl Spoiled for File {
    /// With the first `n` items of an array of numbers or texts.
    fn cut(mut self, key: &str, n: u64) -> Self {
        let (_, _, value) = self.meta.iter_mut().find(|(k, ..)| k == key).unwrap();
        let mut rest = Bytes(value);
        let (of, _) = (rest.u32(), rest.u64());
        let items: Vec<u8> = (0..n).flat_map(|_| rest.value(of)).collect();
        *value = [&of.to_le_bytes()[..], &n.to_le_bytes(), &items].concat();
        self
    }

    /// With a token in another's place, too.
    fn with_token_twice(mut self) -> Self {
        let tokens = self.meta.iter_mut().find(|(k, ..)| k == "tokenizer.ggml.tokens").unwrap();
        let at = tokens.2.windows(6).position(|w| w == b"<0x41>").unwrap();
        tokens.2[at + 3..at + 5].copy_from_slice(b"42");
        self
    }
}

/// Loads a file and generates a token: `Ok` where that works, else the error's line.
fn try_out(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).unwrap();
    let path = path.to_str().unwrap();
    let args = ["generate", "-m", path, "-p", "ab cd", "-n", "1", "-t", "1", "--ctx", "64"];
    let output = run(&args, &[("LOG_LEVEL", "ERROR")]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(1) => {
            let is_error = |line: &&str| line.starts_with("error") || line.contains("ERROR");
            let lines: Vec<&str> = text.lines().filter(is_error).collect();
            assert!(lines.len() == 1 && text.lines().count() == 1, "one line says why: {text}");
            assert!(lines[0].contains(path), "{text}");
            Err(lines[0].to_owned())
        }
        _ => panic!("{:?}: {text}", output.status),
    }
}

/// Name, dimensions, type, and offset.
type TensorInfo = (String, Vec<u64>, u32, u64);

#[test]
fn a_file_that_is_no_model_is_refused_in_one_line_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("bad.gguf");
    let good = tiny(folder.path());
    assert_eq!(try_out(&path, &good.bytes()), Ok(()));
    let file = || good.clone();
    let without = |key: &str| {
        let mut file = file();
        file.meta.retain(|(k, ..)| k != key);
        file
    };
    let with_tensor = |change: &dyn Fn(&mut TensorInfo)| {
        let mut file = file();
        change(&mut file.tensors[0]);
        file
    };
    for (bad, reason) in [
        (file().with_text("tokenizer.ggml.model", "none"), "no vocabulary"),
        (file().with_text("tokenizer.ggml.model", "odd"), "odd"),
        (file().with_token_twice(), "twice"),
        (file().with_number("llama.block_count", 0), "block_count is 0"),
        (file().with_number("llama.block_count", 1_000_000_000), "block_count is 1000000000"),
        (file().with_number("llama.block_count", 3), "blk.2"),
        (file().with_number("llama.attention.head_count", 0), "head_count is 0"),
        (file().with_number("llama.attention.head_count_kv", 0), "head_count_kv is 0"),
        (file().with_number("llama.attention.head_count_kv", 3), "multiple"),
        (file().with_number("llama.embedding_length", 0), "embedding_length is 0"),
        (file().with_number("llama.embedding_length", u32::MAX), "embedding_length is 4294967295"),
        (file().with_number("llama.context_length", u32::MAX), "context_length is 4294967295"),
        (file().with_number("llama.rope.dimension_count", 7), "n_rot: 7"),
        (file().with_number("llama.rope.dimension_count", 0), "dimension_count is 0"),
        (file().with_text("llama.rope.scaling.type", "odd"), "rope_scaling_type"),
        (file().with_number("llama.expert_count", 1 << 30), "n_expert"),
        (file().with_text("general.architecture", "odd"), "unknown model architecture"),
        (file().cut("tokenizer.ggml.scores", 5), "scores"),
        (file().cut("tokenizer.ggml.token_type", 5), "toktypes"),
        (file().cut("tokenizer.ggml.tokens", 5), "token_embd.weight"),
        (without("tokenizer.ggml.tokens"), "vocab"),
        (without("llama.block_count"), "llama.block_count"),
        (without("general.architecture"), "unknown model architecture"),
        (with_tensor(&|tensor| tensor.1[0] = 0), "offset"),
        (with_tensor(&|tensor| tensor.1[1] = 1 << 60), "token_embd.weight"),
        (with_tensor(&|tensor| tensor.2 = 99), "type 99"),
        (with_tensor(&|tensor| tensor.3 = 1 << 40), "offset"),
        (with_tensor(&|tensor| tensor.0 = "other".into()), "token_embd.weight"),
    ] {
        let line = try_out(&path, &bad.bytes()).expect_err(reason);
        assert!(line.contains(reason), "{reason}: {line}");
    }
    let bytes = good.bytes();
    let header = bytes.len() - good.values.len();
    for (bad, reason) in [
        (&bytes[..bytes.len() - 1], "file"),
        (&bytes[..header - 100], "not a GGUF file"),
        (&bytes[..3], "magic"),
        (&b""[..], "magic"),
        (&b"GGML"[..], "GGML"),
    ] {
        let line = try_out(&path, bad).expect_err(reason);
        assert!(line.contains(reason), "{reason}: {line}");
    }
}

/// A number that a header should not have.
fn odd_number() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(1),
        0u32..20,
        Just(i32::MAX as u32),
        Just(u32::MAX),
        Just(1 << 30),
        any::<u32>(),
    ]
}

/// A file with one thing changed.
fn changed(good: File) -> impl Strategy<Value = Vec<u8>> {
    let keys: Vec<String> = good.meta.iter().map(|(key, ..)| key.clone()).collect();
    let numbers: Vec<String> =
        good.meta.iter().filter(|(_, kind, _)| *kind == U32).map(|(key, ..)| key.clone()).collect();
    let more = [
        "expert_count",
        "expert_used_count",
        "nextn_predict_layers",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
        "rope.scaling.original_context_length",
        "embedding_length_out",
        "pooling_type",
        "expert_group_count",
    ];
    let numbers = numbers.into_iter().chain(more.map(|key| format!("llama.{key}")));
    let numbers: Vec<String> = numbers.collect();
    let (n_tensors, n_bytes) = (good.tensors.len(), good.bytes().len() - good.values.len());
    let file = move || good.clone();
    let number = (prop::sample::select(numbers), odd_number()).prop_map({
        let file = file.clone();
        move |(key, n)| file().with_number(&key, n).bytes()
    });
    let key = (prop::sample::select(keys), 0usize..4, odd_number()).prop_map({
        let file = file.clone();
        move |(key, how, n)| {
            let mut file = file();
            let i = file.meta.iter().position(|(k, ..)| *k == key).unwrap();
            match how {
                0 => drop(file.meta.remove(i)),
                1 => file.set(&key, F32, n.to_le_bytes().to_vec()),
                2 => file = file.with_text(&key, "odd"),
                _ if file.meta[i].1 == ARRAY => file = file.cut(&key, u64::from(n % 300)),
                _ => file.set(&key, ARRAY, [U32.to_le_bytes(), [0; 4], [0; 4]].concat()),
            }
            file.bytes()
        }
    });
    let tensor = (0..n_tensors, 0usize..5, odd_number()).prop_map({
        let file = file.clone();
        move |(i, how, n)| {
            let mut file = file();
            let tensor = &mut file.tensors[i];
            match how {
                0 => tensor.1[0] = n.into(),
                1 => *tensor.1.last_mut().unwrap() = u64::from(n) << 16,
                2 => tensor.2 = n % 50,
                3 => tensor.3 = n.into(),
                _ => drop(file.tensors.remove(i)),
            }
            file.bytes()
        }
    });
    let byte = (0..n_bytes, any::<u8>()).prop_map({
        move |(at, value)| {
            let mut bytes = file().bytes();
            bytes[at] = value;
            bytes
        }
    });
    prop_oneof![4 => number, 3 => key, 3 => tensor, 2 => byte]
}

#[test]
fn no_change_of_a_header_ends_the_process_with_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    let times: usize = std::env::var("FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[5; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut n_refused = 0;
    for name in ["tiny", "tiny-gemma3", "tiny-qwen35", "tiny-rwkv7"] {
        let strategy = changed(random(folder.path(), name));
        for _ in 0..40 * times {
            let bytes = strategy.new_tree(&mut runner).unwrap().current();
            n_refused += usize::from(try_out(&path, &bytes).is_err());
        }
    }
    assert!(n_refused > 20 * times, "{n_refused}");
}
