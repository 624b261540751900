//! Prompts that the model writes itself: it is given its chat template up to where a user's message
//! begins, and samples one, as in <https://arxiv.org/abs/2406.08464>. A model without a template
//! begins a text. A share of the prompts asks for something about a passage: one of the user's
//! texts, or one that the model wrote.
//!
//! Prompts go to a file in waves, so that a killed run resumes with the next wave and gets the same
//! prompts.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinSet;

use super::TrainError;
use crate::chat::Template;
use crate::engine::handle::Handle;
use crate::files::{self, FileError};
use crate::llama::Model;
use crate::request::{Caller, FinishReason, Part, Prompt, Request, SamplingParams, Speculation};

/// What to write.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// Prompts.
    pub n: usize,
    /// System message before each, where the template has a place for it.
    pub system: Option<&'a str>,
    /// Without the chat template: beginnings of texts.
    pub raw: bool,
    /// Passages to ask about are taken from these; without any the model writes some.
    pub texts: &'a [String],
    /// Most tokens of a passage, and so about of a prompt with one.
    pub max_passage: usize,
    pub seed: u64,
}

/// Texts that are asked for at once and written to the file together.
const WAVE: usize = 64;
/// Waves without a usable text after which there is no hope.
const MOST_EMPTY_WAVES: usize = 8;
/// Most tokens of a message that the model writes; longer ones are not used.
const MAX_MESSAGE: usize = 192;
/// Tokens with which a text without a template begins.
const BEGINNING: std::ops::Range<usize> = 4..33;
/// Fewest characters of a message and of a passage.
const LEAST_MESSAGE: usize = 12;
const LEAST_PASSAGE: usize = 400;
/// Most characters of a passage for each of its tokens.
const CHARACTERS_OF_A_TOKEN: usize = 4;
/// One prompt in this many is about a passage.
const LONG: usize = 6;
/// Words in a row that repetition is judged by, and the least share of them that must differ.
const GRAM: usize = 3;
const LEAST_DISTINCT: f64 = 0.6;
/// Where a user's message is in a rendered chat.
const MARK: &str = "[[a user's message]]";

/// What a prompt about a passage asks for.
const TASKS: [&str; 8] = [
    "Summarize the following text in a few sentences.",
    "List the main points of this text.",
    "Write a title for this text, and say in one sentence what it is about.",
    "Explain the following text in simple words.",
    "Write three questions that the following text answers, with their answers.",
    "Rewrite this text so that it is half as long.",
    "Which facts does the following text state? Answer with a JSON list of strings.",
    "Continue the following text.",
];

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    prompt: String,
    /// The wave that wrote it.
    wave: usize,
    category: Category,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Category {
    /// A message, or the beginning of a text.
    Short,
    /// A passage with a task.
    Long,
}

/// What a model writes prompts from.
struct Turn {
    /// Up to the message.
    before: Prompt,
    /// What follows a message: the text ends there.
    stop: Vec<String>,
    has_template: bool,
}

impl Turn {
    fn of(model: &Model, wanted: Wanted<'_>) -> Result<Self, TrainError> {
        if wanted.raw || model.chat_template().is_none() {
            let begin = [model.bos_text(), model.eos_text()];
            let begin = begin.into_iter().find(|text| !text.is_empty() && !model.adds_bos());
            let before = begin.unwrap_or_default().into();
            return Ok(Self { before, stop: vec![], has_template: false });
        }
        let template = Template::of(model).map_err(TrainError::Prompts)?;
        let system = wanted.system.map(|content| json!({ "role": "system", "content": content }));
        let user = json!({ "role": "user", "content": MARK });
        let messages = system.into_iter().chain([user]).collect();
        let whole = template.render(&messages).map_err(|e| TrainError::Prompts(e.to_string()))?;
        Self::cut(whole).ok_or_else(|| {
            let why = "the chat template does not show a user's message as it is: give --prompts";
            TrainError::Prompts(why.into())
        })
    }

