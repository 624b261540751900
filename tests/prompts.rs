//! From what a client sends to the model's prompt: `/generate`'s template, `/tokenize`,
//! `/detokenize` and `/props`.

mod common;

use common::{Answer, Server, shared};
use serde_json::{Value, json};

const ARGS: &[&str] = &["--batch-size", "4", "--ctx", "1024"];

fn prompt_tokens(answer: &Answer) -> u64 {
    answer.json()["usage"]["prompt_tokens"].as_u64().unwrap_or_else(|| panic!("{}", answer.text()))
}

fn ask(server: &Server, mut body: Value) -> Answer {
    body["max_tokens"] = json!(1);
    server.generate(&body)
}

#[test]
fn a_bare_prompt_is_answered_with_every_seed() {
    let server = shared(ARGS);
    for seed in 0..20 {
        let answer = server.generate(&json!({
            "prompt": "Write a poem about artificial intelligence.", "temperature": 0.8, "top_p": 0.95, "seed": seed, "max_tokens": 32,
        }));
        let text = answer.json()["generated_text"].as_str().unwrap().to_owned();
        assert!(text.chars().count() >= 40, "seed {seed}: {text:?}");
    }
}

#[test]
fn a_prompt_is_a_users_message_unless_it_is_raw_or_holds_control_tokens() {
    let server = shared(ARGS);
    let (user, system) = ("Why is the sky blue?", "Be brief.");
    let chat = |messages: Value| {
        let body = json!({ "messages": messages, "max_tokens": 1 });
        prompt_tokens(&server.post_to("/v1/chat/completions", &body))
    };
    let message = json!({ "role": "user", "content": user });
    assert_eq!(prompt_tokens(&ask(&server, json!({ "prompt": user }))), chat(json!([message])));
    assert_eq!(
        prompt_tokens(&ask(&server, json!({ "prompt": user, "system": system }))),
        chat(json!([{ "role": "system", "content": system }, message]))
    );
    let count = |text: &str| {
        let tokens = server.post_to("/tokenize", &json!({ "content": text })).json();
        tokens["tokens"].as_array().unwrap().len() as u64
    };
    let raw = ask(&server, json!({ "prompt": user, "raw": true }));
    assert_eq!(prompt_tokens(&raw), count(user));
    let whole = format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(prompt_tokens(&ask(&server, json!({ "prompt": whole }))), count(&whole));
    for body in [
        json!({ "prompt": whole, "system": system }),
        json!({ "prompt": user, "raw": true, "system": system }),
    ] {
        let refused = ask(&server, body);
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (422, &json!("system")));
    }
}

#[test]
fn texts_become_tokens_and_texts_again() {
    let server = shared(ARGS);
    let text = "The capital of France is 😀 漢字.";
    let tokens = server.post_to("/tokenize", &json!({ "content": text })).json()["tokens"].clone();
    let back = server.post_to("/detokenize", &json!({ "tokens": tokens }));
    assert_eq!(back.json()["content"], text);

    let body = json!({ "content": text, "with_pieces": true });
    let pieces = server.post_to("/tokenize", &body).json();
    let mut bytes: Vec<u8> = vec![];
    for (piece, id) in pieces["tokens"].as_array().unwrap().iter().zip(tokens.as_array().unwrap()) {
        assert_eq!(&piece["id"], id);
        match &piece["piece"] {
            Value::String(text) => bytes.extend(text.bytes()),
            list => bytes.extend(serde_json::from_value::<Vec<u8>>(list.clone()).unwrap()),
        }
    }
    assert_eq!(bytes, text.as_bytes());

    // As vLLM's clients ask, evaluators among them.
    let body = json!({ "prompt": text, "add_special_tokens": false, "model": "any" });
    let theirs = server.post_to("/tokenize", &body).json();
    let n_tokens = tokens.as_array().unwrap().len();
    assert_eq!((&theirs["tokens"], &theirs["count"]), (&tokens, &json!(n_tokens)));
    let back = server.post_to("/detokenize", &json!({ "tokens": tokens, "model": "any" }));
    assert_eq!(back.json()["prompt"], text);
    let info = server.get("/tokenizer_info").json();
    assert_eq!(info["eos_token"], "<|im_end|>");
    assert!(info["chat_template"].as_str().unwrap().contains("<|im_start|>"));

    let tokenize = |body: Value| server.post_to("/tokenize", &body);
    let name = |parse| json!({ "content": "<|im_end|>", "parse_special": parse });
    let n = |body: Value| tokenize(body).json()["tokens"].as_array().unwrap().len();
    assert_eq!(n(name(true)), 1);
    assert!(n(name(false)) > 1);
    assert_eq!(n(json!({ "content": "" })), 0);
    for (path, body, param) in [
        ("/tokenize", json!({}), "content"),
        ("/tokenize", json!({ "content": 1 }), "content"),
        ("/tokenize", json!({ "content": "a", "prompt": "a" }), "prompt"),
        ("/detokenize", json!({ "tokens": [1, -1] }), "tokens"),
        ("/detokenize", json!({ "tokens": [1_000_000] }), "tokens"),
        ("/detokenize", json!({ "tokens": ["a"] }), "tokens[0]"),
    ] {
        let refused = server.post_to(path, &body);
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (422, &json!(param)));
    }
}

#[test]
fn a_conversation_is_rendered_without_an_answer() {
    let server = shared(ARGS);
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "What is today?" },
    ]);
    let expected =
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is today?<|im_end|>\n";
    let answer = "<|im_start|>assistant\n";
    for (more, ending) in [
        (json!({}), answer),
        (json!({ "tools": [], "add_generation_prompt": true, "temperature": 1 }), answer),
        (json!({ "add_generation_prompt": false }), ""),
    ] {
        let mut body = json!({ "messages": messages });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let rendered = server.post_to("/apply-template", &body);
        assert_eq!(rendered.json(), json!({ "prompt": format!("{expected}{ending}") }));
        let ignored = rendered.header("x-ignored-fields");
        assert_eq!(ignored, body.get("temperature").map(|_| "temperature"));
    }
    let refused = server.post_to("/apply-template", &json!({ "messages": [] }));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (422, &json!("messages")));
}

#[test]
fn props_describe_what_is_served() {
    let props = shared(ARGS).get("/props").json();
    assert_eq!(props["total_slots"], 4);
    assert_eq!(props["default_generation_settings"]["n_ctx"], 1024);
    assert!(props["model_path"].as_str().unwrap().ends_with(".gguf"));
    assert!(props["chat_template"].as_str().unwrap().contains("<|im_start|>"));
    assert_eq!(props["eos_token"], "<|im_end|>");
}
