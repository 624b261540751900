//! Single matrices of a GGUF file, as floats.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::ptr::NonNull;

use super::{LlamaError, Matrix, sys};

/// A file's header.
struct Gguf(NonNull<sys::gguf_context>);

impl Drop for Gguf {
    fn drop(&mut self) {
        // SAFETY: made by `gguf_init_from_file`, freed once.
        unsafe { sys::gguf_free(self.0.as_ptr()) };
    }
}

/// The first tensor of these names that the file has.
///
/// # Errors
/// [`LlamaError::Load`] when the file is no GGUF, has none of them, or it is no matrix.
pub(super) fn read_matrix(path: &Path, names: &[&str]) -> Result<Matrix, LlamaError> {
    let fail = |reason: String| LlamaError::Load { path: path.to_owned(), reason };
    let c_path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))?;
    let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
    // SAFETY: a zero-terminated path; no tensors are asked for.
    let header = NonNull::new(unsafe { sys::gguf_init_from_file(c_path.as_ptr(), params) });
    let header = Gguf(header.ok_or_else(|| fail("not a GGUF file".into()))?);
    let gguf = header.0.as_ptr();

    let find = |name: &&str| {
        let c_name = CString::new(*name).ok()?;
        // SAFETY: a live header and a zero-terminated name; -1 for none.
        usize::try_from(unsafe { sys::gguf_find_tensor(gguf, c_name.as_ptr()) }).ok()
    };
    let id =
        names.iter().find_map(find).ok_or_else(|| fail(format!("has none of the tensors {}", names.join(", "))))? as i64;
    // SAFETY: a live header and the id of one of its tensors; the shape is an array of four.
    let (kind, from, n_bytes, ne) = unsafe {
        (
            sys::gguf_get_tensor_type(gguf, id),
            sys::gguf_get_data_offset(gguf) + sys::gguf_get_tensor_offset(gguf, id),
            sys::gguf_get_tensor_size(gguf, id),
            std::slice::from_raw_parts(sys::gguf_get_tensor_ne(gguf, id), 4),
        )
    };
    let [n_in, n_out] = [ne[0], ne[1]].map(|n| usize::try_from(n).unwrap_or(0));
    if n_in == 0 || n_out == 0 || ne[2..] != [1, 1] {
        return Err(fail(format!("{}: its shape is {ne:?}, not a matrix", names[0])));
    }
    let mut bytes = vec![0u8; n_bytes];
    let mut file = File::open(path).map_err(|e| fail(e.to_string()))?;
    file.seek(SeekFrom::Start(from as u64)).and_then(|_| file.read_exact(&mut bytes)).map_err(|e| fail(e.to_string()))?;

    let mut values = vec![0f32; n_in * n_out];
    if kind == sys::GGML_TYPE_F32 {
        values.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
        return Ok(Matrix { n_out, n_in, values });
    }
    // SAFETY: a type that the header named, which the reader has checked.
    let to_float = unsafe { (*sys::ggml_get_type_traits(kind)).to_float };
    let to_float = to_float.ok_or_else(|| fail(format!("values of type {kind} cannot be read")))?;
    // SAFETY: `bytes` holds the tensor of `n_in * n_out` values of that type, `values` has room for as many floats.
    unsafe { to_float(bytes.as_ptr().cast(), values.as_mut_ptr(), (n_in * n_out) as i64) };
    Ok(Matrix { n_out, n_in, values })
}
