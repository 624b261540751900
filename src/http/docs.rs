//! `/docs`: Swagger UI for `/openapi.json`. Its files are part of the program, so that it works
//! without a network.

use std::sync::{Arc, OnceLock};

use utoipa_swagger_ui::{Config, serve};

/// A file of the page, and its type; the page itself is the one without a name.
#[must_use]
pub fn file(name: &str) -> Option<(Vec<u8>, String)> {
    static CONFIG: OnceLock<Arc<Config<'static>>> = OnceLock::new();
    // Seen from the folder that the page's files are in.
    let config = CONFIG.get_or_init(|| Arc::new(Config::from("../openapi.json")));
    let file = serve(name, Arc::clone(config)).ok().flatten()?;
    let mut bytes = file.bytes.into_owned();
    if name.is_empty() {
        // The page stands beside its folder, not in it.
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
