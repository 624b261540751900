//! The fields that all dialects share, and the types of their values.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

use crate::error::Invalid;
use crate::llama::Token;
use crate::request::{GrammarSource, Prompt};

/// Declares a body: its own fields, and those that all dialects share.
macro_rules! request_body {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($own)*
            /// The model that answers, where there are several; a single one answers to any name.
            #[schema(example = "any")]
            pub model: Option<String>,
            /// Keep this many most likely tokens; 0 or less keeps all.
            #[schema(default = 0, minimum = -2147483648, maximum = 2147483647)]
            pub top_k: i64,
            /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
            #[schema(default = 0.0, minimum = 0.0, maximum = 1.0)]
            pub min_p: f32,
            /// Keep the tokens whose surprise is closest to the entropy, up to this probability
            /// together; 1 keeps all.
            #[schema(default = 1.0, minimum = 0.0, maximum = 1.0)]
            pub typical_p: f32,
            /// Keep tokens at most this many standard deviations below the largest logit; 0 and
            /// below keep all.
            #[schema(default = -1.0, minimum = -1.0, maximum = 100.0)]
            pub top_n_sigma: f32,
            /// XTC: how often the tokens of at least `xtc_threshold` are dropped but for the least
            /// likely of them.
            #[schema(default = 0.0, minimum = 0.0, maximum = 1.0)]
            pub xtc_probability: f32,
            /// The probability from which XTC drops tokens; above 0.5 it is off.
            #[schema(default = 0.1, minimum = 0.0, maximum = 1.0)]
            pub xtc_threshold: f32,
            /// DRY: subtracted, times `dry_base` for each token beyond `dry_allowed_length`, from the
            /// logit of a token that would continue a repetition; 0 is off.
            #[schema(default = 0.0, minimum = 0.0, maximum = 100.0)]
            pub dry_multiplier: f32,
            /// By how much DRY grows for each token of a repetition.
            #[schema(default = 1.75, minimum = 1.0, maximum = 100.0)]
            pub dry_base: f32,
            /// Repetitions of fewer tokens cost nothing.
            #[schema(default = 2, maximum = 2147483647)]
            pub dry_allowed_length: usize,
            /// DRY's window: this many last tokens, the prompt's included; -1 for all, 0 is off.
            #[schema(default = -1, minimum = -1, maximum = 2147483647)]
            pub dry_penalty_last_n: i64,
            /// No repetition goes across these strings; by default a line's end, `:`, `"` and `*`.
            #[schema(schema_with = BreakerList::schema)]
            pub dry_sequence_breakers: Option<BreakerList>,
            /// Divides the logits of tokens in the penalties' window; 1 is off.
            #[schema(default = 1.0, minimum = 0.01, maximum = 100.0)]
            pub repetition_penalty: f32,
            /// Added to the logits of single tokens, by token id.
            #[serde(default)]
            #[schema(schema_with = LogitBias::schema)]
            pub logit_bias: LogitBias,
            /// The text ends before this string, or before the first of several to appear.
            #[serde(default)]
            #[schema(schema_with = Stops::schema)]
            pub stop: Stops,
            /// Tokens before the answer may end by itself: until then no token that ends it is chosen,
            /// and stop strings are not looked for. At most `max_tokens`.
            #[schema(default = 0, format = "tokens")]
            pub min_tokens: usize,
            /// The answer also ends at any of these tokens, by id; their text is left out.
            #[schema(max_items = 64, example = json!([0]))]
            pub stop_token_ids: Option<Vec<i32>>,
            /// Never choose a token that ends the text.
            #[schema(default = false)]
            pub ignore_eos: bool,
            /// Start from what the cache still holds of the prompt's beginning.
            #[schema(default = true)]
            pub cache_prompt: bool,
            /// Where drafts come from. They change the pace of a text and, but for `typical`, not
            /// the text.
            #[schema(default = "auto")]
            pub speculation: Option<Speculation>,
            /// false: draft no other answer from this one, and this one from no other.
            #[schema(default = true)]
            pub share_text: bool,
            /// What the answer must be.
            pub response_format: Option<ResponseFormat>,
            /// What the answer must be, in llguidance's dialect of Lark or in llama.cpp's GBNF, which
            /// is known by its `::=`; not with `response_format`.
            #[schema(example = "start: \"yes\" | \"no\"")]
            pub grammar: Option<String>,
            /// Report for each token who drafted it, and which step decided it.
            #[schema(default = false)]
            pub details: bool,
            /// Seconds from acceptance, after which the answer ends where it is; without a token
            /// until then: 408. The server may have a limit of its own.
            #[schema(example = 60.0, minimum = 0.0, maximum = 86400.0)]
            pub timeout_s: Option<f32>,
            /// Send pieces as server-sent events.
            #[schema(default = false)]
            pub stream: bool,
        }

        impl $name {
            /// A request to the engine; `n_top` as in [`Report`].
            fn request(
                self,
                prompt: Prompt,
                max_tokens: usize,
                repeat_last_n: usize,
                seed: u64,
                n_top: Option<usize>,
            ) -> Result<Request, Invalid> {
                let report = Report { details: self.details, n_top };
                let (breakers, dry_window) = (self.dry_sequence_breakers, self.dry_penalty_last_n);
                let dry = crate::request::DryParams {
                    multiplier: self.dry_multiplier,
                    base: self.dry_base,
                    allowed_length: self.dry_allowed_length,
                    last_n: usize::try_from(dry_window).unwrap_or(usize::MAX),
                    breakers: breakers.map_or_else(default_breakers, |list| list.0),
                };
                if self.min_tokens > max_tokens {
                    let message = format!("min_tokens is {}, above max_tokens", self.min_tokens);
                    return Err(Invalid::new("min_tokens", message));
                }
                Ok(Request {
                    sampling: SamplingParams {
                        temperature: self.temperature,
                        top_p: self.top_p,
                        top_k: usize::try_from(self.top_k).unwrap_or(0),
                        min_p: self.min_p,
                        typical_p: self.typical_p,
                        top_n_sigma: self.top_n_sigma.max(0.0),
                        xtc_probability: self.xtc_probability,
                        xtc_threshold: self.xtc_threshold,
                        dry: Some(dry).filter(|dry| dry.multiplier > 0.0 && dry.last_n > 0),
                        repetition_penalty: self.repetition_penalty,
                        frequency_penalty: self.frequency_penalty,
                        presence_penalty: self.presence_penalty,
                        repeat_last_n,
                        logit_bias: self.logit_bias.0,
                        seed,
                    },
                    stop: self.stop.0,
                    min_tokens: self.min_tokens,
                    stop_token_ids: self.stop_token_ids.into_iter().flatten().map(crate::llama::Token).collect(),
                    ignore_eos: self.ignore_eos,
                    cache_prompt: self.cache_prompt,
                    speculation: self.speculation.unwrap_or_default(),
                    share_text: self.share_text,
                    grammar: grammar(self.response_format, self.grammar)?,
                    report: Some(report).filter(|r| r.details || r.n_top.is_some()),
                    timeout: self.timeout_s.map(Duration::from_secs_f32),
                    ..Request::new(prompt, max_tokens)
                })
            }
        }
    };
}
pub(super) use request_body;

