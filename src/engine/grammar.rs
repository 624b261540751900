//! Grammars: which tokens may come next, by llguidance. No other file uses that library.
//!
//! A [`Grammar`] has consumed the tokens chosen so far. It masks the row of logits that the next
//! one is chosen from, and tells of a candidate whether it may follow. Where it leaves one
//! continuation, it leaves those tokens alone that the tokenizer would make of it.

use std::num::NonZeroUsize;
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use lru::LruCache;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::digits::Digits;
use super::gbnf;
use crate::error::Invalid;
use crate::llama::{Model, Token};
use crate::request::{CallGrammar, GrammarSource};

/// Bytes of stack to compile on. llguidance descends as deep as schemas refer to each other, or
/// objects have properties; only what is used becomes memory.
const STACK: usize = 512 << 20;

/// Bytes of the longest grammar, and of the longest schema as JSON.
pub const MAX_BYTES: usize = 256 << 10;

/// Characters of the longest reason that a client is told.
const MAX_REASON: usize = 300;

/// Compiled grammars that are kept, those of the requests that were last. One takes from kilobytes to
/// some megabytes.
const KEPT: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// Compiles grammars for one model's vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    /// By their sources as text: the order of a schema's properties is that of the answer's.
    compiled: Mutex<LruCache<String, Grammar>>,
    tokenizer: Arc<Tokenizer>,
    numerals: Arc<Numerals>,
}

/// The model's tokenizer, as llguidance asks it for the tokens of what must follow.
struct Tokenizer {
    model: Arc<Model>,
    trie: TokTrie,
}

impl Tokenizer {
    /// The tokens that the model's own tokenizer makes of a text; `None` if they are not exactly it.
    fn tokens(&self, text: &[u8]) -> Option<Vec<u32>> {
        let text = std::str::from_utf8(text).ok()?;
        // Some put a space before a text's first word; after a line's end they do not.
        ["", "\n"].iter().find_map(|before| {
            let tokens = self.model.tokenize_part(&format!("{before}{text}"), false, true).ok()?;
            let tokens: Vec<u32> = tokens.iter().map(|token| token.0.cast_unsigned()).collect();
            let lengths = tokens.iter().map(|&token| self.trie.token_len(token));
            let mut left: usize = lengths.sum();
            let first = tokens.iter().position(|&token| {
                let is_here = left == text.len();
                left -= self.trie.token_len(token).min(left);
                is_here
            })?;
            let tokens = tokens[first..].to_vec();
            (self.trie.decode_raw(&tokens) == text.as_bytes()).then_some(tokens)
        })
    }
}

impl TokenizerEnv for Tokenizer {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<u32> {
        self.tokens(text).unwrap_or_else(|| self.trie.greedy_tokenize(text))
    }
}

/// Tokens that begin with digits, and how many.
struct Numerals(Vec<(u32, usize)>);

