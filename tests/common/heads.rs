//! Head files, written as other projects write them.
#![allow(dead_code)] // each test binary uses its part

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};

/// A tensor to be written.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }

    pub fn i64(values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::I64, shape: vec![values.len()], bytes }
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

pub fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// Heads that change nothing (v2): each says what the model itself would, had it no new token.
pub fn identity(n_heads: usize, n_embd: usize) -> Tensors {
    let zero = |shape: &[usize]| Tensor::f32(shape, &vec![0.0; shape.iter().product()]);
    let of_head =
        |h| [(format!("{h}.0.linear.weight"), zero(&[n_embd, n_embd])), (format!("{h}.0.linear.bias"), zero(&[n_embd]))];
    (0..n_heads).flat_map(of_head).collect()
}
