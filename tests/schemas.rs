//! The schemas of JSON Schema's own test suite, which `scripts/setup schemas` fetches: none makes the
//! server fail, and what is taken keeps out what the suite says is invalid.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::Server;
use common::context::MODEL;
use medusa_llama::engine::grammar::Grammars;
use medusa_llama::request::GrammarSource;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, Serializer};
use serde_json::{Map, Value, json};

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&MODEL, &[]).unwrap());

/// A schema of the suite, and values that it allows or does not.
#[derive(Debug, Deserialize)]
struct Group {
    #[serde(skip)]
    name: String,
    description: String,
    schema: Value,
    tests: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    description: String,
    data: Value,
    valid: bool,
}

/// Those whose schema is an object: requests take no other. Not those of draft 3, whose keywords later
/// drafts do not know, so that they must be ignored.
fn groups() -> Vec<(Map<String, Value>, Group)> {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/schemas");
    assert!(suite.is_dir(), "the suite is missing: run `scripts/setup schemas`");
    let mut groups = Vec::new();
    for file in files(&suite) {
        let name = file.strip_prefix(&suite).unwrap().display().to_string();
        if name.starts_with("draft3") {
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let read: Vec<Group> = serde_json::from_str(&text).unwrap();
        for mut group in read {
            group.name = format!("{name}: {}", group.description);
            if let Value::Object(schema) = &group.schema {
                groups.push((schema.clone(), group));
            }
        }
    }
    assert!(groups.len() > 1000, "{}", groups.len());
    groups
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false if path.extension().is_some_and(|e| e == "json") => found.push(path),
            false => {}
        }
    }
    found.sort();
    found
}

/// JSON as a grammar writes it: in one line, with a space after commas and colons.
fn one_line(value: &Value) -> String {
    struct OneLine;
    impl Formatter for OneLine {
        fn begin_array_value<W: ?Sized + Write>(
            &mut self,
            out: &mut W,
            first: bool,
        ) -> io::Result<()> {
            out.write_all(if first { b"" } else { b", " })
        }

        fn begin_object_key<W: ?Sized + Write>(
            &mut self,
            out: &mut W,
            first: bool,
        ) -> io::Result<()> {
            out.write_all(if first { b"" } else { b", " })
        }

        fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            out.write_all(b": ")
        }
    }
    let mut text = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut text, OneLine)).unwrap();
    String::from_utf8(text).unwrap()
}

/// Whether a grammar takes a text.
fn takes(source: &GrammarSource, text: &str) -> bool {
    let mut grammar = GRAMMARS.compile(source).unwrap();
    let (mut masked, mut whole) = (Vec::new(), false);
    let zeros = vec![0.0; MODEL.n_vocab()];
    for token in MODEL.tokenize(text, false).unwrap() {
        if whole {
            return false;
        }
        grammar.mask(&zeros, &mut masked);
        if masked[token.0 as usize] != 0.0 {
            return false;
        }
        let Ok(ends) = grammar.accept(token) else { return false };
        whole = ends;
    }
    if !whole {
        grammar.mask(&zeros, &mut masked);
    }
    whole || MODEL.end_token().is_some_and(|end| masked[end.0 as usize] == 0.0)
}

#[test]
fn what_the_suite_says_is_invalid_is_no_text_of_a_schema() {
    let (mut n_groups, mut n_taken, mut wrong) = (0, 0, Vec::new());
    let (mut valid, mut n_valid) = (0, 0);
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    // What is optional are formats to the letter (leap days) and regular expressions of ECMA's kind.
    let is_required =
        |group: &Group| !group.name.contains("optional") && !group.name.starts_with("draft-next");
    for (schema, group) in groups().into_iter().filter(|(_, group)| is_required(group)) {
        n_groups += 1;
        let source = GrammarSource::JsonSchema(schema.into());
        if let Err(error) = GRAMMARS.compile(&source) {
            *reasons.entry(error.message.chars().take(60).collect()).or_default() += 1;
            continue;
        }
        n_taken += 1;
        for case in &group.tests {
            let taken = takes(&source, &one_line(&case.data));
            if case.valid {
                n_valid += 1;
                valid += usize::from(taken);
            } else if taken {
                wrong.push(format!("{} / {}: {}", group.name, case.description, case.data));
            }
        }
    }
    println!("{n_taken} of {n_groups} schemas, {valid} of {n_valid} valid values; {reasons:#?}");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    // A grammar writes objects in one order, and numbers without an exponent that says nothing.
    assert!(valid * 10 > n_valid * 9, "{valid} of {n_valid} valid values");
}

#[test]
fn no_schema_makes_the_server_fail() {
    let server = Server::start(&["--ctx", "256", "-b", "8"]);
    let groups = groups();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some((schema, group)) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let format = json!({ "name": "x", "schema": schema });
                    let answer = server.generate(&json!({
                        "prompt": "Some JSON", "max_tokens": 8, "temperature": 1.0, "seed": 1,
                        "response_format": { "type": "json_schema", "json_schema": format },
                    }));
                    let text = answer.text();
                    assert!(matches!(answer.status, 200 | 422), "{}: {text}", group.name);
                    if answer.status == 422 {
                        assert!(answer.json()["error"]["message"].is_string(), "{text}");
                    }
                }
            });
        }
    });
    assert_eq!(server.metric("request_failures_total", &[r#"reason="engine""#]), 0.0);
    server.wait(|| server.is_idle());
}
