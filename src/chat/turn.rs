//! One user's message, or a whole prompt: what `/generate` and the command line take.

use serde_json::{Value, json};

use super::Template;
use crate::error::Invalid;
use crate::request::Prompt;

/// What a model continues to answer `prompt`: a user's message, after the `system` message if there is
/// one, as `template` renders them. A prompt is continued as it is if `raw`, if the model has no
/// template, or if the prompt is tokens or holds control tokens as the template writes them.
///
/// # Errors
/// [`Invalid`] if the template refuses the messages, or if there is a `system` message where the
/// prompt is continued as it is.
pub fn turn(
    template: &Result<Template, String>,
    prompt: Prompt,
    system: Option<&str>,
    raw: bool,
) -> Result<Prompt, Invalid> {
    let text = prompt.text().filter(|_| !raw);
    let rendering =
        template.as_ref().ok().zip(text).filter(|(template, text)| {
            !template.marks.iter().any(|mark| text.contains(mark.as_str()))
        });
    let system = system.map(|content| json!({ "role": "system", "content": content }));
    let Some((template, text)) = rendering else {
        let why = match template {
            _ if system.is_none() => return Ok(prompt),
            Err(why) => why,
            Ok(_) if raw => "a raw prompt is continued as it is",
            Ok(_) => {
                "the prompt holds the chat template's control tokens and is continued as it is"
            }
        };
        return Err(Invalid::new("system", format!("system cannot be used: {why}")));
    };
    let user = json!({ "role": "user", "content": text });
    let messages = system.into_iter().chain([user]).collect();
    template.render(&Value::Array(messages))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Vocabulary;

    #[test]
    fn a_prompt_is_a_users_message_unless_it_is_a_whole_turn() {
        let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}";
        let names = ["<|end|>", "<|other|>"].map(str::to_owned).into();
        let vocabulary = Vocabulary { control_names: names, ..Vocabulary::default() };
        let template = Template::new(source.into(), vocabulary);
        let prompt = |text: &str, system, raw| turn(&template, text.into(), system, raw);
        assert_eq!(prompt("hi", None, false).unwrap(), "<|user|>hi<|end|>".into());
        let both = "<|system|>be brief<|end|><|user|>hi<|end|>";
        assert_eq!(prompt("hi", Some("be brief"), false).unwrap(), both.into());
        assert_eq!(prompt("hi", None, true).unwrap(), "hi".into());
        let whole = "<|user|>hi<|end|><|assistant|>";
        assert_eq!(prompt(whole, None, false).unwrap(), whole.into());
        for (text, raw) in [(whole, false), ("hi", true)] {
            let error = prompt(text, Some("be brief"), raw).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("system"));
        }
        let none = Err("no template".to_owned());
        assert_eq!(turn(&none, "hi".into(), None, false).unwrap(), "hi".into());
        let error = turn(&none, "hi".into(), Some("be brief"), false).unwrap_err();
        assert!(error.message.ends_with("no template"), "{error}");
    }
}
