//! Layers of a model on other machines, over ggml's RPC: the workers' side and the head's.
//!
//! Workers compute the layers that they were given, with keys and values there. Everything else is the
//! head's: embeddings, the output matrix, so that logits and hidden states are in its memory. Each
//! worker serves one process at a time; a process keeps its connections to its end.

use std::ffi::{CStr, CString};
use std::net::TcpListener;
use std::os::fd::IntoRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr;
use std::time::Duration;

use parking_lot::Mutex;

use super::backend::{local_gpus, start_backend, supports_gpu_offload, text};
use super::error::LlamaError;
use super::hello::{Endpoint, probe};
use super::sys;

/// Most workers of a model: ggml hangs with more (llama.cpp's issue 28487).
pub const MOST_WORKERS: usize = 2;
/// Time in which all workers must answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// The name of ggml's backend.
const BACKEND: &CStr = c"RPC";

/// A device of ggml's: of this machine or of a worker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Device(pub(super) sys::ggml_backend_dev_t);

// SAFETY: it points to an entry of a registry, which lives as long as the process.
unsafe impl Send for Device {}

impl Device {
    /// Bytes that are free; of a CPU, all of the machine's.
    fn memory(self) -> f64 {
        let (mut free, mut total) = (0, 0);
        // SAFETY: a live device; two numbers are written.
        unsafe { sys::ggml_backend_dev_memory(self.0, &raw mut free, &raw mut total) };
        free as f64
    }

    /// Whether a worker has it.
    pub(super) fn is_remote(self) -> bool {
        // SAFETY: a live device; the name of its backend is a constant.
        unsafe {
            let backend = sys::ggml_backend_dev_backend_reg(self.0);
            CStr::from_ptr(sys::ggml_backend_reg_name(backend)) == BACKEND
        }
    }

    /// As its driver calls it, or the worker's address.
    pub(super) fn name(self) -> String {
        if self.is_remote() {
            // SAFETY: a live device; the description is kept with it.
            return format!("worker {}", unsafe {
                text(sys::ggml_backend_dev_description(self.0))
            });
        }
        // SAFETY: as above.
        unsafe { text(sys::ggml_backend_dev_name(self.0)) }
    }

    fn cpu() -> Self {
        start_backend();
        // SAFETY: ggml always has a CPU.
        Self(unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) })
    }
}

/// Whether an address is one of a worker's memory, and none of ours.
///
/// # Safety
/// `buffer` is a live buffer.
pub(super) unsafe fn is_remote(buffer: sys::ggml_backend_buffer_t) -> bool {
    // SAFETY: by contract; its type lives as long as the process, and null is no device.
    let device =
        unsafe { sys::ggml_backend_buft_get_device(sys::ggml_backend_buffer_get_type(buffer)) };
    !device.is_null() && Device(device).is_remote()
}

/// A worker that this process is connected to.
struct Connected {
    endpoint: Endpoint,
    devices: Vec<Device>,
}

/// They stay connected: another client would take the place of one that leaves.
static CONNECTED: Mutex<Vec<Connected>> = Mutex::new(Vec::new());

/// The kinds of devices that this process computes on: `cpu`, `cuda`, and with workers `rpc+cpu` or
/// `rpc+cuda`.
#[must_use]
pub fn device_kinds() -> &'static str {
    let has_workers = !CONNECTED.lock().is_empty();
    match (has_workers, supports_gpu_offload()) {
        (false, false) => "cpu",
        (false, true) => "cuda",
        (true, false) => "rpc+cpu",
        (true, true) => "rpc+cuda",
    }
}

/// Connects to workers, unless this process is connected to them.
///
/// # Errors
/// [`LlamaError::Worker`], within 5 seconds, for one that cannot be reached, serves another client, or
/// is none of this build.
pub fn connect(workers: &[Endpoint]) -> Result<(), LlamaError> {
    start_backend();
    let mut connected = CONNECTED.lock();
    let is_new = |worker: &&Endpoint| connected.iter().all(|of| of.endpoint != **worker);
    let new: Vec<Endpoint> = workers.iter().filter(is_new).cloned().collect();
    let fail = |(endpoint, reason)| LlamaError::Worker { endpoint, reason };
    let addresses = probe(&new, ANSWER_LIMIT).map_err(fail)?;
    for (endpoint, address) in new.into_iter().zip(addresses) {
        let devices = devices_of(&address.to_string());
        if devices.is_empty() {
            return Err(fail((endpoint, "offers no device".into())));
        }
        connected.push(Connected { endpoint, devices });
    }
    Ok(())
}

/// The devices of a worker. ggml closes a connection that nobody holds, so each is held.
fn devices_of(address: &str) -> Vec<Device> {
    let address = CString::new(address).expect("an address has no zero");
    // SAFETY: a zero-terminated text; null for a worker without devices.
    let registry = unsafe { sys::ggml_backend_rpc_add_server(address.as_ptr()) };
    if registry.is_null() {
        return vec![];
    }
    // SAFETY: a registry, which lives as long as the process.
    let n = unsafe { sys::ggml_backend_reg_dev_count(registry) };
    let device = |i| {
        // SAFETY: an index in the registry.
        let device = unsafe { sys::ggml_backend_reg_dev_get(registry, i) };
        // SAFETY: a live device without parameters. What is returned holds the connection, and is
        // never freed.
        unsafe { sys::ggml_backend_dev_init(device, ptr::null()) };
        Device(device)
    };
    (0..n).map(device).collect()
}

