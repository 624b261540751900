//! The routes, each declared once, and how a request gets to its handler.
//!
//! A route is one entry of [`ROUTES`]: the handler's `utoipa::path` attribute, which generates
//! `__path_...`, has path, method and documentation; the entry adds who may ask and whose errors it answers
//! with. All lists of paths, `Allow`, labels and `/openapi.json` derive from it.

use std::borrow::Cow;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONNECTION, EXPECT, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use percent_encoding::percent_decode_str;
use utoipa::openapi::path::{HttpMethod, Operation};

use super::app::{App, RequestContext};
use super::auth::Access;
use super::body;
use super::completions::{self, chat, complete, generate};
use super::docs::{self, docs, docs_file, document};
use super::embeddings::{self, embed};
use super::health::{self, health, metrics, ready, v1_health};
use super::information::{self, information, model, models, props};
use super::load::{self, loads};
use super::messages::{self, converse, count_tokens};
use super::page::{self, page_file};
use super::problem::ErrorShape::{self, Anthropic, OpenAi, Own};
use super::problem::Problem;
use super::reply::{self, Reply};
use super::responses::{self, respond};
use super::vocabulary::{self, apply_template, detokenize, tokenize, tokenizer_info};
use crate::models::Intake;
use crate::telemetry::ChoiceRecords;

pub static ROUTES: LazyLock<Vec<Route>> = LazyLock::new(|| {
    vec![
        route(information::__path_information, Access::Key, Own, information),
        route(health::__path_health, Access::Open, Own, health),
        route(health::__path_v1_health, Access::Open, OpenAi, v1_health),
        route(health::__path_ready, Access::Open, Own, ready),
        route(health::__path_metrics, Access::Metrics, Own, metrics),
        route(load::__path_loads, Access::Key, OpenAi, loads),
        route(completions::__path_generate, Access::Key, Own, generate),
        route(information::__path_models, Access::Key, OpenAi, models),
        route(information::__path_model, Access::Key, OpenAi, model),
        route(completions::__path_complete, Access::Key, OpenAi, complete),
        route(completions::__path_chat, Access::Key, OpenAi, chat),
        route(responses::__path_respond, Access::Key, OpenAi, respond),
        route(messages::__path_converse, Access::Key, Anthropic, converse),
        route(messages::__path_count_tokens, Access::Key, Anthropic, count_tokens),
        route(embeddings::__path_embed, Access::Key, OpenAi, embed),
        route(vocabulary::__path_tokenize, Access::Key, Own, tokenize),
        route(vocabulary::__path_detokenize, Access::Key, Own, detokenize),
        route(vocabulary::__path_tokenizer_info, Access::Key, Own, tokenizer_info),
        route(vocabulary::__path_apply_template, Access::Key, Own, apply_template),
        route(information::__path_props, Access::Key, Own, props),
        route(docs::__path_document, Access::Open, Own, document),
        route(docs::__path_docs, Access::Open, Own, docs),
        route(docs::__path_docs_file, Access::Open, Own, docs_file),
        route(page::__path_page_file, Access::Key, Own, page_file),
    ]
});

/// Methods of routes, as `Allow` lists them.
const READ: &str = "GET, HEAD, OPTIONS";
const POST: &str = "POST, OPTIONS";
const ALL: &str = "GET, HEAD, POST, OPTIONS";

/// Where Anthropic's clients look for a request's id.
const ANTHROPIC_ID: HeaderName = HeaderName::from_static("request-id");

/// What `OPTIONS` has in place of a path to ask about the server (RFC 9110, 9.3.7).
const WHOLE_SERVER: &str = "*";

pub struct Route {
    /// The path; `{...}` at its end is for any text.
    pub path: String,
    /// Its methods, as `Allow` lists them.
    allow: &'static str,
    pub access: Access,
    /// Whose errors it answers with.
    pub errors: ErrorShape,
    handler: Handler,
    /// Its methods and their documentation.
    pub operation: fn() -> (Vec<HttpMethod>, Operation),
}

type Handler = Box<dyn Fn(RequestContext, Request<Bytes>) -> Answering + Send + Sync>;
type Answering = Pin<Box<dyn Future<Output = Result<Reply, Problem>> + Send>>;

fn route<P, F>(
    _: P,
    access: Access,
    errors: ErrorShape,
    handler: impl Fn(RequestContext, Request<Bytes>) -> F + Send + Sync + 'static,
) -> Route
where
    P: utoipa::Path,
    F: Future<Output = Result<Reply, Problem>> + Send + 'static,
{
    Route {
        path: P::path(),
        allow: if P::methods() == [HttpMethod::Get] { READ } else { POST },
        access,
        errors,
        handler: Box::new(move |cx, request| Box::pin(handler(cx, request))),
        operation: || (P::methods(), P::operation()),
    }
}

impl Route {
    /// What `path` has in place of `{...}`, if it is this route's.
    fn tail<'a>(&self, path: &'a str) -> Option<&'a str> {
        match self.path.split_once('{') {
            Some((start, _)) => path.strip_prefix(start),
            None => (path == self.path).then_some(""),
        }
    }
}

