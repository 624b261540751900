//! Models of many architectures, with random weights: what a client gets depends neither on what the
//! cache had of its prompt, nor on company, nor on drafts; and it is what the model gives alone.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::sync::Arc;

use medusa_llama::engine::EngineParams;
use medusa_llama::engine::plan::Sizes;
use medusa_llama::engine::{Handle, spawn};
use medusa_llama::llama::{Context, ContextParams, Model, Placement, Quantization, SeqId, Token};
use medusa_llama::request::{Caller, Report, Request, SamplingParams, Speculation};
use medusa_llama::synth::{self, ModelShape};

/// Tokens of an answer.
const N: usize = 48;

/// A model's file, in F16: what rounding there is does not depend on how rows are grouped.
fn write(folder: &Path, name: &str) -> std::path::PathBuf {
    let path = folder.join(format!("{name}.gguf"));
    let shape = ModelShape::by_name(name).unwrap();
    let f16 = Quantization::by_name("F16").unwrap();
    synth::model(&path, &shape, f16, 1, &mut |_, _| ()).unwrap();
    path
}

/// Prompts that begin alike: all with 150 words, some with 150 more; the first is there twice.
fn prompts() -> Vec<String> {
    let words = ["tree", "river", "stone", "cloud", "bird", "light", "road", "house"];
    let mut rng = fastrand::Rng::with_seed(3);
    let mut text =
        |n: usize| (0..n).map(|_| words[rng.usize(..words.len())]).collect::<Vec<_>>().join(" ");
    let (first, second) = (text(60), text(60));
    let mut all: Vec<String> = (0..3).map(|i| format!("{first} {}", text(5 + 9 * i))).collect();
    all.extend((0..2).map(|i| format!("{first} {second} {}", text(4 + 7 * i))));
    all.push(all[0].clone());
    all
}

/// Rows in which a prompt is read: with some hundreds some kernels round in another way, and of two
/// experts that are as good for a token another one is chosen.
const CHUNK: usize = 64;

/// What the model gives greedily, token after token, in a context of its own, and the logits that each
/// token was chosen from.
struct Alone {
    tokens: Vec<Token>,
    logits: Vec<Vec<f32>>,
}

impl Alone {
    fn of(model: &Arc<Model>, prompt: &str) -> Self {
        Self::after(model, prompt, &[])
    }

    /// The same where the answer so far has these tokens, whatever the model would choose.
    fn after(model: &Arc<Model>, prompt: &str, given: &[Token]) -> Self {
        let params = ContextParams::of_one_sequence(2048, CHUNK, 1);
        let mut context = Context::new(Arc::clone(model), &params).unwrap();
        let mut next = model.tokenize(prompt, true).unwrap();
        let mut n_done = 0;
        let mut alone = Self { tokens: vec![], logits: vec![] };
        for i in 0..N {
            let mut last = 0;
            for tokens in next.chunks(CHUNK) {
                let mut batch = context.batch();
                for &token in tokens {
                    last = batch.add(token, n_done, &[SeqId(0)], true).unwrap();
                    n_done += 1;
                }
                context.forward(&batch).unwrap();
            }
            let logits = context.logits(last).unwrap();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            alone.tokens.push(Token(best as i32));
            next = vec![given.get(i).copied().unwrap_or(Token(best as i32))];
            alone.logits.push(logits.to_vec());
        }
        alone
    }

    /// The tokens of an answer whose logits are below the highest by more than a tie, and by how much:
    /// what is before them is given.
    fn deviations(&self, tokens: &[Token]) -> Vec<(usize, f32)> {
        assert_eq!(tokens.len(), N);
        let below = |i: usize| {
            let logit = |token: Token| self.logits[i][token.0 as usize];
            (i, logit(self.tokens[i]) - logit(tokens[i]))
        };
        (0..N).map(below).filter(|(_, below)| *below > TIE).collect()
    }
}

/// Tokens of an answer that may deviate. Where two experts are as good for a token, the last bits
/// decide which of them computes it, and so how it continues: by any amount, but there alone.
fn n_tolerated(model: &Model) -> usize {
    let experts = model.meta(&format!("{}.expert_count", model.architecture()));
    usize::from(experts.is_some_and(|n| n != "0"))
}

/// Logits that are closer than this are a tie: how rows are grouped, and where in the cache their cells
/// are, decides on the last bits. Their deviation is about 3.
const TIE: f32 = 0.02;

fn request(prompt: &str, speculation: Speculation) -> Request {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let report = Some(Report { details: true, n_top: None });
    Request { sampling, speculation, report, ..Request::new(prompt, N) }
}

