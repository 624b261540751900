//! Conversations: messages and tools to a prompt, and what the model writes to an answer, for serving,
//! training and measuring alike. All dialects are thin layers over [`Conversation`] and
//! [`Answer`].
//!
//! [`jinja`] renders the model's chat template; this module gives it what transformers gives it, in
//! the shapes that `probe` finds the template to expect, and sees to it that names of control
//! tokens in what was sent stay text (`parts`). `format` knows how the template's models write calls
//! and thoughts, `generic` how those of a template without tools are told to; `answer` reads them.

mod answer;
mod conversation;
mod format;
mod generic;
mod parts;
mod probe;
mod tools;
mod turn;

use std::sync::OnceLock;

use jiff::Zoned;
use serde_json::{Map, Value, json};

use crate::error::Invalid;
use crate::jinja::{self, Text};
use crate::llama::Model;
use crate::request::Prompt;
pub use answer::{Answer, AnswerReader, Call, Delta, Syntax};
pub use conversation::{Conversation, Ending, Thoughts};
pub use format::Form;
use format::{Format, chosen, generic_form};
use parts::Controls;
use probe::{Expects, has_calls, joined};
pub use tools::{Tool, ToolChoice, tools_from_json};
pub use turn::turn;

/// Words in the source of any template whose models think.
const THINKING_WORDS: [&str; 4] = ["think", "reasoning", "channel", "THINK"];

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

