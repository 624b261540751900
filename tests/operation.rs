//! What whoever runs a server sees of it and sets: ids and lines of the log, keys, limits of
//! clients, TLS.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use common::{Server, read_answer, request_bytes, run};
use medusa_llama::engine::slots::KvOp;
use medusa_llama::engine::stats::Stats;
use medusa_llama::engine::{Engine, Forward, Job, Layout, Limits, Rows, StepError};
use medusa_llama::llama::Token;
use medusa_llama::request::Request;
use serde_json::{Value, json};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// The lines of a server's log in JSON that name a request.
fn lines_about(server: &Server, id: &str) -> Vec<Value> {
    let log = server.log();
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{e}: {line}")));
    lines.filter(|line| line["span"]["request_id"] == id).collect()
}

/// The line that ends a request.
fn access_line(server: &Server, id: &str) -> Value {
    let ends = |line: &Value| line["status"].is_number() || line["message"] == "aborted";
    let find = || lines_about(server, id).into_iter().find(ends);
    server.wait(|| find().is_some());
    find().unwrap()
}

#[test]
fn a_request_has_one_id_in_its_answer_and_in_every_line_about_it() {
    let server = Server::start(&["--ctx", "256", "--log-format", "json", "--log-level", "debug"]);
    let body = |stream: bool| {
        json!({ "prompt": "x", "max_tokens": 4, "stream": stream, "ignore_eos": true }).to_string()
    };
    let checks = [
        ("POST /generate", "whole", body(false), 200),
        ("POST /generate", "streamed", body(true), 200),
        ("POST /v1/completions", "bad-field", json!({ "n": 0 }).to_string(), 400),
        ("POST /generate", "no-json", "{".into(), 400),
        ("GET /nothing?secret=1", "no-path", String::new(), 404),
        ("HEAD /health", "head", String::new(), 200),
    ];
    for (what, id, body, status) in checks {
        let answer = server.ask(what, &[&format!("X-Request-Id: {id}")], body.as_bytes());
        assert_eq!(
            (answer.status, answer.header("x-request-id")),
            (status, Some(id)),
            "{answer:?}"
        );
        let line = access_line(&server, id);
        assert_eq!(
            (&line["status"], &line["message"]),
            (&json!(status), &json!("answered")),
            "{line}"
        );
        let path = what.split([' ', '?']).nth(1).unwrap();
        assert_eq!(line["path"], path);
        assert_eq!(
            line["bytes"].as_u64().unwrap() as usize,
            if id == "head" { 0 } else { answer.body.len() },
            "{line}"
        );
        assert_eq!(
            line["tokens"],
            if status == 200 && path == "/generate" { json!(4) } else { Value::Null }
        );
    }
    let by_the_engine =
        |id| lines_about(&server, id).iter().filter(|line| line["message"] == "admitted").count();
    assert_eq!(
        (by_the_engine("whole"), by_the_engine("streamed"), by_the_engine("bad-field")),
        (1, 1, 0)
    );

    let made = server.get("/health").header("x-request-id").unwrap().to_owned();
    assert_ne!(server.get("/health").header("x-request-id"), Some(made.as_str()));
    let odd = server.ask("GET /health", &["X-Request-Id: two words"], b"");
    assert!(odd.header("x-request-id").unwrap().starts_with("req-"));
}

#[test]
fn a_client_that_leaves_is_logged_as_such() {
    let server = Server::start(&["--ctx", "512", "--log-format", "json"]);
    for stream in [true, false] {
        let id = format!("left-{stream}");
        let body = json!({ "prompt": "A long tale:", "max_tokens": 400, "stream": stream, "ignore_eos": true }).to_string();
        let bytes =
            request_bytes("POST /generate", &[&format!("X-Request-Id: {id}")], body.as_bytes());
        let mut socket = server.send(&bytes);
        if stream {
            socket.read_exact(&mut [0; 400]).unwrap();
        } else {
            server.wait(|| server.load()["running"] == 1);
        }
        drop(socket);
        let line = access_line(&server, &id);
        let expected = if stream { json!(200) } else { Value::Null };
        assert_eq!((&line["message"], &line["status"]), (&json!("aborted"), &expected), "{line}");
        assert_eq!(line["bytes"].as_u64().unwrap() > 0, stream, "{line}");
        server.wait(|| server.is_idle());
    }
}

