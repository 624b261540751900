//! OpenAI's dialect, as its clients speak it.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;

use common::Server;
use serde_json::{Value, json};

/// OpenAI's Python client, and LangChain's on top of it.
#[test]
fn openais_client_is_content() {
    let server = Server::start(&["--batch-size", "4", "--ctx", "512", "--pooling", "mean"]);
    python_client_is_content("openai_client.py", &server);
}

/// OpenAI's Agents SDK: whole loops of calls, results and answers.
#[test]
fn openais_agents_are_content() {
    let server = Server::start(&["--batch-size", "4", "--ctx", "2048"]);
    python_client_is_content("agents_client.py", &server);
}

fn python_client_is_content(script: &str, server: &Server) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let clients = root.join(".tools/clients");
    assert!(
        clients.join("agents").is_dir(),
        "OpenAI's clients are missing: run `scripts/setup clients`"
    );
    let run = Command::new("python3")
        .arg(root.join("tests/clients").join(script))
        .arg(format!("http://{}", server.addr))
        .env("PYTHONPATH", clients)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// `benches/against` compares servers by what this dialect tells of them.
#[test]
fn servers_are_compared() {
    let server = Server::start(&["--batch-size", "2", "--ctx", "256", "--api-key", "secret"]);
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.jsonl");
    let lines =
        (0..8).map(|i| json!({ "prompt": format!("What is {i} + {{1}}?") }).to_string() + "\n");
    std::fs::write(&prompts, lines.collect::<String>()).unwrap();
    let run = |key: &str| {
        let mut against = Command::new("python3");
        against.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/against"));
        let args = ["--parallel", "1,2", "--rounds", "2", "-k", "2", "-n", "6", "--api-key", key];
        against.args(args).arg("--prompts").arg(&prompts);
        let servers = [format!("a=http://{}", server.addr), format!("b=http://{}/v1", server.addr)];
        against.args(servers).output().unwrap()
    };
    let done = run("secret");
    let (table, log) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{log}");
    assert_eq!(
        log.lines().filter(|line| line.contains(r#""requests": 2, "errors": 0"#)).count(),
        8
    );
    for begin in ["| 1 | a | ", "| 1 | b | ", "| 2 | a | ", "| 2 | b | "] {
        let row = table.lines().find(|line| line.starts_with(begin)).expect(begin);
        let speed: f64 = row.split(" | ").nth(2).unwrap().parse().unwrap();
        assert!(speed > 0.0, "{row}");
    }
    let refused = run("wrong");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("401"));
}

/// Vercel's AI SDK, in JavaScript.
#[test]
fn the_ai_sdk_is_content() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let clients = root.join(".tools/node-clients");
    assert!(
        clients.join(".installed").exists(),
        "the AI SDK is missing: run `scripts/setup node-clients`"
    );
    let server = Server::start(&["--batch-size", "4", "--ctx", "2048"]);
    let run = Command::new("node")
        .arg(root.join("tests/clients/ai_client.mjs"))
        .arg(format!("http://{}", server.addr))
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout)); // its report
}

