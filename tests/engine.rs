//! The engine's loop on a stub model: whatever comes and goes, every request gets its own text and
//! leaves nothing behind.
#![allow(missing_docs)]

#[path = "common/stub.rs"]
mod stub;

use std::collections::HashMap;
use std::sync::Arc;

use medusa_llama::engine::stats::Stats;
use medusa_llama::engine::{Engine, Forward, Job, Layout, Limits};
use medusa_llama::llama::Token;
use medusa_llama::prefixes::Prefixes;
use medusa_llama::prefixes::key::Fingerprint;
use medusa_llama::request::{
    DryParams, Event, FinishReason, Report, Request, SamplingParams, Speculation, Trace,
};
use medusa_llama::speculate::calibration::Calibration;
use medusa_llama::speculate::cost::Cost;
use medusa_llama::speculate::paths::fill;
use medusa_llama::speculate::simulated::{Acceptance, Simulated};
use medusa_llama::speculate::text::TextDrafts;
use medusa_llama::speculate::{Draft, Origin, Speculator, Tree, Worth};
use proptest::prelude::*;
use stub::{Guess, GuessModel, Stub};
use tokio::sync::mpsc::{self, Receiver};

const N_VOCAB: usize = 50;

fn limits(layout: Layout, n_slots: usize, n_ctx: usize, n_batch: usize) -> Limits {
    Limits { n_slots, n_ctx, n_batch, n_prefill: None, layout }
}

fn job(prompt: &[i32], max_tokens: usize, temperature: f32) -> (Job, Receiver<Event>) {
    let (events, receiver) = mpsc::channel(max_tokens + 2);
    let sampling = SamplingParams { temperature, seed: 3, ..SamplingParams::default() };
    let request = Request { sampling, ..Request::new("", max_tokens) };
    let prompt = prompt.iter().map(|&t| Token(t)).collect();
    (Job::new(prompt, request, events), receiver)
}

/// With every sampler that looks at more than a row of logits.
fn repeats_nothing(mut job: Job) -> Job {
    let dry = DryParams {
        multiplier: 2.0,
        base: 2.0,
        allowed_length: 1,
        last_n: usize::MAX,
        breakers: vec![],
    };
    job.request.sampling = SamplingParams {
        typical_p: 0.9,
        top_n_sigma: 3.0,
        xtc_probability: 0.5,
        xtc_threshold: 0.02,
        dry: Some(dry),
        ..job.request.sampling
    };
    Job::new(job.prompt, job.request, job.events)
}

/// Everything that came: text, and how it ended.
fn read(receiver: &mut Receiver<Event>) -> (String, Option<Event>) {
    let mut text = String::new();
    while let Ok(event) = receiver.try_recv() {
        match event {
            Event::Piece(piece) => text += &piece.text,
            end => return (text, Some(end)),
        }
    }
    (text, None)
}

fn expected(prompt: &[i32], n: usize) -> String {
    expected_of(N_VOCAB, prompt, n)
}

fn expected_of(n_vocab: usize, prompt: &[i32], n: usize) -> String {
    let prompt: Vec<Token> = prompt.iter().map(|&t| Token(t)).collect();
    let tokens = Stub::greedy(n_vocab, &prompt, n);
    tokens.iter().filter(|t| t.0 != 0).map(|t| format!("{} ", t.0)).collect()
}

fn run_to_end<F: Forward>(engine: &mut Engine<F>) {
    for _ in 0..100_000 {
        if engine.is_idle() {
            return;
        }
        engine.step();
        engine.check_integrity();
    }
    panic!("no end in sight");
}

#[derive(Clone, Debug)]
struct Client {
    prompt: Vec<i32>,
    max_tokens: usize,
    arrives: usize,
    leaves: Option<usize>,
}

fn client() -> impl Strategy<Value = Client> {
    // Few tokens and a common beginning: prefixes are shared all the time.
    (
        prop::collection::vec(1i32..4, 1..14),
        1usize..20,
        0usize..30,
        prop::option::weighted(0.3, 0usize..40),
    )
        .prop_map(|(mut prompt, max_tokens, arrives, leaves)| {
            prompt.splice(0..0, [7, 7, 7]);
            Client { prompt, max_tokens, arrives, leaves }
        })
}

/// Lets clients come and go until all are served. Those that left have no receiver.
fn serve(engine: &mut Engine<Stub>, clients: &[Client]) -> Vec<Option<Receiver<Event>>> {
    let mut receivers: Vec<Option<Receiver<Event>>> = clients.iter().map(|_| None).collect();
    let mut step = 0;
    while step < 30 || !engine.is_idle() {
        for (client, receiver) in clients.iter().zip(&mut receivers) {
            if client.arrives == step {
                let (job, events) = job(&client.prompt, client.max_tokens, 0.0);
                engine.enqueue(job);
                *receiver = Some(events);
            }
            if client.leaves.is_some_and(|l| l > client.arrives && l == step) {
                *receiver = None;
            }
        }
        engine.step();
        engine.check_integrity();
        step += 1;
        assert!(step < 10_000, "no end in sight");
    }
    receivers
}

