//! GBNF means what llama.cpp means by it: against a matcher that tries everything.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use common::model_path;
use medusa_llama::engine::grammar::{Grammar, GrammarError, Grammars};
use medusa_llama::llama::{Model, Placement, Token};
use medusa_llama::request::{CallGrammar, GrammarSource};
use proptest::prelude::*;

static MODEL: LazyLock<Arc<Model>> = LazyLock::new(|| {
    Arc::new(Model::load(&model_path(), &Placement::default(), |_| true).unwrap())
});
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&MODEL, &[]).unwrap());

/// A text's characters are these.
const ALPHABET: [char; 4] = ['a', 'b', '(', 'é'];

#[derive(Clone, Debug)]
enum Node {
    Literal(String),
    /// Characters, or all but them.
    Class(Vec<char>, bool),
    Any,
    Rule(usize),
    Group(Vec<Vec<Node>>),
    Repeat(Box<Node>, usize, Option<usize>),
}

/// Rules: alternatives of sequences.
type Rules = Vec<Vec<Vec<Node>>>;

fn written(nodes: &[Vec<Node>]) -> String {
    let one = |node: &Node| match node {
        Node::Literal(text) => format!("{text:?}"),
        Node::Class(chars, negated) => {
            let chars: String = chars.iter().map(|&c| format!("\\U{:08x}", c as u32)).collect();
            format!("[{}{chars}]", if *negated { "^" } else { "" })
        }
        Node::Any => ".".into(),
        Node::Rule(0) => "root".into(),
        Node::Rule(rule) => format!("rule-{rule}"),
        Node::Group(nodes) => format!("({})", written(nodes)),
        Node::Repeat(node, least, most) => {
            let node = written(&[vec![(**node).clone()]]);
            match (least, most) {
                (0, None) => format!("{node}*"),
                (0, Some(1)) => format!("{node}?"),
                (_, None) => format!("{node}{{{least},}}"),
                (_, Some(most)) => format!("{node}{{{least},{most}}}"),
            }
        }
    };
    let sequence = |nodes: &Vec<Node>| match &nodes[..] {
        [] => "\"\"".into(), // a rule's name after `::=` and a line's end would belong to it
        nodes => nodes.iter().map(one).collect::<Vec<_>>().join(" "),
    };
    nodes.iter().map(sequence).collect::<Vec<_>>().join(" | ")
}

fn gbnf(rules: &Rules) -> String {
    let name = |rule| if rule == 0 { "root".to_owned() } else { format!("rule-{rule}") };
    let line = |(i, rule): (usize, &Vec<Vec<Node>>)| {
        format!("{} ::= {} # as written\n", name(i), written(rule))
    };
    rules.iter().enumerate().map(line).collect()
}

/// By rule and beginning, where it may end, as far as that is known.
type Known = Vec<Vec<BTreeSet<usize>>>;

/// Where a node that begins at `at` may end.
fn ends(node: &Node, text: &[char], at: usize, known: &Known) -> BTreeSet<usize> {
    let chars = |n: usize, holds: bool| holds.then_some(at + n).into_iter().collect();
    match node {
        Node::Literal(literal) => {
            let literal: Vec<char> = literal.chars().collect();
            chars(literal.len(), text[at..].starts_with(&literal))
        }
        Node::Class(class, negated) => {
            chars(1, text.get(at).is_some_and(|c| class.contains(c) != *negated))
        }
        Node::Any => chars(1, at < text.len()),
        Node::Rule(rule) => known[*rule][at].clone(),
        Node::Group(nodes) => ends_of(nodes, text, at, known),
        Node::Repeat(node, least, most) => {
            let mut found = BTreeSet::new();
            let mut here = BTreeSet::from([at]);
            for i in 0..=most.unwrap_or(least + text.len() + 1) {
                if i >= *least {
                    found.extend(&here);
                }
                here = here.iter().flat_map(|&at| ends(node, text, at, known)).collect();
            }
            found
        }
    }
}

fn ends_of(nodes: &[Vec<Node>], text: &[char], at: usize, known: &Known) -> BTreeSet<usize> {
    let of_sequence = |nodes: &Vec<Node>| {
        nodes.iter().fold(BTreeSet::from([at]), |here, node| {
            here.iter().flat_map(|&at| ends(node, text, at, known)).collect()
        })
    };
    nodes.iter().flat_map(of_sequence).collect()
}

/// Whether the first rule matches a text: what is known grows until nothing is new.
fn matches(rules: &Rules, text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    let mut known = vec![vec![BTreeSet::new(); text.len() + 1]; rules.len()];
    loop {
        let at = |rule| (0..=text.len()).map(|at| ends_of(rule, &text, at, &known)).collect();
        let next: Known = rules.iter().map(|rule| at(rule)).collect();
        if next == known {
            return known[0][0].contains(&text.len());
        }
        known = next;
    }
}