    /// Cuts a rendered chat where the message is.
    fn cut(whole: Prompt) -> Option<Self> {
        let Prompt::Text(mut parts) = whole else { return None };
        let at = parts.iter().position(|part| part.text.contains(MARK))?;
        let after: String = parts[at + 1..].iter().map(|part| part.text.as_str()).collect();
        parts.truncate(at + 1);
        let last = parts.pop()?;
        let (before, rest) = last.text.split_once(MARK)?;
        if !before.is_empty() {
            parts.push(Part { text: before.to_owned(), special: last.special });
        }
        let after = rest.to_owned() + &after;
        let stop = after.trim().split(['\n', ' ']).next().filter(|first| !first.is_empty());
        let stop = stop.map(str::to_owned).into_iter().collect();
        Some(Self { before: Prompt::Text(parts), stop, has_template: true })
    }

    fn request(&self, seed: u64) -> Request {
        let mut rng = fastrand::Rng::with_seed(seed);
        let max_tokens = if self.has_template { MAX_MESSAGE } else { rng.usize(BEGINNING) };
        Request { stop: self.stop.clone(), ..sampled(self.before.clone(), max_tokens, rng.u64(..)) }
    }
}

/// Asks for a text that differs from the others.
fn sampled(prompt: Prompt, max_tokens: usize, seed: u64) -> Request {
    Request {
        sampling: SamplingParams {
            temperature: 1.0,
            top_p: 0.98,
            seed,
            ..SamplingParams::default()
        },
        speculation: Speculation::OFF,
        share_text: false,
        ..Request::new(prompt, max_tokens)
    }
}

/// Writes prompts to the file at `path`, after those that it has, until it holds as many as are
/// wanted. `progress` gets the number of prompts so far.
///
/// # Errors
/// The file cannot be read or written, the engine fails, or the model writes nothing usable.
pub async fn write(
    handle: &Handle,
    wanted: Wanted<'_>,
    path: &Path,
    mut progress: impl FnMut(usize),
) -> Result<(), TrainError> {
    let turn = Turn::of(&handle.model, wanted)?;
    let mut lines = read(path)?;
    let mut seen: HashSet<String> = lines.iter().map(|line| line.prompt.clone()).collect();
    let mut wave = lines.last().map_or(0, |line| line.wave + 1);
    let mut n_empty = 0;
    progress(lines.len());
    while lines.len() < wanted.n {
        let seed = |i: usize| {
            fastrand::Rng::with_seed(wanted.seed ^ ((wave * (WAVE + 2) + i) as u64) << 8).u64(..)
        };
        let requests = (0..WAVE).map(|i| turn.request(seed(i)));
        let messages = ask(handle, requests.collect()).await?;
        let messages: Vec<String> = messages
            .into_iter()
            .filter(|(_, finish)| !turn.has_template || *finish != FinishReason::Length)
            .map(|(text, _)| text.trim().to_owned())
            .filter(|text| is_usable(text, LEAST_MESSAGE) && seen.insert(text.clone()))
            .collect();
        n_empty = if messages.is_empty() { n_empty + 1 } else { 0 };
        if n_empty == MOST_EMPTY_WAVES {
            let why = "the model writes no prompts that could be used: give --prompts";
            return Err(TrainError::Prompts(why.into()));
        }
        let n_long = if turn.has_template { messages.len() / (LONG - 1) } else { 0 };
        let passages = match wanted.texts {
            [] => own_passages(handle, &messages[..n_long], wanted, seed(WAVE)).await?,
            texts => {
                let mut rng = fastrand::Rng::with_seed(seed(WAVE));
                let n_most = wanted.max_passage * CHARACTERS_OF_A_TOKEN;
                (0..n_long).map(|_| passage(texts, n_most, &mut rng)).collect()
            }
        };
        let mut rng = fastrand::Rng::with_seed(seed(WAVE + 1));
        let long = passages.into_iter().filter_map(|passage| {
            let task = TASKS[rng.usize(..TASKS.len())];
            let prompt = format!("{task}\n\n{passage}");
            seen.insert(prompt.clone()).then_some((prompt, Category::Long))
        });
        let long: Vec<_> = long.collect();
        let short = messages.into_iter().map(|message| (message, Category::Short));
        lines.extend(short.chain(long).map(|(prompt, category)| Line { prompt, wave, category }));
        let text = lines
            .iter()
            .map(|line| serde_json::to_string(line).expect("texts have a JSON form") + "\n");
        files::write_whole(path, |part| files::write(part, text.collect()))?;
        progress(lines.len().min(wanted.n));
        wave += 1;
    }
    Ok(())
}

