//! llama.cpp's log, line by line into `tracing` under the target `llama.cpp`.
//!
//! Lines arrive in parts (`GGML_LOG_LEVEL_CONT`) and from any thread. The last error line is kept,
//! because C functions that fail return null and report the reason only here.

use std::ffi::{CStr, c_char, c_void};

use parking_lot::Mutex;

use super::sys;

struct State {
    level: sys::ggml_log_level,
    line: String,
    last_error: Option<String>,
}

static STATE: Mutex<State> =
    Mutex::new(State { level: sys::GGML_LOG_LEVEL_INFO, line: String::new(), last_error: None });

/// Longer lines are cut: a model that prints its whole vocabulary must not fill memory.
const MAX_LINE: usize = 4096;

pub(super) fn install() {
    // SAFETY: `receive` has C's signature, never unwinds and needs no user data; it is valid for
    // the whole process.
    unsafe { sys::log_set(Some(receive), std::ptr::null_mut()) };
}

/// Returns the last error that llama.cpp logged, and clears it.
pub(super) fn take_last_error() -> Option<String> {
    STATE.lock().last_error.take()
}

unsafe extern "C" fn receive(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a zero-terminated string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let mut state = STATE.lock();
    if level != sys::GGML_LOG_LEVEL_CONT {
        state.level = level;
    }
    for part in text.split_inclusive('\n') {
        if state.line.len() < MAX_LINE {
            state.line.push_str(part.trim_end_matches('\n'));
        }
        if part.ends_with('\n') {
            let line = std::mem::take(&mut state.line);
            emit(state.level, &line);
            if state.level == sys::GGML_LOG_LEVEL_ERROR {
                state.last_error = Some(line);
            }
        }
    }
}

/// llama.cpp's info lines become debug lines: the server itself logs what it loaded.
fn emit(level: sys::ggml_log_level, line: &str) {
    let line = line.trim_end();
    // Progress dots and blank lines.
    if line.chars().all(|c| c == '.' || c.is_whitespace()) {
        return;
    }
    match level {
        sys::GGML_LOG_LEVEL_ERROR => tracing::error!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_INFO => tracing::debug!(target: "llama.cpp", "{line}"),
        _ => tracing::trace!(target: "llama.cpp", "{line}"),
    }
}
