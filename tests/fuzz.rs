//! Bounded fuzzing of what strangers send and of how it is answered: bodies, schemas, the wire, and
//! the writer of events.
//!
//! `FUZZ=20 cargo test --release --test fuzz` runs twenty times as many cases. What was found
//! stands as a test beside.
#![allow(missing_docs)]

mod common;

use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Waker};

use common::{Server, any_json, exchange, model_path};
use hyper::body::Body;
use medusa_llama::chat::Template;
use medusa_llama::engine::Answer;
use medusa_llama::engine::grammar::Grammars;
use medusa_llama::http::api::Readers;
use medusa_llama::http::api::generate::Pieces;
use medusa_llama::http::api::openai::Choices;
use medusa_llama::http::chunks::{Chunks, Endpoint};
use medusa_llama::http::reply::{self, Dialect};
use medusa_llama::llama::{Model, Placement};
use medusa_llama::request::{
    Completion, Event, FinishReason, GrammarSource, Piece, Request, SpeculationUsage, Timings,
    Usage,
};
use proptest::prelude::*;
use proptest::test_runner::Config;
use serde_json::{Map, Value, json};

static MODEL: LazyLock<Arc<Model>> = LazyLock::new(|| {
    Arc::new(Model::load(&model_path(), &Placement::default(), |_| true).unwrap())
});

fn config(cases: u32) -> Config {
    let times = std::env::var("FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    Config { cases: cases * times, failure_persistence: None, ..Config::default() }
}

/// A value that a field may well have.
fn likely(name: &'static str) -> BoxedStrategy<Value> {
    let words =
        |words: &'static [&'static str]| prop::sample::select(words).prop_map(Value::from).boxed();
    match name {
        "prompt" => "\\PC{0,40}".prop_map(Value::from).boxed(),
        "messages" => {
            let role = prop::sample::select(&["system", "user", "assistant", "tool", "x"][..]);
            let message = (role, "\\PC{0,20}").prop_map(|(role, content)| json!({ "role": role, "content": content }));
            prop::collection::vec(message, 0..4).prop_map(Value::from).boxed()
        }
        "input" => prop_oneof![likely("prompt"), likely("messages")].boxed(),
        "system" | "instructions" => likely("prompt"),
        "stop" | "stop_sequences" => prop::collection::vec("[a-c]{0,3}", 0..4).prop_map(Value::from).boxed(),
        "logit_bias" => prop::collection::btree_map("[0-9]{1,5}", -100.0..100.0f64, 0..3).prop_map(|m| json!(m)).boxed(),
        "speculation" => words(&["auto", "heads", "text", "model", "off", "typical", "on"]),
        "grammar" => words(&["start: \"a\"", "start: /[a-z]+/", "start: (", ""]),
        "response_format" => any_json()
            .prop_flat_map(|schema| {
                prop_oneof![
                    Just(json!({ "type": "text" })),
                    Just(json!({ "type": "json_object" })),
                    Just(json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } })),
                ]
            })
            .boxed(),
        "stream_options" => any::<bool>().prop_map(|b| json!({ "include_usage": b })).boxed(),
        "stream" | "ignore_eos" | "cache_prompt" | "share_text" | "details" | "echo" => {
            any::<bool>().prop_map(Value::from).boxed()
        }
        "temperature" | "top_p" | "min_p" | "repetition_penalty" | "frequency_penalty" | "presence_penalty"
        | "timeout_s" => (-0.5..3.0f64).prop_map(Value::from).boxed(),
        _ => (0i64..24).prop_map(Value::from).boxed(),
    }
}

const FIELDS: [&str; 43] = [
    "prompt",
    "messages",
    "input",
    "system",
    "instructions",
    "thinking",
    "reasoning",
    "stop_sequences",
    "max_output_tokens",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "repeat_last_n",
    "logit_bias",
    "seed",
    "stop",
    "ignore_eos",
    "cache_prompt",
    "speculation",
    "share_text",
    "grammar",
    "response_format",
    "details",
    "logprobs",
    "top_logprobs",
    "timeout_s",
    "stream",
    "stream_options",
    "n",
    "tools",
    "tool_choice",
    "echo",
    "best_of",
    "suffix",
    "user",
    "zzz",
];

