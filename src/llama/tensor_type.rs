//! Types of tensors' values.

use std::ffi::c_void;

use super::backend::text;
use super::error::LlamaError;
use super::sys;

/// One of ggml's types. Values are stored in blocks, and a row consists of whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorType(pub(super) sys::ggml_type);

impl TensorType {
    /// Floats.
    pub const F32: Self = Self(sys::GGML_TYPE_F32);
    /// Half floats.
    pub const F16: Self = Self(sys::GGML_TYPE_F16);

    /// Values per block.
    #[must_use]
    pub fn block(self) -> usize {
        // SAFETY: one of ggml's types, by the constants or from a header that ggml has checked.
        usize::try_from(unsafe { sys::ggml_blck_size(self.0) }).unwrap_or(1).max(1)
    }

    /// Bytes of `n` values, in whole blocks.
    #[must_use]
    pub fn bytes(self, n: usize) -> usize {
        // SAFETY: as above.
        n / self.block() * unsafe { sys::ggml_type_size(self.0) }
    }

    /// ggml's name for it.
    #[must_use]
    pub fn name(self) -> String {
        // SAFETY: as above; the name is a constant.
        unsafe { text(sys::ggml_type_name(self.0)) }
    }

    /// Converts values to this type.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for values that are not whole blocks, or a type that needs an
    /// importance matrix.
    pub fn store(self, values: &[f32]) -> Result<Vec<u8>, LlamaError> {
        // SAFETY: one of ggml's types.
        let needs_more = unsafe { sys::ggml_quantize_requires_imatrix(self.0) };
        if values.is_empty() || !values.len().is_multiple_of(self.block()) || needs_more {
            let (n, name) = (values.len(), self.name());
            return Err(LlamaError::Misuse(format!("{n} values cannot be stored as {name}")));
        }
        let mut bytes = vec![0u8; self.bytes(values.len())];
        let (to, n) = (bytes.as_mut_ptr().cast::<c_void>(), values.len() as i64);
        // SAFETY: one row of `n` values, whole blocks, and as many bytes as they take; no importance
        // matrix is needed.
        unsafe { sys::ggml_quantize_chunk(self.0, values.as_ptr(), to, 0, 1, n, std::ptr::null()) };
        Ok(bytes)
    }
}
