//! While a model loads: an assertion of llama.cpp that fails for a file ends the process with one
//! line and status 1. Otherwise it would end with a signal and a stack of C functions, as it does
//! later, where it is a fault of ours and no file's.

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::sys;

/// The files that are being loaded.
static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Held while a file is loaded.
pub(super) struct Loading(PathBuf);

impl Loading {
    pub(super) fn begin(path: &Path) -> Self {
        FILES.lock().push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        let mut files = FILES.lock();
        if let Some(i) = files.iter().position(|path| *path == self.0) {
            files.swap_remove(i);
        }
    }
}

/// Whether any file is being loaded.
pub(super) fn is_on() -> bool {
    !FILES.lock().is_empty()
}

pub(super) fn install() {
    // SAFETY: `on_abort` has C's signature and never unwinds; it is valid for the whole process.
    unsafe { sys::ggml_set_abort_callback(Some(on_abort)) };
}

unsafe extern "C" {
    /// POSIX: ends the process without running what `exit` runs, while other threads still compute.
    fn _exit(status: c_int) -> !;
}

/// Called by ggml before it aborts.
unsafe extern "C" fn on_abort(message: *const c_char) {
    // SAFETY: ggml passes a zero-terminated string that lives for the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy().replace('\n', " ");
    let files: Vec<String> = FILES.lock().iter().map(|path| path.display().to_string()).collect();
    if files.is_empty() {
        tracing::error!(target: "llama.cpp", "{message}");
        return;
    }
    let files = files.join(" or ");
    tracing::error!("could not load {files}: it is no model that llama.cpp can use: {message}");
    // SAFETY: takes an integer and does not return.
    unsafe { _exit(1) }
}
