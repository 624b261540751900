//! A file of prompts, rendered by the model's chat template as `serve` renders messages.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Value, json};

use crate::chat::Template;
use crate::error::Invalid;
use crate::files::FileError;
use crate::llama::Model;
use crate::request;

/// A prompt of a file.
#[derive(Debug)]
pub struct Prompt {
    /// A user's message.
    pub message: String,
    /// What the model continues: the message, or after [`render`] a chat with it.
    pub prompt: request::Prompt,
    /// Its `category`, if it has one.
    pub category: Option<String>,
}

impl Prompt {
    /// A user's message, not yet rendered.
    pub fn of(message: String) -> Self {
        Self { prompt: message.as_str().into(), message, category: None }
    }
}

/// Reads a file with one JSON object per line, whose `prompt` (or first of `turns`) is a user's
/// message.
///
/// # Errors
/// [`FileError`] names the line, or there are no prompts.
pub fn read(path: &Path) -> Result<Vec<Prompt>, FileError> {
    let file = std::fs::read_to_string(path).map_err(|e| FileError::new(path, e))?;
    let fail = |i: usize, why: &dyn Display| FileError::new(path, format!("line {}: {why}", i + 1));
    let mut prompts = vec![];
    for (i, line) in file.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value: Value = serde_json::from_str(line).map_err(|e| fail(i, &e))?;
        let text = value["prompt"].as_str().or_else(|| value["turns"][0].as_str());
        let text = text.ok_or_else(|| fail(i, &"has no string \"prompt\""))?.to_owned();
        let category = value["category"].as_str().map(str::to_owned);
        prompts.push(Prompt { category, ..Prompt::of(text) });
    }
    if prompts.is_empty() {
        return Err(FileError::new(path, "holds no prompts"));
    }
    Ok(prompts)
}

/// Turns each prompt into what the model continues: the chat of one user message, after `system`
/// if there is one. A model without a chat template continues the prompt itself.
///
/// # Errors
/// The template is not valid, or rejects these messages.
pub fn render(prompts: &mut [Prompt], model: &Model, system: Option<&str>) -> Result<(), Invalid> {
    if model.chat_template().is_none() {
        return Ok(());
    }
    let template = Template::of(model).map_err(|why| Invalid::new("chat_template", why))?;
    let system = system.map(|content| json!({ "role": "system", "content": content }));
    for prompt in prompts {
        let user = json!({ "role": "user", "content": prompt.message });
        let messages = system.iter().cloned().chain([user]).collect();
        prompt.prompt = template.render(&Value::Array(messages))?;
    }
    Ok(())
}
