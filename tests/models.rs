//! A server of several models: requests choose, models come and go.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Answer, Server, post_bytes, read_answer};
use medusa_llama::llama::Quantization;
use medusa_llama::synth::{self, ModelShape};
use serde_json::{Value, json};

/// Writes a small model with random weights.
fn write(path: &Path, shape: &str) {
    let shape = ModelShape::by_name(shape).unwrap();
    let f16 = Quantization::by_name("F16").unwrap();
    synth::model(path, &shape, f16, 1, &mut |_, _| ()).unwrap();
}

/// A folder with two models, `a` and `sub/b`.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    write(&folder.path().join("a.gguf"), "tiny");
    write(&folder.path().join("sub/b.gguf"), "tiny-qwen2");
    folder
}

fn serve(args: &[&str]) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    command.args(["serve", "--ctx", "512", "-b", "2"]).args(args);
    Server::launch(&mut command)
}

fn of_folder(folder: &Path, args: &[&str]) -> Server {
    serve(&[&["--model-dir", folder.to_str().unwrap()], args].concat())
}

fn body(model: &str, n: usize) -> Value {
    json!({ "model": model, "prompt": "the cat sat", "max_tokens": n, "temperature": 0, "ignore_eos": true })
}

fn text(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["generated_text"].as_str().unwrap().to_owned()
}

fn status(server: &Server, id: &str) -> String {
    let models = server.get("/v1/models").json();
    let entry = models["data"].as_array().unwrap().iter().find(|entry| entry["id"] == id);
    entry.unwrap()["status"]["value"].as_str().unwrap().to_owned()
}

#[test]
fn a_request_is_answered_by_the_model_that_it_names() {
    let folder = folder();
    let server = of_folder(folder.path(), &[]);
    assert_eq!((server.get("/ready").status, server.get("/health").status), (200, 200));
    assert_eq!([status(&server, "a"), status(&server, "sub/b")], ["unloaded", "unloaded"]);
    let texts = ["a", "sub/b"].map(|id| text(&server.generate(&body(id, 24))));
    assert_eq!([status(&server, "a"), status(&server, "sub/b")], ["loaded", "loaded"]);
    for (id, expected) in ["a", "sub/b"].iter().zip(&texts) {
        let path = folder.path().join(format!("{id}.gguf"));
        let alone = serve(&["-m", path.to_str().unwrap()]);
        alone.wait(|| alone.get("/ready").status == 200);
        assert_eq!(&text(&alone.generate(&body("any", 24))), expected, "{id} alone");
        let answer = server.post_to("/v1/completions", &body(id, 24));
        assert_eq!(answer.json()["model"], *id);
        assert_eq!(answer.json()["choices"][0]["text"], *expected);
        let props = server.get(&format!("/props?model={}", id.replace('/', "%2F"))).json();
        assert_eq!(props["model_alias"], *id);
        assert_eq!(server.get(&format!("/v1/models/{id}")).json()["max_model_len"], 512);
        let model = format!("model_name=\"{id}\"");
        assert!(server.metric("generation_tokens_total", &[&model]) >= 48.0, "{id}");
    }
    let metrics = server.get("/metrics");
    let mut names: Vec<&str> =
        metrics.text().lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let n = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), n, "a metric is there twice");
    let listed = server.get("/").json();
    assert_eq!(listed["models"].as_array().unwrap().len(), 2);
}

#[test]
fn a_request_without_a_known_name_is_refused() {
    let folder = folder();
    let server = of_folder(folder.path(), &[]);
    let unknown = server.post_to("/v1/completions", &body("c", 1));
    assert_eq!(
        (unknown.status, &unknown.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    let none = server.post_to("/v1/completions", &json!({ "prompt": "x" }));
    assert_eq!((none.status, &none.json()["error"]["param"]), (400, &json!("model")));
    assert!(none.text().contains("a, sub/b"), "{}", none.text());
    let number = server.generate(&json!({ "prompt": "x", "model": 3 }));
    assert_eq!((number.status, &number.json()["error"]["param"]), (422, &json!("model")));
    assert_eq!(server.post(b"{").json()["error"]["type"], "invalid_json");
    assert_eq!(server.get("/props").status, 422);
    let paths = server.get("/openapi.json").json()["paths"].take();
    for (path, method) in [("/v1/completions", "post"), ("/generate", "post"), ("/props", "get")] {
        let known = &paths[path][method]["responses"];
        assert!(["404", "408", "503"].iter().all(|status| !known[status].is_null()), "{path}");
    }
    assert!(!paths["/props"]["get"]["responses"]["422"].is_null());
    assert_eq!([status(&server, "a"), status(&server, "sub/b")], ["unloaded", "unloaded"]);
}

#[test]
fn the_only_model_of_a_folder_answers_to_any_name() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("a.gguf"), "tiny");
    let server = of_folder(folder.path(), &[]);
    for body in [body("any", 4), json!({ "prompt": "x", "max_tokens": 4 })] {
        let answer = server.post_to("/v1/completions", &body);
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!("a")));
    }
}

