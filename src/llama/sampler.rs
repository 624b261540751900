//! llama.cpp's samplers that change logits: bias and penalties. `engine::filter` and
//! `engine::sampler` filter and draw: speculation changes no text only if draws are keyed by
//! position.

use std::ptr::NonNull;

use super::error::LlamaError;
use super::ids::Token;
use super::sys;

/// A chain of filters, applied in the order they were added; [`LlamaError::Sampler`] names one with
/// invalid parameters.
pub struct SamplerChain {
    ptr: NonNull<sys::sampler>,
    n_vocab: i32,
}

// SAFETY: a chain owns its samplers, which share nothing with other chains.
unsafe impl Send for SamplerChain {}

impl Drop for SamplerChain {
    fn drop(&mut self) {
        // SAFETY: the chain is freed once, and frees its samplers.
        unsafe { sys::sampler_free(self.ptr.as_ptr()) };
    }
}

impl SamplerChain {
    /// An empty chain for rows of `n_vocab` logits.
    ///
    /// # Panics
    /// For a vocabulary of over 2^31 tokens or without memory.
    #[must_use]
    pub fn new(n_vocab: usize) -> Self {
        // SAFETY: takes and returns values.
        let ptr = unsafe { sys::sampler_chain_init(sys::sampler_chain_params { no_perf: true }) };
        let n_vocab = i32::try_from(n_vocab).expect("token ids are 32-bit");
        Self {
            ptr: NonNull::new(ptr).expect("llama.cpp throws instead of returning null"),
            n_vocab,
        }
    }

    fn push(self, name: &'static str, sampler: *mut sys::sampler) -> Result<Self, LlamaError> {
        if sampler.is_null() {
            return Err(LlamaError::Sampler(name));
        }
        // SAFETY: both are live; the chain takes ownership of the sampler.
        unsafe { sys::sampler_chain_add(self.ptr.as_ptr(), sampler) };
        Ok(self)
    }

    /// Adds `bias` to the logits of single tokens.
    pub fn logit_bias(self, bias: &[(Token, f32)]) -> Result<Self, LlamaError> {
        if bias.iter().any(|(t, _)| !(0..self.n_vocab).contains(&t.0)) {
            return Err(LlamaError::Sampler("logit_bias"));
        }
        let c: Vec<_> =
            bias.iter().map(|&(t, bias)| sys::logit_bias { token: t.0, bias }).collect();
        let n = i32::try_from(c.len()).map_err(|_| LlamaError::Sampler("logit_bias"))?;
        // SAFETY: `n` entries are readable; C copies them.
        let sampler = unsafe { sys::sampler_init_logit_bias(self.n_vocab, n, c.as_ptr()) };
        self.push("logit_bias", sampler)
    }

    /// Makes tokens among the last `last_n` accepted less likely: `repeat` divides positive logits
    /// and multiplies negative ones (1 is off), `frequency` is subtracted per occurrence,
    /// `presence` once (0 is off). All must be finite, and `repeat` positive.
    pub fn penalties(
        self,
        last_n: usize,
        repeat: f32,
        frequency: f32,
        presence: f32,
    ) -> Result<Self, LlamaError> {
        let sound = repeat > 0.0 && [repeat, frequency, presence].iter().all(|v| v.is_finite());
        let last_n = i32::try_from(last_n).ok().filter(|_| sound);
        let last_n = last_n.ok_or(LlamaError::Sampler("penalties"))?;
        // SAFETY: values only, in the range that C asks for.
        let sampler = unsafe {
            sys::sampler_init_penalties(self.n_vocab, last_n, repeat, frequency, presence)
        };
        self.push("penalties", sampler)
    }

    /// Adds a token to the history that penalties look at.
    pub fn accept(&mut self, token: Token) {
        if (0..self.n_vocab).contains(&token.0) {
            // SAFETY: a live chain, and a token of its vocabulary.
            unsafe { sys::sampler_accept(self.ptr.as_ptr(), token.0) };
        }
    }
}

