//! The cases of llama.cpp's own test of chat formats, which `make chat-cases` takes out of it: what many
//! models write is read whole, and as it grows; and chats with tools, in all of those templates.
#![allow(missing_docs)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use medusa_llama::chat::{
    Answer, AnswerReader, Call, Conversation, Delta, Prepared, Syntax, Template, Thoughts,
    ToolChoice, Vocabulary,
};
use medusa_llama::engine::grammar::Grammars;
use medusa_llama::engine::guide::Guide;
use medusa_llama::llama::{AnswerParser, ChatFormat, Model, ParsedAnswer, ParsedCall, Placement};
use medusa_llama::request::{GrammarBegin, Prompt, Request};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Cases that a parser reads otherwise than llama.cpp's test has it, with the reason.
const PARSER_MISSES: [(&str, &str); 0] = [];

/// Cases that a reader reads otherwise in some pieces, with the reason.
const READER_MISSES: [(&str, &str); 1] = [(
    "mistralai-Mistral-Nemo-Instruct-2407 2",
    "the model's id comes after the arguments, when the call was already given another",
)];

/// Of all cases, in percent.
const MIN_RIGHT: usize = 97;

/// What a model wrote.
#[derive(Debug, Deserialize)]
struct Case {
    /// Its template, and in the order of the file its place among that template's.
    #[serde(skip)]
    name: String,
    template: String,
    request: Value,
    text: String,
    /// More would follow.
    is_partial: bool,
    expected: ParsedAnswer,
}

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools")
}

fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(tools().join("chat-cases.jsonl"));
    let text = text.unwrap_or_else(|_| panic!("the cases are missing: run `make chat-cases`"));
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let case = |line: &str| {
        let mut case: Case = serde_json::from_str(line).unwrap();
        let n = counts.entry(case.template.clone()).or_default();
        *n += 1;
        case.name = format!("{} {n}", case.template);
        case
    };
    let cases: Vec<Case> = text.lines().map(case).collect();
    assert!(cases.len() >= 450, "{} cases", cases.len());
    cases
}

/// The templates' sources by their names.
fn sources() -> BTreeMap<String, String> {
    let folder = tools().join("templates");
    let files = std::fs::read_dir(folder).expect("templates are missing: run `make templates`");
    let named = files.filter_map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name()?.to_str()?.strip_suffix(".jinja")?.to_owned();
        Some((name, std::fs::read_to_string(&path).unwrap()))
    });
    named.collect()
}

/// The `syntax` of a case's answer.
fn syntax(case: &Case, formats: &BTreeMap<String, ChatFormat>) -> Result<Value, String> {
    let applied = formats[&case.template].apply(&case.request).map_err(|e| e.to_string())?;
    Ok(applied["syntax"].clone())
}

/// The formats of the cases' templates.
fn formats(cases: &[Case]) -> BTreeMap<String, ChatFormat> {
    let sources = sources();
    let names: BTreeSet<&String> = cases.iter().map(|case| &case.template).collect();
    let format = |name: &String| ChatFormat::new(&sources[name], "", "").unwrap();
    names.into_iter().map(|name| (name.clone(), format(name))).collect()
}

/// Calls `each` for all of `items`, on as many threads as there are cores.
fn in_threads<T: Sync>(items: &[T], each: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            each(item);
        }
    };
    let n = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..n).for_each(|_| drop(scope.spawn(run))));
}

/// Checks all cases; fails if others are wrong than the listed ones.
fn check(misses: &[(&str, &str)], each: impl Fn(&Case, &Value) -> Result<(), String> + Sync) {
    let cases = cases();
    let formats = formats(&cases);
    let wrong = Mutex::new(BTreeMap::new());
    in_threads(&cases, |case| {
        let checked = syntax(case, &formats).and_then(|syntax| each(case, &syntax));
        if let Err(why) = checked {
            let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
            wrong.insert(case.name.clone(), format!("{why}\n  text: {:?}", case.text));
        }
    });
    let wrong = wrong.into_inner().unwrap();
    for (name, why) in &wrong {
        println!("{name}: {why}");
    }
    let names: Vec<&str> = wrong.keys().map(String::as_str).collect();
    let listed: Vec<&str> = misses.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, listed, "{} of {} cases are wrong", wrong.len(), cases.len());
    assert!((cases.len() - wrong.len()) * 100 >= cases.len() * MIN_RIGHT, "{} wrong", wrong.len());
}

