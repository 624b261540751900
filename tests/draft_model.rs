//! A draft model changes no text, whatever else drafts, and drafts the same whatever it read before.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use common::context::{MODEL, rows_are_independent};
use common::engines::{answers, engine, random_model, refused, with_engine};
use medusa_llama::config::DEFAULT_HEADS;
use medusa_llama::engine::drafts::{DraftModelParams, DraftParams, HeadsParams};
use medusa_llama::llama::{
    self, Context, ContextParams, Model, Placement, Quantization, SeqId, Token,
};
use medusa_llama::request::{Completion, Request, SamplingParams, Source, Speculation};
use medusa_llama::speculate::calibration::Calibration;
use medusa_llama::speculate::draft_model::{self, DraftModel};
use medusa_llama::speculate::states::States;
use medusa_llama::speculate::{Asked, Draft, Origin, Tree, Worth};
use tempfile::TempDir;

/// None: a draft model needs only tokens.
static STATES: LazyLock<States> = LazyLock::new(States::default);

/// The default model in two bits, as far as its shape allows.
static SMALL: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    let kind = Quantization::by_name("Q2_K").unwrap();
    llama::quantize(&common::model_path(), &path, kind, 2).unwrap();
    (folder, path)
});

fn small() -> &'static Path {
    &SMALL.1
}

fn model_of(path: &Path) -> DraftModelParams {
    let placement = Placement::default();
    DraftModelParams { path: path.to_owned(), placement, n_cells: None, max_depth: 6 }
}

fn requests(speculation: Speculation) -> Vec<Request> {
    let topics = ["a dragon", "my garden", "the sea", "an old clock"];
    let ask = |(i, topic): (usize, &str)| {
        let text =
            format!("<|im_start|>user\nTell me about {topic}.<|im_end|>\n<|im_start|>assistant\n");
        [0.0, 0.9].map(|temperature| Request {
            sampling: SamplingParams {
                temperature,
                seed: 7 + i as u64,
                ..SamplingParams::default()
            },
            speculation,
            cache_prompt: false,
            share_text: false,
            ..Request::new(text.clone(), 40)
        })
    };
    topics.into_iter().enumerate().flat_map(ask).collect()
}

/// Greedy and seeded texts, alone and among eight: with a draft model, and with heads and text beside
/// it.
#[test]
fn a_draft_model_changes_no_text() {
    let heads = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_HEADS);
    let drafts = DraftParams {
        heads: Some(HeadsParams { folder: heads, n_heads: 4 }),
        model: Some(model_of(small())),
        n_shared_text: Some(4096),
        fixed_nodes: Some(8),
        ..DraftParams::default()
    };
    with_engine(engine(common::model_path(), drafts), async |handle| {
        let plain = answers(&handle, &requests(Speculation::OFF)).await;
        let mut n_same = 0;
        let mut n_all = 0;
        for name in ["model", "heads+model", "auto"] {
            let speculation = Speculation::by_name(name).unwrap();
            let asked = requests(speculation);
            let drafted = answers(&handle, &asked).await;
            let accepted: usize = drafted.iter().map(|(_, done)| done.speculation.accepted).sum();
            assert!(accepted > 100, "{name}: {accepted} were accepted");
            let alone = answers(&handle, &asked[3..4]).await;
            let pairs = drafted.iter().zip(&plain).chain(alone.iter().zip(&plain[3..]));
            n_all += drafted.len() + alone.len();
            n_same += pairs.filter(|(ours, plain)| ours.0 == plain.0).count();
        }
        let enough = if rows_are_independent() { n_all } else { n_all / 2 };
        assert!(n_same >= enough, "{n_same} of {n_all} texts are the same");
        let reliability = handle.stats.reliability();
        for source in [Source::Model, Source::Several] {
            let verified: u64 = reliability.ranges(&[source], None).iter().map(|c| c.n).sum();
            assert!(verified > 20, "{source:?}: {verified}");
        }
    });
}

/// The model itself is right in nearly all it drafts for itself, and so the rule uses it where it
/// costs little: with trees of any size, and with a cache that holds a part of the sequences.
#[test]
fn what_is_drafted_by_the_model_itself_is_right() {
    let n_cells = Some(draft_model::n_least_cells(8, 6));
    let drafter = DraftModelParams { n_cells, ..model_of(&common::model_path()) };
    let drafts =
        DraftParams { model: Some(drafter), fixed_nodes: Some(12), ..DraftParams::default() };
    with_engine(engine(common::model_path(), drafts), async |handle| {
        assert!(handle.draft_model.is_some());
        let greedy = || requests(Speculation::MODEL).into_iter().step_by(2);
        let one: Vec<Request> = greedy().take(1).collect();
        let (_, done) = answers(&handle, &one).await.remove(0);
        let usage = done.speculation;
        assert!(usage.steps <= 16, "six tokens and one more in most steps: {usage:?}");
        let long = |i: usize| {
            let words: Vec<String> = (0..60).map(|n| format!("word{}", n * (i + 3))).collect();
            Request { ..Request::new(words.join(" "), 24) }
        };
        let long: Vec<Request> =
            (0..8).map(|i| Request { speculation: Speculation::MODEL, ..long(i) }).collect();
        let off: Vec<Request> =
            long.iter().map(|r| Request { speculation: Speculation::OFF, ..r.clone() }).collect();
        let texts = |all: Vec<(String, Completion)>| all.into_iter().map(|a| a.0).collect();
        let drafted: Vec<String> = texts(answers(&handle, &long).await);
        let plain: Vec<String> = texts(answers(&handle, &off).await);
        if rows_are_independent() {
            assert_eq!(drafted, plain);
        }
    });
}

