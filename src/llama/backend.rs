//! What llama.cpp is as a library: its start, its build, its strings.

use std::ffi::{CStr, c_char};
use std::sync::{Once, OnceLock};

use super::{loading, log, sys};

/// Starts llama.cpp once per process and sends its log to `tracing`.
pub(super) fn start_backend() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        log::install();
        loading::install();
        // SAFETY: no arguments; llama.cpp asks for one call before any other, which `Once` gives.
        unsafe { sys::backend_init() };
    });
}

/// How threads and memory are spread on a machine whose cores are nearer to some memory than to other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Numa {
    /// Threads are spread over all nodes
    Distribute,
    /// Threads run on the node that the process started on
    Isolate,
    /// Threads run where numactl lets the process run
    Numactl,
}

/// Uses the machine's nodes from now on, in the whole process: models that are loaded later, threads
/// that start later. Only the first call counts.
pub fn use_numa(numa: Numa) {
    static CHOSEN: Once = Once::new();
    start_backend();
    let numa = match numa {
        Numa::Distribute => sys::GGML_NUMA_STRATEGY_DISTRIBUTE,
        Numa::Isolate => sys::GGML_NUMA_STRATEGY_ISOLATE,
        Numa::Numactl => sys::GGML_NUMA_STRATEGY_NUMACTL,
    };
    // SAFETY: llama.cpp has started, and `Once` gives the one call that ggml expects.
    CHOSEN.call_once(|| unsafe { sys::numa_init(numa) });
}

/// `true` if llama.cpp was built with a backend that can hold layers on a GPU and finds one here.
/// llama.cpp's own function counts workers that might be.
#[must_use]
pub fn supports_gpu_offload() -> bool {
    !local_gpus().is_empty()
}

/// The GPUs of this machine: workers' devices are in no registry.
pub(super) fn local_gpus() -> Vec<sys::ggml_backend_dev_t> {
    start_backend();
    // SAFETY: no arguments; the registry is filled.
    let n = unsafe { sys::ggml_backend_dev_count() };
    // SAFETY: indexes in the registry.
    let all = (0..n).map(|i| unsafe { sys::ggml_backend_dev_get(i) });
    let kinds = [sys::GGML_BACKEND_DEVICE_TYPE_GPU, sys::GGML_BACKEND_DEVICE_TYPE_IGPU];
    // SAFETY: a device of the registry.
    all.filter(|&device| kinds.contains(&unsafe { sys::ggml_backend_dev_type(device) })).collect()
}

/// Most sequence ids of one context.
#[must_use]
pub fn max_sequences() -> usize {
    // SAFETY: no arguments; returns a constant.
    unsafe { sys::max_parallel_sequences() }
}

/// The instruction sets and options of the CPU kernels, such as "AVX2 FMA REPACK".
#[must_use]
pub fn cpu_features() -> String {
    static FEATURES: OnceLock<String> = OnceLock::new();
    let features = FEATURES.get_or_init(|| {
        start_backend();
        // SAFETY: returns a pointer to a static buffer that the next call overwrites; it is copied
        // at once, and `OnceLock` gives the one call.
        features_of(&unsafe { text(sys::print_system_info()) }, "CPU")
    });
    features.clone()
}

/// The features that a backend has, in what llama.cpp prints of all: "CUDA : ARCHS = 900 | CPU : SSE3 = 1
/// | AVX512 = 0 | ".
fn features_of(info: &str, backend: &str) -> String {
    let mut current = "";
    let mut features = Vec::new();
    for field in info.split(" | ") {
        let feature = field.split_once(" : ").map_or(field, |(name, first)| {
            current = name.trim();
            first
        });
        if let Some((name, "1")) = feature.split_once(" = ")
            && current == backend
        {
            features.push(name.trim());
        }
    }
    features.join(" ")
}

/// Names the kernels that are linked: llama.cpp's source, our patches and kernels, and the compiler.
pub const ARITHMETIC: &str = env!("MEDUSA_ARITHMETIC");

/// The release of the linked llama.cpp.
#[must_use]
pub fn version() -> String {
    // SAFETY: returns a pointer to a constant.
    unsafe { text(sys::version()) }
}

/// Copies a C string; empty for null.
///
/// # Safety
/// `c` is null or points to a zero-terminated string that is not written to during the call.
pub(super) unsafe fn text(c: *const c_char) -> String {
    if c.is_null() {
        return String::new();
    }
    // SAFETY: not null; the rest by contract.
    unsafe { CStr::from_ptr(c) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_those_of_one_backend() {
        let info = "CUDA : ARCHS = 900 | FA = 1 | CPU : SSE3 = 1 | AVX512 = 0 | FMA = 1 | ";
        assert_eq!(features_of(info, "CPU"), "SSE3 FMA");
        assert_eq!(features_of(info, "Metal"), "");
        assert!(!cpu_features().is_empty());
    }
}
