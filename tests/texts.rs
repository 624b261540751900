//! Texts of the default model: a greedy text is llama.cpp's own, and a text is the same beside
//! others, with drafts, under a grammar and from a device.
#![allow(missing_docs)]

mod common;
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/heads.rs"]
mod files;

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use common::Server;
use common::context::{MODEL, context, feed, params, rows_are_independent};
use medusa_llama::config::DEFAULT_HEADS;
use medusa_llama::engine::forward::LlamaForward;
use medusa_llama::engine::grammar::Grammars;
use medusa_llama::engine::guide::Guide;
use medusa_llama::engine::sampler::{Sampler, Scratch, argmax};
use medusa_llama::engine::{Engine, Job, Layout, Limits};
use medusa_llama::gpu::weights::Precision;
use medusa_llama::llama::{CacheTypes, ContextParams, SeqId, Threads, Token, max_sequences};
use medusa_llama::request::{Event, GrammarSource, Request, SamplingParams, Speculation};
use medusa_llama::speculate::Speculator;
use medusa_llama::speculate::cost::Cost;
use medusa_llama::speculate::device::DeviceHeads;
use medusa_llama::speculate::heads::{Heads, Shape};
use medusa_llama::speculate::text::TextDrafts;
use serde_json::json;
use tokio::sync::mpsc;

/// A token of llama.cpp's own greedy text.
struct Choice {
    token: Token,
    runner_up: Token,
    /// By how much the runner-up's logit was lower.
    gap: f32,
}

/// llama.cpp's own greedy text, a row at a time.
fn greedy(prompt: &[Token], n: usize) -> Vec<Choice> {
    let mut context = context(&params());
    let mut chosen = vec![];
    for (chunk, tokens) in prompt.chunks(64).enumerate() {
        feed(&mut context, tokens, chunk * 64, 0);
    }
    let mut row = (prompt.len() - 1) % 64;
    for i in 0..n {
        let mut rest = context.logits(row).unwrap().to_vec();
        let token = argmax(&rest);
        let best = std::mem::replace(&mut rest[token.0 as usize], f32::MIN);
        let runner_up = argmax(&rest);
        chosen.push(Choice { token, runner_up, gap: best - rest[runner_up.0 as usize] });
        if MODEL.is_end(token) {
            break;
        }
        feed(&mut context, &[token], prompt.len() + i, 0);
        row = 0;
    }
    chosen
}

/// Computes a text in chunks, beside others that are as long, and shows the logits after each
/// token, by its position.
fn replay(
    tokens: &[Token],
    chunk: usize,
    others: &[&dyn Fn(usize) -> Token],
    see: impl FnMut(usize, &[f32]),
) {
    replay_in(CacheTypes::default(), tokens, chunk, others, see);
}

/// The same with a cache of these types.
fn replay_in(
    cache: CacheTypes,
    tokens: &[Token],
    chunk: usize,
    others: &[&dyn Fn(usize) -> Token],
    mut see: impl FnMut(usize, &[f32]),
) {
    let mut context = context(&ContextParams { n_cells: 2048, n_seq_max: 8, cache, ..params() });
    for from in (0..tokens.len()).step_by(chunk) {
        let positions = from..(from + chunk).min(tokens.len());
        let mut batch = context.batch();
        for pos in positions.clone() {
            batch.add(tokens[pos], pos, &[SeqId(0)], true).unwrap();
        }
        for (seq, token) in (1..).zip(others) {
            for pos in positions.clone() {
                batch.add(token(pos), pos, &[SeqId(seq)], true).unwrap();
            }
        }
        context.forward(&batch).unwrap();
        positions.enumerate().for_each(|(row, pos)| see(pos, context.logits(row).unwrap()));
    }
}

/// Some other text.
fn other(pos: usize) -> Token {
    Token((pos * 104_729 % 40_000 + 100) as i32)
}

/// Chunks, and how many others are computed beside them: at most 64 rows.
const BESIDE: [(usize, usize); 6] = [(2, 0), (5, 0), (16, 0), (64, 0), (1, 7), (4, 7)];