#[test]
fn text_is_the_form_of_the_log_unless_json_is_asked_for() {
    let server = Server::start(&["--ctx", "256"]);
    let answer =
        read_answer(server.send(&request_bytes("GET /health", &["X-Request-Id: mine"], b"")));
    assert_eq!(answer.status, 200);
    server.wait(|| server.log().contains("request{request_id=\"mine\"}"));
    let log = server.log();
    let line = log.lines().find(|line| line.contains("request_id=\"mine\"")).unwrap();
    for part in
        ["INFO", "answered", "method=GET", "path=/health", "status=200", "seconds=0.0", "bytes=15"]
    {
        assert!(line.contains(part), "{part} in {line}");
    }
}

/// A model whose passes end when they are allowed to.
struct Hanging(std::sync::mpsc::Receiver<()>);

impl Forward for Hanging {
    fn n_vocab(&self) -> usize {
        2
    }

    fn forward(&mut self, _: &Rows) -> Result<(), StepError> {
        self.0.recv().expect("the test lets it go on");
        Ok(())
    }

    fn logits(&self, _: usize) -> Result<&[f32], StepError> {
        Ok(&[0.0, 1.0])
    }

    fn hidden(&self, _: usize) -> Result<&[f32], StepError> {
        Ok(&[])
    }

    fn apply(&mut self, _: KvOp) -> Result<(), StepError> {
        Ok(())
    }

    fn piece(&self, _: Token, _: bool, _: &mut Vec<u8>) {}

    fn is_end(&self, _: Token) -> bool {
        false
    }
}

#[test]
fn a_pass_that_hangs_shows_for_how_long() {
    let (go_on, gate) = std::sync::mpsc::channel();
    let stats = Arc::new(Stats::default());
    let layout = Layout::Streams { n_cells: 8 };
    let limits = Limits { n_slots: 1, n_ctx: 8, n_batch: 8, n_prefill: None, layout };
    let shared = Arc::clone(&stats);
    let engine = std::thread::spawn(move || {
        let mut engine = Engine::new(Hanging(gate), limits, shared);
        let (events, receiver) = tokio::sync::mpsc::channel(8);
        engine.enqueue(Job::new(vec![Token(1)], Request::new("", 1), events));
        engine.step();
        drop(receiver);
    });
    let elapsed = || stats.pass_elapsed().unwrap_or_default();
    while elapsed() < Duration::from_millis(20) {
        assert!(!engine.is_finished());
        std::thread::sleep(Duration::from_millis(5));
    }
    let seen = elapsed();
    std::thread::sleep(Duration::from_millis(10));
    assert!(elapsed() >= seen + Duration::from_millis(10), "it grows while the pass hangs");
    go_on.send(()).unwrap();
    engine.join().unwrap();
    assert_eq!(stats.pass_elapsed(), None);
}

/// A server that computes a long prompt in one pass, which takes seconds.
fn long_passes(more: &[&str]) -> Server {
    let args = ["--ctx", "1024", "--n-batch", "1024", "--prefill-chunk", "1024"];
    Server::start(&[&args[..], more].concat())
}

/// The pass is a long prompt's, which takes seconds: much longer than the limit.
#[test]
fn a_server_whose_pass_takes_too_long_is_alive_but_not_ready() {
    let server = long_passes(&["--stall-timeout", "0.1"]);
    let body = json!({ "prompt": "one two three ".repeat(200), "max_tokens": 1, "stream": true });
    let waiting = server.open_stream(&body);
    server.wait(|| server.get("/ready").status == 503);
    let (ready, health) = (server.get("/ready"), server.get("/health"));
    assert_eq!((ready.status, ready.json()), (503, json!({ "status": "stalled" })));
    assert_eq!(ready.header("retry-after"), Some("1"));
    assert_eq!((health.status, health.json()), (200, json!({ "status": "stalled" })));
    server.wait(|| server.get("/ready").status == 200);
    drop(waiting);
}

