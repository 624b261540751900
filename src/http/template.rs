//! A model's chat template: messages to a prompt. Templates are Jinja, written for Python's
//! library; what they need of it is here.

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::error::Invalid;
use crate::llama::Model;

/// Instructions of one rendering: a template that does not end is cut off.
const FUEL: u64 = 10_000_000;
const NAME: &str = "chat";

/// A template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Texts of the tokens that begin a text and end it; empty for none.
    bos: String,
    eos: String,
    /// The tokenizer puts the first of them there anyway.
    adds_bos: bool,
}

impl ChatTemplate {
    /// The model's own.
    ///
    /// # Errors
    /// Says why chats cannot be rendered: the model has no template, or its template is no Jinja.
    pub fn of(model: &Model) -> Result<Self, String> {
        let source = model.chat_template().ok_or(
            "the model has no chat template (tokenizer.chat_template in its GGUF file); send a whole prompt to /v1/completions",
        )?;
        Self::new(source, model.bos_text(), model.eos_text(), model.adds_bos())
    }

    /// From its text, and the texts of the tokens that begin and end one.
    pub(super) fn new(
        source: String,
        bos: String,
        eos: String,
        adds_bos: bool,
    ) -> Result<Self, String> {
        let mut environment = Environment::new();
        // As in the library that templates are written for.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| format!("the model's chat template cannot be read: {error}"))?;
        Ok(Self { environment, bos, eos, adds_bos })
    }

    /// The prompt that asks for an answer to `messages`.
    ///
    /// # Errors
    /// [`Invalid`] with the template's own words where it refuses them.
    pub fn render(&self, messages: &serde_json::Value) -> Result<String, Invalid> {
        let template = self.environment.get_template(NAME).expect("added");
        let variables = context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt => true,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        let text = template.render(variables).map_err(|error| {
            let why = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Invalid::new(
                "messages",
                format!("the model's chat template cannot render these messages: {why}"),
            )
        })?;
        let twice = self.adds_bos && !self.bos.is_empty();
        Ok(text
            .strip_prefix(self.bos.as_str())
            .filter(|_| twice)
            .map_or_else(|| text.clone(), str::to_owned))
    }
}

/// JSON, indented if `indent` says by how much; unlike minijinja's own it escapes nothing for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let wrong =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    if let Some(indent) = indent {
        let spaces = " ".repeat(indent.min(16));
        let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
        let mut serializer = serde_json::Serializer::with_formatter(&mut out, pretty);
        serde::Serialize::serialize(value, &mut serializer).map_err(wrong)?;
    } else {
        serde_json::to_writer(&mut out, value).map_err(wrong)?;
    }
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &serde_json::Value) -> Result<String, String> {
        let template = ChatTemplate::new(source.into(), "<s>".into(), "</s>".into(), true)?;
        template.render(messages).map_err(|invalid| invalid.message)
    }

    #[test]
    fn templates_for_python_render() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {%- if m['role'].strip() == 'user' %}\n[U]{{ m.content | trim }}\n  \
                      {%- endif %}\n{% endfor %}{% if add_generation_prompt %}[A]{% endif %}";
        let messages = json!([{ "role": "user", "content": " hi " }]);
        assert_eq!(
            render(source, &messages).unwrap(),
            "[U]hi[A]",
            "the tokenizer adds the beginning"
        );
        assert_eq!(render("{{ messages[0].content | tojson }}", &messages).unwrap(), r#"" hi ""#);
    }

    #[test]
    fn what_a_template_refuses_is_told() {
        let refuses = "{{ raise_exception('roles must alternate') }}";
        assert!(render(refuses, &json!([])).unwrap_err().ends_with("roles must alternate"));
        assert!(render("{% for %}", &json!([])).unwrap_err().contains("cannot be read"));
        assert!(
            render(
                "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
                &json!([])
            )
            .is_err()
        );
    }
}
