//! CUDA: the toolkit, and our kernels compiled with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{files_in, find_program, out_dir, root, stop, var};

/// nvcc of the toolkit that was named, or in PATH, or the one `scripts/setup` fetched.
pub fn find_nvcc(with_libraries: bool) -> PathBuf {
    let rooted =
        var("CUDAToolkit_ROOT").map(|r| Path::new(&r).join("bin/nvcc")).filter(|p| p.is_file());
    if let Some(nvcc) = rooted.or_else(|| find_program("CUDACXX", "nvcc", "--version")) {
        return nvcc;
    }
    let (step, needed) =
        if with_libraries { ("cuda", "lib/libcublas.so") } else { ("nvcc", "lib64") };
    let toolkit = root().join(".tools/cuda");
    if !toolkit.join(needed).exists() {
        stop(&format!(
            "no CUDA toolkit: run `scripts/setup {step}`, or set CUDAToolkit_ROOT to one of version 12.8 or newer"
        ));
    }
    toolkit.join("bin/nvcc")
}

/// The folder above nvcc's `bin`, as nvcc itself tells it: what PATH names may be a link or a
/// wrapper.
pub fn toolkit(nvcc: &Path) -> PathBuf {
    let told = Command::new(nvcc)
        .args(["--dryrun", "-x", "cu", "/dev/null"])
        .output()
        .map(|o| o.stderr)
        .unwrap_or_default();
    let told = String::from_utf8_lossy(&told);
    let top = told.lines().find_map(|line| line.strip_prefix("#$ TOP="));
    let top = top
        .unwrap_or_else(|| stop(&format!("{} does not tell where its toolkit is", nvcc.display())));
    fs::canonicalize(top).unwrap_or_else(|e| stop(&format!("{top}: {e}")))
}

/// Whether nvcc's own query finds a card; a toolkit without the query is trusted.
pub fn sees_card(nvcc: &Path) -> bool {
    let query = Command::new(toolkit(nvcc).join("bin/__nvcc_device_query")).output();
    query.map_or(true, |q| q.status.success() && q.stdout.first().is_some_and(u8::is_ascii_digit))
}

/// Compiles `cuda/*.cu` as one unit, so that one fatbin holds every kernel.
pub fn compile_kernels(nvcc: &Path) {
    println!("cargo::rerun-if-changed=cuda");
    let sources = files_in(&root().join("cuda"), "cu");
    let unit: String = sources.iter().map(|p| format!("#include \"{}\"\n", p.display())).collect();
    let unit_path = out_dir().join("kernels.cu");
    fs::write(&unit_path, unit).expect("OUT_DIR is writable");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--threads=0"]).args(gencode(nvcc));
    command.arg("-o").arg(out_dir().join("kernels.fatbin")).arg(unit_path);
    let done = command.output().unwrap_or_else(|e| stop(&format!("nvcc does not run: {e}")));
    let said = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        eprintln!("{said}");
        stop(
            "nvcc could not compile cuda/: its errors are above, `scripts/check-kernels` compiles file by file",
        );
    }
    said.lines().for_each(|line| println!("cargo::warning={line}"));
}

/// What to compile for, as nvcc's options: `CUDA_ARCHS`, or every major architecture from 80 on
/// that this nvcc names, and PTX of the newest for those to come.
fn gencode(nvcc: &Path) -> Vec<String> {
    let archs = var("CUDA_ARCHS").unwrap_or_else(|| {
        let listed = Command::new(nvcc)
            .arg("--list-gpu-arch")
            .output()
            .map(|o| o.stdout)
            .unwrap_or_default();
        let majors: Vec<String> = String::from_utf8_lossy(&listed)
            .lines()
            .filter_map(|line| line.strip_prefix("compute_")?.parse::<u32>().ok())
            .filter(|arch| *arch >= 80 && arch % 10 == 0)
            .map(|arch| arch.to_string())
            .collect();
        majors.join("-real;") // the last one keeps its PTX
    });
    if !archs.starts_with(|c: char| c.is_ascii_digit()) {
        return vec![format!("-arch={archs}")]; // native, all, all-major
    }
    let one = |arch: &str| {
        let number = arch.trim_end_matches("-real").trim_end_matches("-virtual").to_owned();
        let real = (!arch.ends_with("-virtual"))
            .then(|| format!("-gencode=arch=compute_{number},code=sm_{number}"));
        let ptx = (!arch.ends_with("-real"))
            .then(|| format!("-gencode=arch=compute_{number},code=compute_{number}"));
        real.into_iter().chain(ptx)
    };
    archs.split(';').flat_map(one).collect()
}
