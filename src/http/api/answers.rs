//! The bodies of answers and of a stream's events. A chunk of OpenAI's is an answer with a part of
//! each text.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use utoipa::ToSchema;

use super::usage::{AnswerTimings, OpenAiUsage};
use crate::chat;
use crate::engine::text::Decoder;
use crate::llama::Token;
use crate::request::{
    Completion, FinishReason, Logprobs, Piece, Progress, Restored, Source, SpeculationUsage,
    Timings, TokenReport, Usage,
};

/// A token's bytes in a text. Those of a control token are its name's if `true` is given, else none.
pub type Detokenize = Arc<dyn Fn(Token, bool) -> Vec<u8> + Send + Sync>;

/// Why an answer ended: by itself or at a stop string, because it was long enough, or to have tools
/// called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishKind {
    Stop,
    Length,
    ToolCalls,
}

/// What ended an answer before the model did: a stop string, a token of `stop_token_ids`,
/// `deadline` if its time was over, or `grammar` if its grammar could not be followed any further.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason<'a> {
    Text(&'a str),
    Token(i32),
}

/// Why an answer ended, and what ended it.
pub fn finish(done: &Completion) -> (FinishKind, Option<StopReason<'_>>) {
    match &done.finish_reason {
        FinishReason::EndOfText => (FinishKind::Stop, None),
        FinishReason::StopString(stop) => (FinishKind::Stop, Some(StopReason::Text(stop))),
        FinishReason::StopToken(Token(id)) => (FinishKind::Stop, Some(StopReason::Token(*id))),
        FinishReason::Length => (FinishKind::Length, None),
        FinishReason::Deadline => (FinishKind::Length, Some(StopReason::Text("deadline"))),
        FinishReason::Grammar(_) => (FinishKind::Length, Some(StopReason::Text("grammar"))),
    }
}

/// What drafts did.
#[derive(Debug, Serialize, ToSchema)]
pub struct SpeculationReport {
    /// Steps that gave tokens.
    pub steps: usize,
    /// Candidates verified in them.
    pub drafted: usize,
    /// Candidates accepted.
    pub accepted: usize,
    /// Tokens of the answer over its steps.
    pub tokens_per_step: f64,
}

impl From<&Completion> for SpeculationReport {
    fn from(done: &Completion) -> Self {
        let SpeculationUsage { steps, drafted, accepted } = done.speculation;
        let per_step = done.usage.completion_tokens as f64 / steps.max(1) as f64;
        Self { steps, drafted, accepted, tokens_per_step: (per_step * 1e3).round() / 1e3 }
    }
}

/// An event of `/generate`'s stream before the last one, a [`GenerateAnswer`].
#[derive(Debug, Serialize)]
pub struct GeneratePiece<'a> {
    pub generated_text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenDetails>>,
}

/// An answer of `/generate`, or the last event of its stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerateAnswer<'a> {
    /// The text, without the prompt; in a stream's last event what was left of it.
    pub generated_text: &'a str,
    /// Why it ended.
    pub finish_reason: FinishKind,
    /// The stop string or token that ended it, if one did; `deadline` if its time was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason<'a>>,
    /// Counts of tokens.
    pub usage: GenerateUsage,
    /// Where the time went.
    pub timings: Timings,
    /// What drafts did.
    pub speculation: SpeculationReport,
    /// With `details` or `logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenDetails>>,
}

impl<'a> GenerateAnswer<'a> {
    pub fn new(done: &'a Completion, piece: &'a Piece, detokenize: Option<&Detokenize>) -> Self {
        let Usage { prompt_tokens, cached_tokens, completion_tokens, restored } = done.usage;
        let total_tokens = prompt_tokens + completion_tokens;
        let (finish_reason, stop_reason) = finish(done);
        Self {
            generated_text: &piece.text,
            finish_reason,
            stop_reason,
            usage: GenerateUsage {
                prompt_tokens,
                cached_tokens,
                restored_tokens: restored.any(),
                completion_tokens,
                total_tokens,
            },
            timings: done.timings,
            speculation: done.into(),
            tokens: detokenize.map(|text| details(&piece.tokens, text)),
        }
    }
}

