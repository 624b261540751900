//! `/docs`: Swagger UI for `/openapi.json`. Its files are part of the program.

use std::sync::Arc;

use bytes::Bytes;
use hyper::{Request, StatusCode};
use utoipa_swagger_ui::{Config, serve};

use super::api::answers::ErrorBody;
use super::app::RequestContext;
use super::problem::Problem;
use super::reply::{self, Reply};

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "server", responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub async fn document(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    Ok(reply::whole(StatusCode::OK, "application/json", cx.app.openapi()))
}

/// This document as a page to read and try
#[utoipa::path(get, path = "/docs", tag = "server", responses((status = 200, description = "Swagger UI", body = String, content_type = "text/html")))]
pub async fn docs(_: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    answer("")
}

/// What the page loads
#[utoipa::path(get, path = "/docs/{file}", tag = "server", params(("file" = String, Path, example = "swagger-ui.css")), responses(
    (status = 200, description = "The file", content((String = "text/css"), (String = "text/javascript"), (String = "text/html"), (String = "image/png"))),
    (status = 404, description = "There is no such file", body = ErrorBody),
))]
pub async fn docs_file(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    answer(if cx.tail.is_empty() { "index.html" } else { &cx.tail })
}

fn answer(name: &str) -> Result<Reply, Problem> {
    let (bytes, content_type) =
        file(name).ok_or_else(|| Problem::NotFound(format!("/docs/{name}")))?;
    Ok(reply::whole(StatusCode::OK, &content_type, bytes))
}

/// A file of the page, and its type; the page itself is the one without a name.
fn file(name: &str) -> Option<(Vec<u8>, String)> {
    // Relative to the folder of the page's files.
    let config = Arc::new(Config::from("../openapi.json"));
    let file = serve(name, config).ok().flatten()?;
    let mut bytes = file.bytes.into_owned();
    if name.is_empty() {
        // The page is beside its folder, not in it.
        let page = String::from_utf8_lossy(&bytes);
        bytes = page.replacen("<head>", "<head>\n    <base href=\"docs/\">", 1).into_bytes();
    }
    Some((bytes, file.content_type))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_nobody_else() {
        let (page, kind) = file("").unwrap();
        let page = String::from_utf8(page).unwrap();
        assert!(
            kind == "text/html" && page.contains("<base href=\"docs/\">") && !page.contains("://"),
            "{page}"
        );
        let (script, _) = file("swagger-initializer.js").unwrap();
        assert!(String::from_utf8(script).unwrap().contains("\"../openapi.json\""));
        for name in page.split(['"', '\'']).filter_map(|name| name.strip_prefix("./")) {
            assert!(file(name).is_some(), "{name}");
        }
        assert!(file("../Cargo.toml").is_none() && file("nothing").is_none());
    }
}
