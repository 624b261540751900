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

use crate::request::CallGrammar;

/// Translates a grammar of calls, or any other. The rules that its schemas name are what these
/// describe: objects in JSON.
///
/// # Errors
/// What is wrong, and in which line.
pub fn to_lark(source: &CallGrammar) -> Result<String, String> {
    let CallGrammar { gbnf, schemas, once } = source;
    let mut grammar = parse::parse(gbnf, schemas, once)?;
    grammar.limit();
    if !grammar.prune() {
        return Err("no text of rule `root` ever ends".into());
    }
    grammar.straighten();
    Ok(lark::write(&grammar, &split::split(&grammar), schemas))
}