/// The tokens of the answers to prompts that are sent together.
async fn answers(handle: &Handle, prompts: &[String], speculation: Speculation) -> Vec<Vec<Token>> {
    let mut answers = vec![];
    for prompt in prompts {
        let request = request(prompt, speculation);
        answers.push(handle.submit(request, Caller::default()).await.unwrap());
    }
    let mut all = vec![];
    for answer in answers {
        let (piece, _) = answer.collect().await.unwrap();
        all.push(piece.tokens.iter().map(|of| of.token).collect());
    }
    all
}

/// Whatever the architecture, answers are those of the model alone: one after another, all together,
/// from what the cache has, with drafts and without, and from an engine that has none.
fn check(name: &str, drafts: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), name);
    let model = Arc::new(Model::load(&path, &Placement::default(), |_| true).unwrap());
    let prompts = prompts();
    let alone: Vec<Alone> = prompts.iter().map(|prompt| Alone::of(&model, prompt)).collect();
    let params = EngineParams::new(path, 1, 3, 1024);
    let params = EngineParams {
        sizes: Sizes { n_retained: None, n_states_kept: 4, n_batch: 128, ..params.sizes },
        drafts: Some(common::text_drafts()),
        n_queue: 16,
        ..params
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let engine = spawn(params.clone());
    let mut n_same = 0;
    let mut compare = |i: usize, tokens: &[Token], how: &str| {
        if tokens == alone[i].tokens {
            n_same += 1;
            return;
        }
        let found = Alone::after(&model, &prompts[i], tokens).deviations(tokens);
        let what = "tokens that are below the best, and by how much";
        assert!(found.len() <= n_tolerated(&model), "{name}, prompt {i}, {how}: {what}: {found:?}");
    };
    runtime.block_on(async {
        let handle = engine.ready().await.unwrap();
        assert_eq!(handle.draft_shape.name(), drafts, "{name}");
        for speculation in [Speculation::AUTO, Speculation::OFF] {
            for how in ["together", "together again"] {
                for (i, tokens) in answers(&handle, &prompts, speculation).await.iter().enumerate()
                {
                    compare(i, tokens, how);
                }
            }
            for (i, prompt) in prompts.iter().enumerate() {
                let one = std::slice::from_ref(prompt);
                compare(i, &answers(&handle, one, speculation).await[0], "alone");
            }
        }
        let (queries, hits) = (handle.stats.prefix_queries.get(), handle.stats.prefix_hits.get());
        assert!(hits * 4 > queries, "{name}: {hits} of {queries} tokens were there");
        if drafts != "plain" {
            assert!(handle.stats.drafted.get() > 0, "{name} drafted");
        }
    });
    engine.stop();
    let engine = spawn(EngineParams { drafts: None, ..params });
    runtime.block_on(async {
        let handle = engine.ready().await.unwrap();
        for (i, tokens) in answers(&handle, &prompts, Speculation::AUTO).await.iter().enumerate() {
            compare(i, tokens, "by an engine that drafts nothing");
        }
    });
    engine.stop();
    let n_all = 7 * prompts.len();
    assert!(n_same * 2 > n_all, "{name}: {n_same} of {n_all} answers are the same without ties");
}

macro_rules! architectures {
    ($($test:ident: $name:literal, $drafts:literal;)*) => {
        $(
            #[test]
            fn $test() {
                check($name, $drafts);
            }
        )*
    };
}

architectures! {
    llama: "tiny", "trees";
    qwen2: "tiny-qwen2", "trees";
    qwen3: "tiny-qwen3", "trees";
    qwen3moe: "tiny-qwen3moe", "trees";
    gemma3_with_windows: "tiny-gemma3", "trees";
    phi3: "tiny-phi3", "trees";
    gpt_oss_with_windows: "tiny-gpt-oss", "trees";
    deepseek2: "tiny-deepseek2", "trees";
    mamba: "tiny-mamba", "plain";
    mamba2: "tiny-mamba2", "plain";
    rwkv7: "tiny-rwkv7", "plain";
    lfm2: "tiny-lfm2", "chains";
    jamba: "tiny-jamba", "plain";
    granite_hybrid: "tiny-granite-hybrid", "plain";
    nemotron_h: "tiny-nemotron-h", "chains";
    falcon_h1: "tiny-falcon-h1", "plain";
    qwen3next: "tiny-qwen3next", "plain";
    qwen35: "tiny-qwen35", "chains";
}
