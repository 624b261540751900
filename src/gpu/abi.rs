//! What bindgen generated from `cuda/args.h`: the kernels' arguments, and the sizes they share with
//! the host.
#![allow(dead_code, missing_docs, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/kernel_args.rs"));
