//! A model's own draft layers (MTP) change no text, and draft from the model's states alone: what they
//! drafted before leaves no trace.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::context::rows_are_independent;
use common::engines::{answers, engine, random_model, refused, with_engine};
use medusa_llama::engine::EngineParams;
use medusa_llama::engine::drafts::{DraftParams, LayersParams};
use medusa_llama::engine::plan::Sizes;
use medusa_llama::llama::{Context, ContextParams, Model, Placement, SeqId, Token};
use medusa_llama::request::{Request, SamplingParams, Source, Speculation};
use medusa_llama::speculate::calibration::Calibration;
use medusa_llama::speculate::draft_model::{self, DraftModel};
use medusa_llama::speculate::states::States;
use medusa_llama::speculate::{Asked, Draft, Origin, Tree, Worth};

fn loaded(path: &Path) -> Arc<Model> {
    let placement = Placement { draft_layers: true, ..Placement::default() };
    Arc::new(Model::load(path, &placement, |_| true).unwrap())
}

fn own_layers() -> Option<LayersParams> {
    Some(LayersParams { n_cells: None, max_depth: 4, is_needed: true })
}

fn requests(speculation: Speculation) -> Vec<Request> {
    let ask = |(i, text): (usize, &str)| {
        [0.0, 0.9].map(|temperature| Request {
            sampling: SamplingParams {
                temperature,
                seed: 7 + i as u64,
                ..SamplingParams::default()
            },
            speculation,
            share_text: false,
            ..Request::new(text.repeat(20 + i), 40)
        })
    };
    let texts = ["a river ", "a stone bird ", "road, light, road ", "house of clouds "];
    texts.into_iter().enumerate().flat_map(ask).collect()
}

/// Greedy and seeded texts, alone and among eight, with text drafts beside, of a model whose cache
/// takes trees and of one that keeps states and takes chains.
#[test]
fn draft_layers_change_no_text() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tiny-glm4moe", "tiny-qwen35-mtp"] {
        let drafts = DraftParams {
            own_layers: own_layers(),
            n_shared_text: Some(4096),
            fixed_nodes: Some(4),
            ..DraftParams::default()
        };
        with_engine(engine(random_model(folder.path(), name, 1), drafts), async |handle| {
            assert!(handle.draft_model.is_some(), "{name}");
            let plain = answers(&handle, &requests(Speculation::OFF)).await;
            let (mut n_same, mut n_all) = (0, 0);
            for of in ["model", "auto"] {
                let asked = requests(Speculation::by_name(of).unwrap());
                let drafted = answers(&handle, &asked).await;
                let n_drafted: usize = drafted.iter().map(|(_, d)| d.speculation.drafted).sum();
                assert!(n_drafted > 200, "{name}, {of}: {n_drafted}");
                let alone = answers(&handle, &asked[3..4]).await;
                let pairs = drafted.iter().zip(&plain).chain(alone.iter().zip(&plain[3..]));
                n_all += drafted.len() + alone.len();
                n_same += pairs.filter(|(ours, plain)| ours.0 == plain.0).count();
            }
            let enough = if rows_are_independent() { n_all } else { n_all * 2 / 3 };
            assert!(n_same >= enough, "{name}: {n_same} of {n_all} texts are the same");
            let ranges = handle.stats.reliability().ranges(&[Source::Model], None);
            let (n, right) = ranges.iter().fold((0, 0), |(n, r), c| (n + c.n, r + c.accepted));
            assert!(n > 200 && right > 50, "{name}: {right} of {n}");
        });
    }
}

/// The rule that is served with asks draft layers that are never right rarely.
#[test]
fn draft_layers_that_are_of_no_use_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let drafts = DraftParams { own_layers: own_layers(), ..DraftParams::default() };
    with_engine(engine(random_model(folder.path(), "tiny-glm4moe", 1), drafts), async |handle| {
        let (steps, drafted) = (|| handle.stats.steps.get(), || handle.stats.offered.get());
        let ask = || {
            // Nearly all tokens are as likely, so what is drafted is right by chance.
            let sampling =
                SamplingParams { temperature: 50.0, top_p: 1.0, ..SamplingParams::default() };
            let one = requests(Speculation::AUTO).remove(0);
            [Request { max_tokens: 400, sampling, ..one }]
        };
        answers(&handle, &ask()).await;
        let before = (steps(), drafted());
        answers(&handle, &ask()).await;
        let (steps, offered) = (steps() - before.0, drafted() - before.1);
        assert!(offered < 5 * steps, "{offered} candidates in {steps} steps");
    });
}

