//! Matrices of a GGUF file, as floats: whole, or row by row.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use super::backend::start_backend;
use super::error::LlamaError;
use super::loading::Loading;
use super::{log, sys};
use crate::matrix::Matrix;

/// A file's header.
pub(super) struct Gguf(pub(super) NonNull<sys::gguf_context>);

impl Drop for Gguf {
    fn drop(&mut self) {
        // SAFETY: made by one of `gguf_init_*`, freed once.
        unsafe { sys::gguf_free(self.0.as_ptr()) };
    }
}

impl Gguf {
    /// Reads a file's header. The file must be complete; tensors' values are not read.
    pub(super) fn open(path: &Path) -> Result<Self, LlamaError> {
        let fail =
            |reason: String| LlamaError::File { action: "load", path: path.to_owned(), reason };
        let c_path =
            CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))?;
        start_backend(); // whose log has the reason
        let _loading = Loading::begin(path);
        log::take_errors();
        let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
        // SAFETY: a zero-terminated path; no tensors are asked for.
        let header = NonNull::new(unsafe { sys::gguf_init_from_file(c_path.as_ptr(), params) });
        header.map(Self).ok_or_else(|| {
            let why = log::take_errors().map(|why| format!(": {why}")).unwrap_or_default();
            fail(format!("not a GGUF file{why}"))
        })
    }

    /// A tensor's id.
    fn tensor(&self, name: &str) -> Option<i64> {
        let name = CString::new(name).ok()?;
        // SAFETY: a live header and a zero-terminated name; -1 for none.
        let id = unsafe { sys::gguf_find_tensor(self.0.as_ptr(), name.as_ptr()) };
        (id >= 0).then_some(id)
    }
}

/// Rows of a matrix, read from the file when needed: a row costs a read from the page cache, and no
/// memory.
#[derive(Debug)]
pub struct MatrixRows {
    file: File,
    /// Of the first row in the file.
    offset: u64,
    row_bytes: usize,
    /// `None` for F32.
    to_float: Option<unsafe extern "C" fn(*const std::ffi::c_void, *mut f32, i64)>,
    n_rows: usize,
    n_in: usize,
}

impl MatrixRows {
    /// Opens the first of these tensors that a model's files have.
    ///
    /// # Errors
    /// [`LlamaError::File`] when a file is not a GGUF, none has any of them, or it is not a matrix.
    pub(super) fn open(files: &[PathBuf], names: &[&str]) -> Result<Self, LlamaError> {
        let headers = files.iter().map(|file| Ok((file, Gguf::open(file)?)));
        let headers = headers.collect::<Result<Vec<_>, LlamaError>>()?;
        let find = |name: &&str| {
            headers.iter().find_map(|(file, header)| Some((*file, header, header.tensor(name)?)))
        };
        let Some((path, header, id)) = names.iter().find_map(find) else {
            let path = files.first().cloned().unwrap_or_default();
            let reason = format!("it has no tensor {}", names.join(" or "));
            return Err(LlamaError::File { action: "load", path, reason });
        };
        Self::of(path, header, id, names[0])
    }

    /// A tensor of a file, by its id in the header.
    fn of(path: &Path, header: &Gguf, id: i64, name: &str) -> Result<Self, LlamaError> {
        let fail =
            |reason: String| LlamaError::File { action: "load", path: path.to_owned(), reason };
        let gguf = header.0.as_ptr();
        // SAFETY: a live header and the id of one of its tensors; the shape is an array of four.
        let (kind, offset, n_bytes, ne) = unsafe {
            (
                sys::gguf_get_tensor_type(gguf, id),
                sys::gguf_get_data_offset(gguf) + sys::gguf_get_tensor_offset(gguf, id),
                sys::gguf_get_tensor_size(gguf, id),
                std::slice::from_raw_parts(sys::gguf_get_tensor_ne(gguf, id), 4),
            )
        };
        let [n_in, n_rows] = [ne[0], ne[1]].map(|n| usize::try_from(n).unwrap_or(0));
        if n_in == 0 || n_rows == 0 || ne[2..] != [1, 1] {
            return Err(fail(format!("{name}: its shape is {ne:?}, not a matrix")));
        }
        // SAFETY: a type from the header, which ggml's reader has checked.
        let to_float = unsafe { (*sys::ggml_get_type_traits(kind)).to_float };
        if to_float.is_none() && kind != sys::GGML_TYPE_F32 {
            return Err(fail(format!("values of type {kind} cannot be read")));
        }
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        Ok(Self {
            file,
            offset: offset as u64,
            row_bytes: n_bytes / n_rows,
            to_float,
            n_rows,
            n_in,
        })
    }

    /// Values of a row.
    #[must_use]
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Appends `n` rows, from row `first` on, to `out`.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for rows out of range, or a file that became unreadable.
    pub fn read(&self, first: usize, n: usize, out: &mut Vec<f32>) -> Result<(), LlamaError> {
        if first.checked_add(n).is_none_or(|end| end > self.n_rows) {
            return Err(LlamaError::Misuse(format!(
                "{n} rows from {first} on, of {}",
                self.n_rows
            )));
        }
        let mut bytes = vec![0u8; n * self.row_bytes];
        let at = self.offset + (first * self.row_bytes) as u64;
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|e| LlamaError::Misuse(format!("the model cannot be read: {e}")))?;
        let Some(to_float) = self.to_float else {
            out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
            return Ok(());
        };
        let from = out.len();
        out.resize(from + n * self.n_in, 0.0);
        // SAFETY: `bytes` holds `n` rows of the type that `to_float` reads, and the target as many
        // floats.
        unsafe {
            to_float(bytes.as_ptr().cast(), out[from..].as_mut_ptr(), (n * self.n_in) as i64)
        };
        Ok(())
    }

    /// All rows; errors as [`read`](Self::read).
    pub fn matrix(&self) -> Result<Matrix, LlamaError> {
        let mut values = Vec::with_capacity(self.n_rows * self.n_in);
        self.read(0, self.n_rows, &mut values)?;
        Ok(Matrix { n_out: self.n_rows, n_in: self.n_in, values })
    }
}
