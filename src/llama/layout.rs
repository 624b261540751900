//! The tensors of a model that exists as metadata only, as llama.cpp's loader asks for them.

use std::ffi::c_void;
use std::ptr::NonNull;

use super::backend::{start_backend, text};
use super::error::LlamaError;
use super::tensor_type::TensorType;
use super::writer::{Meta, TensorInfo, header};
use super::{log, sys};

/// The tensors that llama.cpp's loader looks for in a file with this metadata, optional ones
/// included, each once and in the loader's order. All are F32, as nothing says otherwise.
///
/// llama.cpp reserves memory for all values and frees it, untouched, before this returns.
///
/// # Errors
/// [`LlamaError::Metadata`] for an unknown architecture, a missing key, or no memory. Where
/// llama.cpp asserts that keys fit each other, the process ends.
pub fn tensors_of(meta: &[(String, Meta)]) -> Result<Vec<TensorInfo>, LlamaError> {
    start_backend();
    let header = header(meta).map_err(LlamaError::Metadata)?;
    // SAFETY: no arguments; returns a struct by value.
    let mut c = unsafe { sys::model_default_params() };
    c.n_gpu_layers = 0;
    c.load_mtp = true;
    c.no_host = true; // one kind of memory: the loader lists tensors of each kind together
    let mut tensors: Vec<TensorInfo> = vec![];
    log::take_errors();
    // SAFETY: a live header; C uses the vector, which is not borrowed meanwhile, during the call
    // only.
    let model = unsafe {
        let to = (&raw mut tensors).cast::<c_void>();
        sys::model_init_from_user(header.0.as_ptr(), Some(on_tensor), to, c)
    };
    let model = NonNull::new(model)
        .ok_or_else(|| LlamaError::Metadata(log::take_errors().unwrap_or_default()))?;
    // SAFETY: just made, freed once.
    unsafe { sys::model_free(model.as_ptr()) };
    Ok(tensors)
}

/// Called by llama.cpp to fill a tensor in; several times for one that several layers use.
unsafe extern "C" fn on_tensor(tensor: *mut sys::ggml_tensor, to: *mut c_void) {
    // SAFETY: the vector of the call above, which nobody else refers to.
    let tensors = unsafe { &mut *to.cast::<Vec<TensorInfo>>() };
    // SAFETY: a live tensor.
    let tensor = unsafe { &*tensor };
    // SAFETY: zero-terminated, and a part of the tensor.
    let name = unsafe { text(tensor.name.as_ptr()) };
    if tensors.iter().all(|t| t.name != name) {
        let shape = tensor.ne.map(|n| usize::try_from(n).unwrap_or(0));
        tensors.push(TensorInfo { name, shape, kind: TensorType(tensor.type_) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(arch: &str, keys: &[(&str, u32)]) -> Vec<(String, Meta)> {
        let of_arch = |(key, n): &(&str, u32)| (format!("{arch}.{key}"), Meta::Number(*n));
        let mut meta: Vec<_> = keys.iter().map(of_arch).collect();
        let epsilon = format!("{arch}.attention.layer_norm_rms_epsilon");
        meta.extend([
            ("general.architecture".to_owned(), Meta::Text(arch.into())),
            (epsilon, Meta::Float(1e-5)),
            ("tokenizer.ggml.model".to_owned(), Meta::Text("none".into())),
        ]);
        meta
    }

    const SIZES: [(&str, u32); 8] = [
        ("vocab_size", 96),
        ("context_length", 128),
        ("embedding_length", 64),
        ("block_count", 2),
        ("expert_count", 4),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", 32),
        ("attention.head_count", 4),
    ];

    #[test]
    fn llama_cpp_lists_tensors_with_their_shapes() {
        let tensors = tensors_of(&meta("qwen3moe", &SIZES)).unwrap();
        let shape = |name: &str| tensors.iter().find(|t| t.name == name).map(|t| t.shape);
        assert_eq!(shape("token_embd.weight"), Some([64, 96, 1, 1]));
        assert_eq!(shape("blk.1.ffn_down_exps.weight"), Some([32, 64, 4, 1]));
        assert_eq!(shape("blk.2.ffn_down_exps.weight"), None);
        assert!(tensors.iter().all(|t| t.kind == TensorType::F32));
    }

    #[test]
    fn metadata_of_no_model_is_refused() {
        let refused = |meta: &[(String, Meta)], why: &str| match tensors_of(meta) {
            Err(LlamaError::Metadata(reason)) => assert!(reason.contains(why), "{reason}"),
            other => panic!("{other:?}"),
        };
        refused(&meta("qwen9", &SIZES), "unknown model architecture");
        refused(&meta("qwen3moe", &SIZES[..2]), "qwen3moe.embedding_length");
        refused(&[(String::new(), Meta::Number(1))], "cannot be set");
    }
}
