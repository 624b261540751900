//! Starting, refusing to start, and stopping.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::time::Duration;

use clap::CommandFactory as _;
use common::{Server, model_path, post_bytes, read_answer, run};
use medusa_llama::config::Args;
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
    assert_eq!(server.get("/health").status, 200, "a server that drains is alive");
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
fn requests_are_served_until_the_drain_delay_is_over() {
    let server = Server::start(&["--drain-delay", "3600"]);
    let keep_alive = |what: &str| format!("{what} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut kept = server.send(keep_alive("GET /health").as_bytes());
    let mut head = [0; 4096];
    let n = kept.read(&mut head).unwrap();
    let head = String::from_utf8_lossy(&head[..n]).to_lowercase();
    assert!(head.starts_with("http/1.1 200") && !head.contains("connection: close"), "{head}");

    server.terminate();
    server.wait(|| server.get("/ready").status == 503);
    assert_eq!(server.get("/ready").json(), json!({ "status": "draining" }));
    // On old connections as on new ones: each answer is its connection's last.
    for (what, status) in [("GET /health", 200), ("GET /nothing", 404)] {
        let answer = read_answer(server.send(keep_alive(what).as_bytes()));
        assert_eq!((answer.status, answer.header("connection")), (status, Some("close")));
    }
    kept.write_all(keep_alive("GET /ready").as_bytes()).unwrap();
    let answer = read_answer(kept);
    assert_eq!((answer.status, answer.header("connection")), (503, Some("close")));
    assert_eq!(server.generate(&json!({ "prompt": "x", "max_tokens": 3 })).status, 200);

    server.terminate();
    assert_eq!(server.wait_for_exit().code(), Some(130), "a second signal ends it at once");
}

#[test]
fn after_the_drain_delay_new_work_is_refused() {
    let server = Server::start(&["--drain-delay", "0.5"]);
    let body = json!({ "prompt": "A long story:", "max_tokens": 1500, "stream": true, "ignore_eos": true, "speculation": "off" });
    let socket = server.open_stream(&body);
    server.wait(|| server.load()["running"] == 1);
    server.terminate();
    server.wait(|| server.generate(&json!({ "prompt": "x", "max_tokens": 1 })).status == 503);
    let refused = server.generate(&json!({ "prompt": "x" }));
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (503, &json!("draining")));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(read_answer(socket).events().last().unwrap()["usage"]["completion_tokens"], 1500);
    assert_eq!(server.wait_for_exit().code(), Some(0));
}

/// A body that still arrives when nothing else runs is waited for.
#[test]
fn a_request_that_is_being_sent_at_the_end_gets_an_answer() {
    let server = Server::start(&["--drain-delay", "0"]);
    let bytes = post_bytes(json!({ "prompt": "x", "max_tokens": 1 }).to_string().as_bytes());
    let (first, rest) = bytes.split_at(bytes.len() - 1);
    let mut socket = server.send(first);
    server.wait(|| server.get("/health").status == 200); // the head has arrived, too
    server.terminate();
    server.wait(|| server.log().contains("draining"));
    std::thread::sleep(Duration::from_secs(3)); // longer than what is left for flushing
    socket.write_all(rest).unwrap();
    let answer = read_answer(socket);
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (503, &json!("draining")));
    assert_eq!(server.wait_for_exit().code(), Some(0));
}

#[test]
fn the_drain_time_is_a_limit() {
    let server = Server::start(&["--drain-timeout", "0.3"]);
    let body = json!({ "prompt": "A long story:", "max_tokens": 2000, "stream": true, "ignore_eos": true });
    let socket = server.open_stream(&body);
    server.wait(|| server.load()["running"] == 1);
    server.terminate();
    assert_eq!(server.wait_for_exit().code(), Some(0));
    let answer = read_answer(socket);
    let text = String::from_utf8_lossy(&answer.body);
    assert!(text.matches("generated_text").count() < 2000, "not cut: {text}");
    assert!(!text.contains("finish_reason"), "not cut: {text}");
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
        "--raw",
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
fn help_shows_each_argument_with_its_variable_and_default() {
    let output = run(&["serve", "--help"], &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    let mut entries: Vec<String> = vec![];
    for line in text.lines().map(str::trim) {
        if line.starts_with('-') && !line.starts_with("- ") {
            entries.push(String::new());
        }
        entries.last_mut().into_iter().for_each(|entry| *entry += &format!("{line} "));
    }
    let args = Args::command();
    let serve = args.find_subcommand("serve").unwrap();
    let mut n_variables = 0;
    for arg in
        serve.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str()))
    {
        let long = format!("--{} ", arg.get_long().unwrap());
        let entry = entries.iter().find(|entry| entry.contains(&long));
        let entry = entry.unwrap_or_else(|| panic!("{long} in\n{text}"));
        if let Some(variable) = arg.get_env() {
            let variable = format!("[env: {}", variable.to_str().unwrap());
            assert!(entry.contains(&variable), "{variable} in\n{entry}");
            n_variables += 1;
        }
        for default in arg.get_default_values() {
            let default = format!("[default: {}]", default.to_str().unwrap());
            assert!(entry.contains(&default), "{default} in\n{entry}");
        }
    }
    assert!(n_variables > 30, "{n_variables}");
}
