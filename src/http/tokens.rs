//! What is told of tokens beside their text: log probabilities as OpenAI's clients know them, and
//! who drafted what.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::llama::Token;
use crate::request::{Logprobs, TokenReport};
use crate::speculate::reliability::Source;

/// A token's bytes; of a control token its name's.
pub type Spell = Arc<dyn Fn(Token) -> Vec<u8> + Send + Sync>;

/// What a client is told of its tokens.
#[derive(Clone)]
pub struct Telling {
    /// Log probabilities, in the dialect's own field.
    pub logprobs: bool,
    /// All that is known, in `tokens`.
    pub details: bool,
    /// How tokens are written.
    pub spell: Spell,
}

impl Default for Telling {
    /// Nothing.
    fn default() -> Self {
        Self { logprobs: false, details: false, spell: Arc::new(|_| Vec::new()) }
    }
}

/// In place of minus infinity, which JSON has not: the number that vLLM uses.
const LEAST: f32 = -9999.0;

/// For each token where it came from, and its log probability if that was asked for.
pub fn details(tokens: &[TokenReport], spell: &Spell) -> Value {
    let one = |t: &TokenReport| {
        let mut token = json!({
            "id": t.token.0,
            "text": text(&spell(t.token)),
            "source": t.source.map(Source::name),
            "step": t.step,
            "rows": t.n_rows,
        });
        if let Some(logprobs) = &t.logprobs {
            token["logprob"] = number(logprobs.logprob);
            let top = logprobs.top.iter();
            token["top_logprobs"] = top
                .map(|&(t, p)| json!({ "id": t.0, "text": text(&spell(t)), "logprob": number(p) }))
                .collect();
        }
        token
    };
    tokens.iter().map(one).collect()
}

/// `logprobs` of a chat's choice; null if they were not asked for.
pub fn of_chat(tokens: &[TokenReport], spell: &Spell) -> Value {
    let entry = |token: Token, logprob: f32| {
        let bytes = spell(token);
        json!({ "token": text(&bytes), "logprob": number(logprob), "bytes": bytes })
    };
    let one = |(token, logprobs): (Token, &Logprobs)| {
        let mut told = entry(token, logprobs.logprob);
        told["top_logprobs"] =
            logprobs.top.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
        told
    };
    let told: Vec<Value> = with_logprobs(tokens).map(one).collect();
    if told.is_empty() { Value::Null } else { json!({ "content": told, "refusal": null }) }
}

/// `logprobs` of a text's choice; null if they were not asked for. `offset` is where its text
/// begins in the answer, in characters, and is moved to its end.
pub fn of_text(tokens: &[TokenReport], spell: &Spell, offset: &mut usize) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
    for (token, told) in with_logprobs(tokens) {
        let shown = text(&spell(token));
        offsets.push(*offset);
        *offset += shown.chars().count();
        let own = (shown.clone(), number(told.logprob));
        let top = told.top.iter().map(|&(token, logprob)| (text(&spell(token)), number(logprob)));
        tops.push(Value::Object(top.chain([own]).collect::<Map<_, _>>()));
        logprobs.push(number(told.logprob));
        texts.push(shown);
    }
    if texts.is_empty() {
        return Value::Null;
    }
    json!({ "tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
}

fn with_logprobs(tokens: &[TokenReport]) -> impl Iterator<Item = (Token, &Logprobs)> {
    tokens.iter().filter_map(|t| t.logprobs.as_ref().map(|logprobs| (t.token, logprobs)))
}

/// A token may be a part of a character, which no string holds; `bytes` beside it is exact.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn number(logprob: f32) -> Value {
    json!(logprob.max(LEAST))
}
