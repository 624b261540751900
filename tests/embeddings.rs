//! `/v1/embeddings` against llama.cpp's own embeddings of the same tokens.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::Server;
use common::context::{MODEL, context, feed, params};
use medusa_llama::llama::{ContextParams, Token};
use serde_json::{Value, json};

const TEXT: &str = "The old lighthouse stands on a cliff above the sea.";

/// llama.cpp's embedding of each token.
fn reference(tokens: &[Token]) -> Vec<Vec<f32>> {
    let mut context = context(&ContextParams { embeddings: true, ..params() });
    feed(&mut context, tokens, 0, 0);
    (0..tokens.len()).map(|row| context.embedding(row).unwrap().to_vec()).collect()
}

fn floats(embedding: &Value) -> Vec<f32> {
    embedding.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn norm(values: &[f32]) -> f32 {
    values.iter().map(|v| v * v).sum::<f32>().sqrt()
}

/// The cosine of the angle between two embeddings.
fn likeness(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>() / norm(a) / norm(b)
}

fn ask(server: &Server, body: &Value) -> Value {
    let answer = server.post_to("/v1/embeddings", body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn mean_server() -> Arc<Server> {
    common::shared(&["--pooling", "mean", "--ctx", "256", "-b", "2"])
}

#[test]
fn an_embedding_is_the_pooled_states_of_its_tokens() {
    let tokens = MODEL.tokenize(TEXT, false).unwrap();
    let states = reference(&tokens);
    let n = states.len() as f32;
    let column = |i: usize| states.iter().map(|state| state[i]).sum::<f32>() / n;
    let mean = (0..states[0].len()).map(column).collect::<Vec<_>>();
    for (pooling, expected) in
        [("mean", &mean), ("cls", &states[0]), ("last", states.last().unwrap())]
    {
        let server = Server::start(&["--pooling", pooling, "--ctx", "256"]);
        // Twice: what the cache has of the text must not change it.
        for _ in 0..2 {
            let answer = ask(&server, &json!({ "input": TEXT, "embd_normalize": -1 }));
            let found = floats(&answer["data"][0]["embedding"]);
            let off: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
            assert!(norm(&off) < 1e-3 * norm(expected), "{pooling}: {}", norm(&off));
            assert_eq!(answer["usage"]["prompt_tokens"], tokens.len());
        }
    }
}

#[test]
fn embeddings_come_in_each_form_that_clients_ask_for() {
    let server = mean_server();
    let ids: Vec<i32> = MODEL.tokenize(TEXT, false).unwrap().iter().map(|t| t.0).collect();
    let answer = ask(&server, &json!({ "input": [TEXT, "A second text"], "model": "any" }));
    assert_eq!((&answer["object"], &answer["data"][1]["index"]), (&json!("list"), &json!(1)));
    let vector = floats(&answer["data"][0]["embedding"]);
    assert_eq!(vector.len(), MODEL.n_embd());
    assert!((norm(&vector) - 1.0).abs() < 1e-5);
    for input in [json!(ids), json!([ids]), json!(TEXT)] {
        let again = ask(&server, &json!({ "input": input, "dimensions": vector.len() }));
        assert_eq!(floats(&again["data"][0]["embedding"]), vector, "{input}");
    }
    // Names of control tokens are text.
    let named = ask(&server, &json!({ "input": "<|im_end|>" }));
    assert!(named["usage"]["total_tokens"].as_u64().unwrap() > 1);
}

#[test]
fn texts_that_mean_the_same_are_more_alike() {
    let texts = [
        "A cat sleeps on the sofa.",
        "A kitten naps on the couch.",
        "Interest rates rose by two percent.",
    ];
    let answer = ask(&mean_server(), &json!({ "input": texts }));
    let [cat, kitten, rates] = [0, 1, 2].map(|i| floats(&answer["data"][i]["embedding"]));
    assert!(likeness(&cat, &kitten) > likeness(&cat, &rates));
}

/// More texts than may wait: they are embedded a few at a time, as each would be alone, and another
/// client's request gets its turn among them.
#[test]
fn a_long_list_leaves_room_for_others() {
    let server = mean_server();
    let texts: Vec<String> = (0..60).map(|i| format!("{i}: {TEXT}")).collect();
    std::thread::scope(|scope| {
        let long = scope.spawn(|| ask(&server, &json!({ "input": texts })));
        for _ in 0..5 {
            let body = json!({ "prompt": "One", "max_tokens": 4 });
            assert_eq!(server.generate(&body).status, 200);
        }
        let long = long.join().unwrap();
        let alone = ask(&server, &json!({ "input": texts[7] }));
        assert_eq!(long["data"].as_array().unwrap().len(), texts.len());
        let [long, alone] = [&long["data"][7], &alone["data"][0]].map(|d| floats(&d["embedding"]));
        assert!(likeness(&long, &alone) > 0.9999);
        if common::context::rows_are_independent() {
            assert_eq!(long, alone);
        }
    });
    server.wait(|| server.is_idle());
}

#[test]
fn what_cannot_be_embedded_is_refused_by_name() {
    let server = mean_server();
    let long = json!({ "input": "word ".repeat(400) });
    for (body, param, code) in [
        (json!({}), "input", "invalid_request"),
        (json!({ "input": [] }), "input", "invalid_request"),
        (json!({ "input": "" }), "input", "invalid_request"),
        (json!({ "input": [TEXT, ""] }), "input", "invalid_request"),
        (json!({ "input": [99_999_999] }), "input", "invalid_request"),
        (json!({ "input": [1, "a"] }), "input", "invalid_request"),
        (json!({ "input": TEXT, "dimensions": 5 }), "dimensions", "invalid_request"),
        (json!({ "input": TEXT, "encoding_format": "int8" }), "encoding_format", "invalid_request"),
        (json!({ "input": TEXT, "embd_normalize": 1 }), "embd_normalize", "invalid_request"),
        (long, "input", "context_length_exceeded"),
    ] {
        let answer = server.post_to("/v1/embeddings", &body);
        let error = &answer.json()["error"];
        let found = (answer.status, &error["param"], &error["code"]);
        assert_eq!(found, (400, &json!(param), &json!(code)), "{body}: {error}");
    }
    let late = server.post_to("/v1/embeddings", &json!({ "input": TEXT, "timeout_s": 0.0 }));
    assert_eq!(late.status, 408, "{}", late.text());
    server.wait(|| server.is_idle());
}

#[test]
fn a_model_without_pooling_says_so() {
    let server = common::shared(&["--ctx", "256"]);
    let answer = server.post_to("/v1/embeddings", &json!({ "input": TEXT }));
    let error = &answer.json()["error"];
    assert_eq!((answer.status, &error["code"]), (400, &json!("not_supported")));
    assert!(error["message"].as_str().unwrap().contains("--pooling"), "{error}");
    let refused = common::run(&["serve", "--pooling", "mean", "--kv", "streams"], &[]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("POOLING"), "{refused:?}");
}
