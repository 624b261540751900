//! Prefixes that outlive the cache: after a restart, in another server, from a folder and from moto's stub
//! of S3 (which `make s3` fetches), and when what is stored is damaged.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::Server;
use medusa_llama::llama::Token;
use medusa_llama::prefixes::key::{BLOCK, Fingerprint, Key, Owner};
use medusa_llama::prefixes::store::{Counters, Place, Store, StoreParams};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use serde_json::{Value, json};
use tempfile::tempdir;

/// A prompt of about 1,500 tokens, which `n` tells apart from others from the first token on.
fn prompt(n: usize) -> String {
    prompt_of(n, 6600)
}

fn prompt_of(n: usize, n_chars: usize) -> String {
    let prose = include_str!("data/prose.txt");
    format!("{n} {}", prose.chars().skip(100 * n).take(n_chars).collect::<String>())
}

fn ask(server: &Server, prompt: &str) -> Value {
    let answer = server
        .generate(&json!({ "prompt": prompt, "raw": true, "temperature": 0, "max_tokens": 24 }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// What an answer took from where.
fn counts(answer: &Value) -> [u64; 4] {
    let usage = &answer["usage"];
    let restored = &usage["restored_tokens"];
    [&usage["prompt_tokens"], &usage["cached_tokens"], &restored["memory"], &restored["store"]]
        .map(|n| n.as_u64().unwrap_or(0))
}

fn start(store: &str, more: &[&str], env: &[(&str, &str)]) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    command
        .args(["serve", "--ctx", "2048", "--batch-size", "2", "--prefix-store", store])
        .args(more);
    command.arg("--model").arg(common::model_path()).envs(env.iter().copied());
    let server = Server::launch(&mut command);
    server.wait(|| server.get("/ready").status == 200);
    server
}

/// Answers a prompt and ends once all its blocks are stored.
fn store(server: Server, prompt: &str) -> Value {
    let answer = ask(&server, prompt);
    assert_eq!(counts(&answer)[1..], [0, 0, 0], "nothing is known at first");
    server.terminate();
    assert!(server.wait_for_exit().success());
    answer
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let mut files: Vec<_> = entries(folder).iter().flat_map(|below| entries(below)).collect();
    files.sort();
    files
}

fn whole_blocks(n_tokens: u64) -> u64 {
    (n_tokens - 1) / BLOCK as u64 * BLOCK as u64
}

#[test]
fn a_restart_finds_what_was_stored_and_answers_the_same() {
    let folder = tempdir().unwrap();
    let place = folder.path().join("made/if/need/be");
    let place = place.to_str().unwrap();
    let first = store(start(place, &[], &[]), &prompt(1));
    let [n_prompt, ..] = counts(&first);
    assert!(n_prompt > 1400, "{n_prompt}");

    let server = start(place, &[], &[]);
    let second = ask(&server, &prompt(1));
    assert_eq!(second["generated_text"], first["generated_text"]);
    let n = whole_blocks(n_prompt);
    assert_eq!(counts(&second), [n_prompt, n, 0, n]);
    assert_eq!(server.metric("prefix_cache_restored_total", &[r#"source="store""#]), n as f64);
    assert_eq!(server.metric("prefix_blocks_skipped_total", &[]), 0.0);
    // The answer's beginning is stored, too: the next turn of a talk goes on from it. The cache has it
    // itself now.
    let longer = format!("{}{}", prompt(1), second["generated_text"].as_str().unwrap());
    let [_, n_cached, _, n_restored] = counts(&ask(&server, &longer));
    assert!(n_cached > n_prompt && n_restored == 0);

    // Cells of another type are others.
    let other = start(place, &["--cache-type-k", "q8_0"], &[]);
    assert_eq!(counts(&ask(&other, &prompt(1)))[1..], [0, 0, 0]);
}

#[test]
fn one_clients_prefixes_are_not_restored_for_another() {
    let folder = tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let asked = |server: &Server, key: &str| {
        let key = format!("Authorization: Bearer {key}");
        let body = json!({ "prompt": prompt(2), "raw": true, "max_tokens": 4 }).to_string();
        let answer = server.ask("POST /generate", &[&key], body.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
        counts(&answer.json())[3]
    };
    let server = start(place, &["--api-key", "one,two"], &[]);
    assert_eq!(asked(&server, "one"), 0);
    server.terminate();
    assert!(server.wait_for_exit().success());
    // Keys may come in another order: it is not their number that counts.
    let server = start(place, &["--api-key", "two,one"], &[]);
    assert_eq!(asked(&server, "two"), 0);
    server.terminate();
    assert!(server.wait_for_exit().success());
    let server = start(place, &["--api-key", "two,one"], &[]);
    assert!(asked(&server, "one") > 1400);
}

#[test]
fn damaged_blocks_are_skipped_and_what_is_before_them_is_used() {
    let folder = tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let short = prompt_of(3, 1600);
    let first = store(start(place, &[], &[]), &short);
    let stored = files(folder.path());
    let whole: Vec<Vec<u8>> = stored.iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(stored.len() as u64 > counts(&first)[0] / BLOCK as u64 - 1);

    let flip = |block: &[u8], at: usize| {
        let mut block = block.to_vec();
        block[at] ^= 4;
        block
    };
    type Damage<'a> = (&'a str, &'a dyn Fn(&[u8]) -> Vec<u8>);
    let damages: [Damage<'_>; 5] = [
        ("truncated", &|block| block[..block.len() / 2].to_vec()),
        ("flipped", &|block| flip(block, block.len() / 3)),
        ("foreign", &|block| [b"GGUF", &block[4..]].concat()),
        ("newer", &|block| flip(block, 8)),
        ("empty", &|_| vec![]),
    ];
    for (what, damage) in damages {
        for (file, block) in stored.iter().zip(&whole) {
            fs::write(file, damage(block)).unwrap();
        }
        let server = start(place, &[], &[]);
        let answer = ask(&server, &short);
        assert_eq!(answer["generated_text"], first["generated_text"], "{what}");
        assert_eq!(counts(&answer)[1..], [0, 0, 0], "{what}");
        assert!(server.log().contains("a stored block is skipped"), "{what}: {}", server.log());
        assert!(server.metric("prefix_blocks_skipped_total", &[]) >= 1.0, "{what}");
        drop(server); // killed: what it would write anew is not asked for
    }
    // One in the middle: those before it are used.
    for (file, block) in stored.iter().zip(&whole) {
        fs::write(file, block).unwrap();
    }
    fs::write(&stored[stored.len() / 2], b"").unwrap();
    let server = start(place, &[], &[]);
    let answer = ask(&server, &short);
    assert_eq!(answer["generated_text"], first["generated_text"]);
    assert!(
        counts(&answer)[3] < counts(&first)[0] && counts(&answer)[3].is_multiple_of(BLOCK as u64)
    );
}

#[test]
fn what_leaves_a_full_cache_comes_back_from_memory() {
    let args = ["--ctx", "2048", "--batch-size", "1", "--kv-cells", "2048", "--cache-ram", "200"];
    let server = Server::start(&args);
    let first = ask(&server, &prompt(4));
    let n_blocks = whole_blocks(counts(&first)[0]) / BLOCK as u64;
    server.wait(|| server.metric("prefix_blocks_saved_total", &[]) >= n_blocks as f64);
    ask(&server, &prompt(5)); // there is no room for both
    let again = ask(&server, &prompt(4));
    assert_eq!(again["generated_text"], first["generated_text"]);
    let [n_prompt, n_cached, memory, store] = counts(&again);
    assert_eq!([n_cached, memory, store], [whole_blocks(n_prompt), whole_blocks(n_prompt), 0]);
    assert_eq!(
        server.metric("prefix_cache_restored_total", &[r#"source="memory""#]),
        memory as f64
    );
    assert!(server.metric("prefix_memory_bytes", &[]) <= f64::from(200 << 20));
    // Whoever asks for no reuse gets none.
    let alone = json!({ "prompt": prompt(5), "raw": true, "max_tokens": 4, "cache_prompt": false });
    assert_eq!(counts(&server.generate(&alone).json())[1..], [0, 0, 0]);
}

#[test]
fn settings_that_cannot_hold_are_refused() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let file = folder.path().join("file/below");
    for (args, why) in [
        (vec!["--prefix-store", "gs://bucket"], "must be a folder or s3://BUCKET[/PATH]"),
        (vec!["--prefix-store", "x", "--cache-ram", "0"], "CACHE_RAM must not be 0"),
        (vec!["--prefix-store", "x", "--kv", "streams"], "nor KV_LAYOUT streams"),
        (vec!["--prefix-store", file.to_str().unwrap()], "PREFIX_STORE is"),
    ] {
        let model = common::model_path();
        let model = ["serve", "--port", "0", "-m", model.to_str().unwrap()];
        let output = common::run(&[&model[..], &args].concat(), &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{args:?}: {said}");
    }
}

/// moto's server on a free port, killed when dropped.
struct S3(Child, u16);

impl S3 {
    fn start() -> Self {
        let moto = Path::new(".tools/s3");
        assert!(moto.join("moto").is_dir(), "moto is missing: run `make s3`");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new("python3")
            .args(["-m", "moto.server", "-p", &port.to_string()])
            .env("PYTHONPATH", moto)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let this = Self(child, port);
        for _ in 0..600 {
            if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return this;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("moto does not listen");
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn another_server_finds_prefixes_in_a_stub_of_s3() {
    let s3 = S3::start();
    let endpoint = format!("http://127.0.0.1:{}", s3.1);
    let env = [
        ("AWS_ENDPOINT", endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "any"),
        ("AWS_SECRET_ACCESS_KEY", "any"),
    ];
    let address = ([127, 0, 0, 1], s3.1).into();
    let made = common::exchange(address, &common::request_bytes("PUT /prefixes", &[], b""));
    assert_eq!(made.status, 200, "{}", made.text());

    let one = start("s3://prefixes/of/a/model", &[], &env);
    let first = store(one, &prompt(6));
    let other = start("s3://prefixes/of/a/model", &[], &env);
    let second = ask(&other, &prompt(6));
    assert_eq!(second["generated_text"], first["generated_text"]);
    let n = whole_blocks(counts(&first)[0]);
    assert_eq!(counts(&second)[1..], [n, 0, n]);

    // A store that is away costs nothing but itself.
    drop(s3);
    let third = ask(&other, &prompt(7));
    assert_eq!(counts(&third)[1..], [0, 0, 0]);
    assert!(other.log().contains("the prefix store fails"), "{}", other.log());
}

const WRITER: &str = "MEDUSA_PREFIX_WRITER";

fn open(folder: &Path, most: u64) -> (Store, Counters) {
    let (written, skipped, n_bytes) = (Counter::default(), Counter::default(), Gauge::default());
    let counters = Counters { written, skipped, n_bytes };
    let params = StoreParams { place: Place::Folder(folder.into()), most };
    (Store::open(&params, Fingerprint::of([]), counters.clone()).unwrap(), counters)
}

/// The key of the `n`th block, and its cells.
fn block(n: usize) -> (Key, Vec<u8>) {
    let tokens = [Token(n as i32); BLOCK];
    let key = Key::chain(Fingerprint::of([]), Owner::default(), &tokens).next().unwrap();
    (key, (0..200_000).map(|i| (i * 31 + n) as u8).collect())
}

/// Not a test of its own: writes blocks for ever, and says which are written.
#[test]
fn writer() {
    let Some(folder) = std::env::var_os(WRITER) else { return };
    let (store, _) = open(Path::new(&folder), u64::MAX);
    let is_whole = |file: &PathBuf| !file.to_string_lossy().contains('#');
    let from = files(Path::new(&folder)).iter().filter(|file| is_whole(file)).count();
    for n in from.. {
        let (key, cells) = block(n);
        store.write(key, cells.into());
        assert!(store.flush(Duration::from_secs(60)));
        println!("written {n}");
    }
}

/// `PREFIX_KILLS` sets how often; the default is short.
#[test]
fn writers_that_are_killed_lose_nothing_that_was_whole() {
    let n_kills: usize = std::env::var("PREFIX_KILLS").map_or(40, |n| n.parse().unwrap());
    let folder = tempdir().unwrap();
    let mut written = 0;
    for kill in 0..n_kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--nocapture"])
            .env(WRITER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok).filter(|line| line.contains("written "));
        let mut last = lines.next().expect("a block is written");
        // Some blocks later, somewhere in the next one's writing.
        (0..kill % 4).for_each(|_| last = lines.next().unwrap());
        std::thread::sleep(Duration::from_micros(37 * (kill as u64 % 29)));
        child.kill().unwrap();
        child.wait().unwrap();
        last = lines.last().unwrap_or(last);
        written = last.rsplit(' ').next().unwrap().parse::<usize>().unwrap() + 1;
    }
    let (store, counters) = open(folder.path(), u64::MAX);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for n in 0..written {
        let (key, cells) = block(n);
        let read = runtime.block_on(store.read(key));
        assert!(read.is_some_and(|read| read == cells), "block {n} of {written}");
    }
    assert_eq!(counters.skipped.get(), 0, "what has a block's name is whole");
    println!("{n_kills} kills, {written} blocks, all whole");
}

#[test]
fn a_store_keeps_to_its_limit_and_drops_what_is_used_least() {
    let folder = tempdir().unwrap();
    let most = 5 * 201_000;
    let (store, counters) = open(folder.path(), most);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let write = |store: &Store, n: usize| {
        let (key, cells) = block(n);
        store.write(key, cells.into());
        assert!(store.flush(Duration::from_secs(60)));
    };
    (0..5).for_each(|n| write(&store, n));
    write(&store, 0); // a use
    write(&store, 5);
    let there = |store: &Store| -> Vec<bool> {
        (0..6).map(|n| runtime.block_on(store.read(block(n).0)).is_some()).collect()
    };
    assert_eq!(there(&store), [true, false, true, true, true, true]);
    assert_eq!(
        counters.n_bytes.get() as u64,
        files(folder.path()).iter().map(|f| fs::metadata(f).unwrap().len()).sum::<u64>()
    );
    // Another process counts what it finds, and what other versions of the program left.
    fs::create_dir(folder.path().join("other")).unwrap();
    fs::write(folder.path().join("other/block"), vec![0; 500_000]).unwrap();
    drop(store);
    let (store, counters) = open(folder.path(), most);
    write(&store, 6);
    assert!(counters.n_bytes.get() as u64 <= most);
    let n: u64 = files(folder.path()).iter().map(|f| fs::metadata(f).unwrap().len()).sum();
    assert!(n <= most, "{n}");
}
