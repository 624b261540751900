//! `/openapi.json` against the server that it describes: paths, and what answers look like. That
//! requests are read as documented is tested beside the document.
#![allow(missing_docs)]

mod common;

use common::{Answer, Server, exchange};
use serde_json::{Value, json};

/// A served document.
struct Document(Value);

impl Document {
    /// What is wrong with an answer: its status, its type or its body.
    fn fault(&self, method: &str, path: &str, answer: &Answer) -> Option<String> {
        let operation = &self.0["paths"][path][method];
        let response = &operation["responses"][answer.status.to_string()];
        let Some(content) = response["content"].as_object() else {
            return Some(format!(
                "{method} {path} does not document {} with a body",
                answer.status
            ));
        };
        let kind =
            answer.head.lines().find_map(|l| l.strip_prefix("content-type: ")).unwrap_or_default();
        match content.get(kind) {
            None => Some(format!("{method} {path} does not document {kind} for {}", answer.status)),
            Some(media) if kind == "application/json" => {
                self.differs("body", &media["schema"], &answer.json())
            }
            Some(media) if kind == "text/event-stream" => {
                let field = |event: &str, name: &str| {
                    event.lines().find_map(|line| Some(json!(line.strip_prefix(name)?)))
                };
                let events = answer.text().split("\n\n").filter(|event| !event.is_empty());
                let mut events = events.map(|event| {
                    let mut fields = json!({ "data": field(event, "data: ") });
                    field(event, "event: ").into_iter().for_each(|kind| fields["event"] = kind);
                    fields
                });
                events.find_map(|event| self.differs("event", &media["schema"], &event))
            }
            Some(_) => None,
        }
    }

    /// Where a value differs from its schema. A field that the schema does not name is a fault, too.
    fn differs(&self, at: &str, schema: &Value, value: &Value) -> Option<String> {
        let mut root = schema.clone();
        root["components"] = self.0["components"].clone();
        close(&mut root);
        let options = jsonschema::options().should_validate_formats(true);
        let validator = options.build(&root).expect("a valid schema");
        let faults = validator.iter_errors(value);
        let faults: Vec<_> =
            faults.map(|fault| format!("{at}{}: {fault}", fault.instance_path())).collect();
        (!faults.is_empty()).then(|| faults.join("; "))
    }
}

/// Forbids fields that a schema does not name, unless it says that there are others.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.values_mut().for_each(close);
            if map.get("properties").is_some_and(Value::is_object) {
                map.entry("additionalProperties").or_insert(json!(false));
            }
        }
        Value::Array(list) => list.iter_mut().for_each(close),
        _ => {}
    }
}

