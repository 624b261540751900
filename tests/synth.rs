//! Models and heads of random weights, of many architectures: they load, generate and draft, and one
//! seed gives one file.
//! And what a real model, if a tiny one, shows about sampling that a stub cannot: that llama.cpp's
//! trees leave the distribution alone.
#![allow(missing_docs)]

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use medusa_llama::engine::forward::LlamaForward;
use medusa_llama::engine::{Engine, Job, Layout, Limits};
use medusa_llama::llama::{
    self, Context, ContextParams, Model, Placement, Quantization, SeqId, Threads, Token,
};
use medusa_llama::request::{Completion, Event, Request, SamplingParams};
use medusa_llama::speculate::Speculator;
use medusa_llama::speculate::cost::Cost;
use medusa_llama::speculate::heads::{HeadNets, Heads, Shape as HeadsShape};
use medusa_llama::synth::{self, ModelShape, heads};
use medusa_llama::train::kind::HeadKind;
use tempfile::TempDir;
use tokio::sync::mpsc::{self, Receiver};

#[path = "common/heads.rs"]
mod files;

const N_SLOTS: usize = 8;
const N_IDS: usize = 128;
/// Control tokens and bytes of the vocabulary, before words.
const N_SPECIAL: usize = 259;

fn tiny() -> ModelShape {
    ModelShape::by_name("tiny").unwrap()
}

/// Writes a tiny model and returns its bytes.
fn write(folder: &TempDir, name: &str, quantization: &str, seed: u64) -> Vec<u8> {
    let path = folder.path().join(name);
    write_like(&tiny(), &path, quantization, seed);
    std::fs::read(path).unwrap()
}

fn write_like(shape: &ModelShape, path: &Path, quantization: &str, seed: u64) {
    let quantization = Quantization::by_name(quantization).unwrap();
    let (mut last, mut all) = (0, 0);
    synth::model(path, shape, quantization, seed, &mut |done, n| (last, all) = (done, n)).unwrap();
    assert!(last == all && all > 0, "{last} of {all}");
}

fn context(model: &Arc<Model>, n_seq_max: usize, tap_hidden: bool) -> Context {
    let one = ContextParams::of_one_sequence(1024, 256, 1);
    let params = ContextParams { n_seq_max, tap_hidden, ..one };
    Context::new(Arc::clone(model), &params).unwrap()
}

/// An engine on a model; with heads it verifies `n_nodes` of their candidates in every step.
fn engine(model: &Arc<Model>, folder: Option<(&Path, usize)>) -> Engine<LlamaForward> {
    let layout = Layout::Unified { n_cells: 1024, n_retained: 64, n_seqs: 2 * N_SLOTS };
    let limits = Limits { n_slots: N_SLOTS, n_ctx: 128, n_batch: 256, n_prefill: None, layout };
    let mut engine =
        Engine::new(LlamaForward::new(context(model, N_IDS, true)), limits, Arc::default());
    if let Some((folder, n_nodes)) = folder {
        let shape = HeadsShape { n_embd: model.n_embd(), n_vocab: model.n_vocab() };
        let threads = Threads::new(1).unwrap();
        let drafter = Heads::load(folder, shape, 16).unwrap().drafter(model, &threads).unwrap();
        let n_heads = drafter.n_heads();
        let cost = Cost::from_points(&[(1, 1.0), (64, 2.0)]);
        let mut speculator = Speculator::new(Some(drafter), n_heads + 1, cost);
        speculator.fixed_nodes = Some(n_nodes);
        engine.speculate(speculator, N_IDS);
    }
    engine
}

fn enqueue(
    engine: &mut Engine<LlamaForward>,
    prompt: &[Token],
    n: usize,
    sampling: SamplingParams,
) -> Receiver<Event> {
    let (events, receiver) = mpsc::channel(n + 1);
    let request = Request { sampling, ..Request::new("", n) };
    engine.enqueue(Job::new(prompt.to_vec(), request, events));
    receiver
}

