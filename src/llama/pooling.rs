//! How a text's embedding is made of its tokens' hidden states.

use super::model::Model;

/// Which hidden states, after the final norm, are a text's embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pooling {
    /// The mean of all tokens'
    Mean,
    /// The first token's
    Cls,
    /// The last token's
    Last,
}

impl Pooling {
    /// As its GGUF says, in `{architecture}.pooling_type`, by llama.cpp's numbers. `None` where it says
    /// nothing, or `none`, or `rank`, which gives scores.
    #[must_use]
    pub fn of(model: &Model) -> Option<Self> {
        let architecture = model.meta("general.architecture")?;
        match model.meta(&format!("{architecture}.pooling_type"))?.as_str() {
            "1" => Some(Self::Mean),
            "2" => Some(Self::Cls),
            "3" => Some(Self::Last),
            _ => None,
        }
    }
}