/// How far logits may differ where a row is computed beside others: not at all, or, where no kernel
/// promises that, by `elsewhere`.
fn check_moved(moved: f32, elsewhere: f32) {
    let most = if rows_are_independent() { 0.0 } else { elsewhere };
    assert!(moved <= most, "logits of rows computed beside others differ by {moved}, not {most}");
}

/// How far the gap of two logits moves when a row is computed beside others: the same text, in
/// chunks of several sizes, alone and with other texts.
fn rounding(prompt: &[Token], text: &[Choice]) -> f32 {
    let tokens: Vec<Token> =
        prompt.iter().copied().chain(text.iter().map(|choice| choice.token)).collect();
    let mut moved = 0f32;
    for (chunk, n_others) in BESIDE {
        replay(&tokens, chunk, &vec![&other as _; n_others], |pos, logits| {
            let Some(choice) = (pos + 1).checked_sub(prompt.len()).and_then(|i| text.get(i)) else {
                return;
            };
            let gap = logits[choice.token.0 as usize] - logits[choice.runner_up.0 as usize];
            moved = moved.max((gap - choice.gap).abs());
        });
    }
    moved
}

/// A row's logits may depend, by rounding, on the number of rows beside it where no kernel promises
/// better, but never on their tokens.
#[test]
fn nothing_that_others_say_reaches_a_row() {
    let text = MODEL
        .tokenize(
            "<|im_start|>user\nTell me a story about winter and a very old clock.<|im_end|>\n",
            true,
        )
        .unwrap();
    let beside = |chunk: usize, others: &[&dyn Fn(usize) -> Token]| {
        let mut rows = vec![];
        replay(&text, chunk, others, |_, logits| rows.extend_from_slice(logits));
        rows
    };
    let same = |_: usize| Token(5);
    for chunk in [1, 2, 5, 8] {
        let [a, b] = [&other as &dyn Fn(usize) -> Token, &same].map(|who| beside(chunk, &[who; 7]));
        assert!(a == b, "chunks of {chunk}");
    }
}

/// Drafts change no text with a quantized cache, either: each cell is rounded by itself, and what is
/// read of it does not depend on the rows that read it.
#[test]
fn rows_are_independent_in_a_cache_of_any_type() {
    let text =
        MODEL.tokenize("The old clock in the hall had stopped again, and nobody", true).unwrap();
    for name in ["q8_0", "q4_0", "iq4_nl", "bf16", "f32"] {
        let kind = CacheTypes::by_name(name).unwrap();
        for cache in [
            CacheTypes { keys: kind, values: kind },
            CacheTypes { keys: kind, ..CacheTypes::default() },
        ] {
            let rows = |chunk: usize, n_others: usize| {
                let (mut rows, others) = (vec![], vec![&other as _; n_others]);
                replay_in(cache, &text, chunk, &others, |_, logits| rows.extend_from_slice(logits));
                rows
            };
            let alone = rows(1, 0);
            for (chunk, n_others) in BESIDE {
                let beside = rows(chunk, n_others);
                let moved = alone.iter().zip(&beside).map(|(a, b)| (a - b).abs());
                check_moved(moved.fold(0.0, f32::max), 2.0);
            }
        }
    }
}