fn run(engine: &mut Engine<LlamaForward>) {
    while !engine.is_idle() {
        engine.step();
    }
}

/// The text, and what came of the request.
fn read(mut receiver: Receiver<Event>) -> (String, Completion) {
    let mut text = String::new();
    loop {
        match receiver.try_recv() {
            Ok(Event::Piece(piece)) => text += &piece.text,
            Ok(Event::Done(done)) => return (text + &done.tail.text, done),
            other => panic!("not done: {other:?}"),
        }
    }
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, top_p: 1.0, ..SamplingParams::default() }
}

#[test]
fn a_seed_gives_one_file() {
    let folder = tempfile::tempdir().unwrap();
    for quantization in ["Q4_K_M", "Q8_0", "Q4_0", "F16", "BF16"] {
        let first = write(&folder, "a.gguf", quantization, 1);
        assert!(first.len() < 1_000_000, "{quantization}: {} bytes", first.len());
        assert!(first == write(&folder, "b.gguf", quantization, 1), "{quantization}");
        assert!(first != write(&folder, "c.gguf", quantization, 2), "{quantization}");
        let model = load(&folder.path().join("a.gguf"));
        assert!(
            model.quantization().starts_with(&quantization[..4.min(quantization.len())]),
            "{}",
            model.quantization()
        );
        assert_eq!((model.n_vocab(), model.n_embd(), model.n_ctx_train()), (512, 64, 2048));
        assert_eq!(model.meta("llama.block_count").as_deref(), Some("2"));
    }
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "no other files: {left:?}");
}

/// Each tensor is stored as llama.cpp's quantizer would have stored it, had it been given all
/// values.
#[test]
fn the_mixture_is_llama_cpps_own() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "f16.gguf", "F16", 1);
    for quantization in ["Q4_K_M", "Q4_0", "Q3_K_M", "IQ4_NL"] {
        write(&folder, "ours.gguf", quantization, 1);
        let [from, to, ours] =
            ["f16.gguf", "theirs.gguf", "ours.gguf"].map(|name| folder.path().join(name));
        llama::quantize(&from, &to, Quantization::by_name(quantization).unwrap(), 1).unwrap();
        let types =
            |path: &Path| llama::tensor_types(path).unwrap().into_iter().collect::<HashMap<_, _>>();
        assert_eq!(types(&ours), types(&to), "{quantization}");
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert_eq!(size(&ours), size(&to), "{quantization}");
    }
}

#[test]
fn a_tiny_model_reads_and_writes_text() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "tiny.gguf", "Q8_0", 1);
    let model = load(&folder.path().join("tiny.gguf"));
    for text in ["hello world", "Naïve café 😀, 1 + 1 = 2\n\ttabs", "a\0b"] {
        let tokens = model.tokenize(text, false).unwrap();
        assert_eq!(model.detokenize(&tokens).trim_start_matches("<s>").trim_start(), text);
    }
    let mut engine = engine(&model, None);
    let prompt = model.tokenize("tell me of rain", true).unwrap();
    let sampled = SamplingParams { temperature: 1.0, seed: 5, ..greedy() };
    let answers =
        [greedy(), greedy(), sampled].map(|sampling| enqueue(&mut engine, &prompt, 64, sampling));
    run(&mut engine);
    let [first, again, sampled] = answers.map(read);
    assert_eq!(first.0, again.0);
    assert_ne!(first.0, sampled.0);
    for (text, done) in [&first, &sampled] {
        assert_eq!(done.usage.completion_tokens, 64, "it does not end: {text:?}");
        let letters: HashSet<char> = text.chars().filter(char::is_ascii_lowercase).collect();
        assert!(letters.len() > 8, "{text:?}");
    }
    assert!(
        first.0.chars().all(|c| c == ' ' || c.is_ascii_lowercase()),
        "bytes are unlikely: {:?}",
        first.0
    );
    engine.check_nothing_left();
}

