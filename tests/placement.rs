//! Where weights go: on tiny models with random weights.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};

use common::run;
use medusa_llama::llama::{
    Buffer, Context, ContextParams, LoadMode, Model, Override, Pattern, Placement, Quantization,
    SeqId, Token,
};
use medusa_llama::synth::{self, ModelShape};

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
fn logits(model: Model) -> Vec<f32> {
    let params = ContextParams::of_one_sequence(256, 64, 1);
    let mut context = Context::new(model.into(), &params).unwrap();
    let mut batch = context.batch();
    for pos in 0..64 {
        batch.add(Token(259 + 3 * pos as i32), pos, &[SeqId(0)], true).unwrap();
    }
    context.forward(&batch).unwrap();
    (0..64).flat_map(|row| context.logits(row).unwrap().to_vec()).collect()
}

#[test]
fn a_model_is_the_same_mapped_copied_and_locked() {
    let folder = tempfile::tempdir().unwrap();
    for quantization in ["F16", "Q4_0", "Q4_1"] {
        let path = write(folder.path(), "tiny", quantization);
        let of = |load_mode, lock| {
            let placement = Placement { load: load_mode, lock, ..Placement::default() };
            logits(load(&path, &placement))
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
    let expected = logits(load(&path, &Placement::layers(99)));
    let on_host = |pattern| Override { pattern, buffer: Buffer::host() };
    for pattern in
        [Pattern::of_experts(None), Pattern::of_experts(Some(1)), Pattern::new(".*").unwrap()]
    {
        let overrides = vec![on_host(pattern)];
        let placement = Placement { overrides, ..Placement::layers(99) };
        Model::outline(&path, &placement).unwrap();
        assert!(logits(load(&path, &placement)) == expected, "{placement:?}");
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
    let more = more.split(' ').chain(["-ot", "ffn=CPU"]);
    let all: Vec<&str> = args.into_iter().chain([path.to_str().unwrap()]).chain(more).collect();
    let output = run(&all, &[]);
    assert!(output.status.success(), "{output:?}");
}