/// The answer in a form in which equal ones are equal: without the space around its texts, and with
/// arguments as values; null where they are unfinished.
fn plain(answer: &ParsedAnswer) -> (String, String, Vec<(String, String, Value)>) {
    let value = |text: &str| serde_json::from_str(text).unwrap_or_default();
    let call = |call: &ParsedCall| (call.id.clone(), call.name.clone(), value(&call.arguments));
    let trimmed = |text: &str| text.trim().to_owned();
    let calls = answer.calls.iter().map(call).collect();
    (trimmed(&answer.content), trimmed(&answer.reasoning), calls)
}

fn must_equal(what: &str, got: &ParsedAnswer, expected: &ParsedAnswer) -> Result<(), String> {
    if plain(got) == plain(expected) {
        return Ok(());
    }
    Err(format!("{what}: {got:?}\n  expected: {expected:?}"))
}

/// Where a text may be cut.
fn cuts(text: &str) -> impl Iterator<Item = usize> {
    text.char_indices().map(|(at, _)| at).chain([text.len()])
}

/// What was shown is still there.
fn must_grow(before: &ParsedAnswer, after: &ParsedAnswer) -> Result<(), String> {
    let same = |a: &ParsedCall, b: &ParsedCall| {
        b.id.starts_with(&a.id)
            && b.name.starts_with(&a.name)
            && b.arguments.starts_with(&a.arguments)
    };
    let grows = after.content.starts_with(&before.content)
        && after.reasoning.starts_with(&before.reasoning)
        && after.calls.len() >= before.calls.len()
        && before.calls.iter().zip(&after.calls).all(|(a, b)| same(a, b));
    if grows { Ok(()) } else { Err(format!("shrinks from {before:?}\n  to {after:?}")) }
}

/// The whole text is the answer that llama.cpp's test expects; parts of it, up to each character, are
/// no errors, and the answer only grows.
#[test]
fn texts_of_many_models_are_read_as_llama_cpp_expects() {
    check(&PARSER_MISSES, |case, syntax| {
        let parser = AnswerParser::new(syntax).map_err(|e| e.to_string())?;
        let parse =
            |text: &str, is_partial| parser.parse(text, is_partial).map_err(|e| e.to_string());
        let whole = parse(&case.text, case.is_partial)?;
        must_equal("whole", &whole, &case.expected)?;
        let mut shown = ParsedAnswer::default();
        for at in cuts(&case.text) {
            let parsed = parse(&case.text[..at], true).map_err(|e| format!("up to {at}: {e}"))?;
            if parsed != ParsedAnswer::default() {
                must_grow(&shown, &parsed).map_err(|why| format!("up to {at}: {why}"))?;
                shown = parsed;
            }
        }
        must_grow(&shown, &whole).map_err(|why| format!("at its end: {why}"))
    });
}

/// Reads a text in pieces; the answer, of which the deltas are checked.
fn read<'a>(
    syntax: &Syntax,
    pieces: impl IntoIterator<Item = &'a str>,
) -> Result<ParsedAnswer, String> {
    let mut reader = AnswerReader::new(Some(syntax.clone()));
    let mut deltas = Vec::new();
    for piece in pieces {
        reader.push(piece, &mut |delta| deltas.push(delta));
        must_sum(&deltas, reader.answer())?;
    }
    reader.end(&mut |delta| deltas.push(delta));
    must_sum(&deltas, reader.answer())?;
    let Answer { content, reasoning, calls } = reader.answer().clone();
    let parsed = |Call { id, name, arguments }| ParsedCall { id, name, arguments };
    Ok(ParsedAnswer { content, reasoning, calls: calls.into_iter().map(parsed).collect() })
}