/// Neither one token for all nor all tokens alike: a sampler has something to choose.
#[test]
fn logits_are_finite_and_leave_a_choice() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "tiny.gguf", "F16", 1);
    let model = load(&folder.path().join("tiny.gguf"));
    let mut context = context(&model, 1, false);
    let tokens: Vec<Token> = (0..100).map(|i| Token(259 + (i * 37) % 253)).collect();
    let mut batch = context.batch();
    for (i, &token) in tokens.iter().enumerate() {
        batch.add(token, i, &[SeqId(0)], true).unwrap();
    }
    context.forward(&batch).unwrap();
    let mut favourites = HashSet::new();
    let mut entropy = 0.0;
    for row in 0..tokens.len() {
        let p = distribution(context.logits(row).unwrap(), 1.0);
        entropy += p.iter().filter(|(_, p)| *p > 0.0).map(|(_, p)| -p * p.ln()).sum::<f64>()
            / tokens.len() as f64;
        favourites.insert(p.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0);
    }
    assert!((0.5..5.0).contains(&entropy), "{entropy} nats");
    assert!(favourites.len() > 40, "what follows depends on what was: {}", favourites.len());
}

/// Small models, at least one of each architecture.
fn tiny_names() -> impl Iterator<Item = &'static str> {
    ModelShape::names().filter(|name| name.starts_with("tiny") && !name.ends_with("262k"))
}

fn load(path: &Path) -> Arc<Model> {
    Arc::new(Model::load(path, &Placement::default(), |_| true).unwrap())
}

/// Computes the tokens in passes of `n_batch` rows, and returns the logits after each.
fn logits_of(context: &mut Context, tokens: &[Token], n_batch: usize) -> Vec<Vec<f32>> {
    let mut logits = vec![];
    let first = context.cached_len(SeqId(0)).unwrap();
    for (i, tokens) in tokens.chunks(n_batch).enumerate() {
        let mut batch = context.batch();
        for (j, &token) in tokens.iter().enumerate() {
            batch.add(token, first + i * n_batch + j, &[SeqId(0)], true).unwrap();
        }
        context.forward(&batch).unwrap();
        logits.extend((0..tokens.len()).map(|row| context.logits(row).unwrap().to_vec()));
    }
    logits
}

/// Of the second vector from the first, as a share of the first one's length.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied())
}

#[test]
fn models_of_all_architectures_are_small_and_one_seed_gives_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let [first, again] = ["a.gguf", "b.gguf"].map(|name| folder.path().join(name));
    for name in tiny_names() {
        let shape = ModelShape::by_name(name).unwrap();
        for quantization in ["Q4_K_M", "Q8_0", "F16"] {
            write_like(&shape, &first, quantization, 1);
            let bytes = std::fs::read(&first).unwrap();
            assert!(bytes.len() < 3_000_000, "{name}: {} bytes", bytes.len());
            write_like(&shape, &again, quantization, 1);
            assert!(bytes == std::fs::read(&again).unwrap(), "{name} in {quantization}");
            load(&first);
        }
    }
}