/// Counts of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerateUsage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of those, found in the cache.
    pub cached_tokens: usize,
    /// Of those cached, brought back into the cache, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_tokens: Option<Restored>,
    /// Generated, one that ends the text included.
    pub completion_tokens: usize,
    /// Prompt and completion.
    pub total_tokens: usize,
}

/// A token of an answer. One that ends the text is not reported, nor those of a stop string.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenDetails {
    /// Its number in the vocabulary.
    pub id: i32,
    /// Its text; parts of a character are U+FFFD.
    pub text: String,
    /// What drafted it: `heads`, `text`, `both`, or the `grammar`, which left nothing else; null: the
    /// model alone.
    #[schema(required = true)]
    pub source: Option<Source>,
    /// The answer's step that decided it, from 1; 0 for a token of the prompt.
    pub step: usize,
    /// Rows of that step, those of other requests included.
    pub rows: usize,
    /// With `logprobs`: the natural logarithm of its probability, before bias, penalties,
    /// temperature and grammar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    /// With `logprobs`: the most likely tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<TopToken>>,
}

/// One of the most likely tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopToken {
    /// Its number in the vocabulary.
    pub id: i32,
    /// Its text.
    pub text: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

pub fn details(tokens: &[TokenReport], detokenize: &Detokenize) -> Vec<TokenDetails> {
    let top = |&(token, p): &(Token, f32)| TopToken {
        id: token.0,
        text: text(&detokenize(token, true)),
        logprob: finite(p),
    };
    let one = |t: &TokenReport| TokenDetails {
        id: t.token.0,
        text: text(&detokenize(t.token, true)),
        source: t.source,
        step: t.step,
        rows: t.n_rows,
        logprob: t.logprobs.as_ref().map(|l| finite(l.logprob)),
        top_logprobs: t.logprobs.as_ref().map(|l| l.top.iter().map(top).collect()),
    };
    tokens.iter().map(one).collect()
}

/// Log probabilities of a text's tokens: lists with an entry for each. A token is named by its text,
/// or by its bytes, as in `bytes:\xf0\x9f`, where they are no text by themselves.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct TextLogprobs {
    /// Their names.
    pub tokens: Vec<String>,
    /// Natural logarithms of their probabilities; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The same of as many most likely ones as were asked for, by their names. Of two with one text
    /// the less likely one is named by its bytes.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where they begin in the text, in characters; a part of a character where that begins.
    pub text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Of the tokens after those that `offsets` has counted, all of the prompt's together; `None`
    /// without tokens.
    pub fn new(
        tokens: &[TokenReport],
        detokenize: &Detokenize,
        offsets: &mut Offsets,
    ) -> Option<Self> {
        let mut lists = Self::default();
        let n_prompt = tokens.iter().take_while(|report| report.is_prompt()).count();
        let (prompt, answer) = tokens.split_at(n_prompt);
        let mut bytes: Vec<_> = prompt.iter().map(|t| detokenize(t.token, true)).collect();
        offsets.begin_prompt(&bytes.concat());
        bytes.extend(answer.iter().map(|t| detokenize(t.token, false)));
        for (i, (report, bytes)) in tokens.iter().zip(bytes).enumerate() {
            lists.text_offset.push(offsets.next(&bytes));
            if i + 1 == n_prompt {
                offsets.end_prompt();
            }
            let mut names = Names::default();
            let top = report.logprobs.as_ref().map(|logprobs| {
                let named = |&(token, p): &(Token, f32)| (names.of(token, detokenize), finite(p));
                logprobs.top.iter().map(named).collect()
            });
            lists.top_logprobs.push(top);
            lists.token_logprobs.push(report.logprobs.as_ref().map(|l| finite(l.logprob)));
            lists.tokens.push(names.of(report.token, detokenize));
        }
        Some(lists).filter(|lists| !lists.tokens.is_empty())
    }
}

/// Names of tokens that stand together, each another one.
#[derive(Default)]
struct Names(Vec<(Token, String)>);

