//! OpenAI's `/v1/responses`, as its clients speak it.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::{Answer, Server};
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";

fn server() -> Arc<Server> {
    common::shared(&["--batch-size", "4", "--ctx", "1024"])
}

/// A greedy request, with more fields.
fn body(more: Value) -> Value {
    let mut body = json!({
        "model": "any", "max_output_tokens": 24, "temperature": 0, "instructions": "Be brief.",
        "input": "Name three colours.",
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

/// A stream's events, each with its name and the same `type`, numbered.
fn events(answer: &Answer) -> Vec<Value> {
    assert!(answer.head.contains("content-type: text/event-stream"), "{}", answer.text());
    let events = answer.text().split("\n\n").filter(|event| !event.is_empty());
    let one = |(i, event): (usize, &str)| {
        let (name, data) = event.split_once('\n').expect("two lines");
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name.strip_prefix("event: ").unwrap());
        assert_eq!(data["sequence_number"], i);
        data
    };
    events.enumerate().map(one).collect()
}

/// The items that a stream's events amount to, each in the order that OpenAI has.
fn joined(events: &[Value]) -> Vec<Value> {
    let mut items: Vec<Value> = Vec::new();
    let mut text = String::new();
    for event in events {
        let kind = event["type"].as_str().unwrap().strip_prefix("response.").unwrap();
        let is_last =
            event["output_index"].as_u64().is_none_or(|index| index + 1 >= items.len() as u64);
        assert!(is_last, "{event}");
        if let Some(id) = event.get("item_id") {
            assert_eq!(*id, items.last().unwrap()["id"]);
        }
        match kind {
            "output_item.added" => {
                assert_eq!(
                    (event["output_index"].as_u64(), &event["item"]["status"]),
                    (Some(items.len() as u64), &json!("in_progress"))
                );
                items.push(event["item"].clone());
            }
            "content_part.added" => text.clear(),
            "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta" => {
                text += event["delta"].as_str().unwrap();
            }
            "output_text.done" | "reasoning_text.done" => assert_eq!(event["text"], text),
            "function_call_arguments.done" => {
                assert_eq!(event["arguments"], std::mem::take(&mut text))
            }
            "content_part.done" => assert_eq!(event["part"]["text"], std::mem::take(&mut text)),
            "output_item.done" => {
                let (item, done) = (items.last_mut().unwrap(), &event["item"]);
                assert_eq!((&item["id"], &item["type"]), (&done["id"], &done["type"]));
                *item = done.clone();
            }
            "created" | "in_progress" | "completed" | "incomplete" => {}
            other => panic!("{other}"),
        }
    }
    let begin: Vec<&str> =
        events[..2].iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(begin, ["response.created", "response.in_progress"]);
    let last = &events.last().unwrap()["response"];
    assert_eq!((&last["output"], &last["id"]), (&json!(items), &events[0]["response"]["id"]));
    assert_eq!(
        events.last().unwrap()["type"],
        format!("response.{}", last["status"].as_str().unwrap())
    );
    items
}

/// Items without what differs from one request to the next.
fn comparable(items: &Value) -> Value {
    let mut items = items.clone();
    for item in items.as_array_mut().unwrap() {
        for name in ["id", "call_id"] {
            item.as_object_mut().unwrap().remove(name);
        }
    }
    items
}

fn weather() -> Value {
    json!({
        "type": "function", "name": "get_weather", "description": "The weather in a city.", "strict": true,
        "parameters": {
            "type": "object",
            "properties": { "city": { "type": "string", "maxLength": 12 }, "unit": { "enum": ["C", "F"] } },
            "required": ["city", "unit"], "additionalProperties": false,
        },
    })
}

#[test]
fn a_stream_is_the_whole_answer() {
    let server = server();
    let whole = ask(
        &server,
        json!({ "metadata": { "a": "b" }, "store": true, "reasoning": { "effort": "low" } }),
    );
    assert!(whole["id"].as_str().unwrap().starts_with("resp_"), "{whole}");
    for (name, value) in [
        ("object", json!("response")),
        ("instructions", json!("Be brief.")),
        ("max_output_tokens", json!(24)),
        ("metadata", json!({ "a": "b" })),
        ("store", json!(false)),
        ("tool_choice", json!("auto")),
        ("reasoning", json!({ "effort": "low", "summary": null })),
        ("text", json!({ "format": { "type": "text" } })),
        ("error", Value::Null),
    ] {
        assert_eq!(whole[name], value, "{name}");
    }
    let item = &whole["output"][0];
    assert!(
        item["id"].as_str().unwrap().starts_with("msg_") && item["role"] == "assistant",
        "{item}"
    );
    assert!(!item["content"][0]["text"].as_str().unwrap().is_empty());
    let count = |name: &str| whole["usage"][name].as_u64().unwrap();
    assert_eq!(count("total_tokens"), count("input_tokens") + count("output_tokens"));

    for alias in [PATH, "/responses"] {
        let events = events(&server.post_to(alias, &body(json!({ "stream": true }))));
        assert_eq!(comparable(&json!(joined(&events))), comparable(&whole["output"]));
    }
    let items = json!([{ "role": "user", "content": [{ "type": "input_text", "text": "Name three colours." }] }]);
    assert_eq!(
        comparable(&ask(&server, json!({ "input": items }))["output"]),
        comparable(&whole["output"])
    );
}

#[test]
fn an_answer_ends_at_the_limit_or_a_stop_string() {
    let server = server();
    let short = ask(&server, json!({ "max_output_tokens": 2, "ignore_eos": true }));
    assert_eq!(
        (&short["status"], &short["incomplete_details"]["reason"], &short["output"][0]["status"]),
        (&json!("incomplete"), &json!("max_output_tokens"), &json!("incomplete"))
    );
    let events = events(&server.post_to(
        PATH,
        &body(json!({ "max_output_tokens": 2, "ignore_eos": true, "stream": true })),
    ));
    assert_eq!(joined(&events)[0]["status"], "incomplete");
    let free = ask(&server, json!({ "max_output_tokens": 1_000_000, "stop": ["."] }));
    assert_eq!((&free["status"], &free["incomplete_details"]), (&json!("completed"), &Value::Null));
}

#[test]
fn a_function_is_called_and_its_result_read() {
    let server = server();
    for choice in [json!("required"), json!({ "type": "function", "name": "get_weather" })] {
        let question = json!({ "role": "user", "content": "How is the weather in Paris?" });
        let asked = json!({
            "tools": [weather(), { "type": "web_search" }], "tool_choice": choice, "max_output_tokens": 100, "seed": 5,
            "input": [question],
        });
        let answer = server.post_to(PATH, &body(asked.clone()));
        assert_eq!(
            (answer.status, answer.header("x-ignored-fields")),
            (200, Some("tools[].web_search")),
            "{}",
            answer.text()
        );
        let called = answer.json();
        assert_eq!(
            (&called["status"], &called["tools"]),
            (&json!("completed"), &json!([weather()]))
        );
        let calls: Vec<&Value> = called["output"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|item| item["type"] == "function_call")
            .collect();
        let arguments: Value =
            serde_json::from_str(calls[0]["arguments"].as_str().unwrap()).unwrap();
        assert!(calls[0]["name"] == "get_weather" && arguments["city"].is_string(), "{called}");
        assert!(["C", "F"].contains(&arguments["unit"].as_str().unwrap()), "{arguments}");

        let mut streaming = asked.clone();
        streaming["stream"] = true.into();
        let events = events(&server.post_to(PATH, &body(streaming)));
        assert_eq!(comparable(&json!(joined(&events))), comparable(&called["output"]));

        let results = calls.iter().map(|call| {
            json!({ "type": "function_call_output", "call_id": call["call_id"], "output": "Sunny, 21 degrees." })
        });
        let items = [question]
            .into_iter()
            .chain(called["output"].as_array().unwrap().iter().cloned())
            .chain(results);
        let input: Vec<Value> = items.collect();
        let answered =
            ask(&server, json!({ "tools": [weather()], "input": input, "max_output_tokens": 8 }));
        assert!(answered["usage"]["output_tokens"].as_u64().unwrap() > 0);
    }
}

/// With the template of a model whose answers begin with thoughts.
#[test]
fn thoughts_are_an_item_of_their_own() {
    let template = common::template_path("Qwen-QwQ-32B.jinja");
    let server = Server::start(&["--ctx", "512", "--chat-template-file", &template]);
    let asked = json!({ "max_output_tokens": 8, "ignore_eos": true });
    let whole = ask(&server, asked.clone());
    let item = &whole["output"][0];
    assert_eq!(
        (&item["type"], &item["content"][0]["type"], &item["summary"]),
        (&json!("reasoning"), &json!("reasoning_text"), &json!([]))
    );
    assert!(whole["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 0);
    let mut streaming = asked;
    streaming["stream"] = true.into();
    let events = events(&server.post_to(PATH, &body(streaming)));
    assert_eq!(comparable(&json!(joined(&events))), comparable(&whole["output"]));
}

#[test]
fn an_answer_is_json_that_follows_a_schema() {
    let server = server();
    let schema = json!({ "enum": ["yes", "no"] });
    let format =
        json!({ "type": "json_schema", "name": "answer", "schema": schema, "strict": true });
    let answer = ask(&server, json!({ "text": { "format": format.clone(), "verbosity": "low" } }));
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(["\"yes\"", "\"no\""].contains(&text), "{text}");
    assert_eq!(answer["text"]["format"], format);
}

#[test]
fn log_probabilities_come_with_each_token() {
    let server = server();
    let asked = json!({ "top_logprobs": 2, "include": ["message.output_text.logprobs"], "max_output_tokens": 6 });
    let whole = ask(&server, asked.clone());
    let part = &whole["output"][0]["content"][0];
    let tokens = part["logprobs"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(part["text"], text);
    assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 2));
    let mut streaming = asked;
    streaming["stream"] = true.into();
    let items = joined(&events(&server.post_to(PATH, &body(streaming))));
    assert_eq!(items[0]["content"][0]["logprobs"].as_array().unwrap().len(), tokens.len());
}

#[test]
fn what_codex_and_agents_send_is_taken() {
    let server = server();
    let request = body(json!({
        "store": false, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "x", "parallel_tool_calls": false,
        "reasoning": { "effort": "medium", "summary": "auto" }, "text": { "verbosity": "low" }, "tool_choice": "auto",
        "tools": [weather(), { "type": "local_shell" }, { "type": "custom", "name": "apply_patch", "format": { "type": "grammar" } }],
        "input": [
            { "type": "message", "role": "developer", "content": [{ "type": "input_text", "text": "Use tools." }] },
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] },
            { "type": "reasoning", "id": "rs_1", "summary": [], "content": [{ "type": "reasoning_text", "text": "They greet." }], "encrypted_content": null },
            { "type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
                { "type": "output_text", "text": "Hello.", "annotations": [], "logprobs": [] }] },
            { "type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "get_weather", "arguments": "{\"city\": \"Paris\", \"unit\": \"C\"}" },
            { "type": "function_call_output", "call_id": "call_1", "output": [{ "type": "input_text", "text": "Sunny" }] },
        ],
    }));
    let answer = server.post_to(PATH, &request);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("x-ignored-fields"), Some("tools[].custom,tools[].local_shell"));
    assert_eq!(answer.json()["parallel_tool_calls"], false);
}

