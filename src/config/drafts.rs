//! Arguments about the sources of drafts.

use std::path::PathBuf;
use std::str::FromStr as _;

use clap::{Args as ClapArgs, ValueEnum};

use super::values::{between, layers};
use crate::engine::drafts::{DraftModelParams, DraftParams, HeadsParams, LayersParams};
use crate::hub::name::ModelName;
use crate::llama::{GpuLayers, Placement};

/// Draft sources; shared by all commands that draft.
#[derive(Clone, Debug, ClapArgs)]
pub struct DraftArgs {
    /// Folder with heads trained for the model, `hf:user/repo` for a repository on the Hugging Face
    /// Hub, or `none` [default: heads/smollm2-135m-instruct for the default model, else none]
    #[arg(long = "heads", env = "MEDUSA_HEADS", value_name = "MEDUSA_HEADS")]
    pub folder: Option<PathBuf>,
    /// Maximum number of heads to use
    #[arg(long = "medusa-k-heads", env = "MEDUSA_K_HEADS", value_name = "MEDUSA_K_HEADS", default_value_t = 5, value_parser = between(1, 16))]
    pub k_heads: usize,
    /// GGUF file of a smaller model with the same vocabulary, to draft with; also -md [default: none]
    #[arg(
        long = "draft-model",
        visible_alias = "model-draft",
        alias = "spec-draft-model",
        env = "DRAFT_MODEL",
        value_name = "DRAFT_MODEL"
    )]
    pub model: Option<PathBuf>,
    /// The same by its name on the Hugging Face Hub, user/repo or user/repo:QUANT; also -hfd [default:
    /// none]
    #[arg(long = "draft-hf", visible_alias = "hf-repo-draft", alias = "spec-draft-hf", env = "DRAFT_HF", value_name = "DRAFT_HF", value_parser = ModelName::from_str)]
    pub hf: Option<ModelName>,
    /// Maximum tokens that the draft model, or draft layers, draft in one step; they stop earlier where more would not
    /// pay
    #[arg(long, visible_alias = "draft", aliases = ["draft-n", "spec-draft-n-max"], env = "DRAFT_MAX", default_value_t = 16, value_parser = between(1, 63))]
    pub draft_max: usize,
    /// Size of the KV cache of the draft model or of draft layers, in tokens; also -cd [default: BATCH_SIZE x 4096]
    #[arg(long = "draft-ctx", visible_alias = "ctx-size-draft", alias = "spec-draft-ctx-size", env = "DRAFT_CONTEXT_SIZE", value_name = "DRAFT_CONTEXT_SIZE", value_parser = between(16, 1 << 28))]
    pub draft_ctx: Option<usize>,
    /// Layers of the draft model to offload to GPUs, a number or `all`; also -ngld. A CPU build ignores
    /// it
    #[arg(long, visible_aliases = ["n-gpu-layers-draft", "gpu-layers-draft"], alias = "spec-draft-ngl", env = "DRAFT_GPU_LAYERS", default_value = "all", value_parser = layers)]
    pub draft_gpu_layers: GpuLayers,
    /// Draft with the model's own draft layers (MTP, NextN), if its file has some
    #[arg(long, env = "MTP", default_value = "auto")]
    pub mtp: OwnLayers,
    /// Draft by copying what followed earlier occurrences of the last tokens: in the request's own
    /// text, or also in recent answers (to the same API key, if keys are set)
    #[arg(long, env = "TEXT_DRAFTS", default_value = "shared")]
    pub text_drafts: TextSource,
    /// Tokens of recent answers to keep for text drafts; 20 bytes each
    #[arg(long, env = "SHARED_TEXT", default_value_t = 1 << 16, value_parser = between(64, 1 << 28))]
    pub shared_text: usize,
    /// Maximum tokens a sequence can gain in one step, including the model's own choice
    /// [default: 33 with text drafts, else one more than heads or DRAFT_MAX]
    #[arg(long = "medusa-max-tokens-per-step", env = "MEDUSA_MAX_TOKENS_PER_STEP", value_name = "MEDUSA_MAX_TOKENS_PER_STEP", value_parser = between(1, 64))]
    pub max_tokens_per_step: Option<usize>,
}

/// Where text drafts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TextSource {
    /// The request's own text and recent answers
    Shared,
    /// The request's own text: its prompt and its answer so far
    Own,
    /// No text drafts
    Off,
}

/// Whether a model's own draft layers draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OwnLayers {
    /// If there are some, and no draft model is named
    Auto,
    /// There must be some
    On,
    /// They are not loaded
    Off,
}

/// Where the sources of drafts are.
#[derive(Default)]
pub(crate) struct DraftFiles {
    /// The heads' folder, if there are any.
    pub heads: Option<PathBuf>,
    /// The draft model's GGUF file, if there is one.
    pub model: Option<PathBuf>,
}

impl DraftArgs {
    /// Parameters of the draft sources, of which some are files; `None` without any. `placement` is
    /// the model's.
    pub(crate) fn params(&self, files: DraftFiles, placement: &Placement) -> Option<DraftParams> {
        let n_shared_text = match self.text_drafts {
            TextSource::Shared => Some(self.shared_text),
            TextSource::Own => Some(0),
            TextSource::Off => None,
        };
        let heads = files.heads.map(|folder| HeadsParams { folder, n_heads: self.k_heads });
        let model = files.model.map(|path| DraftModelParams {
            path,
            placement: Placement {
                n_gpu_layers: match self.draft_gpu_layers {
                    GpuLayers::Auto => GpuLayers::ALL,
                    layers => layers,
                },
                main_gpu: placement.main_gpu,
                load: placement.load,
                lock: placement.lock,
                no_repack: placement.no_repack,
                ..Placement::default()
            },
            n_cells: self.draft_ctx,
            max_depth: self.draft_max,
        });
        let own_layers = (self.mtp != OwnLayers::Off && model.is_none()).then_some(LayersParams {
            n_cells: self.draft_ctx,
            max_depth: self.draft_max,
            is_needed: self.mtp == OwnLayers::On,
        });
        let max_tokens_per_step = self.max_tokens_per_step;
        let any = heads.is_some()
            || model.is_some()
            || n_shared_text.is_some()
            || self.mtp == OwnLayers::On;
        any.then_some(DraftParams {
            heads,
            model,
            own_layers,
            n_shared_text,
            max_tokens_per_step,
            ..DraftParams::default()
        })
    }
}