/// A body of known fields, most with values that they may have.
fn body() -> impl Strategy<Value = Value> {
    let field = prop::sample::select(&FIELDS[..]).prop_flat_map(|name| {
        let value = prop_oneof![6 => likely(name), 1 => any_json()];
        value.prop_map(move |value| (name.to_owned(), value))
    });
    let needed = prop_oneof![
        likely("prompt").prop_map(|v| ("prompt", v)),
        likely("messages").prop_map(|v| ("messages", v))
    ];
    (prop::option::weighted(0.9, needed), prop::collection::vec(field, 0..6)).prop_map(
        |(needed, fields)| {
            let needed = needed.into_iter().map(|(name, value)| (name.to_owned(), value));
            Value::Object(needed.chain(fields).collect::<Map<_, _>>())
        },
    )
}

const N_CTX: usize = 64;

/// Every field is in the range that its type says.
fn check(request: &Request) {
    let s = &request.sampling;
    assert!(request.max_tokens <= N_CTX && s.repeat_last_n <= N_CTX);
    assert!(
        s.temperature >= 0.0 && (0.0..=1.0).contains(&s.top_p) && (0.0..=1.0).contains(&s.min_p)
    );
    assert!(
        s.repetition_penalty > 0.0
            && s.frequency_penalty.is_finite()
            && s.presence_penalty.is_finite()
    );
    assert!(s.logit_bias.iter().all(|(token, bias)| token.0 >= 0 && bias.abs() <= 100.0));
    assert!(request.stop.len() <= 16 && request.stop.iter().all(|stop| !stop.is_empty()));
    assert!(request.report.is_none_or(|r| r.n_top.is_none_or(|n| n <= 20)));
}

proptest! {
    #![proptest_config(config(4000))]

    /// A body becomes checked requests or an error that says something; nothing panics.
    #[test]
    fn a_body_is_read_or_refused(body in prop_oneof![9 => body().boxed(), 1 => any_json().boxed()]) {
        static TEMPLATE: LazyLock<Result<Template, String>> = LazyLock::new(|| Template::of(&MODEL));
        static READERS: LazyLock<Readers> = LazyLock::new(|| Readers::new(N_CTX));
        match READERS.generate.read(body.clone()).and_then(|body| body.into_request(1, &TEMPLATE)) {
            Ok(request) => check(&request),
            Err(error) => prop_assert!(error.message.len() > 8 && error.message.len() < 2000, "{}", error),
        }
        let text = READERS.completion.read(body.clone()).and_then(|body| body.into_choices(N_CTX, 1));
        let chat = READERS.chat.read(body.clone()).and_then(|body| body.into_choices(N_CTX, 1, &TEMPLATE));
        let messages = READERS.messages.read(body.clone()).and_then(|body| body.into_choices(N_CTX, 1, &TEMPLATE));
        let responses = READERS.responses.read(body).and_then(|body| body.into_choices(N_CTX, 1, &TEMPLATE));
        for choices in [text, chat, messages, responses] {
            match choices {
                Ok(choices) => {
                    prop_assert!((1..=16).contains(&choices.requests.len()) && choices.requests.len() % choices.n == 0);
                    choices.requests.iter().for_each(check);
                }
                Err(error) => prop_assert!(error.message.len() > 8 && error.message.len() < 2000, "{}", error),
            }
        }
    }
}

/// A JSON schema, or nearly one.
fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!(true)),
        Just(json!(false)),
        Just(json!({})),
        (0i64..9, 0i64..99)
            .prop_map(|(min, max)| json!({ "type": "integer", "minimum": min, "maximum": max })),
        (0.0..9.0f64).prop_map(|min| json!({ "type": "number", "exclusiveMinimum": min })),
        (0usize..4, 0usize..9)
            .prop_map(|(min, max)| json!({ "type": "string", "minLength": min, "maxLength": max })),
        "[a-z.()\\[\\]*+?|^$0-9{},]{0,8}"
            .prop_map(|pattern| json!({ "type": "string", "pattern": pattern })),
        prop::sample::select(&["date", "email", "uuid", "ipv4", "none"][..])
            .prop_map(|f| json!({ "type": "string", "format": f })),
        prop::collection::vec(any_json(), 0..4).prop_map(|values| json!({ "enum": values })),
        any_json().prop_map(|value| json!({ "const": value })),
        Just(json!({ "$ref": "#" })),
        Just(json!({ "$ref": "#/$defs/x" })),
        any_json(),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let many = prop::collection::vec(inner.clone(), 1..4);
        prop_oneof![
            (inner.clone(), 0usize..3, 0usize..5)
                .prop_map(|(items, min, max)| json!({ "type": "array", "items": items, "minItems": min, "maxItems": max })),
            (prop::collection::btree_map("[a-c]{1,2}", inner.clone(), 0..3), any::<bool>()).prop_map(
                |(properties, more)| {
                    let required: Vec<String> = properties.keys().cloned().collect();
                    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": more })
                }
            ),
            many.clone().prop_map(|all| json!({ "anyOf": all })),
            many.clone().prop_map(|all| json!({ "oneOf": all })),
            many.prop_map(|all| json!({ "allOf": all })),
            inner.prop_map(|x| json!({ "$defs": { "x": x }, "$ref": "#/$defs/x" })),
        ]
    })
}

