//! A device on the CPU: the kernels of `cuda/`, compiled by a C++ compiler with
//! `tests/emulation/emulation.h`.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::OnceLock;

use libloading::{Library, Symbol};
use medusa_llama::gpu::{Address, Device, GpuError, Launch};

/// Bytes around each allocation that kernels must not write to.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xA5;
/// Content of fresh memory: as floats NaN.
const FRESH_BYTE: u8 = 0xFF;

/// Memory of the host, and kernels that run when they are launched.
pub struct Emulated {
    library: &'static Library,
    /// By address: the allocation with its guards, and the requested size.
    memory: RefCell<HashMap<Address, (Vec<u8>, usize)>>,
}

impl Emulated {
    /// Compiles the kernels, once for the process.
    pub fn device() -> Rc<dyn Device> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        Rc::new(Self { library: LIBRARY.get_or_init(compile), memory: RefCell::default() })
    }
}

fn compile() -> Library {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let folder =
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the target folder is writable");
    let (source, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    let mut files: Vec<_> =
        std::fs::read_dir(root.join("cuda")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let includes = files.iter().filter(|f| f.extension() == Some("cu".as_ref()));
    let text: String = includes.map(|f| format!("#include \"{}\"\n", f.display())).collect();
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    // No contraction: products and sums round as they are written.
    let flags = "-std=c++17 -O2 -fPIC -shared -fno-strict-aliasing -ffp-contract=off -Wall -Wextra -Werror \
                 -Wno-unknown-pragmas -DMEDUSA_EMULATION";
    let status = Command::new(&compiler)
        .args(flags.split_whitespace())
        .arg("-I")
        .arg(root.join("tests/emulation"))
        .arg("-o")
        .args([&library, &source])
        .status()
        .unwrap_or_else(|e| panic!("{compiler} does not run: {e}"));
    assert!(status.success(), "{compiler} did not compile the kernels");
    // SAFETY: our own library, without initialisers.
    unsafe { Library::new(&library) }.unwrap()
}

impl Device for Emulated {
    fn alloc(&self, n_bytes: usize) -> Result<Address, GpuError> {
        // Aligned as a device aligns.
        let mut block = vec![GUARD_BYTE; n_bytes + 3 * GUARD];
        let start = block.as_ptr() as usize;
        let offset = (start + GUARD).next_multiple_of(GUARD) - start;
        block[offset..offset + n_bytes].fill(FRESH_BYTE);
        let address = (start + offset) as Address;
        self.memory.borrow_mut().insert(address, (block, n_bytes));
        Ok(address)
    }

    unsafe fn free(&self, address: Address) {
        let (block, n_bytes) = self.memory.borrow_mut().remove(&address).expect("allocated");
        let offset = address as usize - block.as_ptr() as usize;
        let guards = block[..offset].iter().chain(&block[offset + n_bytes..]);
        if !std::thread::panicking() {
            assert!(
                guards.into_iter().all(|&b| b == GUARD_BYTE),
                "a kernel wrote beyond {n_bytes} bytes"
            );
        }
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        // SAFETY: by contract; the host's own memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        // SAFETY: by contract; the host's own memory.
        unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch, args: *mut c_void) -> Result<(), GpuError> {
        type Entry = unsafe extern "C" fn(u32, u32, u32, u32, *const *mut c_void);
        let [x, y, z] = launch.grid;
        // SAFETY: EMULATED in emulation.h declares it so.
        let entry: Symbol<'_, Entry> =
            unsafe { self.library.get(format!("launch_{}", launch.kernel).as_bytes()) }
                .unwrap_or_else(|e| panic!("{}: {e}", launch.kernel));
        assert!(launch.shared <= 48 << 10, "more shared memory than a kernel gets without asking");
        // SAFETY: by contract.
        unsafe { entry(x, y, z, launch.block, &raw const args) };
        Ok(())
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        Ok(())
    }
}