/// A long prompt takes seconds, in which proxies and clients should see that an answer will come.
#[test]
fn a_stream_without_events_has_comments_and_its_head_in_time() {
    let server = long_passes(&["--sse-keep-alive", "0.05"]);
    let prompt = "one two three ".repeat(200);
    let body = json!({ "prompt": prompt, "max_tokens": 2, "stream": true, "ignore_eos": true });
    let answer = server.generate(&body);
    let text = answer.text();
    assert!(answer.status == 200 && text.starts_with(": keep-alive\n\n"), "{text}");
    assert_eq!(answer.events().last().unwrap()["usage"]["completion_tokens"], 2);
    let late = json!({ "prompt": format!("a {prompt}"), "stream": true, "timeout_s": 0.2 });
    let late = server.generate(&late);
    assert_eq!((late.status, &late.events()[0]["stop_reason"]), (200, &json!("deadline")));

    let silent = Server::start(&["--ctx", "1024", "--sse-keep-alive", "0"]);
    assert!(!silent.generate(&body).text().contains("keep-alive"));
}

#[test]
fn work_and_information_need_a_key_where_there_are_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "# for the tests\n\n  key-of-a-file  \n").unwrap();
    let args = [
        "--ctx",
        "256",
        "--log-level",
        "trace",
        "--api-key",
        "key-one,key-two",
        "--api-key",
        "key-three",
    ];
    let server = Server::start(&[&args[..], &["--api-key-file", file.to_str().unwrap()]].concat());
    let body = json!({ "prompt": "x", "max_tokens": 1 }).to_string();
    let ask = |what: &str, key: Option<&str>| {
        let header = key.map(|key| format!("Authorization: Bearer {key}"));
        server.ask(
            what,
            &header.as_deref().map_or(vec![], |h| vec![h]),
            if what.starts_with("POST") { body.as_bytes() } else { b"" },
        )
    };
    for what in ["POST /generate", "POST /v1/completions", "GET /v1/models", "GET /"] {
        for key in ["key-one", "key-two", "key-three", "key-of-a-file"] {
            assert_eq!(ask(what, Some(key)).status, 200, "{what} {key}");
        }
        for wrong in
            [None, Some("key-fou"), Some("# for the tests"), Some("key-one,key-two"), Some("")]
        {
            let refused = ask(what, wrong);
            assert_eq!(
                (refused.status, refused.header("www-authenticate")),
                (401, Some("bearer")),
                "{what} {wrong:?}"
            );
            let error = &refused.json()["error"];
            let name = if what.contains("/v1") { "code" } else { "type" };
            assert_eq!(error[name], "invalid_api_key");
            assert!(refused.header("x-request-id").is_some());
        }
    }
    for open in [
        "GET /health",
        "GET /v1/health",
        "GET /ready",
        "GET /docs",
        "GET /docs/swagger-ui.css",
        "GET /openapi.json",
        "GET /page/page.js",
    ] {
        assert_eq!(ask(open, None).status, 200, "{open}");
    }
    assert_eq!(
        server.ask("GET /", &["Accept: text/html"], b"").status,
        200,
        "the page asks for a key itself"
    );
    assert_eq!(ask("GET /nothing", None).status, 401);
    assert_eq!(ask("GET /nothing", Some("key-one")).status, 404);
    for key in ["key-one", "key-two", "key-three", "key-of-a-file", "key-fou"] {
        assert!(!server.log().contains(key), "{}", server.log());
    }
}