#[test]
fn models_of_all_architectures_write_text_that_depends_on_all_before() {
    const N: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for name in tiny_names() {
        write_like(&ModelShape::by_name(name).unwrap(), &path, "F16", 1);
        let model = load(&path);
        let text = "Naïve café 😀, 1 + 1 = 2\n\ttabs";
        let tokens = model.tokenize(text, false).unwrap();
        let back = model.detokenize(&tokens);
        assert_eq!(back.trim_start_matches("<s>").trim_start(), text, "{name}");

        let mut tokens = model.tokenize("tell me of rain", true).unwrap();
        let n_prompt = tokens.len();
        let mut plain = context(&model, 1, false);
        let mut logits = logits_of(&mut plain, &tokens, 1);
        for _ in 0..N {
            let last = distribution(logits.last().unwrap(), 1.0); // finite
            tokens.push(last.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0);
            logits.extend(logits_of(&mut plain, &tokens[tokens.len() - 1..], 1));
        }
        let of_words: Vec<f32> = logits.iter().flat_map(|l| &l[N_SPECIAL..]).copied().collect();
        let deviation =
            (of_words.iter().map(|l| l * l).sum::<f32>() / of_words.len() as f32).sqrt();
        assert!((2.5..3.5).contains(&deviation), "{name}: a deviation of {deviation}");
        let mut counts: HashMap<Token, usize> = HashMap::new();
        tokens[n_prompt..].iter().for_each(|t| *counts.entry(*t).or_default() += 1);
        assert!(counts.keys().all(|t| t.0 as usize >= N_SPECIAL), "{name}: {counts:?}");
        assert!(counts.len() > 20 && *counts.values().max().unwrap() < N / 2, "{name}: {counts:?}");

        // Two experts may be so close that rounding decides which one computes a row.
        let arch = model.meta("general.architecture").unwrap();
        let has_experts = model.meta(&format!("{arch}.expert_count")).is_some();
        let allowed = if has_experts { tokens.len() / 10 } else { 0 };
        let together = logits_of(&mut context(&model, 1, false), &tokens, tokens.len());
        let apart: Vec<f32> = logits.iter().zip(&together).map(|(a, b)| distance(a, b)).collect();
        let n_far = apart.iter().filter(|d| **d > 1e-2).count();
        assert!(n_far <= allowed, "{name}: {n_far} rows differ from those of single passes");
        let most = apart.into_iter().fold(0.0, f32::max);
        println!("{name}: {} different tokens, {n_far} far, {most} apart", counts.len());
    }
}

#[test]
fn a_longer_context_is_declared_with_its_scaling() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    write_like(&ModelShape::by_name("smollm2-135m-32k").unwrap(), &path, "Q4_0", 1);
    let model = load(&path);
    assert_eq!((model.n_ctx_train(), model.n_embd()), (32_768, 576));
    for (key, value) in [("type", "yarn"), ("original_context_length", "8192")] {
        let key = format!("llama.rope.scaling.{key}");
        assert_eq!(model.meta(&key).as_deref(), Some(value), "{key}");
    }
}

#[test]
fn a_large_vocabulary_has_a_small_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    write_like(&ModelShape::by_name("tiny-gemma3-262k").unwrap(), &path, "Q4_0", 1);
    let model = load(&path);
    assert_eq!((model.n_vocab(), model.n_embd()), (262_144, 64));
    let tokens = model.tokenize("tell me of rain", false).unwrap();
    assert_eq!(model.detokenize(&tokens).trim_start_matches("<s>").trim_start(), "tell me of rain");
}

#[test]
fn heads_of_both_kinds_load_and_draft() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "tiny.gguf", "Q8_0", 1);
    let model = load(&folder.path().join("tiny.gguf"));
    let prompt = model.tokenize("tell me of rain", true).unwrap();
    let plain = {
        let mut engine = engine(&model, None);
        let answer = enqueue(&mut engine, &prompt, 40, greedy());
        run(&mut engine);
        read(answer).0
    };
    for kind in [HeadKind::Medusa, HeadKind::Conditioned] {
        let to = folder.path().join(format!("{kind:?}"));
        let spec = heads::Spec { shape: &tiny(), kind, n_heads: 3, seed: 1 };
        let n_bytes = heads::write(&to, spec).unwrap();
        let path = kind.file(&to);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, n_bytes);
        heads::write(&to, spec).unwrap();
        assert!(bytes == std::fs::read(&path).unwrap(), "one seed, one file");

        let loaded = Heads::load(&to, HeadsShape { n_embd: 64, n_vocab: 512 }, 16).unwrap();
        match loaded.nets {
            HeadNets::Plain(w) => {
                assert_eq!((kind, w.blocks.len(), w.outputs.len()), (HeadKind::Medusa, 3, 3))
            }
            HeadNets::Conditioned(w) => {
                assert_eq!((kind, w.steps.len()), (HeadKind::Conditioned, 3))
            }
        }
        let mut engine = engine(&model, Some((&to, 6)));
        let answer = enqueue(&mut engine, &prompt, 40, greedy());
        run(&mut engine);
        let (text, done) = read(answer);
        assert!(done.speculation.drafted > 5 * 30, "{kind:?}: {:?}", done.speculation);
        assert_eq!(text, plain, "{kind:?}");
        engine.check_nothing_left();
    }
}

