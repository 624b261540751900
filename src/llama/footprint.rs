//! What a context and its model take of each device's memory, as llama.cpp counts it.

use std::ptr;

use super::context::Context;
use super::sys;
use super::workers::Device;

/// The bindings of `vendor/memory`.
#[allow(non_camel_case_types, missing_docs, unsafe_op_in_unsafe_fn, clippy::all)]
mod c {
    include!(concat!(env!("OUT_DIR"), "/memory_bindings.rs"));
}

/// Bytes that a context and its model take of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceUse {
    /// The device, with what is free there; `None`: the host.
    pub device: Option<FreeMemory>,
    /// Of the model's tensors.
    pub weights: u64,
    /// Of keys, values and states.
    pub cache: u64,
    /// Of the largest graph's buffers.
    pub compute: u64,
}

/// A device with memory of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeMemory {
    /// As its driver calls it, or a worker's address.
    pub name: String,
    /// Bytes that nobody uses; of a worker's CPU, all of its machine's.
    pub free: u64,
    /// A worker has it.
    pub is_remote: bool,
}

impl DeviceUse {
    /// All bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.cache + self.compute
    }

    /// Whether a worker holds it.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.device.as_ref().is_some_and(|device| device.is_remote)
    }
}

/// Most devices of one machine that are told apart.
const MOST_DEVICES: usize = 64;

impl Context {
    /// What it takes of each device, the host first; of a model's [outline], what it would take.
    ///
    /// [outline]: super::Model::outline
    #[must_use]
    pub fn footprint(&self) -> Vec<DeviceUse> {
        let none = c::medusa_memory { device: ptr::null_mut(), weights: 0, cache: 0, compute: 0 };
        let mut devices = [none; MOST_DEVICES];
        // SAFETY: a live context, and room for as many devices as it is told.
        let n = unsafe {
            c::medusa_memory_of(self.as_ptr().cast(), devices.as_mut_ptr(), devices.len())
        };
        devices[..n.min(MOST_DEVICES)].iter().map(device_use).collect()
    }
}

fn device_use(c: &c::medusa_memory) -> DeviceUse {
    let [weights, cache, compute] = [c.weights, c.cache, c.compute].map(|n| n as u64);
    let device = (!c.device.is_null()).then(|| {
        let device: sys::ggml_backend_dev_t = c.device.cast();
        let (mut free, mut total) = (0, 0);
        // SAFETY: a device of ggml's registry, which lives as long as the process; two numbers are
        // written.
        unsafe { sys::ggml_backend_dev_memory(device, &raw mut free, &raw mut total) };
        let device = Device(device);
        FreeMemory { name: device.name(), free: free as u64, is_remote: device.is_remote() }
    });
    DeviceUse { device, weights, cache, compute }
}
