//! A model's chat template: messages to a prompt, for serving, training and measuring alike.
//!
//! [`jinja`] renders; this module gives the template what transformers gives it, in
//! the shapes that `probe` finds the template to expect, and sees to it that names of control
//! tokens in what was sent stay text (`parts`).

mod parts;
mod probe;
mod turn;

use jiff::Zoned;
use serde_json::{Map, Value, json};

use crate::error::Invalid;
use crate::jinja::{self, Text};
use crate::llama::Model;
use crate::request::Prompt;
use parts::Controls;
use probe::Expects;
pub use turn::turn;

/// Roles that clients of OpenAI's dialect know.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Marks the end of a message that is continued. It ends with a space, which shows whether the
/// template trims.
const END_MARK: &str = "[[the message ends here]] ";

/// What a template needs to know of a model's vocabulary.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// Texts of single tokens, by the names that templates have for them (`bos_token`).
    pub tokens: Vec<(&'static str, String)>,
    /// The tokenizer adds `bos_token`, so the prompt must not begin with it.
    pub adds_bos: bool,
    /// Names of the control tokens.
    pub control_names: Vec<String>,
}

impl Vocabulary {
    /// A model's.
    #[must_use]
    pub fn of(model: &Model) -> Self {
        Self {
            tokens: vec![
                ("bos_token", model.bos_text()),
                ("eos_token", model.eos_text()),
                ("pad_token", model.pad_text()),
            ],
            adds_bos: model.adds_bos(),
            control_names: model.control_names(),
        }
    }
}

/// What to render.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// Objects with `role` and `content`, as OpenAI's clients send them.
    pub messages: Vec<Map<String, Value>>,
    /// Descriptions of tools.
    pub tools: Option<Value>,
    /// Documents to answer from.
    pub documents: Option<Value>,
    /// More variables for the template.
    pub variables: Map<String, Value>,
    /// What the prompt ends with.
    pub ending: Ending,
}