/// A conversation that was made a prompt of, and the form of its answer.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// What to continue.
    pub prompt: Prompt,
    /// What the answer must be, and how to read it.
    pub form: Form,
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
    /// How its models write calls and thoughts, found out when that first matters; `None` if it cannot
    /// be.
    format: OnceLock<Option<Format>>,
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
        let (marks, format) = (control_names, OnceLock::new());
        let mut this = Self { template, source, tokens, added, controls, marks, expects, format };
        this.expects = probe::probe(|messages, tools| {
            this.text_with(messages, tools.clone(), &Conversation::default(), true).ok()
        });
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
    pub fn prompt(&self, conversation: Conversation) -> Result<Prompt, Invalid> {
        self.prepare(conversation).map(|prepared| prepared.prompt)
    }

    /// The prompt for a conversation, and the form of its answer.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt), and for tools that are none.
    pub fn prepare(&self, mut conversation: Conversation) -> Result<Prepared, Invalid> {
        self.check(&conversation)?;
        let tools = tools_from_json(&conversation.tools)?;
        conversation.choice.check(&tools)?;
        let tools = chosen(tools, &conversation.choice);
        let is_tools = |message: &Map<String, Value>| message["role"] == "tool";
        let uses_tools = conversation.messages.iter().any(|m| has_calls(m) || is_tools(m));
        let may_think = THINKING_WORDS.iter().any(|word| self.source.contains(word));
        let format =
            (may_think || uses_tools || !tools.is_empty()).then(|| self.format()).flatten();
        let mut knows_tools = format.is_some_and(Format::knows_tools);
        let mut budget = conversation.thoughts.budget;
        self.set_thoughts(&mut conversation, format);
        let has_own = format.filter(|_| !tools.is_empty() && knows_tools || tools.is_empty());
        let form = has_own.filter(|format| !tools.is_empty() || format.thinks());
        let form = form.map(|format| format.form(&conversation, &tools, &conversation.variables));
        // A form that cannot demand a call is none where one is demanded.
        let demands = conversation.choice.is_demand();
        let form = form.transpose()?.filter(|form| !demands || form.grammar.is_some());
        knows_tools &= form.is_some() || tools.is_empty();
        let mut form = match form {
            Some(form) => form,
            None if tools.is_empty() => Form::default(),
            None => generic_form(&tools, &conversation)?,
        };
        if let Some(thinking) = &mut form.thinking {
            thinking.budget = budget.take();
        }
        let is_left = |tool: &Map<String, Value>| {
            let name = tool.get("function").and_then(|function| function.get("name"));
            tools.iter().any(|tool| name.is_some_and(|name| *name == *tool.name))
        };
        conversation.tools.retain(is_left);
        if !knows_tools && (uses_tools && !self.expects.calls || !tools.is_empty()) {
            conversation.tools.clear();
            generic::rewrite(&mut conversation.messages, &tools, self.expects.system);
        }
        if !self.expects.system {
            merge_system(&mut conversation.messages);
        }
        let prompt = self.written(conversation, &form.turn)?;
        Ok(Prepared { prompt, form })
    }

    /// How its models write calls and thoughts.
    fn format(&self) -> Option<&Format> {
        let text = |name| {
            let token = self.tokens.iter().find(|(token, _)| *token == name);
            token.map(|(_, text)| text.as_str()).unwrap_or_default()
        };
        let format = self.format.get_or_init(|| {
            Format::new(&self.source, text("bos_token"), text("eos_token"))
                .inspect_err(|why| tracing::warn!(why, "the template's form of calls is unknown"))
                .ok()
        });
        format.as_ref()
    }

    /// Tells the template how to think, in its words.
    fn set_thoughts(&self, conversation: &mut Conversation, format: Option<&Format>) {
        let Thoughts { enabled, effort, budget, .. } = &conversation.thoughts;
        let enabled = enabled.or((*budget == Some(0)).then_some(false));
        let enabled = enabled.or(format.is_some_and(Format::thinks).then_some(true));
        let variables = &mut conversation.variables;
        let enabled = variables.get("enable_thinking").and_then(Value::as_bool).or(enabled);
        if let Some(enabled) = enabled {
            for name in ["enable_thinking", "thinking"] {
                if self.source.contains(name) {
                    variables.entry(name).or_insert(enabled.into());
                }
            }
        }
        if let Some(effort) = effort {
            variables.entry("reasoning_effort").or_insert(effort.as_str().into());
        }
        for message in &mut conversation.messages {
            let thoughts = message.remove("reasoning").filter(|thoughts| !thoughts.is_null());
            if let Some(thoughts) = thoughts.or_else(|| message.get("reasoning_content").cloned()) {
                for name in ["reasoning_content", "reasoning", "thinking"] {
                    if self.source.contains(name) {
                        message.entry(name).or_insert(thoughts.clone());
                    }
                }
            }
        }
    }

    /// Renders a checked conversation; an answer's beginning is `turn`, where that is known.
    fn written(&self, mut conversation: Conversation, turn: &str) -> Result<Prompt, Invalid> {
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
        // With a message to continue, the form's turn has its text, too.
        let turn = if prefill.is_some() { "" } else { turn };
        let text = if ending == Ending::Continue {
            self.continued(messages, &conversation)?
        } else {
            self.opened(messages, &conversation, adds_answer, turn).map_err(|why| {
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

    /// The text of messages, and at its end, if it `adds_answer`, the beginning of an answer.
    fn opened(
        &self,
        messages: Vec<Map<String, Value>>,
        conversation: &Conversation,
        adds_answer: bool,
        turn: &str,
    ) -> Result<Text, jinja::Error> {
        if !adds_answer || turn.is_empty() {
            return self.text(messages, conversation, adds_answer);
        }
        let text = self.text(messages.clone(), conversation, true)?;
        if text.ends_with(turn) {
            return Ok(text);
        }
        // The form of the answer holds after its own beginning only.
        let closed = self.text(messages, conversation, false)?;
        closed.with_own(turn)
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
        let is_none = conversation.tools.is_empty() && !self.expects.tools_as_list;
        let tools = if is_none { Value::Null } else { json!(conversation.tools) };
        self.text_with(messages, tools, conversation, adds_answer)
    }

    fn text_with(
        &self,
        messages: Vec<Map<String, Value>>,
        tools: Value,
        conversation: &Conversation,
        adds_answer: bool,
    ) -> Result<Text, jinja::Error> {
        let mut variables = conversation.variables.clone();
        variables.insert("messages".into(), messages.into());
        variables.insert("tools".into(), tools);
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

/// For a template without system messages, whose model still should know what they say: a first one
/// becomes part of the message after it, or a user's.
fn merge_system(messages: &mut Vec<Map<String, Value>>) {
    let is_system = |message: &Map<String, Value>| {
        message["role"] == "system" || message["role"] == "developer"
    };
    let Some(mut first) = messages.first().cloned().filter(is_system) else { return };
    messages.remove(0);
    match messages.first_mut().filter(|next| next["role"] == "user") {
        Some(next) => {
            let texts = [&first, &*next].map(|m| m.get("content").map(joined).unwrap_or_default());
            next.insert("content".into(), texts.join("\n\n").into());
        }
        None => {
            first.insert("role".into(), "user".into());
            messages.insert(0, first);
        }
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
    fn a_template_without_system_messages_gets_what_they_say() {
        let refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
                       [{{ m.role }}]{{ m.content }}{% endfor %}";
        let drops = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}";
        let [system, user] =
            ["system", "user"].map(|role| json!({ "role": role, "content": role }));
        let mut developer = system.clone();
        developer["role"] = "developer".into();
        for source in [refuses, drops] {
            for first in [&system, &developer] {
                let text = rendered(source, &json!([first, user]), Ending::Closed).unwrap();
                assert_eq!(text.replace("developer", "system"), "[user]system\n\nuser");
            }
            let text = rendered(source, &json!([system]), Ending::Closed).unwrap();
            assert_eq!(text, "[user]system");
        }
    }

    #[test]
    fn no_tools_are_none_or_an_empty_list() {
        let user = json!([{ "role": "user", "content": "x" }]);
        for (source, text) in [
            ("{{ 'none' if tools is none else 'some' }}", "none"),
            ("{% for tool in tools %}{{ tool }}{% endfor %}{{ messages[0].content }}", "x"),
        ] {
            assert_eq!(rendered(source, &user, Ending::Closed).unwrap(), text);
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
