//! What shapes a template expects, found out by rendering small conversations when it is read: as
//! llama.cpp does it, there is no other way to know.

use serde_json::{Map, Value, json};

use crate::jinja::Text;

/// A text, and a name, that no template has in it.
const NEEDLE: &str = "n33dle";
const NEEDLE_NAME: &str = "n4me";

/// The shapes in which a template takes what clients send in several.
#[derive(Debug, Default)]
pub struct Expects {
    /// `content` as a list of parts; otherwise as a text.
    parts: bool,
    /// None for the `content` of a message that has none; otherwise an empty text.
    none: bool,
    /// Calls: it writes them.
    pub calls: bool,
    /// `arguments` of calls as JSON in a text, as OpenAI has it; otherwise as an object.
    arguments_as_text: bool,
    /// System messages: it writes them.
    pub system: bool,
    /// An empty list for no tools; otherwise none.
    pub tools_as_list: bool,
}

/// Finds out what a template expects; `render` renders messages with it, without tools as none or as
/// an empty list, or fails.
pub fn probe(render: impl Fn(Vec<Map<String, Value>>, &Value) -> Option<Text>) -> Expects {
    let printed_with = |messages: &Value, tools: &Value| {
        let messages = serde_json::from_value(messages.clone()).expect("a list of objects");
        render(messages, tools).map(|text| text.to_string())
    };
    let simple = ["x".into(), json!([{ "type": "text", "text": "x" }])];
    let simple = simple.map(|content: Value| json!([{ "role": "user", "content": content }]));
    let takes = |tools: &Value| simple.iter().any(|chat| printed_with(chat, tools).is_some());
    let tools_as_list = !takes(&Value::Null) && takes(&json!([]));
    let tools = if tools_as_list { json!([]) } else { Value::Null };
    let printed = |messages: Value| printed_with(&messages, &tools).unwrap_or_default();
    let asked = |content: Value| printed(json!([{ "role": "user", "content": content }]));
    // As the last message but for the result, and as an earlier one: templates tell them apart.
    let called = |content: Value, arguments: Value| {
        let call = json!({ "id": "call12345", "type": "function", "function": { "name": NEEDLE_NAME, "arguments": arguments } });
        let text = |text: &str| {
            if content.is_array() { json!([{ "type": "text", "text": text }]) } else { json!(text) }
        };
        let open = json!([
            { "role": "user", "content": text("x") },
            { "role": "assistant", "content": content, "tool_calls": [call] },
            { "role": "tool", "content": text("x"), "tool_call_id": "call12345", "name": "x" },
        ]);
        let mut closed = open.clone();
        let more = [
            json!({ "role": "assistant", "content": text("x") }),
            json!({ "role": "user", "content": text("x") }),
        ];
        closed.as_array_mut().expect("a list").extend(more);
        [printed(open), printed(closed)]
    };
    let parts = !asked(json!(NEEDLE)).contains(NEEDLE)
        && asked(json!([{ "type": "text", "text": NEEDLE }])).contains(NEEDLE);
    let empty = if parts { json!([]) } else { json!("") };
    let object = json!({ NEEDLE: NEEDLE });
    let text = json!(object.to_string());
    // A template may print calls only where content is none.
    let of_object = [called(empty.clone(), object.clone()), called(Value::Null, object)];
    let of_text = [called(empty, text.clone()), called(Value::Null, text)];
    // A dictionary that is only printed has Python's quotes.
    let takes_object = of_object.iter().any(|texts| {
        let all = texts.concat();
        all.contains(NEEDLE) && !all.contains(&format!("'{NEEDLE}': "))
    });
    let arguments_as_text =
        !takes_object && of_text.iter().any(|texts| texts.concat().contains(NEEDLE));
    let of_both = if arguments_as_text { of_text } else { of_object };
    let is_seen = |text: &str| text.contains(NEEDLE_NAME) || text.contains(NEEDLE);
    let calls = of_both.iter().any(|texts| is_seen(&texts.concat()));
    let [_, of_none] = of_both;
    let none = of_none.concat().contains(NEEDLE_NAME)
        && of_none.iter().all(|text| !text.is_empty() && !text.contains("None"));
    let text =
        |text: &str| if parts { json!([{ "type": "text", "text": text }]) } else { json!(text) };
    let system = printed(json!([
        { "role": "system", "content": text(NEEDLE) },
        { "role": "user", "content": text("x") },
    ]));
    let system = system.contains(NEEDLE);
    Expects { parts, none, calls, arguments_as_text, system, tools_as_list }
}

/// The text of a content, whole or in parts, which become lines, as in llama-server and vLLM.
pub fn joined(content: &Value) -> String {
    let text_of = |part: &Value| part["text"].as_str().unwrap_or_default().to_owned();
    let lines = |parts: &Vec<Value>| parts.iter().map(text_of).collect::<Vec<_>>().join("\n");
    match content {
        Value::Array(parts) => lines(parts),
        content => content.as_str().unwrap_or_default().to_owned(),
    }
}

/// Whether a message calls tools.
pub fn has_calls(message: &Map<String, Value>) -> bool {
    message.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty())
}

impl Expects {
    /// Brings a message into the shapes that the template expects.
    pub fn shape(&self, message: &mut Map<String, Value>) {
        let content = message.entry("content").or_insert(Value::Null);
        match content {
            Value::Null if self.none => {}
            Value::Null if self.parts => *content = json!([]),
            Value::Null => *content = json!(""),
            Value::String(text) if self.parts => {
                *content = json!([{ "type": "text", "text": text }])
            }
            Value::Array(_) if !self.parts => *content = joined(content).into(),
            _ => {}
        }
        for call in
            message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten()
        {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            match arguments {
                Value::String(text) if !self.arguments_as_text => {
                    if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                        *arguments = object;
                    }
                }
                Value::Object(_) if self.arguments_as_text => {
                    *arguments = arguments.to_string().into()
                }
                _ => {}
            }
        }
    }
}
