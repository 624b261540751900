//! What a server tells balancers about how busy it is.
#![allow(missing_docs)]

mod common;

use common::{Server, read_answer, request_bytes};
use serde_json::{Value, json};

const REPORT: &str = "endpoint-load-metrics";

/// The numbers of a report in `TEXT`; heads are in lower case here.
fn numbers(report: &str) -> Vec<(&str, f64)> {
    let pairs = report.strip_prefix("text ").unwrap_or_else(|| panic!("{report}")).split(',');
    pairs.map(|pair| pair.split_once('=').unwrap()).map(|(k, v)| (k, v.parse().unwrap())).collect()
}

fn number(numbers: &[(&str, f64)], name: &str) -> f64 {
    numbers.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("{numbers:?}")).1
}

#[test]
fn loads_follow_what_runs_and_waits() {
    let server =
        Server::start(&["--batch-size", "2", "--max-concurrent-batches", "2", "--ctx", "2048"]);
    let load = || -> Value { server.get("/v1/loads").json() };
    let idle = load();
    assert_eq!(idle["dp_rank_count"], 1);
    assert!(idle["timestamp"].as_str().unwrap().ends_with('Z'), "{idle}");
    let of = &idle["loads"][0];
    for (field, value) in [
        ("dp_rank", json!(0)),
        ("model_name", json!("smollm2-135m-instruct-q4_1")),
        ("num_running_reqs", json!(0)),
        ("num_total_reqs", json!(0)),
        ("num_used_tokens", json!(0)),
        ("token_usage", json!(0.0)),
        ("utilization", json!(0.0)),
        ("max_running_requests", json!(2)),
    ] {
        assert_eq!(of[field], value, "{field} of {of}");
    }
    assert_eq!(of["max_total_num_tokens"], server.get("/").json()["kv"]["cells"]);

    let body = json!({ "prompt": "A long story:", "max_tokens": 1500, "stream": true, "ignore_eos": true, "speculation": "off" });
    let streams: Vec<_> = (0..4).map(|_| server.open_stream(&body)).collect();
    server.wait(|| load()["loads"][0]["num_running_reqs"] == 2);
    server.wait(|| load()["loads"][0]["num_waiting_reqs"] == 2);
    let busy = load()["loads"][0].clone();
    assert_eq!((&busy["num_total_reqs"], &busy["utilization"]), (&json!(4), &json!(2.0)));
    assert!(busy["num_used_tokens"].as_u64().unwrap() > 0, "{busy}");
    let usage = busy["token_usage"].as_f64().unwrap();
    assert!(usage > 0.0 && usage <= 1.0, "{busy}");

    let ask = |body: &Value| {
        let headers = ["Endpoint-Load-Metrics-Format: TEXT"];
        server.ask("POST /generate", &headers, body.to_string().as_bytes())
    };
    let full = ask(&body);
    assert_eq!(full.status, 429);
    let said = numbers(full.header(REPORT).unwrap());
    assert_eq!(number(&said, "application_utilization"), 2.0);
    assert_eq!(number(&said, "named_metrics.num_requests_waiting"), 2.0);
    assert!(number(&said, "named_metrics.kv_cache_usage_perc") > 0.0);
    assert!(number(&said, "rps_fractional") > 0.0);
    drop(streams);
    server.wait(|| server.is_idle() && load()["loads"][0]["num_total_reqs"] == 0);
}

#[test]
fn a_report_comes_when_it_is_asked_for_and_only_to_those_with_a_key() {
    let server = Server::start(&["--ctx", "512", "--api-key", "k"]);
    let ask = |what: &str, format: &str, key: &str, body: &Value| {
        let headers = [
            format!("endpoint-load-metrics-format: {format}"),
            format!("Authorization: Bearer {key}"),
        ];
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let bytes = if body.is_null() { String::new() } else { body.to_string() };
        read_answer(server.send(&request_bytes(what, &headers, bytes.as_bytes())))
    };
    let chat = |stream: bool| json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 3, "stream": stream });
    for stream in [false, true] {
        let answer = ask("POST /v1/chat/completions", "TEXT", "k", &chat(stream));
        let said = numbers(answer.header(REPORT).unwrap());
        assert!(number(&said, "application_utilization") > 0.0, "{said:?}");
        assert!(number(&said, "rps_fractional") > 0.0, "{said:?}");
    }
    let answer = ask("POST /v1/chat/completions", "json", "k", &chat(false));
    let report = answer.header(REPORT).unwrap().strip_prefix("json ").unwrap();
    let report: Value = serde_json::from_str(report).unwrap();
    assert!(report["application_utilization"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["named_metrics"]["num_requests_waiting"].is_number(), "{report}");

    for (what, format, key, body, status) in [
        ("POST /v1/chat/completions", "BIN", "k", chat(false), 200),
        ("POST /v1/chat/completions", "TEXT", "other", chat(false), 401),
        ("GET /v1/loads", "TEXT", "other", Value::Null, 401),
        ("GET /health", "TEXT", "k", Value::Null, 200),
    ] {
        let answer = ask(what, format, key, &body);
        assert_eq!((answer.status, answer.header(REPORT)), (status, None), "{what} {format}");
    }
}
