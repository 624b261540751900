//! The CPU kernels of `vendor/ggml` against plain loops: alone, for each set of instructions that
//! this CPU has, and through ggml's graphs, which the patches make call them. `--nocapture` shows
//! which ran.
#![allow(missing_docs)]

mod attention;
mod ffi;
mod mul_mat;
mod products;
mod weights;
