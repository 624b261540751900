//! Answers under a grammar: nothing but what it allows, the same with drafts and without, and no
//! forbidden candidate computed.
#![allow(missing_docs)]

mod common;

use std::sync::{Arc, LazyLock};

use common::{Server, model_path};
use medusa_llama::engine::grammar::{Grammar, Grammars};
use medusa_llama::engine::guide::Guide;
use medusa_llama::llama::{Model, Placement, Token};
use medusa_llama::request::{GrammarBegin, GrammarSource, Request, Thinking, Trigger};
use medusa_llama::speculate::{Node, Tree};
use serde_json::{Value, json};

static MODEL: LazyLock<Arc<Model>> = LazyLock::new(|| {
    Arc::new(Model::load(&model_path(), &Placement::default(), |_| true).unwrap())
});
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&MODEL, &[]).unwrap());

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

/// What a tree holds: each node's text, its parent, and whether only the grammar proposed it.
fn nodes(tree: &Tree) -> Vec<(String, Option<usize>, bool)> {
    let node = |n: &Node| (MODEL.detokenize(&[n.token]), n.parent, n.forced);
    tree.nodes().iter().map(node).collect()
}

fn prepare(guide: &mut Guide, tree: &mut Tree, max_depth: usize) {
    guide.prepare(tree, max_depth, &|token, out| MODEL.piece(token, false, out));
}

fn accept(guide: &mut Guide, text: &str) -> bool {
    let accept = |token: Token| guide.accept(token, &MODEL.bytes(token, false)).unwrap();
    tokens(text).into_iter().map(accept).last().unwrap()
}

