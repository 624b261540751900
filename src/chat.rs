//! A model's chat template: messages to a prompt, for serving, training and measuring alike.
//! Templates are Jinja, written for Python's library; this module adds what they need of it.

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::json;

use crate::error::Invalid;
use crate::llama::Model;
use crate::request::Prompt;

/// Instructions per rendering: a template that runs longer is an error.
const FUEL: u64 = 10_000_000;
const NAME: &str = "chat";

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    /// Texts of the tokens that begin and end a text; empty if the model has none.
    bos: String,
    eos: String,
    /// The tokenizer adds `bos`, so the prompt must not begin with it.
    adds_bos: bool,
    /// Names of the control tokens that it writes around a message.
    marks: Vec<String>,
}

impl Template {
    /// The model's own template.
    ///
    /// # Errors
    /// The model has no template, or its template is not valid Jinja.
    pub fn of(model: &Model) -> Result<Self, String> {
        let source = model.chat_template().ok_or(
            "the model has no chat template (tokenizer.chat_template in its GGUF file); send a whole prompt to /v1/completions",
        )?;
        let mut template = Self::new(source, model.bos_text(), model.eos_text(), model.adds_bos())?;
        let turn = template.render(&json!([{ "role": "user", "content": "" }])).unwrap_or_default();
        template.marks = model.control_names();
        template.marks.retain(|name| turn.contains(name));
        Ok(template)
    }

    /// Compiles a template, given the texts of the tokens that begin and end a text.
    pub(crate) fn new(
        source: String,
        bos: String,
        eos: String,
        adds_bos: bool,
    ) -> Result<Self, String> {
        let mut environment = Environment::new();
        // As in Hugging Face's transformers, which templates are written for.
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
        Ok(Self { environment, bos, eos, adds_bos, marks: Vec::new() })
    }

    /// The prompt for an assistant's answer to `messages`, a list of objects with `role` and
    /// `content`.
    ///
    /// # Errors
    /// [`Invalid`] with the template's own message if it rejects them.
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
        match text.strip_prefix(&self.bos) {
            Some(rest) if self.adds_bos => Ok(rest.to_owned()),
            _ => Ok(text),
        }
    }
}

/// What a model continues to answer `prompt`: a user's message, after the `system` message if there is
/// one, as `template` renders them. A prompt is continued as it is if `raw`, if the model has no
/// template, or if the prompt holds control tokens as the template writes them.
///
/// # Errors
/// [`Invalid`] if the template refuses the messages, or if there is a `system` message where the
/// prompt is continued as it is.
pub fn turn(
    template: &Result<Template, String>,
    prompt: String,
    system: Option<&str>,
    raw: bool,
) -> Result<Prompt, Invalid> {
    let rendering = template.as_ref().ok().filter(|template| {
        !raw && !template.marks.iter().any(|mark| prompt.contains(mark.as_str()))
    });
    let system = system.map(|content| json!({ "role": "system", "content": content }));
    let Some(template) = rendering else {
        let why = match template {
            _ if system.is_none() => return Ok(prompt.into()),
            Err(why) => why,
            Ok(_) if raw => "a raw prompt is continued as it is",
            Ok(_) => {
                "the prompt holds the chat template's control tokens and is continued as it is"
            }
        };
        return Err(Invalid::new("system", format!("system cannot be used: {why}")));
    };
    let user = json!({ "role": "user", "content": prompt });
    let messages = system.into_iter().chain([user]).collect();
    Ok(template.render(&serde_json::Value::Array(messages))?.into())
}

/// JSON with `indent` spaces of indentation, if given. Unlike minijinja's own filter it does not
/// escape for HTML.
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

    fn render(source: &str, messages: &serde_json::Value) -> Result<String, String> {
        let template = Template::new(source.into(), "<s>".into(), "</s>".into(), true)?;
        template.render(messages).map_err(|invalid| invalid.message)
    }

    #[test]
    fn templates_for_python_render() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {%- if m['role'].strip() == 'user' %}\n[U]{{ m.content | trim }}\n  \
                      {%- endif %}\n{% endfor %}{% if add_generation_prompt %}[A]{% endif %}";
        let messages = json!([{ "role": "user", "content": " hi " }]);
        assert_eq!(render(source, &messages).unwrap(), "[U]hi[A]", "the tokenizer adds <s>");
        assert_eq!(render("{{ messages[0].content | tojson }}", &messages).unwrap(), r#"" hi ""#);
    }

    #[test]
    fn a_prompt_is_a_users_message_unless_it_is_a_whole_turn() {
        let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}";
        let mut template = Template::new(source.into(), String::new(), String::new(), false);
        template.as_mut().unwrap().marks = vec!["<|end|>".into()];
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

    #[test]
    fn errors_report_the_templates_own_message() {
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