#[test]
fn a_model_answers_what_it_has_before_it_makes_room() {
    let folder = folder();
    let server = of_folder(folder.path(), &["--models-max", "1"]);
    let expected = ["a", "sub/b"].map(|id| text(&server.generate(&body(id, 24))));
    let mut long = body("sub/b", 400);
    long["stream"] = true.into();
    let stream = server.send(&post_bytes(long.to_string().as_bytes()));
    server.wait(|| server.metric("generation_tokens_total", &[]) > 30.0);
    // One that waits has its own time, and harms nobody.
    let mut hasty = body("a", 1);
    hasty["timeout_s"] = 0.05.into();
    let late = server.generate(&hasty);
    assert_eq!((late.status, &late.json()["error"]["type"]), (408, &json!("deadline")));
    assert_eq!(text(&server.generate(&body("a", 24))), expected[0]);
    let events = read_answer(stream).events();
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 400, "the stream was cut");
    assert_eq!([status(&server, "a"), status(&server, "sub/b")], ["loaded", "unloaded"]);
    assert_eq!(text(&server.generate(&body("sub/b", 24))), expected[1]);
}

#[test]
fn many_clients_of_two_models_in_the_place_of_one_are_all_answered() {
    let folder = folder();
    let server = of_folder(folder.path(), &["--models-max", "1"]);
    let expected = ["a", "sub/b"].map(|id| text(&server.generate(&body(id, 16))));
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (server, expected) = (&server, &expected);
            scope.spawn(move || {
                for turn in 0..6 {
                    let which = (client + turn) % 2;
                    let answer = server.generate(&body(["a", "sub/b"][which], 16));
                    assert_eq!(text(&answer), expected[which]);
                }
            });
        }
    });
}

#[test]
fn a_model_that_cannot_be_loaded_fails_its_own_requests() {
    let folder = folder();
    let good = std::fs::read(folder.path().join("a.gguf")).unwrap();
    std::fs::write(folder.path().join("cut.gguf"), &good[..good.len() / 2]).unwrap();
    std::fs::write(folder.path().join("odd.gguf"), b"no model at all").unwrap();
    let server = of_folder(folder.path(), &[]);
    for id in ["cut", "odd"] {
        let failed = server.post_to("/v1/completions", &body(id, 1));
        assert_eq!((failed.status, &failed.json()["error"]["code"]), (503, &json!("model_failed")));
        assert!(failed.text().contains(&format!("{id}.gguf")), "{}", failed.text());
        assert_eq!(status(&server, id), "failed");
    }
    text(&server.generate(&body("a", 4)));
    // A file that was mended is tried again, after a pause.
    std::fs::write(folder.path().join("cut.gguf"), &good).unwrap();
    server.wait(|| server.generate(&body("cut", 4)).status == 200);
}

#[test]
fn memory_limits_how_many_models_are_loaded() {
    let folder = folder();
    let take = |server: &Server| {
        let text = server.log();
        let line = text.lines().find(|line| line.contains("memory: ")).unwrap().to_owned();
        let mib = line.split("memory: ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        assert!(line.contains("MiB on the host"), "{line}");
        mib.parse::<f64>().unwrap()
    };
    let server = of_folder(folder.path(), &["--kv-cells", "262144"]);
    text(&server.generate(&body("sub/b", 1)));
    let limit = format!("{:.3}", take(&server) * 1.2 / 1024.0);
    let args = ["--kv-cells", "262144", "--model-memory", &limit];
    let server = of_folder(folder.path(), &args);
    for id in ["a", "sub/b", "a"] {
        text(&server.generate(&body(id, 8)));
        let loaded = ["a", "sub/b"].iter().filter(|id| status(&server, id) == "loaded").count();
        assert_eq!(loaded, 1, "{limit} GiB");
    }
    assert!(server.log().contains("unloading"), "{}", server.log());
}

#[test]
fn a_server_that_ends_refuses_those_that_wait_for_a_model() {
    let folder = folder();
    let server = of_folder(folder.path(), &["--models-max", "1"]);
    let mut long = body("a", 400);
    long["stream"] = true.into();
    let stream = server.send(&post_bytes(long.to_string().as_bytes()));
    server.wait(|| server.metric("generation_tokens_total", &[]) > 3.0);
    let waiting = server.send(&post_bytes(body("sub/b", 4).to_string().as_bytes()));
    server.wait(|| status(&server, "a") == "unloading");
    server.terminate();
    let refused = read_answer(waiting);
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (503, &json!("draining")));
    let events = read_answer(stream).events();
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 400, "the stream was cut");
    assert_eq!(server.wait_for_exit().code(), Some(0));
}

#[test]
fn a_list_gives_each_model_its_own_flags() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("echo.jinja"), "{{ messages[0].content }}").unwrap();
    let list = format!(
        "[[model]]\nalias = \"small\"\nmodel = \"{}\"\nctx = 64\nchat-template-file = \"{}\"\n\
         [[model]]\nmodel = \"{}\"\ntext-drafts = \"off\"\n",
        path("a.gguf"),
        path("echo.jinja"),
        path("sub/b.gguf"),
    );
    std::fs::write(path("models.toml"), list).unwrap();
    let server = serve(&["--model-list", &path("models.toml")]);
    let chat = json!({ "model": "small", "max_tokens": 8, "temperature": 0,
        "messages": [{ "role": "user", "content": "the cat sat" }] });
    let small = server.post_to("/v1/chat/completions", &chat);
    assert_eq!(small.json()["choices"][0]["message"]["content"], {
        text(&server.generate(&json!({ "model": "small", "prompt": "the cat sat", "max_tokens": 8, "temperature": 0 })))
    });
    text(&server.generate(&body("b", 100)));
    let listed = server.get("/v1/models").json();
    let lengths: Vec<_> =
        listed["data"].as_array().unwrap().iter().map(|entry| &entry["max_model_len"]).collect();
    assert_eq!(lengths, [64, 512]);
    let too_long = server.generate(&body("small", 100));
    assert_eq!((too_long.status, &too_long.json()["error"]["param"]), (422, &json!("max_tokens")));
}
