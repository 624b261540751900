//! What a template's models write beside text: what holds them to it, and how to read it. The formats
//! are llama.cpp's `common/chat`, which derives them from templates.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answer::Syntax;
use super::conversation::{Conversation, Ending};
use super::generic;
use super::tools::{Tool, ToolChoice};
use crate::error::Invalid;
use crate::llama::ChatFormat;
use crate::request::{GrammarBegin, GrammarSource, Request, Thinking, Trigger};

/// What a template's models write.
#[derive(Debug)]
pub struct Format {
    chat: ChatFormat,
    abilities: Abilities,
}

/// What a template can express.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
#[allow(clippy::struct_excessive_bools)] // as chat.h has them
struct Abilities {
    supports_tools: bool,
    supports_parallel_tool_calls: bool,
    supports_system_role: bool,
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
            (
                Some(GrammarSource::JsonSchema(schema)),
                Some(GrammarSource::Calls { gbnf, schemas }),
            ) if matches!(self.begin, GrammarBegin::Triggers(_)) => {
                let (gbnf, mut schemas) = (with_answer(gbnf), schemas.clone());
                schemas.insert(ANSWER.into(), schema);
                (Some(GrammarSource::Calls { gbnf, schemas }), GrammarBegin::Answer)
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
        Ok(Self { chat, abilities })
    }

    /// The template tells its models of tools.
    pub fn knows_tools(&self) -> bool {
        self.abilities.supports_tools
    }

    /// Its models may think before they answer.
    pub fn thinks(&self) -> bool {
        self.abilities.supports_thinking
    }

    /// The template has system messages.
    pub fn has_system(&self) -> bool {
        self.abilities.supports_system_role
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
        let asks = |choice: &str, tools: Vec<Value>| {
            let continues = matches!(conversation.ending, Ending::Continue | Ending::Prefill)
                && is_assistants(conversation.messages.last());
            json!({
                "messages": tail(&conversation.messages),
                "tools": tools,
                "tool_choice": choice,
                "parallel_tool_calls": parallel,
                "chat_template_kwargs": variables,
                "continue_final_message": continues,
                "reasoning_format": if conversation.thoughts.inline { "none" } else { "auto" },
                "add_generation_prompt": conversation.ending != Ending::Closed,
            })
        };
        let apply = |choice: &str| {
            let whole: Vec<Value> = tools.iter().map(Tool::to_json).collect();
            let applied = self.chat.apply(&asks(choice, whole)).or_else(|error| {
                // A schema that llama.cpp cannot follow: any arguments of these names.
                tracing::debug!(%error, "a chat format refused tools");
                self.chat.apply(&asks(choice, tools.iter().map(simplified).collect()))
            });
            let applied = applied.map_err(|why| {
                let field = if tools.is_empty() { "messages" } else { "tools" };
                let message = format!("the chat template cannot render these {field}: {why}");
                Invalid::new(field, message)
            })?;
            serde_json::from_value(applied)
                .map_err(|e| Invalid::new("messages", format!("the chat format is unknown: {e}")))
        };
        let applied: Applied = apply("auto")?;
        if !conversation.choice.is_demand() || tools.is_empty() {
            return form(applied, tools, false);
        }
        // A call right away, where its beginning is known; else as llama.cpp has it, after any text.
        let has_opening = applied.grammar_lazy
            && applied.grammar_triggers.iter().any(|trigger| trigger.r#type == "word");
        if has_opening { form(applied, tools, true) } else { form(apply("required")?, tools, true) }
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

fn form(applied: Applied, tools: &[Tool], must_call: bool) -> Result<Form, Invalid> {
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
    let begin = match (applied.grammar_lazy, must_call, word) {
        (true, true, Some(word)) => Some(GrammarBegin::Text(word)),
        (true, _, _) if triggers.is_empty() => None,
        (true, ..) => Some(GrammarBegin::Triggers(triggers)),
        (false, ..) => Some(GrammarBegin::Prompt(applied.generation_prompt.clone())),
    };
    let begin = begin.filter(|_| !applied.grammar.is_empty());
    // A grammar that begins in the prompt has the thoughts in it.
    let is_whole = matches!(begin, Some(GrammarBegin::Prompt(_)));
    let schemas = schemas(&applied.grammar, tools);
    let source = GrammarSource::Calls { gbnf: applied.grammar, schemas };
    Ok(Form {
        grammar: begin.is_some().then_some(source),
        begin: begin.unwrap_or_default(),
        thinking: thinking.filter(|_| !is_whole),
        shown: applied.preserved_tokens,
        stops: applied.additional_stops,
        syntax: Some(syntax),
        turn: applied.generation_prompt,
    })
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

/// Schemas by the rules of a grammar that they are in place of: those in which arguments are JSON.
/// llguidance follows more of a schema than such a rule does.
fn schemas(gbnf: &str, tools: &[Tool]) -> BTreeMap<String, Value> {
    let is_object = |rule: &str| gbnf.contains(&format!("\n{rule} ::= \"{{\""));
    let is_only = |rule: &str| tools.iter().filter(|tool| rule_of(tool) == rule).count() == 1;
    let rules = tools.iter().map(|tool| (rule_of(tool), tool.parameters.clone()));
    rules.filter(|(rule, _)| is_object(rule) && is_only(rule)).collect()
}

/// The rule of a tool's arguments, as llama.cpp names it.
fn rule_of(tool: &Tool) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    format!("tool-{}-schema", tool.name.chars().map(letter).collect::<String>())
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

/// The last messages, from which the form of the answer can be told: results of tools with the calls
/// before them, or the last message alone, after a user's.
fn tail(messages: &[Map<String, Value>]) -> Vec<Value> {
    let is_role = |message: &Map<String, Value>, role: &str| message["role"] == role;
    let n_results = messages.iter().rev().take_while(|m| is_role(m, "tool")).count();
    let start = messages.len().saturating_sub(n_results + 1);
    let last = &messages[start..];
    let mut tail = Vec::with_capacity(last.len() + 1);
    if !last.first().is_some_and(|first| is_role(first, "user")) {
        tail.push(json!({ "role": "user", "content": "x" }));
    }
    tail.extend(last.iter().cloned().map(Value::Object));
    tail
}

/// The tools that a choice leaves.
pub fn chosen(tools: Vec<Tool>, choice: &ToolChoice) -> Vec<Tool> {
    match choice {
        ToolChoice::None => Vec::new(),
        ToolChoice::Auto | ToolChoice::Required => tools,
        ToolChoice::Named(name) => tools.into_iter().filter(|tool| tool.name == *name).collect(),
    }
}
