//! llama.cpp's `common/chat` behind the C functions of `vendor/chat/chat.h`: a static library, and its
//! bindings.

use std::fs;
use std::path::Path;

use super::{Tools, bindings, out_dir, root, stop};

/// What to compile; these include llama.cpp's sources.
const FILES: [&str; 2] = ["chat.cpp", "jinja.cpp"];

/// The name of the library, which calls `llama` and `ggml-base`.
pub const LIBRARY: &str = "medusa-chat";

/// Compiles `vendor/chat` into `native`, unless it is there already, and generates bindings. `state`
/// tells one patched `source` from another.
pub fn compile(source: &Path, native: &Path, tools: &Tools, state: &str) {
    println!("cargo::rerun-if-changed=vendor/chat");
    let ours = root().join("vendor/chat");
    let built = native.join("chat");
    println!("cargo::rustc-link-search=native={}", built.display());
    let parts = [&FILES[..], &["chat.h", "inside.h", "include/regex"]].concat();
    let texts = parts.iter().map(|name| fs::read_to_string(ours.join(name)));
    let texts = texts.collect::<Result<String, _>>();
    let state = texts.unwrap_or_else(|e| stop(&format!("{}: {e}", ours.display()))) + state;
    let stamp = built.join("state");
    if fs::read_to_string(&stamp).is_ok_and(|old| old == state) {
        return bind(&ours, tools);
    }
    let mut library = cc::Build::new();
    library.cargo_metadata(false).compiler(&tools.cxx).cpp(true).std("c++17").out_dir(&built);
    // Templates upon templates: a higher level takes twice as long to compile and is no faster.
    library.opt_level(1).debug(false).warnings(false).flag("-w");
    library.include(ours.join("include")).include(source);
    for folder in ["common", "vendor", "include", "ggml/include"] {
        library.include(source.join(folder));
    }
    library.files(FILES.map(|name| ours.join(name))).compile(LIBRARY);
    fs::write(stamp, state).expect("the target folder is writable");
    bind(&ours, tools);
}

fn bind(ours: &Path, tools: &Tools) {
    bindings(tools)
        .header(ours.join("chat.h").to_string_lossy())
        .allowlist_item("medusa_chat.*")
        .layout_tests(false)
        .generate()
        .unwrap_or_else(|e| stop(&format!("bindgen could not read chat.h: {e}")))
        .write_to_file(out_dir().join("chat_bindings.rs"))
        .expect("OUT_DIR is writable");
}
