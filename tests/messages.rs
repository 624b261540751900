//! Anthropic's dialect, as its clients speak it.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::{Answer, Server};
use serde_json::{Value, json};

const PATH: &str = "/v1/messages";

fn server() -> Arc<Server> {
    common::shared(&["--batch-size", "4", "--ctx", "1024"])
}

/// A greedy request, with more fields.
fn body(more: Value) -> Value {
    let mut body = json!({
        "model": "any", "max_tokens": 24, "temperature": 0, "system": "Be brief.",
        "messages": [{ "role": "user", "content": "Name three colours." }],
    });
    let Value::Object(more) = more else { panic!("fields") };
    body.as_object_mut().unwrap().extend(more);
    body
}

fn ask(server: &Server, more: Value) -> Value {
    let answer = server.post_to(PATH, &body(more));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// A stream's events, each with its name and the same `type`.
fn events(answer: &Answer) -> Vec<Value> {
    assert!(answer.head.contains("content-type: text/event-stream"), "{}", answer.text());
    let events = answer.text().split("\n\n").filter(|event| !event.is_empty());
    let one = |event: &str| {
        let (name, data) = event.split_once('\n').expect("two lines");
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name.strip_prefix("event: ").unwrap());
        data
    };
    events.map(one).collect()
}

/// The whole answer that a stream amounts to.
fn joined(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    assert_eq!(events[0]["type"], "message_start");
    let mut arguments = String::new();
    for event in &events[1..] {
        let index = event["index"].as_u64().map(|index| index as usize);
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                let content = message["content"].as_array_mut().unwrap();
                assert_eq!(index, Some(content.len()));
                content.push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let delta = &event["delta"];
                let block = &mut message["content"][index.unwrap()];
                let mut add = |name: &str| {
                    let more = delta[name].as_str().unwrap();
                    block[name] = format!("{}{more}", block[name].as_str().unwrap()).into();
                };
                match delta["type"].as_str().unwrap() {
                    "text_delta" => add("text"),
                    "thinking_delta" => add("thinking"),
                    "signature_delta" => add("signature"),
                    "input_json_delta" => arguments += delta["partial_json"].as_str().unwrap(),
                    other => panic!("{other}"),
                }
            }
            "content_block_stop" => {
                let text = std::mem::take(&mut arguments);
                if !text.is_empty() {
                    let input: Value = serde_json::from_str(&text).expect("whole arguments");
                    message["content"][index.unwrap()]["input"] = input;
                }
            }
            "message_delta" => {
                for name in ["stop_reason", "stop_sequence"] {
                    message[name] = event["delta"][name].clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "ping" | "message_stop" => {}
            other => panic!("{other}"),
        }
    }
    assert_eq!(events.last().unwrap()["type"], "message_stop");
    message
}

/// A whole answer without what differs from one request to the next.
fn comparable(mut message: Value) -> Value {
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    for name in ["id", "usage"] {
        message.as_object_mut().unwrap().remove(name);
    }
    for block in message["content"].as_array_mut().unwrap() {
        block.as_object_mut().unwrap().remove("id");
    }
    message
}

fn weather() -> Value {
    json!({
        "name": "get_weather", "description": "The weather in a city.", "cache_control": { "type": "ephemeral" },
        "input_schema": {
            "type": "object",
            "properties": { "city": { "type": "string", "maxLength": 12 }, "unit": { "enum": ["C", "F"] } },
            "required": ["city", "unit"], "additionalProperties": false,
        },
    })
}

