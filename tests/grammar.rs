//! Answers under a grammar: nothing but what it allows, the same with drafts and without, and no
//! forbidden candidate computed.
#![allow(missing_docs)]

mod common;

use std::sync::LazyLock;

use common::{Server, model_path};
use medusa_llama::engine::grammar::{Grammar, Grammars};
use medusa_llama::llama::{Model, Token};
use medusa_llama::request::GrammarSource;
use medusa_llama::speculate::Tree;
use serde_json::{Value, json};

static MODEL: LazyLock<Model> = LazyLock::new(|| Model::load(&model_path(), 0, |_| true).unwrap());
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&MODEL).unwrap());

fn lark(grammar: &str) -> Grammar {
    GRAMMARS.compile(&GrammarSource::Lark(grammar.into())).unwrap()
}

fn tokens(text: &str) -> Vec<Token> {
    MODEL.tokenize(text, false).unwrap()
}

fn end() -> Token {
    (0..MODEL.n_vocab() as i32).map(Token).find(|&t| MODEL.is_end(t)).unwrap()
}

/// Tokens that a mask leaves.
fn allowed(grammar: &Grammar) -> Vec<Token> {
    let mut masked = Vec::new();
    grammar.mask(&vec![0.0; MODEL.n_vocab()], &mut masked);
    (0..).zip(masked).filter(|(_, logit)| *logit == 0.0).map(|(t, _)| Token(t)).collect()
}

