//! Where weights go, how positions are rotated, and adapters: on tiny models with random weights.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};

use common::gguf::{ARRAY, File, U32, random};
use common::run;
use medusa_llama::engine::EngineParams;
use medusa_llama::engine::plan::Sizes;
use medusa_llama::engine::spawn;
use medusa_llama::llama::{
    ALIGNMENT, AdapterFile, Buffer, Context, ContextParams, LoadMode, Meta, Model, Override,
    Pattern, Placement, Quantization, Rope, RopeScaling, SeqId, TensorInfo, TensorType, Token,
    write_header,
};
use medusa_llama::request::{Caller, Report, Request, SamplingParams, Speculation};
use medusa_llama::synth::{self, ModelShape};

/// A type of metadata.
const F32: u32 = 6;
/// A type of tensors.
const I32: u32 = 26;

/// A model's file, with random weights.
fn write(folder: &Path, name: &str, quantization: &str) -> PathBuf {
    let path = folder.join(format!("{name}-{quantization}.gguf"));
    let shape = ModelShape::by_name(name).unwrap();
    let quantization = Quantization::by_name(quantization).unwrap();
    synth::model(&path, &shape, quantization, 1, &mut |_, _| ()).unwrap();
    path
}

fn load(path: &Path, placement: &Placement) -> Model {
    Model::load(path, placement, |_| true).unwrap()
}

/// The logits of all tokens of a text.
fn logits(model: Model, rope: Rope) -> Vec<f32> {
    let params = ContextParams { rope, ..ContextParams::of_one_sequence(256, 64, 1) };
    let mut context = Context::new(model.into(), &params).unwrap();
    let mut batch = context.batch();
    for pos in 0..64 {
        batch.add(Token(259 + 3 * pos as i32), pos, &[SeqId(0)], true).unwrap();
    }
    context.forward(&batch).unwrap();
    (0..64).flat_map(|row| context.logits(row).unwrap().to_vec()).collect()
}

/// The largest difference of two logits.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_model_is_the_same_mapped_copied_and_locked() {
    let folder = tempfile::tempdir().unwrap();
    for quantization in ["F16", "Q4_0", "Q4_1"] {
        let path = write(folder.path(), "tiny", quantization);
        let of = |load_mode, lock| {
            let placement = Placement { load: load_mode, lock, ..Placement::default() };
            logits(load(&path, &placement), Rope::default())
        };
        let expected = of(LoadMode::Auto, false);
        for (load_mode, lock) in [
            (LoadMode::Mapped, false),
            (LoadMode::Copied, false),
            (LoadMode::Mapped, true),
            (LoadMode::Copied, true),
        ] {
            assert!(of(load_mode, lock) == expected, "{quantization} {load_mode:?} {lock}");
        }
    }
}

#[test]
fn tensors_that_are_put_on_the_host_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "tiny-qwen3moe", "Q4_0");
    let expected = logits(load(&path, &Placement::layers(99)), Rope::default());
    let on_host = |pattern| Override { pattern, buffer: Buffer::host() };
    for pattern in
        [Pattern::of_experts(None), Pattern::of_experts(Some(1)), Pattern::new(".*").unwrap()]
    {
        let overrides = vec![on_host(pattern)];
        let placement = Placement { overrides, ..Placement::layers(99) };
        Model::outline(&path, &placement).unwrap();
        assert!(logits(load(&path, &placement), Rope::default()) == expected, "{placement:?}");
    }
}

/// Runs `generate` and expects one line as its error, and this status.
fn refused(args: &[&str], status: i32) -> String {
    let all = [&["generate", "-p", "ab cd", "-n", "1", "-t", "1", "--ctx", "64"][..], args];
    let output = run(&all.concat(), &[("LOG_LEVEL", "ERROR")]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
    let is_error = |line: &&str| line.starts_with("error") || line.contains("ERROR");
    let lines: Vec<&str> = text.lines().filter(is_error).collect();
    assert_eq!(lines.len(), 1, "one line says why: {text}");
    lines[0].to_owned()
}

#[test]
fn bad_values_end_the_start_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "tiny", "F16");
    let model = ["-m", path.to_str().unwrap()];
    for (args, status, why) in [
        (["-ot", "ffn_(up=CPU"], 2, "the pattern ffn_(up is invalid"),
        (["-ot", "ffn_up=CUDA99"], 2, "there is no buffer CUDA99; there is CPU"),
        (["--mmap", "--no-mmap"], 1, "MMAP and NO_MMAP"),
    ] {
        let line = refused(&[&model[..], &args].concat(), status);
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn options_of_the_machine_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "tiny", "Q4_0");
    let args = ["generate", "-p", "ab", "-n", "1", "-t", "1", "--ctx", "64", "-m"];
    let more = "--numa distribute --mlock --no-mmap -ngl auto -sm row -mg 0 -ts 1 -cmoe -ncmoe 2";
    let more = more.split(' ').chain(["-ot", "ffn=CPU", "--rope-scale", "2"]);
    let all: Vec<&str> = args.into_iter().chain([path.to_str().unwrap()]).chain(more).collect();
    let output = run(&all, &[]);
    assert!(output.status.success(), "{output:?}");
}