impl Names {
    fn of(&mut self, token: Token, detokenize: &Detokenize) -> String {
        if let Some((_, name)) = self.0.iter().find(|(known, _)| *known == token) {
            return name.clone();
        }
        let bytes = detokenize(token, true);
        let escaped = || bytes.iter().fold("bytes:".to_owned(), |s, b| s + &format!("\\x{b:02x}"));
        let mut name = std::str::from_utf8(&bytes).map_or_else(|_| escaped(), str::to_owned);
        let numbered = || format!("token_id:{}", token.0);
        for other in [&escaped as &dyn Fn() -> String, &numbered] {
            if self.0.iter().any(|(_, taken)| *taken == name) {
                name = other();
            }
        }
        self.0.push((token, name.clone()));
        name
    }
}

/// Where tokens begin in a text, in characters.
#[derive(Clone, Debug, Default)]
pub struct Offsets {
    decoder: Decoder,
    n_chars: usize,
    /// Characters of the prompt's text, where it is echoed as it was sent.
    n_prompt: Option<usize>,
    /// Characters at the beginning that tokens have and the text has not: what tokenising adds.
    n_added: usize,
}

impl Offsets {
    /// In a text that begins with its prompt, as it was sent or as its tokens have it.
    pub fn after(prompt: Option<&str>) -> Self {
        Self { n_prompt: prompt.map(|text| text.chars().count()), ..Self::default() }
    }

    /// The next tokens are the prompt's, and these are their bytes; perhaps none.
    fn begin_prompt(&mut self, bytes: &[u8]) {
        if let Some(n_prompt) = self.n_prompt.take_if(|_| !bytes.is_empty()) {
            let n_chars = String::from_utf8_lossy(bytes).chars().count();
            self.n_added = n_chars.saturating_sub(n_prompt);
        }
    }

    /// The answer's characters begin anew.
    fn end_prompt(&mut self) {
        self.n_chars += usize::from(self.decoder.n_partial() > 0);
        self.decoder = Decoder::default();
    }

    /// Of a token with these bytes, which comes next.
    fn next(&mut self, bytes: &[u8]) -> usize {
        let Self { decoder, n_chars, .. } = self;
        let (before, mut begin, mut n_bytes) = (decoder.n_partial(), *n_chars, 0);
        decoder.push(bytes, |text, n| {
            let lengths = text.chars().map(|c| if text.len() == n { c.len_utf8() } else { n });
            for length in lengths {
                n_bytes += length;
                *n_chars += 1;
                begin += usize::from(n_bytes <= before); // of tokens before: never to be whole
            }
        });
        begin.saturating_sub(self.n_added)
    }
}

/// Log probabilities of a message's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// An entry for each token.
    pub content: Vec<ChatToken>,
    /// Null.
    #[schema(required = true)]
    pub refusal: Option<String>,
}

impl ChatLogprobs {
    /// `None` if they were not asked for.
    pub fn new(tokens: &[TokenReport], detokenize: &Detokenize) -> Option<Self> {
        let entry = |token: Token, logprob: f32, top_logprobs| {
            let bytes = detokenize(token, true);
            ChatToken { token: text(&bytes), logprob: finite(logprob), bytes, top_logprobs }
        };
        let one = |(token, logprobs): (Token, &Logprobs)| {
            let top = logprobs.top.iter().map(|&(token, p)| entry(token, p, None));
            entry(token, logprobs.logprob, Some(top.collect()))
        };
        let given = tokens.iter().filter_map(|t| Some((t.token, t.logprobs.as_ref()?)));
        let content: Vec<ChatToken> = given.map(one).collect();
        Some(Self { content, refusal: None }).filter(|logprobs| !logprobs.content.is_empty())
    }
}

/// A token of a message.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatToken {
    /// Its text; parts of a character are U+FFFD.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    #[schema(value_type = Vec<u64>)]
    pub bytes: Vec<u8>,
    /// The most likely tokens, which have no such list of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    pub top_logprobs: Option<Vec<ChatToken>>,
}

