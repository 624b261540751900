//! A model's own draft layers, which llama.cpp calls NextN and others MTP: appended to the model's layers,
//! they foresee a token from the state of the one before it and the token that was chosen there.

use super::context::Context;
use super::error::LlamaError;
use super::model::Model;
use super::sys;

/// The bindings of `vendor/nextn`.
#[allow(non_camel_case_types, missing_docs, unsafe_op_in_unsafe_fn, clippy::all)]
mod c {
    include!(concat!(env!("OUT_DIR"), "/nextn_bindings.rs"));
}

/// Architectures whose draft layers llama.cpp computes over a cache of keys and values, and that can be
/// taken back after a draft. It knows more that have such layers.
const ARCHITECTURES: [&str; 8] =
    ["cohere2moe", "glm4moe", "hy_v3", "mimo2", "nemotron_h_moe", "qwen35", "qwen35moe", "step35"];

impl Model {
    /// Whether layers that draft are [loaded](super::Placement::draft_layers), and can be computed.
    #[must_use]
    pub fn has_draft_layers(&self) -> bool {
        // SAFETY: a loaded model.
        let n = unsafe { sys::model_n_layer_nextn(self.as_ptr()) };
        n > 0
            && self.loads_draft_layers()
            && ARCHITECTURES.contains(&self.architecture().as_str())
            && self.has_tensor(&format!("blk.{}.nextn.eh_proj.weight", self.n_layers()))
    }
}

impl Context {
    /// Keeps states for draft layers, from the next pass on: as the context of these layers, or of those
    /// before them.
    pub(super) fn keep_states(&mut self, is_drafting: bool) {
        // SAFETY: a live context.
        unsafe { c::medusa_nextn_keep(self.as_ptr().cast_mut().cast(), is_drafting) };
    }

    /// What draft layers continue from after a row of the last batch: `n_embd` values. Of a context
    /// that keeps [states](super::ContextParams::keeps_states) for any row, of one of [draft
    /// layers](super::ContextParams::of_draft_layers) for those with outputs.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for any other row.
    pub fn state(&self, row: usize) -> Result<&[f32], LlamaError> {
        let fail = || LlamaError::Misuse(format!("row {row} has no state to draft from"));
        if row >= self.n_rows() || !self.has_states() {
            return Err(fail());
        }
        // SAFETY: a live context that keeps states, and a row of its last batch.
        let ptr = unsafe { c::medusa_nextn_row(self.as_ptr().cast_mut().cast(), row as i32) };
        if ptr.is_null() {
            return Err(fail());
        }
        // SAFETY: `n_embd` values, untouched until the next forward pass, which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(ptr, self.model().n_embd()) })
    }
}