impl Grammars {
    /// Reads a vocabulary, which takes tens of milliseconds. The names of `shown` control tokens are
    /// text; other control tokens are part of no text.
    ///
    /// # Errors
    /// Why llguidance refused it.
    pub fn new(model: &Arc<Model>, shown: &[Token]) -> Result<Self, String> {
        let tokens = || (0..model.n_vocab() as i32).map(Token);
        let word = |token| {
            let mut bytes = Vec::new();
            model.piece(token, false, &mut bytes);
            if bytes.is_empty() {
                model.piece(token, true, &mut bytes);
                if !bytes.is_empty() && !shown.contains(&token) {
                    bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
                }
            }
            bytes
        };
        let words: Vec<Vec<u8>> = tokens().map(word).collect();
        let ends: Vec<u32> =
            tokens().filter(|&t| model.is_end(t)).map(|t| t.0.cast_unsigned()).collect();
        let first = *ends.first().ok_or("the model has no end-of-text token")?;
        let n_digits = |word: &Vec<u8>| word.iter().take_while(|b| b.is_ascii_digit()).count();
        let numerals = (0..).zip(words.iter().map(n_digits)).filter(|&(_, n)| n > 0).collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words)
            .with_eos_tokens(&ends);
        let tokenizer = Arc::new(Tokenizer { model: Arc::clone(model), trie });
        let env: TokEnv = Arc::clone(&tokenizer) as TokEnv;
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
        *factory.limits_mut() = ParserLimits {
            max_items_in_row: 1000 + 4 * MAX_OPTIONAL, // an optional property takes four
            verbose_errors: false,
            ..ParserLimits::default()
        };
        factory.quiet();
        let compiled = Mutex::new(LruCache::new(KEPT));
        Ok(Self { factory, compiled, tokenizer, numerals: Arc::new(Numerals(numerals)) })
    }

    /// The tokens of a text within an answer.
    #[must_use]
    pub fn tokenize(&self, text: &str) -> Vec<Token> {
        tokens(self.tokenizer.tokenize_bytes(text.as_bytes()))
    }

    /// A grammar at its beginning. A large one takes milliseconds, the first time.
    ///
    /// # Errors
    /// [`Invalid`] for one that is malformed, that no text follows, or that is beyond llguidance's
    /// limits.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, Invalid> {
        let param = match source {
            GrammarSource::JsonSchema(_) => "response_format",
            GrammarSource::Lark(_) | GrammarSource::Gbnf(_) => "grammar",
            GrammarSource::Calls(_) => "tools",
        };
        let key = format!("{source:?}");
        if let Some(known) = self.compiled.lock().get(&key) {
            return Ok(known.at_beginning());
        }
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK);
            let thread = thread.spawn_scoped(scope, || self.compile_here(source));
            let thread = thread.map_err(|e| format!("there is no thread to compile it: {e}"))?;
            thread.join().unwrap_or_else(|_| Err("it cannot be compiled".into()))
        });
        let compiled = compiled.map_err(|why| {
            Invalid::new(param, format!("{param} cannot be followed: {}", brief(&why)))
        })?;
        self.compiled.lock().put(key, compiled.at_beginning());
        Ok(compiled)
    }

    fn compile_here(&self, source: &GrammarSource) -> Result<Grammar, String> {
        let (grammar, digits) = match source {
            GrammarSource::JsonSchema(schema) => {
                limit_bytes(schema.to_string().len())?;
                let schema = with_options(schema, &one_line())?;
                (TopLevelGrammar::from_json_schema(schema), Some(Digits::default()))
            }
            GrammarSource::Lark(lark) => {
                limit_bytes(lark.len())?;
                (TopLevelGrammar::from_lark(lark.clone()), None)
            }
            GrammarSource::Gbnf(gbnf) => {
                limit_bytes(gbnf.len())?;
                let source = CallGrammar { gbnf: gbnf.clone(), ..CallGrammar::default() };
                (TopLevelGrammar::from_lark(gbnf::to_lark(&source)?), None)
            }
            GrammarSource::Calls(source) => {
                let n_bytes = |schema: &Value| schema.to_string().len();
                limit_bytes(source.gbnf.len())?;
                limit_bytes(source.schemas.values().map(n_bytes).sum())?;
                let schemas = source
                    .schemas
                    .iter()
                    .map(|(rule, schema)| Ok((rule.clone(), with_options(schema, &one_line())?)));
                let schemas = schemas.collect::<Result<_, String>>()?;
                let lark = gbnf::to_lark(&CallGrammar { schemas, ..source.clone() })?;
                (TopLevelGrammar::from_lark(lark), Some(Digits::default()))
            }
        };
        let parser = self.factory.create_parser(grammar).map_err(|e| e.to_string())?;
        let goes_back = parser.parser.grammar().lexer_spec().can_rollback();
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(why) = matcher.get_error() {
            return Err(why);
        }
        let allowed = matcher.compute_mask().map_err(|e| e.to_string())?;
        let (numerals, tokenizer) = (Arc::clone(&self.numerals), Arc::clone(&self.tokenizer));
        Ok(Grammar { matcher, allowed, goes_back, digits, numerals, tokenizer })
    }
}

