//! Chats with tools and thoughts, as OpenAI's clients see them.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::sync::Arc;

use common::{Answer, Server};
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";

fn server() -> Arc<Server> {
    common::shared(&["--batch-size", "4", "--ctx", "1024"])
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({ "type": "function", "function": { "name": name, "description": "Does it.", "parameters": parameters } })
}

/// Tools with most of what schemas have.
fn tools() -> Vec<Value> {
    let text = json!({ "type": "string", "maxLength": 20 });
    vec![
        tool(
            "get_weather",
            json!({
                "type": "object", "required": ["city", "unit"],
                "properties": { "city": text, "unit": { "enum": ["celsius", "fahrenheit"] }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
            }),
        ),
        tool(
            "set-alarm.2",
            json!({
                "type": "object", "required": ["at", "repeat"], "additionalProperties": false,
                "properties": { "at": { "type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$" }, "repeat": { "type": "boolean" } },
            }),
        ),
        tool(
            "add",
            json!({
                "type": "object", "required": ["terms"], "additionalProperties": false,
                "properties": { "terms": { "type": "array", "minItems": 1, "maxItems": 3, "items": { "$ref": "#/$defs/term" } } },
                "$defs": { "term": { "anyOf": [{ "type": "number" }, text] } },
            }),
        ),
        tool("nothing", json!({})),
    ]
}

fn ask(server: &Server, more: Value) -> Answer {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "What is the weather in Oslo?" }],
        "max_tokens": 160, "temperature": 0, "seed": 1,
    });
    let Value::Object(more) = more else { panic!("fields") };
    body.as_object_mut().unwrap().extend(more);
    server.post_to(PATH, &body)
}

fn answered(server: &Server, more: Value) -> Value {
    let answer = ask(server, more);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// The calls of a message: names and arguments.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let call = |call: &Value| {
        assert!(call["type"] == "function" && call["id"].as_str().is_some_and(|id| id.len() > 4));
        let arguments = call["function"]["arguments"].as_str().unwrap();
        let arguments =
            serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{arguments}: {e}"));
        (call["function"]["name"].as_str().unwrap().to_owned(), arguments)
    };
    message["tool_calls"].as_array().into_iter().flatten().map(call).collect()
}

fn assert_valid(tools: &[Value], (name, arguments): &(String, Value)) {
    let tool = tools.iter().find(|tool| tool["function"]["name"] == *name).expect("a tool's name");
    let schema = &tool["function"]["parameters"];
    assert!(
        jsonschema::is_valid(schema, arguments) && arguments.is_object(),
        "{name}: {arguments}"
    );
}

#[test]
fn required_calls_follow_their_schemas_with_drafts_and_without() {
    let (server, tools) = (server(), tools());
    for seed in 0..12 {
        let request = |speculation: &str| {
            let more = json!({
                "tools": tools, "tool_choice": "required", "temperature": 1, "seed": seed,
                "parallel_tool_calls": seed % 3 == 0, "speculation": speculation, "max_tokens": 300,
            });
            answered(&server, more)
        };
        let (with, without) = (request("auto"), request("off"));
        let choice = &with["choices"][0];
        let (found, other) = (calls(&choice["message"]), &without["choices"][0]["message"]);
        assert!(!found.is_empty() && found == calls(other), "{found:?} and {other}");
        found.iter().for_each(|call| assert_valid(&tools, call));
        assert!(choice["message"]["content"].is_null(), "{choice}");
        // One of many calls may be cut off, and is closed.
        assert!(choice["finish_reason"] == "tool_calls" || seed % 3 == 0, "{choice}");
        let steps = choice["speculation"]["steps"].as_u64().unwrap();
        assert!(with["usage"]["completion_tokens"].as_u64().unwrap() > steps, "keys are drafted");
    }
}

#[test]
fn what_a_grammar_leaves_alone_is_told_as_its_drafts() {
    let more = json!({ "tools": tools(), "tool_choice": "required", "details": true, "speculation": "heads" });
    let answer = answered(&server(), more);
    let tokens = answer["choices"][0]["tokens"].as_array().unwrap();
    let by_grammar = tokens.iter().filter(|token| token["source"] == "grammar").count();
    assert!(by_grammar >= 8, "{by_grammar} of {}", tokens.len());
}