/// One text, or a list of up to `MAX`, each of 1 to `BYTES` bytes.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "OneOrMany")]
pub struct Texts<const MAX: usize, const BYTES: usize>(pub Vec<String>);

pub type Stops = Texts<16, 1024>;

pub type BreakerList = Texts<16, 40>;

/// llama.cpp's.
pub fn default_breakers() -> Vec<String> {
    ["\n", ":", "\"", "*"].map(String::from).to_vec()
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "it must be a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<const MAX: usize, const BYTES: usize> TryFrom<OneOrMany> for Texts<MAX, BYTES> {
    type Error = String;

    fn try_from(texts: OneOrMany) -> Result<Self, String> {
        let list = match texts {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(list) => list,
        };
        let fits = |text: &String| (1..=BYTES).contains(&text.len());
        if list.len() <= MAX && list.iter().all(fits) {
            return Ok(Self(list));
        }
        Err(format!(
            "it must be a string, not empty, of at most {BYTES} bytes, or a list of 0 to {MAX} of them"
        ))
    }
}

impl<const MAX: usize, const BYTES: usize> PartialSchema for Texts<MAX, BYTES> {
    fn schema() -> RefOr<Schema> {
        let text = json!({ "type": "string", "minLength": 1, "maxLength": BYTES });
        let list = json!({ "type": "array", "items": text, "maxItems": MAX });
        schema_of(json!({
            "description": format!("A text, or a list of up to {MAX}"),
            "oneOf": [text, list, { "type": "null" }],
            "examples": ["END"],
        }))
    }
}

