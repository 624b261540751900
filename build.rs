//! Builds llama.cpp and its bindings, and our CUDA kernels where they are asked for.
//!
//! 1. Find the source: `LLAMA_CPP_DIR`, or what `make vendor` laid into `vendor/crates/`.
//! 2. Check the tools: CMake, Ninja, a C++ compiler, libclang. What is missing is named with the
//!    command that mends it.
//! 3. Copy the source into the target folder, apply `vendor/patches/` to the copy, and add our
//!    kernels from `vendor/ggml/`.
//! 4. Compile `llama` and `ggml` as static libraries; where the binary must run on other CPUs of the
//!    same family too, ggml's CPU backend once for each kind of them (`build/cpu.rs`).
//! 5. Compile our kernels once more, as `tests/cpu_kernels` calls them.
//! 6. Compile what llama.cpp has in C++ only behind our C functions in `vendor/chat`,
//!    `vendor/memory` and `vendor/pattern` (`build/wrappers.rs`).
//! 7. Generate bindings for the names that start with `llama_`, `ggml_`, `gguf_`, without the
//!    `llama_`; and for `cuda/args.h`, which our kernels and `src/gpu` share.
//! 8. Tell cargo what to link.
//! 9. With feature `cuda-kernels`: compile `cuda/` to `OUT_DIR/kernels.fatbin` (`build/cuda.rs`).
//!
//! Environment: `LLAMA_CPP_DIR` another source tree; `CMAKE`, `CXX` the tools; `LLAMA_NATIVE=0` for
//! a binary that must run on other CPUs of the same family. With the CUDA features:
//! `CUDAToolkit_ROOT`, `CUDACXX` where nvcc is; `CUDA_ARCHS` what to compile for, as CMake writes
//! it ("90", "80;90", "90-real").

#[path = "build/cpu.rs"]
mod cpu;
#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/wrappers.rs"]
mod wrappers;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

use diffy::patch_set::{FileOperation, ParseOptions, PatchSet};

fn main() {
    let tree = source_tree();
    let tools = Tools::find();
    if let Some(nvcc) = &tools.nvcc {
        cuda::compile_kernels(nvcc); // first: seconds, and what is wrong there shows at once
    }
    let native = native_dir(tools.cuda);
    let source = patched(&tree, &native);
    set_cmake(&tools.cmake);
    let lib = compile(&source, &native, &tools);
    let cpu = if cpu::has_variants() {
        cpu::compile_variants(&source, &lib, &tools);
        cpu::VARIANTS_LIBRARY
    } else {
        "ggml-cpu"
    };
    cpu::compile_for_tests(&source, &tools);
    let state = state_of(&native);
    name_arithmetic(&tools);
    wrappers::WRAPPERS.iter().for_each(|ours| ours.compile(&source, &native, &tools, &state));
    generate_bindings(&source, &tools);
    generate_kernel_args(&tools);
    link(&lib, cpu, &tools);
}

/// Stops the build with one line: what is missing and how to mend it.
fn stop(what: &str) -> ! {
    println!("cargo::error={what}");
    exit(1);
}

fn var(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|v| !v.is_empty())
}

fn root() -> PathBuf {
    PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"))
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"))
}

/// Where llama.cpp is built: beside the build script's folders, so that `cargo build`, `clippy`,
/// `test` and `bench`, for each of which cargo runs this script anew, compile it once. Cargo holds
/// a lock on the whole target folder meanwhile.
fn native_dir(cuda: bool) -> PathBuf {
    let out_dir = out_dir();
    let builds =
        out_dir.ancestors().nth(2).expect("OUT_DIR is target/<profile>/build/<package>/out");
    builds.join(format!(
        "llama.cpp-{}{}",
        if cuda { "cuda" } else { "cpu" },
        if native_cpu() { "" } else { "-portable" }
    ))
}

/// Whether the code may use all that this machine's CPU has.
fn native_cpu() -> bool {
    var("LLAMA_NATIVE").as_deref() != Some("0")
}

/// Whether the source is one that our patches were not made for.
fn is_own_checkout() -> bool {
    var("LLAMA_CPP_DIR").is_some()
}