/// Alone and beside others, with chunked prompts and reused prefixes, in both layouts, and with
/// drafts. Where a text differs, the gap between the two best logits must have been within what
/// rounding moves it: nothing, where rows are independent.
#[test]
fn greedy_text_is_llama_cpps_own() {
    let prompts = [
        "The capital of Germany is",
        "def fibonacci(n):",
        "Once upon a time there was a",
        "1, 1, 2, 3, 5, 8,",
        "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nWhat is photosynthesis?<|im_end|>\n<|im_start|>assistant\n",
        "no no no no no no no no no no no no",
    ];
    let prompt_tokens = prompts.map(|prompt| MODEL.tokenize(prompt, true).unwrap());
    let texts = prompt_tokens.each_ref().map(|prompt| greedy(prompt, 48));
    let rounding = prompt_tokens
        .iter()
        .zip(&texts)
        .map(|(prompt, text)| rounding(prompt, text))
        .fold(0.0, f32::max);
    check_moved(rounding, 1.0);
    let heads = identity_heads(&texts);
    for layout in
        [&["--kv", "streams"], &["--kv", "unified"], &["--heads", heads.path().to_str().unwrap()]]
    {
        let server = Server::start(&[layout, &["--batch-size", "7", "--ctx", "512"][..]].concat());
        std::thread::scope(|scope| {
            for (prompt, text) in prompts.iter().zip(&texts) {
                let server = &server;
                scope.spawn(move || {
                    let body = json!({ "prompt": prompt, "raw": true, "max_tokens": 48, "temperature": 0 });
                    let ours = server.generate(&body).json()["generated_text"]
                        .as_str()
                        .unwrap()
                        .to_owned();
                    compare(&format!("{layout:?}, {prompt:?}"), &ours, text, 2.0 * rounding);
                });
            }
        });
        assert_eq!(server.get("/").json()["drafting_on"], "cpu");
        assert_eq!(server.get("/").json()["heads"], if layout[0] == "--heads" { 3 } else { 0 });
        let off = json!({ "prompt": prompts[6], "raw": true, "max_tokens": 8, "temperature": 0, "speculation": "off" });
        assert_eq!(server.generate(&off).json()["speculation"]["drafted"], 0);
    }
    // A server drafts where that pays; here rows are said to cost nothing, so trees of all sizes
    // are verified.
    let mut engine = drafting_engine(heads.path());
    let (answers, accepted) = run(&mut engine, &prompts, &GREEDY, 48);
    prompts
        .iter()
        .zip(&answers)
        .zip(&texts)
        .for_each(|((prompt, ours), text)| compare(prompt, ours, text, 2.0 * rounding));
    let (answers, alone) = run(&mut engine, &prompts[6..], &GREEDY, 48);
    compare("alone", &answers[0], &texts[6], 2.0 * rounding);
    assert!(accepted > 20 && alone > 5, "{accepted} and {alone} drafts were accepted");
    engine.check_nothing_left();
}

/// The heads that ship change the pace of fifty texts and no text.
#[test]
fn shipped_heads_change_no_text() {
    let topics = [
        "rain",
        "a fox",
        "prime numbers",
        "the moon",
        "bread",
        "trains",
        "a lighthouse",
        "ants",
        "Rome",
        "sleep",
    ];
    let asked = |topic: &&str| {
        [
            format!("<|im_start|>user\nTell me about {topic}.<|im_end|>\n<|im_start|>assistant\n"),
            format!(
                "<|im_start|>user\nWrite a short poem about {topic}.<|im_end|>\n<|im_start|>assistant\n"
            ),
            format!(
                "<|im_start|>user\nTranslate to French: I like {topic}.<|im_end|>\n<|im_start|>assistant\n"
            ),
            format!("# Everything about {topic}\n\n1."),
            format!("def count_{}(values):", topic.replace(' ', "_")),
        ]
    };
    let prompts: Vec<String> = topics.iter().flat_map(asked).collect();
    let tokens: Vec<_> =
        prompts.iter().map(|prompt| MODEL.tokenize(prompt, true).unwrap()).collect();
    let texts: Vec<_> = tokens.iter().map(|prompt| greedy(prompt, 32)).collect();
    let rounding = tokens.iter().zip(&texts).map(|(p, t)| rounding(p, t)).fold(0.0, f32::max);
    check_moved(rounding, 1.0);
    let mut engine = drafting_engine(Path::new(DEFAULT_HEADS));
    let mut accepted = 0;
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    for (prompts, texts) in prompts.chunks(8).zip(texts.chunks(8)) {
        let (answers, n) = run(&mut engine, prompts, &GREEDY, 32);
        accepted += n;
        prompts
            .iter()
            .zip(&answers)
            .zip(texts)
            .for_each(|((p, ours), text)| compare(p, ours, text, 2.0 * rounding));
    }
    let n_tokens: usize = texts.iter().map(Vec::len).sum();
    assert!(accepted > n_tokens / 4, "{accepted} drafts of {n_tokens} tokens were accepted");
    engine.check_nothing_left();
}

