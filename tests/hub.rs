//! Models and heads by their names on the Hub, from a stub of it on loopback; and models in several
//! files.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::Server;
use common::gguf::tiny;
use common::hub::{Fault, REPO, Stub, sha256};
use tempfile::TempDir;

const FILE: &str = "tiny-F16.gguf";

/// The variables of the Hub, without those of whoever runs the tests.
fn command(stub_url: &str, home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    for name in [
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "MODEL_PATH",
        "MEDUSA_HEADS",
    ] {
        command.env_remove(name);
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", stub_url).env("NO_PROXY", "127.0.0.1");
    command.args(args);
    command
}

/// Generates two tokens, which loads the model.
fn generate(args: &[&str]) -> Vec<String> {
    let rest = ["--raw", "-p", "a", "-n", "2", "-c", "64", "--text-drafts", "off"];
    let all = ["generate"].iter().chain(args).chain(&rest);
    all.map(ToString::to_string).collect()
}

fn run(stub_url: &str, home: &Path, args: &[&str], env: &[(&str, &str)]) -> Output {
    let args = generate(args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    command(stub_url, home, &args).envs(env.iter().copied()).output().unwrap()
}

fn log(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{}", log(output));
    log(output)
}

/// The one line of an error.
#[track_caller]
fn fails(output: &Output) -> String {
    let text = log(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let (errors, others): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|line| line.starts_with("error: "));
    assert!(errors.len() == 1 && others.iter().all(|line| line.contains("WARN")), "{text}");
    errors[0].to_owned()
}

fn repository(home: &Path) -> PathBuf {
    home.join("hub").join("models--user--tiny")
}

/// Names of the files in the folder of bytes, but for locks.
fn blobs(home: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(repository(home).join("blobs")).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.ends_with(".lock")).collect()
}

/// A model, a stub that has it, and a folder for the cache.
fn setting() -> (Vec<u8>, Stub, TempDir) {
    let home = tempfile::tempdir().unwrap();
    let model = tiny(home.path()).bytes();
    let stub = Stub::start(&[(FILE, model.clone()), ("README.md", b"text".to_vec())]);
    (model, stub, home)
}

#[test]
fn a_first_start_downloads_and_a_second_one_needs_no_network() {
    let (model, stub, home) = setting();
    let (url, home) = (stub.url.clone(), home.path());
    let serve = ["serve", "-hf", "user/tiny:f16", "--ctx", "64"];
    let server = Server::launch(&mut command(&url, home, &serve));
    server.wait(|| server.get("/ready").status == 200);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "user/tiny:f16");
    for path in ["/v1/models/user/tiny:f16", "/v1/models/user%2Ftiny%3Af16"] {
        assert_eq!(server.get(path).json()["id"], "user/tiny:f16");
    }
    assert!(server.log().contains(&format!("downloading {FILE}")), "{}", server.log());
    drop(server);

    // The layout that other tools share.
    let (commit, digest) = (stub.change(|state| state.commit.clone()), sha256(&model));
    let named = std::fs::read_to_string(repository(home).join("refs/main")).unwrap();
    assert_eq!(named, commit);
    let place = repository(home).join("snapshots").join(&commit).join(FILE);
    let blob = Path::new("../../blobs").join(&digest);
    assert_eq!(std::fs::read_link(&place).unwrap(), blob);
    assert!(std::fs::read(&place).unwrap() == model);

    // With network only the list is asked for; offline nothing is.
    stub.change(|state| (state.n_requests, state.reads) = (0, vec![]));
    succeeds(&run(&url, home, &["-hf", "user/tiny:F16"], &[]));
    assert_eq!(stub.change(|state| (state.n_requests, state.reads.len())), (1, 0));
    succeeds(&run(&url, home, &["-hf", "user/tiny"], &[("HF_HUB_OFFLINE", "1")]));
    assert_eq!(stub.change(|state| state.n_requests), 1);
    let error = fails(&run(&url, home, &["-hf", "user/other"], &[("HF_HUB_OFFLINE", "1")]));
    assert!(error.contains("HF_HUB_OFFLINE is set, and it is not in the cache"), "{error}");

    stub.stop();
    let log = succeeds(&run(&url, home, &["-hf", "user/tiny:F16"], &[]));
    assert!(log.contains("cannot be reached") && log.contains("from the cache"), "{log}");
    let error = fails(&run(&url, home, &["-hf", "user/tiny:Q8_0"], &[]));
    assert!(
        error.contains("user/tiny:Q8_0: the Hub") && error.contains("not in the cache"),
        "{error}"
    );
}

