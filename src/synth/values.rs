//! Random values in their stored form: pieces are drawn once for each type and deviation, and a row is
//! a random sequence of them.
//!
//! Drawing and quantizing seven billion values would take minutes; copying pieces runs at the disk's
//! speed. Rows that share a piece at the same place are correlated, which does not affect speed.

use std::collections::HashMap;
use std::io::{self, Write};

use super::weights::{Fill, TensorSpec};
use crate::llama::{LlamaError, TensorType};

/// Pieces of each kind.
const N_PIECES: usize = 8192;
/// Values of a piece; the type's block if that is larger.
const PIECE: usize = 32;
/// The divisor of the deviation of faint rows.
const FAINT: f32 = 4.0;

/// The source of values.
pub(super) struct Values {
    rng: fastrand::Rng,
    /// By type and deviation (its bits).
    pieces: HashMap<(TensorType, u32), Vec<u8>>,
}

impl Values {
    pub fn new(seed: u64) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed), pieces: HashMap::new() }
    }

    /// Writes a tensor row by row, and calls `wrote` with the bytes of each.
    ///
    /// # Errors
    /// `out` fails, or `kind` cannot store rows of this length.
    pub fn write(
        &mut self,
        weights: &TensorSpec,
        kind: TensorType,
        out: &mut impl Write,
        wrote: &mut dyn FnMut(usize),
    ) -> io::Result<()> {
        let mut row = vec![];
        let n_in = weights.n_in();
        for i in 0..weights.n_rows() {
            row.clear();
            let filled = match weights.fill {
                Fill::Constant(value) => kind.store(&vec![value; n_in]).map(|v| row = v),
                Fill::Uniform(from, to) => {
                    let value = |_| from + (to - from) * self.rng.f32();
                    kind.store(&(0..n_in).map(value).collect::<Vec<_>>()).map(|v| row = v)
                }
                Fill::Identity => {
                    let value = |j| if i == j { 1.0 } else { 0.0 };
                    kind.store(&(0..n_in).map(value).collect::<Vec<_>>()).map(|v| row = v)
                }
                Fill::Normal { deviation, n_faint } => {
                    let deviation = if i < n_faint { deviation / FAINT } else { deviation };
                    self.normal(n_in, kind, deviation, &mut row)
                }
            };
            filled.map_err(io::Error::other)?;
            out.write_all(&row)?;
            wrote(row.len());
        }
        Ok(())
    }

    /// Appends `n` values in whole blocks.
    fn normal(
        &mut self,
        n: usize,
        kind: TensorType,
        deviation: f32,
        row: &mut Vec<u8>,
    ) -> Result<(), LlamaError> {
        let n_piece = kind.block().max(PIECE);
        let Self { rng, pieces } = self;
        let pieces = match pieces.entry((kind, deviation.to_bits())) {
            std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::hash_map::Entry::Vacant(none) => {
                let values: Vec<f32> =
                    (0..N_PIECES * n_piece).map(|_| deviation * gauss(rng)).collect();
                none.insert(kind.store(&values)?)
            }
        };
        let n_bytes = kind.bytes(n_piece);
        for from in (0..n).step_by(n_piece) {
            let piece = &pieces[rng.usize(..N_PIECES) * n_bytes..];
            row.extend_from_slice(&piece[..kind.bytes(n_piece.min(n - from))]);
        }
        Ok(())
    }
}

/// A standard normal value, by the method of Box and Muller.
fn gauss(rng: &mut fastrand::Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f32()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.f32()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tensor's bytes and values.
    fn floats(shape: [usize; 4], fill: Fill) -> (Vec<u8>, Vec<f32>) {
        let weights = TensorSpec { name: "x".into(), shape, fill };
        let mut bytes = vec![];
        Values::new(1).write(&weights, TensorType::F32, &mut bytes, &mut |_| ()).unwrap();
        let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (bytes, values)
    }

    #[test]
    fn uniform_values_fill_their_range() {
        let (_, values) = floats([1, 50, 4, 1], Fill::Uniform(-16.0, -1.0));
        let [min, max] = [f32::min, f32::max].map(|f| values.iter().copied().reduce(f).unwrap());
        assert!(values.len() == 200 && min >= -16.0 && max <= -1.0, "{min} to {max}");
        assert!(max - min > 14.0, "{min} to {max}");
    }

    #[test]
    fn values_have_their_deviation_and_rows_differ() {
        let fill = Fill::Normal { deviation: 0.5, n_faint: 1 };
        let (bytes, values) = floats([40, 500, 1, 1], fill);
        assert_eq!(values.len(), 40 * 500);
        let deviation = |v: &[f32]| (v.iter().map(|v| v * v).sum::<f32>() / v.len() as f32).sqrt();
        assert!(
            (deviation(&values[40..]) / 0.5 - 1.0).abs() < 0.03,
            "{}",
            deviation(&values[40..])
        );
        assert!(deviation(&values[..40]) < 0.25);
        let mut rows: Vec<&[u8]> = bytes.chunks(160).collect();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), 500);
    }
}