/// The deltas add up to the answer, whose calls have ids of their own.
fn must_sum(deltas: &[Delta], answer: &Answer) -> Result<(), String> {
    let mut sum = Answer::default();
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => sum.reasoning += text,
            Delta::Content(text) => sum.content += text,
            Delta::Call { index, id, name } if *index == sum.calls.len() => {
                let (id, name) = (id.clone(), name.clone());
                sum.calls.push(Call { id, name, ..Call::default() });
            }
            Delta::Arguments { index, text } if *index < sum.calls.len() => {
                sum.calls[*index].arguments += text;
            }
            _ => return Err(format!("a delta of no call: {delta:?} of {deltas:?}")),
        }
    }
    let ids: BTreeSet<&str> = sum.calls.iter().map(|call| call.id.as_str()).collect();
    if sum != *answer || ids.len() < sum.calls.len() || ids.contains("") {
        return Err(format!("the deltas {deltas:?} do not add up to {answer:?}"));
    }
    Ok(())
}

/// What a reader gives: what was before the answer is not in it, and the arguments of a whole call are
/// at least an empty object.
fn as_read(case: &Case, before: &ParsedAnswer) -> ParsedAnswer {
    let mut expected = case.expected.clone();
    let without =
        |text: &str, before: &str| text.strip_prefix(before.trim()).unwrap_or(text).to_owned();
    expected.content = without(&expected.content, &before.content);
    expected.reasoning = without(&expected.reasoning, &before.reasoning);
    for call in expected.calls.iter_mut().filter(|call| call.arguments.is_empty()) {
        call.arguments = if case.is_partial { "{".into() } else { "{}".into() };
    }
    expected
}

/// In two pieces, cut anywhere, and by character.
#[test]
fn readers_come_to_the_same_answer_in_pieces() {
    check(&READER_MISSES, |case, applied| {
        let syntax = Syntax::new(applied)?;
        let before = AnswerParser::new(applied).and_then(|parser| parser.parse("", true));
        let expected = as_read(case, &before.map_err(|e| e.to_string())?);
        let check = |how: &str, mut answer: ParsedAnswer| {
            for (call, expected) in answer.calls.iter_mut().zip(&expected.calls) {
                if expected.id.is_empty() {
                    call.id.clear(); // the reader's own
                }
            }
            must_equal(how, &answer, &expected)
        };
        let text = &case.text;
        check(
            "by character",
            read(&syntax, cuts(text).zip(cuts(text).skip(1)).map(|(a, b)| &text[a..b]))?,
        )?;
        for at in cuts(text) {
            let (a, b) = text.split_at(at);
            check(&format!("in two pieces at {at}"), read(&syntax, [a, b])?)?;
        }
        Ok(())
    });
}

