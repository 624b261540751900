//! HTTP as bytes on a socket, with the default model.
#![allow(missing_docs)]

mod common;
#[path = "common/heads.rs"]
mod heads;

use std::io::{Read, Write};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::{Server, exchange, read_answer, request_bytes};
use serde_json::{Value, json};

fn server() -> Arc<Server> {
    common::shared(&["--batch-size", "4", "--ctx", "512"])
}

fn chat(text: &str) -> String {
    format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
}

/// Heads of which one file is a FIFO hold the load until the test writes it.
#[test]
fn the_port_is_open_while_the_model_loads() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("heads.safetensors");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let tensors: heads::Tensors = heads::identity(1, 576)
        .into_iter()
        .map(|(name, tensor)| (format!("medusa_head.{name}"), tensor))
        .collect();
    let map: Value =
        tensors.keys().map(|name| (name.clone(), json!("heads.safetensors"))).collect();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(index, json!({ "weight_map": map }).to_string()).unwrap();

    let server =
        Server::start_loading(&["--ctx", "256", "--heads", folder.path().to_str().unwrap()]);
    assert_eq!(server.get("/health").status, 200, "a server that loads is alive");
    let early = server.get("/ready");
    assert_eq!((early.status, early.json()), (503, json!({ "status": "loading" })));
    assert!(early.head.contains("retry-after: 1"));
    heads::write(&fifo, &tensors);
    server.wait(|| server.get("/ready").status == 200);
    assert_eq!(server.get("/ready").json(), json!({ "status": "ok" }));
    assert_eq!(server.get("/health").json(), json!({ "status": "ok" }));
}

#[test]
fn information_names_version_model_and_sizes() {
    let server = server();
    let info = server.get("/").json();
    assert_eq!(
        (&info["name"], &info["version"]),
        (&json!("medusa-llama"), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(
        (&info["context_size"], &info["slots"], &info["backend"]),
        (&json!(512), &json!(4), &json!("cpu"))
    );
    assert_eq!(info["model"]["quantization"], "Q4_1");
}

#[test]
fn an_answer_has_text_reason_usage_and_timings() {
    let server = server();
    let answer = server
        .generate(&json!({ "prompt": chat("What is the capital of France?"), "temperature": 0 }));
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert!(body["generated_text"].as_str().unwrap().contains("Paris"), "{body}");
    assert_eq!(body["finish_reason"], "stop");
    let usage = &body["usage"];
    let n = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(n("total_tokens"), n("prompt_tokens") + n("completion_tokens"));
    for stage in ["queue_s", "prefill_s", "decode_s"] {
        assert!(body["timings"][stage].as_f64().unwrap() >= 0.0);
    }
}

#[test]
fn a_stream_gives_the_same_text_in_pieces_and_ends_with_usage() {
    let server = server();
    let ask = |stream: bool| {
        server.generate(
            &json!({ "prompt": "Count: one, two,", "raw": true, "max_tokens": 24, "seed": 5, "stream": stream }),
        )
    };
    let (whole, streamed) = (ask(false), ask(true));
    assert!(streamed.head.contains("content-type: text/event-stream"));
    assert_eq!(streamed.header("x-accel-buffering"), Some("no"), "nginx would hold it back");
    let events = streamed.events();
    let (last, pieces) = events.split_last().unwrap();
    assert!(pieces.len() > 2, "{events:?}");
    assert!(pieces.iter().all(|p| p.as_object().unwrap().len() == 1 && p["generated_text"] != ""));
    assert_eq!(last["finish_reason"], "length");
    assert_eq!(last["usage"]["completion_tokens"], 24);
    assert!(last["timings"]["decode_s"].is_number());
    assert_eq!(whole.json()["generated_text"].as_str().unwrap(), streamed.streamed_text());
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let server = server();
    let body = |stop: Value| json!({ "prompt": "1 2 3 4 5 6 7", "raw": true, "max_tokens": 40, "temperature": 0, "stop": stop });
    let free = server.generate(&body(json!(null))).json();
    let text = free["generated_text"].as_str().unwrap();
    // From the middle of one token into another.
    let stop: String = text.chars().skip(7).take(4).collect();
    let stopped = server.generate(&body(json!(["never in there", stop]))).json();
    let expected = &text[..text.find(&stop).unwrap()];
    assert_eq!(stopped["generated_text"].as_str().unwrap(), expected);
    assert_eq!(
        (&stopped["finish_reason"], stopped["stop_reason"].as_str().unwrap()),
        (&json!("stop"), stop.as_str())
    );
}

#[test]
fn stop_tokens_end_an_answer_and_min_tokens_keep_it_going() {
    let server = server();
    let ask = |more: Value| {
        let mut body =
            json!({ "prompt": "1 2 3 4 5 6 7", "raw": true, "max_tokens": 40, "temperature": 0 });
        body["details"] = true.into();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.generate(&body).json()
    };
    let free = ask(json!({}));
    let tokens = free["tokens"].as_array().unwrap();
    let stop = &tokens[6]["id"];
    let at = tokens.iter().position(|token| token["id"] == *stop).unwrap();
    let text =
        |n: usize| tokens[..n].iter().map(|t| t["text"].as_str().unwrap()).collect::<String>();

    let stopped = ask(json!({ "stop_token_ids": [stop] }));
    assert_eq!(stopped["generated_text"].as_str().unwrap(), text(at));
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), stop));
    assert_eq!(stopped["usage"]["completion_tokens"].as_u64().unwrap() as usize, at + 1);

    // Nothing ends the answer before its least length, and drafts do not change it.
    let least = at + 9;
    for more in [json!({ "stop_token_ids": [stop] }), json!({ "stop": [" ", "\n"] })] {
        let mut body = more.clone();
        body["min_tokens"] = least.into();
        let long = ask(body.clone());
        let n = long["usage"]["completion_tokens"].as_u64().unwrap() as usize;
        assert!(n > least || (n == least && more.get("stop").is_none()), "{n} of {least}: {long}");
        let before = &long["tokens"].as_array().unwrap()[..least.min(n)];
        assert!(more.get("stop").is_some() || before.iter().all(|t| t["id"] != *stop), "{long}");
        body["speculation"] = "off".into();
        assert_eq!(ask(body)["generated_text"], long["generated_text"]);
    }
    for (name, bad) in [("min_tokens", json!(41)), ("stop_token_ids", json!([1 << 20]))] {
        let answer = server.generate(&json!({ "prompt": "x", "max_tokens": 40, name: bad }));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (422, &json!(name)));
    }
}

