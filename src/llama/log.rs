//! llama.cpp's log, line by line into `tracing` under the target `llama.cpp`.
//!
//! Lines arrive in parts (`GGML_LOG_LEVEL_CONT`) and from any thread. The last error lines are kept,
//! because C functions that fail return null and report the reason only here, often before a last
//! line that says no more than that they failed.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};

use parking_lot::Mutex;

use super::{loading, sys};

struct State {
    level: sys::ggml_log_level,
    line: String,
    errors: VecDeque<String>,
}

static STATE: Mutex<State> = Mutex::new(State {
    level: sys::GGML_LOG_LEVEL_INFO,
    line: String::new(),
    errors: VecDeque::new(),
});

/// Longer lines are cut: a model that prints its whole vocabulary must not fill memory.
const MAX_LINE: usize = 4096;
/// Error lines that are kept.
const MAX_ERRORS: usize = 4;

pub(super) fn install() {
    // SAFETY: `receive` has C's signature, never unwinds and needs no user data; it is valid for
    // the whole process.
    unsafe { sys::log_set(Some(receive), std::ptr::null_mut()) };
}

/// Returns what llama.cpp logged as errors, in one line, and clears it.
pub(super) fn take_errors() -> Option<String> {
    let lines = std::mem::take(&mut STATE.lock().errors);
    let reasons: Vec<&str> = lines.iter().map(|line| reason(line)).collect();
    let said: Vec<&str> = reasons.iter().copied().filter(|line| !is_general(line)).collect();
    match (said.is_empty(), reasons.last()) {
        (false, _) => Some(said.join("; ")),
        (true, last) => last.map(ToString::to_string),
    }
}

/// A line without the name of the function that logged it, and without what introduces its reason.
fn reason(line: &str) -> &str {
    let is_name = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let mut rest = line.trim();
    while let Some((before, after)) = rest.split_once(": ") {
        if !is_name(before) && before != "error loading model" {
            break;
        }
        rest = after.trim();
    }
    rest
}

/// Whether a line says that something failed, and not why.
fn is_general(reason: &str) -> bool {
    reason.is_empty()
        || reason.starts_with("failed to load model")
        || reason.starts_with("failed to read ")
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
                state.errors.truncate(MAX_ERRORS - 1); // the first of them says most
                state.errors.push_back(line);
            }
        }
    }
}

/// What is in lines of llama.cpp that warn of nothing.
const NO_WARNINGS: [&str; 3] = [
    // Of a pool for several sequences, or for a context that the server warns of itself.
    "possible training context overflow",
    // A line for each tensor of an adapter whose model's tensor is repacked.
    "fallback to CPU",
    // Names an option that is not ours.
    "tensor overrides to CPU are used with mmap enabled",
];

/// llama.cpp's info lines become debug lines: the server itself logs what it loaded. So do its errors
/// while a model loads: they are the reason in one error of ours.
fn emit(level: sys::ggml_log_level, line: &str) {
    let line = line.trim_end();
    // Progress dots and blank lines.
    if line.chars().all(|c| c == '.' || c.is_whitespace()) {
        return;
    }
    match level {
        sys::GGML_LOG_LEVEL_WARN if NO_WARNINGS.iter().any(|of| line.contains(of)) => {
            tracing::debug!(target: "llama.cpp", "{line}");
        }
        sys::GGML_LOG_LEVEL_ERROR if !loading::is_on() => {
            tracing::error!(target: "llama.cpp", "{line}");
        }
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_INFO | sys::GGML_LOG_LEVEL_ERROR => {
            tracing::debug!(target: "llama.cpp", "{line}");
        }
        _ => tracing::trace!(target: "llama.cpp", "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_what_follows_functions_and_introductions() {
        for (line, expected) in [
            ("llama_model_load: error loading model: invalid n_rot: 7\n", "invalid n_rot: 7"),
            ("gguf_init_from_reader: key 'a: b' is bad", "key 'a: b' is bad"),
            ("llama_model_load_from_file_impl: failed to load model", "failed to load model"),
            ("no name here", "no name here"),
            ("", ""),
        ] {
            assert_eq!(reason(line), expected);
        }
        assert!(is_general("failed to load model from x.gguf") && !is_general("invalid n_rot: 7"));
    }
}