#[test]
fn a_stream_is_the_whole_answer() {
    let server = server();
    let whole = ask(&server, json!({}));
    assert_eq!(
        (&whole["type"], &whole["role"], &whole["stop_sequence"]),
        (&json!("message"), &json!("assistant"), &Value::Null)
    );
    let text = whole["content"][0]["text"].as_str().unwrap();
    assert!(!text.is_empty() && whole["content"].as_array().unwrap().len() == 1, "{whole}");
    let usage = &whole["usage"];
    let count = server.post_to("/v1/messages/count_tokens", &body(json!({}))).json();
    let again = ask(&server, json!({}));
    let sum = |usage: &Value| {
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap()
    };
    assert_eq!(count, json!({ "input_tokens": sum(usage) }));
    assert!(again["usage"]["cache_read_input_tokens"].as_u64().unwrap() > 0, "{again}");
    let cold = ask(&server, json!({ "cache_prompt": false }));
    assert_eq!(cold["usage"]["input_tokens"], count["input_tokens"]);

    let answer = server.post_to(PATH, &body(json!({ "stream": true })));
    let events = events(&answer);
    assert_eq!(sum(&events[0]["message"]["usage"]), sum(usage), "known at the beginning");
    assert_eq!(events[1]["type"], "ping");
    assert_eq!(comparable(joined(&events)), comparable(whole));
}

#[test]
fn an_answer_ends_at_a_stop_sequence_or_the_limit() {
    let server = server();
    let free = ask(&server, json!({}))["content"][0]["text"].as_str().unwrap().to_owned();
    let stop = &free[4..7];
    let stopped = ask(&server, json!({ "stop_sequences": [stop, "never"] }));
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!(stop))
    );
    assert_eq!(stopped["content"][0]["text"], free[..free.find(stop).unwrap()]);
    let short = ask(&server, json!({ "max_tokens": 2, "ignore_eos": true }));
    assert_eq!(
        (&short["stop_reason"], &short["usage"]["output_tokens"]),
        (&json!("max_tokens"), &json!(2))
    );
    let clamped = ask(&server, json!({ "max_tokens": 1_000_000, "stop_sequences": [stop] }));
    assert_eq!(clamped["stop_reason"], "stop_sequence");
    let prefilled = ask(
        &server,
        json!({
            "grammar": "start: \", b\"",
            "messages": [{ "role": "user", "content": "Letters?" }, { "role": "assistant", "content": "a" }],
        }),
    );
    assert_eq!(prefilled["content"], json!([{ "type": "text", "text": ", b" }]));
}

#[test]
fn a_tool_is_called_and_its_result_read() {
    let server = server();
    for choice in [json!({ "type": "any" }), json!({ "type": "tool", "name": "get_weather" })] {
        let asked = json!({
            "tools": [weather()], "tool_choice": choice, "max_tokens": 100, "seed": 5,
            "messages": [{ "role": "user", "content": "How is the weather in Paris?" }],
        });
        let called = ask(&server, asked.clone());
        assert_eq!(called["stop_reason"], "tool_use", "{called}");
        let calls = called["content"].as_array().unwrap();
        let call = calls.iter().find(|block| block["type"] == "tool_use").unwrap();
        assert_eq!(call["name"], "get_weather");
        assert!(call["input"]["city"].is_string(), "{call}");
        assert!(["C", "F"].contains(&call["input"]["unit"].as_str().unwrap()), "{call}");

        let mut streaming = asked.clone();
        streaming["stream"] = true.into();
        let events = events(&server.post_to(PATH, &body(streaming)));
        assert_eq!(comparable(joined(&events)), comparable(called.clone()));

        let mut messages = asked["messages"].clone();
        let list = messages.as_array_mut().unwrap();
        list.push(json!({ "role": "assistant", "content": called["content"] }));
        let results = calls.iter().filter(|block| block["type"] == "tool_use").map(|block| {
            json!({ "type": "tool_result", "tool_use_id": block["id"], "is_error": true,
                    "content": [{ "type": "text", "text": "Sunny, 21 degrees." }] })
        });
        list.push(json!({ "role": "user", "content": results.collect::<Vec<_>>() }));
        let answered =
            ask(&server, json!({ "tools": [weather()], "messages": messages, "max_tokens": 8 }));
        assert!(answered["usage"]["output_tokens"].as_u64().unwrap() > 0);
    }
    let none = ask(&server, json!({ "tools": [weather()], "tool_choice": { "type": "none" } }));
    assert_eq!(none["content"][0]["type"], "text");
}

