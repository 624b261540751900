//! The CPU's side: ggml's CPU backend for several kinds of processors in one binary, and our kernels
//! as their tests call them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Tools, configure, find_program, is_own_checkout, native_cpu, stop};

/// A copy of ggml's CPU backend.
struct Variant {
    /// As ggml names it: the kind of processor that first had these instructions.
    name: &'static str,
    /// What CMake switches on, beside what all copies have: `GGML_<OPTION>=ON`.
    options: &'static [&'static str],
    /// What the processor must have, as the compiler's `__builtin_cpu_supports` names it.
    needs: &'static [&'static str],
}

/// What every copy needs; CMake switches it on where it must not look at this machine.
const BASE: [&str; 4] = ["avx2", "fma", "f16c", "bmi2"];

/// GGML_AVX512 is these.
const AVX512: [&str; 5] = ["avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"];

/// Best first. The last one is what `compile` builds.
const VARIANTS: [Variant; 5] = [
    Variant {
        name: "sapphirerapids",
        options: &["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_TILE", "AMX_INT8"],
        needs: &["avx512vbmi", "avx512vnni", "avx512bf16", "amx-tile", "amx-int8"],
    },
    Variant {
        name: "zen4",
        options: &["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"],
        needs: &["avx512vbmi", "avx512vnni", "avx512bf16"],
    },
    Variant { name: "cascadelake", options: &["AVX512", "AVX512_VNNI"], needs: &["avx512vnni"] },
    Variant { name: "alderlake", options: &["AVX_VNNI"], needs: &["avxvnni"] },
    Variant { name: "haswell", options: &[], needs: &[] },
];

impl Variant {
    /// A line of `variants.inc`, for `vendor/ggml/variants.cpp`.
    fn line(&self) -> String {
        let avx512 = AVX512.iter().filter(|_| self.options.contains(&"AVX512"));
        let supports = |name| format!("__builtin_cpu_supports(\"{name}\")");
        let needs = BASE.iter().chain(avx512).chain(self.needs).map(supports);
        format!("VARIANT({}, {})\n", self.name, needs.collect::<Vec<_>>().join(" && "))
    }
}

/// The functions of ggml's CPU backend that the rest of the program calls by name.
const ENTRY_POINTS: [&str; 5] = [
    "ggml_backend_cpu_reg",
    "ggml_graph_plan",
    "ggml_graph_compute",
    "ggml_threadpool_new",
    "ggml_threadpool_free",
];

/// Whether the binary contains ggml's CPU backend for each of `VARIANTS`, to choose at run time:
/// where it is not built for this machine alone, and the linker can rename symbols.
pub fn has_variants() -> bool {
    let target = |key: &str| env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    !native_cpu() && target("ARCH") == "x86_64" && target("OS") == "linux"
}

/// What to link instead of `ggml-cpu`.
pub const VARIANTS_LIBRARY: &str = "ggml-cpu-variants";

/// Compiles `VARIANTS_LIBRARY` to `lib`, which has ggml-cpu compiled as the last of `VARIANTS`.
pub fn compile_variants(source: &Path, lib: &Path, tools: &Tools) {
    println!("cargo::rerun-if-changed=vendor/ggml");
    let folder = lib.with_file_name("variants");
    fs::create_dir_all(&folder).expect("the target folder is writable");
    let objcopy = find_program("OBJCOPY", "objcopy", "--version")
        .unwrap_or_else(|| stop("objcopy is missing: run `apt-get install binutils`"));
    let mut library = cc::Build::new();
    library.cargo_metadata(false).compiler(&tools.cxx).cpp(true).std("c++17").opt_level(3);
    library.include(source.join("ggml/include")).include(&folder).out_dir(lib);
    for variant in &VARIANTS {
        let archive = if variant.options.is_empty() {
            lib.join("libggml-cpu.a")
        } else {
            let mut config = configure(source, &folder.join(variant.name), tools);
            for option in variant.options {
                config.define(format!("GGML_{option}"), "ON");
            }
            config.build_target("ggml-cpu").build().join("build/ggml/src/libggml-cpu.a")
        };
        library.object(hide(&archive, &folder, variant.name, tools, &objcopy));
    }
    let lines: String = VARIANTS.iter().map(Variant::line).collect();
    fs::write(folder.join("variants.inc"), lines).expect("the target folder is writable");
    library.file("vendor/ggml/variants.cpp").compile(VARIANTS_LIBRARY);
}

