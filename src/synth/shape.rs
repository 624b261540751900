//! Models by the names that `--like` takes: with the sizes of published models of the llama
//! architecture, and small ones of others. Pure.

use super::architectures as of;
use super::architectures::Declared;
use crate::llama::Meta;

/// Sizes and architecture of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelShape {
    /// Its name in `--like`.
    pub(crate) name: &'static str,
    pub(crate) n_layer: usize,
    pub(crate) n_embd: usize,
    pub(crate) n_vocab: usize,
    pub(crate) n_ctx: usize,
    pub(crate) architecture: Architecture,
}

/// What makes a model of these sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Architecture {
    /// llama, whose tensors `weights` lists: llama.cpp would reserve 28 GB to list a 7B model's.
    Llama(Llama),
    /// Another one, whose tensors llama.cpp lists.
    Declared(Declared),
}

/// Further sizes of a llama.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Llama {
    pub(crate) n_ff: usize,
    pub(crate) n_head: usize,
    /// Attention heads with keys and values of their own.
    pub(crate) n_head_kv: usize,
    pub(crate) rope_base: f32,
    /// The model was trained on a context shorter by this factor, and YaRN extends it.
    pub(crate) yarn_factor: Option<f32>,
    /// Input embeddings serve as the output matrix.
    pub(crate) tied: bool,
}

const SHAPES: [ModelShape; 25] = [
    ModelShape {
        name: "vicuna-7b",
        n_layer: 32,
        n_embd: 4096,
        n_vocab: 32_000,
        n_ctx: 4096,
        architecture: Architecture::Llama(Llama {
            n_ff: 11_008,
            n_head: 32,
            n_head_kv: 32,
            rope_base: 10_000.0,
            yarn_factor: None,
            tied: false,
        }),
    },
    ModelShape {
        name: "llama-3-8b",
        n_layer: 32,
        n_embd: 4096,
        n_vocab: 128_256,
        n_ctx: 8192,
        architecture: Architecture::Llama(Llama {
            n_ff: 14_336,
            n_head: 32,
            n_head_kv: 8,
            rope_base: 500_000.0,
            yarn_factor: None,
            tied: false,
        }),
    },
    smollm2("smollm2-135m", 8192, None),
    smollm2("smollm2-135m-32k", 32_768, Some(4.0)),
    tiny(
        "tiny",
        2,
        Architecture::Llama(Llama {
            n_ff: 128,
            n_head: 4,
            n_head_kv: 2,
            rope_base: 10_000.0,
            yarn_factor: None,
            tied: false,
        }),
    ),
    declared("tiny-qwen2", of::QWEN2),
    declared("tiny-qwen3", of::QWEN3),
    declared("tiny-qwen3moe", of::QWEN3_MOE),
    declared("tiny-gemma3", of::GEMMA3),
    ModelShape { n_vocab: 262_144, ..declared("tiny-gemma3-262k", of::GEMMA3) },
    declared("tiny-phi3", of::PHI3),
    declared("tiny-gpt-oss", of::GPT_OSS),
    declared("tiny-deepseek2", of::DEEPSEEK2),
    declared("tiny-mamba", of::MAMBA),
    declared("tiny-mamba2", of::MAMBA2),
    ModelShape { n_embd: 128, ..declared("tiny-rwkv7", of::RWKV7) },
    declared("tiny-lfm2", of::LFM2),
    declared("tiny-jamba", of::JAMBA),
    declared("tiny-granite-hybrid", of::GRANITE_HYBRID),
    declared("tiny-nemotron-h", of::NEMOTRON_H),
    declared("tiny-falcon-h1", of::FALCON_H1),
    declared("tiny-qwen3next", of::QWEN3_NEXT),
    declared("tiny-qwen35", of::QWEN35),
    declared("tiny-glm4moe", of::GLM4_MOE),
    declared("tiny-qwen35-mtp", of::QWEN35_MTP),
];

const fn smollm2(name: &'static str, n_ctx: usize, yarn_factor: Option<f32>) -> ModelShape {
    let architecture = Architecture::Llama(Llama {
        n_ff: 1536,
        n_head: 9,
        n_head_kv: 3,
        rope_base: 100_000.0,
        yarn_factor,
        tied: true,
    });
    ModelShape { name, n_layer: 30, n_embd: 576, n_vocab: 49_152, n_ctx, architecture }
}

/// For tests: files have less than three megabytes.
const fn tiny(name: &'static str, n_layer: usize, architecture: Architecture) -> ModelShape {
    ModelShape { name, n_layer, n_embd: 64, n_vocab: 512, n_ctx: 2048, architecture }
}

const fn declared(name: &'static str, declared: Declared) -> ModelShape {
    tiny(name, declared.n_layer, Architecture::Declared(declared))
}

impl ModelShape {
    /// The shape of this name.
    pub fn by_name(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|s| s.name == name)
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|s| s.name)
    }

    /// The metadata of the architecture: its name, and its keys.
    pub(super) fn metadata(&self) -> (&'static str, Vec<(&'static str, Meta)>) {
        let number = |n: usize| Meta::Number(n as u32);
        let (arch, more) = match &self.architecture {
            Architecture::Llama(llama) => ("llama", llama.keys(self)),
            Architecture::Declared(other) => (other.arch, other.keys()),
        };
        let mut keys = vec![
            ("vocab_size", number(self.n_vocab)),
            ("context_length", number(self.n_ctx)),
            ("embedding_length", number(self.n_embd)),
            ("block_count", number(self.n_layer)),
        ];
        keys.extend(more);
        (arch, keys)
    }
}

impl Llama {
    fn keys(&self, shape: &ModelShape) -> Vec<(&'static str, Meta)> {
        let number = |n: usize| Meta::Number(n as u32);
        let mut keys = vec![
            ("feed_forward_length", number(self.n_ff)),
            ("attention.head_count", number(self.n_head)),
            ("attention.head_count_kv", number(self.n_head_kv)),
            ("attention.layer_norm_rms_epsilon", Meta::Float(1e-5)),
            ("rope.dimension_count", number(shape.n_embd / self.n_head)),
            ("rope.freq_base", Meta::Float(self.rope_base)),
        ];
        if let Some(factor) = self.yarn_factor {
            let n_before = number((shape.n_ctx as f32 / factor) as usize);
            keys.extend([
                ("rope.scaling.type", Meta::Text("yarn".into())),
                ("rope.scaling.factor", Meta::Float(factor)),
                ("rope.scaling.original_context_length", n_before),
            ]);
        }
        keys
    }
}
