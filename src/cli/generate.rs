//! `medusa-llama generate`: one prompt through the same engine, streamed to the terminal.

use std::io::{Read, Write};

use anyhow::{anyhow, ensure};

use super::fetch;
use super::shared::show_loading;
use crate::chat::{self, Template};
use crate::config::GenerateArgs;
use crate::engine;
use crate::engine::EngineParams;
use crate::engine::Failed;
use crate::engine::Stage;
use crate::request::{Caller, Event, Request, SamplingParams};

/// Generates and prints; a line of figures goes to standard error.
pub(super) fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let (prompt, request) = (prompt(args)?, request(args)?);
    let params = args.model.engine(fetch::named_model(&args.model)?, 1)?;
    let files = fetch::named_drafts(&args.drafts, &args.model)?;
    let drafts = args.drafts.params(files, &params.placement);
    let params = EngineParams { drafts, ..params };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let engine = engine::spawn(params);
    let done = runtime.block_on(async {
        let progress = |stage: &Stage| match stage {
            Stage::Loading(progress) => Some(*progress),
            _ => None,
        };
        show_loading(engine.stage(), progress).await;
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        let prompt = chat::turn(
            &Template::of(&handle.model),
            prompt.into(),
            args.system.as_deref(),
            args.raw,
        )?;
        let request = Request { prompt, ..request };
        let mut answer = handle.submit(request, Caller::default()).await?;
        let mut out = std::io::stdout().lock();
        loop {
            match answer.next().await {
                Event::Progress(_) => {}
                Event::Piece(piece) => {
                    out.write_all(piece.text.as_bytes())?;
                    out.flush()?;
                }
                Event::Done(done) => {
                    writeln!(out, "{}", done.tail.text)?;
                    return Ok(done);
                }
                Event::Failed { id } => return Err(anyhow!(Failed { id })),
            }
        }
    });
    engine.stop();
    let done = done?;
    let (u, t) = (done.usage, done.timings);
    eprintln!(
        "[{} prompt tokens in {:.2} s, {} tokens in {:.2} s: {:.1} tokens/s]",
        u.prompt_tokens,
        t.prefill_s,
        u.completion_tokens,
        t.decode_s,
        (u.completion_tokens - 1) as f64 / t.decode_s.max(1e-9), // the first one came out of the prompt
    );
    Ok(())
}

fn prompt(args: &GenerateArgs) -> anyhow::Result<String> {
    if args.prompt != "-" {
        return Ok(args.prompt.clone());
    }
    let mut prompt = String::new();
    std::io::stdin().read_to_string(&mut prompt)?;
    Ok(prompt)
}

/// All but the prompt.
fn request(args: &GenerateArgs) -> anyhow::Result<Request> {
    let (n, n_ctx) = (args.max_tokens, args.model.n_ctx());
    ensure!(n <= n_ctx, "--max-tokens is {n}, but the context has {n_ctx} tokens");
    let sampling = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        min_p: args.min_p,
        seed: args.seed.unwrap_or_else(|| fastrand::u64(..)),
        ..SamplingParams::default()
    };
    let stop = args.stop.clone();
    Ok(Request { sampling, stop, ..Request::new("", args.max_tokens) })
}