#[test]
fn the_command_writes_what_is_asked_for_and_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let (model, heads) = (folder.path().join("m.gguf"), folder.path().join("heads"));
    let run = |like: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
        command
            .args(["synth", "--like", like, "-o"])
            .arg(&model)
            .arg("--heads")
            .arg(&heads)
            .args(more);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let (ok, text) = run("gpt-9", &[]);
    assert!(
        !ok && text
            .contains("vicuna-7b, llama-3-8b, smollm2-135m, smollm2-135m-32k, tiny, tiny-qwen2"),
        "{text}"
    );
    let (ok, text) = run("tiny", &["--quantization", "Q9"]);
    assert!(!ok && text.contains("Q4_K_M"), "{text}");
    let (ok, text) = run("tiny", &["--kind", "hydra"]);
    assert!(!ok && text.contains("conditioned"), "{text}");
    let (ok, text) = run("tiny", &[]);
    assert!(ok && text.contains("like tiny, Q4_K_M") && text.contains("4 heads"), "{text}");
    assert!(model.is_file() && heads.join("medusa_lm_head.safetensors").is_file());
    let (ok, text) = run("tiny", &["--kind", "conditioned"]);
    assert!(!ok && text.contains("--force"), "{text}");
    let (ok, text) = run("tiny", &["--kind", "conditioned", "--force"]);
    assert!(ok, "{text}");
    assert!(
        !heads.join("medusa_lm_head.safetensors").exists(),
        "old heads would be taken for the new ones"
    );
}

#[test]
fn a_bench_says_what_it_compared() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "tiny.gguf", "Q8_0", 1);
    let at = |name: &str| folder.path().join(name);
    heads::write(
        &at("heads"),
        heads::Spec { shape: &tiny(), kind: HeadKind::Medusa, n_heads: 2, seed: 1 },
    )
    .unwrap();
    std::fs::write(at("prompts.jsonl"), "{\"prompt\": \"rain\"}\n{\"prompt\": \"the sea\"}\n")
        .unwrap();
    let bench = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
        command.arg("bench").arg("-m").arg(at("tiny.gguf"));
        if !more.contains(&"--heads") {
            command.arg("--heads").arg(at("heads"));
        }
        command
            .arg("--prompts")
            .arg(at("prompts.jsonl"))
            .arg("--json")
            .arg(at("b.json"))
            .arg("--svg")
            .arg(at("b.svg"));
        command
            .args([
                "-c",
                "512",
                "-t",
                "1",
                "-n",
                "200",
                "--parallel",
                "1,2",
                "--rounds",
                "1",
                "--tree-nodes",
                "4",
            ])
            .args(more);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let (ok, text) = bench(&["--acceptance", "0.9,0.9,0.9"]);
    assert!(!ok && text.contains("3 heads") && text.contains("there are 2"), "{text}");

    let (ok, text) = bench(&["--acceptance", "1,0"]);
    assert!(ok && text.contains("simulated") && text.contains("candidates/step"), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(at("b.json")).unwrap()).unwrap();
    assert_eq!(
        (&json["simulated"], &json["acceptance"]),
        (&true.into(), &serde_json::json!([1.0, 0.0]))
    );
    assert!(std::fs::read_to_string(at("b.svg")).unwrap().contains("simulated acceptance"));
    for parallel in ["1", "2"] {
        let of = |mode: &str| {
            let figures = &json["by_parallel"][parallel][mode];
            figures["tokens"].as_f64().unwrap() / figures["steps"].as_f64().unwrap()
        };
        assert_eq!(of("off"), 1.0);
        // The first head is always right, the second one never; the first step has none.
        assert!((of("auto") - 2.0).abs() < 0.05, "{}", of("auto"));
    }

    let (ok, text) = bench(&["--modes", "off,heads,text,auto"]);
    assert!(ok && !text.contains("simulated") && text.contains("auto / heads"), "{text}");
    assert!(text.contains("expected calibration error"), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(at("b.json")).unwrap()).unwrap();
    assert_eq!((&json["simulated"], &json["text_drafts"]), (&false.into(), &true.into()));
    assert_eq!(json["modes"], serde_json::json!(["off", "heads", "text", "auto"]));
    let (drafted, of) = (
        |mode: &str| json["by_parallel"]["1"][mode]["drafted"].as_u64().unwrap(),
        &json["calibration"],
    );
    assert!(drafted("off") == 0 && drafted("heads") > 0 && drafted("text") > 0, "{text}");
    assert!(
        of.as_array().unwrap().iter().any(|c| c["sources"] == serde_json::json!(["text"])),
        "{of}"
    );

    let (ok, text) = bench(&["--heads", "none", "--modes", "off,heads"]);
    assert!(!ok && text.contains("--modes names heads"), "{text}");
}