#[test]
fn a_file_of_another_commit_is_not_downloaded_again() {
    let (_, stub, home) = setting();
    succeeds(&run(&stub.url, home.path(), &["-hf", REPO], &[]));
    stub.change(|state| {
        state.commit = "c2".repeat(20);
        state.files.insert("README.md".into(), b"another text".to_vec());
    });
    succeeds(&run(&stub.url, home.path(), &["-hf", REPO], &[]));
    assert_eq!(stub.change(|state| state.reads.len()), 1);
    let named = std::fs::read_to_string(repository(home.path()).join("refs/main")).unwrap();
    assert_eq!(named, "c2".repeat(20));
    assert_eq!(blobs(home.path()).len(), 1);
}

#[test]
fn a_stopped_download_goes_on_where_it_stopped() {
    let (model, stub, home) = setting();
    let (n, home) = (model.len() / 2, home.path());
    stub.change(|state| state.fault = Some(Fault::Stalls(n)));
    let serve = ["serve", "--hf-repo", REPO, "--ctx", "64"];
    let server = Server::launch(&mut command(&stub.url, home, &serve));
    let part = repository(home).join("blobs").join(format!("{}.part", sha256(&model)));
    server.wait(|| std::fs::metadata(&part).is_ok_and(|found| found.len() == n as u64));
    assert_eq!(server.get("/health").json()["status"], "loading");
    assert_eq!(server.get("/ready").status, 503);
    server.terminate();
    assert_eq!(server.wait_for_exit().code(), Some(0));

    succeeds(&run(&stub.url, home, &["-hf", REPO], &[]));
    assert_eq!(stub.change(|state| state.reads.clone()), [(FILE.into(), 0), (FILE.into(), n)]);
    assert_eq!(blobs(home), [sha256(&model)]);
}

