//! Where weights go, and how positions are rotated: on tiny models with random weights.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};

use common::gguf::{File, random};
use common::run;
use medusa_llama::engine::plan::Sizes;
use medusa_llama::engine::spawn;
use medusa_llama::engine::thread::EngineParams;
use medusa_llama::llama::{
    Buffer, Context, ContextParams, LoadMode, Model, Override, Pattern, Placement, Quantization,
    Rope, RopeScaling, SeqId, Token,
};
use medusa_llama::synth::{self, ModelShape};

/// A type of metadata.
const F32: u32 = 6;

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
