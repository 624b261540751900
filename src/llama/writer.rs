//! Writes GGUF files: ggml writes the header, the caller appends the tensors' values.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::ptr::NonNull;

use super::backend::{start_backend, text};
use super::error::LlamaError;
use super::ggml::Tensors;
use super::gguf::Gguf;
use super::tensor_type::TensorType;
use super::{log, sys};

/// A tensor of a file: a vector, a matrix, or several matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name by which llama.cpp looks it up.
    pub name: String,
    /// Values of a row, rows of a matrix, matrices, and groups of matrices: 1 for a dimension that
    /// the tensor does not have.
    pub shape: [usize; 4],
    /// Type of the stored values.
    pub kind: TensorType,
}

impl TensorInfo {
    /// Bytes of all values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let [n_in, rows @ ..] = self.shape;
        rows.iter().product::<usize>() * self.kind.bytes(n_in)
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
    /// Yes or no.
    Flag(bool),
    /// Strings.
    Texts(Vec<String>),
    /// Floats.
    Floats(Vec<f32>),
    /// Whole numbers.
    Numbers(Vec<i32>),
}

/// The header, and each tensor's values after it, are padded to a multiple of this many bytes.
pub const ALIGNMENT: usize = 32; // GGUF's default, which `set` does not let a header change

/// Writes a file's header: metadata and tensor descriptions. The caller must append the tensors'
/// values in this order, each padded with zeros to a multiple of [`ALIGNMENT`].
///
/// # Errors
/// [`LlamaError::File`] for a duplicate or overlong name, a row that is not whole blocks, or a file
/// that cannot be written.
pub fn write_header(
    path: &Path,
    meta: &[(String, Meta)],
    tensors: &[TensorInfo],
) -> Result<(), LlamaError> {
    start_backend();
    let fail = |reason: String| LlamaError::File { action: "write", path: path.to_owned(), reason };
    let c_path =
        CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))?;
    let header = header(meta).map_err(&fail)?;
    let headers = Tensors::headers(tensors.len()).map_err(|e| fail(e.to_string()))?;
    let mut names = BTreeSet::new();
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(fail(format!("{} is named twice", tensor.name)));
        }
        let tensor = described(&headers, tensor).map_err(&fail)?;
        // SAFETY: a live header and tensor, which is copied; its name is unique.
        unsafe { sys::gguf_add_tensor(header.0.as_ptr(), tensor.as_ptr()) };
    }
    log::take_errors();
    // SAFETY: a live header and a zero-terminated path; tensors' data is not read.
    if unsafe { sys::gguf_write_to_file(header.0.as_ptr(), c_path.as_ptr(), true) } {
        return Ok(());
    }
    Err(fail(log::take_errors().unwrap_or_else(|| "ggml gave no reason".into())))
}

/// Names and types of a file's tensors; [`LlamaError::File`] when it is not a GGUF.
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

/// A header with metadata alone; an error says which key cannot be set.
pub(super) fn header(meta: &[(String, Meta)]) -> Result<Gguf, String> {
    // SAFETY: no arguments; null without memory.
    let header = NonNull::new(unsafe { sys::gguf_init_empty() }).ok_or("no memory")?;
    let header = Gguf(header);
    meta.iter().try_for_each(|(key, value)| set(&header, key, value))?;
    Ok(header)
}

/// Puts a value into a header.
fn set(header: &Gguf, key: &str, value: &Meta) -> Result<(), String> {
    let c_text =
        |text: &str| CString::new(text).map_err(|_| format!("{key}: contains a zero byte"));
    let (gguf, name) = (header.0.as_ptr(), c_text(key)?);
    let name = name.as_ptr();
    // ggml aborts the process for an empty key, and for an alignment that is not a power of two.
    if key.is_empty() || key == "general.alignment" {
        return Err(format!("the key {key:?} cannot be set"));
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
        // SAFETY: as above.
        Meta::Flag(is) => unsafe { sys::gguf_set_val_bool(gguf, name, *is) },
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

/// A tensor of this shape and name, without data.
fn described(headers: &Tensors, info: &TensorInfo) -> Result<NonNull<sys::ggml_tensor>, String> {
    let TensorInfo { name, shape, kind } = info;
    let c_name = CString::new(name.as_str()).ok();
    let c_name = c_name.filter(|_| name.len() < sys::GGML_MAX_NAME as usize);
    let c_name = c_name.ok_or_else(|| format!("{name:?} cannot be a tensor's name"))?;
    let tensor = headers.tensor(*kind, *shape).map_err(|e| format!("{name}: {e}"))?;
    // SAFETY: a live tensor and a zero-terminated name that fits.
    unsafe { sys::ggml_set_name(tensor.as_ptr(), c_name.as_ptr()) };
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, n_in: usize, n_out: usize, kind: TensorType) -> TensorInfo {
        TensorInfo { name: name.into(), shape: [n_in, n_out, 1, 1], kind }
    }

    #[test]
    fn a_header_tells_what_follows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let meta = [
            ("general.architecture".into(), Meta::Text("llama".into())),
            ("x.texts".into(), Meta::Texts(vec!["a".into()])),
            ("x.flag".into(), Meta::Flag(true)),
        ];
        let experts = TensorInfo { name: "c".into(), shape: [32, 2, 3, 5], kind: TensorType::F16 };
        assert_eq!(experts.bytes(), 2 * 32 * 2 * 3 * 5);
        let q4_0 = TensorType(sys::GGML_TYPE_Q4_0);
        let tensors = [info("a", 64, 3, q4_0), info("b", 5, 1, TensorType::F32), experts];
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
            vec![TensorInfo {
                name: "a".into(),
                shape: [1 << 31, 1 << 31, 1 << 31, 1],
                kind: q4_0,
            }],
            vec![info(&"a".repeat(64), 32, 1, q4_0)],
        ] {
            assert!(
                matches!(
                    write_header(&path, &[], &tensors),
                    Err(LlamaError::File { action: "write", .. })
                ),
                "{tensors:?}"
            );
        }
        assert!(
            write_header(&path, &[("general.alignment".into(), Meta::Number(3))], &[]).is_err()
        );
        assert!(write_header(&path, &[("a\0b".into(), Meta::Number(3))], &[]).is_err());
        assert!(write_header(&path, &[("".into(), Meta::Number(3))], &[]).is_err());
        assert!(write_header(&folder.path().join("no/x.gguf"), &[], &[]).is_err());
        assert!(q4_0.store(&[1.0; 33]).is_err() && q4_0.store(&[]).is_err());
    }
}