/// Heads of a random quality on a machine of a random kind, or none.
#[derive(Clone, Debug)]
struct Drafting {
    n_levels: usize,
    width: usize,
    max_tokens: usize,
    row_cost: f64,
    n_leaf_ids: usize,
    /// Text drafts, too, from so many tokens of other answers.
    n_shared: Option<usize>,
    /// A draft model, too, which offers so many tokens at each place.
    model: Option<usize>,
}

impl Drafting {
    fn apply(&self, engine: &mut Engine<Stub>, n_seqs: usize) {
        let guess = Guess { n_vocab: N_VOCAB, n_levels: self.n_levels, width: self.width };
        let cost = Cost::from_points(&[(1, 1.0), (64, 1.0 + 63.0 * self.row_cost)]);
        let mut speculator = Speculator::new(Some(Box::new(guess)), self.max_tokens, cost);
        if let Some(width) = self.model {
            let guess = Guess { n_vocab: N_VOCAB, n_levels: self.max_tokens, width };
            speculator.model = Some(Box::new(GuessModel(guess)));
        }
        if let Some(n_shared) = self.n_shared {
            speculator.text = Some(TextDrafts::new(1, n_shared));
        }
        engine.speculate(speculator, n_seqs + self.n_leaf_ids);
    }
}

fn drafting() -> impl Strategy<Value = Drafting> {
    let n_shared = prop::option::of(prop_oneof![Just(0), Just(64), Just(1000)]);
    let model = prop::option::of(1usize..4);
    (1usize..5, 1usize..6, 1usize..12, 0.0f64..0.4, 0usize..20, n_shared, model).prop_map(
        |(n_levels, width, max_tokens, row_cost, n_leaf_ids, n_shared, model)| Drafting {
            n_levels,
            width,
            max_tokens,
            row_cost,
            n_leaf_ids,
            n_shared,
            model,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Clients come, share prefixes, wait for cells, hang up, with drafts and without. Those that
    /// stay get exactly their text; afterwards no sequence and no cell is held.
    #[test]
    fn every_client_gets_its_own_text(
        clients in prop::collection::vec(client(), 1..14),
        unified in any::<bool>(),
        n_slots in 1usize..5,
        n_batch in 5usize..24,
        n_cells in 40usize..120,
        n_retained in 0usize..60,
        drafting in prop::option::of(drafting()),
    ) {
        let layout = if unified {
            Layout::Unified { n_cells, n_retained, n_seqs: n_slots + 3 }
        } else {
            Layout::Streams { n_cells: 40 }
        };
        let stats = Arc::new(Stats::default());
        let mut engine = Engine::new(Stub::new(N_VOCAB), limits(layout, n_slots, 40, n_batch), Arc::clone(&stats));
        if let (Some(drafting), true) = (&drafting, unified) {
            drafting.apply(&mut engine, n_slots + 3);
        }
        let mut receivers = serve(&mut engine, &clients);
        for (client, receiver) in clients.iter().zip(&mut receivers) {
            let Some(receiver) = receiver else { continue };
            let (text, end) = read(receiver);
            prop_assert_eq!(text, expected(&client.prompt, client.max_tokens));
            let Some(Event::Done(done)) = end else { panic!("ended with {end:?}") };
            prop_assert_eq!(done.usage.prompt_tokens, client.prompt.len());
            prop_assert!(done.usage.cached_tokens < client.prompt.len());
            let s = done.speculation;
            prop_assert!(s.accepted <= s.drafted && s.steps + s.accepted >= done.usage.completion_tokens);
        }
        engine.check_nothing_left();
    }

    /// The same of a model that keeps states: prompts go on from kept ones, and chains are verified,
    /// at most so many tokens long as a state goes back.
    #[test]
    fn every_client_gets_its_own_text_from_states(
        clients in prop::collection::vec((client(), 60usize..140), 1..14),
        n_slots in 1usize..4,
        n_kept in 0usize..5,
        n_batch in 5usize..100,
        n_cells in 240usize..900,
        n_retained in 0usize..900,
        drafting in prop::option::of(drafting()),
    ) {
        let layout = Layout::States { n_cells, n_retained, n_seqs: n_slots + n_kept, window: 0 };
        let n_rollback = drafting.as_ref().map_or(0, |drafting| drafting.max_tokens - 1);
        let mut stub = Stub::new(N_VOCAB);
        stub.n_rollback = Some(n_rollback);
        let mut engine = Engine::new(stub, limits(layout, n_slots, 240, n_batch), Arc::default());
        if let Some(drafting) = &drafting {
            Drafting { n_leaf_ids: 0, ..drafting.clone() }.apply(&mut engine, n_slots + n_kept);
        }
        let clients: Vec<Client> = clients
            .into_iter()
            .map(|(client, n)| {
                let prompt = [&vec![7; n], &client.prompt[..], &vec![8; n / 2]].concat();
                let max_tokens = client.max_tokens.min(239 - prompt.len());
                Client { prompt, max_tokens, ..client }
            })
            .collect();
        let mut receivers = serve(&mut engine, &clients);
        for (client, receiver) in clients.iter().zip(&mut receivers) {
            let Some(receiver) = receiver else { continue };
            let (text, end) = read(receiver);
            prop_assert_eq!(text, expected(&client.prompt, client.max_tokens));
            prop_assert!(matches!(end, Some(Event::Done(_))), "{:?}", end);
        }
        engine.check_nothing_left();
    }

    /// The same where cells are few and prompts long, and what the cache drops is kept beside it, as far as
    /// there is room, and comes back, as far as it can.
    #[test]
    fn every_client_gets_its_own_text_from_saved_blocks(
        clients in prop::collection::vec((client(), 40usize..200), 1..14),
        n_slots in 1usize..4,
        n_batch in 5usize..100,
        n_cells in 240usize..700,
        n_retained in 0usize..700,
        room in 0u64..4000,
        restores_but in prop::option::of(1usize..6),
        drafting in prop::option::of(drafting()),
    ) {
        let layout = Layout::Unified { n_cells, n_retained, n_seqs: n_slots + 2 };
        let mut stub = Stub::new(N_VOCAB);
        stub.restores_but = restores_but;
        let stats = Arc::new(Stats::default());
        let limits = limits(layout, n_slots, 240, n_batch);
        let mut engine = Engine::new(stub, limits, Arc::clone(&stats));
        let nobody = vec![];
        let memory = stats.blocks_memory.clone();
        engine.keep_prefixes(Prefixes::new(Fingerprint::of([]), nobody, room, None, memory));
        if let Some(drafting) = &drafting {
            drafting.apply(&mut engine, n_slots + 2);
        }
        let clients: Vec<Client> = clients
            .into_iter()
            .map(|(client, n)| {
                let prompt = [&vec![n as i32 % 3 + 1; n], &client.prompt[..]].concat();
                let max_tokens = client.max_tokens.min(239 - prompt.len());
                Client { prompt, max_tokens, ..client }
            })
            .collect();
        for _ in 0..2 {
            let mut receivers = serve(&mut engine, &clients);
            for (client, receiver) in clients.iter().zip(&mut receivers) {
                let Some(receiver) = receiver else { continue };
                let (text, end) = read(receiver);
                prop_assert_eq!(text, expected(&client.prompt, client.max_tokens));
                let Some(Event::Done(done)) = end else { panic!("ended with {end:?}") };
                prop_assert!(done.usage.cached_tokens < client.prompt.len());
                prop_assert!(done.usage.restored.total() <= done.usage.cached_tokens);
            }
            while engine.save_block() {
                engine.check_integrity();
            }
            prop_assert!(stats.blocks_memory.get() as u64 <= room);
        }
        engine.check_nothing_left();
    }

    /// The same request with the same seed: alone, among others, with drafts and without; also where
    /// what is drawn from depends on a coin and on the text before.
    #[test]
    fn sampled_text_depends_neither_on_company_nor_on_drafts(
        others in prop::collection::vec(client(), 0..6),
        n_batch in 4usize..20,
        drafting in drafting(),
        is_plain in any::<bool>(),
    ) {
        let layout = Layout::Unified { n_cells: 200, n_retained: 60, n_seqs: 8 };
        let run = |others: &[Client], drafting: Option<&Drafting>| {
            let mut engine = Engine::new(Stub::new(N_VOCAB), limits(layout, 4, 40, n_batch), Arc::default());
            if let Some(drafting) = drafting {
                drafting.apply(&mut engine, 8);
            }
            let mut kept = vec![];
            for other in others {
                let (job, events) = job(&other.prompt, other.max_tokens, 1.0);
                engine.enqueue(job);
                kept.push(events);
            }
            let (plain, mut events) = job(&[7, 7, 7, 1, 2], 20, 1.5);
            engine.enqueue(if is_plain { plain } else { repeats_nothing(plain) });
            run_to_end(&mut engine);
            read(&mut events).0
        };
        let plain = run(&[], None);
        prop_assert_eq!(&run(&others, None), &plain);
        prop_assert_eq!(&run(&[], Some(&drafting)), &plain);
        prop_assert_eq!(&run(&others, Some(&drafting)), &plain);
    }
}

/// All answers of at most three tokens, each with its probability by the stub's own logits; token 0
/// ends one.
fn answers(n_vocab: usize, prompt: &[Token]) -> HashMap<Vec<i32>, f64> {
    let mut all = HashMap::new();
    let mut open = vec![(vec![], 1.0)];
    while let Some((answer, p)) = open.pop() {
        if answer.len() == 3 || answer.last() == Some(&0) {
            all.insert(answer.into_iter().filter(|&t| t != 0).collect(), p);
            continue;
        }
        let seen: Vec<Token> =
            prompt.iter().copied().chain(answer.iter().map(|&t| Token(t))).collect();
        let weights: Vec<f64> =
            Stub::logits_of(n_vocab, &seen).iter().map(|&l| f64::from(l).exp()).collect();
        let sum: f64 = weights.iter().sum();
        open.extend((0..).zip(weights).map(|(t, w)| ([&answer[..], &[t]].concat(), p * w / sum)));
    }
    all
}

/// 20,000 requests that differ in their seed alone: their answers are distributed as the model
/// says, with drafts and without.
#[test]
fn sampled_text_has_the_models_own_distribution() {
    const N: u32 = 20_000;
    const V: usize = 4;
    let expected = answers(V, &[1, 2, 3].map(Token));
    assert!((expected.values().sum::<f64>() - 1.0).abs() < 1e-9);
    for (drafts, model) in [(false, false), (true, false), (true, true)] {
        let layout = Layout::Unified { n_cells: 400, n_retained: 60, n_seqs: 16 };
        let mut engine = Engine::new(Stub::new(V), limits(layout, 8, 40, 100), Arc::default());
        if drafts {
            let guess = Guess { n_vocab: V, n_levels: 2, width: 3 };
            let cost = Cost::from_points(&[(1, 1.0), (64, 1.1)]);
            let mut speculator = Speculator::new(Some(Box::new(guess)), 3, cost);
            if model {
                let guess = Guess { n_vocab: V, n_levels: 2, width: 2 };
                speculator.model = Some(Box::new(GuessModel(guess)));
            }
            engine.speculate(speculator, 100);
        }
        let mut counts: HashMap<Vec<i32>, u32> = HashMap::new();
        let mut accepted = 0;
        for first in (0..N).step_by(8) {
            let mut start = |seed| {
                let (mut job, events) = job(&[1, 2, 3], 3, 1.0);
                job.request.sampling.seed = u64::from(seed);
                job.request.sampling.top_p = 1.0;
                engine.enqueue(job);
                events
            };
            let mut events: Vec<_> = (first..first + 8).map(&mut start).collect();
            run_to_end(&mut engine);
            for events in &mut events {
                let (text, end) = read(events);
                *counts
                    .entry(text.split_whitespace().map(|t| t.parse().unwrap()).collect())
                    .or_default() += 1;
                let Some(Event::Done(done)) = end else { panic!("not done") };
                accepted += done.speculation.accepted;
            }
        }
        assert_eq!(accepted > 1000, drafts, "{accepted} drafts were accepted");
        let chi2: f64 = expected
            .iter()
            .map(|(answer, p)| {
                (f64::from(*counts.get(answer).unwrap_or(&0)) - *p * f64::from(N)).powi(2)
                    / (*p * f64::from(N))
            })
            .sum();
        // 39 degrees of freedom: p = 0.001 at 72.1.
        assert_eq!(
            (expected.len(), counts.keys().all(|answer| expected.contains_key(answer))),
            (40, true)
        );
        assert!(chi2 < 72.1, "{chi2}, drafts: {drafts}, with a draft model: {model}");
    }
}

/// Heads that offer the same two tokens at every place.
struct Two;

impl Draft for Two {
    fn n_heads(&self) -> usize {
        3
    }

    fn draft(
        &mut self,
        origins: &[Origin<'_>],
        worth: Worth,
        calibration: &Calibration,
        trees: &mut [Tree],
    ) {
        let level = vec![(Token(41), 0.01), (Token(42), 0.005)];
        for (origin, tree) in origins.iter().zip(trees) {
            fill(
                tree,
                &vec![level.clone(); origin.heads.max_depth.min(3)],
                calibration,
                origin.heads.trust,
                worth.n_nodes,
            );
        }
    }
}

/// What becomes of drafts by heads that are right at given rates, over long answers: steps that
/// could draft, candidates verified, and candidates accepted. `fixed`: verify so many; else those
/// that pay, where a row more costs `row` of a step.
fn simulated(rates: &[f32], fixed: Option<usize>, row: f64) -> [f64; 3] {
    const LONG: usize = 2000;
    let layout = Layout::Unified { n_cells: 2200, n_retained: 0, n_seqs: 1 };
    let acceptance = Acceptance::new(rates.to_vec()).unwrap();
    let cost = Cost::from_points(&[(1, 1.0), (64, 1.0 + 63.0 * row)]);
    let mut speculator = Speculator::new(Some(Box::new(Two)), 4, cost);
    speculator.calibration = acceptance.calibration();
    speculator.fixed_nodes = fixed;
    let model = Simulated::new(Stub::new(2048), acceptance);
    let mut engine = Engine::new(model, limits(layout, 1, 2100, 64), Arc::default());
    engine.speculate(speculator, 30);
    let mut sums = [0.0; 3];
    for seed in 0.. {
        let (mut job, mut events) = job(&[7, 8, 9], LONG, 0.0);
        job.request.sampling.seed = seed;
        engine.enqueue(job);
        while !engine.is_idle() {
            engine.step();
        }
        engine.check_integrity();
        let Some(Event::Done(done)) = read(&mut events).1 else { panic!("not done") };
        // The prompt's step drafts nothing.
        let s = done.speculation;
        [s.steps - 1, s.drafted, s.accepted]
            .iter()
            .zip(&mut sums)
            .for_each(|(&n, sum)| *sum += n as f64);
        if sums[0] > 8000.0 {
            break;
        }
    }
    sums
}

#[test]
fn simulated_heads_are_right_at_their_rates() {
    let rates = [0.56, 0.32, 0.2];
    for (h, &rate) in rates.iter().enumerate() {
        // With sure heads before it, the step's last acceptance is this head's alone.
        let given: Vec<f32> = vec![1.0; h].into_iter().chain([rate]).collect();
        let [steps, _, accepted] = simulated(&given, Some(14), 0.0);
        let (measured, rate) = (accepted / steps - h as f64, f64::from(rate));
        let error = (rate * (1.0 - rate) / steps).sqrt();
        assert!((measured - rate).abs() < 4.0 * error, "head {h}: {measured} of {rate} +- {error}");
    }
}

/// Where a row more costs a tenth of a step, two candidates give 1.74 tokens in 1.2 steps' time,
/// and one more would not pay.
#[test]
fn simulated_heads_are_worth_what_arithmetic_says() {
    for (row, n, tokens) in [
        (0.001, 3.0, 1.0 + 0.56 * (1.0 + 0.32 * 1.2)),
        (0.1, 2.0, 1.0 + 0.56 * 1.32),
        (0.4, 1.0, 1.56),
    ] {
        let [steps, drafted, accepted] = simulated(&[0.56, 0.32, 0.2], None, row);
        assert!((drafted / steps - n).abs() < 0.01, "{row}: {}", drafted / steps);
        // A step's tokens vary by less than one.
        assert!(
            (1.0 + accepted / steps - tokens).abs() < 4.0 / steps.sqrt(),
            "{row}: {} of {tokens}",
            1.0 + accepted / steps
        );
    }
    let [_, drafted, _] = simulated(&[0.56, 0.32, 0.2], None, 0.7);
    assert_eq!(drafted, 0.0, "where no candidate pays none is verified");
}

#[test]
fn a_request_without_drafts_is_not_simulated() {
    let layout = Layout::Unified { n_cells: 200, n_retained: 60, n_seqs: 8 };
    let acceptance = Acceptance::new(vec![0.9]).unwrap();
    let cost = Cost::from_points(&[(1, 1.0), (64, 1.1)]);
    let mut speculator = Speculator::new(Some(Box::new(Two)), 4, cost);
    speculator.calibration = acceptance.calibration();
    let model = Simulated::new(Stub::new(N_VOCAB), acceptance);
    let mut engine = Engine::new(model, limits(layout, 4, 60, 64), Arc::default());
    engine.speculate(speculator, 30);
    let (mut plain, mut events) = job(&[1, 2, 3], 40, 0.0);
    plain.request.speculation = Speculation::OFF;
    let (drafting, mut others) = job(&[1, 2, 3], 40, 0.0);
    engine.enqueue(plain);
    engine.enqueue(drafting);
    run_to_end(&mut engine);
    assert_eq!(read(&mut events).0, expected(&[1, 2, 3], 40));
    assert!(read(&mut others).0.contains("41 "));
    engine.check_nothing_left();
}

#[test]
fn an_engine_that_traces_tells_what_the_model_thought() {
    let layout = Layout::Unified { n_cells: 100, n_retained: 0, n_seqs: 2 };
    let mut engine = Engine::new(Stub::new(N_VOCAB), limits(layout, 2, 40, 8), Arc::default());
    engine.trace_answers();
    let (prompt, n) = ([5, 6, 7], 6);
    let (job, mut events) = job(&prompt, n, 0.0);
    engine.enqueue(job);
    run_to_end(&mut engine);
    let (_, Some(Event::Done(done))) = read(&mut events) else { panic!("not done") };
    let trace = done.trace.unwrap();
    let greedy = Stub::greedy(N_VOCAB, &prompt.map(Token), n);
    assert_eq!(trace.tokens, greedy);
    let seen = |i: usize| prompt.map(Token).into_iter().chain(greedy[..i].to_vec());
    let hidden: Vec<f32> = (0..greedy.len()).flat_map(seen).map(|t| t.0 as f32).collect();
    assert_eq!(trace.hidden.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), hidden);
    for (likely, token) in trace.top.chunks(Trace::TOP).zip(&greedy) {
        let p: f32 = likely.iter().map(|(_, p)| p.to_f32()).sum();
        assert!(
            likely[0].0 == *token && likely.is_sorted_by(|a, b| a.1 >= b.1) && p < 1.001,
            "{likely:?}"
        );
    }
}

#[test]
fn good_drafts_save_steps() {
    let layout = Layout::Unified { n_cells: 200, n_retained: 60, n_seqs: 8 };
    let run = |drafting: Option<Drafting>, speculation| {
        let mut engine =
            Engine::new(Stub::new(1 << 20), limits(layout, 4, 120, 64), Arc::default());
        if let Some(drafting) = drafting {
            let guess =
                Guess { n_vocab: 1 << 20, n_levels: drafting.n_levels, width: drafting.width };
            let cost = Cost::from_points(&[(1, 1.0), (64, 1.5)]);
            engine.speculate(Speculator::new(Some(Box::new(guess)), drafting.max_tokens, cost), 40);
        }
        let (mut job, mut events) = job(&[1, 2, 3], 100, 0.0);
        job.request.speculation = speculation;
        engine.enqueue(job);
        run_to_end(&mut engine);
        let Some(Event::Done(done)) = read(&mut events).1 else { panic!("not done") };
        done.speculation
    };
    let heads = Drafting {
        n_levels: 3,
        width: 2,
        max_tokens: 4,
        row_cost: 0.0,
        n_leaf_ids: 30,
        n_shared: None,
        model: None,
    };
    assert_eq!(run(None, Speculation::AUTO).steps, 100);
    let with = run(Some(heads.clone()), Speculation::AUTO);
    assert!(with.steps < 55 && with.steps + with.accepted == 100, "{with:?}");
    assert!(
        run(Some(Drafting { max_tokens: 2, ..heads.clone() }), Speculation::AUTO).steps >= 50,
        "the cap holds"
    );
    let off = run(Some(heads), Speculation::OFF);
    assert_eq!((off.steps, off.drafted), (100, 0));
}

#[test]
fn an_answer_given_before_is_drafted_from_unless_that_is_not_wanted() {
    let layout = Layout::Unified { n_cells: 400, n_retained: 60, n_seqs: 8 };
    let mut engine = Engine::new(Stub::new(1 << 20), limits(layout, 4, 120, 64), Arc::default());
    let mut speculator = Speculator::new(None, 20, Cost::from_points(&[(1, 1.0), (64, 1.5)]));
    speculator.text = Some(TextDrafts::new(2, 2000));
    engine.speculate(speculator, 40);
    let mut steps_of = |owner, speculation, share_text| {
        let (mut job, mut events) = job(&[1, 2, 3], 100, 0.0);
        (job.request.speculation, job.request.share_text, job.caller.tenant) =
            (speculation, share_text, owner);
        engine.enqueue(job);
        run_to_end(&mut engine);
        let (text, Some(Event::Done(done))) = read(&mut events) else { panic!("not done") };
        assert_eq!(text + &done.tail.text, expected_of(1 << 20, &[1, 2, 3], 100));
        done.speculation.steps
    };
    let mut steps = |speculation, share_text| steps_of(0, speculation, share_text);
    assert_eq!(steps(Speculation::AUTO, false), 100, "nobody answered that before");
    assert_eq!(steps(Speculation::OFF, true), 100);
    assert_eq!(
        steps(Speculation::AUTO, true),
        100,
        "the answers above were not to be shared, or not indexed"
    );
    let again = steps(Speculation::AUTO, true);
    assert!(again < 40, "{again} steps");
    assert_eq!(steps(Speculation::AUTO, false), 100, "this request does not want others' answers");
    assert_eq!(steps(Speculation::HEADS, true), 100, "nor does this one any text");
    assert_eq!(
        steps_of(1, Speculation::AUTO, true),
        100,
        "what another owner was answered is not for this one"
    );
    assert!(steps_of(1, Speculation::AUTO, true) < 40, "but its own is");
}

#[test]
fn a_client_that_left_frees_its_slot_within_one_step() {
    let layout = Layout::Streams { n_cells: 40 };
    let mut engine = Engine::new(Stub::new(N_VOCAB), limits(layout, 1, 40, 8), Arc::default());
    let (first, receiver) = job(&[1, 2, 3], 30, 0.0);
    engine.enqueue(first);
    engine.step();
    assert!(!engine.is_idle());
    drop(receiver);
    engine.step();
    assert!(engine.is_idle());
    engine.check_integrity();
}

#[test]
fn a_client_that_left_while_waiting_is_never_started() {
    let layout = Layout::Streams { n_cells: 40 };
    let stats = Arc::new(Stats::default());
    let mut engine = Engine::new(Stub::new(N_VOCAB), limits(layout, 1, 40, 8), Arc::clone(&stats));
    let (first, mut kept) = job(&[1, 2, 3], 5, 0.0);
    let (second, left) = job(&[4, 5], 5, 0.0);
    engine.enqueue(first);
    engine.enqueue(second);
    drop(left);
    run_to_end(&mut engine);
    let Some(Event::Done(done)) = read(&mut kept).1 else { panic!("not done") };
    let n_cancelled = stats.failures.get(&[("reason", "cancelled")]).unwrap().get();
    assert_eq!((stats.prompt_tokens.get(), n_cancelled), (3, 1));
    assert_eq!(stats.steps.get() as usize, done.speculation.steps, "no step but the first one's");
}

#[test]
fn a_failed_pass_ends_its_requests_and_the_engine_goes_on() {
    for layout in [
        Layout::Streams { n_cells: 40 },
        Layout::Unified { n_cells: 80, n_retained: 40, n_seqs: 4 },
    ] {
        let mut stub = Stub::new(N_VOCAB);
        stub.fail_at = Some(2);
        let mut engine = Engine::new(stub, limits(layout, 2, 40, 8), Arc::default());
        let (broken, mut events) = job(&[1, 2, 3], 20, 0.0);
        engine.enqueue(broken);
        run_to_end(&mut engine);
        assert!(matches!(read(&mut events).1, Some(Event::Failed { .. })));
        let (next, mut events) = job(&[1, 2, 3], 5, 0.0);
        engine.enqueue(next);
        run_to_end(&mut engine);
        let (text, end) = read(&mut events);
        assert_eq!(text, expected(&[1, 2, 3], 5));
        assert!(matches!(end, Some(Event::Done(_))));
    }
}

/// Choices of one prompt that start together: one reads it, the others share its cells, and each has
/// the text that it has alone.
#[test]
fn requests_with_one_prompt_that_start_together_compute_it_once() {
    let prompt: Vec<i32> = (1..40).collect();
    for (n, drafts) in [(2, false), (4, true), (16, false), (16, true)] {
        let layout = Layout::Unified { n_cells: 2000, n_retained: 0, n_seqs: 20 };
        let engine = |n_slots, n_batch| {
            let mut engine = Engine::new(
                Stub::new(N_VOCAB),
                limits(layout, n_slots, 80, n_batch),
                Arc::default(),
            );
            if drafts {
                let guess = Guess { n_vocab: N_VOCAB, n_levels: 3, width: 2 };
                let cost = Cost::from_points(&[(1, 1.0), (64, 1.5)]);
                engine.speculate(Speculator::new(Some(Box::new(guess)), 4, cost), 40);
            }
            engine
        };
        let choice = |seed: u64| {
            let (mut job, events) = job(&prompt, 20, 1.0);
            job.request.sampling.seed = seed;
            (job, events)
        };
        let mut together = engine(n, 16);
        let start = |seed: usize| {
            let (job, events) = choice(seed as u64);
            together.enqueue(job);
            events
        };
        let mut answers: Vec<_> = (0..n).map(start).collect();
        run_to_end(&mut together);
        let mut n_computed = 0;
        for (seed, events) in answers.iter_mut().enumerate() {
            let (text, Some(Event::Done(done))) = read(events) else { panic!("not done") };
            n_computed += done.usage.prompt_tokens - done.usage.cached_tokens;
            let mut alone = engine(1, 16);
            let (job, mut events) = choice(seed as u64);
            alone.enqueue(job);
            run_to_end(&mut alone);
            assert_eq!(text, read(&mut events).0, "choice {seed} of {n}");
        }
        assert_eq!(n_computed, prompt.len() + n - 1, "the prompt, and each choice's last row");
        together.check_nothing_left();
    }
}

/// Whoever waits for another's prompt keeps nobody else waiting, and goes on when that one leaves.
#[test]
fn a_request_that_waits_for_a_prompt_outlives_the_one_that_reads_it() {
    let layout = Layout::Unified { n_cells: 400, n_retained: 0, n_seqs: 8 };
    let mut engine = Engine::new(Stub::new(N_VOCAB), limits(layout, 3, 80, 8), Arc::default());
    let prompt: Vec<i32> = (1..60).collect();
    let ((first, reader), (second, mut waits)) = (job(&prompt, 5, 0.0), job(&prompt, 5, 0.0));
    let ((third, mut other), (fourth, mut late)) = (job(&[7], 1, 0.0), job(&[9], 5, 0.0));
    [first, second, third, fourth].into_iter().for_each(|job| engine.enqueue(job));
    engine.step();
    engine.step();
    assert!(read(&mut other).1.is_some(), "it passes the one that waits");
    drop(reader);
    run_to_end(&mut engine);
    assert_eq!(read(&mut waits).0, expected(&prompt, 5));
    assert_eq!(read(&mut late).0, expected(&[9], 5));
    engine.check_nothing_left();
}

/// The log probability of each of a prompt's tokens is what the model says after those before it,
/// whatever the chunks; the cache is not asked.
#[test]
fn a_prompt_is_scored_at_every_token() {
    let prompt: Vec<i32> = (1..300).map(|i| 1 + i * i % 49).collect();
    for (n_batch, max_tokens) in [(7, 3), (512, 3), (512, 0), (64, 0)] {
        let layout = Layout::Unified { n_cells: 1000, n_retained: 400, n_seqs: 4 };
        let mut engine =
            Engine::new(Stub::new(N_VOCAB), limits(layout, 2, 400, n_batch), Arc::default());
        let (before, _events) = job(&prompt, 1, 0.0);
        engine.enqueue(before);
        run_to_end(&mut engine);
        let (mut job, mut received) = job(&prompt, max_tokens, 0.0);
        (job.echo, job.request.echo) = (Some("the prompt".into()), true);
        job.request.report = Some(Report { n_top: Some(2), ..Report::default() });
        engine.enqueue(job);
        run_to_end(&mut engine);
        let Ok(Event::Piece(echo)) = received.try_recv() else { panic!("no echo") };
        assert_eq!((echo.text.as_str(), echo.tokens.len()), ("the prompt", prompt.len()));
        let tokens: Vec<Token> = prompt.iter().map(|&t| Token(t)).collect();
        for (i, report) in echo.tokens.iter().enumerate() {
            assert_eq!((report.token, report.is_prompt()), (tokens[i], true));
            let Some(logprobs) = &report.logprobs else {
                assert_eq!(i, 0, "before the first token there is nothing");
                continue;
            };
            let logits = Stub::logits_of(N_VOCAB, &tokens[..i]);
            let norm = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
            assert!((logprobs.logprob - (logits[prompt[i] as usize] - norm)).abs() < 1e-4);
            assert_eq!(logprobs.top.len(), 2);
        }
        let (mut n, mut done) = (0, None);
        while let Ok(event) = received.try_recv() {
            match event {
                Event::Piece(piece) => n += piece.tokens.len(),
                Event::Done(end) => done = Some(end),
                other => panic!("{other:?}"),
            }
        }
        let done = done.expect("an end");
        n += done.tail.tokens.len();
        assert_eq!((done.usage.cached_tokens, done.usage.completion_tokens), (0, n));
        assert!(n <= max_tokens && (max_tokens == 0 || n > 0), "the end's token is reported too");
        engine.check_nothing_left();
    }
}

#[test]
fn a_request_for_no_tokens_needs_no_model() {
    let layout = Layout::Streams { n_cells: 40 };
    let mut stub = Stub::new(N_VOCAB);
    stub.fail_at = Some(0);
    let mut engine = Engine::new(stub, limits(layout, 1, 40, 8), Arc::default());
    let (mut echoes, mut received) = job(&[1, 2, 3], 0, 0.0);
    echoes.echo = Some("abc".into());
    engine.enqueue(echoes);
    run_to_end(&mut engine);
    let Some(Event::Done(done)) = read(&mut received).1 else { panic!("not done") };
    assert_eq!((done.tail.text.as_str(), done.finish_reason), ("abc", FinishReason::Length));
    assert_eq!((done.usage.prompt_tokens, done.usage.completion_tokens), (3, 0));
}

#[test]
fn the_context_ends_an_answer() {
    let layout = Layout::Streams { n_cells: 16 };
    let mut engine = Engine::new(Stub::new(1 << 20), limits(layout, 1, 16, 8), Arc::default());
    let (long, mut events) = job(&[1, 2, 3, 4, 5, 6], 100, 0.0);
    engine.enqueue(long);
    run_to_end(&mut engine);
    let Some(Event::Done(done)) = read(&mut events).1 else { panic!("not done") };
    assert_eq!(done.finish_reason, FinishReason::Length);
    assert_eq!(done.usage.completion_tokens, 10);
}
