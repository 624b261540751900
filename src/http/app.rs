//! What all connections share, and what is known of a request beside what it says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Request;
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tokio::time::timeout;

use super::api::information::HealthStatus;
use super::api::{Readers, Unknown, json};
use super::auth::Auth;
use super::cors::Cors;
use super::host::Hosts;
use super::problem::Problem;
use super::tls::Tls;
use crate::engine::plan::LONGEST_CONTEXT;
use crate::error::Invalid;
use crate::metrics::Metrics;
use crate::models::{Entry, Intake, Loaded, Models, Phase};
use crate::telemetry::{ChoiceRecords, Telemetry};

/// Between two lines about ignored fields.
const IGNORED_PAUSE: Duration = Duration::from_secs(60);

/// What every connection shares.
pub struct App {
    pub models: Arc<Models>,
    pub limits: HttpLimits,
    pub auth: Auth,
    pub cors: Cors,
    pub hosts: Hosts,
    pub tls: Option<Tls>,
    pub metrics: Metrics,
    pub telemetry: Option<Telemetry>,
    /// What is done with fields of requests that nobody knows.
    pub unknown_fields: Unknown,
    /// What reads bodies, by the size of a context.
    pub readers: Mutex<BTreeMap<usize, Arc<Readers>>>,
    /// The document of all routes, and what makes it.
    pub openapi: OnceLock<Bytes>,
    pub describe: fn(&Readers) -> Bytes,
    /// Method and path of each route, for `GET /`.
    pub endpoints: Vec<String>,
    /// When ignored fields were last logged.
    pub ignored_logged: Mutex<Option<Instant>>,
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
    /// What reads bodies of requests to a model with contexts of `n_ctx` tokens.
    pub fn readers(&self, n_ctx: usize) -> Arc<Readers> {
        let new = || Arc::new(Readers::with_policy(n_ctx, self.unknown_fields));
        Arc::clone(self.readers.lock().entry(n_ctx).or_insert_with(new))
    }

    /// The document of all routes, as JSON. It has the size of a single model's context, once it is
    /// known, or else the largest.
    pub fn openapi(&self) -> Bytes {
        let describe = |n_ctx| (self.describe)(&self.readers(n_ctx));
        match self.models.only().map(Entry::loaded) {
            Some(None) => describe(LONGEST_CONTEXT),
            Some(Some(model)) => {
                self.openapi.get_or_init(|| describe(model.handle.limits.n_ctx)).clone()
            }
            None => self.openapi.get_or_init(|| describe(LONGEST_CONTEXT)).clone(),
        }
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
        let is_stalled =
            |model: &Arc<Loaded>| limit.is_some() && model.handle.stats.pass_elapsed() > limit;
        let only = self.models.only().map(|only| only.phase().borrow().clone());
        match only {
            Some(Phase::Failed(..)) => HealthStatus::Failed,
            _ if self.models.intake() != Intake::Open => HealthStatus::Draining,
            Some(Phase::Unloaded | Phase::Loading(_)) => HealthStatus::Loading,
            _ if self.models.loaded().iter().any(is_stalled) => HealthStatus::Stalled,
            _ => HealthStatus::Ok,
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
    /// How long it waited for its model.
    pub waited: Duration,
}

/// What of a body says which model is asked for, and how long to wait for it.
#[derive(Default, Deserialize)]
struct Asked {
    model: Option<String>,
    timeout_s: Option<f64>,
}

impl Asked {
    /// From a body, or from the query of a request without one.
    fn of(request: &Request<Bytes>) -> Result<Self, Problem> {
        if request.body().is_empty() {
            let query = request.uri().query().unwrap_or_default();
            let model = query.split('&').find_map(|pair| pair.strip_prefix("model="));
            let model = model.map(|name| {
                percent_decode_str(&name.replace('+', " ")).decode_utf8_lossy().into_owned()
            });
            return Ok(Self { model, timeout_s: None });
        }
        serde_json::from_slice(request.body()).or_else(|_| {
            let value = json::parse(request.body())?; // says what is wrong, if the whole body is
            let name = value.get("model").filter(|name| !name.is_string() && !name.is_null());
            match name {
                Some(_) => Err(Invalid::new("model", "model must be a string".to_owned()).into()),
                None => Ok(Self::default()),
            }
        })
    }
}

impl RequestContext {
    /// The model that a request asks for: the only one, or one of several, which is loaded if it is
    /// not.
    pub async fn model(&mut self, request: &Request<Bytes>) -> Result<Arc<Loaded>, Problem> {
        let models = &self.app.models;
        if models.only().is_some() {
            return Ok(models.get(None).await?);
        }
        let asked = Asked::of(request)?;
        let wanted = asked.timeout_s.and_then(|s| Duration::try_from_secs_f64(s).ok());
        let limit = self.app.limits.timeout.into_iter().chain(wanted).min();
        let model = models.get(asked.model.as_deref());
        let began = Instant::now();
        let model = match limit {
            None => model.await?,
            Some(limit) => timeout(limit, model).await.map_err(|_| Problem::Deadline)??,
        };
        self.waited = began.elapsed();
        Ok(model)
    }

    /// What is left of a request's time.
    pub fn left(&self, limit: Option<Duration>) -> Option<Duration> {
        limit.map(|limit| limit.saturating_sub(self.waited))
    }
}