/// A token may be a part of a character, which no string holds; [`ChatToken::bytes`] is exact.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// JSON has no minus infinity; vLLM writes this number.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// An answer of OpenAI's dialect, or a chunk of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiAnswer<'a> {
    /// Of this answer.
    pub id: &'a str,
    /// `text_completion`, `chat.completion` or `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: &'a str,
    /// The server's build.
    pub system_fingerprint: &'static str,
    /// `n` for each prompt, in the prompts' order.
    pub choices: Vec<OpenAiChoice<'a>>,
    /// Counts of tokens. In a stream with `include_usage`: of the last chunk, else null.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<OpenAiUsage>)]
    pub usage: Option<Option<OpenAiUsage>>,
    /// In a stream with `return_progress`, before the first text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_progress: Option<Progress>,
    /// What it took; in a stream in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<AnswerTimings>,
}

/// One of the texts or messages.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct OpenAiChoice<'a> {
    /// Its place.
    pub index: usize,
    /// Of `/v1/completions`: the text; the prompt's is before it with `echo` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<&'a str>,
    /// Of a chat: the whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<AnswerMessage<'a>>,
    /// Of a chat's stream: a part of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta<'a>>,
    /// Null if they were not asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChoiceLogprobs>,
    /// Why it ended; null in a stream until it does.
    #[schema(required = true)]
    pub finish_reason: Option<FinishKind>,
    /// The stop string or token that ended it, if one did; `deadline` if its time was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason<'a>>,
    /// With `details`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenDetails>>,
    /// What drafts did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculation: Option<SpeculationReport>,
}

/// Log probabilities of a text's or a message's tokens.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ChoiceLogprobs {
    Text(TextLogprobs),
    Chat(ChatLogprobs),
}

/// What the model says.
#[derive(Debug, Serialize, ToSchema)]
pub struct AnswerMessage<'a> {
    /// `assistant`.
    pub role: &'static str,
    /// The text; null if there is none beside calls.
    #[schema(required = true)]
    pub content: Option<&'a str>,
    /// Its thoughts, if it had some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    /// The functions to call, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<CallPart<'a>>>,
    /// Null.
    #[schema(required = true)]
    pub refusal: Option<&'a str>,
}

impl<'a> AnswerMessage<'a> {
    pub fn new(answer: &'a chat::Answer) -> Self {
        let is_call = !answer.calls.is_empty();
        let part = |(index, call): (usize, &'a chat::Call)| CallPart {
            index,
            id: Some(&call.id),
            r#type: Some("function"),
            function: FunctionPart { name: Some(&call.name), arguments: &call.arguments },
        };
        Self {
            role: "assistant",
            content: Some(answer.content.as_str()).filter(|text| !is_call || !text.is_empty()),
            reasoning_content: Some(answer.reasoning.as_str()).filter(|text| !text.is_empty()),
            tool_calls: is_call.then(|| answer.calls.iter().enumerate().map(part).collect()),
            refusal: None,
        }
    }
}

/// A function to call, or in a stream a part of that: first its id and name, then its arguments.
#[derive(Debug, Serialize, ToSchema)]
pub struct CallPart<'a> {
    /// Its place among the answer's.
    pub index: usize,
    /// Of this call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<&'a str>,
    /// `function`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    /// Which, with what.
    pub function: FunctionPart<'a>,
}

/// A function's name and arguments.
#[derive(Debug, Serialize, ToSchema)]
pub struct FunctionPart<'a> {
    /// As the request names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    /// JSON; in a stream a part of it, and of an answer that was cut off the beginning.
    pub arguments: &'a str,
}

/// A part of an answer: first its role, then more thoughts, text or calls, nothing at its end.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta<'a> {
    /// `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    /// More thoughts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    /// More of a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<[CallPart<'a>; 1]>,
    /// Null, with the role.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub refusal: Option<Option<&'a str>>,
}

/// An event of a stream.
#[derive(ToSchema)]
#[allow(dead_code)] // it is documented only: `reply` writes events
pub struct StreamEvent {
    /// `error` if the engine failed after the first piece; in `/v1/messages` and `/v1/responses` of
    /// every event the same as `type` in `data`.
    #[schema(required = false)]
    pub event: String,
    /// JSON, or `[DONE]`.
    pub data: String,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody<'a> {
    /// What went wrong.
    #[schema(inline)]
    pub error: ErrorDetails<'a>,
}