fn tokens(ids: Vec<u32>) -> Vec<Token> {
    ids.into_iter().map(|id| Token(id.cast_signed())).collect()
}

fn limit_bytes(n: usize) -> Result<(), String> {
    if n <= MAX_BYTES {
        return Ok(());
    }
    Err(format!("it has {n} bytes, but the limit is {MAX_BYTES}"))
}

/// A reason of llguidance's for a client: its first line, not too long.
fn brief(why: &str) -> String {
    let line = match why.trim().lines().next().unwrap_or_default() {
        "NoExtensionBias" => "no text can follow",
        line if line.starts_with("panic: ") => {
            tracing::warn!("llguidance failed on a grammar: {line}");
            "it cannot be read"
        }
        line => line,
    };
    match line.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

/// JSON in one line with a space after commas and colons, as chat templates write arguments. Where a
/// model may choose white space it may write that until its tokens run out; and what it need not choose
/// is drafted.
fn one_line() -> JsonCompileOptions {
    JsonCompileOptions {
        item_separator: ", ".into(),
        key_separator: ": ".into(),
        whitespace_flexible: false,
        ..JsonCompileOptions::default()
    }
}

/// A schema with the white space of its JSON, and an end to its formats; `true` is an object without
/// keywords.
///
/// # Errors
/// For an object that has too many properties.
fn with_options(schema: &Value, options: &JsonCompileOptions) -> Result<Value, String> {
    let mut schema = if *schema == Value::Bool(true) { json!({}) } else { schema.clone() };
    prepare(&mut schema)?;
    if schema.is_object() {
        options.apply_to(&mut schema);
    }
    Ok(schema)
}

/// Properties of one object that may be left out. The time to compile grows with their square.
const MAX_OPTIONAL: usize = 1000;

/// Formats whose texts may go on for ever, in fractions of a second or in counts, and characters
/// that are enough for nanoseconds with an offset, or nine digits of a unit.
const ENDLESS_FORMATS: [(&str, u64); 3] = [("date-time", 35), ("time", 24), ("duration", 32)];

/// Prepares a schema and those below it.
fn prepare(schema: &mut Value) -> Result<(), String> {
    if let Value::Array(schemas) = schema {
        return schemas.iter_mut().try_for_each(prepare);
    }
    let Value::Object(keywords) = schema else { return Ok(()) };
    bound_format(keywords);
    name_patterns(keywords);
    let n_properties = keywords.get("properties").and_then(Value::as_object).map_or(0, Map::len);
    let n_required = keywords.get("required").and_then(Value::as_array).map_or(0, Vec::len);
    let n_optional = n_properties.saturating_sub(n_required);
    if n_optional > MAX_OPTIONAL {
        return Err(format!(
            "an object has {n_optional} optional properties, but the limit is {MAX_OPTIONAL}"
        ));
    }
    keywords.iter_mut().try_for_each(|(keyword, value)| match (keyword.as_str(), value) {
        ("const" | "enum" | "default" | "examples", _) => Ok(()), // data
        ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(named)) => {
            named.values_mut().try_for_each(prepare)
        }
        (_, value) => prepare(value),
    })
}

/// Limits the length of a text in an endless format.
fn bound_format(keywords: &mut Map<String, Value>) {
    let format = keywords.get("format").and_then(Value::as_str);
    let bound = ENDLESS_FORMATS.iter().find(|(name, _)| format == Some(name));
    let Some(&(_, most)) = bound else { return };
    let length = keywords.entry("maxLength").or_insert(most.into());
    if length.as_u64().is_some_and(|n| n > most) {
        *length = most.into();
    }
}