#[test]
fn a_mask_leaves_the_beginnings_of_what_may_follow() {
    let grammar = lark(r#"start: "yes" | "no""#);
    let texts: Vec<String> = allowed(&grammar).iter().map(|&t| MODEL.detokenize(&[t])).collect();
    assert!(
        texts.iter().all(|t| "yes".starts_with(t.as_str()) || "no".starts_with(t.as_str())),
        "{texts:?}"
    );
    for text in ["y", "yes", "n", "no"] {
        assert!(texts.iter().any(|t| t == text), "{text} of {texts:?}");
    }
}

#[test]
fn a_grammar_tells_when_its_text_is_complete() {
    let mut grammar = lark(r#"start: "yes" ("!" | "?")*"#);
    let [yes] = tokens("yes")[..] else { panic!("one token") };
    assert!(!allowed(&grammar).contains(&end()), "nothing is no text of it");
    assert!(!grammar.accept(yes).unwrap(), "more may follow");
    assert!(allowed(&grammar).contains(&end()), "but need not");
    let mut grammar = lark(r#"start: "yes""#);
    assert!(grammar.accept(yes).unwrap(), "nothing may follow");
}

#[test]
fn a_tree_keeps_the_paths_that_a_grammar_allows_and_the_grammar_its_place() {
    let mut grammar = lark(r#"start: "one, " ("two" | "three") ", four""#);
    let one = tokens("one, two");
    let [one, comma, two] = one[..] else { panic!("three tokens: {one:?}") };
    let (three, four) = (tokens("one, three")[2], tokens("one, four")[2]);
    let mut tree = Tree::default();
    let first = tree.push(None, one, 0.9, 0.9);
    let forbidden = tree.push(None, two, 0.8, 0.8);
    tree.push(Some(forbidden), comma, 0.7, 0.7);
    let second = tree.push(Some(first), comma, 0.6, 0.6);
    tree.push(Some(second), four, 0.5, 0.5);
    let third = tree.push(Some(second), three, 0.4, 0.4);
    tree.push(Some(second), two, 0.3, 0.3);
    tree.push(Some(third), comma, 0.2, 0.2);
    tree.push(Some(third), end(), 0.1, 0.1);
    let before = allowed(&grammar);
    grammar.prune(&mut tree);
    let kept: Vec<_> = tree.nodes().iter().map(|n| (n.token, n.parent, n.depth)).collect();
    assert_eq!(
        kept,
        [
            (one, None, 1),
            (comma, Some(0), 2),
            (three, Some(1), 3),
            (two, Some(1), 3),
            (comma, Some(2), 4)
        ],
        "in their order"
    );
    assert_eq!(allowed(&grammar), before);
    assert!(!grammar.accept(one).unwrap() && !grammar.accept(comma).unwrap());
    assert!(allowed(&grammar).contains(&two) && !allowed(&grammar).contains(&four));
}

#[test]
fn what_is_no_grammar_is_refused_with_its_reason() {
    let refused = |source: GrammarSource| GRAMMARS.compile(&source).err().unwrap();
    let error = refused(GrammarSource::Lark("start: nowhere".into()));
    assert!(
        error.param.as_deref() == Some("grammar") && error.message.contains("nowhere"),
        "{error}"
    );
    for schema in [
        json!({ "type": "strange" }),
        json!({ "enum": [] }),
        json!({ "type": "string", "pattern": "(" }),
    ] {
        let error = refused(GrammarSource::JsonSchema(schema));
        assert_eq!(error.param.as_deref(), Some("response_format"), "{error}");
    }
}

fn ask(topic: &str) -> String {
    format!("<|im_start|>user\n{topic}, as JSON.<|im_end|>\n<|im_start|>assistant\n")
}

fn schema(properties: &Value) -> Value {
    let names: Vec<&String> = properties.as_object().unwrap().keys().collect();
    let schema = json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false });
    json!({ "type": "json_schema", "json_schema": { "name": "it", "schema": schema } })
}

#[test]
fn a_schema_gives_one_text_with_drafts_and_without() {
    let server = Server::start(&["--ctx", "512"]);
    let person = schema(&json!({
        "name": { "type": "string", "maxLength": 24 },
        "age": { "type": "integer", "minimum": 0, "maximum": 120 },
        "colours": { "type": "array", "items": { "enum": ["red", "green", "blue"] }, "minItems": 2, "maxItems": 4 },
    }));
    for (seed, temperature) in [(1, 0.0), (2, 0.8), (3, 0.8), (4, 1.5), (5, 1.5)] {
        let answer = |speculation| {
            let body = json!({
                "prompt": ask("Describe a person"), "max_tokens": 200, "temperature": temperature, "seed": seed,
                "response_format": person, "speculation": speculation,
            });
            let answer = server.generate(&body);
            assert_eq!(answer.status, 200, "{}", answer.text());
            answer.json()
        };
        let (plain, drafted) = (answer("off"), answer("auto"));
        assert_eq!(plain["generated_text"], drafted["generated_text"], "seed {seed}");
        assert_eq!(drafted["finish_reason"], "stop");
        let text: Value =
            serde_json::from_str(drafted["generated_text"].as_str().unwrap()).unwrap();
        assert!(
            text["age"].as_u64().unwrap() <= 120 && text["colours"].as_array().unwrap().len() >= 2
        );
    }
}

#[test]
fn grammars_are_asked_for_by_their_fields() {
    let server = Server::start(&["--ctx", "256"]);
    let text =
        |body: Value| server.generate(&body).json()["generated_text"].as_str().unwrap().to_owned();
    let answer = text(
        json!({ "prompt": "The colour is", "raw": true, "grammar": "start: \" \" (\"red\" | \"blue\") \".\"" }),
    );
    assert!([" red.", " blue."].contains(&answer.as_str()), "{answer}");
    let format = json!({ "type": "json_object" });
    let body = json!({ "prompt": ask("A cat"), "response_format": format, "ignore_eos": true, "max_tokens": 9 });
    assert!(text(body).starts_with('{'));
    for (name, bad) in [
        ("grammar", json!({ "grammar": "start: (" })),
        ("grammar", json!({ "grammar": "start: \"a\"", "response_format": format })),
        ("response_format", json!({ "response_format": "json" })),
        ("response_format", json!({ "response_format": { "type": "text", "json_schema": 1 } })),
        (
            "response_format",
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x" } } }),
        ),
    ] {
        let mut body = json!({ "prompt": "x" });
        body.as_object_mut().unwrap().extend(bad.as_object().unwrap().clone());
        let answer = server.generate(&body);
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (422, &json!(name)),
            "{}",
            answer.text()
        );
    }
    server.wait(|| server.is_idle());
}