/// One seed gives one text, alone and among eight, with drafts and without, except where rounding
/// moves a draw.
#[test]
fn a_seed_gives_one_text_with_drafts_and_without() {
    let prompts: Vec<String> = [
        "a dragon",
        "my garden",
        "the sea",
        "winter",
        "an old clock",
        "two friends",
        "a map",
        "a bell",
    ]
    .map(|topic| {
        format!(
            "<|im_start|>user\nTell me a story about {topic}.<|im_end|>\n<|im_start|>assistant\n"
        )
    })
    .into();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let mut engine = drafting_engine(Path::new(DEFAULT_HEADS));
    let with = |speculation| Request {
        sampling: SamplingParams { temperature: 0.8, seed: 11, ..SamplingParams::default() },
        speculation,
        ..GREEDY.clone()
    };
    let (auto, off) = (with(Speculation::AUTO), with(Speculation::OFF));
    let tokens: Vec<_> =
        prompts.iter().map(|prompt| MODEL.tokenize(prompt, true).unwrap()).collect();
    let texts: Vec<_> = tokens.iter().map(|prompt| sampled(prompt, &auto.sampling, 32)).collect();
    let moved =
        tokens.iter().zip(&texts).map(|(prompt, text)| moved(prompt, text)).fold(0.0, f32::max);
    check_moved(moved, 3.0);
    let (plain, none) = run(&mut engine, &prompts, &off, 32);
    let (drafted, accepted) = run(&mut engine, &prompts, &auto, 32);
    assert!(none == 0 && accepted > 20, "{none} and {accepted} drafts were accepted");
    let mut n_same = [0; 4];
    for (i, prompt) in prompts.iter().enumerate() {
        let (alone, _) = run(&mut engine, &[prompt], &auto, 32);
        let (alone_plain, _) = run(&mut engine, &[prompt], &off, 32);
        for (n_same, ours) in
            n_same.iter_mut().zip([&plain[i], &drafted[i], &alone[0], &alone_plain[0]])
        {
            *n_same += usize::from(follow(prompt, ours, &texts[i], &auto.sampling, moved));
        }
    }
    // Where rounding moves draws some texts differ; with another seed all would.
    let enough = if rows_are_independent() {
        n_same == [prompts.len(); 4]
    } else {
        n_same.iter().all(|&n| n > 0) && n_same.iter().sum::<usize>() >= prompts.len()
    };
    assert!(enough, "only {n_same:?} of {} texts are the same throughout", prompts.len());
    engine.check_nothing_left();
}

/// A schema is followed to its end, by the same tokens with drafts and without; and drafts are
/// right under it, too.
#[test]
fn a_grammar_gives_one_text_with_drafts_and_without() {
    let prompts = ["a dragon", "my garden", "the sea"].map(|topic| {
        format!("<|im_start|>user\nDescribe {topic} as JSON.<|im_end|>\n<|im_start|>assistant\n")
    });
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "title": { "type": "string", "maxLength": 20 },
            "colours": { "type": "array", "items": { "enum": ["red", "green", "blue"] }, "minItems": 2, "maxItems": 3 },
            "size": { "type": "integer", "minimum": 1, "maximum": 99 },
        },
        "required": ["title", "colours", "size"],
        "additionalProperties": false,
    });
    let mut engine = drafting_engine(Path::new(DEFAULT_HEADS));
    let mut n_same = 0;
    for temperature in [0.0, 0.8, 1.5] {
        let with = |speculation| Request {
            sampling: SamplingParams { temperature, seed: 4, ..SamplingParams::default() },
            grammar: Some(GrammarSource::JsonSchema(schema.clone())),
            speculation,
            ..GREEDY.clone()
        };
        let (plain, none) = run(&mut engine, &prompts, &with(Speculation::OFF), 160);
        let (drafted, accepted) = run(&mut engine, &prompts, &with(Speculation::AUTO), 160);
        assert!(none == 0 && accepted > 20, "{none} and {accepted} drafts were accepted");
        for (plain, drafted) in plain.iter().zip(&drafted) {
            let parsed: serde_json::Value =
                serde_json::from_str(drafted).unwrap_or_else(|e| panic!("{e}: {drafted}"));
            assert!(
                parsed["colours"].as_array().unwrap().len() >= 2
                    && parsed["size"].as_u64().unwrap() < 100,
                "{drafted}"
            );
            n_same += usize::from(plain == drafted);
        }
    }
    let enough = if rows_are_independent() { 9 } else { 6 };
    assert!(n_same >= enough, "only {n_same} of 9 texts are the same");
    engine.check_nothing_left();
}

