//! The kinds of heads that can be trained or made up, and their files.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What heads see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadKind {
    /// The hidden state and the path drafted so far
    Conditioned,
    /// The hidden state
    Medusa,
}

impl HeadKind {
    /// The file of such heads in a folder.
    pub fn file(self, folder: &Path) -> PathBuf {
        folder.join(match self {
            Self::Medusa => "medusa_lm_head.safetensors",
            Self::Conditioned => "conditioned_heads.safetensors",
        })
    }
}