/// What the chunks of a stream amount to: the message, and why it ended.
fn joined(answer: &Answer) -> (Value, Value) {
    let text = answer.text();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let chunks = text.split("\n\n").filter_map(|event| event.strip_prefix("data: {"));
    let (mut message, mut reason) = (json!({ "content": null }), Value::Null);
    let add = |to: &mut Value, more: &Value| {
        if let Some(more) = more.as_str() {
            *to = format!("{}{more}", to.as_str().unwrap_or_default()).into();
        }
    };
    for chunk in chunks {
        let chunk: Value = serde_json::from_str(&format!("{{{chunk}")).unwrap();
        let choice = &chunk["choices"][0];
        assert!(reason.is_null(), "nothing comes after the end");
        reason = choice["finish_reason"].clone();
        let delta = &choice["delta"];
        add(&mut message["content"], &delta["content"]);
        add(&mut message["reasoning_content"], &delta["reasoning_content"]);
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let place = part["index"].as_u64().unwrap() as usize;
            if part["id"].is_string() {
                let calls = message["tool_calls"].as_array().map_or(0, Vec::len);
                assert!(place == calls && part["function"]["name"].is_string(), "{part}");
                let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
                message["tool_calls"] = [calls, vec![part.clone()]].concat().into();
            } else {
                let more = part["function"]["arguments"].clone();
                add(&mut message["tool_calls"][place]["function"]["arguments"], &more);
            }
        }
    }
    (message, reason)
}

fn streamed(mut more: Value) -> Value {
    more["stream"] = true.into();
    more
}

#[test]
fn a_stream_amounts_to_the_whole_answer() {
    let server = server();
    for more in [
        json!({ "tools": tools(), "tool_choice": "required", "parallel_tool_calls": true }),
        json!({ "tools": tools(), "tool_choice": "auto", "max_tokens": 30 }),
        json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "add" } } }),
    ] {
        let whole = answered(&server, more.clone());
        let choice = &whole["choices"][0];
        let (message, reason) = joined(&ask(&server, streamed(more)));
        assert_eq!(calls(&message), calls(&choice["message"]));
        let text = |message: &Value| message["content"].as_str().unwrap_or_default().to_owned();
        assert_eq!(text(&message), text(&choice["message"]));
        assert_eq!(reason, choice["finish_reason"]);
    }
}

#[test]
fn a_choice_is_followed() {
    let (server, tools) = (server(), tools());
    let named = json!({ "type": "function", "function": { "name": "set-alarm.2" } });
    let answer = answered(&server, json!({ "tools": tools, "tool_choice": named }));
    let [call] = &calls(&answer["choices"][0]["message"])[..] else { panic!("{answer}") };
    assert_eq!(call.0, "set-alarm.2");
    let none = json!({ "tools": tools, "tool_choice": "none", "max_tokens": 20 });
    let [none, plain] = [none, json!({ "max_tokens": 20 })].map(|more| answered(&server, more));
    assert_eq!(none["choices"][0]["message"], plain["choices"][0]["message"]);
    assert_eq!(none["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
}

#[test]
fn results_of_tools_come_back() {
    let (server, tools) = (server(), tools());
    let call = |id: &str, city: &str| {
        let arguments = json!({ "city": city, "unit": "celsius" }).to_string();
        json!({ "id": id, "type": "function", "function": { "name": "get_weather", "arguments": arguments } })
    };
    let messages = json!([
        { "role": "user", "content": "What is the weather in Oslo and Rome?" },
        { "role": "assistant", "content": null, "tool_calls": [call("a1", "Oslo"), call("a2", "Rome")] },
        { "role": "tool", "tool_call_id": "a1", "content": "4 degrees, snow" },
        { "role": "tool", "tool_call_id": "a2", "content": [{ "type": "text", "text": "19 degrees" }] },
    ]);
    let with = answered(&server, json!({ "messages": messages, "tools": tools, "max_tokens": 20 }));
    assert!(with["choices"][0]["message"]["content"].is_string(), "{with}");
    let prompt = server.post_to("/apply-template", &json!({ "messages": messages })).json();
    let prompt = prompt["prompt"].as_str().unwrap();
    for part in ["\"city\": \"Oslo\"", "snow", "19 degrees", "get_weather"] {
        assert!(prompt.replace("\":\"", "\": \"").contains(part), "{part} in {prompt}");
    }
}

#[test]
fn arguments_are_whole_though_the_tokens_run_out() {
    let endless = json!({
        "type": "object", "required": ["text", "list", "kind"], "additionalProperties": false,
        "properties": {
            "text": { "type": "string", "minLength": 300 }, "list": { "type": "array", "items": { "type": "string" } },
            "kind": { "enum": ["a", "b"] },
        },
    });
    let open = json!({
        "type": "object", "required": ["text"],
        "properties": { "text": { "type": "array", "minItems": 1, "items": { "type": "string", "pattern": "^[a-z ]*$" } } },
    });
    let server = server();
    let cut = |schema: &Value, max_tokens: usize| {
        let more = json!({
            "tools": [tool("write", schema.clone())], "tool_choice": "required", "max_tokens": max_tokens,
            "temperature": 1, "ignore_eos": true,
        });
        answered(&server, more)["choices"][0].clone()
    };
    let choice = cut(&open, 60);
    assert_valid(&[tool("write", open)], &calls(&choice["message"])[0]);
    // What cannot be closed is cut off.
    let choice = cut(&endless, 60);
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["message"]["tool_calls"][0]["function"]["arguments"].is_string());
}

#[test]
fn an_answer_may_be_a_call_or_json() {
    let (server, tools) = (server(), tools());
    let schema = json!({ "type": "object", "properties": { "ok": { "type": "boolean" } }, "required": ["ok"] });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    for seed in 0..4 {
        let more = json!({
            "tools": tools, "response_format": format, "temperature": 1, "seed": seed, "max_tokens": 300,
        });
        let answer = answered(&server, more);
        let message = &answer["choices"][0]["message"];
        let found = calls(message);
        found.iter().for_each(|call| assert_valid(&tools, call));
        if found.is_empty() {
            let value: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
            assert!(value["ok"].is_boolean(), "{value}");
        }
    }
}

#[test]
fn what_is_no_tool_is_refused_by_its_path() {
    let server = server();
    let one = tool("f", json!({ "type": "object" }));
    for (more, param) in [
        (json!({ "tools": [{ "type": "web_search" }] }), "tools[0].type"),
        (json!({ "tools": [one, { "type": "function" }] }), "tools[1].function"),
        (json!({ "tools": [tool("", json!({}))] }), "tools[0].function.name"),
        (json!({ "tools": [tool("a b", json!({}))] }), "tools[0].function.name"),
        (json!({ "tools": [tool("f", json!([]))] }), "tools[0].function.parameters"),
        (json!({ "tools": [one, one] }), "tools[1].function.name"),
        (json!({ "tools": "f" }), "tools"),
        (json!({ "tools": [one], "tool_choice": "maybe" }), "tool_choice"),
        (
            json!({ "tools": [one], "tool_choice": { "type": "function", "function": { "name": "g" } } }),
            "tool_choice",
        ),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tools": [tool("f", json!({ "type": "strange" }))], "tool_choice": "required" }),
            "tools",
        ),
        (json!({ "tools": [one], "grammar": "start: \"x\"" }), "tools"),
        (json!({ "thinking_budget_tokens": -2 }), "thinking_budget_tokens"),
        (json!({ "reasoning_format": "loud" }), "reasoning_format"),
    ] {
        let answer = ask(&server, more.clone());
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (400, &json!(param)),
            "{more}"
        );
    }
}

