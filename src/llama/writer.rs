//! GGUF files in the making: ggml writes the metadata and what tensors follow; their values are the
//! caller's to append.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::ptr::NonNull;

use super::gguf::Gguf;
use super::{LlamaError, log, start_backend, sys, text};

/// How a tensor's values are stored: one of ggml's types. Values stand in blocks, and a row has
/// whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorType(pub(super) sys::ggml_type);

impl TensorType {
    /// Floats.
    pub const F32: Self = Self(sys::GGML_TYPE_F32);
    /// Half floats.
    pub const F16: Self = Self(sys::GGML_TYPE_F16);

    /// Values of a block.
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

    /// Values as they are stored.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for values that are no whole blocks, or a type that needs an
    /// importance matrix.
    pub fn store(self, values: &[f32]) -> Result<Vec<u8>, LlamaError> {
        // SAFETY: one of ggml's types.
        let needs_more = unsafe { sys::ggml_quantize_requires_imatrix(self.0) };
        if values.is_empty() || !values.len().is_multiple_of(self.block()) || needs_more {
            return Err(LlamaError::Misuse(format!(
                "{} values cannot be stored as {}",
                values.len(),
                self.name()
            )));
        }
        let mut bytes = vec![0u8; self.bytes(values.len())];
        let (to, n) = (bytes.as_mut_ptr().cast::<c_void>(), values.len() as i64);
        // SAFETY: one row of `n` values, whole blocks, and room for as many bytes as they take; no
        // importance matrix is needed.
        unsafe { sys::ggml_quantize_chunk(self.0, values.as_ptr(), to, 0, 1, n, std::ptr::null()) };
        Ok(bytes)
    }
}

/// A tensor to come: a matrix, or with one row a vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// By which llama.cpp finds it.
    pub name: String,
    /// Values of a row.
    pub n_in: usize,
    /// Rows.
    pub n_out: usize,
    /// How they are stored.
    pub kind: TensorType,
}

impl TensorInfo {
    /// Bytes of all values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.n_out * self.kind.bytes(self.n_in)
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Meta {
    /// A string.
    Text(String),
    /// A count, or an id.
    Number(u32),
    /// A float.
    Float(f32),
    /// Strings.
    Texts(Vec<String>),
    /// Floats.
    Floats(Vec<f32>),
    /// Whole numbers.
    Numbers(Vec<i32>),
}

/// Each tensor's values begin at a multiple of so many bytes behind the header, which ends at one.
pub const ALIGNMENT: usize = 32; // GGUF's default, and no header of ours says another

/// Writes a file's header: metadata, and what tensors follow. The tensors' values must be appended
/// in this order, each padded with zeros to a multiple of [`ALIGNMENT`].
///
/// # Errors
/// [`LlamaError::Write`] for a name that is given twice or is too long, a row that is not whole
/// blocks, or a file that cannot be written.
pub fn write_header(
    path: &Path,
    meta: &[(&str, Meta)],
    tensors: &[TensorInfo],
) -> Result<(), LlamaError> {
    start_backend();
    let fail = |reason: String| LlamaError::Write { path: path.to_owned(), reason };
    let c_path =
        CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))?;
    // SAFETY: no arguments; null without memory.
    let header =
        NonNull::new(unsafe { sys::gguf_init_empty() }).ok_or_else(|| fail("no memory".into()))?;
    let header = Gguf(header);
    meta.iter().try_for_each(|(key, value)| set(&header, key, value)).map_err(&fail)?;
    let shapes = Shapes::new(tensors.len()).ok_or_else(|| fail("no memory".into()))?;
    let mut names = BTreeSet::new();
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(fail(format!("{} is named twice", tensor.name)));
        }
        let tensor = shapes.tensor(tensor).map_err(&fail)?;
        // SAFETY: a live header and tensor; the header copies it, and no other has its name.
        unsafe { sys::gguf_add_tensor(header.0.as_ptr(), tensor.as_ptr()) };
    }
    log::take_last_error();
    // SAFETY: a live header and a zero-terminated path; tensors' data is not looked at.
    if unsafe { sys::gguf_write_to_file(header.0.as_ptr(), c_path.as_ptr(), true) } {
        return Ok(());
    }
    Err(fail(log::take_last_error().unwrap_or_else(|| "it cannot be written".into())))
}

/// The names of a file's tensors and how each is stored.
///
/// # Errors
/// [`LlamaError::Load`] when the file is no GGUF.
pub fn tensor_types(path: &Path) -> Result<Vec<(String, TensorType)>, LlamaError> {
    let header = Gguf::open(path)?;
    let gguf = header.0.as_ptr();
    // SAFETY: a live header.
    let n = unsafe { sys::gguf_get_n_tensors(gguf) };
    // SAFETY: a live header and the id of one of its tensors; the name is a part of it.
    let of = |id| unsafe {
        (text(sys::gguf_get_tensor_name(gguf, id)), TensorType(sys::gguf_get_tensor_type(gguf, id)))
    };
    Ok((0..n).map(of).collect())
}

