//! The networks of heads: weights, their computation on the CPU with ggml's kernels, and on a GPU
//! with ours (`device`).

mod conditioned;
pub(super) mod device;
mod medusa;

pub use conditioned::{ConditionedHead, ConditionedNet, ConditionedWeights};
pub use medusa::{MedusaNet, MedusaWeights, ResidualBlock};