/// To the letter: what a client that reads bytes sees.
#[test]
fn the_wire_is_as_openai_has_it() {
    let server = Server::start(&["--batch-size", "2", "--ctx", "256", "--alias", "a/model"]);
    let models = server.get("/v1/models").json();
    assert_eq!(
        (&models["object"], &models["data"][0]["object"]),
        (&json!("list"), &json!("model"))
    );
    assert_eq!(server.get("/v1/models/a/model").json(), models["data"][0]);

    let messages = json!([{ "role": "user", "content": "Say hi." }]);
    let streamed = server.post_to(
        "/v1/chat/completions",
        &json!({ "messages": messages, "max_tokens": 4, "stream": true }),
    );
    assert!(streamed.head.contains("content-type: text/event-stream"));
    let text = streamed.text();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let events =
        text.trim_end().split("\n\n").map(|event| event.strip_prefix("data: ").expect("data only"));
    let mut chunks: Vec<Value> =
        events.filter(|e| *e != "[DONE]").map(|e| serde_json::from_str(e).unwrap()).collect();
    let last = chunks.pop().unwrap();
    assert_eq!(
        (&last["choices"][0]["delta"], last["choices"][0]["finish_reason"].is_string()),
        (&json!({}), true)
    );
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(
        chunks[1..].iter().all(|c| c["choices"][0]["delta"].as_object().unwrap().len() == 1),
        "{chunks:?}"
    );
    assert!(chunks.iter().all(|c| c.get("usage").is_none() && c["id"] == last["id"]));

    let refused = server.post_to("/v1/chat/completions", &json!({ "messages": messages, "n": 0 }));
    assert_eq!(refused.status, 400);
    let error = &refused.json()["error"];
    assert_eq!((&error["type"], &error["param"]), (&json!("invalid_request_error"), &json!("n")));
    assert!(error["message"].is_string() && error["code"] == "invalid_request");
    let too_many = server.post_to("/v1/completions", &json!({ "prompt": "x", "n": 9 }));
    assert_eq!(
        (too_many.status, &too_many.json()["error"]["param"]),
        (400, &json!("n")),
        "two slots, eight at once"
    );
    let missing = server.get("/v1/engines");
    assert_eq!((missing.status, &missing.json()["error"]["code"]), (404, &json!("not_found")));
    let method = server.get("/v1/completions");
    assert_eq!(method.status, 405);
    server.wait(|| server.is_idle());
}

