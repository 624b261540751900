//! Starting, refusing to start, and stopping.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use common::{Server, model_path, read_answer, run};
use serde_json::json;

#[test]
fn sigterm_in_mid_stream_finishes_it_and_refuses_new_work() {
    let server = Server::start(&["--ctx", "512"]);
    let body =
        json!({ "prompt": "A long story:", "max_tokens": 300, "stream": true, "ignore_eos": true });
    let socket = server.open_stream(&body);
    server.wait(|| server.load()["tokens_generated"].as_u64().unwrap() > 3);
    server.terminate();
    server.wait(|| server.get("/ready").json() == json!({ "status": "draining" }));
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").status, 200, "it is not to be killed while it finishes");
    let refused = server.generate(&json!({ "prompt": "x" }));
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (503, &json!("draining")));
    let answer = read_answer(socket);
    assert_eq!(
        answer.events().last().unwrap()["usage"]["completion_tokens"],
        300,
        "finished to the last token"
    );
    assert_eq!(server.wait_for_exit().code(), Some(0));
}

#[test]
fn the_drain_time_is_a_limit() {
    let server = Server::start(&["--drain-timeout", "0.3"]);
    let body = json!({ "prompt": "A long story:", "max_tokens": 2000, "stream": true, "ignore_eos": true });
    let _socket = server.open_stream(&body);
    server.wait(|| server.load()["running"] == 1);
    server.terminate();
    let start = std::time::Instant::now();
    assert_eq!(server.wait_for_exit().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(10), "not the minute that 2,000 tokens take");
}

#[test]
fn a_bad_value_is_refused_at_start_with_the_variables_name() {
    for (name, value) in [
        ("PORT", "http"),
        ("BATCH_SIZE", "0"),
        ("MAX_WAIT_TIME", "soon"),
        ("LOG_LEVEL", "LOUD"),
        ("WORKERS", "-1"),
    ] {
        let output = run(&["serve"], &[(name, value)]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(name) && text.contains(value), "{text}");
    }
}

#[test]
fn a_model_that_cannot_be_loaded_ends_the_server_with_the_reason() {
    for (path, reason) in [("/no/such/file.gguf", "No such file"), (file!(), "could not load")] {
        let output = run(&["serve", "--port", "0", "--host", "127.0.0.1", "-m", path], &[]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(path) && text.contains(reason), "{text}");
    }
}

#[test]
fn generate_streams_to_the_terminal() {
    let model = model_path();
    let args = [
        "generate",
        "-m",
        model.to_str().unwrap(),
        "-p",
        "1, 2, 3, 4, 5,",
        "-n",
        "8",
        "--temperature",
        "0",
    ];
    let output = run(&args, &[]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("6, 7"), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("tokens/s"));
    let refused = run(&["generate", "-m", model.to_str().unwrap(), "-p", "x", "--top-p", "7"], &[]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("'7' for '--top-p"), "{refused:?}");
}

#[test]
fn help_shows_each_variable_with_its_default() {
    let output = run(&["serve", "--help"], &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    for line in [
        "MODEL_CONTEXT_SIZE",
        "N_GPU_LAYERS",
        "N_THREADS",
        "MEDUSA_K_HEADS",
        "MEDUSA_MAX_TOKENS_PER_STEP",
        "BATCH_SIZE",
        "MAX_WAIT_TIME",
        "MAX_CONCURRENT_BATCHES",
        "HOST",
        "PORT",
        "WORKERS",
        "LOG_LEVEL",
        "[default: 2048]",
        "[default: 8000]",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}
