//! Low-rank adapters (LoRA): products that are added to those of a model's weights.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use super::error::LlamaError;
use super::gguf::Gguf;
use super::loading::Loading;
use super::{log, sys};

/// A GGUF file with an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFile {
    /// The file.
    pub path: PathBuf,
    /// What its products are multiplied by, beside the scale that the file has: 1 as it was trained, 0
    /// for none.
    pub scale: f32,
}

/// An adapter of one model, which frees it first.
#[derive(Debug)]
pub(super) struct Adapter {
    ptr: NonNull<sys::adapter_lora>,
    path: PathBuf,
    scale: f32,
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // SAFETY: freed once, after the contexts that use it and before its model, which it is taken
        // out of.
        unsafe { sys::adapter_lora_free(self.ptr.as_ptr()) };
    }
}

impl Adapter {
    /// Reads an adapter for a model of this architecture.
    ///
    /// # Errors
    /// [`LlamaError::File`]: no adapter, one of another architecture or model, a file that is not whole.
    ///
    /// # Safety
    /// `model` is a loaded model that no other thread uses meanwhile, and that lives longer than the
    /// result.
    pub(super) unsafe fn read(
        model: NonNull<sys::llama_model>,
        architecture: &str,
        file: &AdapterFile,
    ) -> Result<Self, LlamaError> {
        let AdapterFile { path, scale } = file;
        let fail = |reason| LlamaError::File { action: "load", path: path.clone(), reason };
        std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
        let _loading = Loading::begin(path);
        check(&Gguf::open(path)?, architecture).map_err(fail)?;
        let c_path =
            CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))?;
        log::take_errors();
        // SAFETY: a model of which nothing else is used, and a zero-terminated path.
        let ptr = unsafe { sys::adapter_lora_init(model.as_ptr(), c_path.as_ptr()) };
        let ptr = NonNull::new(ptr)
            .ok_or_else(|| fail(log::take_errors().unwrap_or_else(|| "no reason given".into())))?;
        let adapter = Self { ptr, path: path.clone(), scale: *scale };
        // SAFETY: a live adapter.
        if unsafe { sys::adapter_get_alora_n_invocation_tokens(ptr.as_ptr()) } > 0 {
            return Err(fail("certain tokens are to switch it on, which is not supported".into()));
        }
        Ok(adapter)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets a context of the adapters' model compute with them.
    ///
    /// # Safety
    /// `context` is a live context of the adapters' model, and is freed before they are.
    pub(super) unsafe fn set(all: &[Self], context: NonNull<sys::llama_context>) {
        let mut adapters: Vec<_> = all.iter().map(|of| of.ptr.as_ptr()).collect();
        let mut scales: Vec<f32> = all.iter().map(|of| of.scale).collect();
        // SAFETY: by contract; equally many adapters and scales, which are copied. It returns 0.
        unsafe {
            sys::set_adapters_lora(
                context.as_ptr(),
                adapters.as_mut_ptr(),
                adapters.len(),
                scales.as_mut_ptr(),
            )
        };
    }
}

/// What llama.cpp does not check, or with less to say.
fn check(header: &Gguf, architecture: &str) -> Result<(), String> {
    let is = |key: &str, wanted: &str| match header.text(key).as_deref() {
        Some(text) if text == wanted => Ok(()),
        Some(text) => {
            Err(format!("it is no LoRA adapter of this model: {key} is {text}, not {wanted}"))
        }
        None => Err(format!("it is no LoRA adapter: it has no {key}")),
    };
    is("general.type", "adapter")?;
    is("adapter.type", "lora")?;
    is("general.architecture", architecture)?;
    let alpha = "adapter.lora.alpha";
    if header.is_no_float(alpha) {
        return Err(format!("{alpha} is no 32-bit float"));
    }
    Ok(())
}