/// What a prompt ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// The beginning of an assistant's message, and after it the text of the last message if that
    /// is an assistant's, which the answer continues.
    #[default]
    Prefill,
    /// The beginning of an assistant's message.
    Answer,
    /// The end of the last message.
    Closed,
    /// The text of the last message, which the answer continues.
    Continue,
}

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    template: jinja::Template,
    source: String,
    tokens: Vec<(&'static str, String)>,
    /// What a prompt must not begin with; may be empty.
    added: String,
    controls: Controls,
    /// Names of the control tokens that it writes around a message.
    marks: Vec<String>,
    expects: Expects,
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
        Self::new(source, Vocabulary::of(model))
    }

    /// Compiles a template, and finds out what it expects.
    ///
    /// # Errors
    /// It is not valid Jinja.
    pub fn new(source: String, vocabulary: Vocabulary) -> Result<Self, String> {
        let template = jinja::Template::new(&source)
            .map_err(|error| format!("the chat template cannot be read: {error}"))?;
        let Vocabulary { tokens, adds_bos, control_names } = vocabulary;
        let bos = tokens.iter().find(|(name, _)| adds_bos && *name == "bos_token");
        let added = bos.map(|(_, text)| text.clone()).unwrap_or_default();
        let controls = Controls::new(&control_names);
        let expects = Expects::default();
        let mut this =
            Self { template, source, tokens, added, controls, marks: control_names, expects };
        this.expects =
            probe::probe(|messages| this.text(messages, &Conversation::default(), true).ok());
        let turn = this.render(&json!([{ "role": "user", "content": "" }])).ok();
        let turn = turn.as_ref().and_then(Prompt::text).unwrap_or_default();
        this.marks.retain(|name| turn.contains(name));
        Ok(this)
    }

    /// The prompt for an assistant's answer to `messages`, a list of objects with `role` and
    /// `content`.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn render(&self, messages: &Value) -> Result<Prompt, Invalid> {
        let wrong = || Invalid::new("messages", "messages must be a list of objects");
        let messages = messages.as_array().ok_or_else(wrong)?;
        let messages =
            messages.iter().map(|message| message.as_object().cloned().ok_or_else(wrong));
        self.prompt(Conversation {
            messages: messages.collect::<Result<_, _>>()?,
            ..Conversation::default()
        })
    }

    /// The prompt for a conversation. Names of control tokens in what was sent are text.
    ///
    /// # Errors
    /// [`Invalid`] for a role that nobody knows, a variable that is none, or an ending that the
    /// conversation does not have; and with the template's own message if it rejects the messages.
    pub fn prompt(&self, mut conversation: Conversation) -> Result<Prompt, Invalid> {
        self.check(&conversation)?;
        let ending = conversation.ending;
        let mut messages = std::mem::take(&mut conversation.messages);
        let prefill = if ending == Ending::Prefill { take_prefill(&mut messages)? } else { None };
        for message in &mut messages {
            self.expects.shape(message);
            if message["role"] == "developer" && !self.knows("developer") {
                message["role"] = "system".into();
            }
        }
        let adds_answer = matches!(ending, Ending::Prefill | Ending::Answer);
        let text = if ending == Ending::Continue {
            self.continued(messages, &conversation)?
        } else {
            self.text(messages, &conversation, adds_answer).map_err(|why| {
                let message = format!("the chat template cannot render these messages: {why}");
                Invalid::new("messages", message)
            })?
        };
        let text = match prefill {
            Some(prefill) => {
                text.with_outside(&prefill).map_err(|e| Invalid::new("messages", e.to_string()))?
            }
            None => text,
        };
        // A text from outside may begin like the token, which the tokenizer adds all the same.
        let n = self.added.len();
        let begins = n > 0 && text.starts_with(&self.added) && !text.has_outside(0..n);
        let text = if begins { text.slice(n..text.len()) } else { text };
        Ok(Prompt::Text(self.controls.parts(&text)))
    }

    fn check(&self, conversation: &Conversation) -> Result<(), Invalid> {
        for (i, message) in conversation.messages.iter().enumerate() {
            let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
            if !ROLES.contains(&role) && !self.knows(role) {
                let shown: String = role.chars().take(40).collect();
                let message = format!(
                    "{shown:?} is no role that the chat template knows; there are {}",
                    ROLES.join(", ")
                );
                return Err(Invalid::new(&format!("messages[{i}].role"), message));
            }
        }
        let given = ["messages", "tools", "documents", "add_generation_prompt"];
        let mut given = given.into_iter().chain(self.tokens.iter().map(|(name, _)| *name));
        match given.find(|name| conversation.variables.contains_key(*name)) {
            Some(name) => Err(Invalid::new(
                "chat_template_kwargs",
                format!(
                    "chat_template_kwargs has {name}, which the server itself gives the template"
                ),
            )),
            None => Ok(()),
        }
    }

    /// Whether the template's source has `word` in quotes.
    fn knows(&self, word: &str) -> bool {
        !word.is_empty()
            && ['\'', '"'].iter().any(|q| self.source.contains(&format!("{q}{word}{q}")))
    }

    fn text(
        &self,
        messages: Vec<Map<String, Value>>,
        conversation: &Conversation,
        adds_answer: bool,
    ) -> Result<Text, jinja::Error> {
        let mut variables = conversation.variables.clone();
        variables.insert("messages".into(), messages.into());
        variables.insert("tools".into(), json!(conversation.tools));
        variables.insert("documents".into(), json!(conversation.documents));
        variables.insert("add_generation_prompt".into(), adds_answer.into());
        let tokens: Vec<(&str, &str)> =
            self.tokens.iter().map(|(name, text)| (*name, text.as_str())).collect();
        self.template.render(&variables, &tokens, &Zoned::now())
    }

    /// Up to the end of the last message's text, as transformers' `continue_final_message` has it.
    fn continued(
        &self,
        mut messages: Vec<Map<String, Value>>,
        conversation: &Conversation,
    ) -> Result<Text, Invalid> {
        let fail = |why: &str| Invalid::new("continue_final_message", why);
        let last = messages.last_mut().and_then(|message| last_text(message.get_mut("content")?));
        let last = last.ok_or_else(|| fail("the final message has no text to continue"))?;
        last.push_str(END_MARK);
        let text = self.text(messages, conversation, false).map_err(|why| {
            Invalid::new(
                "messages",
                format!("the chat template cannot render these messages: {why}"),
            )
        })?;
        let mark = END_MARK.trim_end();
        let end =
            text.rfind(mark).ok_or_else(|| fail("the chat template drops the final message"))?;
        let trims = !text[end..].starts_with(END_MARK);
        let end = if trims { text[..end].trim_end().len() } else { end };
        Ok(text.slice(0..end))
    }
}

/// The text of a message, or the last of its parts.
fn last_text(content: &mut Value) -> Option<&mut String> {
    match content {
        Value::String(text) => Some(text),
        Value::Array(parts) => match parts.last_mut()?.get_mut("text")? {
            Value::String(text) => Some(text),
            _ => None,
        },
        _ => None,
    }
}