/// A path as routes have it: without escapes. One that is invalid stays, and bytes that are no UTF-8
/// become U+FFFD, so that neither leads anywhere.
pub fn decoded(path: &str) -> Cow<'_, str> {
    percent_decode_str(path).decode_utf8_lossy()
}

/// Paths of OpenAI's dialect without `/v1`, as llama-server has them, too.
const ALIASES: [(&str, &str); 3] = [
    ("/chat/completions", "/v1/chat/completions"),
    ("/responses", "/v1/responses"),
    ("/models", "/v1/models"),
];

pub fn find(path: &str) -> Option<&'static Route> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == path);
    let path = alias.map_or(path, |(_, path)| path);
    ROUTES.iter().find(|route| route.tail(path).is_some())
}

/// Method and path of each route, for `GET /`.
pub fn endpoints() -> Vec<String> {
    let method = |route: &Route| if route.allow == POST { "POST" } else { "GET" };
    ROUTES.iter().map(|route| format!("{} {}", method(route), route.path)).collect()
}

/// Admits a request for a [`decoded`] path and calls the handler of its route; errors become answers.
pub async fn dispatch(
    app: &Arc<App>,
    path: &str,
    route: Option<&'static Route>,
    request: Request<Incoming>,
    id: &Arc<str>,
    record: &Arc<ChoiceRecords>,
) -> Reply {
    let errors = route.map_or_else(|| ErrorShape::of_unknown(path), |route| route.errors);
    let report = load::asked(request.headers());
    let is_held_back = request.headers().contains_key(EXPECT); // until its client has leave to send it
    let (head, mut unread) = request.into_parts();
    let request = Request::from_parts(head, ());
    let handled = async {
        app.hosts.check(&request)?;
        if let Some(preflight) = app.cors.preflight(&request) {
            return Ok(preflight);
        }
        let asks_for_methods = request.method() == Method::OPTIONS;
        if asks_for_methods && path == WHOLE_SERVER {
            return Ok(methods(ALL));
        }
        let access = match route {
            _ if page::find(path, &request).is_some() => Access::Open,
            Some(route) => route.access,
            None => Access::Key, // a later version may have the path
        };
        let tenant = app.auth.admit(access, request.headers())?;
        let Some(route) = route else {
            let known: Vec<&str> = ROUTES.iter().map(|route| route.path.as_str()).collect();
            return Err(Problem::UnknownPath { path: path.to_owned(), known: known.join(", ") });
        };
        if asks_for_methods {
            return Ok(methods(route.allow));
        }
        if !route.allow.split(", ").any(|allowed| allowed == request.method().as_str()) {
            return Err(Problem::MethodNotAllowed { path: &route.path, allow: route.allow });
        }
        let body = match route.allow {
            POST => body::receive(request.headers(), &mut unread, &app.limits).await?,
            _ => Bytes::new(),
        };
        let (app, id, record) = (Arc::clone(app), Arc::clone(id), Arc::clone(record));
        let tail = route.tail(path).unwrap_or_default().to_owned(); // none of an alias
        let cx = RequestContext { app, id, tenant, tail, record, waited: Duration::ZERO };
        (route.handler)(cx, request.map(|()| body)).await
    };
    let mut reply = handled.await.unwrap_or_else(|problem| {
        app.metrics.count_refusal(problem.status_and_kind(Own).1);
        reply::error(&problem, errors, id)
    });
    // Whoever was admitted with a key may know how busy the server is.
    let may_know = route.is_some_and(|route| route.access == Access::Key)
        && !matches!(reply.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    if let Some(format) = report.filter(|_| may_know)
        && let Some(report) = load::report(&app.models, format)
    {
        reply.headers_mut().insert(load::REPORT, report);
    }
    let is_last = reply.headers().contains_key(CONNECTION);
    let is_read = is_last
        || unread.is_end_stream()
        || (!is_held_back && body::drain(&mut unread, &app.limits).await);
    // At the end of the server its clients should find another one.
    if !is_read || app.models.intake() != Intake::Open {
        reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if errors == Anthropic
        && let Ok(id) = HeaderValue::from_str(id)
    {
        reply.headers_mut().insert(ANTHROPIC_ID, id);
    }
    // An unknown path must not become a label.
    let label = route.map_or("other", |route| &route.path);
    app.metrics.count_answer(label, reply.status().as_u16());
    reply
}

/// The answer to a question about methods.
fn methods(allow: &'static str) -> Reply {
    let mut reply = reply::no_content();
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_however_it_is_escaped() {
        let route = |path: &str| find(&decoded(path)).map(|route| route.path.as_str());
        for path in ["/health", "/%68ealth", "/%68%65%61%6C%74%68", "%2fhealth"] {
            assert_eq!(route(path), Some("/health"), "{path}");
        }
        for path in
            ["/%zzhealth", "/health%", "/health%2", "/health%00", "/%ffhealth", "/%2568ealth"]
        {
            assert_eq!(route(path), None, "{path}");
        }
        assert_eq!(route("/v1%2Fmodels/a%2Fb"), Some("/v1/models/{id}"));
        assert_eq!(route("/chat/completions"), Some("/v1/chat/completions"));
        assert_eq!((route("/models"), route("/models/a")), (Some("/v1/models"), None));
    }
}
