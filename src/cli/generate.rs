//! `medusa-llama generate`: one prompt through the same engine, streamed to the terminal.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{anyhow, bail};
use serde_json::json;

use super::show_loading;
use crate::config::GenerateArgs;
use crate::engine::thread::EngineParams;
use crate::engine::{self, Layout, Limits};
use crate::http::generate as body;
use crate::request::Event;

/// Generates and prints; a line of figures goes to standard error.
///
/// # Errors
/// When the model cannot be loaded, a parameter is out of range, or the engine fails.
pub fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let n_ctx = args.model.context_size;
    let request = request(args)?;
    let layout = Layout::Unified { n_cells: n_ctx, n_retained: 0, n_seqs: 1 };
    let params = EngineParams {
        model_path: args.model.path().map_err(|e| anyhow!(e))?,
        n_gpu_layers: args.model.n_gpu_layers,
        n_threads: args.model.threads(),
        limits: Limits { n_slots: 1, n_ctx, n_batch: 512, n_prefill: None, layout },
        drafts: args.drafts.params(&args.model),
        traces: false,
        n_queue: 1,
        max_wait: Duration::ZERO,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let engine = engine::spawn(params);
    let done = runtime.block_on(async {
        show_loading(engine.stage()).await;
        let handle = engine.ready().await.map_err(|e| anyhow!(e))?;
        let mut events = handle.submit(request).await?;
        let mut out = std::io::stdout().lock();
        while let Some(event) = events.recv().await {
            match event {
                Event::Piece(piece) => {
                    out.write_all(piece.text.as_bytes())?;
                    out.flush()?;
                }
                Event::Done(done) => {
                    writeln!(out, "{}", done.tail.text)?;
                    return Ok(done);
                }
                Event::Failed { id } => {
                    bail!("the engine failed; the log names the cause under {id}")
                }
            }
        }
        bail!("the engine stopped")
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

/// The same checks as over HTTP.
fn request(args: &GenerateArgs) -> anyhow::Result<crate::request::Request> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt)?;
    }
    let fields = json!({
        "prompt": prompt, "max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p,
        "top_k": args.top_k, "min_p": args.min_p, "seed": args.seed, "stop": args.stop,
    });
    Ok(body::read(fields, args.model.context_size, fastrand::u64(..))?.request)
}