/// With templates of models that think: one whose answers always begin with thoughts, and one that
/// is told whether to think.
#[test]
fn thoughts_are_blocks_of_their_own_and_come_only_when_asked_for() {
    let template = common::template_path("Qwen-QwQ-32B.jinja");
    let server = Server::start(&["--ctx", "512", "--chat-template-file", &template]);
    let asked =
        json!({ "thinking": { "type": "enabled", "budget_tokens": 8 }, "ignore_eos": true });
    let whole = ask(&server, asked.clone());
    let kinds: Vec<&Value> =
        whole["content"].as_array().unwrap().iter().map(|block| &block["type"]).collect();
    assert_eq!(kinds, ["thinking", "text"], "{whole}");
    assert!(!whole["content"][0]["signature"].as_str().unwrap().is_empty());
    let mut streaming = asked;
    streaming["stream"] = true.into();
    let events = events(&server.post_to(PATH, &body(streaming)));
    assert_eq!(comparable(joined(&events)), comparable(whole));

    let template = common::template_path("Qwen-Qwen3-0.6B.jinja");
    let server = Server::start(&["--ctx", "512", "--chat-template-file", &template]);
    let count = |thinking: Value| {
        let body = body(json!({ "thinking": thinking }));
        server.post_to("/v1/messages/count_tokens", &body).json()["input_tokens"].as_u64().unwrap()
    };
    let [absent, disabled] = [Value::Null, json!({ "type": "disabled" })].map(count);
    let [adaptive, enabled] =
        [json!({ "type": "adaptive" }), json!({ "type": "enabled", "budget_tokens": 9 })]
            .map(count);
    assert!(absent == disabled && adaptive == enabled && adaptive < disabled);
}

#[test]
fn an_answer_is_json_that_follows_a_schema() {
    let format = json!({ "type": "json_schema", "schema": { "enum": ["yes", "no"] } });
    let answer = ask(&server(), json!({ "output_config": { "format": format } }));
    let text = answer["content"][0]["text"].as_str().unwrap();
    assert!(["\"yes\"", "\"no\""].contains(&text), "{text}");
}

#[test]
fn errors_have_anthropics_shape_and_name_the_field() {
    let server = server();
    let image = json!([{ "role": "user", "content": [{ "type": "text", "text": "x" }, { "type": "image", "source": {} }] }]);
    let misplaced = json!([{ "role": "user", "content": [{ "type": "tool_use", "id": "1", "name": "f", "input": {} }] }]);
    let mut bad_schema = weather();
    bad_schema["name"] = json!("no name");
    for (more, named) in [
        (json!({ "max_tokens": null }), "max_tokens"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": [{ "role": "tool", "content": "x" }] }), "messages[0].role"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "audio" }] }] }),
            "messages[0].content[0]",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "text" }] }] }),
            "messages[0].content[0]",
        ),
        (json!({ "messages": image }), "messages[0].content[1].type"),
        (json!({ "messages": misplaced }), "messages[0].content[0].type"),
        (
            json!({ "tools": [{ "type": "web_search_20250305", "name": "web_search" }] }),
            "tools[0].type",
        ),
        (json!({ "tools": [{ "name": "f" }] }), "tools[0].input_schema"),
        (json!({ "tools": [bad_schema] }), "tools[0].name"),
        (json!({ "tools": [weather(), weather()] }), "tools[1].name"),
        (json!({ "tool_choice": { "type": "any" } }), "tool_choice"),
        (
            json!({ "tools": [weather()], "tool_choice": { "type": "tool", "name": "g" } }),
            "tool_choice",
        ),
        (json!({ "tools": [weather()], "tool_choice": { "type": "tool" } }), "tool_choice"),
        (json!({ "thinking": { "type": "enabled" } }), "thinking"),
        (json!({ "temperature": 3 }), "temperature"),
        (json!({ "mcp_servers": [{}] }), "mcp_servers"),
        (
            json!({ "output_config": { "format": { "type": "json_schema", "schema": { "enum": [] } } } }),
            "output_config.format",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "word ".repeat(3000) }] }),
            "prompt is too long",
        ),
    ] {
        let refused = server.post_to(PATH, &body(more.clone()));
        let error = refused.json();
        assert_eq!(refused.status, 400, "{more} {error}");
        assert_eq!(
            (&error["type"], &error["error"]["type"]),
            (&json!("error"), &json!("invalid_request_error"))
        );
        assert_eq!(Some(error["request_id"].as_str().unwrap()), refused.header("x-request-id"));
        assert!(error["error"]["message"].as_str().unwrap().contains(named), "{named}: {error}");
    }
    let missing = server.get("/v1/messages/batches");
    assert_eq!(
        (missing.status, &missing.json()["error"]["type"]),
        (404, &json!("not_found_error"))
    );
    assert_eq!(server.get(PATH).status, 405);
}