/// One object file with all of `archive`, of which others see the entry points only, with a suffix.
fn hide(archive: &Path, folder: &Path, suffix: &str, tools: &Tools, objcopy: &Path) -> PathBuf {
    let whole = folder.join(format!("{suffix}-whole.o"));
    let hidden = folder.join(format!("{suffix}.o"));
    // Groups would let the linker take one copy's inline functions for another's.
    run(Command::new(&tools.cxx)
        .args(["-r", "-nostdlib", "-Wl,--force-group-allocation", "-Wl,--whole-archive"])
        .arg(archive)
        .arg("-o")
        .arg(&whole));
    let keep = ENTRY_POINTS.map(|name| format!("--keep-global-symbol={name}"));
    run(Command::new(objcopy).args(keep).arg(&whole).arg(&hidden));
    let rename = ENTRY_POINTS.map(|name| format!("--redefine-sym={name}={name}_{suffix}"));
    run(Command::new(objcopy).args(rename).arg(&hidden));
    hidden
}

fn run(command: &mut Command) {
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => stop(&format!("{} failed, {status}: {command:?}", program(command))),
        Err(e) => stop(&format!("{} does not run: {e}", program(command))),
    }
}

fn program(command: &Command) -> String {
    command.get_program().display().to_string()
}

/// Compiles `vendor/ggml/testing.cpp` for `tests/cpu_kernels`: with the kernels for each set of
/// instructions that this CPU has, and without them for graphs that reach them through ggml. The
/// server links none of it.
pub fn compile_for_tests(source: &Path, tools: &Tools) {
    println!(
        "cargo::rustc-check-cfg=cfg(cpu_kernels, values(\"graph\", \"avx2\", \"avx512\", \"neon\"))"
    );
    if is_own_checkout() || has_variants() {
        return; // headers may differ, or symbols are hidden
    }
    let sets = if env::var("HOST") == env::var("TARGET") { instruction_sets() } else { vec![] };
    let graph = (!sets.is_empty()).then_some(("graph", ""));
    for (name, flags) in sets.into_iter().chain(graph) {
        let mut build = cc::Build::new();
        build.compiler(&tools.cxx).cpp(true).cpp_link_stdlib(None).std("c++17").opt_level(3);
        build.warnings(true).extra_warnings(true).warnings_into_errors(true);
        // GCC's own header, for vectors that are undefined on purpose.
        build.flag_if_supported("-Wno-maybe-uninitialized");
        for folder in ["ggml/include", "ggml/src", "ggml/src/ggml-cpu"] {
            build.flag("-isystem").flag(source.join(folder));
        }
        build.flags(flags.split_whitespace());
        if name != "graph" {
            build.define("KERNELS", name);
        }
        build.file("vendor/ggml/testing.cpp").compile(&format!("kernels-{name}"));
        println!("cargo::rustc-cfg=cpu_kernels=\"{name}\"");
    }
}

/// Sets of instructions that the kernels are written for and this CPU has, with the compiler's
/// flags.
fn instruction_sets() -> Vec<(&'static str, &'static str)> {
    let mut sets = vec![];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") {
            sets.push(("avx2", "-mavx2 -mfma -mf16c"));
            if has!("avx512vnni") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                sets.push((
                    "avx512",
                    "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
                ));
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    sets.push(("neon", ""));
    sets
}