pub const MAX_CHOICES: usize = 16;

/// A text or the ids of tokens: what one answer continues. Neither is empty.
#[derive(Debug, Deserialize)]
#[serde(try_from = "TextOrTokens")]
pub struct OnePrompt(pub Prompt);

/// Up to `MAX` prompts.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "AnyPrompts")]
pub struct Prompts<const MAX: usize = MAX_CHOICES>(pub Vec<Prompt>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "it must be a string or a list of token ids")]
enum TextOrTokens {
    Text(String),
    Tokens(Vec<i64>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "it must be a string, a list of token ids, or a list of either")]
enum AnyPrompts {
    One(TextOrTokens),
    Texts(Vec<String>),
    Lists(Vec<Vec<i64>>),
}

impl TryFrom<TextOrTokens> for OnePrompt {
    type Error = String;

    fn try_from(prompt: TextOrTokens) -> Result<Self, String> {
        match prompt {
            TextOrTokens::Text(text) if !text.is_empty() => Ok(Self(text.into())),
            TextOrTokens::Tokens(ids) if !ids.is_empty() => {
                let token = |id: i64| {
                    let known = i32::try_from(id).map(Token);
                    known.map_err(|_| format!("it has token {id}, which no vocabulary has"))
                };
                let tokens: Result<Vec<Token>, String> = ids.into_iter().map(token).collect();
                Ok(Self(Prompt::Tokens(tokens?)))
            }
            _ => Err("it must not be empty".into()),
        }
    }
}

impl<const MAX: usize> TryFrom<AnyPrompts> for Prompts<MAX> {
    type Error = String;

    fn try_from(prompts: AnyPrompts) -> Result<Self, String> {
        let list: Vec<TextOrTokens> = match prompts {
            AnyPrompts::One(one) => vec![one],
            AnyPrompts::Texts(list) => list.into_iter().map(TextOrTokens::Text).collect(),
            AnyPrompts::Lists(list) => list.into_iter().map(TextOrTokens::Tokens).collect(),
        };
        if !(1..=MAX).contains(&list.len()) {
            return Err(format!("it must be a prompt, or a list of 1 to {MAX}"));
        }
        let prompt = |prompt| OnePrompt::try_from(prompt).map(|one| one.0);
        Ok(Self(list.into_iter().map(prompt).collect::<Result<_, _>>()?))
    }
}

/// A text, and a list of token ids.
fn one_prompt() -> [Value; 2] {
    let ids = json!({ "type": "integer", "minimum": 0, "maximum": i32::MAX });
    [
        json!({ "type": "string", "minLength": 1 }),
        json!({ "type": "array", "items": ids, "minItems": 1 }),
    ]
}

impl PartialSchema for OnePrompt {
    fn schema() -> RefOr<Schema> {
        schema_of(json!({
            "description": "A user's message, which the model's chat template makes a prompt of. \
                            A text that holds control tokens as the template writes them, and a list \
                            of token ids, are continued as they are; so is any if the model has no \
                            template.",
            "oneOf": one_prompt(),
            "examples": ["Write a poem about artificial intelligence."],
        }))
    }
}