proptest! {
    #![proptest_config(config(400))]

    /// A schema becomes a grammar or an error that names the field.
    #[test]
    fn a_schema_is_compiled_or_refused(schema in schema()) {
        static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&MODEL, &[]).unwrap());
        if let Err(error) = GRAMMARS.compile(&GrammarSource::JsonSchema(schema)) {
            prop_assert_eq!(error.param.as_deref(), Some("response_format"));
            prop_assert!(error.message.len() < 2000, "{}", error);
        }
    }
}

/// What the engine may send for one choice: pieces, then an end.
fn events() -> impl Strategy<Value = Vec<Event>> {
    let text = prop_oneof![
        "\\PC{1,8}",
        ".{1,8}",
        "(data: |\n|\r|\n\n|\u{2028}|:|event: x|\\[DONE\\]){1,4}"
    ];
    let piece = text.clone().prop_map(|text| Event::Piece(Piece { text, tokens: vec![] }));
    let reason = prop_oneof![
        Just(FinishReason::EndOfText),
        Just(FinishReason::Length),
        Just(FinishReason::Deadline),
        text.clone().prop_map(FinishReason::Grammar),
        text.clone().prop_map(FinishReason::StopString),
    ];
    let done =
        (prop_oneof![Just(String::new()), text], reason).prop_map(|(text, finish_reason)| {
            Event::Done(Completion {
                tail: Piece { text, tokens: vec![] },
                finish_reason,
                usage: Usage {
                    prompt_tokens: 3,
                    cached_tokens: 1,
                    completion_tokens: 2,
                    ..Usage::default()
                },
                timings: Timings::default(),
                speculation: SpeculationUsage::default(),
                embedding: None,
                trace: None,
            })
        });
    let end = prop_oneof![9 => done, 1 => Just(Event::Failed { id: "err-1".into() })];
    (prop::collection::vec(piece, 0..6), end).prop_map(|(mut events, end)| {
        events.push(end);
        events
    })
}

/// The text that a client of a choice should have, and whether its answer failed.
fn expected(events: &[Event]) -> (String, bool) {
    let mut text = String::new();
    for event in events {
        match event {
            Event::Progress(_) => {}
            Event::Piece(piece) => text += &piece.text,
            Event::Done(done) => text += &done.tail.text,
            Event::Failed { .. } => return (text, true),
        }
    }
    (text, false)
}

/// Lets the choices' events arrive in the order that `turns` gives, with a poll after each, and
/// reads the stream as a client.
fn stream(
    choices: &[Vec<Event>],
    turns: &[prop::sample::Index],
    dialect: Box<dyn Dialect>,
) -> Vec<String> {
    let channel = |events: &Vec<Event>| {
        let (sender, receiver) = tokio::sync::mpsc::channel(events.len() + 1);
        (sender, Answer::from(receiver))
    };
    let (senders, answers): (Vec<_>, Vec<_>) = choices.iter().map(channel).unzip();
    let mut rest: Vec<_> = choices.iter().map(|events| events.iter().cloned().peekable()).collect();
    let mut body = reply::stream(answers, dialect, Arc::default(), None).into_body();
    let mut bytes = Vec::new();
    let mut turns = turns.iter().cycle();
    loop {
        let mut cx = Context::from_waker(Waker::noop());
        match Pin::new(&mut body).poll_frame(&mut cx) {
            std::task::Poll::Ready(Some(Ok(frame))) => {
                let data = frame.into_data().unwrap();
                assert!(!data.is_empty(), "an empty chunk would end the body");
                bytes.extend_from_slice(&data);
            }
            std::task::Poll::Ready(None) => break,
            std::task::Poll::Ready(Some(Err(error))) => panic!("{error}"),
            std::task::Poll::Pending => {
                let open: Vec<usize> =
                    (0..rest.len()).filter(|&i| rest[i].peek().is_some()).collect();
                assert!(!open.is_empty(), "all events are there, and the stream does not end");
                let i = open[turns.next().unwrap().index(open.len())];
                senders[i].try_send(rest[i].next().unwrap()).unwrap();
            }
        }
    }
    assert!(body.is_end_stream());
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.ends_with("\n\n"));
    text.split_terminator("\n\n").map(str::to_owned).collect()
}