/// Puts a value into a header.
fn set(header: &Gguf, key: &str, value: &Meta) -> Result<(), String> {
    let c_text = |text: &str| CString::new(text).map_err(|_| format!("{key}: holds a zero byte"));
    let (gguf, name) = (header.0.as_ptr(), c_text(key)?);
    let name = name.as_ptr();
    // ggml stops the process for a key without a letter, and for an alignment that is no power of
    // two.
    if key.is_empty() || key == "general.alignment" {
        return Err(format!("{key:?} is no key to be set"));
    }
    let array = |kind: sys::gguf_type, data: *const c_void, n: usize| {
        // SAFETY: a live header, a zero-terminated key, and `n` values of the type, which are
        // copied.
        unsafe { sys::gguf_set_arr_data(gguf, name, kind, data, n) };
    };
    match value {
        Meta::Text(text) => {
            let text = c_text(text)?;
            // SAFETY: a live header, a zero-terminated key and value, both copied.
            unsafe { sys::gguf_set_val_str(gguf, name, text.as_ptr()) };
        }
        // SAFETY: a live header and a zero-terminated key.
        Meta::Number(n) => unsafe { sys::gguf_set_val_u32(gguf, name, *n) },
        // SAFETY: as above.
        Meta::Float(v) => unsafe { sys::gguf_set_val_f32(gguf, name, *v) },
        Meta::Floats(values) => array(sys::GGUF_TYPE_FLOAT32, values.as_ptr().cast(), values.len()),
        Meta::Numbers(values) => array(sys::GGUF_TYPE_INT32, values.as_ptr().cast(), values.len()),
        Meta::Texts(texts) => {
            let texts = texts.iter().map(|text| c_text(text)).collect::<Result<Vec<_>, _>>()?;
            let mut pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
            // SAFETY: a live header, a zero-terminated key, and as many zero-terminated texts,
            // which are copied.
            unsafe { sys::gguf_set_arr_str(gguf, name, pointers.as_mut_ptr(), pointers.len()) };
        }
    }
    Ok(())
}

/// Room for tensors without data.
struct Shapes(NonNull<sys::ggml_context>);

impl Drop for Shapes {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, freed once; the tensors live in it.
        unsafe { sys::ggml_free(self.0.as_ptr()) };
    }
}

impl Shapes {
    /// Room for `n`; `None` without memory.
    fn new(n: usize) -> Option<Self> {
        // SAFETY: no arguments; returns a constant.
        let mem_size = (n + 1) * unsafe { sys::ggml_tensor_overhead() };
        let params =
            sys::ggml_init_params { mem_size, mem_buffer: std::ptr::null_mut(), no_alloc: true };
        // SAFETY: no buffer of ours is passed; C allocates or returns null.
        NonNull::new(unsafe { sys::ggml_init(params) }).map(Self)
    }

    /// A tensor of this shape and name. At most as many as there is room for.
    fn tensor(&self, info: &TensorInfo) -> Result<NonNull<sys::ggml_tensor>, String> {
        let TensorInfo { name, n_in, n_out, kind } = info;
        let size = [n_in, n_out].map(|&n| i64::try_from(n).unwrap_or(0));
        let c_name = CString::new(name.as_str())
            .map_err(|_| "a tensor's name holds a zero byte".to_owned())?;
        if name.len() >= sys::GGML_MAX_NAME as usize
            || size[0] < 1
            || size[1] < 1
            || !n_in.is_multiple_of(kind.block())
        {
            return Err(format!(
                "{name} cannot be a tensor of {n_out} x {n_in} in {}",
                kind.name()
            ));
        }
        // SAFETY: a live context with room for the header alone; rows are whole blocks; null if
        // there were no room.
        let tensor = unsafe { sys::ggml_new_tensor_2d(self.0.as_ptr(), kind.0, size[0], size[1]) };
        let tensor = NonNull::new(tensor).ok_or("no memory")?;
        // SAFETY: a live tensor and a zero-terminated name that fits.
        unsafe { sys::ggml_set_name(tensor.as_ptr(), c_name.as_ptr()) };
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, n_in: usize, n_out: usize, kind: TensorType) -> TensorInfo {
        TensorInfo { name: name.into(), n_in, n_out, kind }
    }

    #[test]
    fn a_header_tells_what_follows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let meta = [
            ("general.architecture", Meta::Text("llama".into())),
            ("x.texts", Meta::Texts(vec!["a".into()])),
        ];
        let tensors =
            [info("a", 64, 3, TensorType(sys::GGML_TYPE_Q4_0)), info("b", 5, 1, TensorType::F32)];
        write_header(&path, &meta, &tensors).unwrap();
        assert!((std::fs::metadata(&path).unwrap().len() as usize).is_multiple_of(ALIGNMENT));
        // The reader asks for the values to be there.
        let file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        let padded: usize = tensors.iter().map(|t| t.bytes().next_multiple_of(ALIGNMENT)).sum();
        file.set_len(file.metadata().unwrap().len() + padded as u64).unwrap();
        let types: Vec<_> = tensors.iter().map(|t| (t.name.clone(), t.kind)).collect();
        assert_eq!(tensor_types(&path).unwrap(), types);
    }

    #[test]
    fn what_ggml_would_stop_the_process_for_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let q4_0 = TensorType(sys::GGML_TYPE_Q4_0);
        for tensors in [
            vec![info("a", 64, 1, q4_0), info("a", 64, 1, q4_0)],
            vec![info("a", 33, 1, q4_0)],
            vec![info("a", 0, 1, q4_0)],
            vec![info(&"a".repeat(64), 32, 1, q4_0)],
        ] {
            assert!(
                matches!(write_header(&path, &[], &tensors), Err(LlamaError::Write { .. })),
                "{tensors:?}"
            );
        }
        assert!(write_header(&path, &[("general.alignment", Meta::Number(3))], &[]).is_err());
        assert!(write_header(&path, &[("a\0b", Meta::Number(3))], &[]).is_err());
        assert!(write_header(&path, &[("", Meta::Number(3))], &[]).is_err());
        assert!(write_header(&folder.path().join("no/x.gguf"), &[], &[]).is_err());
        assert!(q4_0.store(&[1.0; 33]).is_err() && q4_0.store(&[]).is_err());
    }
}