/// Heads and verification on a device, which an emulation of its kernels stands in for here, give
/// the host's texts; and requests with penalties or a grammar, whose tokens the host chooses, are
/// served too.
#[test]
fn what_a_device_verifies_and_drafts_changes_no_text() {
    let prompts = ["a dragon", "the sea"].map(|topic| {
        format!("<|im_start|>user\nTell me about {topic}.<|im_end|>\n<|im_start|>assistant\n")
    });
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let sampled = Request {
        sampling: SamplingParams { temperature: 0.8, seed: 5, ..SamplingParams::default() },
        ..GREEDY.clone()
    };
    let plain = |like: &Request| Request { speculation: Speculation::OFF, ..like.clone() };
    let penalties = Request {
        sampling: SamplingParams { repetition_penalty: 1.2, ..GREEDY.sampling.clone() },
        ..plain(&GREEDY)
    };

    let words = Some(GrammarSource::Lark("start: /[a-z ]{60}/".into()));
    let grammar = Request { grammar: words, ..plain(&GREEDY) };

    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_HEADS);
    let shape = Shape { n_embd: MODEL.n_embd(), n_vocab: MODEL.n_vocab() };
    let tokens: Vec<_> =
        prompts.iter().map(|prompt| MODEL.tokenize(prompt, true).unwrap()).collect();
    let texts: Vec<_> = tokens.iter().map(|prompt| greedy(prompt, 24)).collect();
    let rounding = tokens.iter().zip(&texts).map(|(p, t)| rounding(p, t)).fold(0.0, f32::max);
    let mut host = drafting_engine(&shipped);
    // Conditioned heads, with few draft tokens as the emulation is slow; and plain ones.
    let repeating = identity_heads(&texts);
    for folder in [shipped.as_path(), repeating.path()] {
        let mut heads = Heads::load(folder, shape, 3).unwrap();
        heads.token_map.as_mut().unwrap().truncate(1024);
        let device =
            DeviceHeads::new(emulated::Emulated::device(), heads, &MODEL, Precision::Q8).unwrap();
        let device = Rc::new(RefCell::new(device));
        let drafter = Box::new(Rc::clone(&device));
        let mut speculator = Speculator::new(Some(drafter), 4, Cost::from_points(&[(1, 1.0)]));
        speculator.fixed_nodes = Some(8);
        let mut engine = engine_of(|forward| forward.use_device(Rc::clone(&device)), speculator);
        // Without drafts the same rows are computed, so the same logits are chosen from.
        for like in [plain(&GREEDY), plain(&sampled), penalties.clone(), grammar.clone()] {
            assert_eq!(run(&mut engine, &prompts, &like, 12), run(&mut host, &prompts, &like, 12));
        }
        let before = device.borrow().n_verified;
        assert_eq!(before, 2 * 2 * 12, "all but the rows with penalties and those under a grammar");
        let (ruled, _) = run(
            &mut engine,
            &prompts,
            &Request { speculation: Speculation::AUTO, ..grammar.clone() },
            12,
        );
        let is_ruled = |text: &String| {
            text.len() > 12 && text.bytes().all(|b| b == b' ' || b.is_ascii_lowercase())
        };
        assert!(ruled.iter().all(is_ruled), "{ruled:?}");
        let before = device.borrow().n_verified;
        let (answers, accepted) = run(&mut engine, &prompts, &GREEDY, 24);
        prompts
            .iter()
            .zip(&answers)
            .zip(&texts)
            .for_each(|((p, ours), text)| compare(p, ours, text, 2.0 * rounding));
        assert!(accepted >= 4, "{accepted} drafts were accepted");
        assert!(device.borrow().n_verified > before + accepted as u64);
        engine.check_nothing_left();
    }
}

/// A token drawn, and the logits it was drawn from.
type Draw = (Token, Vec<f32>);