#[test]
fn the_context_ends_an_answer_and_a_longer_prompt_is_refused() {
    let server = server();
    let words = |n: usize| "word ".repeat(n);
    let body = server.generate(
        &json!({ "prompt": words(500), "raw": true, "max_tokens": 512, "temperature": 0, "ignore_eos": true }),
    );
    let body = body.json();
    assert_eq!(body["finish_reason"], "length");
    assert_eq!(body["usage"]["total_tokens"], 512);
    let refused = server.generate(&json!({ "prompt": words(600), "raw": true }));
    assert_eq!(refused.status, 422);
    let error = &refused.json()["error"];
    assert_eq!((&error["type"], &error["param"]), (&json!("invalid_request"), &json!("prompt")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("601 tokens") && message.contains("511"), "{message}");
}

#[test]
fn the_same_prompt_again_comes_from_the_cache() {
    let server = server();
    let body = json!({ "prompt": chat("Name one colour of the sky, a unique question for this test."), "max_tokens": 4, "temperature": 0 });
    let (first, second) = (server.generate(&body).json(), server.generate(&body).json());
    assert_eq!(first["generated_text"], second["generated_text"]);
    let usage = &second["usage"];
    assert_eq!(
        usage["cached_tokens"].as_u64().unwrap() + 1,
        usage["prompt_tokens"].as_u64().unwrap(),
        "{usage}"
    );
}

#[test]
fn the_same_seed_gives_the_same_text_alone_and_in_a_crowd() {
    let server = server();
    let body =
        json!({ "prompt": "The old lighthouse", "max_tokens": 16, "seed": 11, "temperature": 0.8 });
    let alone = server.generate(&body).json()["generated_text"].clone();
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..3)
            .map(|i| {
                let server = &server;
                scope.spawn(move || {
                    server
                        .generate(&json!({ "prompt": format!("Crowd {i}"), "max_tokens": 40 }))
                        .status
                })
            })
            .collect();
        assert_eq!(server.generate(&body).json()["generated_text"], alone);
        others.into_iter().for_each(|o| assert_eq!(o.join().unwrap(), 200));
    });
    let other =
        server.generate(&json!({ "prompt": "The old lighthouse", "max_tokens": 16, "seed": 12, "temperature": 0.8 }));
    assert_ne!(other.json()["generated_text"], alone);
}