fn source_tree() -> PathBuf {
    let tree = var("LLAMA_CPP_DIR")
        .map_or_else(|| root().join("vendor/crates/llama-cpp-sys-2/llama.cpp"), PathBuf::from);
    let header = tree.join("include/llama.h");
    if !header.is_file() {
        stop(&format!(
            "llama.cpp's source is missing ({} does not exist): run `make vendor`, or set LLAMA_CPP_DIR to a checkout",
            header.display()
        ));
    }
    println!("cargo::rerun-if-changed={}", header.display());
    println!("cargo::rerun-if-changed=vendor/crates/.locked"); // written when the tree is laid anew
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    tree
}

/// A copy of `tree` with our patches and kernels. It is made anew when a patch or the tree changed,
/// and a file of our kernels is written when it changed, so that CMake finds the other objects up
/// to date.
fn patched(tree: &Path, native: &Path) -> PathBuf {
    let copy = copy_with_patches(tree, native);
    println!("cargo::rerun-if-changed=vendor/ggml");
    for name in OUR_KERNELS {
        let (ours, there) =
            (root().join("vendor/ggml").join(name), copy.join("ggml/src/ggml-cpu").join(name));
        let text = fs::read(&ours).unwrap_or_else(|e| stop(&format!("{}: {e}", ours.display())));
        if fs::read(&there).is_ok_and(|old| old == text) {
            continue;
        }
        fs::write(&there, text).unwrap_or_else(|e| stop(&format!("{}: {e}", there.display())));
    }
    copy
}

/// What the patches call. A checkout that they do not apply to has the files and does not compile
/// them.
const OUR_KERNELS: [&str; 8] = [
    "attention.cpp",
    "attention.h",
    "columns.h",
    "few-rows.cpp",
    "few-rows.h",
    "floats.h",
    "lanes.h",
    "waiting.h",
];

/// What the patched copy was made of.
fn state_of(native: &Path) -> String {
    fs::read_to_string(native.join("source.state")).unwrap_or_default()
}

/// Names what decides the bits of results, beside the processor: our patches and kernels, and the
/// compiler. llama.cpp's own release is known at run time.
fn name_arithmetic(tools: &Tools) {
    let mut hasher = DefaultHasher::new();
    let kernels = OUR_KERNELS.map(|name| root().join("vendor/ggml").join(name));
    for file in files_in(&root().join("vendor/patches"), "patch").iter().chain(&kernels) {
        fs::read(file).unwrap_or_default().hash(&mut hasher);
    }
    let compiler = Command::new(&tools.cxx).arg("--version").output();
    compiler.map(|said| said.stdout).unwrap_or_default().hash(&mut hasher);
    is_own_checkout().hash(&mut hasher);
    println!("cargo::rustc-env=MEDUSA_ARITHMETIC={:016x}", hasher.finish());
}

fn copy_with_patches(tree: &Path, native: &Path) -> PathBuf {
    println!("cargo::rerun-if-changed=vendor/patches");
    let patches = files_in(&root().join("vendor/patches"), "patch");
    let texts: Vec<String> =
        patches.iter().map(|p| fs::read_to_string(p).expect("a patch is a text file")).collect();
    let laid = |path: &str| fs::metadata(root().join(path)).and_then(|m| m.modified()).ok();
    let state =
        format!("{} {:?}\n{}", tree.display(), laid("vendor/crates/.locked"), texts.concat());

    let (copy, stamp) = (native.join("source"), native.join("source.state"));
    let own_checkout = is_own_checkout();
    if !own_checkout && fs::read_to_string(&stamp).is_ok_and(|old| old == state) {
        return copy;
    }
    let _ = fs::remove_file(&stamp);
    let next = native.join("source.next");
    let _ = fs::remove_dir_all(&next);
    let lay = |from: &Path, to: &Path| {
        copy_tree(from, to).unwrap_or_else(|e| {
            stop(&format!("cannot copy {} into the build folder: {e}", from.display()))
        });
    };
    lay(tree, &next);
    for (path, text) in patches.iter().zip(&texts) {
        let name = path.file_name().unwrap_or_default().display();
        match apply(text, &next) {
            Ok(()) => {}
            Err(e) if own_checkout => {
                println!(
                    "cargo::warning={name} does not apply to LLAMA_CPP_DIR, built without it: {e}"
                )
            }
            Err(e) => stop(&format!(
                "{name} does not apply to the vendored source, run `make vendor`: {e}"
            )),
        }
    }
    // Files that stay the same keep their times, so that only what changed is compiled again.
    remove_others(&copy, &next);
    lay(&next, &copy);
    let _ = fs::remove_dir_all(&next);
    fs::write(&stamp, state).expect("OUT_DIR is writable");
    copy
}