/// How a model's layers are divided.
pub(super) struct Division {
    /// The devices other than the head's CPU, in the order of their layers. Those of the CPU are the
    /// first.
    pub devices: Vec<Device>,
    /// Layers of each; the last one also has the output, as llama.cpp counts.
    pub layers: Vec<usize>,
    /// The last of them are GPUs of the head.
    pub has_gpus: bool,
}

/// Divides `n` layers among connected workers and this machine, by `shares`, the head's last; without
/// shares by the memory of each machine.
///
/// # Errors
/// [`LlamaError::Worker`] for one that would get no layer.
pub(super) fn divide(
    workers: &[Endpoint],
    shares: &[f32],
    n: usize,
) -> Result<Division, LlamaError> {
    let connected = CONNECTED.lock();
    let of = |worker: &Endpoint| {
        let found = connected.iter().find(|of| of.endpoint == *worker);
        found.map_or_else(Vec::new, |of| of.devices.clone())
    };
    let gpus: Vec<Device> = local_gpus().into_iter().map(Device).collect();
    let head_is_cpu = gpus.is_empty();
    let head = if head_is_cpu { vec![Device::cpu()] } else { gpus };
    let machines: Vec<Vec<Device>> = workers.iter().map(of).chain([head]).collect();
    let mut parts = Vec::new();
    for (i, machine) in machines.iter().enumerate() {
        let memory: f64 = machine.iter().map(|device| device.memory()).sum();
        let share = shares.get(i).map_or(memory, |&share| f64::from(share));
        parts.extend(machine.iter().map(|device| share * device.memory() / memory.max(1.0)));
    }
    let layers = in_proportion(&parts, n);
    let mut first = 0;
    for (worker, machine) in workers.iter().zip(&machines) {
        if layers[first..first + machine.len()].iter().all(|&n| n == 0) {
            let reason = format!("would get none of {n} layers: give it a larger share");
            return Err(LlamaError::Worker { endpoint: worker.clone(), reason });
        }
        first += machine.len();
    }
    let n_devices = layers.len() - usize::from(head_is_cpu);
    let devices = machines.into_iter().flatten().take(n_devices).collect();
    let mut layers = layers[..n_devices].to_vec();
    *layers.last_mut().expect("a worker has a device") += 1;
    Ok(Division { devices, layers, has_gpus: !head_is_cpu })
}

/// `n` things in these proportions; the same to all if all are 0.
fn in_proportion(parts: &[f64], n: usize) -> Vec<usize> {
    let sum: f64 = parts.iter().sum();
    let mut until = (0.0, 0);
    let part = |&part: &f64| {
        until.0 += if sum > 0.0 { part / sum } else { 1.0 / parts.len() as f64 };
        let end = ((until.0 * n as f64).round() as usize).min(n);
        let of = end - until.1;
        until.1 = end;
        of
    };
    parts.iter().map(part).collect()
}

/// The devices that a worker here offers: its GPUs, or else its CPU.
fn offered() -> Vec<Device> {
    let gpus = local_gpus();
    if gpus.is_empty() { vec![Device::cpu()] } else { gpus.into_iter().map(Device).collect() }
}

/// The names of the devices that a worker here offers.
#[must_use]
pub fn offered_names() -> Vec<String> {
    offered().into_iter().map(Device::name).collect()
}

/// Serves one client after the other. `cache` is a folder for large tensors, so that the next client
/// need not send them. Returns only if no connection can be accepted any more.
pub fn serve_layers(listener: TcpListener, n_threads: usize, cache: Option<&Path>) {
    let mut devices: Vec<sys::ggml_backend_dev_t> = offered().iter().map(|of| of.0).collect();
    // Our patch takes a socket that listens.
    let socket = CString::new(format!("fd:{}", listener.into_raw_fd())).expect("it has no zero");
    let cache = cache.map(|cache| {
        CString::new(cache.as_os_str().as_bytes())
            .expect("a path of an existing folder has no zero")
    });
    // SAFETY: zero-terminated texts, or null; as many devices as it is told, all of ggml's registry.
    unsafe {
        sys::ggml_backend_rpc_start_server(
            socket.as_ptr(),
            cache.as_ref().map_or(ptr::null(), |cache| cache.as_ptr()),
            n_threads,
            devices.len(),
            devices.as_mut_ptr(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_follow_the_shares_and_none_is_lost() {
        assert_eq!(in_proportion(&[1.0, 1.0, 1.0], 30), [10, 10, 10]);
        assert_eq!(in_proportion(&[2.0, 1.0, 0.0], 32), [21, 11, 0]);
        assert_eq!(in_proportion(&[0.0, 0.0], 5), [3, 2]);
        for n in 0..40 {
            for parts in [&[0.1, 5.0, 0.3][..], &[1e12, 1e9, 7e11], &[3.0]] {
                let layers = in_proportion(parts, n);
                assert_eq!(layers.iter().sum::<usize>(), n, "{parts:?}");
            }
        }
    }
}