/// Tokens and their probabilities at a temperature.
fn distribution(logits: &[f32], temperature: f64) -> Vec<(Token, f64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!(logits.iter().all(|l| l.is_finite()));
    let weight = |l: &f32| (f64::from(l - max) / temperature).exp();
    let sum: f64 = logits.iter().map(weight).sum();
    (0..).map(Token).zip(logits.iter().map(|l| weight(l) / sum)).collect()
}

/// Tokens that may come at each place of a continuation, and how many such places there are.
const TOP_K: usize = 3;
const N_TOKENS: usize = 4;

/// All continuations of a prompt of [`N_TOKENS`] tokens by the [`TOP_K`] most likely tokens each, with their
/// probabilities by llama.cpp's logits, computed a row at a time.
fn continuations(
    model: &Arc<Model>,
    prompt: &[Token],
    temperature: f64,
) -> HashMap<Vec<Token>, f64> {
    let mut context = context(model, 1, false);
    let mut open = vec![(vec![], 1.0)];
    for _ in 0..N_TOKENS {
        let mut longer = vec![];
        for (continuation, p) in open {
            context.clear();
            let seen: Vec<Token> = prompt.iter().chain(&continuation).copied().collect();
            let mut row = 0;
            for (i, &token) in seen.iter().enumerate() {
                let mut batch = context.batch();
                row = batch.add(token, i, &[SeqId(0)], true).unwrap();
                context.forward(&batch).unwrap();
            }
            let mut next = distribution(context.logits(row).unwrap(), temperature);
            next.sort_by(|a, b| b.1.total_cmp(&a.1));
            next.truncate(TOP_K);
            let kept: f64 = next.iter().map(|(_, p)| p).sum();
            longer.extend(
                next.into_iter()
                    .map(|(token, q)| ([&continuation[..], &[token]].concat(), p * q / kept)),
            );
        }
        open = longer;
    }
    open.into_iter().collect()
}

/// Pearson's statistic of counts against expected ones.
fn chi2(counts: &[f64], expected: &[f64]) -> f64 {
    counts.iter().zip(expected).map(|(n, e)| (n - e).powi(2) / e).sum()
}