/// Removes the files of a tree that another one does not have.
fn remove_others(tree: &Path, other: &Path) {
    for entry in fs::read_dir(tree).into_iter().flatten().flatten() {
        let (path, other) = (entry.path(), other.join(entry.file_name()));
        if path.is_dir() && other.is_dir() {
            remove_others(&path, &other);
        } else if path.is_dir() {
            let _ = fs::remove_dir_all(path);
        } else if !other.is_file() {
            let _ = fs::remove_file(path);
        }
    }
}

/// The files with an extension, in the order of their names.
fn files_in(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(extension.as_ref()))
        .collect();
    files.sort();
    files
}

/// Copies the files that are not there already, or are others.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, to) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() && entry.file_name() != ".git" {
            copy_tree(&entry.path(), &to)?;
        } else if kind.is_file() {
            let text = fs::read(entry.path())?;
            if !fs::read(&to).is_ok_and(|old| old == text) {
                fs::write(to, text)?;
            }
        }
    }
    Ok(())
}

/// Applies a patch in git's format to the files below `tree`: all of it, or nothing.
fn apply(patch: &str, tree: &Path) -> Result<(), String> {
    let mut changed = vec![];
    for file in PatchSet::parse(patch, ParseOptions::gitdiff()) {
        let file = file.map_err(|e| e.to_string())?;
        let (old, new) = match file.operation().strip_prefix(1) {
            FileOperation::Create(path) => (String::new(), tree.join(&*path)),
            FileOperation::Modify { original, .. } => {
                let path = tree.join(&*original);
                (fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?, path)
            }
            other => return Err(format!("{other:?} is not supported")),
        };
        let text = file.patch().as_text().ok_or("binary")?;
        changed.push((new, diffy::apply(&old, text).map_err(|e| e.to_string())?));
    }
    changed.iter().try_for_each(|(path, text)| {
        fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
    })
}

/// The programs the build calls; each was run once.
struct Tools {
    cmake: PathBuf,
    ninja: Option<PathBuf>,
    cxx: PathBuf,
    /// With feature `cuda-kernels`, which `cuda` contains.
    nvcc: Option<PathBuf>,
    /// Whether ggml's CUDA backend is built.
    cuda: bool,
}

impl Tools {
    fn find() -> Self {
        let cmake = find_program("CMAKE", "cmake", "--version").unwrap_or_else(|| {
            stop("cmake is missing: run `make tools`, or `apt-get install cmake`")
        });
        let cxx = find_program("CXX", "c++", "--version")
            .unwrap_or_else(|| stop("a C++ compiler is missing: run `apt-get install g++`"));
        if let Err(e) = bindgen_can_load_libclang() {
            stop(&format!(
                "libclang is missing ({e}): run `make tools`, or `apt-get install libclang-dev`"
            ));
        }
        let cuda = env::var_os("CARGO_FEATURE_CUDA").is_some();
        let nvcc =
            env::var_os("CARGO_FEATURE_CUDA_KERNELS").is_some().then(|| cuda::find_nvcc(cuda));
        Self { cmake, ninja: find_program("NINJA", "ninja", "--version"), cxx, nvcc, cuda }
    }
}

/// The program that `variable` names, or `name` in PATH, or the one `scripts/setup` fetched; `None`
/// if none runs.
fn find_program(variable: &str, name: &str, probe: &str) -> Option<PathBuf> {
    let runs = |p: &PathBuf| Command::new(p).arg(probe).output().is_ok_and(|o| o.status.success());
    if let Some(named) = var(variable) {
        return Some(PathBuf::from(named)).filter(runs);
    }
    [PathBuf::from(name), root().join(".tools/bin").join(name)].into_iter().find(runs)
}

