//! A loaded model: its engine, and what follows from it for requests.

use std::sync::{Arc, OnceLock};

use crate::chat::{Template, Vocabulary};
use crate::engine::{Handle, Layout};
use crate::llama::Model;

/// A model that answers.
pub struct Loaded {
    /// What clients call it.
    pub id: Arc<str>,
    /// Its engine.
    pub handle: Handle,
    /// The source of the chat template, if it is not the model's own.
    own_template: Option<String>,
    /// The chat template, read at the first chat; or why there is none.
    template: OnceLock<Result<Template, String>>,
}

impl Loaded {
    pub(super) fn new(id: &str, handle: Handle, own_template: Option<String>) -> Self {
        Self { id: id.into(), handle, own_template, template: OnceLock::new() }
    }

    /// The model's weights and vocabulary.
    pub fn model(&self) -> &Arc<Model> {
        &self.handle.model
    }

    /// Tokens of a context.
    pub fn n_ctx(&self) -> usize {
        self.handle.limits.n_ctx
    }

    /// The source of the chat template; empty without one.
    pub fn template_source(&self) -> String {
        let own = self.own_template.clone();
        own.or_else(|| self.model().chat_template()).unwrap_or_default()
    }

    /// The chat template, or why there is none.
    pub fn template(&self) -> &Result<Template, String> {
        self.template.get_or_init(|| match &self.own_template {
            Some(source) => Template::new(source.clone(), Vocabulary::of(self.model())),
            None => Template::of(self.model()),
        })
    }

    /// Logs the model and its limits.
    pub(super) fn announce(&self) {
        let (model, limits) = (self.model(), self.handle.limits);
        let kv = match limits.layout {
            Layout::Unified { n_cells, .. } => format!("unified, {n_cells} cells"),
            Layout::States { n_cells, n_seqs, window: 0, .. } => {
                format!("unified, {n_cells} cells, {n_seqs} states")
            }
            Layout::States { n_cells, n_seqs, window, .. } => {
                format!("unified, {n_cells} cells, {n_seqs} windows of {window}")
            }
            Layout::Streams { n_cells } => format!("{} streams of {n_cells} cells", limits.n_slots),
        };
        tracing::info!(
            "ready: {} ({}, {}), context {}, {} slots, KV {kv}, drafts: {}",
            model.name().unwrap_or_else(|| "unnamed model".into()),
            model.architecture(),
            model.quantization(),
            limits.n_ctx,
            limits.n_slots,
            self.handle.draft_shape.name(),
        );
        let n_trained = self.handle.n_ctx_trained;
        if limits.n_ctx > n_trained {
            tracing::warn!(
                "MODEL_CONTEXT_SIZE {} exceeds the {n_trained} tokens the model was trained with",
                limits.n_ctx,
            );
        }
    }
}
