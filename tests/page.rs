//! The page at `/`, as a browser shows it.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;

use common::Server;

/// Chromium, driven by `tests/browser/page.py`, which holds the checks.
#[test]
fn a_browser_shows_the_page_and_what_was_drafted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser");
    let server = Server::start(&["--batch-size", "4", "--ctx", "512"]);
    let keyed = Server::start(&["--ctx", "256", "--api-key", "secret"]);
    let run = Command::new("python3")
        .arg(folder.join("page.py"))
        .args([&server, &keyed].map(|server| format!("http://{}", server.addr)))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let told =
        [run.stdout, run.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(run.status.success(), "{told}");
    println!("{told}");
}