#[test]
fn two_processes_download_a_file_once() {
    let (model, stub, home) = setting();
    stub.change(|state| state.fault = Some(Fault::Pauses(model.len() / 2)));
    let args = generate(&["-hf", REPO, "--log-level", "debug"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let start = || {
        let mut command = command(&stub.url, home.path(), &args);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let first = start();
    let began = Instant::now();
    while stub.change(|state| state.reads.is_empty()) {
        assert!(began.elapsed() < Duration::from_secs(60), "the first one asks for the file");
        std::thread::sleep(Duration::from_millis(10));
    }
    let second = start().wait_with_output().unwrap();
    succeeds(&first.wait_with_output().unwrap());
    assert!(succeeds(&second).contains("another process downloads"), "{}", log(&second));
    assert_eq!(stub.change(|state| state.reads.len()), 1);
}

#[test]
fn a_connection_that_ends_early_is_made_again() {
    let (model, stub, home) = setting();
    let n = model.len() / 3;
    stub.change(|state| state.fault = Some(Fault::Ends(n)));
    let log = succeeds(&run(&stub.url, home.path(), &["-hf", REPO], &[]));
    assert!(log.contains("attempt 2 follows"), "{log}");
    assert_eq!(stub.change(|state| state.reads.clone()), [(FILE.into(), 0), (FILE.into(), n)]);
}

#[test]
fn all_bytes_of_a_killed_download_are_used() {
    let (model, stub, home) = setting();
    let folder = repository(home.path()).join("blobs");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{}.part", sha256(&model))), &model).unwrap();
    succeeds(&run(&stub.url, home.path(), &["-hf", REPO], &[]));
    assert_eq!(stub.change(|state| state.reads.len()), 0);
    assert_eq!(blobs(home.path()), [sha256(&model)]);
}

#[test]
fn a_damaged_download_is_an_error_and_not_kept() {
    let (model, stub, home) = setting();
    stub.change(|state| state.fault = Some(Fault::Wrong));
    let error = fails(&run(&stub.url, home.path(), &["-hf", REPO], &[]));
    let mut wrong = model.clone();
    wrong[0] ^= 1;
    for part in ["user/tiny/tiny-F16.gguf", &sha256(&model), &sha256(&wrong)] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(blobs(home.path()), Vec::<String>::new());
    assert!(!repository(home.path()).join("snapshots").exists());
    succeeds(&run(&stub.url, home.path(), &["-hf", REPO], &[]));

    // The same in a server: it ends.
    let home = tempfile::tempdir().unwrap();
    stub.change(|state| state.fault = Some(Fault::Wrong));
    let serve = ["serve", "-hf", REPO, "--ctx", "64"];
    let server = Server::launch(&mut command(&stub.url, home.path(), &serve));
    assert_eq!(server.wait_for_exit().code(), Some(1));
}

#[test]
fn a_private_repository_needs_a_token() {
    let (_, stub, home) = setting();
    let home = home.path();
    stub.change(|state| state.token = Some("hf_right"));
    let error = fails(&run(&stub.url, home, &["-hf", REPO], &[]));
    assert!(error.contains("user/tiny") && error.contains("401"), "{error}");
    assert!(error.contains("private") && error.contains("set HF_TOKEN"), "{error}");
    let error = fails(&run(&stub.url, home, &["-hf", REPO], &[("HF_TOKEN", "hf_wrong")]));
    assert!(error.contains("check HF_TOKEN") && !error.contains("hf_wrong"), "{error}");
    let error = fails(&run(&stub.url, home, &["-hf", REPO], &[("HF_TOKEN", "a\nb")]));
    assert!(error.contains("HF_TOKEN holds a character"), "{error}");

    stub.change(|state| state.gated = true);
    let error = fails(&run(&stub.url, home, &["-hf", REPO], &[]));
    assert!(error.contains("gated; accept its terms") && error.contains("HF_TOKEN"), "{error}");

    succeeds(&run(&stub.url, home, &["-hf", REPO], &[("HF_TOKEN", "hf_right")]));
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("token"), "hf_right\n").unwrap();
    succeeds(&run(&stub.url, other.path(), &["-hf", REPO], &[]));

    stub.change(|state| (state.token, state.gated) = (None, false));
    let error = fails(&run(&stub.url, home, &["-hf", "user/other"], &[]));
    assert!(error.contains("404") && error.contains("none of this name"), "{error}");
}

#[test]
fn a_name_that_means_nothing_is_one_line() {
    let (_, stub, home) = setting();
    let fails = |args: &[&str]| fails(&run(&stub.url, home.path(), args, &[]));
    let error = fails(&["-hf", "user/tiny:Q4_K_M"]);
    assert!(error.contains("the quantization Q4_K_M; it has F16"), "{error}");
    let error = fails(&["-hf", REPO, "-hff", "x.gguf"]);
    assert!(error.contains("it has no file x.gguf; it has tiny-F16.gguf"), "{error}");
    let error = fails(&["-hf", REPO, "-m", "x.gguf"]);
    assert!(error.contains("MODEL_PATH is x.gguf") && error.contains("not both"), "{error}");
}

#[test]
fn a_model_in_several_files_is_loaded_from_the_hub_and_from_disk() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let names: Vec<String> = (1..=3).map(|i| format!("tiny-F16-0000{i}-of-00003.gguf")).collect();
    let files: Vec<Vec<u8>> = model.split(3).iter().map(common::gguf::File::bytes).collect();
    let (seed, paths) = (["--seed", "1"], names.iter().map(|name| folder.path().join(name)));
    let paths: Vec<PathBuf> = paths.collect();
    for (path, file) in paths.iter().zip(&files) {
        std::fs::write(path, file).unwrap();
    }
    let heads = folder.path().join("heads");
    let synth = ["synth", "--like", "tiny", "-o", "other.gguf", "--kind", "conditioned", "--heads"];
    let made = Command::new(env!("CARGO_BIN_EXE_medusa-llama"))
        .args(synth)
        .arg(&heads)
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");

    // Any of them means all; heads read matrices that are not in the first.
    let home = tempfile::tempdir().unwrap();
    let text = |args: &[&str]| {
        let args: Vec<&str> = args.iter().chain(&seed).copied().collect();
        let output = run("http://127.0.0.1:9", home.path(), &args, &[]);
        succeeds(&output);
        output.stdout
    };
    let whole = text(&["-m", folder.path().join("tiny.gguf").to_str().unwrap()]);
    for path in &paths {
        assert_eq!(text(&["-m", path.to_str().unwrap()]), whole);
    }
    let with_heads = ["-m", paths[0].to_str().unwrap(), "--heads", heads.to_str().unwrap()];
    assert_eq!(text(&with_heads), whole);

    let on_hub: Vec<(String, Vec<u8>)> =
        names.iter().map(|name| format!("F16/{name}")).zip(files.clone()).collect();
    let on_hub: Vec<(&str, Vec<u8>)> =
        on_hub.iter().map(|(name, file)| (name.as_str(), file.clone())).collect();
    let stub = Stub::start(&on_hub);
    let by_name = ["-hf", "user/tiny:f16", "--seed", "1"];
    let output = run(&stub.url, home.path(), &by_name, &[]);
    succeeds(&output);
    assert_eq!(output.stdout, whole);
    assert_eq!(stub.change(|state| state.reads.len()), 3);
    let offline = run(&stub.url, home.path(), &by_name, &[("HF_HUB_OFFLINE", "1")]);
    succeeds(&offline);
    assert_eq!(offline.stdout, whole);

    // One that is missing is named.
    stub.change(|state| state.files.remove(on_hub[1].0));
    let other = tempfile::tempdir().unwrap();
    let error = fails(&run(&stub.url, other.path(), &by_name, &[]));
    assert!(error.contains("F16/tiny-F16-00002-of-00003.gguf is missing"), "{error}");
    std::fs::remove_file(&paths[2]).unwrap();
    let named = ["-m", paths[0].to_str().unwrap()];
    let error = fails(&run(&stub.url, other.path(), &named, &[]));
    assert!(error.contains("tiny-F16-00003-of-00003.gguf: it is missing"), "{error}");
    let renamed = folder.path().join("first.gguf");
    std::fs::rename(&paths[0], &renamed).unwrap();
    let named = ["-m", renamed.to_str().unwrap()];
    let error = fails(&run(&stub.url, other.path(), &named, &[]));
    assert!(error.contains("one of 3 files") && error.contains("-00001-of-00003.gguf"), "{error}");
}

#[test]
fn heads_come_from_a_repository_too() {
    let folder = tempfile::tempdir().unwrap();
    let (model, heads) = (folder.path().join("tiny.gguf"), folder.path().join("heads"));
    let (model, heads) = (model.to_str().unwrap(), heads.to_str().unwrap());
    let made = common::run(&["synth", "--like", "tiny", "-o", model, "--heads", heads], &[]);
    assert!(made.status.success(), "{made:?}");
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(heads)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap())
        })
        .collect();
    files.push(("README.md".into(), b"text".to_vec()));
    files.push(("config.json".into(), b"{}".to_vec()));
    let files: Vec<(&str, Vec<u8>)> =
        files.iter().map(|(n, bytes)| (n.as_str(), bytes.clone())).collect();
    let stub = Stub::start(&files);

    let home = tempfile::tempdir().unwrap();
    let named = ["-m", model, "--heads", "hf:user/tiny", "--log-level", "debug"];
    let log = succeeds(&run(&stub.url, home.path(), &named, &[]));
    assert!(log.contains("heads loaded"), "{log}");
    assert_eq!(stub.change(|state| state.reads.len()), 1);
    assert_eq!(blobs(home.path()).len(), 2, "the heads and config.json");
    let offline = [("HF_HUB_OFFLINE", "1")];
    succeeds(&run(&stub.url, home.path(), &named, &offline));

    let none = Stub::start(&[("README.md", b"text".to_vec())]);
    let error = fails(&run(&none.url, tempfile::tempdir().unwrap().path(), &named[..4], &[]));
    assert!(error.contains("user/tiny: it has no heads; looked for medusa_lm_head"), "{error}");
}
