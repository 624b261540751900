//! What a template's models write beside text: what holds them to it, and how to read it. The formats
//! are llama.cpp's `common/chat`, which derives them from templates.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answer::Syntax;
use super::conversation::{Conversation, Ending};
use super::generic;
use super::tools::{Tool, ToolChoice};
use crate::error::Invalid;
use crate::llama::ChatFormat;
use crate::request::{CallGrammar, GrammarBegin, GrammarSource, Request, Thinking, Trigger};

/// Forms that are kept, of the requests that were last.
const KEPT: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");

/// What a template's models write.
#[derive(Debug)]
pub struct Format {
    chat: ChatFormat,
    abilities: Abilities,
    /// By what was asked of llama.cpp, as text: the order of names matters in schemas.
    forms: Mutex<LruCache<String, Form>>,
}

/// What a template can express.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
#[allow(clippy::struct_excessive_bools)] // as chat.h has them
struct Abilities {
    supports_tools: bool,
    supports_parallel_tool_calls: bool,
    supports_thinking: bool,
}

/// What an answer must be and how to read it, beside what a request asks for anyway.
#[derive(Clone, Debug, Default)]
pub struct Form {
    /// What its calls must be.
    pub grammar: Option<GrammarSource>,
    /// Where that begins.
    pub begin: GrammarBegin,
    /// How it thinks.
    pub thinking: Option<Thinking>,
    /// Names of control tokens that its text shows.
    pub shown: Vec<String>,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// How to read it; `None`: all of it is content.
    pub syntax: Option<Syntax>,
    /// What the prompt ends with, where the model's turn has begun.
    pub(super) turn: String,
}

/// What `apply` returns, as chat.h has it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Applied {
    grammar: String,
    grammar_lazy: bool,
    grammar_triggers: Vec<AppliedTrigger>,
    preserved_tokens: Vec<String>,
    additional_stops: Vec<String>,
    generation_prompt: String,
    supports_thinking: bool,
    thinking_start_tag: String,
    thinking_end_tags: Vec<String>,
    syntax: Value,
}

#[derive(Debug, Deserialize)]
struct AppliedTrigger {
    r#type: String,
    value: String,
}

impl Form {
    /// Holds a request's answer to it.
    ///
    /// # Errors
    /// [`Invalid`] if the request has a form of its own that excludes calls.
    pub fn guide(&self, request: &mut Request) -> Result<(), Invalid> {
        let (grammar, begin) = match (request.grammar.take(), &self.grammar) {
            (own, None) => (own, GrammarBegin::Answer),
            (None, Some(calls)) => (Some(calls.clone()), self.begin.clone()),
            (Some(GrammarSource::JsonSchema(schema)), Some(GrammarSource::Calls(calls)))
                if matches!(self.begin, GrammarBegin::Triggers(_)) =>
            {
                let mut calls = CallGrammar { gbnf: with_answer(&calls.gbnf), ..calls.clone() };
                calls.schemas.insert(ANSWER.into(), schema);
                (Some(GrammarSource::Calls(calls)), GrammarBegin::Answer)
            }
            (Some(_), Some(_)) => {
                let message = "a grammar, or a call that must be made, leaves no other form: give one of \
                               tools and grammar, or of tool_choice and response_format";
                return Err(Invalid::new("tools", message));
            }
        };
        (request.grammar, request.begin) = (grammar, begin);
        request.thinking.clone_from(&self.thinking);
        request.shown.clone_from(&self.shown);
        request.stop.extend(self.stops.iter().cloned());
        Ok(())
    }
}