/// An error of any dialect.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum AnyErrorBody<'a> {
    /// This server's own, or OpenAI's.
    Plain(ErrorBody<'a>),
    /// Anthropic's.
    Anthropic(MessagesErrorBody<'a>),
}

/// What went wrong, as Anthropic has it.
#[derive(Debug, Serialize, ToSchema)]
pub struct MessagesErrorBody<'a> {
    /// `error`.
    pub r#type: &'static str,
    /// What went wrong.
    #[schema(inline)]
    pub error: MessagesErrorDetails,
    /// Of the request, as in `x-request-id`.
    pub request_id: &'a str,
}

/// What went wrong, as Anthropic has it.
#[derive(Debug, Serialize, ToSchema)]
pub struct MessagesErrorDetails {
    /// For programs: `invalid_request_error`, `authentication_error`, `permission_error`,
    /// `not_found_error`, `request_too_large`, `rate_limit_error`, `api_error` or `overloaded_error`.
    pub r#type: &'static str,
    /// For people; names the field to blame, if one is.
    pub message: String,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetails<'a> {
    /// For programs: `invalid_request`, `queue_full`, ... In OpenAI's dialect:
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    pub r#type: &'static str,
    /// For people.
    pub message: String,
    /// The field to blame, if one is; in OpenAI's dialect null if none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub param: Option<Option<&'a str>>,
    /// In OpenAI's dialect, for programs: `invalid_request`, `queue_full`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
    /// Where the prompt is longer than the context: its tokens, or as many as it has at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_prompt_tokens: Option<usize>,
    /// Beside them the context's size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_ctx: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vocabulary with parts of characters, a text that two tokens have, and a control token.
    fn detokenize() -> Detokenize {
        const TEXTS: [&[u8]; 7] = [b"a", b"\xf0\x9f", b"\x98", b"\x80b", b"a", b"\xe4", b"<end>"];
        Arc::new(
            |Token(id), by_name| {
                if id == 6 && !by_name { vec![] } else { TEXTS[id as usize].to_vec() }
            },
        )
    }

    fn report(token: i32, top: &[i32]) -> TokenReport {
        let top = top.iter().zip(1i16..).map(|(&id, n)| (Token(id), -f32::from(n))).collect();
        let logprobs = Some(Logprobs { logprob: -0.5, top });
        TokenReport { token: Token(token), source: None, step: 1, n_rows: 1, logprobs }
    }

    #[test]
    fn each_token_has_a_name_of_its_own() {
        let of = |token, top: &[i32]| {
            let offsets = &mut Offsets::default();
            TextLogprobs::new(&[report(token, top)], &detokenize(), offsets).unwrap()
        };
        let lists = of(4, &[0, 1, 2, 5, 4]);
        let names = ["a", r"bytes:\x61", r"bytes:\x98", r"bytes:\xe4", r"bytes:\xf0\x9f"];
        let top = lists.top_logprobs[0].as_ref().unwrap();
        assert!(top.keys().eq(names.iter()), "{top:?}");
        assert_eq!((top["a"], top[names[1]]), (-1.0, -5.0));
        assert_eq!(lists.tokens, [names[1]], "by the name that it has among the likely ones");
        let lists = of(4, &[0]);
        assert_eq!(
            (lists.top_logprobs[0].as_ref().unwrap().len(), lists.tokens[0].as_str()),
            (1, names[1])
        );
    }

    #[test]
    fn tokens_begin_where_their_characters_begin_in_the_text() {
        // a 😀b <end> a; then a character that never comes to be, and one that does.
        let tokens = [0, 1, 2, 3, 6, 4, 5, 0, 1, 5, 1, 2, 3].map(|token| report(token, &[]));
        let mut offsets = Offsets::default();
        let lists = tokens
            .chunks(2)
            .map(|part| TextLogprobs::new(part, &detokenize(), &mut offsets).unwrap().text_offset);
        let expected = [0, 1, 1, 1, 3, 3, 4, 5, 6, 7, 8, 8, 8];
        assert_eq!(lists.flatten().collect::<Vec<_>>(), expected);
    }
}