/// What follows a text is drafted alike whatever was read or drafted before, for whichever sequences.
#[test]
fn history_changes_no_draft() {
    const N_LANES: usize = 3;
    let model = Arc::new(Model::load(small(), &Placement::default(), |_| true).unwrap());
    let drafter = |n_cells: usize| {
        let params = ContextParams {
            n_outputs: draft_model::n_outputs(N_LANES),
            n_seq_max: draft_model::n_ids(N_LANES),
            ..ContextParams::of_one_sequence(n_cells, 64, 1)
        };
        let context = Context::new(Arc::clone(&model), &params).unwrap();
        DraftModel::new(context, N_LANES, MODEL.n_vocab(), 4).unwrap()
    };
    let n_least = draft_model::n_least_cells(N_LANES, 4);
    let (mut used, mut rng) = (drafter(n_least), fastrand::Rng::with_seed(5));
    let words = MODEL.tokenize("one two three four five six seven eight nine ten", true).unwrap();
    let mut texts: Vec<(SeqId, Vec<Token>)> =
        (0..N_LANES as u32).map(|i| (SeqId(i), words.clone())).collect();
    let worth = Worth { n_nodes: 24, token_s: 1e6, row_s: 0.0 };
    let mut n_same = 0;
    let mut n_all = 0;
    for _ in 0..24 {
        for (seq, text) in &mut texts {
            match rng.u8(..10) {
                0 => (*seq, *text) = (SeqId(rng.u32(0..20)), words[..rng.usize(1..8)].to_vec()),
                1 => text.truncate(rng.usize(1..=text.len())),
                2 => (0..rng.usize(1..90)).for_each(|_| text.push(*rng.choice(&words).unwrap())),
                _ => (0..rng.usize(1..4)).for_each(|_| text.push(*rng.choice(&words).unwrap())),
            }
        }
        texts.dedup_by_key(|(seq, _)| *seq);
        let n_asked = rng.usize(1..=texts.len());
        let origins: Vec<Origin<'_>> =
            texts[..n_asked].iter().map(|(seq, text)| origin(*seq, text)).collect();
        let tree = |drafter: &mut DraftModel, origins: &[Origin<'_>]| {
            let mut trees = vec![Tree::default(); origins.len()];
            drafter.draft(origins, worth, &Calibration::of_model(), &mut trees);
            trees
        };
        let trees = tree(&mut used, &origins);
        let mut fresh = drafter(4 * n_least);
        for (tree_now, origin) in trees.iter().zip(&origins) {
            let alone = tree(&mut fresh, std::slice::from_ref(origin)).remove(0);
            let best = |tree: &Tree| tree.nodes().first().map(|n| (n.token, n.q));
            n_all += 1;
            n_same += usize::from(best(tree_now) == best(&alone) && !tree_now.is_empty());
        }
    }
    // A text that does not fit beside the others is not drafted for.
    let enough = if rows_are_independent() { n_all * 9 / 10 } else { n_all / 2 };
    assert!(n_same >= enough, "{n_same} of {n_all}");
}

fn origin(seq: SeqId, tokens: &[Token]) -> Origin<'_> {
    Origin {
        seq,
        tokens,
        hidden: &[],
        states: &STATES,
        heads: Asked { max_depth: 0, trust: 1.0 },
        model: Asked { max_depth: 4, trust: 1.0 },
        open: 1.0,
        text: None,
    }
}

#[test]
fn a_model_that_cannot_draft_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let drafts =
        |path: &Path| DraftParams { model: Some(model_of(path)), ..DraftParams::default() };
    let other = random_model(folder.path(), "tiny", 1);
    let why = refused(engine(common::model_path(), drafts(&other)));
    assert!(why.contains("cannot draft for this model: it has") && why.contains("49152"), "{why}");
    let mamba = random_model(folder.path(), "tiny-mamba", 1);
    let why = refused(engine(other.clone(), drafts(&mamba)));
    assert!(why.contains("cannot draft") && why.contains("keeps a state"), "{why}");
    let missing = folder.path().join("missing.gguf");
    let why = refused(engine(other, drafts(&missing)));
    assert!(why.contains("missing.gguf"), "{why}");
}

/// Models of other kinds draft, and are drafted for: with windows, and with a state, where drafts are
/// chains.
#[test]
fn other_architectures_draft_and_are_drafted_for() {
    let folder = tempfile::tempdir().unwrap();
    for (target, drafter) in
        [("tiny", "tiny-gemma3"), ("tiny-lfm2", "tiny"), ("tiny-gemma3", "tiny-qwen3")]
    {
        let (target, drafter) =
            (random_model(folder.path(), target, 1), random_model(folder.path(), drafter, 2));
        let drafts = DraftParams {
            model: Some(model_of(&drafter)),
            fixed_nodes: Some(4),
            ..DraftParams::default()
        };
        with_engine(engine(target.clone(), drafts), async |handle| {
            let of = |speculation: Speculation| -> Vec<Request> {
                let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
                let ask = |text: &str| Request {
                    speculation,
                    sampling: greedy.clone(),
                    ..Request::new(text.repeat(30), 30)
                };
                ["a river ", "a stone bird "].map(ask).into()
            };
            let (plain, drafted) = (
                answers(&handle, &of(Speculation::OFF)).await,
                answers(&handle, &of(Speculation::MODEL)).await,
            );
            assert!(drafted.iter().all(|(_, done)| done.speculation.drafted > 20), "{target:?}");
            let same = plain.iter().zip(&drafted).filter(|(a, b)| a.0 == b.0).count();
            assert!(same >= 1, "{target:?}: ties decide about one of two texts at most");
        });
    }
}