/// A text drawn a row at a time.
fn sampled(prompt: &[Token], params: &SamplingParams, n: usize) -> Vec<Draw> {
    let mut sampler = Sampler::new(params, &[], prompt, MODEL.n_vocab()).unwrap();
    let (mut context, mut scratch) = (context(&self::params()), Scratch::default());
    let mut drawn = vec![];
    for (chunk, tokens) in prompt.chunks(64).enumerate() {
        feed(&mut context, tokens, chunk * 64, 0);
    }
    let mut row = (prompt.len() - 1) % 64;
    for i in 0..n {
        let logits = context.logits(row).unwrap().to_vec();
        let token = sampler.draw(&logits, prompt.len() + i, &[], &mut scratch);
        drawn.push((token, logits));
        if MODEL.is_end(token) {
            break;
        }
        feed(&mut context, &[token], prompt.len() + i, 0);
        row = 0;
    }
    drawn
}

/// As [`rounding`], but of any logit.
fn moved(prompt: &[Token], text: &[Draw]) -> f32 {
    let tokens: Vec<Token> =
        prompt.iter().copied().chain(text.iter().map(|(token, _)| *token)).collect();
    let mut moved = 0f32;
    for (chunk, n_others) in BESIDE {
        replay(&tokens, chunk, &vec![&other as _; n_others], |pos, now| {
            let Some((_, before)) = (pos + 1).checked_sub(prompt.len()).and_then(|i| text.get(i))
            else {
                return;
            };
            moved = now.iter().zip(before).map(|(a, b)| (a - b).abs()).fold(moved, f32::max);
        });
    }
    moved
}

/// Returns whether `ours` is the text. Panics unless it is, or parts from it with a token that
/// would have been drawn had the logits been up to `moved` higher or lower.
fn follow(prompt: &str, ours: &str, text: &[Draw], params: &SamplingParams, moved: f32) -> bool {
    let mut sampler = Sampler::new(params, &[], &[], MODEL.n_vocab()).unwrap();
    let (mut bytes, mut scratch) = (vec![], Scratch::default());
    let first = MODEL.tokenize(prompt, true).unwrap().len();
    for (i, (token, logits)) in text.iter().enumerate() {
        let before = bytes.len();
        MODEL.piece(*token, false, &mut bytes);
        if ours.as_bytes().starts_with(&bytes) {
            continue;
        }
        let goes_on = |other: i32| {
            let mut with = bytes[..before].to_vec();
            MODEL.piece(Token(other), false, &mut with);
            with.len() > before && ours.as_bytes().starts_with(&with)
        };
        // A draw goes through the tokens in the order of their ids. It can come to a token if it
        // comes there or farther where those before are as unlikely as they can be, and there or
        // less far where that one and those before are as likely.
        let mut draw = |by: f32, is_before: &dyn Fn(i32) -> bool| {
            let tilted =
                |(id, v): (usize, &f32)| if is_before(id as i32) { v + by } else { v - by };
            sampler
                .draw(
                    &logits.iter().enumerate().map(tilted).collect::<Vec<_>>(),
                    first + i,
                    &[],
                    &mut scratch,
                )
                .0
        };
        let mut can_come =
            |to: i32| draw(-moved, &|id| id < to) >= to && draw(moved, &|id| id <= to) <= to;
        let possible = (0..MODEL.n_vocab() as i32).any(|other| goes_on(other) && can_come(other));
        assert!(possible, "{prompt}: parts at byte {before} by more than rounding: {ours:?}");
        return false;
    }
    assert_eq!(ours.len(), bytes.len(), "{prompt}: {ours:?}");
    true
}

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&MODEL, &[]).unwrap());

static GREEDY: LazyLock<Request> = LazyLock::new(|| Request {
    sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
    ..Request::new("", 0)
});

/// Heads that repeat the model's last choice, among the tokens of these texts: right now and then,
/// wrong most of the time.
fn identity_heads(texts: &[Vec<Choice>]) -> tempfile::TempDir {
    let mut known: Vec<i64> =
        texts.iter().flatten().map(|choice| i64::from(choice.token.0)).collect();
    known.sort_unstable();
    known.dedup();
    let mut tensors = files::identity(3, MODEL.n_embd());
    tensors.insert("token_map".into(), files::Tensor::i64(&known));
    let folder = tempfile::tempdir().unwrap();
    files::write(&folder.path().join("medusa_lm_head.safetensors"), &tensors);
    folder
}