fn bindgen_can_load_libclang() -> Result<(), String> {
    // clang_version() panics when the library cannot be loaded; the message says where it looked.
    std::panic::set_hook(Box::new(|_| {}));
    let loaded = std::panic::catch_unwind(bindgen::clang_version).map(|_| ()).map_err(|p| {
        let text = p.downcast_ref::<String>().cloned().unwrap_or_default();
        text.lines().next().unwrap_or("not found").chars().take(160).collect()
    });
    let _ = std::panic::take_hook();
    loaded
}

/// A build of llama.cpp in `folder`, as all our builds of it are.
fn configure(source: &Path, folder: &Path, tools: &Tools) -> cmake::Config {
    let mut config = cmake::Config::new(source);
    config.no_default_flags(true); // cargo's target flags would pin -march to the oldest CPU
    config.define("CMAKE_CXX_COMPILER", &tools.cxx);
    if let Some(ninja) = &tools.ninja {
        config.generator("Ninja").define("CMAKE_MAKE_PROGRAM", ninja);
    }
    config.out_dir(folder).profile("Release").define("BUILD_SHARED_LIBS", "OFF");
    for part in ["COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP"] {
        config.define(format!("LLAMA_BUILD_{part}"), "OFF");
    }
    config.define("GGML_NATIVE", if native_cpu() { "ON" } else { "OFF" });
    if cpu::has_variants() {
        // GCC's unique symbols cannot be hidden; other compilers have none.
        let flag = "-fno-gnu-unique";
        let mut compiler = cc::Build::new();
        if compiler.compiler(&tools.cxx).cpp(true).is_flag_supported(flag).unwrap_or(false) {
            config.cxxflag(flag);
        }
    }
    // Workers on other machines. With RDMA the binary would need a library wherever this machine has one.
    config.define("GGML_RPC", "ON").define("GGML_RPC_RDMA", "OFF");
    config.define("GGML_CCACHE", "OFF");
    config.define("GGML_OPENMP", "OFF"); // its threads spin at every barrier; see vendor/ggml/waiting.h
    config
}

/// Compiles and installs; returns the folder of the static libraries.
fn compile(source: &Path, native: &Path, tools: &Tools) -> PathBuf {
    let mut config = configure(source, native, tools);
    if let Some(nvcc) = tools.nvcc.as_ref().filter(|_| tools.cuda) {
        // Without virtual memory nothing links libcuda, so that the binary starts on a host without
        // a driver.
        config
            .define("GGML_CUDA", "ON")
            .define("GGML_CUDA_NO_VMM", "ON")
            .define("GGML_CUDA_NCCL", "OFF");
        config.define("CMAKE_CUDA_COMPILER", nvcc).define("CUDAToolkit_ROOT", cuda::toolkit(nvcc));
        match var("CUDA_ARCHS") {
            Some(archs) => _ = config.define("CMAKE_CUDA_ARCHITECTURES", archs),
            // ggml compiles for the cards that are here; without one nvcc would quietly take an old
            // architecture.
            None if native_cpu() && !cuda::sees_card(nvcc) => stop(
                "there is no card here to compile for: name architectures, as in CUDA_ARCHS=90",
            ),
            None => {}
        }
    }
    let installed = config.build();
    // Some distributions install into lib64.
    ["lib", "lib64"]
        .map(|name| installed.join(name))
        .into_iter()
        .find(|l| l.is_dir())
        .unwrap_or(installed)
}

/// The cmake crate takes the program's path from the environment only.
#[allow(unsafe_code)]
fn set_cmake(path: &Path) {
    // SAFETY: the build script has one thread, so nobody reads the environment meanwhile.
    unsafe { env::set_var("CMAKE", path) }
}

/// A builder that finds the compiler's builtin headers (stddef.h ...): the libclang wheel has none.
/// They come after clang's own if it has any.
fn bindings(tools: &Tools) -> bindgen::Builder {
    let builtin = Command::new(&tools.cxx)
        .arg("-print-file-name=include")
        .output()
        .expect("the compiler ran before");
    let builtin = String::from_utf8_lossy(&builtin.stdout).trim().to_owned();
    bindgen::Builder::default().clang_args(["-idirafter", &builtin])
}