impl Format {
    /// Of a template in Jinja.
    ///
    /// # Errors
    /// llama.cpp cannot read it.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<Self, String> {
        let chat = ChatFormat::new(template, bos, eos).map_err(|e| e.to_string())?;
        let abilities = chat.capabilities().map_err(|e| e.to_string())?;
        let abilities = serde_json::from_value(abilities).map_err(|e| e.to_string())?;
        Ok(Self { chat, abilities, forms: Mutex::new(LruCache::new(KEPT)) })
    }

    /// The template tells its models of tools.
    pub fn knows_tools(&self) -> bool {
        self.abilities.supports_tools
    }

    /// Its models may think before they answer.
    pub fn thinks(&self) -> bool {
        self.abilities.supports_thinking
    }

    /// The form of the answer to a conversation, with these tools and variables for the template.
    ///
    /// # Errors
    /// [`Invalid`] with the template's own message.
    pub fn form(
        &self,
        conversation: &Conversation,
        tools: &[Tool],
        variables: &Map<String, Value>,
    ) -> Result<Form, Invalid> {
        let parallel = conversation.parallel.unwrap_or(self.abilities.supports_parallel_tool_calls);
        let continues = matches!(conversation.ending, Ending::Continue | Ending::Prefill)
            && is_assistants(conversation.messages.last());
        let tools_as = |json: fn(&Tool) -> Value| tools.iter().map(json).collect::<Vec<_>>();
        let mut asked = json!({
            "messages": standing_for(&conversation.messages, tools, continues),
            "tools": tools_as(Tool::to_json),
            "parallel_tool_calls": parallel,
            "chat_template_kwargs": variables,
            "continue_final_message": continues,
            "reasoning_format": if conversation.thoughts.inline { "none" } else { "auto" },
            "add_generation_prompt": conversation.ending != Ending::Closed,
        });
        let demands = conversation.choice.is_demand() && !tools.is_empty();
        let key = format!("{demands} {asked}");
        if let Some(form) = self.forms.lock().get(&key) {
            return Ok(form.clone());
        }
        let mut apply = |choice: &str| {
            asked["tool_choice"] = choice.into();
            let applied = self.chat.apply(&asked).or_else(|error| {
                // A schema that llama.cpp cannot follow: any arguments of these names.
                tracing::debug!(%error, "a chat format refused tools");
                asked["tools"] = tools_as(simplified).into();
                self.chat.apply(&asked)
            });
            let applied = applied.map_err(|why| {
                let field = if tools.is_empty() { "messages" } else { "tools" };
                let message = format!("the chat template cannot render these {field}: {why}");
                Invalid::new(field, message)
            })?;
            serde_json::from_value(applied)
                .map_err(|e| Invalid::new("messages", format!("the chat format is unknown: {e}")))
        };
        let mut applied: Applied = apply("auto")?;
        // A call right away, where its beginning is known; else as llama.cpp has it.
        let has_opening = applied.grammar_lazy
            && applied.grammar_triggers.iter().any(|trigger| trigger.r#type == "word");
        if demands && !has_opening {
            applied = apply("required")?;
        }
        let form = Wanted { tools, demands, parallel }.form(applied)?;
        self.forms.lock().put(key, form.clone());
        Ok(form)
    }
}

/// The form of calls for a template that knows no tools.
///
/// # Errors
/// [`Invalid`] if llama.cpp cannot read our own template.
pub fn generic_form(tools: &[Tool], conversation: &Conversation) -> Result<Form, Invalid> {
    let broken = |why: &str| Invalid::new("tools", format!("this model can call no tools: {why}"));
    let format = generic::FORMAT.as_ref().ok_or_else(|| broken("its form is unknown"))?;
    let request = json!({
        "messages": [{ "role": "user", "content": "x" }],
        "tools": tools.iter().map(simplified).collect::<Vec<_>>(),
    });
    let applied = format.apply(&request).map_err(|e| broken(&e.to_string()))?;
    let syntax = Syntax::new(&applied["syntax"]).map_err(|why| broken(&why))?;
    let opening = generic::opening().to_owned();
    let begin = match conversation.choice.is_demand() {
        true => GrammarBegin::Text(opening),
        false => GrammarBegin::Triggers(vec![Trigger::Word(opening)]),
    };
    let parallel = conversation.parallel.unwrap_or(!conversation.choice.is_demand());
    let grammar = Some(generic::grammar(tools, parallel));
    Ok(Form { grammar, begin, syntax: Some(syntax), ..Form::default() })
}

/// What is wanted of calls.
struct Wanted<'t> {
    tools: &'t [Tool],
    /// One must be made.
    demands: bool,
    /// Several may be.
    parallel: bool,
}

