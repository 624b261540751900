//! Matrices of head networks as the kernels read them: rows padded with zeros to a multiple of 16
//! bytes, in F16 or in 8 bits with a scale per 32 values.

use std::rc::Rc;

use half::f16;

use super::device::{Device, GpuError};
use super::memory::Buffer;
use crate::matrix::Matrix;

/// Type of weights on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Half precision.
    F16,
    /// 8-bit integers, with a scale in half precision per 32 of them.
    Q8,
}

/// Values that share a scale.
const BLOCK: usize = 32;

impl Precision {
    /// Rows are padded to a multiple of this many values: a lane's read of 16 bytes, or a block.
    fn padding(self) -> usize {
        match self {
            Self::F16 => 8,
            Self::Q8 => BLOCK,
        }
    }
}

/// One or several matrices of the same shape on a device.
pub struct Matrices {
    pub(super) precision: Precision,
    /// F16 or 8-bit values, `[n_nets, n_out, stride]`.
    pub(super) values: Buffer<u8>,
    /// `[n_nets, n_out, stride / 32]`; empty for F16.
    pub(super) scales: Buffer<u16>,
    pub(crate) n_nets: usize,
    pub(crate) n_out: usize,
    pub(super) n_in: usize,
    pub(super) stride: usize,
}

impl Matrices {
    /// Copies matrices to the device. Each is given as parts that are concatenated along their
    /// columns: `[W | U]` for a product with `[x, e]`. Weights are clamped to the range of F16. Empty
    /// matrices and differing shapes are [`GpuError::Shape`].
    pub fn new(
        device: &Rc<dyn Device>,
        nets: &[Vec<&Matrix>],
        precision: Precision,
    ) -> Result<Self, GpuError> {
        let misfit = |reason: &str| GpuError::Shape { kernel: "product", reason: reason.into() };
        let first =
            nets.first().and_then(|parts| parts.first()).ok_or_else(|| misfit("no matrix"))?;
        let (n_out, n_in) = (first.n_out, nets[0].iter().map(|m| m.n_in).sum::<usize>());
        let fits = |parts: &Vec<&Matrix>| {
            parts.iter().map(|m| m.n_in).sum::<usize>() == n_in
                && parts.iter().all(|m| m.is(n_out, m.n_in))
        };
        if !nets.iter().all(fits) {
            return Err(misfit("matrices are empty or differ in shape"));
        }
        let stride = n_in.next_multiple_of(precision.padding());
        let (mut values, mut scales) = (Vec::new(), Vec::new());
        let mut row = vec![0.0; stride];
        for parts in nets {
            for out in 0..n_out {
                let mut at = 0;
                for m in parts {
                    row[at..at + m.n_in].copy_from_slice(&m.values[out * m.n_in..][..m.n_in]);
                    at += m.n_in;
                }
                match precision {
                    Precision::F16 => {
                        values.extend(row.iter().flat_map(|&v| half_bits(v).to_le_bytes()))
                    }
                    Precision::Q8 => row
                        .chunks(BLOCK)
                        .for_each(|block| quantize(block, &mut values, &mut scales)),
                }
            }
        }
        let values = Buffer::from_host(device, &values)?;
        let scales = Buffer::from_host(device, &scales)?;
        Ok(Self { precision, values, scales, n_nets: nets.len(), n_out, n_in, stride })
    }
}

/// Rows in F16 that kernels look up by token: embeddings.
pub struct Table {
    pub(super) values: Buffer<u16>,
    pub(super) n_rows: usize,
    pub(super) n: usize,
}

impl Table {
    /// Copies a matrix to the device; [`GpuError::Shape`] for an empty one.
    pub fn new(device: &Rc<dyn Device>, matrix: &Matrix) -> Result<Self, GpuError> {
        if !matrix.is(matrix.n_out, matrix.n_in) {
            return Err(GpuError::Shape { kernel: "product", reason: "an empty table".into() });
        }
        let bits: Vec<u16> = matrix.values.iter().map(|&v| half_bits(v)).collect();
        Ok(Self { values: Buffer::from_host(device, &bits)?, n_rows: matrix.n_out, n: matrix.n_in })
    }
}

fn half_bits(v: f32) -> u16 {
    f16::from_f32(v.clamp(-65504.0, 65504.0)).to_bits()
}

/// Appends a block's 8-bit integers and its scale.
fn quantize(block: &[f32], values: &mut Vec<u8>, scales: &mut Vec<u16>) {
    let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let scale = f16::from_f32((largest / 127.0).min(65504.0));
    let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
    values.extend(block.iter().map(|v| ((v * inverse).round().clamp(-127.0, 127.0) as i8) as u8));
    scales.push(scale.to_bits());
}
