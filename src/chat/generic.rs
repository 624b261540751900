//! Tools for the models of a chat template that has none: they are described in the system message,
//! and called as JSON between tags, as Hermes and Qwen have it.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use super::probe::joined;
use super::tools::Tool;
use crate::llama::ChatFormat;
use crate::request::{CallGrammar, GrammarSource};

/// A template whose calls have this form.
const TEMPLATE: &str = "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}{%- if message.content %}{{- message.content }}{%- endif %}\
{%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}\
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// How its models would write.
pub static FORMAT: LazyLock<Option<ChatFormat>> = LazyLock::new(|| {
    ChatFormat::new(TEMPLATE, "", "")
        .inspect_err(|error| tracing::error!(%error, "the generic form of calls cannot be read"))
        .ok()
});

/// What begins a call, and ends it.
const OPEN: &str = "<tool_call>\n";
const CLOSE: &str = "\n</tool_call>";

/// What a call begins with.
pub fn opening() -> &'static str {
    OPEN
}

/// A grammar of calls: one, or several if they may be `parallel`.
pub fn grammar(tools: &[Tool], parallel: bool) -> GrammarSource {
    let quoted = |text: &str| Value::from(text).to_string();
    let more = if parallel { "(\"\\n\" call)*" } else { "" };
    let names: Vec<String> = (0..tools.len()).map(|i| format!("call-{i}")).collect();
    let mut gbnf = format!("root ::= call {more}\ncall ::= {}\n", names.join(" | "));
    for (i, tool) in tools.iter().enumerate() {
        let name = Value::from(tool.name.as_str());
        let begin = quoted(&format!("{OPEN}{{\"name\": {name}, \"arguments\": "));
        let end = quoted(&format!("}}{CLOSE}"));
        gbnf += &format!("call-{i} ::= {begin} arguments-{i} {end}\narguments-{i} ::= \"{{}}\"\n");
    }
    let schema = |(i, tool): (usize, &Tool)| (format!("arguments-{i}"), tool.parameters.clone());
    let schemas = tools.iter().enumerate().map(schema).collect();
    GrammarSource::Calls(CallGrammar { gbnf, schemas, once: Vec::new() })
}

/// What the model is told of its tools.
fn instruction(tools: &[Tool]) -> String {
    let tools: Vec<String> = tools.iter().map(|tool| tool.to_json().to_string()).collect();
    format!(
        "You can call these functions:\n{}\n\nTo call one, answer with its name and arguments as JSON:\n{OPEN}{{\"name\": \
         <name>, \"arguments\": <arguments>}}{CLOSE}",
        tools.join("\n")
    )
}

/// Rewrites messages for a template that knows neither tools nor calls; without system messages the
/// first message tells of tools.
pub fn rewrite(messages: &mut Vec<Map<String, Value>>, tools: &[Tool], has_system: bool) {
    for message in messages.iter_mut() {
        let text = message.get("content").map(joined).unwrap_or_default();
        if message.get("role").is_some_and(|role| role == "tool") {
            message.insert("role".into(), "user".into());
            let text = format!("<tool_response>\n{text}\n</tool_response>");
            message.insert("content".into(), text.into());
            message.remove("tool_call_id");
        } else if let Some(Value::Array(calls)) = message.remove("tool_calls") {
            let mut parts: Vec<String> = if text.is_empty() { vec![] } else { vec![text] };
            parts.extend(calls.iter().map(written));
            message.insert("content".into(), parts.join("\n").into());
        }
    }
    messages.dedup_by(|next, before| {
        let is_response = |message: &Map<String, Value>| {
            let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
            message["role"] == "user" && content.starts_with("<tool_response>")
        };
        let both = is_response(next) && is_response(before);
        if both {
            let joined = [&*before, &*next].map(|m| m["content"].as_str().unwrap_or_default());
            let joined = joined.join("\n");
            before.insert("content".into(), joined.into());
        }
        both
    });
    if tools.is_empty() {
        return;
    }
    let instruction = instruction(tools);
    let is_system = |role: &Value| role == "system" || role == "developer";
    let carries = |first: &&mut Map<String, Value>| !has_system || is_system(&first["role"]);
    if let Some(first) = messages.first_mut().filter(carries) {
        let text = first.get("content").map(joined).unwrap_or_default();
        let text = match is_system(&first["role"]) {
            true => format!("{text}\n\n{instruction}"),
            false => format!("{instruction}\n\n{text}"),
        };
        first.insert("content".into(), text.into());
        return;
    }
    let system = json!({ "role": "system", "content": instruction });
    messages.insert(0, system.as_object().cloned().unwrap_or_default());
}

/// A call as the model writes it.
fn written(call: &Value) -> String {
    let function = &call["function"];
    let arguments = match &function["arguments"] {
        Value::String(text) => text.clone(),
        arguments => arguments.to_string(),
    };
    format!("{OPEN}{{\"name\": {}, \"arguments\": {arguments}}}{CLOSE}", function["name"])
}
