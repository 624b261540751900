//! The fence around CUDA: one safe function for each kernel of `cuda/`, which checks shapes,
//! chooses the grid and launches once.
//!
//! The server's [`Device`] is `cuda` (feature `cuda-kernels`), through cudarc, which looks for the
//! driver at run time; the tests' runs the same kernels on the CPU. bindgen generates `abi` from
//! `cuda/args.h`.
//!
//! Twins in plain Rust define what a kernel computes: the CPU path for heads and draws,
//! `tests/kernels.rs` for the rest.

#![allow(unsafe_code)]

mod abi;
#[cfg(feature = "cuda-kernels")]
pub mod cuda;
mod device;
pub mod kernels;
pub mod memory;
pub mod weights;

pub use device::{Address, Device, GpuError, Launch};
pub use memory::{Buffer, Slice, SliceMut};
