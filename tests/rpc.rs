//! Layers on workers: the text is the same to the last bit, what is wrong with a worker is said in time,
//! and a worker refuses what no client of ours sends.
#![allow(missing_docs)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::worker::{Client, Tensor, Worker, command, graph};
use common::{Server, model_path, run};
use serde_json::{Value, json};

/// A server of a model with two workers and itself, a third of the layers each.
fn with_workers(model: &Path, workers: [SocketAddr; 2], more: &[&str]) -> Server {
    let [first, second] = workers;
    let named = format!("{first},{second}");
    let rpc = ["--rpc", &named, "--rpc-split", "1,1,1"];
    serve(model, &[&rpc, more].concat())
}

fn serve(model: &Path, args: &[&str]) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
    command.args(["serve", "--ctx", "512", "--model"]).arg(model).args(args);
    let server = Server::launch(&mut command);
    server.wait(|| server.get("/ready").status == 200);
    server
}

/// Texts and log probabilities, greedy and seeded: without drafts all at once, then with drafts one
/// after the other, as more rows of a step cost more than they bring.
fn answers(server: &Server) -> Vec<Value> {
    let ask = |temperature: f32, prompt: &str, drafts: &str| {
        let body = json!({
            "prompt": prompt, "max_tokens": 40, "temperature": temperature, "seed": 7,
            "logprobs": 3, "speculation": drafts, "ignore_eos": true,
        });
        let answer = server.post_to("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let choice = &answer.json()["choices"][0];
        json!([choice["text"], choice["logprobs"]])
    };
    let prompts = ["The capital of France is", "one two three, one two three, one"];
    let cases = prompts.map(|prompt| [(0.0, prompt), (0.9, prompt)]).concat();
    let mut all: Vec<Value> = std::thread::scope(|scope| {
        let asked = cases.iter().map(|(t, prompt)| scope.spawn(|| ask(*t, prompt, "off")));
        let asked: Vec<_> = asked.collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    let drafted: Vec<Value> = cases.iter().map(|(t, prompt)| ask(*t, prompt, "auto")).collect();
    assert!(drafted == all, "drafts change nothing");
    all.extend(drafted);
    all
}

/// Far above the 5 seconds that are promised: other processes may keep the cores.
const IN_TIME: Duration = Duration::from_secs(30);

#[test]
fn text_and_log_probabilities_are_those_of_one_machine() {
    let folder = tempfile::tempdir().unwrap();
    let workers = [Worker::start(), Worker::start()];
    for kind in ["Q4_1", "Q8_0", "F16"] {
        let mut model = model_path();
        if kind != "Q4_1" {
            let output = folder.path().join(format!("{kind}.gguf"));
            let [input, output] = [&model, &output].map(|path| path.to_str().unwrap());
            assert!(run(&["quantize", input, output, kind], &[]).status.success());
            model = output.into();
        }
        // Workers compute with the weights as they are in the file.
        let alone = serve(&model, &["--no-repack"]);
        let expected = answers(&alone);
        drop(alone);
        let server = with_workers(&model, [workers[0].addr, workers[1].addr], &["--no-repack"]);
        assert_eq!(server.get("/").json()["backend"], "rpc+cpu");
        assert!(answers(&server) == expected, "{kind}");
        let accepted = server.metric("spec_decode_num_accepted_tokens_total", &[]);
        assert!(accepted > 5.0, "{accepted} drafted tokens were accepted");
        let log = server.log();
        for worker in &workers {
            assert!(log.contains(&format!("on worker {}", worker.addr)), "{log}");
        }
        server.terminate();
        assert_eq!(server.wait_for_exit().code(), Some(0));
    }
}

#[test]
fn a_lost_worker_ends_the_server_with_a_line() {
    for is_busy in [true, false] {
        let mut workers = [Worker::start(), Worker::start()];
        let server = with_workers(&model_path(), [workers[0].addr, workers[1].addr], &[]);
        if is_busy {
            let body =
                json!({ "prompt": "x", "max_tokens": 400, "stream": true, "ignore_eos": true });
            let _stream = server.open_stream(&body);
            server.wait(|| server.load()["tokens_generated"].as_u64().unwrap() > 3);
        }
        let lost = workers[1].addr;
        workers[1].kill();
        let killed = Instant::now();
        let log = server.log_when_ended();
        assert!(killed.elapsed() < IN_TIME);
        let last = log.lines().last().unwrap();
        assert!(last.contains(&format!("the worker {lost} is lost")), "{log}");
        assert!(workers[0].is_alive());
        assert_eq!(workers[0].signal("-TERM").code(), Some(0));
    }
}

#[test]
fn a_worker_that_cannot_be_used_is_named_in_time() {
    let foreign = |answer: &'static [u8]| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 64]);
                let _ = stream.write_all(answer);
            }
        });
        addr
    };
    let mut old = [0; 36];
    old[..12].copy_from_slice(&[28, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
    let absent = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let worker = Worker::start();
    let _client = Client::connect(worker.addr);
    let good = Worker::start();
    for (addr, why) in [
        (absent, "cannot be reached"),
        (worker.addr, "serves another client"),
        (foreign(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), "is no worker"),
        (foreign(b""), "is no worker"),
        (foreign(Box::leak(Box::new(old))), "version 3.0.0"),
    ] {
        let both = format!("{},{addr}", good.addr);
        let model = model_path();
        let model = model.to_str().unwrap();
        for command in [&["serve", "--port", "0"][..], &["generate", "--prompt", "x"]] {
            let began = Instant::now();
            let ended = run(&[command, &["--model", model, "--rpc", &both]].concat(), &[]);
            let said = String::from_utf8(ended.stderr).unwrap();
            assert!(began.elapsed() < IN_TIME, "{why}: {:?}", began.elapsed());
            assert_eq!(ended.status.code(), Some(1), "{said}");
            let named = said.starts_with(&format!("error: the worker {addr} "));
            assert!(named && said.contains(why) && said.lines().count() == 1, "{said}");
        }
    }
}

/// Two numbers, their sum, and an operation on them.
fn sum(client: &mut Client, op: u32) -> [Tensor; 3] {
    let (buffer, base) = client.buffer(4096);
    let of = |id: u64| Tensor { id, buffer, n: 4, data: base + 256 * id, ..Tensor::default() };
    let tensors = [of(1), of(2), Tensor { op, src: [1, 2], ..of(3) }];
    for tensor in &tensors[..2] {
        let values = [1.5f32, 2.5, 3.5, 4.5].map(f32::to_le_bytes).concat();
        let body = [&tensor.bytes()[..], &[0; 9], &values].concat();
        client.send(command::SET_TENSOR, &body);
    }
    tensors
}

fn values(client: &mut Client, tensor: &Tensor, offset: u64, size: u64) -> Option<Vec<u8>> {
    let body = [&tensor.bytes()[..], &offset.to_le_bytes(), &size.to_le_bytes()].concat();
    client.ask(command::GET_TENSOR, &body)
}

const ADD: u32 = 2;
const UNARY: u32 = 91;
const MAP_CUSTOM1: u32 = 92;
const CUSTOM: u32 = 95;
const N_OPS: u32 = 101;

#[test]
fn crafted_messages_are_refused_and_the_worker_lives() {
    let mut worker = Worker::start();
    let adds = |worker: &Worker| {
        let mut client = Client::connect(worker.addr);
        let tensors = sum(&mut client, ADD);
        client.send(command::GRAPH_COMPUTE, &graph(&[3], &tensors));
        let expected = [3.0f32, 5.0, 7.0, 9.0].map(f32::to_le_bytes).concat();
        assert_eq!(values(&mut client, &tensors[2], 0, 16), Some(expected.clone()));
        client.send(command::GRAPH_RECOMPUTE, &0u32.to_le_bytes());
        assert_eq!(values(&mut client, &tensors[2], 0, 16), Some(expected));
    };
    adds(&worker);
    type Craft = fn(&mut Client, [Tensor; 3]);
    let crafts: [(&str, Craft); 17] = [
        ("a custom operation", |client, [a, b, c]| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, Tensor { op: CUSTOM, ..c }]));
        }),
        ("another custom operation", |client, [a, b, c]| {
            client.send(
                command::GRAPH_COMPUTE,
                &graph(&[3], &[a, b, Tensor { op: MAP_CUSTOM1, ..c }]),
            );
        }),
        ("a custom source", |client, [a, b, c]| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, Tensor { op: CUSTOM, ..b }, c]));
        }),
        ("no operation", |client, [a, b, c]| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, Tensor { op: N_OPS, ..c }]));
        }),
        ("an operation far out of range", |client, [a, b, c]| {
            client
                .send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, Tensor { op: u32::MAX, ..c }]));
        }),
        ("no unary operation", |client, [a, b, c]| {
            let c = Tensor { op: UNARY, param: 1000, src: [1, 0], ..c };
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, c]));
        }),
        ("no type", |client, [a, b, c]| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[Tensor { kind: 1000, ..a }, b, c]));
        }),
        ("a type whose blocks do not fit", |client, [a, b, c]| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[Tensor { kind: 8, ..a }, b, c]));
        }),
        ("a tensor beyond its buffer", |client, [a, b, c]| {
            let a = Tensor { data: a.data + 4096, ..a };
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, c]));
        }),
        ("a tensor without a buffer", |client, [a, b, c]| {
            let c = Tensor { buffer: 0, data: 0, ..c };
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, c]));
        }),
        ("an address without a buffer", |client, [a, b, c]| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3], &[a, b, Tensor { buffer: 0, ..c }]));
        }),
        ("a node twice", |client, tensors| {
            client.send(command::GRAPH_COMPUTE, &graph(&[3, 3], &tensors));
        }),
        ("no node", |client, tensors| {
            client.send(command::GRAPH_COMPUTE, &graph(&[0], &tensors));
        }),
        ("no nodes", |client, _| client.send(command::GRAPH_COMPUTE, &graph(&[], &[]))),
        ("a part beyond its tensor", |client, [_, _, c]| {
            assert_eq!(values(client, &c, 8, 16), None);
        }),
        ("a huge message", |client, _| {
            client.send_with_length(command::GRAPH_COMPUTE, u64::MAX, &[]);
        }),
        ("a custom operation whose size is asked", |client, [a, _, c]| {
            let mut body = 0u32.to_le_bytes().to_vec();
            body.extend(Tensor { op: CUSTOM, ..c }.bytes());
            (0..10).for_each(|_| body.extend(a.bytes()));
            assert_eq!(client.ask(command::GET_ALLOC_SIZE, &body), None);
        }),
    ];
    for (what, craft) in crafts {
        let mut client = Client::connect(worker.addr);
        let tensors = sum(&mut client, ADD);
        craft(&mut client, tensors);
        assert!(client.is_refused(), "{what}");
        assert!(worker.is_alive(), "{what}");
    }
    adds(&worker);
    assert_eq!(worker.signal("-INT").code(), Some(0));
}