#[test]
fn what_claude_code_sends_is_taken() {
    let server = server();
    let system = |stamp: &str| {
        json!([
            { "type": "text", "text": format!("x-anthropic-billing-header: cc_version=2.1; cch={stamp};") },
            { "type": "text", "text": "You are a helpful assistant.", "cache_control": { "type": "ephemeral", "ttl": "1h" } },
        ])
    };
    let request = json!({
        "max_tokens": 32_000, "stop_sequences": ["\n"], "system": system("a1b2c"), "thinking": { "type": "adaptive" },
        "context_management": { "edits": [{ "type": "clear_thinking_20251015", "keep": "all" }] },
        "metadata": { "user_id": "someone" }, "output_config": { "effort": "medium" }, "tools": [weather()],
        "messages": [
            { "role": "user", "content": [{ "type": "text", "text": "<system-reminder>x</system-reminder>" }, { "type": "text", "text": "Hi" }] },
            { "role": "assistant", "content": [
                { "type": "thinking", "thinking": "They greet.", "signature": "unsigned" }, { "type": "redacted_thinking", "data": "x" },
                { "type": "text", "text": "Hello. I look." },
                { "type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": { "city": "Paris", "unit": "C" } },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny", "cache_control": { "type": "ephemeral" } },
                { "type": "text", "text": "And now?" },
            ] },
        ],
    });
    let headers = [
        "anthropic-version: 2023-06-01",
        "anthropic-beta: claude-code-20250219",
        "x-api-key: none",
    ];
    let send = |body: &Value| {
        server.ask("POST /v1/messages?beta=true", &headers, body.to_string().as_bytes())
    };
    let answer = send(&body(request.clone()));
    assert_eq!(
        (answer.status, answer.header("x-ignored-fields")),
        (200, None),
        "{}",
        answer.text()
    );
    let count = |stamp: &str| {
        let mut request = body(request.clone());
        request["system"] = system(stamp);
        server.post_to("/v1/messages/count_tokens", &request).json()
    };
    assert_eq!(count("a1b2c"), count("a much longer stamp, which no prompt has"));
    let unknown = send(&body(json!({ "zzz": 1 })));
    assert_eq!((unknown.status, unknown.header("x-ignored-fields")), (200, Some("zzz")));
}

#[test]
fn keys_may_be_anthropics() {
    let server = Server::start(&["--ctx", "256", "--api-key", "secret"]);
    let bytes = body(json!({ "max_tokens": 1 })).to_string();
    let ask = |headers: &[&str]| server.ask("POST /v1/messages", headers, bytes.as_bytes());
    let refused = ask(&[]);
    assert_eq!(
        (refused.status, &refused.json()["error"]["type"]),
        (401, &json!("authentication_error"))
    );
    assert_eq!(ask(&["x-api-key: secret"]).status, 200);
    assert_eq!(ask(&["Authorization: Bearer secret"]).status, 200);
}

/// Anthropic's Python client.
#[test]
fn anthropics_client_is_content() {
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/clients");
    assert!(
        clients.join("anthropic").is_dir(),
        "Anthropic's client is missing: run `scripts/setup clients`"
    );
    let server = Server::start(&["--batch-size", "4", "--ctx", "1024"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/anthropic_client.py");
    let run = Command::new("python3")
        .arg(script)
        .arg(format!("http://{}", server.addr))
        .env("PYTHONPATH", clients)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}
