//! Engines of drafting tests, without a server around them.
#![allow(dead_code, missing_docs)] // each test binary uses its part

use std::path::{Path, PathBuf};

use medusa_llama::engine::EngineParams;
use medusa_llama::engine::drafts::DraftParams;
use medusa_llama::engine::{Handle, spawn};
use medusa_llama::llama::Quantization;
use medusa_llama::request::{Caller, Completion, Request};
use medusa_llama::synth::{self, ModelShape};
use tokio::runtime::{Builder, Runtime};

/// Writes a model of random weights in F16: what rounding there is does not depend on how rows are
/// grouped.
pub fn random_model(folder: &Path, name: &str, seed: u64) -> PathBuf {
    let path = folder.join(format!("{name}-{seed}.gguf"));
    let shape = ModelShape::by_name(name).unwrap();
    let f16 = Quantization::by_name("F16").unwrap();
    synth::model(&path, &shape, f16, seed, &mut |_, _| ()).unwrap();
    path
}

pub fn engine(model: PathBuf, drafts: DraftParams) -> EngineParams {
    let params = EngineParams::new(model, 1, 8, 1024);
    EngineParams { drafts: Some(drafts), n_queue: 16, ..params }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs `f` with an engine of these parameters.
pub fn with_engine<R>(params: EngineParams, f: impl AsyncFnOnce(Handle) -> R) -> R {
    let engine = spawn(params);
    let result = runtime().block_on(async { f(engine.ready().await.unwrap()).await });
    engine.stop();
    result
}

/// Why an engine of these parameters does not start.
pub fn refused(params: EngineParams) -> String {
    let engine = spawn(params);
    let why = runtime().block_on(engine.ready()).err().expect("a refusal");
    engine.stop();
    why
}

/// The answers to requests that are sent together.
pub async fn answers(handle: &Handle, requests: &[Request]) -> Vec<(String, Completion)> {
    let mut sent = vec![];
    for request in requests {
        sent.push(handle.submit(request.clone(), Caller::default()).await.unwrap());
    }
    let mut all = vec![];
    for answer in sent {
        let (piece, done) = answer.collect().await.unwrap();
        all.push((piece.text, done));
    }
    all
}
