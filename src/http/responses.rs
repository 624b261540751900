//! The handler of `/v1/responses`, and the engine's events to its answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use bytes::{Bytes, BytesMut};
use hyper::{Request, StatusCode};

use super::api::answers::{ChatLogprobs, ChatToken, Detokenize, StreamEvent};
use super::api::openai::Choices;
use super::api::response_answers::{
    ArgumentsMore, ContentMore, ContentPart, IncompleteDetails, OutputItem, ResponseAnswer,
    ResponseError, ResponseEvent, ResponseStatus, ResponseUsage,
};
use super::api::responses::{Echo, ResponsesRequest};
use super::app::RequestContext;
use super::completions::{answer, detokenize, read};
use super::problem::Problem;
use super::reply::{self, Dialect, Reply, typed_event};
use super::sections::{Change, Kind, Section, Sections};
use crate::chat::Syntax;
use crate::engine::Failed;
use crate::models::Loaded;
use crate::request::{Completion, Event, Piece};

/// Names of fields that the chat calls otherwise.
const CHATS: [(&str, &str); 1] = [("messages", "input")];

/// Names of fields that the engine calls otherwise.
const ENGINES: [(&str, &str); 2] = [("prompt", "input"), ("response_format", "text.format")];

/// Answers to items, as OpenAI has it
///
/// Nothing is stored: a request has the whole conversation.
#[utoipa::path(post, path = "/v1/responses", tag = "openai", request_body = ResponsesRequest, responses(
    (status = 200, description = "The answer, or a stream of events from `response.created` to `response.completed`, \
     `response.incomplete` or `response.failed`", content(
        (ResponseAnswer = "application/json"),
        (StreamEvent = "text/event-stream"),
    )),
))]
pub async fn respond(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let model = cx.model(&request).await?;
    let asked = read(&cx.app, &model, request, |model, readers, body| {
        let reader = &readers.responses;
        let (mut body, mut ignored) = reader.read_noting(body)?;
        body.drop_tools(reader.unknown(), &mut ignored)?;
        let (echo, n_ctx, seed) = (body.echo(), model.n_ctx(), fastrand::u64(..));
        Ok((body.into_choices(n_ctx, seed, model.template())?, echo, ignored))
    });
    let (choices, echo, ignored) = asked.await.map_err(|problem| problem.with_fields_as(&CHATS))?;
    cx.app.note_ignored(&ignored);
    let dialect = Responses::new(&model, &choices, echo);
    let answered = answer(cx, &model, choices.requests, choices.stream, dialect).await;
    let mut reply = answered.map_err(|problem| problem.with_fields_as(&ENGINES))?;
    reply::name_ignored(&ignored, reply.headers_mut());
    Ok(reply)
}

/// Writes an answer whole, or as events.
struct Responses {
    head: Head,
    sections: Sections,
    syntax: Option<Syntax>,
    writer: Writer,
    has_begun: bool,
}

/// Tokens of a text.
type CountTokens = Arc<dyn Fn(&str) -> usize + Send + Sync>;

/// What does not change from event to event.
struct Head {
    id: Id,
    created: u64,
    model: String,
    echo: Echo,
    detokenize: Detokenize,
    count: CountTokens,
}

/// What ids of an answer and of its items have in common.
#[derive(Clone, Copy)]
struct Id(u64);

impl Id {
    fn item(self, place: usize, section: &Section) -> String {
        let prefix = match section.kind {
            Kind::Thoughts => "rs",
            Kind::Text => "msg",
            Kind::Call { .. } => "fc",
        };
        format!("{prefix}_{:016x}{place:04x}", self.0)
    }
}

impl Head {
    fn logprobs(&self, piece: &Piece) -> Vec<ChatToken> {
        let logprobs = ChatLogprobs::new(&piece.tokens, &self.detokenize);
        logprobs.map(|logprobs| logprobs.content).unwrap_or_default()
    }

    fn usage(&self, sections: &Sections, done: &Completion) -> ResponseUsage {
        let thoughts = sections.thoughts();
        let n = if thoughts.is_empty() { 0 } else { (self.count)(thoughts) };
        ResponseUsage::new(done.usage, n)
    }