/// Sets a float.
fn with_float(mut file: File, key: &str, value: f32) -> File {
    file.set(key, F32, value.to_le_bytes().to_vec());
    file
}

#[test]
fn a_rotation_that_is_named_is_the_one_of_a_file_that_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let plain = random(folder.path(), "tiny");
    let of = |file: &File, rope| {
        let path = folder.path().join("x.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        logits(load(&path, &Placement::default()), rope)
    };
    let own = of(&plain, Rope::default());
    let scaling = |kind: &str, factor| {
        with_float(plain.clone(), "llama.rope.scaling.factor", factor)
            .with_text("llama.rope.scaling.type", kind)
    };
    let by = |scaling, freq_scale| Rope {
        scaling: Some(scaling),
        freq_scale: Some(freq_scale),
        ..Rope::default()
    };
    let orig = "llama.rope.scaling.original_context_length";
    let yarn = Rope { yarn_orig_ctx: Some(32), ..by(RopeScaling::Yarn, 0.25) };
    for (file, rope) in [
        (scaling("linear", 2.0), by(RopeScaling::Linear, 0.5)),
        (scaling("yarn", 4.0).with_number(orig, 32), yarn),
        (
            with_float(plain.clone(), "llama.rope.freq_base", 500.0),
            Rope { freq_base: Some(500.0), ..Rope::default() },
        ),
    ] {
        let named = of(&plain, rope);
        assert!(named == of(&file, Rope::default()), "{rope:?}");
        let moved = distance(&named, &own);
        assert!(moved > 0.05, "{rope:?}: {moved}");
        let none = Rope { scaling: Some(RopeScaling::None), ..Rope::default() };
        if rope.freq_base.is_none() && rope.scaling == Some(RopeScaling::Linear) {
            assert!(of(&file, none) == own, "switched off: {rope:?}");
        }
    }
    let slow = Rope { yarn_beta_fast: Some(4.0), yarn_ext_factor: Some(0.5), ..yarn };
    assert!(distance(&of(&plain, slow), &of(&plain, yarn)) > 0.0);
}

#[test]
fn a_scale_extends_the_context_that_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "tiny", "F16");
    for scaling in [RopeScaling::Linear, RopeScaling::Yarn] {
        let params = EngineParams::new(path.clone(), 1, 1, 64);
        let rope = Rope { scaling: Some(scaling), freq_scale: Some(0.5), ..Rope::default() };
        let sizes = Sizes { n_ctx: None, ..params.sizes };
        let engine = spawn(EngineParams { rope, sizes, ..params });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.block_on(engine.ready()).unwrap();
        assert_eq!((handle.limits.n_ctx, handle.n_ctx_trained), (4096, 4096));
        drop(handle);
        engine.stop();
    }
}

/// An adapter in parts: its metadata, and of each tensor the name, the values of a row, and all values.
#[derive(Clone)]
struct Lora {
    meta: Vec<(String, Meta)>,
    tensors: Vec<(String, usize, Vec<f32>)>,
}

const RANK: usize = 4;
const ALPHA: f32 = 8.0;
/// Tensors of the tiny model, with their values of a row, and rows.
const ADAPTED: [(&str, usize, usize); 3] = [
    ("blk.0.attn_q.weight", 64, 64),
    ("blk.1.ffn_down.weight", 128, 64),
    ("output.weight", 64, 512),
];

impl Lora {
    /// With random values.
    fn new() -> Self {
        let text = |key: &str, value: &str| (key.to_owned(), Meta::Text(value.into()));
        let mut rng = fastrand::Rng::with_seed(7);
        let mut values =
            |n: usize, most: f32| (0..n).map(|_| (rng.f32() * 2.0 - 1.0) * most).collect();
        let tensors = ADAPTED.iter().flat_map(|&(name, n_in, n_out)| {
            [
                (format!("{name}.lora_a"), n_in, values(n_in * RANK, 0.2)),
                (format!("{name}.lora_b"), RANK, values(RANK * n_out, 0.2)),
            ]
        });
        let tensors = tensors.collect();
        let meta = vec![
            text("general.type", "adapter"),
            text("general.architecture", "llama"),
            text("adapter.type", "lora"),
            ("adapter.lora.alpha".to_owned(), Meta::Float(ALPHA)),
        ];
        Self { meta, tensors }
    }

