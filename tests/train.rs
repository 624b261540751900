//! `medusa-llama train` from prompts to heads that a server drafts with.
#![allow(missing_docs)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use common::context::MODEL;
use common::{Server, model_path};
use medusa_llama::request::{Part, Prompt};
use medusa_llama::train::prompts;
use serde_json::json;

/// Trains on a file of prompts.
fn train(folder: &Path, args: &[&str]) -> Output {
    let prompts = folder.join("prompts.jsonl");
    let asked = |i: usize| json!({ "prompt": format!("What is {i} plus {i}?") }).to_string() + "\n";
    std::fs::write(&prompts, (0..80).map(asked).collect::<String>()).unwrap();
    train_alone(folder, &[&["--prompts", prompts.to_str().unwrap()], args].concat())
}

/// Trains on the model's own prompts.
fn train_alone(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    command.args([
        "train",
        "-c",
        "256",
        "-b",
        "8",
        "--max-answer",
        "24",
        "--epochs",
        "1",
        "--heads",
        "2",
    ]);
    command.args(["--draft-vocab", "1024", "--tokens", "1500", "-m"]).arg(model_path());
    command.arg("--work").arg(folder.join("work")).args(args).output().unwrap()
}

/// Trains heads of a kind and returns their files' bytes, after a server has drafted with them.
fn trained(work: &Path, output: &Path, kind: &str, file: &str) -> Vec<u8> {
    let done = train(work, &["-o", output.to_str().unwrap(), "--kind", kind, "--width", "64"]);
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && out.contains("top-5"), "{out}{err}");
    let card = std::fs::read_to_string(output.join("README.md")).unwrap();
    assert!(
        card.contains("tokens of the model's own answers")
            && card.contains(&format!("--kind {kind}")),
        "{card}"
    );
    assert!(std::fs::read_to_string(output.join("loss.svg")).unwrap().contains("<svg"));
    // Another user's server may read them, as far as this user's umask allows.
    let mode = |file: &str| output.join(file).metadata().unwrap().permissions().mode();
    assert_eq!(mode(file), mode("README.md"));
    let server = Server::start(&["--ctx", "256", "--heads", output.to_str().unwrap()]);
    assert_eq!(server.get("/").json()["heads"], 2);
    assert_eq!(server.generate(&json!({ "prompt": "1 2 3", "max_tokens": 4 })).status, 200);
    std::fs::read(output.join(file)).unwrap()
}

#[test]
fn a_few_prompts_become_heads_of_either_kind_and_a_second_run_goes_on_where_the_first_was() {
    let folder = tempfile::tempdir().unwrap();
    let conditioned = folder.path().join("conditioned");
    let heads =
        trained(folder.path(), &conditioned, "conditioned", "conditioned_heads.safetensors");

    // All answers exist: a second run collects none, and fits the same heads.
    let features = || std::fs::read_dir(folder.path().join("work/features")).unwrap().count();
    let n_before = features();
    assert!(
        trained(folder.path(), &conditioned, "conditioned", "conditioned_heads.safetensors")
            == heads
    );
    assert_eq!(features(), n_before);

    // The features serve for heads of another shape; the checkpoint does not.
    let plain = folder.path().join("plain");
    let other = train(folder.path(), &["-o", plain.to_str().unwrap(), "--kind", "medusa"]);
    let refusal = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(!other.status.success() && refusal.contains("remove it to begin anew"), "{refusal}");
    std::fs::remove_file(folder.path().join("work/checkpoint.safetensors")).unwrap();
    trained(folder.path(), &plain, "medusa", "medusa_lm_head.safetensors");
    assert_eq!(features(), n_before);
}