/// What OpenAI's completions tell of each token: as many likely ones as were asked for, each with a
/// name of its own, and where it begins in the text, whole or in a stream.
#[test]
fn parts_of_characters_have_names_and_offsets() {
    let server = common::shared(&["--ctx", "512"]);
    let body = json!({
        "prompt": "x", "logprobs": 20, "grammar": "start: \"😀漢\"", "max_tokens": 20, "seed": 1,
    });
    let choice = server.post_to("/v1/completions", &body).json()["choices"][0].clone();
    assert_eq!(choice["text"], "😀漢");
    let lists = &choice["logprobs"];
    let top = lists["top_logprobs"].as_array().unwrap();
    assert!(top.len() > 2 && top.iter().all(|top| top.as_object().unwrap().len() == 20), "{top:?}");
    let names: Vec<&str> =
        lists["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let bytes = names.iter().map(|name| name.strip_prefix("bytes:").expect("parts of characters"));
    let all: String = bytes.collect();
    assert_eq!(all, r"\xf0\x9f\x98\x80\xe6\xbc\xa2");
    let offsets: Vec<u64> =
        lists["text_offset"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    let second = names.iter().position(|name| name.starts_with(r"bytes:\xe6")).unwrap();
    let expected = (0..names.len()).map(|i| u64::from(i >= second));
    assert!(expected.eq(offsets.iter().copied()), "{offsets:?}");
    let mut body = body;
    body["stream"] = true.into();
    let chunks = events(server.post_to("/v1/completions", &body).text());
    let streamed =
        chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["text_offset"].as_array());
    assert_eq!(streamed.flatten().map(|n| n.as_u64().unwrap()).collect::<Vec<_>>(), offsets);
}

/// The data of a stream's events but for the last one.
fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// What an evaluator sends: a prompt of tokens with `echo`, and one token or none beside it. The log
/// probabilities are those that the model has when it generates the same tokens.
#[test]
fn an_evaluator_gets_the_log_probability_of_each_token_of_a_prompt() {
    let server = common::shared(&["--ctx", "512"]);
    let ask = |body: Value| {
        let answer = server.post_to("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    let greedy = json!({ "prompt": "The capital of France is", "max_tokens": 8, "logprobs": 1, "temperature": 0,
        "ignore_eos": true, "details": true });
    let generated = &ask(greedy)["choices"][0];
    let text = format!("The capital of France is{}", generated["text"].as_str().unwrap());
    let echo = |max_tokens: usize, prompt: Value| {
        ask(json!({ "prompt": prompt, "max_tokens": max_tokens, "logprobs": 1, "temperature": 0,
            "seed": 1234, "echo": true, "details": true }))
    };
    let whole = echo(0, json!(text));
    let (choice, usage) = (&whole["choices"][0], &whole["usage"]);
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("length")));
    assert_eq!(usage["completion_tokens"], 0);
    let n = usage["prompt_tokens"].as_u64().unwrap() as usize;
    let lists = &choice["logprobs"];
    let list = |name: &str| lists[name].as_array().unwrap().clone();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), n, "{name}");
    }
    assert!(lists["token_logprobs"][0].is_null() && lists["top_logprobs"][0].is_null());
    let expected = generated["logprobs"]["token_logprobs"].as_array().unwrap();
    for (scored, (i, made)) in
        list("token_logprobs")[n - 8..].iter().zip(expected.iter().enumerate())
    {
        let (scored, made) = (scored.as_f64().unwrap(), made.as_f64().unwrap());
        assert!((scored - made).abs() < 1e-2, "token {i}: {scored}, not {made}");
        let top = &lists["top_logprobs"][n - 8 + i];
        let best = top.as_object().unwrap().values().next().unwrap().as_f64().unwrap();
        assert_eq!(best, scored, "it was the most likely one");
    }
    let begins: Vec<usize> =
        list("text_offset").iter().map(|at| at.as_u64().unwrap() as usize).collect();
    let names: Vec<String> =
        list("tokens").iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    assert!(begins.iter().zip(&names).all(|(&at, name)| text[at..].starts_with(name)), "{lists}");

    // As token ids, with a token more; with another prompt beside it; and in a stream.
    let tokens = choice["tokens"].as_array().unwrap();
    let ids: Vec<i64> = tokens.iter().map(|t| t["id"].as_i64().unwrap()).collect();
    let one = &echo(1, json!([ids, ids[..3]]))["choices"];
    let same = &one[0]["logprobs"]["token_logprobs"].as_array().unwrap()[..n];
    assert_eq!(same[0], Value::Null);
    for (a, b) in same[1..].iter().zip(&list("token_logprobs")[1..]) {
        assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-2);
    }
    assert_eq!(one[1]["logprobs"]["tokens"].as_array().unwrap().len(), 4, "the prompt and one");
    let streamed = server.post_to(
        "/v1/completions",
        &json!({ "prompt": ids, "max_tokens": 2, "echo": true, "stream": true }),
    );
    assert_eq!(events(streamed.text())[0]["choices"][0]["text"], json!(text), "it comes first");

    let silent = ask(json!({ "prompt": text, "max_tokens": 0 }));
    assert_eq!(
        (&silent["choices"][0]["text"], &silent["usage"]["prompt_tokens"]),
        (&json!(""), &json!(n))
    );
    let beyond = server.post_to("/v1/completions", &json!({ "prompt": [1, 2, 49_152] }));
    assert_eq!((beyond.status, &beyond.json()["error"]["param"]), (400, &json!("prompt")));
    assert!(beyond.text().contains("49152"), "{}", beyond.text());
}

#[test]
fn a_stream_tells_how_far_the_prompt_is() {
    let server = common::shared(&["--ctx", "512"]);
    let prompt = "one two three ".repeat(30);
    for (path, body) in [
        ("/v1/completions", json!({ "prompt": prompt })),
        ("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": prompt }] })),
    ] {
        let mut body = body;
        body["max_tokens"] = 2.into();
        let asks = |body: &Value| events(server.post_to(path, body).text());
        body["stream"] = true.into();
        assert!(asks(&body).iter().all(|chunk| chunk.get("prompt_progress").is_none()));
        (body["return_progress"], body["cache_prompt"]) = (true.into(), false.into());
        let chunks = asks(&body);
        let told = |chunk: &Value| {
            let progress = chunk.get("prompt_progress")?;
            Some(["total", "cache", "processed"].map(|name| progress[name].as_u64().unwrap()))
        };
        let all: Vec<[u64; 3]> = chunks.iter().filter_map(told).collect();
        let total = all[0][0];
        assert!(total > 90 && all.len() >= 2 && all[0] == [total, 0, 0], "{all:?}");
        assert_eq!(all.last().unwrap(), &[total, 0, total]);
        assert!(all.is_sorted_by(|a, b| a[2] < b[2]), "{all:?}");
    }
}
