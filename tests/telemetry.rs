//! Traces, as a collector gets them.
#![allow(missing_docs)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};

use common::{Server, run};
use serde_json::json;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// What a collector was sent: heads, in lower case, and bodies.
struct Collector {
    url: String,
    received: Receiver<(String, Vec<u8>)>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (sender, received) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let _ = sender.send(take(stream));
            }
        });
        Self { url, received }
    }
}

/// Reads a request and answers that all is well.
fn take(stream: TcpStream) -> (String, Vec<u8>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).unwrap() > 0, "a whole head: {head}");
    }
    let head = head.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
    (head, body)
}

fn count(bytes: &[u8], part: &[u8]) -> usize {
    bytes.windows(part.len()).filter(|window| *window == part).count()
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn a_request_is_a_span_in_its_clients_trace_with_its_stages_below() {
    let collector = Collector::start();
    let server = Server::start(&["--ctx", "256", "--otlp-endpoint", &collector.url]);
    let body = json!({ "prompt": "x", "max_tokens": 3, "n": 2, "stream": true }).to_string();
    let traceparent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let answer = server.ask(
        "POST /v1/completions",
        &[&traceparent, "X-Request-Id: traced"],
        body.as_bytes(),
    );
    assert_eq!(answer.status, 200);
    assert_eq!(server.ask("GET /nothing", &["traceparent: 00-zero-00-01"], b"").status, 404);
    server.terminate();
    assert_eq!(server.wait_for_exit().code(), Some(0));

    let (heads, bodies): (Vec<_>, Vec<_>) = collector.received.try_iter().unzip();
    let sent = bodies.concat();
    assert!(heads.iter().all(
        |head| head.starts_with("post /v1/traces ") && head.contains("application/x-protobuf")
    ));
    for part in [
        "POST /v1/completions",
        "traced",
        "gen_ai.usage.output_tokens",
        "smollm2-135m",
        "medusa-llama",
        "/nothing",
    ] {
        assert!(count(&sent, part.as_bytes()) > 0, "{part}");
    }
    for stage in ["queue", "prefill", "decode"] {
        assert_eq!(count(&sent, stage.as_bytes()), 2, "{stage} of each choice");
    }
    assert_eq!(count(&sent, &from_hex(TRACE)), 1 + 2 * 3, "the request and its stages");
    assert_eq!(count(&sent, &from_hex(PARENT)), 1);
}

#[test]
fn a_collector_that_is_down_or_silent_holds_up_nothing() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // dropped: the port is closed
    let silent = TcpListener::bind("127.0.0.1:0").unwrap(); // never answers
    for address in [closed, silent.local_addr().unwrap()] {
        let server =
            Server::start(&["--ctx", "256", "--otlp-endpoint", &format!("http://{address}")]);
        let ask = || server.generate(&json!({ "prompt": "x", "max_tokens": 2 })).status;
        assert_eq!(ask(), 200);
        let mut pending = None;
        if address == closed {
            server.wait(|| server.log().contains("traces cannot be sent"));
        } else {
            pending = silent.accept().ok(); // from here on the exporter waits for an answer
        }
        for _ in 0..3 {
            assert_eq!(ask(), 200);
        }
        server.terminate();
        assert_eq!(server.wait_for_exit().code(), Some(0));
        drop(pending);
    }
}

#[test]
fn an_address_that_is_no_collectors_is_refused_at_start() {
    for address in ["localhost:4318", "https://collector.example", "http://", ""] {
        let refused = run(&["serve", "--otlp-endpoint", address], &[]);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success(), "{address}");
        assert!(
            text.contains("OTEL_EXPORTER_OTLP_ENDPOINT") && text.contains("http://127.0.0.1:4318"),
            "{text}"
        );
    }
}
