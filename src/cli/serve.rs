//! `medusa-llama serve`: binds the port, loads the model, serves requests until a signal, drains.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::fetch;
use super::shared::show_loading;
use super::try_out::{self, Stamp};
use crate::config::{Config, Files, ModelConfig};
use crate::engine::EngineParams;
use crate::http::app::App;
use crate::http::{openapi, routes, server};
use crate::llama::{connect, exit_now};
use crate::metrics::Metrics;
use crate::models::{Entry, Load, ModelLimits, ModelSetup, Models, Part, Phase};
use crate::telemetry::Telemetry;

/// Least time to flush written bytes after the drain.
const FLUSH: Duration = Duration::from_secs(2);

/// Serves until a signal; then drains.
pub(super) fn serve(config: Config) -> anyhow::Result<()> {
    // Now: one that is missing is better known before the port is.
    config.models.iter().try_for_each(|model| connect(&model.workers))?;
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
    match &config.models[..] {
        [model] => tracing::info!("listening on {scheme}://{address}, loading {}", model.model),
        several => tracing::info!("listening on {scheme}://{address}, {} models", several.len()),
    }
    let telemetry = config.otlp_endpoint.as_ref().map(Telemetry::start).transpose();
    let telemetry = telemetry.map_err(|error| anyhow!(error))?;
    let models = models(config.models, config.several);
    let app = Arc::new(App {
        models: Arc::clone(&models),
        limits: config.http,
        auth: config.auth,
        cors: config.cors,
        hosts: config.hosts,
        tls: config.tls,
        metrics: Metrics::new(models.only().map(Entry::id)),
        telemetry,
        unknown_fields: config.unknown_fields,
        readers: Mutex::default(),
        openapi: OnceLock::new(),
        describe: openapi::json,
        endpoints: routes::endpoints(),
        ignored_logged: Mutex::default(),
    });

    let (end, ended) = oneshot::channel();
    let until_end = async { ended.await.unwrap_or(FLUSH) };
    let network = tokio::spawn(server::serve(listener, Arc::clone(&app), until_end));
    if let Some(only) = models.only() {
        models.start();
        tokio::spawn(show_loading(only.phase(), progress));
        let (app, mut phase) = (Arc::clone(&app), only.phase());
        tokio::spawn(async move {
            let ready = phase.wait_for(|phase| matches!(phase, Phase::Ready(_))).await.is_ok();
            ready.then(|| app.openapi()) // before anybody asks for it
        });
    }

    let signalled = stop_signal()?;
    let taken = async {
        signalled.await;
        announce(&models, config.drain_delay).await;
    };
    let (failure, left) = tokio::select! {
        () = taken => {
            models.close();
            (None, drain(&models, config.drain_timeout).await)
        }
        why = failed(&models) => (Some(why), Duration::ZERO),
    };
    let _ = end.send(left.max(FLUSH));
    let _ = network.await;
    let _ = tokio::task::spawn_blocking(move || app.telemetry.as_ref().map(Telemetry::stop)).await;
    models.stop();
    match failure {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

/// The models of a configuration.
fn models(configs: Vec<ModelConfig>, limits: Option<ModelLimits>) -> Arc<Models> {
    let setups = configs.into_iter().map(|config| ModelSetup {
        id: config.id.clone(),
        template: config.chat_template.clone(),
        loader: Box::new(Source { config, tried: Mutex::default() }),
    });
    Models::new(setups.collect(), limits)
}

/// Where a model comes from.
struct Source {
    config: ModelConfig,
    /// The files that were tried.
    tried: Mutex<Option<Stamp>>,
}

impl Load for Source {
    /// After a download if the model or its heads are on the Hub.
    fn prepare(&self, goes_on: &dyn Fn() -> bool) -> Result<EngineParams, String> {
        let files = || -> anyhow::Result<Files> {
            let model = fetch::model(&self.config.model, goes_on)?;
            let ModelConfig { heads, draft_model, .. } = &self.config;
            let drafts = fetch::drafts(heads.as_ref(), draft_model.as_ref(), goes_on)?;
            Ok(Files { model, drafts })
        };
        files().map(&*self.config.params).map_err(|error| format!("{error:#}"))
    }

    fn try_out(
        &self,
        params: &EngineParams,
        part: Part,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<(), String> {
        let drafter = params.drafts.as_ref().and_then(|drafts| drafts.model.as_ref());
        let files = || [&params.model_path].into_iter().chain(drafter.map(|of| &of.path));
        let mut stamp = Stamp::new();
        for file in files() {
            stamp.extend(try_out::stamp(file)?);
        }
        if self.tried.lock().as_ref() == Some(&stamp) {
            return Ok(());
        }
        for file in files() {
            try_out::run(file, part, goes_on)?;
        }
        if part == Part::Whole {
            *self.tried.lock() = Some(stamp);
        }
        Ok(())
    }
}

fn progress(phase: &Phase) -> Option<f32> {
    match phase {
        Phase::Unloaded => Some(0.0),
        Phase::Loading(progress) => Some(*progress),
        _ => None,
    }
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
        exit_now(130);
    });
    Ok(async { drop(rx.await) })
}

/// Tells that the end is near, and takes requests for `delay` more, so that balancers notice before
/// any is refused. A model that still loads has none to wait for.
async fn announce(models: &Models, delay: Duration) {
    models.announce_end();
    let is_loading = models.only().is_some_and(|only| only.loaded().is_none());
    if !delay.is_zero() && !is_loading {
        tracing::info!(seconds = delay.as_secs_f64(), "leaving: requests are still taken");
        tokio::time::sleep(delay).await;
    }
}

/// Waits until no request is in flight, at most for `timeout`; returns what is left of it, for
/// answers that are still to be written and requests that are still being read.
async fn drain(models: &Models, timeout: Duration) -> Duration {
    if models.loaded().is_empty() {
        return Duration::ZERO;
    }
    let began = Instant::now();
    tracing::info!(in_flight = models.n_in_flight(), "draining");
    let idle = async {
        while models.n_in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(timeout, idle).await.is_err() {
        tracing::warn!(
            in_flight = models.n_in_flight(),
            "drain timeout reached; cancelling the remaining requests"
        );
    }
    timeout.saturating_sub(began.elapsed())
}

/// Waits until a single model has failed; returns the reason.
async fn failed(models: &Models) -> String {
    let Some(only) = models.only() else { return std::future::pending().await };
    match only.phase().wait_for(|phase| matches!(phase, Phase::Failed(..))).await.as_deref() {
        Ok(Phase::Failed(why, _)) => why.clone(),
        _ => "the model is gone".into(),
    }
}