#[test]
fn a_tree_keeps_the_paths_that_a_grammar_allows_and_gets_those_that_it_leaves_alone() {
    let mut guide = Guide::from(lark(r#"start: /[a-z]+/ ", " ("two" | "three") ", four""#));
    let one = tokens("one, two");
    let [one, comma, two] = one[..] else { panic!("three tokens: {one:?}") };
    let (three, four) = (tokens("one, three")[2], tokens("one, four")[2]);
    let mut tree = Tree::default();
    let first = tree.push(None, one, 0.9, 0.9);
    let forbidden = tree.push(None, comma, 0.8, 0.8);
    tree.push(Some(forbidden), two, 0.7, 0.7);
    let second = tree.push(Some(first), comma, 0.6, 0.6);
    tree.push(Some(second), four, 0.5, 0.5);
    let third = tree.push(Some(second), three, 0.4, 0.4);
    tree.push(Some(second), two, 0.1, 0.1);
    tree.push(Some(third), two, 0.1, 0.1);
    prepare(&mut guide, &mut tree, 5);
    let expected = [
        ("one", None, false),
        (",", Some(0), false),
        (" three", Some(1), false),
        (",", Some(2), true),
        (" four", Some(3), true),
        (" two", Some(1), false),
    ];
    assert_eq!(nodes(&tree), expected.map(|(text, parent, f)| (text.to_owned(), parent, f)));
    let depths: Vec<usize> = tree.nodes().iter().map(|n| n.depth).collect();
    assert_eq!(depths, [1, 2, 3, 4, 5, 3]);
    assert!(!accept(&mut guide, "one,"), "the guide kept its place");
    let mut masked = Vec::new();
    assert!(guide.mask(&vec![0.0; MODEL.n_vocab()], &mut masked));
    assert!(masked[two.0 as usize] == 0.0 && masked[four.0 as usize] < 0.0);
}

/// Schemas whose answers have long texts, numbers, choices and names that are left alone.
fn long_schemas() -> [Value; 4] {
    let line = json!({ "type": "object", "required": ["item", "count"], "additionalProperties": false, "properties": {
        "item": { "type": "string" }, "count": { "type": "integer" }, "price": { "type": "number" } } });
    [
        json!({ "type": "object", "required": ["title", "lines"], "additionalProperties": false, "properties": {
            "title": { "type": "string", "minLength": 20 }, "lines": { "type": "array", "items": line, "minItems": 3 } } }),
        json!({ "type": "object", "required": ["kind", "value", "when"], "additionalProperties": false, "properties": {
            "kind": { "enum": ["measurement", "measured value", "estimate"] },
            "value": { "anyOf": [{ "type": "number" }, { "type": "null" }, { "type": "string", "pattern": "^[a-z]{3,40}$" }] },
            "when": { "type": "string", "format": "date-time" } } }),
        json!({ "type": "object", "additionalProperties": { "type": "array", "items": { "type": ["boolean", "string"] } } }),
        json!({}),
    ]
}

/// Drafts ask a grammar of what might come; an answer's text must not depend on what was asked.
#[test]
fn a_guide_allows_the_same_whatever_it_was_asked_before() {
    let prose = tokens(include_str!("data/prose.txt"));
    let mut rng = fastrand::Rng::with_seed(7);
    let row = vec![0.0; MODEL.n_vocab()];
    for schema in long_schemas() {
        for _ in 0..6 {
            let request = Request {
                grammar: Some(GrammarSource::JsonSchema(schema.clone())),
                ..Request::new("", 1)
            };
            let most = rng.usize(60..400);
            let [mut plain, mut asked] = [(); 2].map(|()| guided(request.clone()).limited(most));
            let (mut of_plain, mut of_asked) = (Vec::new(), Vec::new());
            let (mut left, mut text) = (prose.clone(), String::new());
            for _ in 0..most {
                prepare(&mut asked, &mut random_tree(&mut rng, &left, &prose), 8);
                let held = plain.mask(&row, &mut of_plain);
                assert_eq!(held, asked.mask(&row, &mut of_asked), "{text}");
                assert!(!held || of_plain == of_asked, "{text}");
                let next = (0..).zip(&of_plain).filter(|(_, logit)| **logit == 0.0);
                left = next.map(|(token, _)| Token(token)).collect();
                let words = prose.iter().filter(|token| left.contains(token));
                let words: Vec<&Token> = words.take(40).collect();
                let token = match words.is_empty() || rng.u8(0..4) == 0 {
                    true => *rng.choice(&left).unwrap(),
                    false => **rng.choice(&words).unwrap(),
                };
                text += &MODEL.detokenize(&[token]);
                let bytes = MODEL.bytes(token, false);
                let [whole, same] =
                    [&mut plain, &mut asked].map(|guide| guide.accept(token, &bytes).unwrap());
                assert_eq!((whole, plain.is_cut()), (same, asked.is_cut()), "{text}");
                if whole || MODEL.is_end(token) {
                    break;
                }
            }
        }
    }
}

/// Candidates of which some may come next.
fn random_tree(rng: &mut fastrand::Rng, left: &[Token], prose: &[Token]) -> Tree {
    let mut tree = Tree::default();
    for _ in 0..rng.usize(0..12) {
        let parent = tree.nodes().len().checked_sub(1).filter(|_| rng.bool());
        let from = if rng.bool() { left } else { prose };
        let Some(&token) = rng.choice(from) else { break };
        if tree.child(parent, token).is_none() {
            tree.push(parent, token, 0.5, 0.5);
        }
    }
    tree
}

fn guided(request: Request) -> Guide {
    Guide::of(&request, &GRAMMARS).unwrap().unwrap()
}

fn is_free(guide: &Guide) -> bool {
    !guide.mask(&vec![0.0; MODEL.n_vocab()], &mut Vec::new())
}

fn only(guide: &Guide) -> Option<String> {
    let mut masked = Vec::new();
    guide.mask(&vec![0.0; MODEL.n_vocab()], &mut masked);
    let mut left = (0..).zip(masked).filter(|(_, logit)| *logit == 0.0);
    let (first, second) = (left.next(), left.next());
    first.filter(|_| second.is_none()).map(|(token, _)| MODEL.detokenize(&[Token(token)]))
}

fn waiting(triggers: Vec<Trigger>) -> Guide {
    guided(Request {
        grammar: Some(GrammarSource::Lark(r#"start: "<call>" /[0-9]/ "</call>""#.into())),
        begin: GrammarBegin::Triggers(triggers),
        thinking: Some(Thinking {
            begin: Some("<think>".into()),
            ends: vec!["</think>".into()],
            budget: None,
        }),
        ..Request::new("", 9)
    })
}

#[test]
fn a_grammar_begins_at_its_trigger_wherever_tokens_end_and_not_in_thoughts() {
    for trigger in [Trigger::Word("<call>".into()), Trigger::Pattern("x+(<call>)".into())] {
        let mut guide = waiting(vec![trigger]);
        assert!(!accept(&mut guide, "Some text <cal x<call") && is_free(&guide));
        let closing = MODEL.tokenize(">7</", false).unwrap()[0];
        let piece = MODEL.bytes(closing, false);
        guide.accept(closing, &piece).unwrap();
        assert!(!is_free(&guide), "after {:?}", MODEL.detokenize(&[closing]));
    }
    let mut guide = waiting(vec![Trigger::Word("<call>".into())]);
    accept(&mut guide, " <think>No <call>9999 yet.");
    assert!(is_free(&guide), "thoughts may say anything");
    accept(&mut guide, "</think>So: <call>");
    assert!(!is_free(&guide));
    let mut guide = waiting(vec![Trigger::Word("<call>".into())]);
    accept(&mut guide, "<call>");
    assert!(!is_free(&guide), "there need be no thoughts");
    assert!(accept(&mut guide, "7</call>"), "nothing may follow a whole call");
}

#[test]
fn a_tree_may_hold_a_trigger_and_what_must_follow_it() {
    let mut guide = waiting(vec![Trigger::Word("<call>".into())]);
    accept(&mut guide, "Well,");
    let mut tree = Tree::default();
    let mut parent = None;
    let path = tokens("<call>7");
    for (i, token) in path.iter().enumerate() {
        parent = Some(tree.push(parent, *token, 0.9, 0.9 - i as f32 * 0.01));
    }
    let wrong = tree.push(parent, tokens("x")[0], 0.5, 0.5);
    tree.push(Some(wrong), tokens("y")[0], 0.4, 0.4);
    prepare(&mut guide, &mut tree, 20);
    let text: String = nodes(&tree).into_iter().map(|(text, ..)| text).collect();
    assert_eq!(text, "<call>7</call>", "{:?}", nodes(&tree));
    assert!(is_free(&guide));
}

#[test]
fn thoughts_end_at_their_budget_and_the_answer_begins_as_it_must() {
    let mut guide = guided(Request {
        grammar: Some(GrammarSource::Lark(r#"start: "<call>" /[0-9]/ "</call>""#.into())),
        begin: GrammarBegin::Text("<call>".into()),
        thinking: Some(Thinking {
            begin: None,
            ends: vec!["\n</think>".into(), "</think>".into()],
            budget: Some(3),
        }),
        ..Request::new("", 9)
    });
    assert!(is_free(&guide));
    accept(&mut guide, "one two three");
    let mut text = String::new();
    while let Some(piece) = only(&guide) {
        text += &piece;
        accept(&mut guide, &piece);
    }
    assert_eq!(text, "\n</think><call>");
    let mut tree = Tree::default();
    prepare(&mut guide, &mut tree, 20);
    assert!(tree.is_empty(), "a digit may be any");
    assert!(accept(&mut guide, "7</call>"));
}

/// A model that never ends what it began: each token is any that may come, and rather none that
/// ends a string or a list.
#[test]
fn json_is_closed_before_its_tokens_run_out() {
    let node = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string" }, "n": { "type": "number", "minimum": -3 },
            "kind": { "enum": ["first", "second"] }, "nodes": { "type": "array", "items": { "$ref": "#/$defs/node" } },
            "day": { "type": "string", "format": "date" }, "maybe": { "anyOf": [{ "type": "string" }, { "type": "null" }] },
        },
        "required": ["name", "n", "kind", "nodes", "day"],
    });
    let schema = json!({ "$ref": "#/$defs/node", "$defs": { "node": node } });
    let mut random = fastrand::Rng::with_seed(1);
    for limit in [70, 100, 150, 250, 400] {
        let grammar = GRAMMARS.compile(&GrammarSource::JsonSchema(schema.clone())).unwrap();
        let mut guide = Guide::from(grammar).limited(limit);
        let (mut bytes, mut n, mut masked) = (Vec::new(), 0, Vec::new());
        loop {
            guide.mask(&vec![0.0; MODEL.n_vocab()], &mut masked);
            let allowed = (0..).zip(&masked).filter(|(_, logit)| **logit == 0.0);
            let allowed: Vec<Token> = allowed.map(|(token, _)| Token(token)).collect();
            let ends = |token: &&Token| {
                let text = MODEL.bytes(**token, false);
                !text.iter().any(|byte| b"\"}]".contains(byte)) && !MODEL.is_end(**token)
            };
            let going_on: Vec<&Token> = allowed.iter().filter(ends).collect();
            let token = match random.choice(&going_on) {
                Some(token) => **token,
                None => *random.choice(&allowed).unwrap(),
            };
            n += 1;
            assert!(n <= limit, "it is not closed: {}", String::from_utf8_lossy(&bytes));
            bytes.extend(MODEL.bytes(token, false));
            if guide.accept(token, &MODEL.bytes(token, false)).unwrap() {
                break;
            }
        }
        let text = String::from_utf8(bytes).unwrap();
        assert!(n <= limit && n + 40 > limit && guide.is_cut(), "{n} of {limit}: {text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(jsonschema::is_valid(&schema, &value), "{text}");
    }
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

/// The grammar takes time with the cube of the text's length, and all streams wait for it.
#[test]
fn a_grammar_that_takes_ever_more_time_ends() {
    let mut guide = Guide::from(lark("start: s\ns: s s | \"a\" | \"b\""));
    let followed = tokens(&"abba".repeat(1000))
        .into_iter()
        .try_for_each(|token| guide.accept(token, b"").map(|whole| assert!(!whole)));
    assert!(followed.unwrap_err().to_string().contains("too much time"));
}

/// Schemas whose texts have an end, however the model likes digits: each token is a digit if it may
/// be one, and the text ends if it may.
#[test]
fn numbers_and_times_come_to_their_end() {
    let digit = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let open = json!({ "type": "number" });
    for schema in [
        json!({ "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 }),
        json!({ "type": "number", "minimum": -1.5, "maximum": 1e6 }),
        json!({ "type": "number", "maximum": -2 }),
        json!({ "type": "number", "multipleOf": 0.25 }),
        json!({ "type": "integer" }),
        json!({ "type": "string", "format": "date-time" }),
        json!({ "type": "string", "format": "time" }),
        json!({ "type": "string", "format": "duration" }),
        open.clone(),
        json!({ "type": "array", "items": open, "minItems": 2, "maxItems": 2 }),
        json!({ "type": "object", "properties": { "x": open }, "required": ["x"], "additionalProperties": false }),
        json!({}),
    ] {
        let mut grammar = GRAMMARS.compile(&GrammarSource::JsonSchema(schema.clone())).unwrap();
        let mut text = String::new();
        for _ in 0..120 {
            let allowed = allowed(&grammar);
            let texts = allowed.iter().map(|&t| (t, MODEL.detokenize(&[t])));
            let texts: Vec<(Token, String)> = texts.filter(|(t, _)| !MODEL.is_end(*t)).collect();
            let zero = texts.iter().find(|(_, text)| text == "0");
            let next = zero.or_else(|| texts.iter().find(|(_, text)| digit(text)));
            let point = || texts.iter().find(|(_, text)| text == ".");
            let Some((token, piece)) = next.or_else(point).or_else(|| {
                texts.iter().min_by_key(|(_, text)| (text.trim().is_empty(), text.len()))
            }) else {
                break;
            };
            text += piece;
            if grammar.accept(*token).unwrap() {
                break;
            }
        }
        let value: Value =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{schema}: {text}: {e}"));
        assert!(jsonschema::is_valid(&schema, &value), "{schema}: {text}");
    }
}

#[test]
fn a_property_that_a_pattern_names_too_is_written_once() {
    let schema = json!({
        "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"],
        "patternProperties": { "^a$": { "maximum": 5 } }, "additionalProperties": false,
    });
    let mut grammar = GRAMMARS.compile(&GrammarSource::JsonSchema(schema)).unwrap();
    let whole = tokens("{\"a\": 5").into_iter().map(|t| grammar.accept(t).unwrap()).last();
    assert_eq!(whole, Some(false));
    let next: Vec<String> = allowed(&grammar).iter().map(|&t| MODEL.detokenize(&[t])).collect();
    assert!(next.iter().any(|t| t == "}") && !next.iter().any(|t| t.contains(',')), "{next:?}");
}

#[test]
fn large_grammars_are_followed_or_refused_by_name() {
    let optional = |n: usize| {
        let each = (0..n).map(|i| (format!("p{i}"), json!({ "type": "integer" })));
        let properties: serde_json::Map<_, _> = each.collect();
        GrammarSource::JsonSchema(
            json!({ "type": "object", "properties": properties, "additionalProperties": false }),
        )
    };
    let mut grammar = GRAMMARS.compile(&optional(600)).unwrap();
    for token in tokens("{\"p5\": 1, \"p77\": 2") {
        assert!(!grammar.accept(token).unwrap());
    }
    let chain = |n: usize| {
        let link = |i: usize| (format!("d{i}"), json!({ "$ref": format!("#/$defs/d{}", i + 1) }));
        let mut links: serde_json::Map<_, _> = (0..n).map(link).collect();
        links.insert(format!("d{n}"), json!({ "type": "integer" }));
        GrammarSource::JsonSchema(json!({ "$ref": "#/$defs/d0", "$defs": links }))
    };
    assert!(GRAMMARS.compile(&chain(5000)).is_ok(), "deep, but within the stack");
    for (source, why) in [
        (optional(1001), "1001 optional properties"),
        (chain(20_000), "bytes, but the limit is"),
        (
            GrammarSource::Lark(format!(
                "start: {}\"a\"{}",
                "(".repeat(50_000),
                ")".repeat(50_000)
            )),
            "nested",
        ),
        (
            GrammarSource::Lark(format!("start: /{}a{}/", "(".repeat(50_000), ")".repeat(50_000))),
            "invalid regex",
        ),
        (GrammarSource::JsonSchema(json!({ "type": "\u{20ac}".repeat(99) })), "cannot be"),
    ] {
        let error = GRAMMARS.compile(&source).err().expect(why);
        assert!(error.message.contains(why) && error.message.len() < 1500, "{error}");
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

/// llguidance allows a comma after the only property: a text that has it leads nowhere.
#[test]
fn a_grammar_that_leads_nowhere_ends_its_choices_alone() {
    let server = Server::start(&["--ctx", "256"]);
    let dead = json!({
        "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"],
        "patternProperties": { "^[a]$": { "type": "integer" } }, "additionalProperties": false,
    });
    let [comma] = tokens(",")[..] else { panic!("one token") };
    let body = json!({
        "prompt": ask("One"), "n": 2, "max_tokens": 60, "logit_bias": { comma.0.to_string(): 100 },
        "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": dead } },
    });
    let answer = server.post_to("/v1/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    for choice in answer.json()["choices"].as_array().unwrap() {
        let ended = (&choice["finish_reason"], &choice["stop_reason"]);
        assert_eq!(ended, (&json!("length"), &json!("grammar")), "{choice}");
        assert!(choice["text"].as_str().unwrap().starts_with('{'));
    }
    let failures = |reason| server.metric("request_failures_total", &[reason]);
    assert_eq!((failures(r#"reason="grammar""#), failures(r#"reason="engine""#)), (2.0, 0.0));
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
    let gbnf = "root ::= \" \" colour \".\"\ncolour ::= \"red\" | \"blue\"";
    let answer = text(json!({ "prompt": "The colour is", "grammar": gbnf }));
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
