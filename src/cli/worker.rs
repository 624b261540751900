//! `medusa-llama worker`: computes layers of a model for another machine's `serve`.

use std::net::TcpListener;
use std::thread;

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::WorkerArgs;
use crate::llama::{exit_now, offered_names, serve_layers};
use crate::machine::cores;

/// Serves one client after the other until a signal.
pub(super) fn worker(args: &WorkerArgs) -> anyhow::Result<()> {
    end_at_signal()?;
    if let Some(cache) = &args.cache {
        std::fs::create_dir_all(cache).with_context(|| format!("--cache {}", cache.display()))?;
    }
    let fail = || format!("cannot listen on {}", args.listen);
    let listener = TcpListener::bind(args.listen).with_context(fail)?;
    let address = listener.local_addr().with_context(fail)?;
    let n_threads = args.n_threads.unwrap_or_else(cores);
    if !address.ip().is_loopback() {
        tracing::warn!(
            "RPC has no authentication: whoever reaches {address} controls this process; let only the server reach it"
        );
    }
    let devices = offered_names().join(", ");
    tracing::info!(n_threads, "listening on {address}, computing on {devices}");
    serve_layers(listener, n_threads, args.cache.as_deref());
    bail!("no connection can be accepted any more on {address}")
}

/// Ends the process at SIGTERM and SIGINT. The client notices at once; nothing here is to be saved.
fn end_at_signal() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut term, mut int) = {
        let _in_runtime = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        });
        exit_now(0);
    });
    Ok(())
}
