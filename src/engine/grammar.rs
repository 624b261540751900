//! Grammars: which tokens may come next, by llguidance. No other file uses that library.
//!
//! A [`Grammar`] has consumed the tokens chosen so far. It masks the row of logits that the next
//! one is chosen from, and cuts forbidden candidates out of a tree before they are computed. So the
//! text is the same with drafts and without.

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::Value;

use crate::error::Invalid;
use crate::llama::{Model, Token};
use crate::request::GrammarSource;
use crate::speculate::Tree;

/// Between two parts of JSON: a space, or a line's end and indentation. Without a limit a model may
/// write white space until its tokens run out.
const WHITESPACE: &str = r"( |\n {0,16})?";

/// Compiles grammars for one model's vocabulary.
pub struct Grammars(ParserFactory);

impl Grammars {
    /// Reads a vocabulary, which takes tens of milliseconds.
    ///
    /// # Errors
    /// Why llguidance refused it.
    pub fn new(model: &Model) -> Result<Self, String> {
        let tokens = || (0..model.n_vocab() as i32).map(Token);
        let word = |token| {
            let mut bytes = Vec::new();
            model.piece(token, false, &mut bytes);
            if bytes.is_empty() {
                model.piece(token, true, &mut bytes);
                if !bytes.is_empty() {
                    bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER); // a control token: part of no text
                }
            }
            bytes
        };
        let words: Vec<Vec<u8>> = tokens().map(word).collect();
        let ends: Vec<u32> =
            tokens().filter(|&t| model.is_end(t)).map(|t| t.0.cast_unsigned()).collect();
        let first = *ends.first().ok_or("the model has no end-of-text token")?;
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words)
            .with_eos_tokens(&ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        factory.quiet();
        Ok(Self(factory))
    }

    /// A grammar at its beginning. A large one takes milliseconds.
    ///
    /// # Errors
    /// [`Invalid`] for one that is malformed, that no text follows, or that is beyond llguidance's
    /// limits.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, Invalid> {
        let (param, grammar) = match source {
            GrammarSource::JsonSchema(schema) => {
                ("response_format", TopLevelGrammar::from_json_schema(with_options(schema)))
            }
            GrammarSource::Lark(lark) => ("grammar", TopLevelGrammar::from_lark(lark.clone())),
        };
        let mut matcher = Matcher::new(self.0.create_parser(grammar));
        let refused =
            |why: &str| Invalid::new(param, format!("{param} cannot be followed: {}", why.trim()));
        if let Some(why) = matcher.get_error() {
            return Err(refused(&why));
        }
        let allowed = matcher.compute_mask().map_err(|e| refused(&e.to_string()))?;
        Ok(Grammar { matcher, allowed })
    }
}

/// A schema with the white space allowed in its JSON. One that is no object (`true`) takes no options.
fn with_options(schema: &Value) -> Value {
    let options = JsonCompileOptions {
        whitespace_pattern: Some(WHITESPACE.into()),
        ..JsonCompileOptions::default()
    };
    let mut schema = schema.clone();
    if schema.is_object() {
        options.apply_to(&mut schema);
    }
    schema
}

/// What may follow the tokens chosen so far.
pub struct Grammar {
    matcher: Matcher,
    /// Tokens that may come next, those that end the text among them if it may end here.
    allowed: SimpleVob,
}

/// What llguidance could not go on with: beyond its limits.
#[derive(Debug, thiserror::Error)]
#[error("the grammar cannot be followed any further: {0}")]
pub struct GrammarError(String);

impl Grammar {
    /// Copies `logits` with those of forbidden tokens lowered to minus infinity.
    pub fn mask(&self, logits: &[f32], masked: &mut Vec<f32>) {
        masked.clear();
        masked.extend_from_slice(logits);
        self.allowed.iter_unset_entries(|token| {
            if let Some(logit) = masked.get_mut(token) {
                *logit = f32::NEG_INFINITY;
            }
        });
    }

    /// Cuts forbidden candidates out of a tree.
    pub fn prune(&mut self, tree: &mut Tree) {
        if tree.is_empty() {
            return;
        }
        let mut keeps = vec![false; tree.len()];
        self.walk(tree, None, &mut keeps);
        tree.retain(&keeps);
    }

    /// Marks the candidates after node `at` that may follow there, and goes on after each.
    fn walk(&mut self, tree: &Tree, at: Option<usize>, keeps: &mut [bool]) {
        let children = tree.nodes().iter().enumerate().filter(|(_, n)| n.parent == at);
        for (i, node) in children {
            let token = node.token.0.cast_unsigned();
            // The mask holds for the first place only, where it rejects most candidates cheaply.
            if at.is_none() && !self.allowed.is_allowed(token) {
                continue;
            }
            // A grammar that fails here fails when it masks, too, and is reported there.
            if self.matcher.try_consume_tokens(&[token]).is_ok_and(|n| n == 1) {
                keeps[i] = true;
                if !self.matcher.is_stopped() {
                    self.walk(tree, Some(i), keeps);
                }
                let _ = self.matcher.rollback(1);
            }
        }
    }

    /// Consumes the token that was chosen. Returns `true` if the text is complete: nothing
    /// may follow, or only its end.
    ///
    /// # Errors
    /// [`GrammarError`] when llguidance gives up.
    pub fn accept(&mut self, token: Token) -> Result<bool, GrammarError> {
        self.matcher
            .consume_token(token.0.cast_unsigned())
            .map_err(|e| GrammarError(e.to_string()))?;
        if !self.matcher.is_stopped() {
            match self.matcher.compute_mask() {
                Ok(allowed) => {
                    self.allowed = allowed;
                    return Ok(false);
                }
                Err(_) if self.matcher.stop_reason().is_ok() => return Ok(true),
                Err(error) => return Err(GrammarError(error.to_string())),
            }
        }
        let reason = self.matcher.stop_reason();
        if reason.is_ok() { Ok(true) } else { Err(GrammarError(reason.to_string())) }
    }
}