    /// What is in any state of the answer.
    fn answer<'a>(
        &'a self,
        id: &'a str,
        status: ResponseStatus,
        output: Vec<OutputItem<'a>>,
        usage: Option<ResponseUsage>,
    ) -> ResponseAnswer<'a> {
        let echo = &self.echo;
        let details = IncompleteDetails { reason: "max_output_tokens" };
        ResponseAnswer {
            id,
            object: "response",
            created_at: self.created,
            status,
            error: None,
            incomplete_details: (status == ResponseStatus::Incomplete).then_some(details),
            model: &self.model,
            output,
            usage,
            instructions: echo.instructions.as_deref(),
            max_output_tokens: echo.max_output_tokens,
            metadata: &echo.metadata,
            parallel_tool_calls: echo.parallel_tool_calls,
            reasoning: &echo.reasoning,
            temperature: echo.temperature,
            text: &echo.text,
            tool_choice: &echo.tool_choice,
            tools: &echo.tools,
            top_logprobs: echo.top_logprobs,
            top_p: echo.top_p,
            background: false,
            previous_response_id: None,
            store: false,
            truncation: "disabled",
        }
    }

    /// The items of sections, of which the last has `status`.
    fn output<'a>(
        &self,
        sections: &'a Sections,
        status: ResponseStatus,
        logprobs: &'a BTreeMap<usize, Vec<ChatToken>>,
    ) -> Vec<OutputItem<'a>> {
        let list = sections.list();
        let item = |(place, section): (usize, &'a Section)| {
            let is_last = place + 1 == list.len();
            let status = if is_last { status } else { ResponseStatus::Completed };
            let logprobs = logprobs.get(&place).map(Vec::as_slice).unwrap_or_default();
            OutputItem::of(section, self.id.item(place, section), status, logprobs)
        };
        list.iter().enumerate().map(item).collect()
    }

    fn whole_id(&self) -> String {
        format!("resp_{:016x}", self.id.0)
    }
}

/// Writes the events of sections.
struct Writer {
    id: Id,
    /// Of the next event.
    number: u64,
    /// By place of a text: the log probabilities of its tokens.
    logprobs: BTreeMap<usize, Vec<ChatToken>>,
}

impl Writer {
    fn send(&mut self, name: &str, event: &ResponseEvent<'_>, out: &mut BytesMut) {
        #[derive(serde::Serialize)]
        struct Numbered<'a> {
            sequence_number: u64,
            #[serde(flatten)]
            event: &'a ResponseEvent<'a>,
        }
        typed_event(name, &Numbered { sequence_number: self.number, event }, out);
        self.number += 1;
    }

    /// Writes what happens to a section. `status` is that of one that ends, `logprobs` are those of
    /// the first text that grows.
    fn change(
        &mut self,
        change: &Change<'_>,
        status: ResponseStatus,
        logprobs: &mut Vec<ChatToken>,
        out: &mut BytesMut,
    ) {
        match *change {
            Change::Begin(place, section) => self.begin(place, section, out),
            Change::More(place, section, text) => {
                let new = match section.kind {
                    Kind::Text => std::mem::take(logprobs),
                    _ => Vec::new(),
                };
                self.more(place, section, text, &new, out);
                if !new.is_empty() {
                    self.logprobs.entry(place).or_default().extend(new);
                }
            }
            Change::End(place, section) => {
                let logprobs = self.logprobs.remove(&place).unwrap_or_default();
                self.end(place, section, status, &logprobs, out);
                if !logprobs.is_empty() {
                    self.logprobs.insert(place, logprobs);
                }
            }
        }
    }

    fn begin(&mut self, place: usize, section: &Section, out: &mut BytesMut) {
        let item_id = self.id.item(place, section);
        let item = OutputItem::begun(section, item_id.clone());
        let added = ResponseEvent::Item { output_index: place, item };
        self.send("response.output_item.added", &added, out);
        if let Some(part) = ContentPart::of(&section.kind, "", &[]) {
            let (output_index, content_index) = (place, 0);
            let part = ResponseEvent::Part { item_id, output_index, content_index, part };
            self.send("response.content_part.added", &part, out);
        }
    }

    fn more(
        &mut self,
        place: usize,
        section: &Section,
        delta: &str,
        logprobs: &[ChatToken],
        out: &mut BytesMut,
    ) {
        let (name, logprobs) = match section.kind {
            Kind::Thoughts => ("response.reasoning_text.delta", None),
            Kind::Text => ("response.output_text.delta", Some(logprobs)),
            Kind::Call { .. } => {
                let more = ArgumentsMore::Delta { delta };
                let item_id = self.id.item(place, section);
                let event = ResponseEvent::Arguments { item_id, output_index: place, more };
                return self.send("response.function_call_arguments.delta", &event, out);
            }
        };
        self.content(name, place, section, ContentMore::Delta { delta, logprobs }, out);
    }

    fn content(
        &mut self,
        name: &str,
        place: usize,
        section: &Section,
        more: ContentMore<'_>,
        out: &mut BytesMut,
    ) {
        let item_id = self.id.item(place, section);
        let (output_index, content_index) = (place, 0);
        let event = ResponseEvent::Content { item_id, output_index, content_index, more };
        self.send(name, &event, out);
    }

    fn end(
        &mut self,
        place: usize,
        section: &Section,
        status: ResponseStatus,
        logprobs: &[ChatToken],
        out: &mut BytesMut,
    ) {
        let item_id = self.id.item(place, section);
        let text = section.text.as_str();
        let done = |logprobs| ContentMore::Done { text, logprobs };
        match &section.kind {
            Kind::Thoughts => {
                self.content("response.reasoning_text.done", place, section, done(None), out);
            }
            Kind::Text => {
                let done = done(Some(logprobs));
                self.content("response.output_text.done", place, section, done, out);
            }
            Kind::Call { name, .. } => {
                let more = ArgumentsMore::Done { name, arguments: text };
                let item_id = item_id.clone();
                let event = ResponseEvent::Arguments { item_id, output_index: place, more };
                self.send("response.function_call_arguments.done", &event, out);
            }
        }
        if let Some(part) = ContentPart::of(&section.kind, text, logprobs) {
            let (item_id, content_index) = (item_id.clone(), 0);
            let event = ResponseEvent::Part { item_id, output_index: place, content_index, part };
            self.send("response.content_part.done", &event, out);
        }
        let item = OutputItem::of(section, item_id, status, logprobs);
        let event = ResponseEvent::Item { output_index: place, item };
        self.send("response.output_item.done", &event, out);
    }
}

