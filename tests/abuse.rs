//! Misbehaving clients: malformed requests, disconnects, overload, stalled readers. The server still
//! answers the next request.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use common::{Server, any_json, exchange, post_bytes, read_answer, request_bytes};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;

fn server() -> Arc<Server> {
    common::shared(&[
        "--batch-size",
        "2",
        "--ctx",
        "1024",
        "--read-timeout",
        "2",
        "--write-timeout",
        "600",
    ])
}

fn healthy(server: &Server) {
    let answer =
        server.generate(&json!({ "prompt": "Two plus two is", "max_tokens": 4, "temperature": 0 }));
    assert_eq!(answer.status, 200, "{}", server.log());
}

/// A request that cannot be served, as bytes for the socket. `fields` are those of `/generate`.
fn malformed(fields: Vec<String>) -> impl Strategy<Value = Vec<u8>> {
    let out_of_range = prop_oneof![
        Just(json!(-1e300)),
        Just(json!(1e300)),
        Just(json!({"a": 1})),
        Just(json!([[]])),
        Just(json!("\u{0}")),
        Just(json!(-0.5)),
    ];
    let bad_field = (prop::sample::select(fields), out_of_range).prop_map(|(name, value)| {
        let value = match name.as_str() {
            // These take any string.
            "prompt" | "system" | "stop" | "grammar" | "dry_sequence_breakers" => json!(1),
            "timeout_s" => json!(-1),
            name if name.ends_with("_penalty") || name == "top_n_sigma" => json!(1e9),
            _ => value,
        };
        let mut body = json!({ "prompt": "x" });
        body[name] = value;
        post_bytes(body.to_string().as_bytes())
    });
    let bad_prompt = any_json()
        .prop_filter("a string is a prompt, and so are tokens", |v| {
            !v.is_string() && !v.as_array().is_some_and(|ids| ids.iter().all(|id| id.is_number()))
        })
        .prop_map(|v| post_bytes(json!({ "prompt": v }).to_string().as_bytes()));
    let bad_body = any_json()
        .prop_filter("an object might be a request", |v| !v.is_object())
        .prop_map(|v| post_bytes(v.to_string().as_bytes()));
    let unknown = ("[a-z_]{1,12}x", any_json().prop_filter("null is absent", |v| !v.is_null()))
        .prop_map(|(name, v)| post_bytes(json!({ "prompt": "x", name: v }).to_string().as_bytes()));
    let cut_json = (1usize..40).prop_map(|n| {
        let whole =
            json!({ "prompt": "some text that is long enough", "max_tokens": 4 }).to_string();
        post_bytes(&whole.as_bytes()[..n.min(whole.len() - 1)])
    });
    let deep = (200usize..3000)
        .prop_map(|n| post_bytes(format!("{}1{}", "[".repeat(n), "]".repeat(n)).as_bytes()));
    let noise = prop::collection::vec(any::<u8>(), 0..64)
        .prop_map(|b| post_bytes(&[b"\xFF", b.as_slice()].concat()));
    let long_prompt = (3000usize..4000)
        .prop_map(|n| post_bytes(json!({ "prompt": "a b ".repeat(n) }).to_string().as_bytes()));
    let wrong_place = ("(GET|PUT|DELETE|PATCH)", "/(generate|x|generate/|v1|health/x)").prop_map(
        |(method, path)| {
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                .into_bytes()
        },
    );
    let no_http = "[A-Za-z0-9 :/]{1,40}\r\n\r\n".prop_map(String::into_bytes);
    prop_oneof![4 => bad_field, 3 => bad_prompt, 2 => bad_body, 2 => unknown, 2 => cut_json, 1 => deep, 2 => noise,
        1 => long_prompt, 2 => wrong_place, 1 => no_http]
}

#[test]
fn a_thousand_malformed_requests_get_4xx_and_the_engine_still_answers() {
    let server = server();
    let document = server.get("/openapi.json").json();
    let fields = &document["components"]["schemas"]["GenerateRequest"]["properties"];
    let fields: Vec<String> = fields.as_object().unwrap().keys().cloned().collect();
    assert!(fields.len() > 20, "{fields:?}");
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]); // the same thousand every time
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = malformed(fields);
    for i in 0..1000 {
        let bytes = strategy.new_tree(&mut runner).unwrap().current();
        let answer = exchange(server.addr, &bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(400)]);
        assert!((400..500).contains(&answer.status), "{i}: {} for {shown}", answer.status);
        if !answer.body.is_empty() {
            assert!(answer.json()["error"]["message"].is_string(), "{i}: {shown}");
        }
    }
    healthy(&server);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// Bodies of about `n` bytes, most of them in one place: path, what makes them large, and the body.