/// What happens to a conversation, for which choices, why, and with which templates.
type Row = (&'static str, &'static str, &'static str, &'static [&'static str]);

const EACH: &str = "auto, named, none, required";

/// Errors, in the words of the template or of Jinja.
const REFUSALS: [Row; 3] = [
    (
        "a call: 'append' is undefined",
        EACH,
        "lists cannot be changed, as in transformers; in llama.cpp they can",
        &["Kimi-K2-Instruct", "Kimi-K2-Thinking"],
    ),
    (
        "a call: 'str' and 'Undefined'",
        EACH,
        "the template needs llama.cpp's variables `datetime` and `functions`",
        &["fireworks-ai-llama-3-firefunction-v2"],
    ),
    (
        "a question: 'str' and 'Undefined'",
        EACH,
        "as above",
        &["fireworks-ai-llama-3-firefunction-v2"],
    ),
];

/// Prompts that lack something, and forms of answers.
const FLAWS: [Row; 2] = [
    (
        "a call: drops the call",
        EACH,
        "the template prints no calls, as in llama.cpp",
        &["LFM2-8B-A1B", "LFM2.5-Instruct"],
    ),
    (
        "a call: drops the call",
        "auto, none",
        "as above; a call that is demanded has the general form",
        &["ibm-granite-granite-3.3-2B-Instruct"],
    ),
];

/// Two tools, whose names are in no template.
fn two_tools() -> Vec<Map<String, Value>> {
    let tools = json!([
        { "type": "function", "function": {
            "name": "w3ather", "description": "The weather of a place",
            "parameters": { "type": "object", "required": ["place"], "properties": {
                "place": { "type": "string", "description": "A town" },
                "days": { "type": "integer", "description": "How many" },
            } },
        } },
        { "type": "function", "function": {
            "name": "tr4ins", "description": "Trains to a place",
            "parameters": { "type": "object", "required": ["to"], "properties": {
                "to": { "type": "string", "description": "A town" },
            } },
        } },
    ]);
    serde_json::from_value(tools).unwrap()
}

fn vocabulary() -> Vocabulary {
    let tokens = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    Vocabulary { tokens, ..Vocabulary::default() }
}

fn text(prompt: &Prompt) -> String {
    let Prompt::Text(parts) = prompt else { panic!("tokens") };
    parts.iter().map(|part| part.text.as_str()).collect()
}

/// A question, a question with a call and its result, and the same with an id that a reader made.
fn conversations(id: &str) -> [(&'static str, Value); 3] {
    let question = json!({ "role": "user", "content": "Will it rain in Berne?" });
    let round_trip = |id: &str| {
        let call = json!({ "id": id, "type": "function", "function": {
            "name": "w3ather", "arguments": "{\"place\": \"B3rne\", \"days\": 2}",
        } });
        let answer = json!({ "role": "assistant", "content": null, "tool_calls": [call] });
        let result =
            json!({ "role": "tool", "tool_call_id": id, "name": "w3ather", "content": "sl33t" });
        json!([question, answer, result])
    };
    [
        ("a question", json!([question])),
        ("a call", round_trip("call12345")),
        ("a call with our id", round_trip(id)),
    ]
}

/// The id of a call that the model gave none.
fn id_of_a_reader(sources: &BTreeMap<String, String>) -> String {
    let source = sources["Qwen-Qwen2.5-7B-Instruct"].clone();
    let template = Template::new(source, vocabulary()).unwrap();
    let [(_, messages), ..] = conversations("");
    let asked = conversation(&messages, &ToolChoice::Auto, false);
    let syntax = template.prepare(asked).unwrap().form.syntax.unwrap();
    let text = "<tool_call>\n{\"name\": \"w3ather\", \"arguments\": {}}\n</tool_call>";
    let answer = read(&syntax, [text]).unwrap();
    answer.calls[0].id.clone()
}

fn conversation(messages: &Value, choice: &ToolChoice, thinks: bool) -> Conversation {
    Conversation {
        messages: serde_json::from_value(messages.clone()).unwrap(),
        tools: two_tools(),
        choice: choice.clone(),
        thoughts: Thoughts { enabled: Some(thinks), ..Thoughts::default() },
        ..Conversation::default()
    }
}

/// What is wrong with a prompt, or with the form of its answer.
fn flaws(prepared: &Prepared, choice: &ToolChoice, is_question: bool) -> Vec<String> {
    let (prompt, form) = (text(&prepared.prompt), &prepared.form);
    let has = |name: &str| prompt.contains(name);
    let no_choice = *choice == ToolChoice::None;
    let all = matches!(choice, ToolChoice::Auto | ToolChoice::Required);
    let begins = match &form.begin {
        GrammarBegin::Prompt(end) => prompt.ends_with(end),
        _ => true,
    };
    let checks = [
        ("describes no tool", is_question && !no_choice && !has("w3ather")),
        ("describes too few tools", is_question && all && has("w3ather") && !has("tr4ins")),
        ("describes a tool that is not chosen", is_question && !all && has("tr4ins")),
        ("drops the call", !is_question && (!has("w3ather") || !has("B3rne"))),
        ("drops the result", !is_question && !has("sl33t")),
        ("has no syntax", !no_choice && form.syntax.is_none()),
        ("demands no call", choice.is_demand() && form.grammar.is_none()),
        ("may call", no_choice && form.grammar.is_some()),
        ("has another end than the grammar's beginning", !begins),
    ];
    checks.into_iter().filter(|(_, is_wrong)| *is_wrong).map(|(what, _)| what.to_owned()).collect()
}

/// By template and what happens to a conversation: for which choices.
type Found = BTreeMap<(String, String), BTreeSet<&'static str>>;

/// How many finds are not in a list, or are in the list alone.
fn differences(found: Found, rows: &[Row]) -> usize {
    let mut listed: BTreeSet<[String; 3]> = BTreeSet::new();
    for (what, choices, _, names) in rows {
        listed.extend(names.iter().map(|name| [name, what, choices].map(|text| (*text).into())));
    }
    let found = found.into_iter();
    let found = found.map(|((name, what), all)| [name, what, Vec::from_iter(all).join(", ")]);
    let found: BTreeSet<[String; 3]> = found.collect();
    found.difference(&listed).for_each(|one| println!("not listed: {one:?}"));
    listed.difference(&found).for_each(|one| println!("listed, but not so: {one:?}"));
    found.symmetric_difference(&listed).count()
}

/// Prompts with tools, calls and results, whether one must be called or not, with thoughts and without;
/// errors are those that a template itself raises.
#[test]
fn all_templates_take_tools() {
    let sources = sources();
    assert!(sources.len() >= 62, "{} templates", sources.len());
    let conversations = conversations(&id_of_a_reader(&sources));
    let choices = [
        ("auto", ToolChoice::Auto),
        ("required", ToolChoice::Required),
        ("named", ToolChoice::Named("w3ather".into())),
        ("none", ToolChoice::None),
    ];
    let (refused, wrong) = (Mutex::new(Found::new()), Mutex::new(Found::new()));
    let sources: Vec<(String, String)> = sources.into_iter().collect();
    in_threads(&sources, |(name, source)| {
        let template = Template::new(source.clone(), vocabulary()).unwrap();
        for ((word, choice), thinks) in choices.iter().flat_map(|c| [(c, true), (c, false)]) {
            // A call whose id is ours goes as one with another id, or else that is a find, too.
            let mut call = None;
            for (what, messages) in &conversations {
                let prepared = template.prepare(conversation(messages, choice, thinks));
                let (all, finds) = match prepared {
                    Ok(prepared) => (&wrong, flaws(&prepared, choice, *what == "a question")),
                    Err(why) => (&refused, vec![last_words(&why.message)]),
                };
                if *what == "a call with our id" && call.as_ref() == Some(&finds) {
                    continue;
                }
                for find in &finds {
                    let key = (name.clone(), format!("{what}: {find}"));
                    all.lock().unwrap().entry(key).or_default().insert(word);
                }
                call = Some(finds);
            }
        }
    });
    let n = differences(refused.into_inner().unwrap(), &REFUSALS)
        + differences(wrong.into_inner().unwrap(), &FLAWS);
    assert_eq!(n, 0, "differences from the lists");
}

/// Of an error, without what led to it.
fn last_words(why: &str) -> String {
    why.rsplit(": ").next().unwrap_or_default().to_owned()
}

/// A call that must or may be made has a form that answers can be held to, in each template. The model
/// is the default one, whatever the template's models are.
#[test]
fn every_form_of_calls_can_be_followed() {
    static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
        let model =
            Arc::new(Model::load(&common::model_path(), &Placement::default(), |_| true).unwrap());
        Grammars::new(&model, &[]).unwrap()
    });
    let sources: Vec<(String, String)> = sources().into_iter().collect();
    let wrong = Mutex::new(Vec::new());
    in_threads(&sources, |(name, source)| {
        let Ok(template) = Template::new(source.clone(), vocabulary()) else { return };
        let [(_, question), ..] = conversations("");
        let named = ToolChoice::Named("w3ather".into());
        for choice in [ToolChoice::Auto, ToolChoice::Required, named] {
            let Ok(prepared) = template.prepare(conversation(&question, &choice, true)) else {
                continue; // the other test lists those
            };
            let mut request = Request::new(prepared.prompt, 99);
            prepared.form.guide(&mut request).unwrap();
            let fails = match Guide::of(&request, &GRAMMARS) {
                Ok(None) if choice.is_demand() => Some("nothing demands a call".to_owned()),
                Ok(_) => None,
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = fails {
                wrong.lock().unwrap().push(format!("{name}, {choice:?}: {why}"));
            }
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