/// Makes properties of patterns that match one name: llguidance finds no text after a property
/// that was written already.
fn name_patterns(keywords: &mut Map<String, Value>) {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let name = |pattern: &String| {
        let name = pattern.strip_prefix('^')?.strip_suffix('$')?;
        name.chars().all(is_name).then(|| (pattern.clone(), name.to_owned()))
    };
    let Some(Value::Object(patterns)) = keywords.get_mut("patternProperties") else { return };
    let named: Vec<(String, String)> = patterns.keys().filter_map(name).collect();
    let named: Vec<(String, Value)> = named
        .into_iter()
        .filter_map(|(pattern, name)| Some((name, patterns.remove(&pattern)?)))
        .collect();
    if named.is_empty() {
        return;
    }
    if patterns.is_empty() {
        keywords.remove("patternProperties");
    }
    let properties = keywords.entry("properties").or_insert_with(|| Map::new().into());
    let Value::Object(properties) = properties else { return };
    for (name, schema) in named {
        let both = match properties.remove(&name) {
            Some(own) => json!({ "allOf": [own, schema] }),
            None => schema,
        };
        properties.insert(name, both);
    }
}

/// What may follow the tokens chosen so far.
pub struct Grammar {
    matcher: Matcher,
    /// Tokens that may come next, those that end the text among them if it may end here.
    allowed: SimpleVob,
    /// Whether a token that was consumed can be given back.
    goes_back: bool,
    /// Where in JSON the text is; `None` if it is no JSON.
    digits: Option<Digits>,
    numerals: Arc<Numerals>,
    tokenizer: Arc<Tokenizer>,
}

/// What llguidance could not go on with: beyond its limits.
#[derive(Debug, thiserror::Error)]
#[error("the grammar cannot be followed any further: {0}")]
pub struct GrammarError(pub String);

