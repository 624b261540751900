//! How positions are rotated (RoPE): what to change of a model's own settings.

use super::model::Model;
use super::sys;

/// Changes of a model's rotation; what is `None` is as the model's file says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rope {
    /// How positions beyond those of the training are mapped to them.
    pub scaling: Option<RopeScaling>,
    /// Base of the frequencies; above 0.
    pub freq_base: Option<f32>,
    /// Factor of the frequencies, above 0: 0.5 for twice the context.
    pub freq_scale: Option<f32>,
    /// YaRN: tokens of the context before it is extended.
    pub yarn_orig_ctx: Option<u32>,
    /// YaRN: share of extrapolation, from 0, which is interpolation alone, to 1.
    pub yarn_ext_factor: Option<f32>,
    /// YaRN: factor of the attention's magnitude.
    pub yarn_attn_factor: Option<f32>,
    /// YaRN: rotations over the original context below which a dimension is interpolated.
    pub yarn_beta_slow: Option<f32>,
    /// YaRN: rotations over the original context above which a dimension is left alone.
    pub yarn_beta_fast: Option<f32>,
}

/// How a context is extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RopeScaling {
    /// Not at all
    None,
    /// All frequencies are scaled
    Linear,
    /// Low frequencies are scaled
    Yarn,
}

impl Rope {
    pub(super) fn set(&self, c: &mut sys::context_params) {
        c.rope_scaling_type = match self.scaling {
            None => sys::LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
            Some(RopeScaling::None) => sys::LLAMA_ROPE_SCALING_TYPE_NONE,
            Some(RopeScaling::Linear) => sys::LLAMA_ROPE_SCALING_TYPE_LINEAR,
            Some(RopeScaling::Yarn) => sys::LLAMA_ROPE_SCALING_TYPE_YARN,
        };
        c.yarn_orig_ctx = self.yarn_orig_ctx.unwrap_or(c.yarn_orig_ctx);
        for (named, value) in [
            (self.freq_base, &mut c.rope_freq_base),
            (self.freq_scale, &mut c.rope_freq_scale),
            (self.yarn_ext_factor, &mut c.yarn_ext_factor),
            (self.yarn_attn_factor, &mut c.yarn_attn_factor),
            (self.yarn_beta_slow, &mut c.yarn_beta_slow),
            (self.yarn_beta_fast, &mut c.yarn_beta_fast),
        ] {
            *value = named.unwrap_or(*value);
        }
    }

    /// The longest context of a model, in tokens: what it was trained for, extended by the scale.
    #[must_use]
    pub fn n_ctx(&self, model: &Model) -> usize {
        self.scaled(model.n_ctx_train(), model.n_ctx_before(), model.rope_freq_scale())
    }

    /// The longest context of a model trained for `n_ctx` tokens. If it has scaled its frequencies by
    /// a `scale` below 1, these are more than the `n_before` tokens that it was trained for at first.
    fn scaled(&self, n_ctx: usize, n_before: Option<usize>, scale: f32) -> usize {
        let freq_scale = match (self.scaling, self.freq_scale) {
            (Some(RopeScaling::None), _) => 1.0,
            (_, Some(named)) => named,
            (_, None) => return n_ctx,
        };
        let named = self.yarn_orig_ctx.map(|n| n as usize);
        let original = named.or(n_before.filter(|_| scale < 1.0)).map(|n| n as f64);
        let original = original.unwrap_or(n_ctx as f64 * f64::from(scale));
        // Rounded: 0.1 is a little more.
        ((original / f64::from(freq_scale)).round() as usize).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_extends_the_context_that_a_model_was_trained_for() {
        let by = |freq_scale: f32| Rope { freq_scale: Some(freq_scale), ..Rope::default() };
        let none = Rope { scaling: Some(RopeScaling::None), ..by(0.25) };
        let from = |n: u32| Rope { yarn_orig_ctx: Some(n), ..by(0.25) };
        for (rope, plain, extended) in [
            (Rope::default(), 4096, 16_384),
            (by(0.25), 16_384, 16_384),
            (by(0.1), 40_960, 40_960),
            (by(1.0), 4096, 4096),
            (none, 4096, 4096),
            (from(2048), 8192, 8192),
            (Rope { freq_scale: None, ..from(2048) }, 4096, 16_384),
        ] {
            assert_eq!(rope.scaled(4096, None, 1.0), plain, "{rope:?}");
            assert_eq!(rope.scaled(4096, Some(99), 1.0), plain, "extended otherwise: {rope:?}");
            // The same model, extended by four.
            assert_eq!(rope.scaled(16_384, Some(4096), 0.25), extended, "{rope:?}");
            assert_eq!(rope.scaled(16_384, None, 0.25), extended, "{rope:?}");
        }
    }
}
