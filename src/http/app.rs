//! What all connections share, and what is known of a request beside what it says.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::api::answers::HealthStatus;
use super::api::{Readers, Unknown};
use super::auth::Auth;
use super::cors::Cors;
use super::host::Hosts;
use super::problem::Problem;
use super::tls::Tls;
use crate::chat::{Template, Vocabulary};
use crate::engine::plan::LONGEST_CONTEXT;
use crate::engine::{Handle, Stage, SubmitError};
use crate::llama::Model;
use crate::metrics::Metrics;
use crate::telemetry::{ChoiceRecords, Telemetry};

/// Between two lines about ignored fields.
const IGNORED_PAUSE: Duration = Duration::from_secs(60);

/// What every connection shares.
pub struct App {
    pub stage: watch::Receiver<Stage>,
    /// Set once: new work is refused from then on.
    pub draining: AtomicBool,
    pub limits: HttpLimits,
    pub auth: Auth,
    pub cors: Cors,
    pub hosts: Hosts,
    pub tls: Option<Tls>,
    pub metrics: Metrics,
    pub telemetry: Option<Telemetry>,
    /// How OpenAI's clients name the model.
    pub model_id: String,
    /// What is done with fields of requests that nobody knows.
    pub unknown_fields: Unknown,
    /// What reads bodies, made at the first request, when the size of a context is known.
    pub readers: OnceLock<Readers>,
    /// The document of all routes, and what makes it.
    pub openapi: OnceLock<Bytes>,
    pub describe: fn(&Readers) -> Bytes,
    /// Method and path of each route, for `GET /`.
    pub endpoints: Vec<String>,
    /// When ignored fields were last logged.
    pub ignored_logged: Mutex<Option<Instant>>,
    /// The source of the chat template, if it is not the model's own.
    pub template_source: Option<String>,
    /// The chat template, read at the first chat; or why there is none.
    pub template: OnceLock<Result<Template, String>>,
}

#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    pub max_body_bytes: usize,
    pub max_connections: usize,
    pub max_header_bytes: usize,
    /// Time to receive a request's head, and then its body.
    pub read_timeout: Duration,
    /// Time from acceptance to the end of the answer.
    pub timeout: Option<Duration>,
    /// Time for a client to read some bytes of its answer.
    pub write_timeout: Duration,
    /// Between comments in a stream without events; `None`: there are none.
    pub sse_keep_alive: Option<Duration>,
    /// Time for a forward pass, after which the server is not ready; `None`: no limit.
    pub stall_timeout: Option<Duration>,
}

impl App {
    /// The engine, unless it is loading or stopped, or the server shuts down.
    pub fn engine(&self) -> Result<Handle, Problem> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(Problem::Draining);
        }
        match &*self.stage.borrow() {
            Stage::Ready(handle) => Ok(handle.clone()),
            Stage::Loading(_) => Err(Problem::Loading),
            Stage::Failed(_) => Err(SubmitError::Stopped.into()),
        }
    }

    /// What reads bodies of requests to this engine.
    pub fn readers(&self, engine: &Handle) -> &Readers {
        let n_ctx = engine.limits.n_ctx;
        self.readers.get_or_init(|| Readers::with_policy(n_ctx, self.unknown_fields))
    }

    /// The document of all routes, as JSON. Until the size of a context is known it has the largest.
    pub fn openapi(&self) -> Bytes {
        match &*self.stage.borrow() {
            Stage::Ready(engine) => {
                self.openapi.get_or_init(|| (self.describe)(self.readers(engine))).clone()
            }
            _ => (self.describe)(&Readers::with_policy(LONGEST_CONTEXT, self.unknown_fields)),
        }
    }

    /// The source of the chat template for `model`; empty without one.
    pub fn template_source(&self, model: &Model) -> String {
        self.template_source.clone().or_else(|| model.chat_template()).unwrap_or_default()
    }

    /// The chat template for `model`, or why there is none.
    pub fn template(&self, model: &Model) -> &Result<Template, String> {
        self.template.get_or_init(|| match &self.template_source {
            Some(source) => Template::new(source.clone(), Vocabulary::of(model)),
            None => Template::of(model),
        })
    }

    /// Logs the fields of a request that nobody knew, once a minute at most.
    pub fn note_ignored(&self, paths: &BTreeSet<String>) {
        if paths.is_empty() {
            return;
        }
        let mut last = self.ignored_logged.lock();
        if last.is_none_or(|at| at.elapsed() >= IGNORED_PAUSE) {
            *last = Some(Instant::now());
            tracing::info!(fields = ?paths, "ignored fields that are unknown here; --strict-fields refuses them");
        }
    }

    pub fn status(&self) -> HealthStatus {
        let limit = self.limits.stall_timeout;
        let is_stalled = |handle: &Handle| limit.is_some() && handle.stats.pass_elapsed() > limit;
        match &*self.stage.borrow() {
            Stage::Failed(_) => HealthStatus::Failed,
            _ if self.draining.load(Ordering::Relaxed) => HealthStatus::Draining,
            Stage::Loading(_) => HealthStatus::Loading,
            Stage::Ready(handle) if is_stalled(handle) => HealthStatus::Stalled,
            Stage::Ready(_) => HealthStatus::Ok,
        }
    }
}

pub struct RequestContext {
    pub app: Arc<App>,
    /// Its id, in the log and in its answer.
    pub id: Arc<str>,
    /// The number of its API key; 0 where there are none.
    pub tenant: u32,
    /// What its path has in place of its route's `{...}`.
    pub tail: String,
    pub record: Arc<ChoiceRecords>,
}