impl Responses {
    /// An answer that begins now.
    fn new(model: &Loaded, choices: &Choices, echo: Echo) -> Self {
        let id = Id(fastrand::u64(..));
        let counting = Arc::clone(model.model());
        let count = move |text: &str| {
            counting.tokenize_part(text, false, false).map_or(0, |tokens| tokens.len())
        };
        let head = Head {
            id,
            created: UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            model: model.id.to_string(),
            echo,
            detokenize: detokenize(model),
            count: Arc::new(count),
        };
        let syntax = choices.syntax.clone();
        let sections = Sections::new(syntax.clone());
        let writer = Writer { id, number: 0, logprobs: BTreeMap::new() };
        Self { head, sections, syntax, writer, has_begun: false }
    }

    /// Writes the first events, if they are still to come.
    fn begin(&mut self, out: &mut BytesMut) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let id = self.head.whole_id();
        for name in ["response.created", "response.in_progress"] {
            let status = ResponseStatus::InProgress;
            let response = self.head.answer(&id, status, Vec::new(), None);
            self.writer.send(name, &ResponseEvent::Whole { response: &response }, out);
        }
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        let Self { head, sections, writer, .. } = self;
        let mut logprobs = head.logprobs(piece);
        sections.push(&piece.text, &mut |change| {
            writer.change(&change, ResponseStatus::Completed, &mut logprobs, out);
        });
    }

    fn finish(&mut self, done: &Completion, out: &mut BytesMut) {
        self.piece(&done.tail, out);
        let status = ResponseStatus::of(done);
        let Self { head, sections, writer, .. } = self;
        sections.end(&mut |change| {
            writer.change(&change, ResponseStatus::Completed, &mut Vec::new(), out);
        });
        sections.fill(&mut |change| writer.change(&change, status, &mut Vec::new(), out));
        sections.close(&mut |change| writer.change(&change, status, &mut Vec::new(), out));
        let (id, usage) = (head.whole_id(), head.usage(sections, done));
        let logprobs = std::mem::take(&mut writer.logprobs);
        let output = head.output(sections, status, &logprobs);
        let response = head.answer(&id, status, output, Some(usage));
        let name = match status {
            ResponseStatus::Incomplete => "response.incomplete",
            _ => "response.completed",
        };
        writer.send(name, &ResponseEvent::Whole { response: &response }, out);
    }

    fn fail(&mut self, problem: &Problem, out: &mut BytesMut) {
        let Self { head, sections, writer, .. } = self;
        let id = head.whole_id();
        let logprobs = std::mem::take(&mut writer.logprobs);
        let output = head.output(sections, ResponseStatus::Incomplete, &logprobs);
        let error = ResponseError { code: "server_error", message: problem.to_string() };
        let response = ResponseAnswer {
            error: Some(error),
            ..head.answer(&id, ResponseStatus::Failed, output, None)
        };
        writer.send("response.failed", &ResponseEvent::Whole { response: &response }, out);
    }
}

impl Dialect for Responses {
    fn whole(&self, done: &[(Piece, Completion)]) -> Reply {
        let (whole, done) = &done[0];
        let mut sections = Sections::of(&whole.text, self.syntax.clone());
        sections.fill(&mut |_| {});
        let logprobs = match sections.list() {
            [only] if only.kind == Kind::Text => BTreeMap::from([(0, self.head.logprobs(whole))]),
            _ => BTreeMap::new(),
        };
        let status = ResponseStatus::of(done);
        let (id, usage) = (self.head.whole_id(), self.head.usage(&sections, done));
        let output = self.head.output(&sections, status, &logprobs);
        reply::json(StatusCode::OK, &self.head.answer(&id, status, output, Some(usage)))
    }

    fn write(&mut self, _: usize, what: &Event, out: &mut BytesMut) {
        self.begin(out);
        match what {
            Event::Progress(_) => {}
            Event::Piece(piece) => self.piece(piece, out),
            Event::Done(done) => self.finish(done, out),
            Event::Failed { id } => self.fail(&Problem::from(Failed { id: id.clone() }), out),
        }
    }
}