fn rules() -> impl Strategy<Value = Rules> {
    let letter = || prop::sample::select(&ALPHABET[..]);
    let leaf = prop_oneof![
        3 => "[ab(é]{1,3}".prop_map(Node::Literal),
        3 => (prop::collection::vec(letter(), 1..3), prop::bool::weighted(0.2)).prop_map(|(c, n)| Node::Class(c, n)),
        1 => Just(Node::Any),
        2 => (0..3usize).prop_map(Node::Rule),
    ];
    let times = prop_oneof![
        Just((0, None)),
        Just((1, None)),
        Just((0, Some(1))),
        (0..3usize, 1..3usize).prop_map(|(m, n)| (m, Some(m + n)))
    ];
    let node = leaf.prop_recursive(2, 6, 3, move |inner| {
        prop_oneof![
            prop::collection::vec(prop::collection::vec(inner.clone(), 0..3), 1..3)
                .prop_map(Node::Group),
            (inner, times.clone()).prop_map(|(node, (least, most))| Node::Repeat(
                Box::new(node),
                least,
                most
            )),
        ]
    });
    let rule = prop::collection::vec(prop::collection::vec(node, 0..4), 1..3);
    prop::collection::vec(rule, 3)
}

fn text_of(token: Token) -> String {
    MODEL.detokenize(&[token])
}

fn end() -> Token {
    (0..MODEL.n_vocab() as i32).map(Token).find(|&t| MODEL.is_end(t)).unwrap()
}

fn allowed(grammar: &Grammar) -> BTreeSet<Token> {
    let mut masked = Vec::new();
    grammar.mask(&vec![0.0; MODEL.n_vocab()], &mut masked);
    (0..).zip(masked).filter(|(_, logit)| *logit == 0.0).map(|(t, _)| Token(t)).collect()
}

/// Whether a grammar takes a text, however it is cut into tokens; `None` if that takes too much.
fn takes(source: &GrammarSource, tokens: &[Token]) -> Option<bool> {
    let mut grammar = GRAMMARS.compile(source).unwrap();
    let mut whole = false;
    for &token in tokens {
        if whole || !allowed(&grammar).contains(&token) {
            return Some(false);
        }
        whole = grammar.accept(token).map_err(|e| assert_too_much(&e)).ok()?;
    }
    Some(whole || allowed(&grammar).contains(&end()))
}

