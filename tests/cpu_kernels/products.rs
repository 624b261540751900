//! Multiplications: bit for bit the twin's.
#![allow(unsafe_code)]

use crate::ffi::{kernels, output};
use crate::mul_mat::MulMat;
use crate::weights::{Column, Row, SUPER_BLOCKS, Type, activations};

/// A multiplication: activations, weights as a file has them, and the results, to the last bit.
struct Product<'a> {
    of: Type,
    repacked: bool,
    /// `[k, cols, rows]`
    shape: [usize; 3],
    weights: &'a [u8],
    x: &'a [f32],
    twin: Vec<f32>,
}

impl Product<'_> {
    /// All kernels have the results of the twin, with several numbers of threads.
    fn check(&self) {
        if !cfg!(target_arch = "x86_64") {
            return; // there are kernels for AVX2 and AVX512-VNNI
        }
        let Self { of, repacked, shape: [k, cols, rows], .. } = *self;
        for set in kernels() {
            for n_threads in [1, 3] {
                let out = output(rows * cols, |out| {
                    let op = MulMat {
                        weight_type: of as i32,
                        repacked: i32::from(repacked),
                        n_threads,
                        k: k as i64,
                        cols: cols as i64,
                        rows: rows as i64,
                        weights: self.weights.as_ptr().cast(),
                        x: self.x.as_ptr(),
                        out,
                    };
                    // SAFETY: the memory has the shapes that the struct says, and lives on.
                    unsafe { (set.mul_mat)(&op) }
                });
                let what = format!(
                    "{of:?}, repacked {repacked}, {rows} x {cols} x {k}, {}, {n_threads} threads",
                    set.name
                );
                let out = out.unwrap_or_else(|| panic!("{what}: not computed"));
                for (i, (out, twin)) in out.iter().zip(&self.twin).enumerate() {
                    let (row, column) = (i / cols, i % cols);
                    assert!(
                        out.to_bits() == twin.to_bits(),
                        "{what}: row {row}, column {column} is {out} and not {twin}"
                    );
                }
            }
        }
    }
}

/// Multiplications of a shape.
fn check_mul_mat(of: Type, repacked: bool, k: usize, cols: usize, rows: usize) {
    let mut rng = fastrand::Rng::with_seed((k * 31 + cols * 7 + rows) as u64);
    let columns: Vec<Column> = (0..cols).map(|_| Column::random(of, k, &mut rng)).collect();
    let mut weights = vec![];
    columns.iter().for_each(|column| column.write(of, &mut weights));
    let x = activations(rows * k, &mut rng);
    let twins_of = |x| {
        let row = Row::new(x);
        columns.iter().map(|w| w.twin(of, repacked, &row)).collect::<Vec<_>>()
    };
    let twin = x.chunks(k).flat_map(twins_of).collect();
    Product { of, repacked, shape: [k, cols, rows], weights: &weights, x: &x, twin }.check();
}

const REPACKED: [Type; 6] =
    [Type::Q4_0, Type::Q4_1, Type::Q5_0, Type::Q5_1, Type::Q8_0, Type::Iq4Nl];
const AS_STORED: [Type; 2] = [Type::Q4_1, Type::Q8_0];
const FLOATS: [Type; 2] = [Type::F16, Type::Bf16];

/// All numbers of rows that are computed together, and beyond: more than one group, a set of 32
/// and several. A row's twin knows no other row, so rows do not depend on those beside them.
#[test]
fn multiplications_with_any_number_of_rows_are_the_twins_bit_for_bit() {
    for rows in (1..=17).chain([24, 31, 32, 33, 40, 65]) {
        REPACKED.iter().for_each(|&of| check_mul_mat(of, true, 96, 24, rows));
        AS_STORED.iter().for_each(|&of| check_mul_mat(of, false, 96, 11, rows));
        SUPER_BLOCKS.iter().for_each(|&of| check_mul_mat(of, true, 512, 24, rows));
        FLOATS.iter().for_each(|&of| check_mul_mat(of, false, 96, 11, rows));
    }
}

/// One block of weights, odd numbers of blocks of columns (of which AVX-512 computes two at a
/// time), fewer columns than threads, and more weights than one chunk holds.
#[test]
fn multiplications_of_odd_shapes_are_the_twins_bit_for_bit() {
    for (k, cols) in [(32, 8), (32, 16), (64, 40), (160, 72), (576, 8), (1024, 200)] {
        for rows in [1, 5, 9] {
            REPACKED.iter().for_each(|&of| check_mul_mat(of, true, k, cols, rows));
        }
    }
    for (k, cols) in [(256, 8), (256, 16), (512, 40), (768, 72), (1024, 200)] {
        for rows in [1, 5, 9] {
            SUPER_BLOCKS.iter().for_each(|&of| check_mul_mat(of, true, k, cols, rows));
        }
    }
    for (k, cols) in [(32, 1), (32, 2), (64, 3), (160, 37), (576, 5), (1024, 190)] {
        for rows in [1, 5, 9] {
            AS_STORED.iter().for_each(|&of| check_mul_mat(of, false, k, cols, rows));
            FLOATS.iter().for_each(|&of| check_mul_mat(of, false, k, cols, rows));
        }
    }
}
