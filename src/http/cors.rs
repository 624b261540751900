//! Answers that pages of other origins may read (CORS): only of those that were named.

use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderValue, ORIGIN, VARY,
};
use hyper::{Method, Request};

use super::reply::{self, Reply};

pub const ANY: &str = "*";
const MAX_AGE_S: &str = "600";

/// The origins whose pages may read answers, as browsers send them, or [`ANY`]; none by default.
#[derive(Clone, Debug, Default)]
pub struct Cors(pub Vec<HeaderValue>);

impl Cors {
    /// The answer to a preflight, which has no key yet.
    pub fn preflight<B>(&self, request: &Request<B>) -> Option<Reply> {
        let asks = request.method() == Method::OPTIONS
            && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        self.allowed(request.headers()).filter(|_| asks)?;
        let mut reply = reply::no_content();
        let headers = reply.headers_mut();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, HEAD, POST"));
        // `*` would not cover Authorization; OpenAI's client sends headers of its own.
        if let Some(wanted) = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS) {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE_S));
        Some(reply)
    }

    /// The origin that an answer to a page with these headers allows.
    pub fn allowed(&self, asked: &HeaderMap) -> Option<HeaderValue> {
        let origin = asked.get(ORIGIN)?;
        self.0.iter().find(|allowed| *allowed == ANY || *allowed == origin).cloned()
    }

    /// Writes that origin on an answer. Caches must know that answers differ by origin, those that
    /// are not allowed included.
    pub fn mark(&self, allowed: Option<HeaderValue>, headers: &mut HeaderMap) {
        if self.0.is_empty() {
            return;
        }
        headers.append(VARY, HeaderValue::from_static("origin"));
        if let Some(allowed) = allowed {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
            let exposed = HeaderValue::from_static("x-request-id, retry-after, x-ignored-fields");
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
    }
}