#[test]
fn keys_that_cannot_be_are_refused_at_start_and_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "# none yet\n").unwrap();
    let empty = empty.to_str().unwrap();
    let refused = [
        (vec!["--api-key-file", "/no/such/file"], "API_KEY_FILE /no/such/file cannot be read"),
        (vec!["--api-key-file", empty], "holds no key"),
        (vec!["--api-key", "sesame,"], "API_KEY is empty"),
        (vec!["--api-key", "sesame open"], "API_KEY has a key with a space"),
        (vec!["--metrics", "key"], "METRICS is key, but there is none"),
        (vec!["--metrics-key", "sesame"], "METRICS does not ask for it"),
        (
            vec!["--metrics", "key", "--api-key", "sesame", "--metrics-key", "sesame"],
            "METRICS_KEY is one of the API keys",
        ),
    ];
    for (args, expected) in refused {
        let output = run(&[&["serve"], &args[..]].concat(), &[]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(expected), "{args:?}: {text}");
        assert!(!text.contains("sesame"), "{text}");
    }
    let help = run(&["serve", "--help"], &[("API_KEY", "sesame"), ("METRICS_KEY", "sesame")]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("API_KEY_FILE"));
    assert!(!String::from_utf8_lossy(&help.stdout).contains("sesame"));
}

#[test]
fn a_reader_that_stalls_is_let_go_and_its_request_cancelled() {
    let server =
        Server::start(&["--ctx", "1024", "--write-timeout", "0.5", "--log-format", "json"]);
    let body =
        json!({ "prompt": "A long tale:", "max_tokens": 900, "n": 4, "stream": true, "ignore_eos": true }).to_string();
    let mut stalled = server.narrow_connection();
    stalled
        .write_all(&request_bytes(
            "POST /v1/completions",
            &["X-Request-Id: stalled"],
            body.as_bytes(),
        ))
        .unwrap();
    let line = access_line(&server, "stalled");
    assert_eq!((&line["message"], &line["status"]), (&json!("aborted"), &json!(200)), "{line}");
    server.wait(|| server.is_idle());
    let n = server.load()["tokens_generated"].as_u64().unwrap();
    assert!(n < 4 * 900, "{n} tokens: all of them");
    drop(stalled);
}

#[test]
fn heads_that_are_too_large_and_connections_that_idle_are_let_go() {
    let server = Server::start_loading(&[
        "--ctx",
        "256",
        "--max-header-bytes",
        "4096",
        "--read-timeout",
        "0.5",
    ]);
    let large = format!("X-Large: {}", "x".repeat(5000));
    assert_eq!(server.ask("GET /health", &[&large], b"").status, 431);
    let path = format!("GET /{}", "x".repeat(5000));
    assert_eq!(server.ask(&path, &[], b"").status, 431);
    let many = ["X-Y: z"; 101];
    assert_eq!(server.ask("GET /health", &many, b"").status, 431);
    assert_eq!(server.ask("GET /health", &many[..90], b"").status, 200);

    let mut idle = server.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    idle.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut all = String::new();
    idle.read_to_string(&mut all).expect("the server closes the connection");
    assert!(all.starts_with("HTTP/1.1 200"), "{all}");
}

#[test]
fn pages_of_named_origins_may_read_answers_and_others_may_not() {
    let server = Server::start_loading(&[
        "--ctx",
        "256",
        "--api-key",
        "k",
        "--cors-origin",
        "https://a.example,http://b.example:8080",
    ]);
    let preflight = |origin: &str| {
        let headers = [
            &format!("Origin: {origin}"),
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,x-a",
        ];
        server.ask("OPTIONS /v1/chat/completions", &headers, b"")
    };
    for origin in ["https://a.example", "http://b.example:8080"] {
        let answer = preflight(origin);
        assert_eq!(
            (answer.status, answer.header("access-control-allow-origin")),
            (204, Some(origin))
        );
        assert_eq!(answer.header("access-control-allow-headers"), Some("authorization,x-a"));
        assert!(answer.header("access-control-allow-methods").unwrap().contains("post"));
        let answer =
            server.ask("POST /v1/chat/completions", &[&format!("Origin: {origin}")], b"{}");
        assert_eq!(
            (answer.status, answer.header("access-control-allow-origin")),
            (401, Some(origin)),
            "errors are read, too"
        );
        assert!(answer.header("access-control-expose-headers").unwrap().contains("x-request-id"));
    }
    for other in ["https://a.example.org", "https://a.example:1", "http://a.example", "null"] {
        assert_eq!(
            (preflight(other).status, preflight(other).header("access-control-allow-origin")),
            (401, None),
            "{other}"
        );
        let answer = server.ask("GET /health", &[&format!("Origin: {other}")], b"");
        assert_eq!(
            (answer.header("access-control-allow-origin"), answer.header("vary")),
            (None, Some("origin"))
        );
    }
    let all = Server::start_loading(&["--ctx", "256", "--cors-origin", "*"]);
    let answer = all.ask("GET /health", &["Origin: https://any.example"], b"");
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    let none = Server::start_loading(&["--ctx", "256"]);
    assert!(
        !none
            .ask("GET /health", &["Origin: https://a.example"], b"")
            .head
            .contains("access-control")
    );
    for (value, wanted) in [
        ("https://a.example/", "CORS_ORIGIN"),
        ("a.example", "with no path"),
        ("*,https://a.example", "* and others"),
    ] {
        let refused = run(&["serve", "--cors-origin", value], &[]);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains(wanted), "{text}");
    }
}