fn generate_bindings(source: &Path, tools: &Tools) {
    bindings(tools)
        .header(source.join("include/llama.h").to_string_lossy())
        .header(source.join("ggml/include/ggml-rpc.h").to_string_lossy())
        .clang_arg(format!("-I{}", source.join("include").display()))
        .clang_arg(format!("-I{}", source.join("ggml/include").display()))
        .allowlist_item("(llama|ggml|gguf|LLAMA|GGML|RPC_PROTO)_.*")
        .blocklist_function("ggml_(v?fprintf|.*print.*)")
        .prepend_enum_name(false)
        .layout_tests(false)
        .parse_callbacks(Box::new(WithoutPrefix))
        .generate()
        .unwrap_or_else(|e| stop(&format!("bindgen could not read llama.h: {e}")))
        .write_to_file(out_dir().join("bindings.rs"))
        .expect("OUT_DIR is writable");
}

/// `llama_decode` becomes `decode`, so that calls read `sys::decode`; ggml's names stay as they
/// are.
#[derive(Debug)]
struct WithoutPrefix;

impl bindgen::callbacks::ParseCallbacks for WithoutPrefix {
    fn item_name(&self, item: bindgen::callbacks::ItemInfo) -> Option<String> {
        item.name
            .strip_prefix("llama_")
            .filter(|rest| *rest != "model" && *rest != "context")
            .map(str::to_owned)
    }
}

/// The kernels' argument structs and constants. bindgen asserts their layout in Rust as the header
/// does in C++.
fn generate_kernel_args(tools: &Tools) {
    println!("cargo::rerun-if-changed=cuda/args.h");
    bindings(tools)
        .header(root().join("cuda/args.h").to_string_lossy())
        .clang_args(["-x", "c++", "-std=c++17"])
        .allowlist_file(".*/cuda/args\\.h")
        .rustified_enum("Finish")
        .parse_callbacks(Box::new(KernelArgs))
        .generate()
        .unwrap_or_else(|e| stop(&format!("bindgen could not read cuda/args.h: {e}")))
        .write_to_file(out_dir().join("kernel_args.rs"))
        .expect("OUT_DIR is writable");
}

/// Structs that the host fills in and copies as bytes get bytemuck's derives, which check that they
/// have no padding; comments lose the `<` of `///<`.
#[derive(Debug)]
struct KernelArgs;

impl bindgen::callbacks::ParseCallbacks for KernelArgs {
    fn add_derives(&self, info: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
        let copied = ["RowRule", "Span"].contains(&info.name);
        let derives = ["Default", "PartialEq", "bytemuck::Pod", "bytemuck::Zeroable"];
        derives.iter().filter(|_| copied).map(ToString::to_string).collect()
    }

    fn process_comment(&self, comment: &str) -> Option<String> {
        Some(comment.replace("< ", ""))
    }
}

/// `cpu` is the library of ggml's CPU backend.
fn link(lib: &Path, cpu: &str, tools: &Tools) {
    println!("cargo::rustc-link-search=native={}", lib.display());
    for ours in &wrappers::WRAPPERS {
        println!("cargo::rustc-link-lib=static={}", ours.library());
    }
    println!("cargo::rustc-link-lib=static=llama");
    println!("cargo::rustc-link-lib=static=ggml");
    println!("cargo::rustc-link-lib=static=ggml-rpc");
    if tools.cuda {
        println!("cargo::rustc-link-lib=static=ggml-cuda");
    }
    println!("cargo::rustc-link-lib=static={cpu}");
    println!("cargo::rustc-link-lib=static=ggml-base");
    if let Some(nvcc) = tools.nvcc.as_ref().filter(|_| tools.cuda) {
        let cuda_lib = cuda::toolkit(nvcc).join("lib64");
        println!("cargo::rustc-link-search=native={}", cuda_lib.display());
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", cuda_lib.display()); // for a toolkit that ld.so does not know
        for name in ["cudart", "cublas", "cublasLt"] {
            println!("cargo::rustc-link-lib=dylib={name}");
        }
    }
    println!("cargo::rustc-link-lib=dylib=stdc++");
}
