//! Types of cached keys and values.

use super::sys;
use super::tensor_type::TensorType;

/// The types of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTypes {
    /// Of the keys.
    pub keys: TensorType,
    /// Of the values.
    pub values: TensorType,
}

impl CacheTypes {
    /// Those that a cache can be written in, as llama.cpp lists them.
    pub const ALL: [TensorType; 9] = [
        TensorType::F32,
        TensorType::F16,
        TensorType(sys::GGML_TYPE_BF16),
        TensorType(sys::GGML_TYPE_Q8_0),
        TensorType(sys::GGML_TYPE_Q5_1),
        TensorType(sys::GGML_TYPE_Q5_0),
        TensorType(sys::GGML_TYPE_Q4_1),
        TensorType(sys::GGML_TYPE_Q4_0),
        TensorType(sys::GGML_TYPE_IQ4_NL),
    ];

    /// The type with this name of ggml's, in any case.
    #[must_use]
    pub fn by_name(name: &str) -> Option<TensorType> {
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name))
    }
}

impl Default for CacheTypes {
    /// Half precision.
    fn default() -> Self {
        Self { keys: TensorType::F16, values: TensorType::F16 }
    }
}
