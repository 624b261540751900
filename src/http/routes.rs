//! The routes, each declared once, and how a request gets to its handler.
//!
//! A route is one entry of [`ROUTES`]: the handler's `utoipa::path` attribute, which generates
//! `__path_...`, has path, method and documentation; the entry adds who may ask. All lists of paths,
//! `Allow`, labels and `/openapi.json` derive from it.

use std::pin::Pin;
use std::sync::{Arc, LazyLock};

use hyper::Request;
use hyper::body::Incoming;
use utoipa::openapi::path::{HttpMethod, Operation};

use super::app::{App, RequestContext};
use super::auth::Access;
use super::completions::{self, chat, complete, generate};
use super::docs::{self, docs, docs_file, document};
use super::health::{self, health, metrics, ready, v1_health};
use super::information::{self, information, model, models, props};
use super::page::{self, page_file};
use super::problem::Problem;
use super::reply::{self, Reply};
use super::vocabulary::{self, detokenize, tokenize};
use crate::telemetry::ChoiceRecords;

pub static ROUTES: LazyLock<Vec<Route>> = LazyLock::new(|| {
    vec![
        route(information::__path_information, Access::Key, information),
        route(health::__path_health, Access::Open, health),
        route(health::__path_v1_health, Access::Open, v1_health),
        route(health::__path_ready, Access::Open, ready),
        route(health::__path_metrics, Access::Metrics, metrics),
        route(completions::__path_generate, Access::Key, generate),
        route(information::__path_models, Access::Key, models),
        route(information::__path_model, Access::Key, model),
        route(completions::__path_complete, Access::Key, complete),
        route(completions::__path_chat, Access::Key, chat),
        route(vocabulary::__path_tokenize, Access::Key, tokenize),
        route(vocabulary::__path_detokenize, Access::Key, detokenize),
        route(information::__path_props, Access::Key, props),
        route(docs::__path_document, Access::Open, document),
        route(docs::__path_docs, Access::Open, docs),
        route(docs::__path_docs_file, Access::Open, docs_file),
        route(page::__path_page_file, Access::Key, page_file),
    ]
});

pub struct Route {
    /// The path; `{...}` at its end is for any text.
    pub path: String,
    /// Its methods, as `Allow` lists them.
    allow: &'static str,
    pub access: Access,
    handler: Handler,
    /// Its methods and their documentation.
    pub operation: fn() -> (Vec<HttpMethod>, Operation),
}

type Handler = Box<dyn Fn(RequestContext, Request<Incoming>) -> Answering + Send + Sync>;
type Answering = Pin<Box<dyn Future<Output = Result<Reply, Problem>> + Send>>;

fn route<P, F>(
    _: P,
    access: Access,
    handler: impl Fn(RequestContext, Request<Incoming>) -> F + Send + Sync + 'static,
) -> Route
where
    P: utoipa::Path,
    F: Future<Output = Result<Reply, Problem>> + Send + 'static,
{
    Route {
        path: P::path(),
        allow: if P::methods() == [HttpMethod::Get] { "GET, HEAD" } else { "POST" },
        access,
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

pub fn find(path: &str) -> Option<&'static Route> {
    ROUTES.iter().find(|route| route.tail(path).is_some())
}

/// Method and path of each route, for `GET /`.
pub fn endpoints() -> Vec<String> {
    let method = |route: &Route| if route.allow == "POST" { "POST" } else { "GET" };
    ROUTES.iter().map(|route| format!("{} {}", method(route), route.path)).collect()
}

/// Admits a request and calls the handler of its route; errors become answers.
pub async fn dispatch(
    app: &Arc<App>,
    route: Option<&'static Route>,
    request: Request<Incoming>,
    id: &Arc<str>,
    record: &Arc<ChoiceRecords>,
) -> Reply {
    let is_openai = request.uri().path().starts_with("/v1"); // its clients expect OpenAI's errors
    let handled = async {
        let access = match route {
            _ if page::find(&request).is_some() => Access::Open,
            Some(route) => route.access,
            None => Access::Key, // a later version may have the path
        };
        let tenant = app.auth.admit(access, request.headers())?;
        let path = request.uri().path();
        let Some((route, tail)) = route.and_then(|route| Some((route, route.tail(path)?))) else {
            let known: Vec<&str> = ROUTES.iter().map(|route| route.path.as_str()).collect();
            return Err(Problem::UnknownPath { path: path.to_owned(), known: known.join(", ") });
        };
        if !route.allow.split(", ").any(|allowed| allowed == request.method().as_str()) {
            return Err(Problem::MethodNotAllowed { path: &route.path, allow: route.allow });
        }
        let (app, id, record) = (Arc::clone(app), Arc::clone(id), Arc::clone(record));
        let cx = RequestContext { app, id, tenant, tail: tail.to_owned(), record };
        (route.handler)(cx, request).await
    };
    let reply = handled.await.unwrap_or_else(|problem| {
        app.metrics.count_refusal(problem.status_and_kind(false).1);
        reply::error(&problem, is_openai)
    });
    // An unknown path must not become a label.
    let label = route.map_or("other", |route| &route.path);
    app.metrics.count_answer(label, reply.status().as_u16());
    reply
}
