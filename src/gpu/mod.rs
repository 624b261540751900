//! The fence around CUDA: one safe function for each kernel of `cuda/`, which checks shapes,
//! chooses the grid and launches once.
//!
//! A [`Device`] is memory and a queue of launches. The server's is `cuda` (feature `cuda-kernels`),
//! through cudarc, which looks for the driver when it is asked for and not before. The tests' is an
//! emulation that runs the same kernels on the CPU, so all that is written here is exercised where
//! there is no GPU.
//!
//! What a kernel computes is set by a twin in plain Rust: the CPU path for heads and draws,
//! `tests/kernels.rs` for the rest.

#![allow(unsafe_code)]

#[cfg(feature = "cuda-kernels")]
pub mod cuda;
pub mod kernels;
pub mod memory;
pub mod weights;

use std::ffi::c_void;

pub use memory::{Buffer, Plain, Slice, SliceMut};

/// An address in a device's memory.
pub type Address = u64;

/// What went wrong on the device's side.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no driver, no device, or the device cannot run the kernels that are built in.
    #[error("no usable CUDA device: {0}")]
    NoDevice(String),
    /// Memory could not be had or copied.
    #[error("{n_bytes} bytes of device memory: {reason}")]
    Memory {
        /// How much.
        n_bytes: usize,
        /// The driver's words.
        reason: String,
    },
    /// A kernel could not be launched, or failed while it ran.
    #[error("kernel {kernel}, grid {grid:?}: {reason}")]
    Launch {
        /// Its name in `cuda/`.
        kernel: &'static str,
        /// Blocks along x, y and z.
        grid: [u32; 3],
        /// The driver's words.
        reason: String,
    },
    /// What was queued before could not be finished.
    #[error("queued work failed: {0}")]
    Queue(String),
    /// Arguments that do not fit together.
    #[error("kernel {kernel}: {reason}")]
    Shape {
        /// Its name in `cuda/`.
        kernel: &'static str,
        /// Which, and what was expected.
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
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory beyond what the kernel declares.
    pub shared: u32,
}

/// Memory and a queue: what is queued runs in order, after the calls that queued it have returned.
pub trait Device {
    /// Allocates memory, aligned to at least 256 bytes; what it holds is undefined.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    fn alloc(&self, n_bytes: usize) -> Result<Address, GpuError>;

    /// Gives memory back when what is queued has run.
    ///
    /// # Safety
    /// It came from [`alloc`](Self::alloc) of this device and is not given back twice; nothing
    /// queued later uses it.
    unsafe fn free(&self, address: Address);

    /// Copies to the device; `bytes` may change as soon as it returns.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    ///
    /// # Safety
    /// There is as much memory at `to`.
    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError>;

    /// Waits for what is queued, and copies to the host.
    ///
    /// # Errors
    /// [`GpuError::Memory`], or [`GpuError::Queue`] of earlier work.
    ///
    /// # Safety
    /// There is as much memory at `from`.
    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Queues a kernel. `args` point to its arguments, which are read before it returns.
    ///
    /// # Errors
    /// [`GpuError::Launch`].
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, and all that it reads or writes through
    /// them is there.
    unsafe fn launch(&self, launch: Launch, args: &mut [*mut c_void]) -> Result<(), GpuError>;

    /// Waits for what is queued.
    ///
    /// # Errors
    /// [`GpuError::Queue`] if some of it failed.
    fn synchronize(&self) -> Result<(), GpuError>;
}
