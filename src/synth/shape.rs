//! Sizes of published models of the llama architecture.

/// Sizes of a model of the llama architecture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelShape {
    /// Its name in `--like`.
    pub(crate) name: &'static str,
    pub(crate) n_layer: usize,
    pub(crate) n_embd: usize,
    pub(crate) n_ff: usize,
    pub(crate) n_head: usize,
    /// Attention heads with keys and values of their own.
    pub(crate) n_head_kv: usize,
    pub(crate) n_vocab: usize,
    pub(crate) n_ctx: usize,
    pub(crate) rope_base: f32,
    /// Input embeddings serve as the output matrix.
    pub(crate) tied: bool,
}

/// The sizes of published models, and a model of less than a megabyte for tests.
const SHAPES: [ModelShape; 4] = [
    ModelShape {
        name: "vicuna-7b",
        n_layer: 32,
        n_embd: 4096,
        n_ff: 11_008,
        n_head: 32,
        n_head_kv: 32,
        n_vocab: 32_000,
        n_ctx: 4096,
        rope_base: 10_000.0,
        tied: false,
    },
    ModelShape {
        name: "llama-3-8b",
        n_layer: 32,
        n_embd: 4096,
        n_ff: 14_336,
        n_head: 32,
        n_head_kv: 8,
        n_vocab: 128_256,
        n_ctx: 8192,
        rope_base: 500_000.0,
        tied: false,
    },
    ModelShape {
        name: "smollm2-135m",
        n_layer: 30,
        n_embd: 576,
        n_ff: 1536,
        n_head: 9,
        n_head_kv: 3,
        n_vocab: 49_152,
        n_ctx: 8192,
        rope_base: 100_000.0,
        tied: true,
    },
    ModelShape {
        name: "tiny",
        n_layer: 2,
        n_embd: 64,
        n_ff: 128,
        n_head: 4,
        n_head_kv: 2,
        n_vocab: 512,
        n_ctx: 2048,
        rope_base: 10_000.0,
        tied: false,
    },
];

impl ModelShape {
    /// The shape of this name.
    pub fn by_name(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|s| s.name == name)
    }

    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|s| s.name)
    }
}