/// An engine of 8 slots on the model, with these heads and text drafts.
fn drafting_engine(heads: &Path) -> Engine<LlamaForward> {
    let shape = Shape { n_embd: MODEL.n_embd(), n_vocab: MODEL.n_vocab() };
    let heads = Heads::load(heads, shape, 3).unwrap();
    let drafter = heads.drafter(&MODEL, &Threads::new(2).unwrap()).unwrap();
    let cost = Cost::from_points(&[(1, 1e9), (64, 1.01e9)]);
    let mut speculator = Speculator::new(Some(drafter), 9, cost);
    speculator.text = Some(TextDrafts::new(1, 1 << 12));
    engine_of(|_| {}, speculator)
}

fn engine_of(
    prepare: impl FnOnce(&mut LlamaForward),
    speculator: Speculator,
) -> Engine<LlamaForward> {
    let (n_seqs, n_ids) = (16, max_sequences());
    let params = ContextParams {
        n_cells: 2048,
        n_batch: 64,
        n_ubatch: 64,
        n_seq_max: n_ids,
        tap_hidden: true,
        ..params()
    };
    let layout = Layout::Unified { n_cells: 2048, n_retained: 512, n_seqs };
    let limits = Limits { n_slots: 8, n_ctx: 256, n_batch: 64, n_prefill: None, layout };
    let mut forward = LlamaForward::new(context(&params));
    prepare(&mut forward);
    let mut engine = Engine::new(forward, limits, Arc::default());
    engine.speculate(speculator, n_ids);
    engine
}

/// Lets the prompts be continued together by up to `max_tokens`, as `like` asks. Returns the texts,
/// and how many drafts were accepted.
fn run(
    engine: &mut Engine<LlamaForward>,
    prompts: &[&str],
    like: &Request,
    max_tokens: usize,
) -> (Vec<String>, usize) {
    let start = |prompt: &&str| {
        let (events, receiver) = mpsc::channel(max_tokens + 1);
        let request = Request { max_tokens, ..like.clone() };
        let prompt = MODEL.tokenize(prompt, true).unwrap();
        let guide = Guide::of(&request, &GRAMMARS).unwrap();
        engine.enqueue(Job { guide, ..Job::new(prompt, request, events) });
        receiver
    };
    let receivers: Vec<_> = prompts.iter().map(start).collect();
    while !engine.is_idle() {
        engine.step();
        engine.check_integrity();
    }
    let mut accepted = 0;
    let mut text_of = |mut receiver: mpsc::Receiver<Event>| {
        let mut text = String::new();
        while let Ok(event) = receiver.try_recv() {
            match event {
                Event::Progress(_) => {}
                Event::Piece(piece) => text += &piece.text,
                Event::Done(done) => {
                    text += &done.tail.text;
                    accepted += done.speculation.accepted;
                }
                Event::Failed { id } => panic!("{id}"),
            }
        }
        text
    };
    let texts = receivers.into_iter().map(&mut text_of).collect();
    (texts, accepted)
}

/// Panics unless `ours` is `text`, or parts from it where two tokens were as good as each other:
/// the last choice that both share in bytes, or an earlier one whose runner-up `ours` took, if that
/// token starts with the same bytes.
fn compare(what: &str, ours: &str, text: &[Choice], tolerance: f32) {
    let mut bytes = vec![];
    let mut parted_before = false;
    for choice in text {
        let before = bytes.len();
        MODEL.piece(choice.token, false, &mut bytes);
        let gap = choice.gap;
        if !ours.as_bytes().starts_with(&bytes) {
            assert!(
                gap < tolerance || parted_before,
                "{what}: parts at byte {before} where the gap was {gap} of {tolerance}: {ours:?}"
            );
            return;
        }
        let mut other = bytes[..before].to_vec();
        MODEL.piece(choice.runner_up, false, &mut other);
        parted_before |= gap < tolerance && ours.as_bytes().starts_with(&other);
    }
    assert!(parted_before || ours.len() == bytes.len(), "{what}: {ours:?}");
}