/// A template of models that think and call.
const THINKER: &str = r#"{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '\n</tools>\nFor each call return <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"#;

#[test]
fn thoughts_are_apart_and_end_within_their_budget() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(THINKER.as_bytes()).unwrap();
    let path = file.path().to_str().unwrap();
    let server =
        Server::start(&["--batch-size", "2", "--ctx", "1024", "--chat-template-file", path]);
    let message = |more: Value| answered(&server, more)["choices"][0]["message"].clone();

    let thinks = message(json!({ "max_tokens": 40, "thinking_budget_tokens": 8 }));
    let thoughts = thinks["reasoning_content"].as_str().unwrap();
    assert!(!thoughts.is_empty() && thoughts.len() < 80, "{thinks}");
    assert!(!thinks["content"].as_str().unwrap().contains("think>"), "{thinks}");
    for off in [
        json!({ "max_tokens": 20, "reasoning_effort": "none" }),
        json!({ "max_tokens": 20, "thinking_budget_tokens": 0 }),
        json!({ "max_tokens": 20, "chat_template_kwargs": { "enable_thinking": false } }),
    ] {
        assert!(message(off)["reasoning_content"].is_null());
    }
    let inline =
        json!({ "max_tokens": 40, "thinking_budget_tokens": 8, "reasoning_format": "none" });
    let inline = message(inline);
    assert!(inline["reasoning_content"].is_null());
    assert!(inline["content"].as_str().unwrap().contains("</think>"), "{inline}");

    let call = json!({
        "tools": tools(), "tool_choice": "required", "thinking_budget_tokens": 8, "max_tokens": 300,
    });
    let called = message(call.clone());
    assert!(!called["reasoning_content"].as_str().unwrap().is_empty(), "{called}");
    let found = calls(&called);
    assert!(!found.is_empty(), "{called}");
    found.iter().for_each(|call| assert_valid(&tools(), call));
    let (streamed, reason) = joined(&ask(&server, streamed(call)));
    assert_eq!((calls(&streamed), reason), (found, json!("tool_calls")));
    assert_eq!(streamed["reasoning_content"], called["reasoning_content"]);

    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer" } }, "required": ["n"], "additionalProperties": false });
    let formatted = message(json!({
        "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } },
        "thinking_budget_tokens": 8, "max_tokens": 100,
    }));
    assert!(formatted["reasoning_content"].is_string(), "{formatted}");
    let value: Value = serde_json::from_str(formatted["content"].as_str().unwrap()).unwrap();
    assert!(value["n"].is_number(), "{formatted}");
}
