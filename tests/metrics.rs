//! `/metrics` on a socket: what it shows is what answers said.
#![allow(missing_docs)]

mod common;

use std::io::Read;

use common::Server;
use serde_json::{Value, json};

/// Sums of what answers said.
#[derive(Debug, Default, PartialEq)]
struct Sums {
    prompt: u64,
    cached: u64,
    completion: u64,
    steps: u64,
    drafted: u64,
    accepted: u64,
}

impl Sums {
    fn add(&mut self, usage: &Value, cached: &Value, speculation: &Value) {
        let n = |value: &Value| value.as_u64().unwrap();
        self.prompt += n(&usage["prompt_tokens"]);
        self.cached += n(cached);
        self.completion += n(&usage["completion_tokens"]);
        self.steps += n(&speculation["steps"]);
        self.drafted += n(&speculation["drafted"]);
        self.accepted += n(&speculation["accepted"]);
    }
}

#[test]
fn counters_add_up_to_what_answers_said() {
    let server = Server::start(&["--batch-size", "2", "--ctx", "512"]);
    let mut sums = Sums::default();
    let count = "Repeat after me: one two three four five six seven eight nine ten. One two three four five six seven eight nine ten. One";
    for (body, is_stream) in [
        (json!({ "prompt": count, "max_tokens": 48, "temperature": 0 }), false),
        (
            json!({ "prompt": count, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "stream": true }),
            true,
        ),
        (json!({ "prompt": "The sea", "max_tokens": 1, "seed": 3, "cache_prompt": false }), false),
    ] {
        let answer = server.generate(&body);
        let done = if is_stream { answer.events().pop().unwrap() } else { answer.json() };
        sums.add(&done["usage"], &done["usage"]["cached_tokens"], &done["speculation"]);
    }
    let uncached = sums.prompt;
    let messages = json!([{ "role": "user", "content": "Count to ten, twice." }]);
    let chat = server
        .post_to(
            "/v1/chat/completions",
            &json!({ "messages": messages, "max_tokens": 40, "temperature": 0 }),
        )
        .json();
    let usage = &chat["usage"];
    sums.add(
        usage,
        &usage["prompt_tokens_details"]["cached_tokens"],
        &chat["choices"][0]["speculation"],
    );
    assert_eq!(server.generate(&json!({ "prompt": "x", "top_p": 2 })).status, 422);
    assert_eq!(server.get("/nowhere/at/all").status, 404);
    server.wait(|| server.is_idle());

    let total =
        |name: &str| server.metric(name, &[r#"model_name="smollm2-135m-instruct-q4_1""#]) as u64;
    let counted = Sums {
        prompt: total("prompt_tokens_total"),
        cached: total("prefix_cache_hits_total"),
        completion: total("generation_tokens_total"),
        steps: total("inter_token_latency_seconds_count")
            + total("time_to_first_token_seconds_count"),
        drafted: total("spec_decode_num_draft_tokens_total"),
        accepted: total("spec_decode_num_accepted_tokens_total"),
    };
    assert_eq!(counted, sums);
    assert!(sums.accepted > 0, "text that repeats is drafted: {sums:?}");
    assert_eq!(total("spec_decode_num_accepted_tokens_per_pos_total"), sums.accepted);
    assert_eq!(total("draft_candidates_chosen_total"), sums.drafted);
    assert!(
        total("draft_candidates_offered_total") >= sums.drafted
            && total("spec_decode_num_drafts_total") <= sums.steps
    );
    let known = total("spec_decode_source_draft_tokens_total");
    assert!(known > 0 && known <= sums.drafted, "{known} of {}", sums.drafted);
    let asked_for_nothing_cached = sums.prompt - total("prefix_cache_queries_total");
    assert!(asked_for_nothing_cached > 0 && asked_for_nothing_cached < uncached);

    for name in ["queue_time", "prefill_time", "decode_time"] {
        assert_eq!(total(&format!("request_{name}_seconds_count")), 4);
    }
    assert_eq!(
        (total("e2e_request_latency_seconds_count"), total("request_success_total")),
        (4, 4)
    );
    assert_eq!(
        total("request_time_per_output_token_seconds_count"),
        3,
        "an answer of one token has no pace"
    );
    assert!(server.metric("request_success_total", &[r#"finished_reason="length""#]) >= 2.0);
    let (rows, steps) = (total("rows_per_step_sum"), total("rows_per_step_count"));
    assert!(
        rows >= sums.prompt - sums.cached + sums.steps
            && steps >= sums.steps
            && total("steps_total") >= steps
    );

    let http = |path: &str, status: &str| server.metric("http_requests_total", &[path, status]);
    assert_eq!(http(r#"path="/generate""#, r#"status="200""#), 3.0);
    assert_eq!(http(r#"path="/generate""#, r#"status="422""#), 1.0);
    assert_eq!(http(r#"path="/v1/chat/completions""#, r#"status="200""#), 1.0);
    assert_eq!(http(r#"path="other""#, r#"status="404""#), 1.0);
    assert_eq!(server.metric("request_refusals_total", &[r#"reason="invalid_request""#]), 1.0);
    assert_eq!(
        total("num_requests_running")
            + total("num_requests_waiting")
            + total("request_failures_total"),
        0
    );
}

/// Prometheus' text format 0.0.4: each sample belongs to the family that `# TYPE` declared just
/// before, of a type that this format has, and ends in a number.
fn check_classic(text: &str) {
    let mut family = ("", "");
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            family = declared.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&family.1), "{line}");
        } else if !line.starts_with("# HELP ") {
            let (name, rest) = line.split_once('{').expect("every series has labels");
            let suffix = name.strip_prefix(family.0).unwrap_or_else(|| panic!("{line}"));
            let is_of_family = match family.1 {
                "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
                _ => suffix.is_empty(),
            };
            assert!(is_of_family && !line.contains('#'), "{line} in {family:?}");
            assert!(rest.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
}

#[test]
fn a_request_shows_while_it_runs_and_when_its_client_leaves() {
    let server = Server::start(&["--batch-size", "1", "--ctx", "2048"]);
    let openmetrics = ["Accept: application/openmetrics-text; version=1.0.0"];
    let head = server.ask("HEAD /metrics", &openmetrics, b"");
    assert!(
        head.body.is_empty()
            && head.head.contains("content-type: application/openmetrics-text; version=1.0.0")
    );
    assert!(server.ask("GET /metrics", &openmetrics, b"").text().ends_with("# EOF\n"));
    let classic = server.get("/metrics");
    assert_eq!(classic.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    check_classic(classic.text());
    let n_blocks = server.get("/").json()["kv"]["cells"].as_u64().unwrap() / 16;
    let config = format!(
        r#"medusa_llama:cache_config_info{{model_name="smollm2-135m-instruct-q4_1",block_size="16",num_gpu_blocks="{n_blocks}"}} 1"#
    );
    assert!(classic.text().lines().any(|line| line == config), "{config}");

    // Without drafts, which would be through with a text that repeats itself before it is looked
    // at.
    let body = json!({ "prompt": "A long story:", "max_tokens": 2000, "stream": true, "ignore_eos": true, "speculation": "off" });
    let mut first = server.open_stream(&body);
    first.read_exact(&mut [0; 100]).unwrap(); // else the second might be first
    let second = server.open_stream(&body);
    server.wait(|| {
        server.metric("num_requests_waiting", &[]) == 1.0
            && server.metric("num_requests_running", &[]) == 1.0
    });
    let used = server.metric("kv_cache_usage_perc", &[]);
    assert!(used > 0.0 && used <= 1.0, "{used}");
    drop((first, second));
    server.wait(|| server.metric("request_failures_total", &[r#"reason="cancelled""#]) == 2.0);
    assert_eq!(server.metric("request_success_total", &[]), 0.0);
}
