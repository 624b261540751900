//! What to ask the model: a file of prompts, wrapped the way the model's chat template has it.

use std::path::Path;

use crate::llama::Model;

/// Prompts as they stand in a file.
#[derive(Debug)]
pub struct Prompts {
    texts: Vec<String>,
    categories: Vec<Option<String>>,
    system: Option<String>,
    raw: bool,
}

/// Why a file of prompts was refused.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct PromptsError {
    path: String,
    reason: String,
}

impl Prompts {
    /// Reads a file with one JSON object a line, whose `prompt` (or first of `turns`) is what a
    /// user asks. `raw` leaves the text as it is; otherwise it becomes a user's message behind
    /// `system`, in the model's chat format.
    ///
    /// # Errors
    /// [`PromptsError`] names the line.
    pub fn read(path: &Path, system: Option<String>, raw: bool) -> Result<Self, PromptsError> {
        let fail = |reason: String| PromptsError { path: path.display().to_string(), reason };
        let file = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        let (mut texts, mut categories) = (vec![], vec![]);
        for (i, line) in file.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: serde_json::Value =
                serde_json::from_str(line).map_err(|e| fail(format!("line {}: {e}", i + 1)))?;
            let text = value["prompt"].as_str().or_else(|| value["turns"][0].as_str());
            texts.push(
                text.ok_or_else(|| fail(format!("line {}: has no string \"prompt\"", i + 1)))?
                    .to_owned(),
            );
            categories.push(value["category"].as_str().map(str::to_owned));
        }
        if texts.is_empty() {
            return Err(fail("holds no prompts".into()));
        }
        Ok(Self { texts, categories, system, raw })
    }

    /// Number of prompts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// `false`: a file without prompts is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The `category` of the `i`-th prompt, where it has one.
    #[must_use]
    pub fn category(&self, i: usize) -> Option<&str> {
        self.categories[i].as_deref()
    }

    /// The text that the model continues for the `i`-th prompt.
    #[must_use]
    pub fn text(&self, model: &Model, i: usize) -> String {
        self.wrap(model, &self.texts[i])
    }

    fn wrap(&self, model: &Model, text: &str) -> String {
        if self.raw {
            return text.to_owned();
        }
        let system = self.system.iter().map(|s| ("system", s.as_str()));
        let messages: Vec<(&str, &str)> = system.chain([("user", text)]).collect();
        model.chat_prompt(&messages).unwrap_or_else(|| text.to_owned())
    }
}
