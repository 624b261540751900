//! `medusa-llama serve`: binds the port, loads the model, serves requests until a signal, drains.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use super::fetch;
use super::shared::show_loading;
use crate::config::{Config, Files, HeadsSource, ModelSource};
use crate::engine::{self, Layout, Stage};
use crate::http::app::App;
use crate::http::{openapi, routes, server};
use crate::metrics::Metrics;
use crate::telemetry::Telemetry;

/// Time to flush written bytes after the drain.
const FLUSH: Duration = Duration::from_secs(2);

/// Serves until a signal; then drains.
pub(super) fn serve(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.workers)
        .max_blocking_threads(2) // the telemetry's end, and its collector's address
        .thread_name("http")
        .enable_all()
        .build()
        .context("cannot start the HTTP server's threads")?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> anyhow::Result<()> {
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    tracing::info!("listening on {scheme}://{address}, loading {}", config.model);
    let model_id = config.model_id;
    let telemetry =
        config.otlp_endpoint.map(|collector| Telemetry::start(&collector, &model_id)).transpose();
    let telemetry = telemetry.map_err(|error| anyhow!(error))?;
    let (model, heads, params) = (config.model, config.heads, config.engine);
    let engine = engine::spawn_after(move |stop| {
        let goes_on = || !stop.load(Ordering::Relaxed);
        let files =
            files(&model, heads.as_ref(), &goes_on).map_err(|error| format!("{error:#}"))?;
        Ok(params(files))
    });
    let app = Arc::new(App {
        stage: engine.stage(),
        draining: AtomicBool::new(false),
        limits: config.http,
        auth: config.auth,
        cors: config.cors,
        hosts: config.hosts,
        tls: config.tls,
        metrics: Metrics::new(&model_id, engine.stage()),
        telemetry,
        model_id,
        unknown_fields: config.unknown_fields,
        readers: OnceLock::new(),
        openapi: OnceLock::new(),
        describe: openapi::json,
        endpoints: routes::endpoints(),
        template_source: config.chat_template,
        ignored_logged: Mutex::default(),
        template: OnceLock::new(),
    });

    let (end, ended) = oneshot::channel::<()>();
    let until_end = async { drop(ended.await) };
    let network = tokio::spawn(server::serve(listener, Arc::clone(&app), until_end, FLUSH));
    tokio::spawn(show_loading(engine.stage()));
    tokio::spawn(announce(Arc::clone(&app)));

    let failure = {
        let mut signalled = std::pin::pin!(stop_signal()?);
        tokio::select! {
            () = &mut signalled => {
                app.draining.store(true, Ordering::Relaxed);
                drain(engine.stage(), config.drain_timeout).await;
                None
            }
            why = failed(engine.stage()) => Some(why),
        }
    };
    let _ = end.send(());
    let _ = network.await;
    let _ = tokio::task::spawn_blocking(move || app.telemetry.as_ref().map(Telemetry::stop)).await;
    engine.stop();
    match failure {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

/// The model and its heads, after a download if they are on the Hub.
fn files(
    model: &ModelSource,
    heads: Option<&HeadsSource>,
    goes_on: fetch::GoesOn<'_>,
) -> anyhow::Result<Files> {
    let model = fetch::model(model, goes_on)?;
    let heads = heads.map(|heads| fetch::heads(heads, goes_on)).transpose()?;
    Ok(Files { model, heads })
}

/// Completes at the first SIGTERM or SIGINT. A second one ends the process immediately.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let (tx, rx) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        let _ = tx.send(());
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::warn!("second signal: exiting immediately");
        std::process::exit(130);
    });
    Ok(async { drop(rx.await) })
}

/// Waits until no request is in flight, at most for `timeout`.
async fn drain(stage: watch::Receiver<Stage>, timeout: Duration) {
    let Stage::Ready(handle) = stage.borrow().clone() else { return };
    tracing::info!(in_flight = handle.n_in_flight(), "draining");
    let idle = async {
        while handle.n_in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(timeout, idle).await.is_err() {
        tracing::warn!(
            in_flight = handle.n_in_flight(),
            "drain timeout reached; cancelling the remaining requests"
        );
    }
}

/// Waits until the engine has failed; returns the reason.
async fn failed(mut stage: watch::Receiver<Stage>) -> String {
    match stage.wait_for(|stage| matches!(stage, Stage::Failed(_))).await.as_deref() {
        Ok(Stage::Failed(why)) => why.clone(),
        _ => "the engine thread ended".into(),
    }
}

/// Logs the model and its limits once it is loaded, and makes what follows from them.
async fn announce(app: Arc<App>) {
    let mut stage = app.stage.clone();
    let Ok(stage) = stage.wait_for(|s| !matches!(s, Stage::Loading(_))).await else { return };
    let Stage::Ready(handle) = stage.clone() else { return };
    drop(stage);
    app.openapi(); // before anybody asks for it
    let (model, limits) = (&handle.model, handle.limits);
    let kv = match limits.layout {
        Layout::Unified { n_cells, .. } => format!("unified, {n_cells} cells"),
        Layout::States { n_cells, n_seqs, window: 0, .. } => {
            format!("unified, {n_cells} cells, {n_seqs} states")
        }
        Layout::States { n_cells, n_seqs, window, .. } => {
            format!("unified, {n_cells} cells, {n_seqs} windows of {window}")
        }
        Layout::Streams { n_cells } => format!("{} streams of {n_cells} cells", limits.n_slots),
    };
    tracing::info!(
        "ready: {} ({}, {}), context {}, {} slots, KV {kv}, drafts: {}",
        model.name().unwrap_or_else(|| "unnamed model".into()),
        model.architecture(),
        model.quantization(),
        limits.n_ctx,
        limits.n_slots,
        handle.draft_shape.name(),
    );
    if limits.n_ctx > handle.n_ctx_trained {
        tracing::warn!(
            "MODEL_CONTEXT_SIZE {} exceeds the {} tokens the model was trained with",
            limits.n_ctx,
            handle.n_ctx_trained
        );
    }
}
