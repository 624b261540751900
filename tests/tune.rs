//! `medusa-llama tune` on a tiny model: its output and errors, and that it removes its files.
#![allow(missing_docs)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use medusa_llama::llama::Quantization;
use medusa_llama::synth::{self, ModelShape};
use serde_json::Value;
use tempfile::TempDir;

/// A tiny model in a folder, with a folder for temporary files.
fn model(quantization: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let quantization = Quantization::by_name(quantization).unwrap();
    let shape = ModelShape::by_name("tiny").unwrap();
    synth::model(&folder.path().join("tiny.gguf"), &shape, quantization, 1, &mut |_, _| ())
        .unwrap();
    std::fs::create_dir(folder.path().join("tmp")).unwrap();
    let prose = std::fs::read_to_string("tests/data/prose.txt").unwrap();
    std::fs::write(folder.path().join("text.txt"), prose.chars().take(6000).collect::<String>())
        .unwrap();
    folder
}

fn tune(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    command.current_dir(folder).env("TMPDIR", folder.join("tmp")).args([
        "tune",
        "-m",
        "tiny.gguf",
        "-n",
        "4",
    ]);
    command.args(args).output().unwrap()
}

fn refusal(folder: &Path, args: &[&str]) -> String {
    let output = tune(folder, args);
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn all_candidates_are_measured_and_one_is_recommended() {
    let folder = model("F16");
    let args = [
        "-f",
        "text.txt",
        "--types",
        "q4_0,Q8_0,F16",
        "--threads",
        "1",
        "--rounds",
        "2",
        "--json",
        "all.json",
        "--svg",
    ];
    let output = tune(folder.path(), &[&args[..], &["rows.svg"]].concat());
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    for text in [
        "candidate",
        "perplexity",
        "input (F16)",
        "\nQ4_0 ",
        "\nQ8_0 ",
        "for one sequence use",
        "for parallel sequences use",
    ] {
        assert!(out.contains(text), "{text}: {out}");
    }
    assert!(out.contains("with 1 thread:") && out.contains("a second row costs"), "{out}");
    assert!(err.contains("the model is F16 already") && !out.contains("twice"), "{out}{err}");

    let json: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("all.json")).unwrap())
            .unwrap();
    let candidates = json["candidates"].as_array().unwrap();
    let of = |key: &str| candidates.iter().map(|c| c[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("name"), ["input (F16)", "Q4_0", "Q8_0"]);
    assert_eq!(of("quantization"), ["F16", "Q4_0", "Q8_0"]);
    let bytes: Vec<u64> = of("bytes").iter().map(|b| b.as_u64().unwrap()).collect();
    assert!(bytes[1] < bytes[2] && bytes[2] < bytes[0], "{bytes:?}");
    for candidate in candidates {
        assert!(
            candidate["perplexity"].as_f64().unwrap() > 1.0
                && candidate["perplexity_error"].as_f64().unwrap() > 0.0
        );
        let measured = &candidate["by_threads"][0];
        for speed in ["alone", "together"].map(|key| &measured[key]) {
            assert_eq!(speed["rounds"].as_array().unwrap().len(), 2);
            assert!(
                speed["low"].as_f64().unwrap() > 0.0
                    && speed["low"].as_f64() <= speed["high"].as_f64()
            );
        }
        let rows: Vec<u64> = measured["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["rows"].as_u64().unwrap())
            .collect();
        assert_eq!(rows, [1, 2, 4, 8, 16, 32]);
    }
    let recommended = json["recommendations"].as_array().unwrap();
    assert_eq!(
        recommended.iter().map(|r| r["parallel"].as_u64().unwrap()).collect::<Vec<_>>(),
        [1, 8]
    );
    assert!(recommended.iter().all(|r| r["threads"] == 1 && of("name").contains(&r["candidate"])));

    let svg = std::fs::read_to_string(folder.path().join("rows.svg")).unwrap();
    assert!(
        ["input (F16)", "Q4_0", "Q8_0", "rows of a step"].iter().all(|text| svg.contains(text))
    );
    assert!(
        files(&folder.path().join("tmp")).is_empty(),
        "{:?}",
        files(&folder.path().join("tmp"))
    );
}

#[test]
fn files_are_kept_with_keep_and_a_second_quantization_is_warned_of() {
    let folder = model("Q8_0");
    let args =
        ["-f", "text.txt", "--types", "Q4_0", "--threads", "1", "--rounds", "1", "--keep", "kept"];
    let output = tune(folder.path(), &args);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        out.contains("lose quality twice") && out.contains("one round shows no spread"),
        "{out}"
    );
    assert_eq!(files(&folder.path().join("kept")), ["tiny-Q4_0.gguf"]);
    assert!(files(&folder.path().join("tmp")).is_empty());
    let again = refusal(folder.path(), &args);
    assert!(again.contains("tiny-Q4_0.gguf is there already"), "{again}");
}

#[test]
fn an_interrupted_run_removes_its_files() {
    let folder = model("F16");
    let temporary = folder.path().join("tmp");
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    command.current_dir(folder.path()).env("TMPDIR", &temporary);
    command.args([
        "tune",
        "-m",
        "tiny.gguf",
        "-f",
        "text.txt",
        "--types",
        "Q4_0",
        "--rounds",
        "1000",
    ]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun =
        || files(&temporary).first().is_some_and(|name| !files(&temporary.join(name)).is_empty());
    let started = Instant::now();
    while !begun() {
        assert!(
            started.elapsed() < Duration::from_secs(120) && child.try_wait().unwrap().is_none(),
            "no file was made"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(files(&temporary).is_empty(), "{:?}", files(&temporary));
}

#[test]
fn what_cannot_be_measured_is_refused_with_its_reason_and_leaves_nothing() {
    let folder = model("F16");
    std::fs::write(folder.path().join("short.txt"), "Too short.").unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&["-f", "nowhere.txt"], "cannot read nowhere.txt"),
        (&["-f", "short.txt"], "at least 1024 are needed"),
        (&["-f", "text.txt", "--types", "Q4_0,Q9_9"], "must be one of Q2_K, "),
        (&["-f", "text.txt", "--threads", "1,1024"], "--threads 1024: there are "),
        (&["-f", "text.txt", "--json", "no/where.json"], "there is no folder no"),
    ];
    for (args, reason) in cases {
        let said = refusal(folder.path(), args);
        assert!(said.contains(reason), "{reason}: {said}");
    }
    // Also if it fails at the very end: a folder cannot be written as a file.
    let late =
        ["-f", "text.txt", "--types", "Q4_0", "--threads", "1", "--rounds", "1", "--json", "tmp"];
    assert!(refusal(folder.path(), &late).contains("cannot write tmp"));
    assert!(files(&folder.path().join("tmp")).is_empty());
}
