//! Quantizes GGUF files with llama.cpp's own quantizer.

use std::ffi::CString;
use std::ops::Range;
use std::path::Path;

use super::backend::start_backend;
use super::error::LlamaError;
use super::shards::model_files;
use super::{log, sys};

/// The type that most of a file's tensors get. llama.cpp keeps some tensors finer, and rows that are
/// not a multiple of a block get a similar type that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// llama.cpp's name for it.
    pub name: &'static str,
    /// llama.cpp's number for it, `general.file_type` in a file.
    pub file_type: u32,
}

/// All types that need no importance matrix, from the fewest bits per value to the most.
const TYPES: [Quantization; 16] = [
    Quantization { name: "Q2_K", file_type: sys::LLAMA_FTYPE_MOSTLY_Q2_K },
    Quantization { name: "Q3_K_S", file_type: sys::LLAMA_FTYPE_MOSTLY_Q3_K_S },
    Quantization { name: "Q3_K_M", file_type: sys::LLAMA_FTYPE_MOSTLY_Q3_K_M },
    Quantization { name: "IQ4_XS", file_type: sys::LLAMA_FTYPE_MOSTLY_IQ4_XS },
    Quantization { name: "IQ4_NL", file_type: sys::LLAMA_FTYPE_MOSTLY_IQ4_NL },
    Quantization { name: "Q4_0", file_type: sys::LLAMA_FTYPE_MOSTLY_Q4_0 },
    Quantization { name: "Q4_1", file_type: sys::LLAMA_FTYPE_MOSTLY_Q4_1 },
    Quantization { name: "Q4_K_S", file_type: sys::LLAMA_FTYPE_MOSTLY_Q4_K_S },
    Quantization { name: "Q4_K_M", file_type: sys::LLAMA_FTYPE_MOSTLY_Q4_K_M },
    Quantization { name: "Q5_0", file_type: sys::LLAMA_FTYPE_MOSTLY_Q5_0 },
    Quantization { name: "Q5_1", file_type: sys::LLAMA_FTYPE_MOSTLY_Q5_1 },
    Quantization { name: "Q5_K_M", file_type: sys::LLAMA_FTYPE_MOSTLY_Q5_K_M },
    Quantization { name: "Q6_K", file_type: sys::LLAMA_FTYPE_MOSTLY_Q6_K },
    Quantization { name: "Q8_0", file_type: sys::LLAMA_FTYPE_MOSTLY_Q8_0 },
    Quantization { name: "F16", file_type: sys::LLAMA_FTYPE_MOSTLY_F16 },
    Quantization { name: "BF16", file_type: sys::LLAMA_FTYPE_MOSTLY_BF16 },
];

impl Quantization {
    /// The type with this name of llama.cpp's, in any case.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        TYPES.into_iter().find(|t| t.name.eq_ignore_ascii_case(name))
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TYPES.iter().map(|t| t.name)
    }
}

/// Writes `from` to `to` in another quantization. A quantized file can be quantized again, which
/// loses more than starting from F16.
///
/// # Errors
/// [`LlamaError::File`] with llama.cpp's reason; `to` may then hold part of a file.
pub fn quantize(
    from: &Path,
    to: &Path,
    kind: Quantization,
    n_threads: usize,
) -> Result<(), LlamaError> {
    convert(from, to, Some(kind), 0..0, n_threads)
}

/// Writes `from` to `to` without the layers of `left_out`, in another quantization or, for `None`, as
/// it is.
///
/// # Errors
/// As [`quantize`].
pub fn convert(
    from: &Path,
    to: &Path,
    kind: Option<Quantization>,
    left_out: Range<usize>,
    n_threads: usize,
) -> Result<(), LlamaError> {
    start_backend();
    let fail =
        |reason: String| LlamaError::File { action: "quantize", path: from.to_owned(), reason };
    let files = model_files(from)?; // of which llama.cpp finds all by the first
    let c_path = |path: &Path| {
        CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))
    };
    let (c_from, c_to) = (c_path(&files[0])?, c_path(to)?);
    // SAFETY: no arguments; returns a struct by value.
    let mut params = unsafe { sys::model_quantize_default_params() };
    params.nthread = i32::try_from(n_threads).unwrap_or(1);
    match kind {
        Some(kind) => (params.ftype, params.allow_requantize) = (kind.file_type, true),
        None => params.only_copy = true,
    }
    // C's list ends with -1.
    let left_out: Vec<i32> = left_out.map(|layer| layer as i32).chain([-1]).collect();
    if left_out.len() > 1 {
        params.prune_layers = left_out.as_ptr();
    }
    log::take_errors();
    // SAFETY: zero-terminated paths and a list, and parameters, that outlive the call.
    let code = unsafe { sys::model_quantize(c_from.as_ptr(), c_to.as_ptr(), &raw const params) };
    if code == 0 {
        return Ok(());
    }
    Err(fail(
        log::take_errors().unwrap_or_else(|| format!("llama.cpp's quantizer returned {code}")),
    ))
}
