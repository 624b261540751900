//! What a model may call, and whether it must.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::Invalid;

/// Bytes of a tool's name, at most.
const MAX_NAME: usize = 128;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_`, `-`, `.` and `:`.
    pub name: String,
    /// What it does; may be empty.
    pub description: String,
    /// A JSON schema of its arguments, an object.
    pub parameters: Value,
}

impl Tool {
    /// As OpenAI's clients describe it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let Self { name, description, parameters } = self;
        json!({
            "type": "function",
            "function": { "name": name, "description": description, "parameters": parameters },
        })
    }

    /// One as OpenAI's clients describe it, at `path` of a body.
    ///
    /// # Errors
    /// [`Invalid`] unless it is a function with a name of its own and a schema.
    pub fn from_json(tool: &Value, path: &str) -> Result<Self, Invalid> {
        let fail = |field: &str, why: &str| {
            let at = if field.is_empty() { path.to_owned() } else { format!("{path}.{field}") };
            Invalid::new(&at, format!("{at} {why}"))
        };
        if let Some(kind) = tool.get("type").filter(|kind| **kind != "function") {
            let shown: String = kind.to_string().chars().take(40).collect();
            return Err(fail("type", &format!("is {shown}; it must be \"function\"")));
        }
        let Some(function) = tool.get("function").and_then(Value::as_object) else {
            return Err(fail("function", "is missing"));
        };
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        let is_plain = |c: char| c.is_alphanumeric() || "_-.:/".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_plain) {
            let why = format!(
                "must be a name of 1 to {MAX_NAME} bytes: letters, digits, `_`, `-`, `.`, `:`, `/`"
            );
            return Err(fail("function.name", &why));
        }
        let parameters = match function.get("parameters") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(schema)) => schema.clone(),
            Some(_) => return Err(fail("function.parameters", "must be a JSON schema, an object")),
        };
        let description = function.get("description").and_then(Value::as_str).unwrap_or_default();
        Ok(Self {
            name: name.to_owned(),
            description: description.to_owned(),
            parameters: arguments_schema(parameters),
        })
    }
}

/// A schema of arguments, which are an object.
fn arguments_schema(mut schema: Map<String, Value>) -> Value {
    let says_what = ["type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"];
    if !says_what.iter().any(|keyword| schema.contains_key(*keyword)) {
        schema.insert("type".into(), "object".into());
    }
    if schema.get("type").is_some_and(|kind| kind == "object") {
        schema.entry("properties").or_insert_with(|| json!({}));
    }
    // A model that may would invent arguments.
    if !ALLOWS_MORE.iter().any(|keyword| schema.contains_key(*keyword)) && lists_required(&schema) {
        schema.insert("additionalProperties".into(), false.into());
    }
    Value::Object(schema)
}

/// Keywords of a schema that may ask for arguments beside its `properties`.
const ALLOWS_MORE: [&str; 13] = [
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "unevaluatedProperties",
    "minProperties",
    "dependentSchemas",
    "dependentRequired",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "not",
];

/// Whether all arguments that a schema requires are among its `properties`.
fn lists_required(schema: &Map<String, Value>) -> bool {
    let Some(listed) = schema.get("properties").and_then(Value::as_object) else { return false };
    let required = schema.get("required").and_then(Value::as_array);
    let mut names = required.into_iter().flatten().map(|name| name.as_str().unwrap_or_default());
    names.all(|name| listed.contains_key(name))
}

/// Whether the model is to call tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// It is told of none.
    None,
    /// It may.
    #[default]
    Auto,
    /// It must call one or more.
    Required,
    /// It must call this one.
    Named(String),
}

/// A choice as OpenAI's clients write it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Written {
    Word(String),
    Function {
        function: Name,
    },
    /// As `/v1/responses` has it.
    Flat {
        name: String,
    },
    Kind {
        r#type: String,
    },
}

#[derive(Debug, Deserialize)]
struct Name {
    name: String,
}

impl ToolChoice {
    /// As OpenAI's clients write it, in the field `tool_choice`.
    ///
    /// # Errors
    /// [`Invalid`] for what is none, or names no tool of `tools`.
    pub fn from_json(choice: Option<&Value>, tools: &[Tool]) -> Result<Self, Invalid> {
        let Some(choice) = choice else { return Ok(Self::Auto) };
        let fail = |why: String| Invalid::new("tool_choice", format!("tool_choice {why}"));
        let words = "\"none\", \"auto\", \"required\", or {\"type\": \"function\", \"function\": {\"name\": ...}}";
        let written = Written::deserialize(choice).map_err(|_| fail(format!("must be {words}")))?;
        let choice = match written {
            Written::Word(word) | Written::Kind { r#type: word } => match word.as_str() {
                "none" => Self::None,
                "auto" => Self::Auto,
                "required" | "any" => Self::Required,
                _ => return Err(fail(format!("must be {words}"))),
            },
            Written::Function { function: Name { name } } | Written::Flat { name } => {
                Self::Named(name)
            }
        };
        choice.check(tools)?;
        Ok(choice)
    }

    /// # Errors
    /// [`Invalid`] if it asks for a tool that there is not.
    pub fn check(&self, tools: &[Tool]) -> Result<(), Invalid> {
        let why = match self {
            Self::Required if tools.is_empty() => "asks for a call, but there are no tools".into(),
            Self::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
                let shown: String = name.chars().take(40).collect();
                format!("names {shown:?}, which is none of the tools")
            }
            _ => return Ok(()),
        };
        Err(Invalid::new("tool_choice", format!("tool_choice {why}")))
    }

    /// The model must call a tool.
    #[must_use]
    pub fn is_demand(&self) -> bool {
        matches!(self, Self::Required | Self::Named(_))
    }
}

/// The tools of a body's `tools`, as OpenAI's clients describe them.
///
/// # Errors
/// [`Invalid`] for one that is none, or two of one name.
pub fn tools_from_json(tools: &[Map<String, Value>]) -> Result<Vec<Tool>, Invalid> {
    let mut known: Vec<Tool> = Vec::with_capacity(tools.len());
    for (i, tool) in tools.iter().enumerate() {
        let path = format!("tools[{i}]");
        let tool = Tool::from_json(&Value::Object(tool.clone()), &path)?;
        if known.iter().any(|other| other.name == tool.name) {
            let at = format!("{path}.function.name");
            let message = format!("{at} is {:?}, as of a tool before it", tool.name);
            return Err(Invalid::new(&at, message));
        }
        known.push(tool);
    }
    Ok(known)
}