    fn with(mut self, key: &str, value: Meta) -> Self {
        self.meta.iter_mut().find(|(k, _)| k == key).unwrap().1 = value;
        self
    }

    fn write(&self, path: &Path) {
        let info = |(name, n_in, values): &(String, usize, Vec<f32>)| TensorInfo {
            name: name.clone(),
            shape: [*n_in, values.len() / n_in, 1, 1],
            kind: TensorType::F32,
        };
        let tensors: Vec<TensorInfo> = self.tensors.iter().map(info).collect();
        write_header(path, &self.meta, &tensors).unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        for (_, _, values) in &self.tensors {
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        }
        std::fs::write(path, bytes).unwrap();
    }

    /// The product that is added to a matrix of `n_in` values a row.
    fn product(&self, name: &str, n_in: usize, n_out: usize) -> Vec<f32> {
        let of = |part: &str| {
            let name = format!("{name}.{part}");
            &self.tensors.iter().find(|(n, ..)| *n == name).unwrap().2
        };
        let (a, b) = (of("lora_a"), of("lora_b"));
        let value = |i: usize, o: usize| -> f32 {
            (0..RANK).map(|r| a[r * n_in + i] * b[o * RANK + r]).sum::<f32>() * ALPHA / RANK as f32
        };
        (0..n_out * n_in).map(|at| value(at % n_in, at / n_in)).collect()
    }
}

/// The file, all of whose F16 values became F32, with a scaled adapter added to them.
fn merged(file: &File, lora: &Lora, scale: f32) -> File {
    let mut out = File { tensors: vec![], values: vec![], ..file.clone() };
    for (name, dims, kind, at) in &file.tensors {
        let n = dims.iter().product::<u64>() as usize;
        let bytes = &file.values[*at as usize..];
        let mut values: Vec<f32> = match kind {
            0 => bytes.as_chunks::<4>().0[..n].iter().map(|b| f32::from_le_bytes(*b)).collect(),
            1 => bytes.as_chunks::<2>().0[..n]
                .iter()
                .map(|b| half::f16::from_le_bytes(*b).to_f32())
                .collect(),
            kind => panic!("{name} has the type {kind}"),
        };
        if let Some(&(_, n_in, n_out)) = ADAPTED.iter().find(|of| of.0 == name) {
            let added = lora.product(name, n_in, n_out);
            values.iter_mut().zip(added).for_each(|(value, added)| *value += scale * added);
        }
        out.tensors.push((name.clone(), dims.clone(), 0, out.values.len() as u64));
        out.values.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        out.values.resize(out.values.len().next_multiple_of(ALIGNMENT), 0);
    }
    out
}

#[test]
fn an_adapter_is_what_merged_weights_are() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lora_path) = (write(folder.path(), "tiny", "F16"), folder.path().join("lora.gguf"));
    let lora = Lora::new();
    lora.write(&lora_path);
    let adapted = |scales: &[f32]| {
        let mut model = load(&path, &Placement::default());
        let file = |&scale| AdapterFile { path: lora_path.clone(), scale };
        model.adapt(&scales.iter().map(file).collect::<Vec<_>>()).unwrap();
        logits(model, Rope::default())
    };
    let plain = adapted(&[]);
    assert!(adapted(&[0.0]) == plain);
    let file = File::read(&std::fs::read(&path).unwrap());
    for scales in [&[1.0][..], &[-0.5], &[0.25, 0.5]] {
        let merged_path = folder.path().join("merged.gguf");
        std::fs::write(&merged_path, merged(&file, &lora, scales.iter().sum()).bytes()).unwrap();
        let expected = logits(load(&merged_path, &Placement::default()), Rope::default());
        let (got, moved) = (adapted(scales), distance(&expected, &plain));
        let off = distance(&got, &expected);
        assert!(moved > 0.5 && off < moved / 50.0, "{scales:?}: moved {moved}, off {off}");
    }
}

#[test]
fn drafts_change_no_text_of_a_model_with_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lora) = (write(folder.path(), "tiny", "F16"), folder.path().join("lora.gguf"));
    Lora::new().write(&lora);
    let params = EngineParams::new(path, 1, 3, 512);
    let params = EngineParams { drafts: Some(common::text_drafts()), n_queue: 16, ..params };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let texts = |adapters: Vec<AdapterFile>| {
        let engine = spawn(EngineParams { adapters, ..params.clone() });
        let texts = runtime.block_on(async {
            let handle = engine.ready().await.unwrap();
            let mut texts = vec![];
            for speculation in [Speculation::OFF, Speculation::AUTO, Speculation::AUTO] {
                for prompt in ["tree river tree river tree", "a stone and a stone and a"] {
                    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
                    let report = Some(Report { details: true, n_top: None });
                    let request = Request {
                        sampling,
                        speculation,
                        report,
                        ignore_eos: true,
                        ..Request::new(prompt, 64)
                    };
                    let answer = handle.submit(request, Caller::default()).await.unwrap();
                    let (piece, _) = answer.collect().await.unwrap();
                    texts.push(piece.tokens.iter().map(|of| of.token).collect::<Vec<_>>());
                }
            }
            assert!(handle.stats.accepted.get() > 0, "drafts were accepted");
            texts
        });
        engine.stop();
        texts
    };
    let adapted = texts(vec![AdapterFile { path: lora, scale: 1.0 }]);
    assert!(adapted[2..4] == adapted[..2] && adapted[4..] == adapted[..2]);
    assert_ne!(adapted[..2], texts(vec![])[..2]);
}

