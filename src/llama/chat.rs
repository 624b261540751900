//! How the models of a chat template write thoughts and calls of tools: llama.cpp's `common/chat`,
//! behind the functions of `vendor/chat/chat.h`, which has the fields of what passes as JSON.

use std::ffi::{CStr, CString, c_char};
use std::ptr::{NonNull, null_mut};

use serde::Deserialize;
use serde_json::Value;

use super::LlamaError;

#[allow(non_camel_case_types, dead_code, missing_docs, clippy::all)]
mod sys {
    include!(concat!(env!("OUT_DIR"), "/chat_bindings.rs"));
}

/// A chat template's format.
#[derive(Debug)]
pub struct ChatFormat(NonNull<sys::medusa_chat>);

// SAFETY: chat.h: any thread may call any function, and threads may share one.
unsafe impl Send for ChatFormat {}
// SAFETY: as above.
unsafe impl Sync for ChatFormat {}

impl Drop for ChatFormat {
    fn drop(&mut self) {
        // SAFETY: `new` made it, and nobody has it any more.
        unsafe { sys::medusa_chat_free(self.0.as_ptr()) }
    }
}

impl ChatFormat {
    /// Of a template in Jinja; `bos` and `eos` are the texts of those tokens.
    ///
    /// # Errors
    /// llama.cpp cannot read it.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<Self, LlamaError> {
        let [template, bos, eos] = [template, bos, eos].map(to_c);
        let (template, bos, eos) = (template?, bos?, eos?);
        let mut error = null_mut();
        // SAFETY: the strings live as long as the call; `error` is set if it returns null.
        let chat = unsafe {
            sys::medusa_chat_new(template.as_ptr(), bos.as_ptr(), eos.as_ptr(), &raw mut error)
        };
        NonNull::new(chat).map(Self).ok_or_else(|| failure(error))
    }

    /// What the template can express, by the names in chat.h.
    ///
    /// # Errors
    /// llama.cpp's.
    pub fn capabilities(&self) -> Result<Value, LlamaError> {
        let mut error = null_mut();
        // SAFETY: `self` is alive; `error` is set if it returns null.
        let json = unsafe { sys::medusa_chat_capabilities(self.0.as_ptr(), &raw mut error) };
        parsed(json, error)
    }

    /// What a request's answer looks like: prompt, grammar, triggers and syntax.
    ///
    /// # Errors
    /// The template refuses the messages or the tools.
    pub fn apply(&self, request: &Value) -> Result<Value, LlamaError> {
        let request = to_c(&request.to_string())?;
        let mut error = null_mut();
        // SAFETY: `self` and the string are alive; `error` is set if it returns null.
        let json =
            unsafe { sys::medusa_chat_apply(self.0.as_ptr(), request.as_ptr(), &raw mut error) };
        parsed(json, error)
    }
}

/// Reads answers to one request.
#[derive(Debug)]
pub struct AnswerParser(NonNull<sys::medusa_chat_parser>);

// SAFETY: chat.h: any thread may call any function, and threads may share one.
unsafe impl Send for AnswerParser {}
// SAFETY: as above.
unsafe impl Sync for AnswerParser {}

impl Drop for AnswerParser {
    fn drop(&mut self) {
        // SAFETY: `new` made it, and nobody has it any more.
        unsafe { sys::medusa_chat_parser_free(self.0.as_ptr()) }
    }
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ParsedAnswer {
    /// Its text.
    pub content: String,
    /// Its thoughts.
    #[serde(rename = "reasoning_content")]
    pub reasoning: String,
    /// Its calls of tools, in order.
    #[serde(rename = "tool_calls")]
    pub calls: Vec<ParsedCall>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ParsedCall {
    /// As the model gave it; often empty.
    pub id: String,
    /// The tool's.
    pub name: String,
    /// JSON; of an unfinished call the beginning of it.
    pub arguments: String,
}

impl AnswerParser {
    /// Of the `syntax` in what [`ChatFormat::apply`] returns.
    ///
    /// # Errors
    /// It is none.
    pub fn new(syntax: &Value) -> Result<Self, LlamaError> {
        let syntax = to_c(&syntax.to_string())?;
        let mut error = null_mut();
        // SAFETY: the string lives as long as the call; `error` is set if it returns null.
        let parser = unsafe { sys::medusa_chat_parser_new(syntax.as_ptr(), &raw mut error) };
        NonNull::new(parser).map(Self).ok_or_else(|| failure(error))
    }

    /// Parses all that was generated so far. If `is_partial`, more may follow: what may be the
    /// beginning of a tag is left out, and a text that follows no syntax may give nothing.
    ///
    /// # Errors
    /// A whole text follows no syntax, or holds a zero byte.
    pub fn parse(&self, text: &str, is_partial: bool) -> Result<ParsedAnswer, LlamaError> {
        let text = to_c(text)?;
        let mut error = null_mut();
        // SAFETY: `self` and the string are alive; `error` is set if it returns null.
        let json = unsafe {
            sys::medusa_chat_parse(self.0.as_ptr(), text.as_ptr(), is_partial, &raw mut error)
        };
        let answer = parsed(json, error)?;
        serde_json::from_value(answer).map_err(|e| LlamaError::Chat(e.to_string()))
    }
}

fn to_c(text: &str) -> Result<CString, LlamaError> {
    CString::new(text).map_err(|_| LlamaError::Chat("there is a zero byte in it".into()))
}

/// Takes a string that chat.h's functions returned, or null and what they said then.
fn parsed(json: *mut c_char, error: *mut c_char) -> Result<Value, LlamaError> {
    let text = taken(json).ok_or_else(|| failure(error))?;
    serde_json::from_str(&text).map_err(|e| LlamaError::Chat(e.to_string()))
}

fn failure(error: *mut c_char) -> LlamaError {
    LlamaError::Chat(taken(error).unwrap_or_else(|| "no reason given".into()))
}

/// Copies and frees a string; `None` for null.
fn taken(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: a string of chat.h's functions ends with a zero byte.
    let copy = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: it is ours, and this is its only pointer.
    unsafe { sys::medusa_chat_string_free(text) };
    Some(copy)
}