/// Without prompts the model writes some, the same ones if the file is lost, half of it too.
#[test]
fn a_model_writes_its_own_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let texts = folder.path().join("texts/of");
    std::fs::create_dir_all(&texts).unwrap();
    std::fs::write(texts.join("boats.txt"), "The old boat lay in the harbour. ".repeat(30))
        .unwrap();
    let output = folder.path().join("heads");
    let run = |texts: &Path| {
        let args = ["-o", output.to_str().unwrap(), "--texts", texts.to_str().unwrap()];
        train_alone(folder.path(), &[&args[..], &["--own-prompts", "70", "--width", "64"]].concat())
    };
    let done = run(&folder.path().join("texts"));
    let err = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{err}");
    assert!(output.join("conditioned_heads.safetensors").exists());

    let file = folder.path().join("work/prompts.jsonl");
    let written = std::fs::read_to_string(&file).unwrap();
    let prompts = prompts::read(&file).unwrap();
    assert!(prompts.len() >= 70, "{}", prompts.len());
    let long = prompts.iter().filter(|p| p.category.as_deref() == Some("long"));
    assert!(
        long.clone().count() > 5 && long.clone().all(|p| p.message.contains("The old boat lay"))
    );
    let unique: std::collections::HashSet<_> = prompts.iter().map(|p| &p.message).collect();
    assert_eq!(unique.len(), prompts.len());

    // The run was killed after its first wave.
    let first = |line: &&str| line.contains("\"wave\":0");
    let kept: String = written.lines().filter(first).map(|line| line.to_owned() + "\n").collect();
    assert!(kept.len() < written.len());
    std::fs::write(&file, kept).unwrap();
    let done = run(&folder.path().join("texts"));
    assert!(done.status.success());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), written);

    let none = run(&folder.path().join("work"));
    assert!(String::from_utf8_lossy(&none.stderr).contains("holds no text of 400 bytes"));
}

/// Training renders a prompt to the tokens that a server computes for the same messages: the server
/// finds all of them but the last, which it always computes, in its cache.
#[test]
fn heads_are_trained_on_the_prompts_that_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    let user = "  What is 2 + 2? <|im_end|> \u{1F600}\n";
    std::fs::write(&file, json!({ "prompt": user }).to_string()).unwrap();
    let server = Server::start(&["--ctx", "256"]);
    for system in [None, Some("Be brief."), Some("")] {
        let mut prompts = prompts::read(&file).unwrap();
        prompts::render(&mut prompts, &MODEL, system).unwrap();
        let Prompt::Text(parts) = &prompts[0].prompt else { panic!("tokens") };
        let tokens_of = |(i, part): (usize, &Part)| {
            MODEL.tokenize_part(&part.text, i == 0, part.special).unwrap()
        };
        let prompt: Vec<i32> =
            parts.iter().enumerate().flat_map(tokens_of).map(|token| token.0).collect();
        let n_tokens = prompt.len();

        let system = system.map(|content| json!({ "role": "system", "content": content }));
        let messages: Vec<_> =
            system.into_iter().chain([json!({ "role": "user", "content": user })]).collect();
        let ask = |path, mut body: serde_json::Value| {
            body["max_tokens"] = json!(1);
            let answer = server.post_to(path, &body).json();
            let usage = &answer["usage"];
            let n = |n: &serde_json::Value| n.as_u64().unwrap() as usize;
            (n(&usage["prompt_tokens"]), n(&usage["prompt_tokens_details"]["cached_tokens"]))
        };
        let chat = ask("/v1/chat/completions", json!({ "messages": messages }));
        let text = ask("/v1/completions", json!({ "prompt": prompt }));
        assert_eq!((chat.0, text), (n_tokens, (n_tokens, n_tokens - 1)));
    }
}

#[test]
fn what_cannot_be_trained_on_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("p.jsonl");
    std::fs::write(&prompts, "{\"text\": 1}\n").unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
        command
            .args(["train", "-o"])
            .arg(folder.path().join("out"))
            .arg("-m")
            .arg(model_path())
            .args(args);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(
        run(&["--prompts", prompts.to_str().unwrap()]).contains("line 1: has no string \"prompt\"")
    );
    assert!(run(&["--prompts", "nowhere.jsonl"]).contains("nowhere.jsonl"));
}
