//! A matrix of floats: what files hold, and networks on CPU and GPU are made from.

/// `n_out` rows of `n_in` values.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub n_out: usize,
    /// Columns.
    pub n_in: usize,
    /// Row after row.
    pub values: Vec<f32>,
}

impl Matrix {
    /// `true` if it has this shape, is not empty, and holds as many values as the shape says.
    #[must_use]
    pub fn is(&self, n_out: usize, n_in: usize) -> bool {
        (self.n_out, self.n_in) == (n_out, n_in)
            && self.values.len() == n_out * n_in
            && !self.values.is_empty()
    }
}