/// The file's lines; none if there is no file.
fn read(path: &Path) -> Result<Vec<Line>, FileError> {
    if !path.exists() {
        return Ok(vec![]);
    }
    let text = std::fs::read_to_string(path).map_err(|e| FileError::new(path, e))?;
    let line = |(i, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|e| FileError::new(path, format!("line {}: {e}; remove the file", i + 1)))
    };
    text.lines().enumerate().map(line).collect()
}

/// The answers to all requests, in their order, and how they ended.
async fn ask(
    handle: &Handle,
    requests: Vec<Request>,
) -> Result<Vec<(String, FinishReason)>, TrainError> {
    let most_running = handle.limits.n_slots + 4;
    let mut answers: Vec<Option<(String, FinishReason)>> = requests.iter().map(|_| None).collect();
    let mut running = JoinSet::new();
    let mut waiting = requests.into_iter().enumerate();
    loop {
        while running.len() < most_running {
            let Some((i, request)) = waiting.next() else { break };
            let handle = handle.clone();
            running.spawn(async move {
                let submitted = handle.submit(request, Caller::default()).await;
                let answer = submitted.map_err(|e| TrainError::Engine(e.to_string()))?;
                let collected = answer.collect().await;
                let (piece, done) = collected.map_err(|e| TrainError::Engine(e.to_string()))?;
                Ok::<_, TrainError>((i, (piece.text, done.finish_reason)))
            });
        }
        let Some(asked) = running.join_next().await else { break };
        let (i, answer) = asked.map_err(|e| TrainError::Engine(e.to_string()))??;
        answers[i] = Some(answer);
    }
    Ok(answers.into_iter().flatten().collect())
}

/// Passages from the model's own answers to messages.
async fn own_passages(
    handle: &Handle,
    messages: &[String],
    wanted: Wanted<'_>,
    seed: u64,
) -> Result<Vec<String>, TrainError> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut requests = vec![];
    for message in messages {
        let mut prompts = [super::prompts::Prompt::of(message.clone())];
        super::prompts::render(&mut prompts, &handle.model, wanted.system)
            .map_err(|e| TrainError::Prompts(e.to_string()))?;
        let [prompt] = prompts;
        requests.push(sampled(prompt.prompt, wanted.max_passage, rng.u64(..)));
    }
    let texts = ask(handle, requests).await?.into_iter().map(|(text, _)| text.trim().to_owned());
    Ok(texts.filter(|text| is_usable(text, LEAST_PASSAGE)).collect())
}

/// A passage of one of the texts, of whole paragraphs or sentences where they fit.
fn passage(texts: &[String], n_most: usize, rng: &mut fastrand::Rng) -> String {
    let text = &texts[rng.usize(..texts.len())];
    let n_most = rng.usize(n_most / 3..=n_most);
    let starts: Vec<usize> = std::iter::once(0)
        .chain(text.match_indices("\n\n").map(|(at, gap)| at + gap.len()))
        .filter(|&at| at == 0 || text.len() - at >= LEAST_PASSAGE)
        .collect();
    let rest = &text[starts[rng.usize(..starts.len())]..];
    let end = rest.char_indices().map(|(at, _)| at).nth(n_most).unwrap_or(rest.len());
    let cut = &rest[..end];
    if end == rest.len() {
        return cut.trim().to_owned();
    }
    let whole = ["\n\n", ". ", ".\n", "\n", " "]
        .iter()
        .find_map(|gap| cut.rfind(gap).filter(|&at| at >= end / 2).map(|at| &cut[..=at]));
    whole.unwrap_or(cut).trim().to_owned()
}