/// 20,000 sampled continuations of one prompt by a real model, with heads that draft and without,
/// are distributed as the model's own logits say, and as each other.
#[test]
fn sampled_text_has_the_models_own_distribution() {
    const N: usize = 20_000;
    let folder = tempfile::tempdir().unwrap();
    write(&folder, "tiny.gguf", "F16", 3);
    let model = load(&folder.path().join("tiny.gguf"));
    let prompt = model.tokenize("once upon a time", true).unwrap();
    let sampling = SamplingParams { temperature: 2.0, top_k: TOP_K, ..greedy() };
    let expected = continuations(&model, &prompt, 2.0);
    assert!((expected.values().sum::<f64>() - 1.0).abs() < 1e-9);

    // The model's own prediction from the state before, among the tokens that may come: right now
    // and then.
    let heads = folder.path().join("heads");
    std::fs::create_dir(&heads).unwrap();
    let mut known: Vec<i64> = expected.keys().flatten().map(|t| i64::from(t.0)).collect();
    known.sort_unstable();
    known.dedup();
    let mut tensors = files::identity(3, model.n_embd());
    tensors.insert("token_map".into(), files::Tensor::i64(&known));
    files::write(&heads.join("medusa_lm_head.safetensors"), &tensors);

    // Outcomes with an expectation below ten are counted together.
    let mut outcomes: Vec<(String, f64)> = vec![];
    let mut rare = 0.0;
    for (continuation, p) in &expected {
        let n = p * N as f64;
        if n < 10.0 { rare += n } else { outcomes.push((model.detokenize(continuation), n)) }
    }
    outcomes.sort_by(|a, b| a.0.cmp(&b.0));
    let mut texts: Vec<&String> = outcomes.iter().map(|(text, _)| text).collect();
    texts.dedup();
    assert_eq!(texts.len(), outcomes.len(), "every outcome has its own text");
    let wanted: Vec<f64> =
        outcomes.iter().map(|(_, n)| *n).chain((rare > 0.0).then_some(rare)).collect();

    let counted = [None, Some((heads.as_path(), 12))].map(|folder| {
        let mut engine = engine(&model, folder);
        let mut counts = vec![0.0; wanted.len()];
        let mut accepted = 0;
        for first in (0..N).step_by(N_SLOTS) {
            let seed = |i| (first + i) as u64 + if folder.is_some() { 1 << 32 } else { 0 };
            let start = |i| {
                enqueue(
                    &mut engine,
                    &prompt,
                    N_TOKENS,
                    SamplingParams { seed: seed(i), ..sampling.clone() },
                )
            };
            let answers: Vec<_> = (0..N_SLOTS).map(start).collect();
            run(&mut engine);
            for (text, done) in answers.into_iter().map(read) {
                let at = outcomes
                    .binary_search_by(|(outcome, _)| outcome.cmp(&text))
                    .unwrap_or(outcomes.len());
                assert!(at < counts.len(), "{text:?} cannot come");
                counts[at] += 1.0;
                accepted += done.speculation.accepted;
            }
        }
        engine.check_nothing_left();
        assert_eq!(accepted > N / 10, folder.is_some(), "{accepted} drafts were accepted");
        counts
    });
    let limit = chi2_limit(wanted.len() - 1);
    println!("{} outcomes, limit {limit:.1}", wanted.len());
    for counts in &counted {
        println!("chi-square {:.1}", chi2(counts, &wanted));
        assert!(chi2(counts, &wanted) < limit, "{}", chi2(counts, &wanted));
    }
    // Two samples of equal size: each is expected to be the mean of both, and both differ from it
    // alike.
    let means: Vec<f64> =
        counted[0].iter().zip(&counted[1]).map(|(a, b)| f64::midpoint(*a, *b)).collect();
    let between = 2.0 * chi2(&counted[0], &means);
    println!("chi-square of one against the other {between:.1}");
    assert!(between < limit, "{between}");
}

/// What Pearson's statistic exceeds with a probability of 0.001, by Wilson and Hilferty's
/// approximation.
fn chi2_limit(degrees: usize) -> f64 {
    let k = degrees as f64;
    let v = 2.0 / (9.0 * k);
    k * (1.0 - v + 3.0902 * v.sqrt()).powi(3)
}