#[test]
fn errors_have_openais_shape_and_name_the_field() {
    let server = server();
    let item = |item: Value| json!({ "input": [{ "role": "user", "content": "x" }, item] });
    for (more, param) in [
        (json!({ "input": null }), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": 1 }), "input"),
        (item(json!({ "role": "tool", "content": "x" })), "input[1]"),
        (item(json!({ "type": "computer_call" })), "input[1]"),
        (item(json!({ "type": "item_reference", "id": "msg_1" })), "input[1].type"),
        (
            item(
                json!({ "role": "user", "content": [{ "type": "input_image", "image_url": "x" }] }),
            ),
            "input[1].content[0].type",
        ),
        (json!({ "previous_response_id": "resp_1" }), "previous_response_id"),
        (json!({ "conversation": "conv_1" }), "conversation"),
        (json!({ "prompt": { "id": "pmpt_1" } }), "prompt"),
        (json!({ "background": true }), "background"),
        (json!({ "max_output_tokens": 0 }), "max_output_tokens"),
        (json!({ "temperature": 3 }), "temperature"),
        (json!({ "tools": [{ "type": "function", "name": "no name" }] }), "tools[0].name"),
        (json!({ "tools": [{ "name": "f" }] }), "tools[0].type"),
        (json!({ "tools": [{ "type": "web_search" }], "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tools": [weather()], "tool_choice": { "type": "function", "name": "g" } }),
            "tool_choice",
        ),
        (
            json!({ "text": { "format": { "type": "json_schema", "name": "x", "schema": { "enum": [] } } } }),
            "text.format",
        ),
        (json!({ "input": "word ".repeat(3000) }), "input"),
    ] {
        let refused = server.post_to(PATH, &body(more.clone()));
        let error = &refused.json()["error"];
        assert_eq!(
            (refused.status, &error["type"]),
            (400, &json!("invalid_request_error")),
            "{more} {error}"
        );
        assert_eq!(error["param"], param, "{error}");
    }
    let strict = Server::start(&["--ctx", "256", "--strict-fields"]);
    let refused =
        strict.post_to(PATH, &json!({ "input": "x", "tools": [{ "type": "web_search" }] }));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools[0].type")));
}