/// Whether a text has so many characters, all of them readable, and does not go round in circles.
fn is_usable(text: &str, least: usize) -> bool {
    if text.chars().count() < least || text.contains('\u{FFFD}') {
        return false;
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    let grams: Vec<&[&str]> = words.windows(GRAM).collect();
    let distinct: HashSet<&[&str]> = grams.iter().copied().collect();
    distinct.len() as f64 >= LEAST_DISTINCT * grams.len() as f64
}

/// The texts of a folder and its subfolders, each file with one of the usual endings as a text.
///
/// # Errors
/// A file or folder cannot be read, or there is no text of a passage's length.
pub fn texts_of(folder: &Path) -> Result<Vec<String>, FileError> {
    const ENDINGS: [&str; 4] = ["txt", "md", "rst", "html"];
    let mut folders = vec![folder.to_owned()];
    let mut paths = vec![];
    while let Some(folder) = folders.pop() {
        let fail = |e: std::io::Error| FileError::new(&folder, e);
        for entry in std::fs::read_dir(&folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| ENDINGS.iter().any(|known| e == *known)) {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let text = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).map_err(|e| FileError::new(path, e))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let mut texts = paths.iter().map(text).collect::<Result<Vec<_>, FileError>>()?;
    texts.retain(|text| text.len() >= LEAST_PASSAGE);
    if texts.is_empty() {
        let why = format!(
            "holds no text of {LEAST_PASSAGE} bytes or more in files that end with {}",
            ENDINGS.join(", ")
        );
        return Err(FileError::new(folder, why));
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(text: &str, special: bool) -> Part {
        Part { text: text.into(), special }
    }

    #[test]
    fn a_chat_is_cut_where_the_message_begins() {
        let parts = vec![
            part("<|im_start|>user\n", true),
            part(MARK, false),
            part("<|im_end|>\n<|im_start|>assistant\n", true),
        ];
        let turn = Turn::cut(Prompt::Text(parts)).unwrap();
        assert_eq!(turn.before, Prompt::Text(vec![part("<|im_start|>user\n", true)]));
        assert_eq!(turn.stop, ["<|im_end|>"]);
        let vicuna = Turn::cut(format!("USER: {MARK} ASSISTANT:").into()).unwrap();
        assert_eq!((vicuna.before, vicuna.stop), ("USER: ".into(), vec!["ASSISTANT:".to_owned()]));
        assert!(Turn::cut("no message".into()).is_none());
    }

    #[test]
    fn what_repeats_itself_is_short_or_unreadable_is_not_used() {
        assert!(is_usable("What is the capital of France?", 12));
        assert!(!is_usable("What?", 12));
        assert!(!is_usable("a word a word a word a word a word", 12));
        assert!(!is_usable("What is the \u{FFFD} of France?", 12));
        assert!(is_usable("Zwei Wörter", 3), "too few words to repeat themselves");
    }

    #[test]
    fn a_passage_ends_where_a_sentence_does() {
        let text =
            "One sentence of this text. ".repeat(200) + "\n\n" + &"Another one. ".repeat(100);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..50 {
            let passage = passage(std::slice::from_ref(&text), 900, &mut rng);
            assert!(passage.ends_with('.') && passage.len() <= 900, "{passage}");
            assert!(passage.starts_with("One") || passage.starts_with("Another"), "{passage}");
        }
    }
}