#[test]
fn errors_have_one_shape_and_the_right_status() {
    let server = server();
    let post = |head: &str, body: &str| {
        exchange(
            server.addr,
            format!("POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n{body}")
                .as_bytes(),
        )
    };
    let checks = [
        (server.get("/nothing"), 404, "not_found"),
        (server.get("/generate"), 405, "method_not_allowed"),
        (server.post(b"{"), 400, "invalid_json"),
        (server.post(b"\xFF\xFE"), 400, "invalid_json"),
        (server.post(b"[]"), 422, "invalid_request"),
        (server.generate(&json!({ "prompt": "" })), 422, "invalid_request"),
        (server.generate(&json!({ "prompt": "x", "temperature": -1 })), 422, "invalid_request"),
        (
            server.generate(&json!({ "prompt": "x", "logit_bias": { "49152": 1 } })),
            422,
            "invalid_request",
        ),
        (post("Content-Length: 9999999\r\n", ""), 413, "body_too_large"),
        (
            post(
                "Transfer-Encoding: chunked\r\n",
                &format!("200000\r\n{}\r\n0\r\n\r\n", " ".repeat(0x20_0000)),
            ),
            413,
            "body_too_large",
        ),
    ];
    for (answer, status, kind) in checks {
        assert_eq!(answer.status, status, "{answer:?}");
        let error = &answer.json()["error"];
        assert_eq!(error["type"], kind);
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()));
    }
    assert!(server.get("/generate").head.contains("allow: post"));
    assert_eq!(
        server.generate(&json!({ "prompt": "x", "temperature": -1 })).json()["error"]["param"],
        "temperature"
    );
}

#[test]
fn one_connection_serves_request_after_request() {
    let server = server();
    use std::io::Write;
    let mut socket = std::net::TcpStream::connect(server.addr).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    for _ in 0..3 {
        socket.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"{\"status\":\"ok\"}") {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
        }
    }
    socket
        .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(socket).status, 200);
}