/// A certificate for `localhost` and its key, as files and for a client.
struct Certificate {
    folder: tempfile::TempDir,
    der: CertificateDer<'static>,
}

impl Certificate {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), made.signing_key.serialize_pem()).unwrap();
        Self { folder, der: made.cert.der().clone() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// Sends bytes over TLS and reads the answer to its end.
    fn exchange(&self, server: &Server, request: &[u8]) -> String {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config =
            config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let session = ClientConnection::new(
            Arc::new(config.with_no_client_auth()),
            "localhost".try_into().unwrap(),
        );
        let mut stream =
            StreamOwned::new(session.unwrap(), TcpStream::connect(server.addr).unwrap());
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

#[test]
fn answers_and_streams_go_over_tls_and_bad_handshakes_are_nobody_elses_affair() {
    let certificate = Certificate::new();
    let (cert, key) = (certificate.path("cert.pem"), certificate.path("key.pem"));
    let server = Server::start_loading(&[
        "--ctx",
        "256",
        "--read-timeout",
        "1",
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
    ]);
    assert!(server.log().contains("https://"));

    let mut silent = TcpStream::connect(server.addr).unwrap();
    let mut plain = server.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let ready = request_bytes("GET /ready", &[], b"");
    server.wait(|| certificate.exchange(&server, &ready).starts_with("HTTP/1.1 200"));
    let body =
        json!({ "prompt": "x", "max_tokens": 3, "stream": true, "ignore_eos": true }).to_string();
    let streamed =
        certificate.exchange(&server, &request_bytes("POST /generate", &[], body.as_bytes()));
    assert!(streamed.contains("\"completion_tokens\":3"), "{streamed}");

    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest); // closed, or reset
    assert!(!rest.starts_with(b"HTTP"), "no answer in clear");
    silent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(silent.read(&mut [0; 16]).expect("the server closes the connection"), 0);
}

#[test]
fn certificates_that_cannot_be_used_are_refused_at_start_by_name() {
    let (ours, other) = (Certificate::new(), Certificate::new());
    let (cert, key, others) = (ours.path("cert.pem"), ours.path("key.pem"), other.path("key.pem"));
    let refused = [
        (vec!["--tls-cert", &cert], "give TLS_KEY"),
        (vec!["--tls-key", &key], "give TLS_CERT"),
        (
            vec!["--tls-cert", "/no/such/file", "--tls-key", &key],
            "TLS_CERT /no/such/file cannot be read",
        ),
        (vec!["--tls-cert", &key, "--tls-key", &key], "holds no certificate"),
        (vec!["--tls-cert", &cert, "--tls-key", &cert], "cannot be read as a private key"),
        (vec!["--tls-cert", &cert, "--tls-key", &others], "cannot be used together"),
    ];
    for (args, expected) in refused {
        let output = run(&[&["serve"], &args[..]].concat(), &[]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(expected), "{args:?}: {text}");
    }
}
