//! Types of cached keys and values.

use super::sys;

/// The type of the keys, or of the values, in a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheType {
    /// ggml's name for it.
    pub name: &'static str,
    pub(super) number: sys::ggml_type,
}

/// Those that a cache can be written in, as llama.cpp lists them.
const TYPES: [CacheType; 9] = [
    CacheType { name: "f32", number: sys::GGML_TYPE_F32 },
    CacheType { name: "f16", number: sys::GGML_TYPE_F16 },
    CacheType { name: "bf16", number: sys::GGML_TYPE_BF16 },
    CacheType { name: "q8_0", number: sys::GGML_TYPE_Q8_0 },
    CacheType { name: "q5_1", number: sys::GGML_TYPE_Q5_1 },
    CacheType { name: "q5_0", number: sys::GGML_TYPE_Q5_0 },
    CacheType { name: "q4_1", number: sys::GGML_TYPE_Q4_1 },
    CacheType { name: "q4_0", number: sys::GGML_TYPE_Q4_0 },
    CacheType { name: "iq4_nl", number: sys::GGML_TYPE_IQ4_NL },
];

impl CacheType {
    /// Half precision.
    pub const F16: Self = TYPES[1];

    /// The type with this name, in any case.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        TYPES.into_iter().find(|t| t.name.eq_ignore_ascii_case(name))
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TYPES.iter().map(|t| t.name)
    }
}

/// The types of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTypes {
    /// Of the keys.
    pub keys: CacheType,
    /// Of the values.
    pub values: CacheType,
}

impl Default for CacheTypes {
    /// Half precision.
    fn default() -> Self {
        Self { keys: CacheType::F16, values: CacheType::F16 }
    }
}
