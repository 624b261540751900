//! What each path does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ALLOW, HeaderValue, RETRY_AFTER};
use hyper::{Request, StatusCode};
use serde_json::json;

use super::access::Tally;
use super::completions::{complete, generate};
use super::information::{information, models};
use super::openai::Endpoint;
use super::reply::{self, Problem, Reply};
use super::{App, docs, page};
use crate::engine::{Handle, Stage};
use crate::metrics;

/// Paths, and what they take.
pub const PATHS: [(&str, &str); 12] = [
    ("/", "GET, HEAD"),
    ("/health", "GET, HEAD"),
    ("/ready", "GET, HEAD"),
    ("/metrics", "GET, HEAD"),
    ("/generate", "POST"),
    ("/v1/models", "GET, HEAD"),
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/openapi.json", "GET, HEAD"),
    ("/docs", "GET, HEAD"),
    (DOCS_FILE, "GET, HEAD"),
    (PAGE_FILE, "GET, HEAD"),
];
/// Files of the page at `/docs`, and of the one at `/`.
const DOCS_FILE: &str = "/docs/{file}";
const PAGE_FILE: &str = "/page/{file}";

/// What is known of a request beside what it says.
pub struct Call<'a> {
    /// Names it.
    pub id: &'a Arc<str>,
    /// Whose it is.
    pub owner: u32,
    /// Longest time that a request may have.
    pub timeout: Option<Duration>,
    /// What its answers take.
    pub tally: &'a Arc<Tally>,
}

/// Answers one request.
pub async fn answer(
    app: &Arc<App>,
    request: Request<Incoming>,
    id: &Arc<str>,
    tally: &Arc<Tally>,
) -> Reply {
    // Its clients know errors by another shape.
    let is_openai = request.uri().path().starts_with("/v1");
    // A path that nobody knows must not become a label.
    let path = known(request.uri().path()).map_or("other", |(path, _)| path);
    let write = if is_openai { Problem::openai_reply } else { Problem::reply };
    let answer = match (page::answer(&request), app.auth.admit(&request)) {
        (Some(page), _) => Ok(page), // it asks for a key where it needs one
        (None, Ok(owner)) => {
            route(app, request, &Call { id, owner, timeout: app.limits.timeout, tally }).await
        }
        (None, Err(problem)) => Err(problem),
    };
    let reply = answer.unwrap_or_else(|problem| {
        app.metrics.count_refusal(problem.kind);
        write(problem)
    });
    app.metrics.count_answer(path, reply.status().as_u16());
    reply
}

/// The path of [`PATHS`] that this is, and what it takes.
pub fn known(path: &str) -> Option<(&'static str, &'static str)> {
    let path = match path {
        path if path.starts_with("/docs/") => DOCS_FILE,
        path if path.starts_with("/page/") => PAGE_FILE,
        path => path,
    };
    PATHS.into_iter().find(|(known, _)| *known == path)
}

async fn route(
    app: &Arc<App>,
    request: Request<Incoming>,
    call: &Call<'_>,
) -> Result<Reply, Problem> {
    let path = request.uri().path();
    let Some((path, allow)) = known(path) else { return Err(not_found(path)) };
    if !allow.split(", ").any(|allowed| allowed == request.method().as_str()) {
        let message = format!("{path} takes {allow}");
        let mut problem =
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
        problem.header = Some((ALLOW, allow));
        return Err(problem);
    }
    match path {
        "/" => information(app),
        "/health" => Ok(health(app)),
        "/ready" => Ok(ready(app)),
        "/metrics" => Ok(reply::plain(metrics::CONTENT_TYPE, app.metrics.text())),
        "/openapi.json" => Ok(reply::plain("application/json", app.openapi.clone())),
        "/docs" => docs("").ok_or_else(|| not_found(path)),
        DOCS_FILE => {
            let path = request.uri().path();
            let file =
                path.strip_prefix("/docs/").filter(|file| !file.is_empty()).unwrap_or("index.html");
            docs(file).ok_or_else(|| not_found(path))
        }
        "/v1/models" => models(app),
        "/v1/completions" => complete(app, request, call, Endpoint::Text).await,
        "/v1/chat/completions" => complete(app, request, call, Endpoint::Chat).await,
        "/generate" => generate(app, request, call).await,
        _ => Err(not_found(request.uri().path())),
    }
}

fn not_found(path: &str) -> Problem {
    let shown: String = path.chars().take(100).collect();
    let message =
        format!("there is no {shown}; there are {}", PATHS.map(|(path, _)| path).join(", "));
    Problem::new(StatusCode::NOT_FOUND, "not_found", message)
}

fn docs(file: &str) -> Option<Reply> {
    docs::file(file).map(|(bytes, content_type)| reply::plain(&content_type, bytes))
}

/// Whether the process is to be left alone: only one whose engine has failed is worth a restart.
fn health(app: &App) -> Reply {
    let status = status(app);
    let code = if status == "failed" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    reply::json(code, &json!({ "status": status }))
}

/// Whether work may be sent here now.
fn ready(app: &App) -> Reply {
    let status = status(app);
    if status == "ok" {
        return reply::json(StatusCode::OK, &json!({ "status": status }));
    }
    let mut reply = reply::json(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": status }));
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    reply
}

fn status(app: &App) -> &'static str {
    match &*app.stage.borrow() {
        Stage::Failed(_) => "failed",
        _ if app.draining.load(Ordering::Relaxed) => "draining",
        Stage::Loading(_) => "loading",
        Stage::Ready(_) => "ok",
    }
}

/// The engine, if it takes work.
pub fn engine(app: &App) -> Result<Handle, Problem> {
    let unavailable = |kind, message: &str| {
        let mut problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, kind, message);
        problem.header = Some((RETRY_AFTER, "1"));
        problem
    };
    if app.draining.load(Ordering::Relaxed) {
        return Err(unavailable(
            "draining",
            "the server is shutting down and takes no new requests",
        ));
    }
    match &*app.stage.borrow() {
        Stage::Ready(handle) => Ok(handle.clone()),
        Stage::Loading(_) => Err(unavailable(
            "loading",
            "the model is still loading; GET /ready tells when it takes work",
        )),
        Stage::Failed(_) => Err(unavailable("stopped", "the engine has stopped")),
    }
}