/// None is answered with text, so that all the time is the reading's.
fn large_bodies(n: usize) -> Vec<(&'static str, &'static str, String)> {
    let own = |field: &str| format!(r#"{{"prompt":"x","timeout_s":0,{field}}}"#);
    let list = |item: &str| vec![item; n / (item.len() + 1)].join(",");
    let named = |value: &str| -> String {
        let fields = (0..n / (value.len() + 11)).map(|i| format!(r#""k{i:06}":{value}"#));
        fields.collect::<Vec<_>>().join(",")
    };
    let nested = |open: &str, close: &str| {
        let depth = n / (open.len() + close.len());
        format!("{}1{}", open.repeat(depth), close.repeat(depth))
    };
    let text = "a".repeat(n);
    let parts = list(r#"{"type":"text","text":"a "}"#);
    let messages = list(r#"{"role":"user","content":"a"}"#);
    let (completions, chat) = ("/v1/completions", "/v1/chat/completions");
    vec![
        ("/generate", "nested lists", own(&format!(r#""stop":{}"#, nested("[", "]")))),
        ("/generate", "nested objects", own(&format!(r#""stop":{}"#, nested("{\"a\":", "}")))),
        (completions, "fields", own(&named("1"))),
        (completions, "objects", own(&format!(r#""user":{{{}}}"#, named("{\"a\":[]}")))),
        (
            completions,
            "fields of an object",
            own(&format!(r#""stream_options":{{{}}}"#, named("1"))),
        ),
        (completions, "a field's name", own(&format!(r#""{text}":1"#))),
        (completions, "an ignored text", own(&format!(r#""user":"{text}""#))),
        (completions, "escapes", own(&format!(r#""user":"{}""#, r"\u0061".repeat(n / 6)))),
        (completions, "digits", own(&format!(r#""user":{}"#, "1".repeat(n)))),
        (completions, "digits of a field", own(&format!(r#""seed":0.{}"#, "1".repeat(n)))),
        ("/generate", "stop strings", own(&format!(r#""stop":[{}]"#, list("\"a\"")))),
        ("/generate", "a stop string", own(&format!(r#""stop":"{text}""#))),
        ("/generate", "stop tokens", own(&format!(r#""stop_token_ids":[{}]"#, list("1")))),
        ("/generate", "biases", own(&format!(r#""logit_bias":{{{}}}"#, named("1")))),
        ("/generate", "spaces", own(&format!(r#"{}"top_k":1"#, " ".repeat(n)))),
        (chat, "parts", format!(r#"{{"messages":[{{"role":"user","content":[{parts}]}}]}}"#)),
        (chat, "messages", format!(r#"{{"messages":[{messages}]}}"#)),
        (
            chat,
            "ignored values",
            format!(
                r#"{{"messages":[{{"role":"user","content":"x","a":[{}]}}],"timeout_s":0}}"#,
                list("0")
            ),
        ),
    ]
}

/// The best of three, as others use the machine, too.
fn seconds(server: &Server, what: &str, bytes: &[u8]) -> f64 {
    let time = |_| {
        let start = std::time::Instant::now();
        let answer = exchange(server.addr, bytes);
        let is_fine = [400, 408, 422].contains(&answer.status);
        assert!(is_fine, "{what}: {} {}", answer.status, answer.text());
        start.elapsed().as_secs_f64()
    };
    (0..3).map(time).fold(f64::MAX, f64::min)
}

#[test]
fn bodies_up_to_the_limit_take_time_linear_in_their_bytes() {
    let server = server();
    healthy(&server);
    let (small, large) = (large_bodies(100_000), large_bodies(1_000_000));
    for ((path, what, small), (.., large)) in small.iter().zip(&large) {
        let bytes = |body: &str| request_bytes(&format!("POST {path}"), &[], body.as_bytes());
        let (few, many) = (bytes(small), bytes(large));
        let (short, long) = (seconds(&server, what, &few), seconds(&server, what, &many));
        // Ten times the bytes; what is quadratic takes a hundred times as long.
        assert!(long < short.max(0.05) * 40.0, "{what}: {short} s and {long} s");
    }
    healthy(&server);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn two_hundred_clients_that_hang_up_leak_nothing() {
    let server =
        Server::start(&["--batch-size", "8", "--max-concurrent-batches", "32", "--ctx", "256"]);
    healthy(&server);
    let threads = || std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap().count();
    let files = || std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    let (threads_before, files_before) = (threads(), files());
    std::thread::scope(|scope| {
        for worker in 0..8u64 {
            let server = &server;
            scope.spawn(move || {
                for i in 0..25u64 {
                    let n = worker * 25 + i;
                    let stream = n % 2 == 0;
                    let body =
                        json!({ "prompt": format!("Tale {n}:"), "max_tokens": 200, "stream": stream, "ignore_eos": true });
                    let mut socket = server.open_stream(&body);
                    // Disconnect before, during or well into the answer; some with unread data, some
                    // after a shutdown.
                    let mut buffer = vec![0; (n as usize * 37) % 700 + 1];
                    socket.set_read_timeout(Some(Duration::from_millis(n * 13 % 150 + 1))).unwrap();
                    let _ = socket.read(&mut buffer);
                    if n % 3 == 0 {
                        let _ = socket.shutdown(std::net::Shutdown::Both);
                    }
                }
            });
        }
    });
    server.wait(|| server.is_idle());
    healthy(&server);
    server.wait(|| {
        server.is_idle() && threads() <= threads_before + 2 && files() <= files_before + 1
    });
}

#[test]
fn a_full_queue_refuses_with_429_and_loses_no_accepted_request() {
    let server =
        Server::start(&["--batch-size", "2", "--max-concurrent-batches", "3", "--ctx", "256"]);
    let answers: Vec<_> = std::thread::scope(|scope| {
        let ask = |i: usize| {
            server.generate(
                &json!({ "prompt": format!("Story {i}"), "max_tokens": 60, "ignore_eos": true }),
            )
        };
        let all: Vec<_> = (0..24).map(|i| scope.spawn(move || ask(i))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let (accepted, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|a| a.status == 200);
    assert!(accepted.len() >= 6, "as many as may run or wait: {}", accepted.len());
    assert!(!refused.is_empty());
    for answer in accepted {
        assert_eq!(answer.json()["usage"]["completion_tokens"], 60);
    }
    for answer in refused {
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (429, &json!("queue_full")));
        assert!(answer.head.contains("retry-after: 1"));
    }
    server.wait(|| server.is_idle());
}

/// A reader that stalls blocks neither the engine nor other clients, and gets its text when it reads
/// again. Its answer is far larger than the buffers of socket and server, so the server's write waits
/// for it: the access log has no line for it until then.
#[test]
fn a_slow_reader_holds_up_no_others() {
    let server = server();
    let body = json!({ "prompt": "Slowly", "max_tokens": 900, "seed": 1, "stream": true, "ignore_eos": true, "logprobs": 20 });
    let request = request_bytes(
        "POST /generate",
        &["X-Request-Id: stalled-reader"],
        body.to_string().as_bytes(),
    );
    let mut slow = server.narrow_connection();
    slow.write_all(&request).unwrap();
    server.wait(|| server.load()["running"] == 1);
    healthy(&server);
    server.wait(|| server.load()["in_flight"] == 0);
    for _ in 0..3 {
        healthy(&server);
    }
    assert!(!server.log().contains("stalled-reader"), "all was sent: {}", server.log());
    let answer = read_answer(slow);
    assert!(answer.body.len() > 700 << 10, "{}", answer.body.len());
    assert_eq!(answer.events().last().unwrap()["usage"]["completion_tokens"], 900);
    server.wait(|| server.log().contains("stalled-reader"));
}

/// A client that announces a body and never sends it gets a 408, and a connection without a whole
/// request is closed.
#[test]
fn connections_without_a_whole_request_are_closed() {
    let server = server();
    let mut socket = TcpStream::connect(server.addr).unwrap();
    socket
        .write_all(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        .unwrap();
    assert_eq!(read_answer(socket).status, 408);
    let mut silent = TcpStream::connect(server.addr).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    silent.write_all(b"POST /gen").unwrap();
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).expect("the server closes the connection");
}