/// Takes the text of the last message away, if it is an assistant's without calls of tools.
fn take_prefill(messages: &mut Vec<Map<String, Value>>) -> Result<Option<String>, Invalid> {
    let is_assistants = |message: &Map<String, Value>| {
        message.get("role").is_some_and(|role| role == "assistant") && !probe::has_calls(message)
    };
    let Some(last) = messages.pop_if(|message| is_assistants(message)) else { return Ok(None) };
    if messages.last().is_some_and(is_assistants) {
        let message =
            "the last two messages are the assistant's, of which only one can be continued";
        return Err(Invalid::new("messages", message));
    }
    Ok(last.get("content").map(probe::joined))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
                          {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn template(source: &str) -> Template {
        let names = ["<|im_start|>", "<|im_end|>", "<s>"].map(String::from).to_vec();
        let tokens = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
        let vocabulary = Vocabulary { tokens, adds_bos: true, control_names: names };
        Template::new(source.into(), vocabulary).unwrap()
    }

    fn text(prompt: Prompt) -> String {
        let Prompt::Text(parts) = prompt else { panic!("tokens") };
        parts.into_iter().map(|part| part.text).collect()
    }

    fn rendered(source: &str, messages: &Value, ending: Ending) -> Result<String, Invalid> {
        let messages = serde_json::from_value(messages.clone()).unwrap();
        template(source)
            .prompt(Conversation { messages, ending, ..Conversation::default() })
            .map(text)
    }

    #[test]
    fn what_the_tokenizer_adds_is_left_out_only_where_the_template_has_it() {
        let user = |content: &str| json!([{ "role": "user", "content": content }]);
        let text = rendered(CHATML, &user("hi"), Ending::Answer).unwrap();
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(
            rendered("{{ messages[0].content }}", &user("<s>x"), Ending::Answer).unwrap(),
            "<s>x"
        );
    }

    #[test]
    fn an_answer_continues_what_is_asked_for() {
        let messages = json!([{ "role": "user", "content": "Count." }, { "role": "assistant", "content": "One, " }]);
        let user = "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n";
        for (ending, end) in [
            (Ending::Prefill, "One, "),
            (Ending::Continue, "One, "),
            (Ending::Closed, "One, <|im_end|>\n"),
            (Ending::Answer, "One, <|im_end|>\n<|im_start|>assistant\n"),
        ] {
            assert_eq!(
                rendered(CHATML, &messages, ending).unwrap(),
                format!("{user}{end}"),
                "{ending:?}"
            );
        }
        let trims = CHATML.replace("m['content'] }}", "m['content'] | trim }}");
        assert!(rendered(&trims, &messages, Ending::Continue).unwrap().ends_with("\nOne,"));
        let two = json!([{ "role": "assistant", "content": "a" }, { "role": "assistant", "content": "b" }]);
        assert_eq!(rendered(CHATML, &two, Ending::Prefill).unwrap_err().param.unwrap(), "messages");
        let drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
        let refused = rendered(drops, &messages, Ending::Continue).unwrap_err();
        assert_eq!(refused.param.unwrap(), "continue_final_message");
    }

    #[test]
    fn content_comes_as_the_template_expects_it() {
        let parts = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}\
                     {% endif %}{% endfor %}{% endfor %}";
        let two = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
        for (content, as_text) in [(json!("ab"), "ab"), (two, "a\nb")] {
            let messages = json!([{ "role": "user", "content": content }]);
            assert_eq!(rendered(parts, &messages, Ending::Closed).unwrap(), "[user]ab");
            let text = rendered(CHATML, &messages, Ending::Closed).unwrap();
            assert_eq!(text, format!("<|im_start|>user\n{as_text}<|im_end|>\n"));
        }
    }

    #[test]
    fn calls_come_as_the_template_expects_them() {
        let call = json!({ "id": "call12345", "type": "function", "function": { "name": "f", "arguments": "{\"a\": 1}" } });
        let messages = json!([{ "role": "user", "content": "x" }, { "role": "assistant", "content": null, "tool_calls": [call] }]);
        let each = |print: &str| {
            format!(
                "{{% for m in messages %}}{{{{ m.content }}}}{{% for c in m.tool_calls %}}[{{{{ {print} }}}}]{{% endfor %}}{{% endfor %}}"
            )
        };
        for print in
            ["c.function.arguments | tojson", "c.function.arguments", "'' + c.function.arguments"]
        {
            assert_eq!(
                rendered(&each(print), &messages, Ending::Closed).unwrap(),
                "x[{\"a\": 1}]",
                "{print}"
            );
        }
        let by_none = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}";
        assert_eq!(rendered(by_none, &messages, Ending::Closed).unwrap(), "f");
    }

    #[test]
    fn roles_are_those_that_somebody_knows() {
        let by = |role: &str| json!([{ "role": role, "content": "x" }]);
        let text = rendered(CHATML, &by("developer"), Ending::Closed).unwrap();
        assert_eq!(text, "<|im_start|>system\nx<|im_end|>\n");
        let knows = format!("{CHATML}{{% if 'developer' == 'narrator' %}}{{% endif %}}");
        for role in ["developer", "narrator"] {
            let text = rendered(&knows, &by(role), Ending::Closed).unwrap();
            assert_eq!(text, format!("<|im_start|>{role}\nx<|im_end|>\n"));
        }
        let refused = rendered(CHATML, &by("narrator"), Ending::Closed).unwrap_err();
        assert_eq!(refused.param.unwrap(), "messages[0].role");
    }

    #[test]
    fn errors_report_the_templates_own_message() {
        let refuses = "{{ raise_exception('roles must alternate') }}";
        let refused = rendered(refuses, &json!([]), Ending::Answer).unwrap_err();
        assert!(refused.message.ends_with("roles must alternate"), "{refused}");
        let broken = Template::new("{% for %}".into(), Vocabulary::default());
        assert!(broken.unwrap_err().contains("cannot be read: line 1"));
        let variables = serde_json::from_value(json!({ "bos_token": "x" })).unwrap();
        let refused =
            template(CHATML).prompt(Conversation { variables, ..Conversation::default() });
        assert_eq!(refused.unwrap_err().param.unwrap(), "chat_template_kwargs");
    }
}