#[test]
fn what_is_no_adapter_of_the_model_is_refused_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "tiny", "F16");
    let file = folder.path().join("adapter.gguf");
    let refused = |why: &str| {
        let [model, lora] = [&path, &file].map(|path| path.to_str().unwrap());
        let line = refused(&["-m", model, "--lora", lora], 1);
        assert!(line.contains(lora) && line.contains(why), "{why}: {line}");
    };
    refused("No such file");
    std::fs::copy(&path, &file).unwrap();
    refused("no LoRA adapter");
    let text = |value: &str| Meta::Text(value.into());
    let good = Lora::new();
    for (lora, why) in [
        (good.clone().with("adapter.type", text("vector")), "adapter.type is vector, not lora"),
        (good.clone().with("general.type", Meta::Number(1)), "has no general.type"),
        (
            good.clone().with("general.architecture", text("qwen3")),
            "general.architecture is qwen3, not llama",
        ),
        (good.clone().with("adapter.lora.alpha", Meta::Number(8)), "lora.alpha is no"),
        (Lora { tensors: good.tensors[..1].to_vec(), ..good.clone() }, "missing one component"),
        (renamed(&good, "blk.9.attn_q.weight"), "does not exist"),
        (renamed(&good, "blk.0.attn_k.weight"), "incorrect shape"),
    ] {
        lora.write(&file);
        refused(why);
    }
    good.write(&file);
    let bytes = std::fs::read(&file).unwrap();
    for (n, why) in [(bytes.len() / 2, "within the file bounds"), (200, "not a GGUF"), (0, "")] {
        std::fs::write(&file, &bytes[..n]).unwrap();
        refused(why);
    }
    // Tokens that switch an adapter on.
    let tokens = [&U32.to_le_bytes()[..], &1u64.to_le_bytes(), &5u32.to_le_bytes()].concat();
    let mut switched = File::read(&bytes);
    switched.set("adapter.alora.invocation_tokens", ARRAY, tokens);
    std::fs::write(&file, switched.bytes()).unwrap();
    refused("switch it on");
    // Values of a type that cannot be multiplied, as large as floats.
    let mut of_integers = File::read(&bytes);
    of_integers.tensors.iter_mut().for_each(|tensor| tensor.2 = I32);
    std::fs::write(&file, of_integers.bytes()).unwrap();
    refused("llama.cpp can use");
}

/// With the first pair of tensors under another name.
fn renamed(lora: &Lora, name: &str) -> Lora {
    let mut lora = lora.clone();
    for (n, ..) in &mut lora.tensors {
        *n = n.replace(ADAPTED[0].0, name);
    }
    lora
}

#[test]
fn heads_are_off_beside_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let (model, heads) = (folder.path().join("tiny.gguf"), folder.path().join("heads"));
    let [model_name, heads_name] = [&model, &heads].map(|path| path.to_str().unwrap());
    let synth = run(
        &["synth", "--like", "tiny", "-q", "F16", "-o", model_name, "--heads", heads_name],
        &[],
    );
    assert!(synth.status.success(), "{synth:?}");
    let lora = folder.path().join("lora.gguf");
    Lora::new().write(&lora);
    let lora = format!("{}:0.5", lora.display());
    let args = ["generate", "-p", "ab", "-n", "1", "-t", "1", "-m", model_name, "--heads"];
    let log = |more: &[&str]| {
        let output = run(&[&args[..], more].concat(), &[("LOG_LEVEL", "DEBUG")]);
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        log
    };
    let alone = log(&[heads_name]);
    assert!(alone.contains("heads loaded") && !alone.contains("heads are off"), "{alone}");
    let adapted = log(&[heads_name, "--lora-scaled", &lora]);
    assert!(adapted.contains("heads are off") && !adapted.contains("heads loaded"), "{adapted}");
    std::fs::write(heads.join("config.json"), r#"{ "lora": true }"#).unwrap();
    assert!(log(&[heads_name, "--lora-scaled", &lora]).contains("heads loaded"));
}
