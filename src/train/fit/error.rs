//! What can go wrong while heads are fitted.

use crate::files::FileError;

/// Why fitting failed.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "no rows to {0} on: every twentieth prompt is held out, so it takes a few dozen prompts and their answers"
    )]
    Empty(&'static str),
    #[error("the loss is {0} at step {1}: try a lower learning rate")]
    Diverged(f64, usize),
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}
