//! While a model loads and computes for the first time: an assertion of llama.cpp that fails for a file,
//! or a crash, ends the process with one line and status 1. Otherwise it would end with a signal and a
//! stack of C functions, as it does later, where it is a fault of ours and no file's.

use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use parking_lot::Mutex;

use super::exit::exit_now;
use super::sys;

/// What is being loaded.
static STATE: Mutex<State> = Mutex::new(State { files: Vec::new(), replaced: Vec::new() });

struct State {
    files: Vec<PathBuf>,
    /// What was done about signals before.
    replaced: Vec<(c_int, libc::sigaction)>,
}

/// The line that a crash ends with, zero-terminated; null while nothing is loaded. A handler of
/// signals can neither allocate nor lock, so the line is there before. Each is leaked: a handler may
/// run at any time.
static LINE: AtomicPtr<c_char> = AtomicPtr::new(ptr::null_mut());

/// Held while a file is loaded.
pub(super) struct Loading(PathBuf);

/// The signals of a crash; the C library aborts where its heap was overwritten.
const CRASHES: [c_int; 5] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT];

impl Loading {
    pub(super) fn begin(path: &Path) -> Self {
        let mut state = STATE.lock();
        state.files.push(path.to_owned());
        state.update();
        Self(path.to_owned())
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        let mut state = STATE.lock();
        if let Some(i) = state.files.iter().position(|path| *path == self.0) {
            state.files.swap_remove(i);
        }
        state.update();
    }
}

impl State {
    /// Prepares for a crash as long as a file is loaded.
    fn update(&mut self) {
        if self.files.is_empty() {
            for (signal, old) in self.replaced.drain(..) {
                // SAFETY: a signal, and what an earlier call returned for it.
                unsafe { libc::sigaction(signal, &raw const old, ptr::null_mut()) };
            }
            LINE.store(ptr::null_mut(), Ordering::Release);
            return;
        }
        let line = format!("error: {}: it crashed\n\0", could_not(&self.files));
        LINE.store(line.into_bytes().leak().as_mut_ptr().cast(), Ordering::Release);
        if self.replaced.is_empty() {
            self.replaced
                .extend(CRASHES.into_iter().filter_map(|signal| Some((signal, handle(signal)?))));
        }
    }
}

/// The beginning of an error.
fn could_not(files: &[PathBuf]) -> String {
    let files: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
    format!("could not load {}: it is no model that llama.cpp can use", files.join(" or "))
}

/// Lets [`on_crash`] handle a signal. Returns what was done before.
fn handle(signal: c_int) -> Option<libc::sigaction> {
    let mut old = MaybeUninit::uninit();
    // SAFETY: all zero is a valid value of this C struct.
    let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    new.sa_sigaction = on_crash as extern "C" fn(c_int) as usize;
    new.sa_flags = libc::SA_ONSTACK; // a stack may have overflowed
    // SAFETY: two valid structs, of which one is written if the call succeeds.
    let done = unsafe { libc::sigaction(signal, &raw const new, old.as_mut_ptr()) };
    // SAFETY: written by the call.
    (done == 0).then(|| unsafe { old.assume_init() })
}

/// Called on a crash. Does what a handler of signals may: no allocation, no lock.
extern "C" fn on_crash(_: c_int) {
    let line = LINE.load(Ordering::Acquire);
    if !line.is_null() {
        // SAFETY: a leaked zero-terminated text; both functions may be called by a handler.
        unsafe { libc::write(libc::STDERR_FILENO, line.cast(), libc::strlen(line)) };
    }
    exit_now(1)
}

/// Whether any file is being loaded.
pub(super) fn is_on() -> bool {
    !STATE.lock().files.is_empty()
}

pub(super) fn install() {
    // SAFETY: `on_abort` has C's signature and never unwinds; it is valid for the whole process.
    unsafe { sys::ggml_set_abort_callback(Some(on_abort)) };
}

/// Called by ggml before it aborts.
unsafe extern "C" fn on_abort(message: *const c_char) {
    // SAFETY: ggml passes a zero-terminated string that lives for the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy().replace('\n', " ");
    // Our patch of ggml's RPC names the worker.
    if let Some((_, what)) = message.split_once("RPC worker ") {
        tracing::error!("the worker {what}; its layers are gone: start this again when it runs");
        exit_now(1);
    }
    let state = STATE.lock();
    if state.files.is_empty() {
        tracing::error!(target: "llama.cpp", "{message}");
        return;
    }
    tracing::error!("{}: {message}", could_not(&state.files));
    exit_now(1)
}
