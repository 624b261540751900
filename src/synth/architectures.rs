//! Small models of many architectures, for tests: each is declared by its metadata, and llama.cpp
//! says which tensors follow from it. Pure.
//!
//! Each has all kinds of layers that its architecture knows, and heads and states of sizes for which
//! GPUs have kernels.

use Constant::{Flag, Float, Number, Numbers, Text};

use crate::llama::Meta;

/// An architecture and its metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Declared {
    /// llama.cpp's name for it.
    pub(super) arch: &'static str,
    pub(super) n_layer: usize,
    /// Besides those of all architectures; several lists, as architectures share some.
    keys: &'static [&'static [Key]],
    /// Optional tensors that such files do not have, by their names in a layer.
    without: &'static [&'static [&'static str]],
}

/// A key after the architecture's name, and its value.
type Key = (&'static str, Constant);

/// A metadata value in a table.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Constant {
    Number(u32),
    Float(f32),
    Flag(bool),
    Text(&'static str),
    /// In most keys one for each layer.
    Numbers(&'static [i32]),
}

impl Declared {
    pub(super) fn keys(&self) -> Vec<(&'static str, Meta)> {
        let value = |constant: Constant| match constant {
            Number(n) => Meta::Number(n),
            Float(v) => Meta::Float(v),
            Flag(is) => Meta::Flag(is),
            Text(text) => Meta::Text(text.into()),
            Numbers(values) => Meta::Numbers(values.to_vec()),
        };
        self.keys.iter().copied().flatten().map(|&(key, constant)| (key, value(constant))).collect()
    }

    /// Whether such files have this optional tensor, by its name in a layer.
    pub(super) fn has(&self, tensor: &str) -> bool {
        // Scales belong to types of values that are not written.
        let is_scale = tensor.ends_with(".scale") || tensor.ends_with(".input_scale");
        !is_scale && !self.without.iter().copied().flatten().any(|name| *name == tensor)
    }
}

const RMS: Key = ("attention.layer_norm_rms_epsilon", Float(1e-5));

/// Four heads of 16 values, unless a key says otherwise; two of them have keys and values.
const ATTENTION: &[Key] = &[
    RMS,
    ("attention.head_count", Number(4)),
    ("attention.head_count_kv", Number(2)),
    ("rope.freq_base", Float(1e6)),
];

/// As [`ATTENTION`], in the second and the last of four layers.
const EVERY_SECOND_ATTENTION: &[Key] = &[
    RMS,
    ("attention.head_count", Number(4)),
    ("attention.head_count_kv", Numbers(&[0, 2, 0, 2])),
    ("rope.freq_base", Float(1e4)),
];

const HEADS_OF_32: &[Key] =
    &[("attention.key_length", Number(32)), ("attention.value_length", Number(32))];

const FFN: &[Key] = &[("feed_forward_length", Number(128))];

/// Eight experts, two of them for each token.
const EXPERTS: &[Key] = &[
    ("expert_count", Number(8)),
    ("expert_used_count", Number(2)),
    ("expert_feed_forward_length", Number(32)),
];

/// Of Mamba 2: four heads of 32 values, and a state of 128 for each value.
const SSM2: &[Key] = &[
    ("ssm.conv_kernel", Number(4)),
    ("ssm.inner_size", Number(128)),
    ("ssm.state_size", Number(128)),
    ("ssm.time_step_rank", Number(4)),
    ("ssm.group_count", Number(1)),
];

/// Of Mamba: 128 values with a state of 16 for each.
const SSM: &[Key] = &[
    ("ssm.conv_kernel", Number(4)),
    ("ssm.inner_size", Number(128)),
    ("ssm.state_size", Number(16)),
    ("ssm.time_step_rank", Number(32)),
];

/// Gated delta nets, with four heads of 32 values and two of keys; the other layers rotate half of
/// each head.
const DELTA_NET: &[Key] = &[
    ("full_attention_interval", Number(2)),
    ("rope.dimension_count", Number(16)),
    ("ssm.conv_kernel", Number(4)),
    ("ssm.inner_size", Number(128)),
    ("ssm.state_size", Number(32)),
    ("ssm.time_step_rank", Number(4)),
    ("ssm.group_count", Number(2)),
];

/// What llama.cpp takes for these architectures, and few or no files have.
const RARE: &[&str] = &[
    "attn_q.bias",
    "attn_k.bias",
    "attn_v.bias",
    "attn_output.bias",
    "ffn_gate.bias",
    "ffn_up.bias",
    "ffn_down.bias",
    "output.bias",
    "cls.output.weight",
    "cls.output.bias",
    "dense_2.weight",
    "dense_2.bias",
    "rope_freqs.weight",
];

const fn declared(arch: &'static str, n_layer: usize, keys: &'static [&'static [Key]]) -> Declared {
    Declared { arch, n_layer, keys, without: &[RARE] }
}

pub(super) const QWEN2: Declared =
    Declared { without: &[&["output.bias"]], ..declared("qwen2", 2, &[ATTENTION, FFN]) };

pub(super) const QWEN3: Declared = declared("qwen3", 2, &[ATTENTION, HEADS_OF_32, FFN]);

pub(super) const QWEN3_MOE: Declared =
    declared("qwen3moe", 2, &[ATTENTION, HEADS_OF_32, FFN, EXPERTS]);

pub(super) const GEMMA3: Declared = declared(
    "gemma3",
    6,
    &[
        ATTENTION,
        HEADS_OF_32,
        FFN,
        &[
            ("attention.sliding_window", Number(64)),
            ("attention.sliding_window_pattern", Number(6)),
            ("rope.freq_base_swa", Float(1e4)),
        ],
    ],
);

pub(super) const PHI3: Declared = declared(
    "phi3",
    2,
    &[
        ATTENTION,
        FFN,
        &[
            ("rope.dimension_count", Number(16)),
            ("rope.scaling.original_context_length", Number(2048)),
        ],
    ],
);

pub(super) const GPT_OSS: Declared = Declared {
    without: &[],
    ..declared(
        "gpt-oss",
        4,
        &[
            ATTENTION,
            HEADS_OF_32,
            EXPERTS,
            &[
                ("attention.sliding_window", Number(64)),
                ("rope.scaling.type", Text("yarn")),
                ("rope.scaling.factor", Float(4.0)),
                ("rope.scaling.original_context_length", Number(512)),
            ],
        ],
    )
};

/// With compressed keys and values, and a layer without experts.
pub(super) const DEEPSEEK2: Declared = declared(
    "deepseek2",
    3,
    &[
        FFN,
        EXPERTS,
        &[
            RMS,
            ("leading_dense_block_count", Number(1)),
            ("attention.head_count", Number(4)),
            ("attention.head_count_kv", Number(1)),
            ("attention.q_lora_rank", Number(32)),
            ("attention.kv_lora_rank", Number(64)),
            // What is cached: the compressed state, and the part of a key that is rotated.
            ("attention.key_length", Number(96)),
            ("attention.value_length", Number(64)),
            ("attention.key_length_mla", Number(64)),
            ("attention.value_length_mla", Number(32)),
            ("rope.dimension_count", Number(32)),
            ("expert_shared_count", Number(1)),
            ("expert_weights_norm", Flag(true)),
            ("expert_weights_scale", Float(1.0)),
            ("expert_gating_func", Number(2)), // sigmoid
        ],
    ],
);

/// What published files of Mamba say of the attention that they do not have.
const NO_ATTENTION: &[Key] =
    &[("attention.head_count", Number(0)), ("feed_forward_length", Number(0))];

pub(super) const MAMBA: Declared = declared("mamba", 4, &[&[RMS], SSM, NO_ATTENTION]);

pub(super) const MAMBA2: Declared = declared("mamba2", 4, &[&[RMS], SSM2, NO_ATTENTION]);

/// For twice as wide a state, as GPUs have kernels for heads of 64 values.
pub(super) const RWKV7: Declared = declared(
    "rwkv7",
    3,
    &[&[
        ("feed_forward_length", Number(256)),
        ("attention.layer_norm_epsilon", Float(1e-5)),
        ("wkv.head_size", Number(64)),
        ("attention.decay_lora_rank", Number(32)),
        ("attention.iclr_lora_rank", Number(32)),
        ("attention.value_residual_mix_lora_rank", Number(32)),
        ("attention.gate_lora_rank", Number(32)),
        ("token_shift_count", Number(2)),
    ]],
);

pub(super) const LFM2: Declared =
    declared("lfm2", 4, &[EVERY_SECOND_ATTENTION, FFN, &[("shortconv.l_cache", Number(3))]]);

pub(super) const JAMBA: Declared = declared(
    "jamba",
    4,
    &[
        EVERY_SECOND_ATTENTION,
        SSM,
        FFN,
        &[("expert_count", Number(4)), ("expert_used_count", Number(2))],
    ],
);

pub(super) const GRANITE_HYBRID: Declared =
    declared("granitehybrid", 4, &[EVERY_SECOND_ATTENTION, SSM2, FFN]);

/// A layer is one of Mamba, feed-forward network, and attention.
pub(super) const NEMOTRON_H: Declared = declared(
    "nemotron_h",
    5,
    &[
        SSM2,
        &[
            RMS,
            ("attention.layer_norm_epsilon", Float(1e-5)),
            ("attention.head_count", Number(4)),
            ("attention.head_count_kv", Numbers(&[0, 0, 2, 0, 0])),
            ("feed_forward_length", Numbers(&[0, 128, 0, 0, 128])),
        ],
    ],
);

pub(super) const FALCON_H1: Declared = declared("falcon-h1", 2, &[ATTENTION, SSM2, FFN]);

pub(super) const QWEN3_NEXT: Declared = Declared {
    // Older files had it in place of two others.
    without: &[RARE, &["ssm_in.weight"]],
    ..declared(
        "qwen3next",
        4,
        &[
            ATTENTION,
            HEADS_OF_32,
            DELTA_NET,
            FFN,
            EXPERTS,
            &[("expert_shared_feed_forward_length", Number(32))],
        ],
    )
};

pub(super) const QWEN35: Declared = declared(
    "qwen35",
    4,
    &[
        ATTENTION,
        HEADS_OF_32,
        DELTA_NET,
        FFN,
        &[("rope.dimension_sections", Numbers(&[3, 3, 2, 0]))],
    ],
);

/// What a draft layer may have of its own, and shares with the model in these files.
const SHARED: &[&str] = &["nextn.embed_tokens.weight", "nextn.shared_head_head.weight"];

/// With a draft layer after three others.
pub(super) const GLM4_MOE: Declared = with_draft_layer(declared(
    "glm4moe",
    4,
    &[
        ATTENTION,
        FFN,
        EXPERTS,
        &[
            ("expert_shared_count", Number(1)),
            ("leading_dense_block_count", Number(1)),
            ("nextn_predict_layers", Number(1)),
        ],
    ],
));

/// [`QWEN35`] with a draft layer after its four others.
pub(super) const QWEN35_MTP: Declared = with_draft_layer(declared(
    "qwen35",
    5,
    &[
        ATTENTION,
        HEADS_OF_32,
        DELTA_NET,
        FFN,
        &[("rope.dimension_sections", Numbers(&[3, 3, 2, 0])), ("nextn_predict_layers", Number(1))],
    ],
));

const fn with_draft_layer(declared: Declared) -> Declared {
    Declared { without: &[RARE, SHARED], ..declared }
}
