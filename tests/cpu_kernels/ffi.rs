//! The kernels as build.rs compiled them, from `vendor/ggml/testing.cpp`.
#![allow(unsafe_code)]

use std::ffi::c_void;

use half::f16;
use medusa_llama as _; // links the kernels

use crate::mul_mat::MulMat;

/// The struct of the same name in `vendor/ggml/testing.cpp`.
#[repr(C)]
pub struct Attention {
    pub kv_type: i32,
    pub n_threads: i32,
    pub dk: i64,
    pub dv: i64,
    pub n_q: i64,
    pub n_cells: i64,
    pub n_head: i64,
    pub n_kv_head: i64,
    pub n_streams: i64,
    pub scale: f32,
    pub max_bias: f32,
    pub softcap: f32,
    pub q: *const f32,
    pub k: *const c_void,
    pub v: *const c_void,
    pub mask: *const f16,
    pub sinks: *const f32,
    pub out: *mut f32,
}

/// Kernels compiled for a set of instructions, or all of ggml's, in a graph.
pub struct Kernels {
    pub name: &'static str,
    pub mul_mat: unsafe extern "C" fn(*const MulMat) -> bool,
    pub attention: unsafe extern "C" fn(*const Attention) -> bool,
}

macro_rules! kernels {
    ($sets:ident, $name:literal, $mul_mat:ident, $attention:ident) => {
        #[cfg(cpu_kernels = $name)]
        {
            unsafe extern "C" {
                fn $mul_mat(m: *const MulMat) -> bool;
                fn $attention(a: *const Attention) -> bool;
            }
            $sets.push(Kernels { name: $name, mul_mat: $mul_mat, attention: $attention });
        }
    };
}

/// All that build.rs compiled.
pub fn kernels() -> Vec<Kernels> {
    #[allow(unused_mut)] // with LLAMA_CPP_DIR there are none
    let mut sets = vec![];
    kernels!(sets, "graph", mul_mat_graph, attention_graph);
    kernels!(sets, "avx2", mul_mat_avx2, attention_avx2);
    kernels!(sets, "avx512", mul_mat_avx512, attention_avx512);
    kernels!(sets, "neon", mul_mat_neon, attention_neon);
    println!("kernels: {}", sets.iter().map(|set| set.name).collect::<Vec<_>>().join(", "));
    sets
}

/// What fresh memory holds: not a number.
pub const FRESH: f32 = f32::NAN;
/// Values after an output that nobody may write to.
pub const GUARD: usize = 64;

/// An output of `n` values, and whether the kernels took the operation.
pub fn output(n: usize, run: impl FnOnce(*mut f32) -> bool) -> Option<Vec<f32>> {
    let mut out = vec![FRESH; n + GUARD];
    let done = run(out.as_mut_ptr());
    assert!(out[n..].iter().all(|v| v.is_nan()), "written beyond the end");
    out.truncate(n);
    done.then_some(out)
}