impl Wanted<'_> {
    fn form(&self, applied: Applied) -> Result<Form, Invalid> {
        let syntax = Syntax::new(&applied.syntax).map_err(|why| Invalid::new("messages", why))?;
        let thinking = thinking(&applied);
        let triggers = applied.grammar_triggers.into_iter().filter_map(|trigger| {
            Some(match trigger.r#type.as_str() {
                "word" | "token" => Trigger::Word(trigger.value),
                // The regex crate has no looking ahead; without a trigger a call is only read.
                _ if trigger.value.contains("(?!") => return None,
                "pattern" => Trigger::Pattern(trigger.value),
                _ => Trigger::Pattern(format!("^(?:{})$", trigger.value)),
            })
        });
        let triggers: Vec<Trigger> = triggers.collect();
        let word = triggers.iter().find_map(|trigger| match trigger {
            Trigger::Word(word) => Some(word.clone()),
            Trigger::Pattern(_) => None,
        });
        let begin = match (applied.grammar_lazy, self.demands, word) {
            (true, true, Some(word)) => Some(GrammarBegin::Text(word)),
            (true, _, _) if triggers.is_empty() => None,
            (true, ..) => Some(GrammarBegin::Triggers(triggers)),
            (false, ..) => Some(GrammarBegin::Prompt(applied.generation_prompt.clone())),
        };
        let begin = begin.filter(|_| !applied.grammar.is_empty());
        // A grammar that begins in the prompt has the thoughts in it.
        let is_whole = matches!(begin, Some(GrammarBegin::Prompt(_)));
        let grammar = begin.is_some().then(|| GrammarSource::Calls(self.grammar(applied.grammar)));
        Ok(Form {
            grammar,
            begin: begin.unwrap_or_default(),
            thinking: thinking.filter(|_| !is_whole),
            shown: applied.preserved_tokens,
            stops: applied.additional_stops,
            syntax: Some(syntax),
            turn: applied.generation_prompt,
        })
    }

    /// llama.cpp's grammar, with what it does not keep: some formats call on however few are wanted, and
    /// allow text before a call that is demanded.
    fn grammar(&self, gbnf: String) -> CallGrammar {
        let gbnf = if self.demands { at_once(&gbnf) } else { gbnf };
        let calls: Vec<String> = self.tools.iter().map(rule_of).collect();
        let schemas = schemas(&gbnf, self.tools);
        let once = if self.parallel { Vec::new() } else { calls };
        CallGrammar { gbnf, schemas, once }
    }
}

/// The rule of an answer that calls nothing.
const ANSWER: &str = "answer-in-json";

/// A grammar of calls whose text may also be [`ANSWER`].
fn with_answer(gbnf: &str) -> String {
    let line = |line: &str| match line.strip_prefix("root ::=") {
        Some(calls) => format!("root ::= calls-or-none | {ANSWER}\ncalls-or-none ::={calls}\n"),
        None => format!("{line}\n"),
    };
    gbnf.lines().map(line).collect::<String>() + &format!("{ANSWER} ::= \"{{}}\"\n")
}

/// A grammar of calls without the text that may come before them: what the root has outside of groups
/// of llama.cpp's rules `until-N`. Without that a model may write until its tokens run out.
fn at_once(gbnf: &str) -> String {
    let without_text = |root: &str| {
        let (mut kept, mut depth, mut in_text) = (Vec::new(), 0, false);
        for word in root.split(' ') {
            let name = word.strip_suffix('?').unwrap_or(word);
            let number = name.strip_prefix("until-").unwrap_or_default();
            let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            if depth > 0 || in_text || !is_number {
                kept.push(word);
            }
            let mut is_escaped = false;
            for c in word.chars() {
                match c {
                    '"' if !is_escaped => in_text = !in_text,
                    '(' if !in_text => depth += 1,
                    ')' if !in_text => depth -= 1,
                    _ => {}
                }
                is_escaped = c == '\\' && !is_escaped;
            }
        }
        kept.join(" ")
    };
    let line = |line: &str| match line.strip_prefix("root ::= ") {
        Some(root) => format!("root ::= {}\n", without_text(root)),
        None => format!("{line}\n"),
    };
    gbnf.lines().map(line).collect()
}