/// Working memory for one row of candidates, reused for each row.
#[derive(Default)]
pub struct Candidates {
    data: Vec<sys::token_data>,
}

impl Candidates {
    /// Runs a row of logits through the chain. Returns the remaining tokens with their logits, in
    /// ascending order of token id: that order does not depend on rounding, so neither does the token
    /// that a given random number selects.
    ///
    /// # Panics
    /// When the row is not as long as the chain's vocabulary.
    pub fn filter(
        &mut self,
        chain: &mut SamplerChain,
        logits: &[f32],
    ) -> impl ExactSizeIterator<Item = (Token, f32)> + Clone {
        assert_eq!(logits.len(), chain.n_vocab as usize, "one logit per token");
        self.data.clear();
        self.data.extend(logits.iter().zip(0..).map(|(&logit, id)| sys::token_data {
            id,
            logit,
            p: 0.0,
        }));
        let mut array = sys::token_data_array {
            data: self.data.as_mut_ptr(),
            size: self.data.len(),
            selected: -1,
            sorted: false,
        };
        // SAFETY: `array` describes our buffer; samplers permute it, shorten it, or point `data` to
        // memory of the chain.
        unsafe { sys::sampler_apply(chain.ptr.as_ptr(), &raw mut array) };
        let kept = array.size.min(self.data.len());
        if array.data != self.data.as_mut_ptr() {
            // SAFETY: `size` entries, in memory of the chain, unchanged until it is applied again, or
            // farther on in our buffer: they may overlap their place.
            unsafe { std::ptr::copy(array.data, self.data.as_mut_ptr(), kept) };
        }
        self.data.truncate(kept);
        if !self.data.is_sorted_by_key(|d| d.id) {
            self.data.sort_unstable_by_key(|d| d.id);
        }
        self.data.iter().map(|d| (Token(d.id), d.logit))
    }
}

/// llama.cpp's own filters, which ours are compared with.
#[cfg(test)]
impl SamplerChain {
    /// Adds those that `filter` asks for, in llama.cpp's default order; XTC always excludes.
    pub(crate) fn filters(self, filter: &crate::engine::filter::Filter) -> Self {
        let top_k = i32::try_from(filter.top_k).unwrap();
        // SAFETY: values only. The chain takes ownership of each.
        let all = unsafe {
            [
                sys::sampler_init_top_n_sigma(filter.top_n_sigma),
                sys::sampler_init_top_k(top_k),
                sys::sampler_init_typical(filter.typical_p, 0),
                sys::sampler_init_top_p(filter.top_p, 0),
                sys::sampler_init_min_p(filter.min_p, 0),
                sys::sampler_init_xtc(
                    filter.xtc.map_or(0.0, |_| 1.0),
                    filter.xtc.unwrap_or(0.0),
                    0,
                    1,
                ),
                sys::sampler_init_temp(filter.temperature),
            ]
        };
        all.into_iter().fold(self, |chain, sampler| chain.push("reference", sampler).unwrap())
    }

    /// Adds DRY.
    pub(crate) fn dry(self, model: &super::Model, params: &crate::request::DryParams) -> Self {
        let strings = params.breakers.iter().map(|s| std::ffi::CString::new(s.as_str()).unwrap());
        let strings: Vec<_> = strings.collect();
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        let [allowed, last_n] =
            [params.allowed_length, params.last_n].map(|n| i32::try_from(n).unwrap());
        // SAFETY: the vocabulary is the model's; C copies the strings, which are zero-terminated.
        let sampler = unsafe {
            sys::sampler_init_dry(
                sys::model_get_vocab(model.as_ptr()),
                params.multiplier,
                params.base,
                allowed,
                last_n,
                pointers.as_mut_ptr(),
                pointers.len(),
            )
        };
        self.push("dry", sampler).unwrap()
    }
}
