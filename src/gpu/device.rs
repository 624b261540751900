//! A device as the kernels need it: memory, and a queue of launches.

use std::ffi::c_void;

/// An address in a device's memory.
pub type Address = u64;

/// Why a device failed, or a kernel's arguments were refused.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no driver, no device, or the device is older than the compiled kernels.
    #[error("no usable CUDA device: {0}")]
    NoDevice(String),
    /// Memory could not be allocated or copied.
    #[error("{n_bytes} bytes of device memory: {reason}")]
    Memory {
        /// Size of the allocation or copy.
        n_bytes: usize,
        /// The driver's message.
        reason: String,
    },
    /// A kernel could not be launched.
    #[error("kernel {kernel}, grid {grid:?}: {reason}")]
    Launch {
        /// Its name in `cuda/`.
        kernel: &'static str,
        /// Blocks along x, y and z.
        grid: [u32; 3],
        /// The driver's message.
        reason: String,
    },
    /// Queued work failed.
    #[error("queued work failed: {0}")]
    Queue(String),
    /// Arguments whose shapes do not match.
    #[error("kernel {kernel}: {reason}")]
    Shape {
        /// Its name in `cuda/`.
        kernel: &'static str,
        /// Which argument, and what was expected.
        reason: String,
    },
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Its name in `cuda/`.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: u32,
    /// Bytes of dynamic shared memory per block.
    pub shared: u32,
}

/// Memory and a queue. Queued work runs in order, after the call that queued it has returned. What
/// allocates or copies returns [`GpuError::Memory`], `launch` [`GpuError::Launch`], and what waits
/// [`GpuError::Queue`] if earlier work failed.
pub trait Device {
    /// Allocates memory, aligned to at least 256 bytes; its content is undefined.
    fn alloc(&self, n_bytes: usize) -> Result<Address, GpuError>;

    /// Frees memory once the queued work is done.
    ///
    /// # Safety
    /// The address came from [`alloc`](Self::alloc) of this device and is freed once; nothing queued
    /// later uses it.
    unsafe fn free(&self, address: Address);

    /// Copies to the device; `bytes` may change as soon as the call returns.
    ///
    /// # Safety
    /// At least `bytes.len()` bytes are allocated at `to`.
    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError>;

    /// Waits for the queue, then copies to the host.
    ///
    /// # Safety
    /// At least `bytes.len()` bytes are allocated at `from`.
    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Queues a kernel. Each takes one struct, which `args` points to; it is copied before the call
    /// returns.
    ///
    /// # Safety
    /// `args` points to the struct that the kernel takes, and all memory that the kernel reads or
    /// writes through it is allocated.
    unsafe fn launch(&self, launch: Launch, args: *mut c_void) -> Result<(), GpuError>;

    /// Waits for the queue.
    fn synchronize(&self) -> Result<(), GpuError>;
}