/// Schemas by the rules of a grammar that they are in place of: those in which arguments are JSON.
/// llguidance follows more of a schema than such a rule does.
fn schemas(gbnf: &str, tools: &[Tool]) -> BTreeMap<String, Value> {
    let is_object = |rule: &str| gbnf.contains(&format!("\n{rule} ::= \"{{\""));
    let rule_of = |tool: &Tool| rule_of(tool) + "-schema";
    let is_only = |rule: &str| tools.iter().filter(|tool| rule_of(tool) == rule).count() == 1;
    let rules = tools.iter().map(|tool| (rule_of(tool), tool.parameters.clone()));
    rules.filter(|(rule, _)| is_object(rule) && is_only(rule)).collect()
}

/// The rule of a call of a tool, as llama.cpp names it; that of its arguments has `-schema` behind.
fn rule_of(tool: &Tool) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    format!("tool-{}", tool.name.chars().map(letter).collect::<String>())
}

/// How an answer thinks, if it does.
fn thinking(applied: &Applied) -> Option<Thinking> {
    let (begin, ends) = (&applied.thinking_start_tag, &applied.thinking_end_tags);
    if !applied.supports_thinking || begin.is_empty() || ends.is_empty() {
        return None;
    }
    let turn = &applied.generation_prompt;
    let after = turn.rfind(begin.trim()).map(|at| &turn[at + begin.trim().len()..]);
    let is_over = |after: &str| ends.iter().any(|end| after.contains(end.trim()));
    let begin = match after {
        Some(after) if is_over(after) => return None,
        Some(_) => None,
        None => Some(begin.clone()),
    };
    Some(Thinking { begin, ends: ends.clone(), budget: None })
}

/// A tool of which only the names and types of arguments are known.
fn simplified(tool: &Tool) -> Value {
    let properties = tool.parameters.get("properties").and_then(Value::as_object);
    let simple = |(name, schema): (&String, &Value)| {
        let kind = schema.get("type").filter(|kind| kind.is_string());
        (name.clone(), kind.map_or(json!({}), |kind| json!({ "type": kind })))
    };
    let properties: BTreeMap<String, Value> =
        properties.into_iter().flatten().map(simple).collect();
    let parameters = json!({ "type": "object", "properties": properties });
    Tool { parameters, ..tool.clone() }.to_json()
}

fn is_assistants(message: Option<&Map<String, Value>>) -> bool {
    message.is_some_and(|message| message.get("role").is_some_and(|role| role == "assistant"))
}

/// Messages after which an answer has the same form: one that is continued itself, or the result of a
/// call, or a user's.
fn standing_for(messages: &[Map<String, Value>], tools: &[Tool], continues: bool) -> Value {
    let user = json!({ "role": "user", "content": "x" });
    let last = messages.last();
    if let Some(last) = last.filter(|_| continues) {
        return json!([user, last]);
    }
    if last.is_none_or(|last| last["role"] != "tool") {
        return json!([user]);
    }
    let name = tools.first().map_or("x", |tool| &tool.name);
    let function = json!({ "name": name, "arguments": "{}" });
    let call = json!({ "id": "call12345", "type": "function", "function": function });
    json!([
        user,
        { "role": "assistant", "content": "", "tool_calls": [call] },
        { "role": "tool", "content": "x", "tool_call_id": "call12345", "name": name },
    ])
}

/// The tools that a choice leaves.
pub fn chosen(tools: Vec<Tool>, choice: &ToolChoice) -> Vec<Tool> {
    match choice {
        ToolChoice::None => Vec::new(),
        ToolChoice::Auto | ToolChoice::Required => tools,
        ToolChoice::Named(name) => tools.into_iter().filter(|tool| tool.name == *name).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_demanded_call_has_no_text_before_it() {
        for (root, expected) in [
            ("space until-24? tool-call", "space tool-call"),
            (r#""a until-3 \" b" until-3 space call"#, r#""a until-3 \" b" space call"#),
            (
                r#""(" ("<think>" until-4 "</think>")? until-13 calls"#,
                r#""(" ("<think>" until-4 "</think>")? calls"#,
            ),
            ("until-x until-1-2 call", "until-x until-1-2 call"),
        ] {
            let gbnf = at_once(&format!("root ::= {root}\nuntil-1 ::= until-2\n"));
            assert_eq!(gbnf, format!("root ::= {expected}\nuntil-1 ::= until-2\n"));
        }
    }
}
