//! The default model, and contexts of it for tests of the fence and of texts.
#![allow(dead_code, missing_docs)] // each test binary uses its part

use std::sync::{Arc, LazyLock};

use medusa_llama::llama::{
    CacheTypes, Context, ContextParams, Model, Placement, Rope, SeqId, Token,
};

use super::model_path;

pub static MODEL: LazyLock<Arc<Model>> = LazyLock::new(|| {
    let n_gpu_layers = std::env::var("N_GPU_LAYERS").map_or(0, |n| n.parse().unwrap());
    Arc::new(Model::load(&model_path(), &Placement::layers(n_gpu_layers), |_| true).unwrap())
});

pub fn params() -> ContextParams {
    ContextParams {
        n_cells: 512,
        n_batch: 64,
        n_ubatch: 64,
        n_outputs: 64,
        n_seq_max: 4,
        n_threads: 1,
        unified: true,
        cache: CacheTypes::default(),
        rope: Rope::default(),
        n_window_cells: None,
        n_rollback: 0,
        tap_hidden: false,
        keeps_states: false,
        of_draft_layers: false,
        embeddings: false,
    }
}

pub fn context(params: &ContextParams) -> Context {
    Context::new(Arc::clone(&MODEL), params).unwrap()
}

/// Computes `tokens` of one sequence, all rows with output.
pub fn feed(context: &mut Context, tokens: &[Token], from: usize, seq: u32) {
    let mut batch = context.batch();
    for (i, &token) in tokens.iter().enumerate() {
        batch.add(token, from + i, &[SeqId(seq)], true).unwrap();
    }
    context.forward(&batch).unwrap();
}

/// Whether a row's logits are the same, bit for bit, whatever is computed beside it, as `vendor/`'s
/// kernels promise for the default model's types. Elsewhere the kernels, and with them the rounding,
/// depend on the number of rows; and a value that rounds to the next 8-bit step moves all that
/// follows.
pub fn rows_are_independent() -> bool {
    cfg!(cpu_kernels = "avx2") && std::env::var_os("N_GPU_LAYERS").is_none()
}
