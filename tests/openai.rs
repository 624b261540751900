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
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/clients");
    assert!(clients.is_dir(), "OpenAI's client is missing: run `scripts/setup clients`");
    let server = Server::start(&["--batch-size", "4", "--ctx", "512"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/openai_client.py");
    let run = Command::new("python3")
        .arg(script)
        .arg(format!("http://{}", server.addr))
        .env("PYTHONPATH", clients)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// To the letter: what a client that reads bytes sees.
#[test]
fn the_wire_is_as_openai_has_it() {
    let server = Server::start(&["--batch-size", "2", "--ctx", "256"]);
    let models = server.get("/v1/models").json();
    assert_eq!(
        (&models["object"], &models["data"][0]["object"]),
        (&json!("list"), &json!("model"))
    );

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