#[test]
fn answers_are_as_documented() {
    let server = Server::start(&["--batch-size", "2", "--ctx", "256", "--max-body-bytes", "10000"]);
    let document = Document(server.get("/openapi.json").json());
    let check = |method: &str, path: &str, status: u16, answer: &Answer| {
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(document.fault(method, path, answer), None);
    };
    for path in [
        "/",
        "/health",
        "/v1/health",
        "/ready",
        "/metrics",
        "/v1/loads",
        "/v1/models",
        "/openapi.json",
        "/docs",
    ] {
        check("get", path, 200, &server.get(path));
    }
    let openmetrics = server.ask("GET /metrics", &["Accept: application/openmetrics-text"], b"");
    check("get", "/metrics", 200, &openmetrics);
    let model = server.get("/v1/models").json()["data"][0].clone();
    let id = model["id"].as_str().unwrap();
    for path in [format!("/v1/models/{id}"), format!("/v1/models/{}", id.replace('-', "%2d"))] {
        let answer = server.get(&path);
        check("get", "/v1/models/{id}", 200, &answer);
        assert_eq!(answer.json(), model);
    }
    for other in ["", "gpt-4", "a/b%2", "%ff"] {
        let answer = server.get(&format!("/v1/models/{other}"));
        check("get", "/v1/models/{id}", 404, &answer);
        assert_eq!(answer.json()["error"]["code"], "model_not_found");
    }
    check("get", "/docs/{file}", 200, &server.get("/docs/swagger-ui.css"));
    check("get", "/docs/{file}", 200, &server.get("/docs/"));
    check("get", "/docs/{file}", 404, &server.get("/docs/nothing"));

    let post = |path: &str, status: u16, body: &Value| {
        check("post", path, status, &server.post_to(path, body))
    };
    let yes = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": { "const": "yes" } } });
    let more = [
        json!({}),
        json!({ "stop": [" "] }),
        json!({ "stream": true }),
        json!({ "details": true }),
        json!({ "response_format": yes }),
        json!({ "logprobs": 2 }),
        json!({ "timeout_s": 0 }),
    ];
    for more in more {
        let mut body = json!({ "prompt": "One two three", "max_tokens": 3 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let status = if body.get("timeout_s").is_some() { 408 } else { 200 };
        post("/generate", status, &body);
        post("/v1/completions", status, &body);
        body.as_object_mut().unwrap().remove("prompt");
        body["messages"] = json!([{ "role": "user", "content": "Hi" }]);
        if body.get("logprobs").is_some() {
            (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(2));
        }
        post("/v1/chat/completions", status, &body);
    }
    answers_of_turns_are_as_documented(&post);
    post("/generate", 422, &json!({ "prompt": "" }));
    post("/generate", 422, &json!([]));
    post("/v1/completions", 400, &json!({ "prompt": "x", "n": 99 }));
    let long = json!({ "prompt": "x".repeat(10_000) });
    let all =
        ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"];
    for path in all.into_iter().chain(["/v1/messages/count_tokens"]) {
        post(path, 413, &long);
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1\r\n\r\n{{"
        );
        check("post", path, 400, &exchange(server.addr, head.as_bytes()));
        check("post", path, 405, &server.get(path));
    }
}

/// Those of `/v1/messages` and `/v1/responses`, with calls, too.
fn answers_of_turns_are_as_documented(post: &dyn Fn(&str, u16, &Value)) {
    let parameters =
        json!({ "type": "object", "properties": { "x": { "enum": [1, 2] } }, "required": ["x"] });
    for more in
        [json!({}), json!({ "call": true }), json!({ "stop": ["e"] }), json!({ "timeout_s": 0 })]
    {
        for stream in [false, true] {
            let mut message =
                json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 40 });
            let mut response = json!({ "input": "Hi", "max_output_tokens": 40, "top_logprobs": 1 });
            if more.get("call").is_some() {
                message["tools"] = json!([{ "name": "f", "input_schema": parameters }]);
                message["tool_choice"] = json!({ "type": "any" });
                response["tools"] =
                    json!([{ "type": "function", "name": "f", "parameters": parameters }]);
                response["tool_choice"] = json!("required");
            }
            let is_late = more.get("timeout_s").is_some();
            if is_late && stream {
                continue; // it may have begun by then
            }
            let status = if is_late { 408 } else { 200 };
            for (path, mut body) in [("/v1/messages", message), ("/v1/responses", response)] {
                for name in ["stop", "timeout_s"] {
                    more.get(name).into_iter().for_each(|value| body[name] = value.clone());
                }
                body["stream"] = stream.into();
                post(path, status, &body);
            }
        }
    }
    post(
        "/v1/messages/count_tokens",
        200,
        &json!({ "messages": [{ "role": "user", "content": "Hi" }] }),
    );
    post("/v1/messages/count_tokens", 400, &json!({ "messages": [] }));
    post("/v1/messages", 400, &json!({ "messages": [] }));
    post("/v1/responses", 400, &json!({}));
}

#[test]
fn every_path_is_documented_and_the_page_is_found() {
    let server = Server::start_loading(&["--ctx", "256"]);
    let document = server.get("/openapi.json").json();
    let mut documented: Vec<String> = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        documented.extend(
            operations
                .as_object()
                .unwrap()
                .keys()
                .map(|method| format!("{} {path}", method.to_uppercase())),
        );
    }
    let endpoints = server.get("/").json()["endpoints"].clone();
    let mut served: Vec<String> = serde_json::from_value(endpoints).unwrap();
    documented.sort();
    served.sort();
    assert_eq!(documented, served);
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    let page = server.get("/docs");
    assert!(
        page.status == 200
            && page.head.contains("content-type: text/html")
            && page.text().contains("swagger-ui")
    );
}