/// A client that sends all of a body before it reads gets the answer, and may go on with the connection.
#[test]
fn a_body_that_is_too_large_does_not_cost_its_sender_the_answer() {
    let server = server();
    use std::io::Write;
    let body = vec![b' '; 8 << 20];
    for _ in 0..10 {
        let mut socket = std::net::TcpStream::connect(server.addr).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let head = format!(
            "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).unwrap();
        socket.write_all(&body).unwrap();
        socket
            .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut seen = String::new();
        socket.read_to_string(&mut seen).unwrap();
        assert!(seen.starts_with("HTTP/1.1 413") && seen.contains("body_too_large"), "{seen}");
        assert!(seen.ends_with("{\"status\":\"ok\"}"), "{seen}");
    }
}

#[test]
fn a_prompt_beyond_the_context_is_told_as_openais_clients_look_for_it() {
    let server = server();
    let long = "word ".repeat(600);
    let message = json!([{ "role": "user", "content": long }]);
    for (path, body) in [
        ("/v1/completions", json!({ "prompt": long })),
        ("/v1/completions", json!({ "prompt": ["x", long], "stream": true })),
        ("/v1/chat/completions", json!({ "messages": message })),
    ] {
        let refused = server.post_to(path, &body);
        let error = &refused.json()["error"];
        assert_eq!((refused.status, &error["code"]), (400, &json!("context_length_exceeded")));
        let text = error["message"].as_str().unwrap();
        assert!(text.contains("maximum context length is 512 tokens"), "{text}");
    }
}

#[test]
fn a_request_is_read_as_http_has_it() {
    let server = server();
    let raw = |head: &str| {
        let head = format!("{head}Connection: close\r\n\r\n");
        exchange(server.addr, head.as_bytes())
    };
    for (head, status) in [
        ("GET /health HTTP/1.1\r\n", 400),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        ("GET /health HTTP/1.1\r\nHost: a b/c\r\n", 400),
        ("GET /health HTTP/1.0\r\n", 200),
        ("GET http://localhost:1/health HTTP/1.1\r\nHost: localhost\r\n", 200),
        ("GET /health HTTP/1.1\r\nHost: [::1]:8000\r\n", 200),
        // No key, and on loopback: a name that leads here is none of this server's.
        ("GET /health HTTP/1.1\r\nHost: rebound.example\r\n", 403),
        ("GET /%68ealth HTTP/1.1\r\nHost: localhost\r\n", 200),
        ("GET /%zzhealth HTTP/1.1\r\nHost: localhost\r\n", 404),
        ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", 204),
        ("OPTIONS /nothing HTTP/1.1\r\nHost: localhost\r\n", 404),
    ] {
        let answer = raw(head);
        assert_eq!(answer.status, status, "{head}");
        assert!(answer.header("x-request-id").is_some(), "{head}");
        if status >= 400 {
            assert!(answer.json()["error"]["message"].is_string(), "{head}");
        }
    }
    let all = server.ask("OPTIONS *", &[], b"");
    assert_eq!(all.header("allow"), Some("get, head, post, options"));
    let one = server.ask("OPTIONS /v1/completions", &[], b"");
    assert_eq!((one.status, one.header("allow")), (204, Some("post, options")));
    let rebound = raw("GET /health HTTP/1.1\r\nHost: rebound.example\r\n");
    assert!(rebound.text().contains("--allowed-hosts"), "{}", rebound.text());

    let body = br#"{"prompt": "x", "max_tokens": 1}"#;
    let encoded = |coding: &str| {
        server.ask("POST /generate", &[&format!("Content-Encoding: {coding}")], body)
    };
    for coding in ["gzip", "identity, GZIP", "br"] {
        let refused = encoded(coding);
        assert_eq!((refused.status, refused.header("accept-encoding")), (415, Some("identity")));
    }
    assert_eq!(encoded("Identity").status, 200);
    let twice = br#"{"prompt": "x", "max_tokens": 1, "prompt": "y"}"#;
    let refused = server.post(twice);
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (422, &json!("prompt")));
    let twice = br#"{"messages": [{"role": "user", "content": "x", "role": "system"}]}"#;
    let refused = server.ask("POST /v1/chat/completions", &[], twice);
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("role")));
}

/// Clients send their next request on the connection of a refused one, unless the refusal says that
/// it closes.
#[test]
fn a_refusal_leaves_its_connection_usable_or_says_that_it_closes() {
    let server = server();
    for (head, status) in [
        ("POST /nothing HTTP/1.1\r\n", "404"),
        ("POST /health HTTP/1.1\r\n", "405"),
        ("POST /generate HTTP/1.1\r\nContent-Encoding: gzip\r\n", "415"),
        ("GET /health HTTP/1.1\r\n", "200"),
    ] {
        let head = format!("{head}Host: localhost\r\n");
        let mut socket = server.send(format!("{head}Content-Length: 20000\r\n\r\n").as_bytes());
        std::thread::sleep(Duration::from_millis(50)); // a client sends head and body apart
        socket.write_all(&[b'x'; 20_000]).unwrap();
        socket.write_all(&request_bytes("GET /health", &[], b"")).unwrap();
        let mut both = String::new();
        socket.read_to_string(&mut both).unwrap();
        let statuses: Vec<&str> = both.split("HTTP/1.1 ").skip(1).map(|text| &text[..3]).collect();
        assert_eq!(statuses, [status, "200"], "{head}");

        let large = format!("{head}Content-Length: 3000000\r\n\r\n");
        let refused = exchange(server.addr, large.as_bytes());
        assert_eq!(
            (refused.status.to_string().as_str(), refused.header("connection")),
            (status, Some("close"))
        );
    }
}

