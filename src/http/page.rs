//! The page for browsers at `/`: "watch it think". Its files are part of the program; it knows of the
//! engine what the API reports to any client.

use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;
use hyper::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH,
    REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, StatusCode};

use super::accept::quality;
use super::api::answers::ErrorBody;
use super::app::RequestContext;
use super::problem::Problem;
use super::reply::{self, Reply};

const FILES: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/page/page.js", "text/javascript; charset=utf-8", include_str!("page/page.js")),
    ("/page/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];
/// Its own files and this server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page or a file of it, if this request gets one: path, type and content.
pub fn find<B>(
    path: &str,
    request: &Request<B>,
) -> Option<&'static (&'static str, &'static str, &'static str)> {
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let found = FILES.iter().find(|(of, ..)| *of == path);
    found.filter(|(path, ..)| is_read && (*path != "/" || prefers_html(request.headers())))
}

/// What the page for browsers loads
#[utoipa::path(get, path = "/page/{file}", tag = "server", params(("file" = String, Path, example = "page.css")), responses(
    (status = 200, description = "The file", content((String = "text/css; charset=utf-8"), (String = "text/javascript; charset=utf-8"), (String = "image/svg+xml"))),
    (status = 304, description = "The file is as the client has it"),
    (status = 401, description = "There is no such file, and the request has no key", body = ErrorBody),
    (status = 404, description = "There is no such file", body = ErrorBody),
))]
pub async fn page_file(cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let path = format!("/page/{}", cx.tail);
    file(&path, &request).ok_or(Problem::NotFound(path))
}

pub fn file<B>(path: &str, request: &Request<B>) -> Option<Reply> {
    let &(_, content_type, content) = find(path, request)?;
    // The hasher has no keys: the same content has the same name in every process.
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    let tag = format!("\"{:016x}\"", hasher.finish());
    let seen =
        request.headers().get_all(IF_NONE_MATCH).iter().filter_map(|tags| tags.to_str().ok());
    let mut seen = seen.flat_map(|tags| tags.split(','));
    let is_known = seen.any(|seen| seen.trim().trim_start_matches("W/") == tag);
    let (status, body) =
        if is_known { (StatusCode::NOT_MODIFIED, "") } else { (StatusCode::OK, content) };
    let mut reply = reply::whole(status, content_type, body);
    let headers = reply.headers_mut();
    // Kept, but revalidated each time: another version of the server may take over the address.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ETAG, HeaderValue::from_str(&tag).expect("hexadecimal"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if path == "/" {
        headers.insert(VARY, HeaderValue::from_name(ACCEPT));
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
    Some(reply)
}

/// Browsers name `text/html`. Programs name JSON, take anything or say nothing, and get JSON.
fn prefers_html(headers: &HeaderMap) -> bool {
    quality(headers, "text", "html") > quality(headers, "application", "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefers_html(accept: &[&'static str]) -> bool {
        let headers = accept.iter().map(|value| (ACCEPT, HeaderValue::from_static(value)));
        super::prefers_html(&headers.collect())
    }

    #[test]
    fn html_is_for_those_who_want_it_more_than_json() {
        let browsers = [
            "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
            "text/html, application/xhtml+xml, image/jxr, */*",
            "text/html",
            "TEXT/HTML; level=1, application/json;q=0.9",
            "text/*",
            "application/json;q=0.2 , text/*;q=0.3",
        ];
        for accept in browsers {
            assert!(prefers_html(&[accept]), "{accept}");
        }
        let programs = [
            "*/*",
            "",
            "application/json",
            "application/json, text/html",
            "application/json, text/plain, */*",
            "text/html;q=0",
            "text/html;q=x",
            "text/html;q=NaN",
            "text/*, text/html;q=0",
            "image/png",
            "html",
        ];
        for accept in programs {
            assert!(!prefers_html(&[accept]), "{accept}");
        }
        assert!(!prefers_html(&[]) && prefers_html(&["application/json;q=0.5", "text/html"]));
    }

    /// The limit is ours: the page should load at once over any network.
    #[test]
    fn the_page_is_small_and_names_no_other_host() {
        assert!(FILES.iter().map(|(.., content)| content.len()).sum::<usize>() < 40_000);
        for (path, _, content) in FILES {
            assert!(!content.replace("http://www.w3.org/2000/svg", "").contains("://"), "{path}");
        }
        let page = FILES[0].2;
        for (path, ..) in &FILES[1..] {
            assert!(page.contains(&format!("\"{}\"", &path[1..])), "{path}");
        }
        assert!(
            !page.contains("<style") && !page.contains("style=") && !page.contains("onclick"),
            "the policy forbids what is inline"
        );
    }
}