#[test]
fn where_draft_layers_must_be_there_and_cannot_draft_the_reason_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let params = |name: &str| {
        let drafts = DraftParams { own_layers: own_layers(), ..DraftParams::default() };
        engine(random_model(folder.path(), name, 1), drafts)
    };
    let why = refused(params("tiny-qwen35"));
    assert!(why.contains("tiny-qwen35-1.gguf has no draft layers (MTP)"), "{why}");
    let pool = params("tiny-glm4moe");
    let sizes = Sizes { streams: true, ..pool.sizes };
    let why = refused(EngineParams { sizes, ..pool });
    assert!(why.contains("KV_LAYOUT cannot be streams"), "{why}");
}

/// What the layers propose after a text is the same whether they read all of it at once, or went along
/// with it and drafted after each token, or began late because the first states were gone.
#[test]
fn what_was_drafted_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tiny-glm4moe", "tiny-qwen35-mtp"] {
        let model = loaded(&random_model(folder.path(), name, 1));
        let text = model.tokenize(&"the old road to the river ".repeat(4), true).unwrap();
        let states = states_of(&model, &text);
        let mut going = drafter(&model);
        let mut seen = States::default();
        for n in 2..text.len() {
            (seen_to(&seen, n - 1)..n - 1).for_each(|i| seen.push(i, states.at(i).unwrap()));
            let now = draft(&mut going, &text[..n], &seen);
            let fresh = draft(&mut drafter(&model), &text[..n], &seen);
            assert_eq!(now.len(), fresh.len(), "{name}");
            for (a, b) in now.iter().zip(&fresh) {
                assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-3, "{name}, {n}: {now:?} {fresh:?}");
            }
        }
        let mut late = States::default();
        (20..text.len() - 1).for_each(|i| late.push(i, states.at(i).unwrap()));
        assert!(!draft(&mut drafter(&model), &text, &late).is_empty());
        assert!(draft(&mut drafter(&model), &text, &States::default()).is_empty());
    }
}

/// The first position without a state.
fn seen_to(states: &States, most: usize) -> usize {
    (0..most).find(|&i| states.at(i).is_none()).unwrap_or(most)
}

fn states_of(model: &Arc<Model>, tokens: &[Token]) -> States {
    let of_one = ContextParams::of_one_sequence(512, 64, 1);
    let params = ContextParams { keeps_states: true, ..of_one };
    let mut context = Context::new(Arc::clone(model), &params).unwrap();
    let (mut states, mut batch) = (States::default(), context.batch());
    for (pos, &token) in tokens.iter().enumerate() {
        batch.clear();
        batch.add(token, pos, &[SeqId(0)], true).unwrap();
        context.forward(&batch).unwrap();
        states.push(pos, context.state(0).unwrap());
    }
    states
}

fn drafter(model: &Arc<Model>) -> DraftModel {
    let n_cells = draft_model::n_least_cells(2, 4);
    let of_one = ContextParams::of_one_sequence(n_cells, 128, 1);
    let (n_outputs, n_seq_max) = (draft_model::n_outputs(2), draft_model::n_ids(2));
    let params = ContextParams { n_outputs, n_seq_max, of_draft_layers: true, ..of_one };
    let context = Context::new(Arc::clone(model), &params).unwrap();
    DraftModel::new(context, 2, model.n_vocab(), 4).unwrap()
}

/// The tokens of a tree, with their probabilities.
fn draft(drafter: &mut DraftModel, tokens: &[Token], states: &States) -> Vec<(Token, f32)> {
    let origin = Origin {
        seq: SeqId(0),
        tokens,
        hidden: &[],
        states,
        heads: Asked { max_depth: 0, trust: 1.0 },
        model: Asked { max_depth: 4, trust: 1.0 },
        open: 1.0,
        text: None,
    };
    let mut trees = [Tree::default()];
    let worth = Worth { n_nodes: 8, token_s: 1e6, row_s: 0.0 };
    drafter.draft(&[origin], worth, &Calibration::of_model(), &mut trees);
    trees[0].nodes().iter().map(|n| (n.token, n.q)).collect()
}