impl<const MAX: usize> PartialSchema for Prompts<MAX> {
    fn schema() -> RefOr<Schema> {
        let list =
            |of: &Value| json!({ "type": "array", "items": of, "minItems": 1, "maxItems": MAX });
        let [text, ids] = one_prompt();
        let lists = [list(&text), list(&ids)];
        let shapes = [[text, ids], lists].concat();
        schema_of(json!({
            "description": format!("A text, a list of token ids, or a list of up to {MAX} texts or such lists"),
            "oneOf": shapes,
            "examples": ["The old lighthouse"],
        }))
    }
}

fn schema_of(json: Value) -> RefOr<Schema> {
    RefOr::T(serde_json::from_value(json).expect("a schema that tests read"))
}

/// What is added to the logits of tokens.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "BTreeMap<String, f32>")]
pub struct LogitBias(pub Vec<(Token, f32)>);

const MAX_BIASES: usize = 1024;
const MAX_BIAS: f32 = 100.0;

impl TryFrom<BTreeMap<String, f32>> for LogitBias {
    type Error = String;

    fn try_from(biases: BTreeMap<String, f32>) -> Result<Self, String> {
        let bias = |(id, bias): (String, f32)| {
            let token = id.parse().ok().filter(|&id: &i32| id >= 0)?;
            (bias.abs() <= MAX_BIAS).then_some((Token(token), bias))
        };
        let list: Option<Vec<_>> = biases.into_iter().map(bias).collect();
        list.filter(|list| list.len() <= MAX_BIASES).map(Self).ok_or_else(|| {
            format!(
                "it must be an object of at most {MAX_BIASES} token ids, each with a number from \
                 -{MAX_BIAS} to {MAX_BIAS}"
            )
        })
    }
}

impl PartialSchema for LogitBias {
    fn schema() -> RefOr<Schema> {
        schema_of(json!({
            "description": "Added to the logits of single tokens, by token id",
            "oneOf": [{
                "type": "object",
                "propertyNames": { "type": "string", "pattern": "^[0-9]{1,9}$" },
                "additionalProperties": { "type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS },
                "maxProperties": MAX_BIASES,
            }, { "type": "null" }],
            "examples": [{ "5": -100 }],
        }))
    }
}

/// Any text, any JSON object, or JSON that follows a schema.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schema(example = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": { "enum": ["yes", "no"] } } }))]
pub enum ResponseFormat {
    /// Any text.
    Text {
        /// Checked and ignored.
        json_schema: Option<NamedSchema>,
    },
    /// Any JSON object.
    JsonObject {
        /// Checked and ignored.
        json_schema: Option<NamedSchema>,
        /// What the object must follow, as llama.cpp has it; then it need not be an object.
        #[schema(value_type = Option<Object>)]
        schema: Option<Map<String, Value>>,
    },
    /// JSON that follows a schema.
    JsonSchema {
        /// The schema.
        json_schema: NamedSchema,
    },
}

/// A schema with a name, as OpenAI has it. It is always followed strictly.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NamedSchema {
    /// Any.
    pub name: Option<String>,
    /// Ignored.
    pub description: Option<Value>,
    /// Ignored.
    pub strict: Option<Value>,
    /// The JSON schema, as far as llguidance can follow it.
    #[schema(value_type = Object)]
    pub schema: Map<String, Value>,
}

/// What the answer must be; `None`: any text.
pub fn grammar(
    format: Option<ResponseFormat>,
    text: Option<String>,
) -> Result<Option<GrammarSource>, Invalid> {
    let schema = match format {
        None | Some(ResponseFormat::Text { .. }) => None,
        Some(ResponseFormat::JsonObject { schema: Some(schema), .. }) => Some(schema.into()),
        Some(ResponseFormat::JsonObject { .. }) => Some(json!({ "type": "object" })),
        Some(ResponseFormat::JsonSchema { json_schema }) => Some(json_schema.schema.into()),
    };
    let text = text.filter(|text| !text.is_empty());
    if schema.is_some() && text.is_some() {
        let message = "grammar and response_format exclude each other: give one of them";
        return Err(Invalid::new("grammar", message));
    }
    Ok(schema.map(GrammarSource::JsonSchema).or(text.map(GrammarSource::of_text)))
}
