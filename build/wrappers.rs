//! Parts of llama.cpp that have no C interface, behind C functions of ours: a static library for each
//! folder of `vendor` with such functions, and its bindings.

use std::fs;
use std::path::Path;

use super::{Tools, bindings, out_dir, root, stop};

/// A folder `vendor/{name}`, whose header `{name}.h` declares functions `medusa_{name}...`.
pub struct Wrapper {
    name: &'static str,
    /// What to compile; these include llama.cpp's sources.
    sources: &'static [&'static str],
    /// What they include of ours.
    headers: &'static [&'static str],
}

/// All of them. They call `llama` and `ggml-base`.
pub const WRAPPERS: [Wrapper; 4] = [
    // llama.cpp's `common/chat`.
    Wrapper {
        name: "chat",
        sources: &["chat.cpp", "jinja.cpp"],
        headers: &["chat.h", "inside.h", "include/regex"],
    },
    // What a context takes of each device.
    Wrapper { name: "memory", sources: &["memory.cpp"], headers: &["memory.h"] },
    // What a model's own draft layers continue from.
    Wrapper { name: "nextn", sources: &["nextn.cpp"], headers: &["nextn.h"] },
    // Whether a pattern of tensors' names can be read.
    Wrapper { name: "pattern", sources: &["pattern.cpp"], headers: &["pattern.h"] },
];

impl Wrapper {
    /// The name of its library.
    pub fn library(&self) -> String {
        format!("medusa-{}", self.name)
    }

    /// Compiles it into `native`, unless it is there already, and generates bindings. `state` tells
    /// one patched `source` from another.
    pub fn compile(&self, source: &Path, native: &Path, tools: &Tools, state: &str) {
        println!("cargo::rerun-if-changed=vendor/{}", self.name);
        let ours = root().join("vendor").join(self.name);
        let built = native.join(self.name);
        println!("cargo::rustc-link-search=native={}", built.display());
        let parts = [self.sources, self.headers].concat();
        let texts = parts.iter().map(|name| fs::read_to_string(ours.join(name)));
        let texts = texts.collect::<Result<String, _>>();
        let state = texts.unwrap_or_else(|e| stop(&format!("{}: {e}", ours.display()))) + state;
        let stamp = built.join("state");
        if !fs::read_to_string(&stamp).is_ok_and(|old| old == state) {
            let mut library = cc::Build::new();
            library.cargo_metadata(false).compiler(&tools.cxx).cpp(true).std("c++17");
            // Templates upon templates: a higher level takes twice as long to compile and is no
            // faster.
            library.out_dir(&built).opt_level(1).debug(false).warnings(false).flag("-w");
            library.include(ours.join("include")).include(source);
            for folder in ["common", "vendor", "include", "src", "ggml/include"] {
                library.include(source.join(folder));
            }
            let sources = self.sources.iter().map(|name| ours.join(name));
            library.files(sources).compile(&self.library());
            fs::write(stamp, state).expect("the target folder is writable");
        }
        self.bind(&ours, source, tools);
    }

    fn bind(&self, ours: &Path, source: &Path, tools: &Tools) {
        let header = format!("{}.h", self.name);
        let include = |folder: &str| format!("-I{}", source.join(folder).display());
        bindings(tools)
            .header(ours.join(&header).to_string_lossy())
            .clang_args([include("include"), include("ggml/include")])
            .allowlist_item(format!("medusa_{}.*", self.name))
            .layout_tests(false)
            .generate()
            .unwrap_or_else(|e| stop(&format!("bindgen could not read {header}: {e}")))
            .write_to_file(out_dir().join(format!("{}_bindings.rs", self.name)))
            .expect("OUT_DIR is writable");
    }
}
