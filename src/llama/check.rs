//! What a file's header must say so that a model can be loaded and used: llama.cpp does not check
//! these, or by assertions, which end the process.

use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char};

use super::backend::text;
use super::gguf::Gguf;
use super::sys;

/// llama.cpp's `LLAMA_MAX_LAYERS`.
const MAX_LAYERS: u32 = 512;
/// Of the hidden state; the largest models have 2^14.
const MAX_WIDTH: u32 = 1 << 20;
/// The architecture whose attention knows no positions, and says so.
const ROTATES_NOTHING: &str = "glm5-next";
/// Of AVX-512.
const WKV_STEP: u32 = 16;

/// Checks a header.
///
/// # Errors
/// What no model can be made of, by its key.
pub(super) fn check(header: &Gguf) -> Result<(), String> {
    check_vocabulary(header)?;
    let Some(arch) = header.text("general.architecture") else { return Ok(()) }; // llama.cpp says so
    let number = |name: &str| header.number(&format!("{arch}.{name}"));
    // Recurrent models may have no attention at all.
    let fewest =
        u32::from(!["ssm.conv_kernel", "wkv.head_size"].map(number).iter().any(Option::is_some));
    for (name, least, most) in [
        ("block_count", 1, MAX_LAYERS),
        ("embedding_length", 1, MAX_WIDTH),
        ("context_length", 1, i32::MAX as u32),
        ("attention.head_count", fewest, MAX_WIDTH),
        ("attention.head_count_kv", fewest, MAX_WIDTH),
        ("attention.key_length", 1, MAX_WIDTH),
        ("attention.value_length", 1, MAX_WIDTH),
        // With 0 llama.cpp would rotate for ever.
        ("rope.dimension_count", u32::from(arch != ROTATES_NOTHING), MAX_WIDTH),
    ] {
        if let Some(n) = number(name).filter(|n| !(least..=most).contains(n)) {
            return Err(format!("{arch}.{name} is {n}; it must be from {least} to {most}"));
        }
    }
    // ggml's kernel computes so many values of a head at a time, and writes beyond a shorter one.
    if let Some(n) = number("wkv.head_size").filter(|n| n % WKV_STEP != 0) {
        return Err(format!("{arch}.wkv.head_size is {n}, not a multiple of {WKV_STEP}"));
    }
    let heads = number("attention.head_count").zip(number("attention.head_count_kv"));
    if let Some((n_head, n_head_kv)) = heads
        && n_head_kv > 0
        && n_head % n_head_kv != 0
    {
        return Err(format!(
            "{arch}.attention.head_count is {n_head}, not a multiple of head_count_kv, {n_head_kv}"
        ));
    }
    Ok(())
}

fn check_vocabulary(header: &Gguf) -> Result<(), String> {
    if let Some(kind) = header.text("tokenizer.ggml.model")
        && ["none", "no_vocab"].contains(&kind.as_str())
    {
        return Err(format!(
            "it has no vocabulary (tokenizer.ggml.model is {kind}), so it can neither read nor write text"
        ));
    }
    let key = "tokenizer.ggml.tokens";
    let mut seen = HashSet::new();
    match header.texts(key).find(|&token| !token.is_empty() && !seen.insert(token)) {
        Some(twice) => Err(format!("{key} has {:.40} twice", twice.to_string_lossy())),
        None => Ok(()),
    }
}

impl Gguf {
    /// A key's id, if its value is of this type.
    fn find(&self, key: &str, kind: sys::gguf_type) -> Option<i64> {
        let key = CString::new(key).ok()?;
        let gguf = self.0.as_ptr();
        // SAFETY: a live header and a zero-terminated key; -1 for none.
        let id = unsafe { sys::gguf_find_key(gguf, key.as_ptr()) };
        // SAFETY: a live header, and the id of one of its keys.
        (id >= 0 && unsafe { sys::gguf_get_kv_type(gguf, id) } == kind).then_some(id)
    }

    /// Whether a key is there whose value is no 32-bit float.
    pub(super) fn is_no_float(&self, key: &str) -> bool {
        let Ok(c_key) = CString::new(key) else { return false };
        // SAFETY: a live header and a zero-terminated key; -1 for none.
        let is_there = unsafe { sys::gguf_find_key(self.0.as_ptr(), c_key.as_ptr()) } >= 0;
        is_there && self.find(key, sys::GGUF_TYPE_FLOAT32).is_none()
    }

    /// A key's count.
    pub(super) fn number(&self, key: &str) -> Option<u32> {
        let id = self.find(key, sys::GGUF_TYPE_UINT32)?;
        // SAFETY: a live header, and the id of a key of this type.
        Some(unsafe { sys::gguf_get_val_u32(self.0.as_ptr(), id) })
    }

    /// A key's 16-bit count.
    pub(super) fn short(&self, key: &str) -> Option<u16> {
        let id = self.find(key, sys::GGUF_TYPE_UINT16)?;
        // SAFETY: a live header, and the id of a key of this type.
        Some(unsafe { sys::gguf_get_val_u16(self.0.as_ptr(), id) })
    }

    /// A key's text.
    pub(super) fn text(&self, key: &str) -> Option<String> {
        let id = self.find(key, sys::GGUF_TYPE_STRING)?;
        // SAFETY: a live header, and the id of a key of this type; the text is a part of it.
        Some(unsafe { text(sys::gguf_get_val_str(self.0.as_ptr(), id)) })
    }

    /// A key's texts, each up to its first zero byte; none for other types.
    fn texts(&self, key: &str) -> impl Iterator<Item = &CStr> {
        let gguf = self.0.as_ptr();
        let is_of_texts =
            // SAFETY: a live header, and the id of an array.
            |&id: &i64| unsafe { sys::gguf_get_arr_type(gguf, id) } == sys::GGUF_TYPE_STRING;
        let id = self.find(key, sys::GGUF_TYPE_ARRAY).filter(is_of_texts);
        // SAFETY: as above.
        let n = id.map_or(0, |id| unsafe { sys::gguf_get_arr_n(gguf, id) });
        (0..n).zip(id.into_iter().cycle()).map(move |(i, id)| {
            // SAFETY: a live header, the id of an array of texts, and an index in it.
            let text: *const c_char = unsafe { sys::gguf_get_arr_str(gguf, id, i) };
            // SAFETY: zero-terminated, and a part of the header, which `self` borrows.
            unsafe { CStr::from_ptr(text) }
        })
    }
}