impl Grammar {
    /// Another that has consumed the same tokens: of one that has consumed none.
    fn at_beginning(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
            allowed: self.allowed.clone(),
            numerals: Arc::clone(&self.numerals),
            tokenizer: Arc::clone(&self.tokenizer),
            ..*self
        }
    }

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

    /// Whether a token may come next.
    #[must_use]
    pub fn allows(&self, token: Token) -> bool {
        self.allowed.is_allowed(token.0.cast_unsigned())
    }

    /// The tokens that must come next, if any must: what the tokenizer makes of the one continuation.
    pub fn forced(&mut self) -> Vec<Token> {
        if self.matcher.is_stopped() {
            return Vec::new();
        }
        tokens(self.matcher.compute_ff_tokens())
    }

    /// Consumes tokens of a path that is only looked at, to be taken [back](Self::go_back). Returns
    /// `false`, and consumes none, if they may not follow or could not be taken back.
    pub fn try_path(&mut self, path: &[Token]) -> bool {
        let path: Vec<u32> = path.iter().map(|token| token.0.cast_unsigned()).collect();
        if !self.goes_back {
            return false;
        }
        // A grammar that fails here fails when it masks, too, and is reported there.
        let n = self.matcher.try_consume_tokens(&path).unwrap_or(0);
        if n < path.len() {
            let _ = self.matcher.rollback(n);
        }
        n == path.len()
    }

    /// Takes the last `n` tokens of a path back.
    pub fn go_back(&mut self, n: usize) {
        let _ = self.matcher.rollback(n);
    }

    /// Nothing may follow a path.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// The tokens of bytes of the text.
    #[must_use]
    pub fn tokenize(&self, text: &[u8]) -> Vec<Token> {
        tokens(self.tokenizer.tokenize_bytes(text))
    }

    /// Where in JSON the text is, if it is JSON.
    pub(super) fn digits(&self) -> Option<Digits> {
        self.digits
    }

    /// The text may end here.
    pub(super) fn may_end(&mut self) -> bool {
        self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false)
    }

    /// A token's bytes.
    pub(super) fn bytes(&self, token: Token) -> &[u8] {
        self.tokenizer.trie.token(token.0.cast_unsigned())
    }

    /// A token that may come next, the one of the fewest bytes and among equals the first.
    pub(super) fn any_token(&mut self) -> Option<Token> {
        let allowed = self.matcher.compute_mask().ok()?;
        let trie = &self.tokenizer.trie;
        let plain = allowed.iter().filter(|&token| !trie.eos_token_set().is_allowed(token));
        let shortest = plain.min_by_key(|&token| trie.token_len(token))?;
        Some(Token(shortest.cast_signed()))
    }

    /// Consumes the token that was chosen. Returns `true` if the text is complete: nothing
    /// may follow, or only its end.
    ///
    /// # Errors
    /// [`GrammarError`] when llguidance gives up.
    pub fn accept(&mut self, token: Token) -> Result<bool, GrammarError> {
        self.follow(token.0.cast_unsigned())
    }

    /// Consumes a text's tokens before the first one is chosen. Returns `false` if they do not fit.
    pub fn begin_after(&mut self, path: &[Token]) -> bool {
        path.iter().all(|token| self.accept(*token).is_ok())
    }

    /// Goes on after a [path](Self::try_path) that is not taken back; as [`accept`](Self::accept).
    ///
    /// # Errors
    /// [`GrammarError`] when llguidance gives up.
    pub fn settle(&mut self, path: &[Token]) -> Result<bool, GrammarError> {
        let path: Vec<u32> = path.iter().map(|token| token.0.cast_unsigned()).collect();
        self.after(&path)
    }

    fn follow(&mut self, token: u32) -> Result<bool, GrammarError> {
        let failed = |why: String| GrammarError(brief(&why));
        self.matcher.consume_token(token).map_err(|e| failed(e.to_string()))?;
        self.after(&[token])
    }

    /// Finds out what may follow, now that `path` was consumed.
    fn after(&mut self, path: &[u32]) -> Result<bool, GrammarError> {
        let failed = |why: String| GrammarError(brief(&why));
        if self.matcher.is_stopped() {
            let reason = self.matcher.stop_reason();
            return if reason.is_ok() { Ok(true) } else { Err(failed(reason.to_string())) };
        }
        match self.matcher.compute_mask() {
            Ok(allowed) => self.allowed = allowed,
            Err(error) => return Err(failed(error.to_string())),
        }
        let Ok(env) = self.matcher.tok_env() else { return Ok(false) };
        let Some(digits) = &mut self.digits else { return Ok(false) };
        path.iter().for_each(|&token| digits.push(env.tok_trie().token(token)));
        let Some(left) = digits.left() else { return Ok(false) };
        Ok(self.bound_digits(left, env.tok_trie()))
    }

    /// Forbids tokens with more than `left` digits where the number can end without them. Returns
    /// `true` if then nothing may follow but the text's end.
    fn bound_digits(&mut self, left: usize, trie: &TokTrie) -> bool {
        let mut bounded = self.allowed.clone();
        for &(token, n) in &self.numerals.0 {
            if n > left {
                bounded.disallow_token(token);
            }
        }
        if !bounded.is_zero() {
            self.allowed = bounded;
            let ends = trie.eos_token_set();
            return left == 0 && self.allowed.iter().all(|token| ends.is_allowed(token));
        }
        // It may not end here: with a digit after which it may, if there is one.
        let digits =
            self.numerals.0.iter().filter(|&&(token, n)| n == 1 && trie.token_len(token) == 1);
        let digits: Vec<u32> = digits.map(|(token, _)| *token).collect();
        let allowed: Vec<u32> =
            digits.into_iter().filter(|&t| self.allowed.is_allowed(t)).collect();
        let last: Vec<u32> =
            allowed.into_iter().filter(|&token| self.may_end_after(token)).collect();
        if !last.is_empty() {
            let mut only = trie.alloc_token_set();
            last.into_iter().for_each(|token| only.allow_token(token));
            self.allowed = only;
        }
        false
    }

    /// Whether something other than a digit may follow a token that may come next.
    fn may_end_after(&mut self, token: u32) -> bool {
        if !self.goes_back || !self.matcher.try_consume_tokens(&[token]).is_ok_and(|n| n == 1) {
            return false;
        }
        let may_end = self.matcher.is_stopped()
            || self.matcher.compute_mask().is_ok_and(|mut after| {
                self.numerals.0.iter().for_each(|(token, _)| after.disallow_token(*token));
                !after.is_zero()
            });
        let _ = self.matcher.rollback(1);
        may_end
    }
}
