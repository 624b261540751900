//! GBNF, llama.cpp's notation of grammars, as llguidance's dialect of Lark. Pure.
//!
//! GBNF speaks of characters. Lark has a lexer, which takes the longest match of its terminals
//! whatever comes after. So [`parse`] reads the [`rules`], [`split`] finds terminals for which the
//! longest match is always the right one, and [`lark`] writes both.

mod chars;
mod lark;
mod nfa;
mod parse;
mod rules;
mod split;

use std::collections::BTreeMap;

use serde_json::Value;

/// Translates a grammar. The rules that `schemas` names are what these describe: objects in JSON.
///
/// # Errors
/// What is wrong, and in which line.
pub fn to_lark(text: &str, schemas: &BTreeMap<String, Value>) -> Result<String, String> {
    let mut grammar = parse::parse(text, schemas)?;
    if !grammar.prune() {
        return Err("no text of rule `root` ever ends".into());
    }
    grammar.straighten();
    Ok(lark::write(&grammar, &split::split(&grammar), schemas))
}
