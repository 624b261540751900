//! A multiplication, as `vendor/ggml/testing.cpp` takes it.

use std::ffi::c_void;

/// The struct of the same name in `vendor/ggml/testing.cpp`.
#[repr(C)]
pub struct MulMat {
    pub weight_type: i32,
    pub repacked: i32,
    pub n_threads: i32,
    pub k: i64,
    pub cols: i64,
    pub rows: i64,
    pub weights: *const c_void,
    pub x: *const f32,
    pub out: *mut f32,
}
