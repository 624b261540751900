//! A file of prompts, rendered by the model's chat template as `serve` renders messages.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Value, json};

use crate::chat::Template;
use crate::error::Invalid;
use crate::files::FileError;
use crate::llama::Model;

/// The prompts of a file.
#[derive(Debug)]
pub struct Prompts {
    texts: Vec<String>,
    categories: Vec<Option<String>>,
}

impl Prompts {
    /// Reads a file with one JSON object per line, whose `prompt` (or first of `turns`) is a user's
    /// message.
    ///
    /// # Errors
    /// [`FileError`] names the line.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let file = std::fs::read_to_string(path).map_err(|e| FileError::new(path, e))?;
        let fail =
            |i: usize, why: &dyn Display| FileError::new(path, format!("line {}: {why}", i + 1));
        let (mut texts, mut categories) = (vec![], vec![]);
        for (i, line) in file.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: Value = serde_json::from_str(line).map_err(|e| fail(i, &e))?;
            let text = value["prompt"].as_str().or_else(|| value["turns"][0].as_str());
            texts.push(text.ok_or_else(|| fail(i, &"has no string \"prompt\""))?.to_owned());
            categories.push(value["category"].as_str().map(str::to_owned));
        }
        if texts.is_empty() {
            return Err(FileError::new(path, "holds no prompts"));
        }
        Ok(Self { texts, categories })
    }

    /// Turns each prompt into what the model continues: the chat of one user message, after
    /// `system` if there is one. A model without a chat template continues the prompt itself.
    ///
    /// # Errors
    /// The template is not valid, or rejects these messages.
    pub fn render(&mut self, model: &Model, system: Option<&str>) -> Result<(), Invalid> {
        if model.chat_template().is_none() {
            return Ok(());
        }
        let template = Template::of(model).map_err(|why| Invalid::new("chat_template", why))?;
        let system = system.map(|content| json!({ "role": "system", "content": content }));
        for text in &mut self.texts {
            let user = json!({ "role": "user", "content": text });
            let messages = system.iter().cloned().chain([user]).collect();
            *text = template.render(&Value::Array(messages))?;
        }
        Ok(())
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Always `false`: [`read`](Self::read) refuses a file without prompts.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The `category` of the `i`-th prompt, if it has one.
    pub fn category(&self, i: usize) -> Option<&str> {
        self.categories[i].as_deref()
    }

    /// The `i`-th prompt.
    pub fn text(&self, i: usize) -> &str {
        &self.texts[i]
    }
}