proptest! {
    #![proptest_config(config(1500))]

    /// Whatever the texts hold and however events arrive, a client gets each choice's text whole,
    /// in order, and one end.
    #[test]
    fn openais_events_arrive_whole(
        choices in prop::collection::vec(events(), 1..4),
        turns in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
        is_chat in any::<bool>(),
        include_usage in any::<bool>(),
    ) {
        let endpoint = if is_chat { Endpoint::Chat } else { Endpoint::Text };
        let n = choices.len();
        let wanted = Choices { requests: vec![Request::new("x", 1); n], n, stream: true, include_usage, syntax: None };
        let chunks = Chunks::new(endpoint, "m".into(), &wanted, Arc::new(|_, _| Vec::new()));
        let mut sent = stream(&choices, &turns, Box::new(chunks));
        let fails = choices.iter().any(|c| expected(c).1);
        let is_done = sent.last().is_some_and(|e| e == "data: [DONE]");
        prop_assert_eq!(is_done, !fails);
        sent.truncate(sent.len() - usize::from(is_done));
        let mut texts = vec![String::new(); choices.len()];
        let mut ends = vec![0; choices.len()];
        let mut n_usages = 0;
        for event in &sent {
            let chunk: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
            let Some(choice) = chunk["choices"].get(0) else {
                n_usages += usize::from(chunk["usage"].is_object());
                continue;
            };
            let i = choice["index"].as_u64().unwrap() as usize;
            prop_assert_eq!(ends[i], 0, "nothing comes behind an end");
            let text = if is_chat { &choice["delta"]["content"] } else { &choice["text"] };
            texts[i] += text.as_str().unwrap_or("");
            ends[i] += usize::from(choice["finish_reason"].is_string());
        }
        for (events, (text, end)) in choices.iter().zip(texts.iter().zip(ends)) {
            let (whole, _) = expected(events);
            let is_right = if fails { whole.starts_with(text.as_str()) } else { whole == *text && end == 1 };
            prop_assert!(is_right, "{:?} of {:?}", text, whole);
        }
        prop_assert_eq!(n_usages, usize::from(include_usage && !fails));
    }

    #[test]
    fn our_own_events_arrive_whole(events in events(), turns in prop::collection::vec(any::<prop::sample::Index>(), 1..4)) {
        let sent = stream(std::slice::from_ref(&events), &turns, Box::new(Pieces(None)));
        let (whole, fails) = expected(&events);
        let mut text = String::new();
        for (i, event) in sent.iter().enumerate() {
            let is_error = event.starts_with("event: error\n");
            let data = event.strip_prefix("event: error\n").unwrap_or(event).strip_prefix("data: ").unwrap();
            let body: Value = serde_json::from_str(data).unwrap();
            prop_assert_eq!((body["finish_reason"].is_string(), is_error), (i + 1 == sent.len() && !fails, i + 1 == sent.len() && fails));
            text += body["generated_text"].as_str().unwrap_or("");
        }
        prop_assert_eq!(text, whole);
    }
}

/// Bodies at a real server: an answer or a refusal, never an error of the server's, and nothing is
/// left behind.
#[test]
fn bodies_on_the_wire_get_an_answer_or_a_refusal() {
    let server = Server::start(&["--ctx", "64", "--request-timeout", "5"]);
    let mut runner = proptest::test_runner::TestRunner::new(config(300));
    const PATHS: [&str; 5] =
        ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"];
    let paths = prop::sample::select(&PATHS[..]);
    let run = runner.run(&(paths, body()), |(path, body)| {
        let shown = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            shown.len()
        );
        let answer = exchange(server.addr, (head + &shown).as_bytes());
        prop_assert!(
            [200, 400, 408, 422].contains(&answer.status),
            "{}: {} for {}",
            path,
            answer.text(),
            shown
        );
        if answer.status != 200 {
            prop_assert!(answer.json()["error"]["message"].is_string());
        }
        Ok(())
    });
    run.unwrap_or_else(|error| panic!("{error}\n{}", server.log()));
    server.wait(|| server.is_idle());
    assert!(!server.log().contains("panicked"), "{}", server.log());
}