/// Few of the random grammars are so ambiguous.
fn assert_too_much(error: &GrammarError) {
    assert!(["too much time", "Too many items"].iter().any(|why| error.0.contains(why)), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn a_grammar_takes_the_texts_that_a_matcher_takes(
        rules in rules(),
        texts in prop::collection::vec("[ab(é]{0,5}", 8),
        choices in prop::collection::vec(any::<prop::sample::Index>(), 6),
    ) {
        let text = gbnf(&rules);
        let source = GrammarSource::of_text(text.clone());
        prop_assert!(matches!(source, GrammarSource::Gbnf(_)));
        let mut grammar = match GRAMMARS.compile(&source) {
            Ok(grammar) => grammar,
            Err(error) => {
                if error.message.contains("Too many items") {
                    return Ok(()); // ambiguous from the first character on
                }
                let none = error.message.contains("ever ends");
                prop_assert!(none && texts.iter().all(|text| !matches(&rules, text)), "{error}\n{text}");
                return Ok(());
            }
        };
        for sample in &texts {
            let expected = matches(&rules, sample);
            let whole = MODEL.tokenize(sample, false).unwrap();
            prop_assert_eq!(takes(&source, &whole).unwrap_or(expected), expected, "{:?}\n{}", sample, text);
        }
        // The other way: what it allows leads to texts that match.
        let mut sample = String::new();
        for choice in choices {
            let allowed = allowed(&grammar);
            let may_end = allowed.contains(&end());
            let plain = |t: &&Token| text_of(**t).chars().all(|c| ALPHABET.contains(&c));
            let plain: Vec<&Token> = allowed.iter().filter(plain).collect();
            prop_assert_eq!(may_end, matches(&rules, &sample), "{:?}\n{}", sample, text);
            if plain.is_empty() {
                break;
            }
            let token = *plain[choice.index(plain.len())];
            sample += &text_of(token);
            match grammar.accept(token) {
                Ok(false) => {}
                Ok(true) => {
                    prop_assert!(matches(&rules, &sample), "{:?}\n{}", sample, text);
                    break;
                }
                Err(error) => {
                    assert_too_much(&error);
                    break;
                }
            }
        }
    }
}

/// No text has a part that never ends; what stands beside it is not changed by that.
#[test]
fn what_never_ends_is_left_out() {
    for (grammar, texts) in [
        ("root ::= (\"\" | r)\nr ::= \"é\" r", [("", true), ("é", false), ("éé", false)]),
        (
            "root ::= \"a\" r* \"b\"\nr ::= r | \"a\" r",
            [("ab", true), ("aab", false), ("a", false)],
        ),
        (
            "root ::= \"a\" (r \"b\" | \"c\")\nr ::= s\ns ::= r",
            [("ac", true), ("ab", false), ("a", false)],
        ),
    ] {
        let source = GrammarSource::of_text(grammar.into());
        for (text, expected) in texts {
            let tokens = MODEL.tokenize(text, false).unwrap();
            assert_eq!(takes(&source, &tokens), Some(expected), "{text:?} of {grammar}");
        }
    }
}

#[test]
fn a_text_has_one_at_most_of_a_rule_that_comes_once() {
    for (gbnf, texts) in [
        (
            "root ::= \"x\"? (call \";\")+\ncall ::= \"[\" c (\",\" c)* \"]\"\nc ::= \"c\"",
            [("x[c];", true), ("[c,c];", false), ("[c];[c];", false), ("x", false)],
        ),
        (
            "root ::= \"x\"* c{0,3} (\"y\" c)* \"z\"*\nc ::= \"c\"",
            [("xxczz", true), ("zz", true), ("cyc", false), ("cc", false)],
        ),
    ] {
        let once = vec!["c".to_owned(), "not-there".to_owned()];
        let calls = CallGrammar { gbnf: gbnf.into(), once, ..CallGrammar::default() };
        for (text, expected) in texts {
            let tokens = MODEL.tokenize(text, false).unwrap();
            let source = GrammarSource::Calls(calls.clone());
            assert_eq!(takes(&source, &tokens), Some(expected), "{text:?} of {gbnf}");
        }
    }
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    for (text, why) in [
        ("root ::= \"a\n", "line 2"),
        ("root ::= [a\n", "line 2"),
        ("root ::= a\n", "`a` is used, but not defined"),
        ("a ::= \"a\"", "no rule `root`"),
        ("root ::= \"a\"\nb : \"c\"", "line 2: `::=` should be here"),
        ("root ::= (\"a\"", "`)` should be here"),
        ("root ::= \"\\q\"", "`\\q` is no escape"),
        ("root ::= \"\\x4\"", "2 hexadecimal digits"),
        ("root ::= \"a\"{3,2}", "3 is more than 2"),
        ("root ::= \"a\"{9999}", "9999 times are too many"),
        ("root ::= <think>", "tokens cannot be named"),
        ("root ::= \"a\" root", "ever ends"),
        ("root ::= []", "no character"),
    ] {
        let source = GrammarSource::of_text(text.into());
        let error = GRAMMARS.compile(&source).err().unwrap_or_else(|| panic!("{text}"));
        assert!(error.message.contains(why), "{text}: {error}");
    }
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000));
    let error = GRAMMARS.compile(&GrammarSource::of_text(deep)).err().unwrap();
    assert!(error.message.contains("groups are more than"), "{error}");
}

/// Grammars in the manner of llama.cpp's examples, and texts of them.
#[test]
fn grammars_as_clients_write_them_are_followed() {
    let json = r#"
        root   ::= object
        value  ::= object | array | string | number | ("true" | "false" | "null") ws
        object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
        array  ::= "[" ws ( value ("," ws value)* )? "]" ws
        string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
        number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
        ws ::= | " " | "\n" [ \t]{0,20}
    "#;
    let sums = "root ::= (expr \"=\" ws term \"\\n\")+\nexpr ::= term ([-+*/] term)*\n\
        term ::= ident | num | \"(\" ws expr \")\" ws\nident ::= [a-z] [a-z0-9_]* ws\n\
        num ::= [0-9]+ ws\nws ::= [ \\t\\n]*";
    let steps = "root ::= item+\nitem ::= \"- \" [^\\r\\n\\u2028]+ \"\\n\"\n";
    for (grammar, yes, no) in [
        (json, "{\"a\": [1, 2.5e-3, \"x\\n\"], \"b\": {\"c\": null} }", "{\"a\": [1,, 2]}"),
        (sums, "(a1 +22) *b = 7 \nx=y\n", "a + = 7\n"),
        (steps, "- one\n- two, three\n", "- one\nanything"),
    ] {
        let source = GrammarSource::of_text(grammar.into());
        assert_eq!(takes(&source, &MODEL.tokenize(yes, false).unwrap()), Some(true), "{yes}");
        assert_eq!(takes(&source, &MODEL.tokenize(no, false).unwrap()), Some(false), "{no}");
    }
}
