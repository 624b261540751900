//! What answers report of tokens, and what a deadline does.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::Server;
use serde_json::{Value, json};

fn server() -> Arc<Server> {
    common::shared(&["--ctx", "256"])
}

fn generate(server: &Server, more: &Value) -> Value {
    let mut body = json!({ "prompt": "One, two, three,", "raw": true, "max_tokens": 40, "temperature": 0, "ignore_eos": true });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = server.generate(&body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn details_name_each_token_its_step_and_who_drafted_it() {
    let server = server();
    let answer = generate(&server, &json!({ "details": true }));
    let tokens = answer["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 40);
    let text: String = tokens.iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(text, answer["generated_text"].as_str().unwrap());
    let n_drafted = tokens.iter().filter(|t| !t["source"].is_null()).count();
    assert_eq!(n_drafted, answer["speculation"]["accepted"].as_u64().unwrap() as usize);
    assert_eq!(tokens.last().unwrap()["step"], answer["speculation"]["steps"]);
    let steps: Vec<u64> = tokens.iter().map(|t| t["step"].as_u64().unwrap()).collect();
    assert!(
        steps[0] == 1 && steps.windows(2).all(|pair| (0..=1).contains(&(pair[1] - pair[0]))),
        "{steps:?}"
    );
    assert!(tokens.iter().all(|t| t["rows"].as_u64().unwrap() >= 1 && t.get("logprob").is_none()));
    assert!(generate(&server, &json!({})).get("tokens").is_none(), "not requested");

    let body = json!({ "prompt": "One, two, three,", "raw": true, "max_tokens": 40, "temperature": 0, "ignore_eos": true, "stream": true, "details": true });
    let events = server.generate(&body).events();
    let streamed = events
        .iter()
        .flat_map(|e| e["tokens"].as_array().unwrap())
        .map(|t| t["id"].as_u64().unwrap());
    assert!(streamed.eq(tokens.iter().map(|t| t["id"].as_u64().unwrap())), "the same in a stream");
}

#[test]
fn log_probabilities_are_the_models_own_whatever_chooses_and_drafts() {
    let server = server();
    let answer = generate(&server, &json!({ "logprobs": 3 }));
    for token in answer["tokens"].as_array().unwrap() {
        let top: Vec<f64> = token["top_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["logprob"].as_f64().unwrap())
            .collect();
        assert!(top.len() == 3 && top.windows(2).all(|pair| pair[0] >= pair[1]), "{token}");
        // `ignore_eos` bans tokens that end a text, which may be the most likely ones.
        let mut allowed = token["top_logprobs"].as_array().unwrap().iter();
        let best =
            allowed.find(|t| !["<|im_end|>", "<|endoftext|>"].iter().any(|end| t["text"] == *end));
        let best = best.unwrap();
        assert!(
            best["id"] == token["id"] && best["logprob"] == token["logprob"],
            "greedy takes the most likely token: {token}"
        );
        assert!(top.iter().map(|p| p.exp()).sum::<f64>() <= 1.0 + 1e-6);
    }
    let logprobs = |more: &Value| -> Vec<f64> {
        let answer = generate(&server, more);
        answer["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["logprob"].as_f64().unwrap())
            .collect()
    };
    let plain = logprobs(&json!({ "logprobs": 0, "speculation": "off" }));
    assert_eq!(plain, logprobs(&json!({ "logprobs": 0 })), "drafts do not change them");
    let biased =
        generate(&server, &json!({ "logprobs": 1, "logit_bias": { "28": 100 }, "max_tokens": 1 }));
    let first = &biased["tokens"][0];
    assert!(
        first["id"] == 28 && first["top_logprobs"][0]["id"] != 28,
        "a bias changes the choice and not the model: {first}"
    );
}

#[test]
fn tokens_of_a_stop_string_are_not_reported() {
    let server = server();
    let free = generate(&server, &json!({}))["generated_text"].as_str().unwrap().to_owned();
    let stop = &free[10..14];
    let answer = generate(&server, &json!({ "details": true, "stop": stop }));
    let shown = answer["generated_text"].as_str().unwrap();
    let text: String =
        answer["tokens"].as_array().unwrap().iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!((shown, &answer["stop_reason"]), (&free[..free.find(stop).unwrap()], &json!(stop)));
    assert!(
        text.starts_with(shown) && text.len() < shown.len() + stop.len() + 8,
        "{text:?} for {shown:?}"
    );
}

#[test]
fn a_deadline_ends_an_answer_early() {
    let server = Server::start(&["--batch-size", "1", "--ctx", "2048"]);
    let long = json!({ "max_tokens": 2000, "timeout_s": 0.3 });
    let answer = generate(&server, &long);
    assert_eq!(
        (&answer["finish_reason"], &answer["stop_reason"]),
        (&json!("length"), &json!("deadline"))
    );
    assert_eq!(server.load()["running"], 0, "the place is free before its answer is sent");
    let n = answer["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..2000).contains(&n) && !answer["generated_text"].as_str().unwrap().is_empty());

    // A request that waits for another one has no token at its deadline.
    let running = server.open_stream(
        &json!({ "prompt": "x", "max_tokens": 2000, "stream": true, "ignore_eos": true }),
    );
    server.wait(|| server.load()["running"] == 1);
    for stream in [false, true] {
        let late = server.generate(&json!({ "prompt": "y", "timeout_s": 0.05, "stream": stream }));
        assert_eq!((late.status, &late.json()["error"]["type"]), (408, &json!("deadline")));
    }
    drop(running);
    server.wait(|| server.is_idle());
    assert_eq!(server.metric("request_failures_total", &[r#"reason="deadline""#]), 3.0);
}

#[test]
fn the_servers_own_limit_holds_for_all() {
    let server = Server::start(&["--request-timeout", "0.3", "--ctx", "2048"]);
    for more in [json!({ "max_tokens": 2000 }), json!({ "max_tokens": 2000, "timeout_s": 60 })] {
        assert_eq!(generate(&server, &more)["stop_reason"], "deadline");
    }
    let refused = server.generate(&json!({ "prompt": "x", "timeout_s": -1 }));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (422, &json!("timeout_s")));
}