/// Editors and frameworks add fields of their own, and servers before this one had others.
#[test]
fn fields_that_nobody_knows_are_ignored_and_named_unless_they_would_change_the_answer() {
    let server = Server::start(&["--ctx", "256"]);
    let strict = Server::start(&["--ctx", "256", "--strict-fields"]);
    let body = |more: Value| {
        let mut body = json!({ "prompt": "x", "max_tokens": 1 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let odd = body(json!({ "x_editor": 1, "a\r\nb": 2, "stream_options": null, "id_slot": 0 }));
    for stream in [false, true] {
        let mut odd = odd.clone();
        odd["stream"] = stream.into();
        let answer = server.post_to("/v1/completions", &odd);
        assert_eq!(
            (answer.status, answer.header("x-ignored-fields")),
            (200, Some("a??b,x_editor"))
        );
    }
    assert_eq!(server.log().matches("x_editor").count(), 1, "one line a minute: {}", server.log());
    let plain = server.post_to("/v1/completions", &body(json!({ "id_slot": 0, "mirostat": 0 })));
    assert_eq!((plain.status, plain.header("x-ignored-fields")), (200, None));
    for (path, field) in [("/v1/completions", "mirostat"), ("/generate", "x_editor")] {
        let refused = server.post_to(path, &body(json!({ field: 2 })));
        assert!([400, 422].contains(&refused.status), "{refused:?}");
        assert_eq!(refused.json()["error"]["param"], field);
    }
    let refused = strict.post_to("/v1/completions", &body(json!({ "x_editor": 1 })));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("x_editor")));
}

/// One address serves browsers and programs.
#[test]
fn browsers_get_a_page_and_programs_json() {
    let server = server();
    let ask = |method: &str, path: &str, more: &str| {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n"
        );
        exchange(server.addr, head.as_bytes())
    };
    let browser = "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n";
    let page = ask("GET", "/", browser);
    assert_eq!(page.status, 200);
    assert!(page.text().starts_with("<!doctype html>"));
    for header in [
        "content-type: text/html; charset=utf-8",
        "vary: accept",
        "cache-control: no-cache",
        "default-src 'none'",
    ] {
        assert!(page.head.contains(header), "{header}: {}", page.head);
    }
    for accept in [
        "",
        "Accept: */*\r\n",
        "Accept: application/json\r\n",
        "Accept: text/html;q=0.5, application/json\r\n",
    ] {
        let json = ask("GET", "/", accept);
        assert!(
            json.json()["name"] == "medusa-llama" && json.head.contains("vary: accept"),
            "{accept}: {}",
            json.head
        );
    }
    for accept in [browser, ""] {
        let (head, whole) = (ask("HEAD", "/", accept), ask("GET", "/", accept));
        let length = |answer: &common::Answer| {
            answer.head.lines().find(|l| l.starts_with("content-length")).unwrap().to_owned()
        };
        assert_eq!((head.status, length(&head), head.body.len()), (200, length(&whole), 0));
    }
    let tag = page.head.lines().find_map(|l| l.strip_prefix("etag: ")).unwrap();
    let known = ask("GET", "/", &format!("{browser}If-None-Match: {tag}\r\n"));
    assert_eq!((known.status, known.body.len()), (304, 0));
    for (file, kind) in
        [("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")]
    {
        let file = ask("GET", &format!("/page/{file}"), "");
        assert!(
            file.status == 200 && file.head.contains(kind) && file.head.contains("etag: "),
            "{}",
            file.head
        );
    }
    assert_eq!(ask("GET", "/page/nothing", browser).status, 404);
    assert_eq!(ask("POST", "/", browser).status, 405);
}

/// Characters that span tokens arrive whole, also in a stream: no replacement characters.
#[test]
fn characters_of_several_tokens_arrive_whole() {
    let server = server();
    let body = json!({ "prompt": "Emoji list: 😀 😃 😄 😁 😆 😅", "raw": true, "max_tokens": 48, "temperature": 0, "stream": true });
    let answer = server.generate(&body);
    let text = answer.streamed_text();
    assert!(text.chars().any(|c| c as u32 > 0xFFFF), "the model continues with emoji: {text}");
    assert!(!text.contains(char::REPLACEMENT_CHARACTER), "{text}");
}
