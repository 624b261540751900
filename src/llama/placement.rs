//! Where a model's weights go: layers on GPUs, tensors in buffers by their names, and how the file
//! gets into memory.

use std::ffi::{CString, c_char};
use std::fmt;
use std::ptr;

use super::backend::{start_backend, supports_gpu_offload, text};
use super::hello::Endpoint;
use super::sys;
use super::workers::Division;

/// The bindings of `vendor/pattern`.
#[allow(non_camel_case_types, missing_docs, unsafe_op_in_unsafe_fn, clippy::all)]
mod c {
    include!(concat!(env!("OUT_DIR"), "/pattern_bindings.rs"));
}

/// Where a model's weights go. By default all are on the CPU, mapped from the file. Without a GPU,
/// what is said of GPUs is ignored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Placement {
    /// Layers on GPUs: the last ones, of which the output counts as one.
    pub n_gpu_layers: GpuLayers,
    /// How several GPUs share these layers.
    pub split: SplitMode,
    /// The GPU that has all of them with [`SplitMode::None`], and small tensors with
    /// [`SplitMode::Row`]: its index among the GPUs.
    pub main_gpu: u16,
    /// The share of each GPU, in any unit; empty: by the memory that each has free. At most
    /// [`max_devices`].
    pub tensor_split: Vec<f32>,
    /// Buffers of tensors, wherever their layer is. Of several patterns that match, the first counts.
    pub overrides: Vec<Override>,
    /// Workers that compute layers for this process, at most [`MOST_WORKERS`]. With some, layers are
    /// divided by `worker_split`, all of this machine's go to its GPUs if it has some, and `n_gpu_layers`,
    /// `split`, `main_gpu` and `tensor_split` count for nothing.
    ///
    /// [`MOST_WORKERS`]: super::MOST_WORKERS
    pub workers: Vec<Endpoint>,
    /// The share of each worker and, as the last one, of this machine, in any unit; empty: by the memory
    /// of each.
    pub worker_split: Vec<f32>,
    /// Leave the weights as the file has them, where the CPU would arrange them for its kernels. Workers
    /// always do.
    pub no_repack: bool,
    /// Load the layers that draft, too, if the file has some.
    pub draft_layers: bool,
    /// How the file gets into memory.
    pub load: LoadMode,
    /// Keep the weights in memory: the system must not swap them out. If it refuses that, the log
    /// says so.
    pub lock: bool,
}

/// A number of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuLayers {
    /// At most this many: all of a model that has fewer.
    Most(u32),
    /// As many as fit. The engine finds how many; to [`Model::load`](super::Model::load) it is all.
    Auto,
}

impl GpuLayers {
    /// All layers, of any model.
    pub const ALL: Self = Self::Most(u32::MAX);
}

impl Default for GpuLayers {
    /// None.
    fn default() -> Self {
        Self::Most(0)
    }
}

/// How several GPUs share a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SplitMode {
    /// One GPU has all
    None,
    /// Each GPU has whole layers and their cache
    #[default]
    Layer,
    /// Each GPU has rows of every matrix
    Row,
    /// Each GPU has a part of every tensor and of the cache; an experiment of llama.cpp's
    Tensor,
}

/// How a file gets into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// Mapped, unless a device needs a copy, or the weights are locked.
    #[default]
    Auto,
    /// Mapped: pages are read when they are used, and other processes share them. Locked, weights
    /// that are repacked are in memory twice.
    Mapped,
    /// Copied.
    Copied,
}

/// Tensors whose names a pattern matches, and their buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    /// Is searched in a tensor's name.
    pub pattern: Pattern,
    /// Where these tensors go.
    pub buffer: Buffer,
}

/// A regular expression as C++ has it (ECMAScript's).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(CString);

/// Longer reasons are cut.
const LONGEST_REASON: usize = 256;

impl Pattern {
    /// Checks a pattern.
    ///
    /// # Errors
    /// What the C++ library says of it.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let pattern = CString::new(pattern).map_err(|error| error.to_string())?;
        let mut why = [0; LONGEST_REASON];
        // SAFETY: a zero-terminated text; at most as many bytes are written as there are, and the
        // function catches what the C++ library throws.
        let is_valid = unsafe {
            c::medusa_pattern_is_valid(pattern.as_ptr(), why.as_mut_ptr(), LONGEST_REASON)
        };
        if is_valid {
            return Ok(Self(pattern));
        }
        // SAFETY: zero-terminated by the call.
        Err(unsafe { text(why.as_ptr()) })
    }

    /// What is in no layer: embeddings, the output's norm and matrix. Factors of the rotation belong to
    /// layers, whatever their name.
    fn of_head() -> Self {
        Self::new(r"^(?!blk\.|rope_)").expect("a valid pattern")
    }

    /// No tensor.
    fn of_none() -> Self {
        Self::new("^$").expect("a valid pattern")
    }

    /// The weights of experts: of all layers, or of one.
    #[must_use]
    pub fn of_experts(layer: Option<u32>) -> Self {
        let layer = layer.map_or(String::new(), |n| format!(r"^blk\.{n}"));
        let pattern = layer + r"\.ffn_(gate|up|down|gate_up)_(ch)?exps";
        Self::new(&pattern).expect("a valid pattern")
    }
}

/// A kind of memory that ggml knows by name: of the host, or of one device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Buffer(sys::ggml_backend_buffer_type_t);

// SAFETY: it points to a constant of ggml's registry, which lives as long as the process.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The memory of the host.
    #[must_use]
    pub fn host() -> Self {
        start_backend();
        // SAFETY: no arguments; returns a constant.
        Self(unsafe { sys::ggml_backend_cpu_buffer_type() })
    }

    /// All that there are, one for each device, the host's among them.
    #[must_use]
    pub fn all() -> Vec<Self> {
        start_backend();
        let mut all = vec![Self::host()];
        // SAFETY: no arguments; the registry is filled.
        for i in 0..unsafe { sys::ggml_backend_dev_count() } {
            // SAFETY: an index in the registry.
            let device = unsafe { sys::ggml_backend_dev_get(i) };
            // SAFETY: a device of the registry; null for one without a buffer of its own.
            let buffer = Self(unsafe { sys::ggml_backend_dev_buffer_type(device) });
            if !buffer.0.is_null() && !all.contains(&buffer) {
                all.push(buffer);
            }
        }
        all
    }

    /// The buffer of this name.
    ///
    /// # Errors
    /// The names that there are.
    pub fn by_name(name: &str) -> Result<Self, String> {
        let all = Self::all();
        all.iter().copied().find(|buffer| buffer.name() == name).ok_or_else(|| {
            let names: Vec<String> = all.iter().map(Self::name).collect();
            format!("there is no buffer {name}; there is {}", names.join(", "))
        })
    }

    /// Its name: `CPU`, `CUDA0`.
    #[must_use]
    pub fn name(&self) -> String {
        // SAFETY: a type of buffers that lives as long as the process; its name is a constant.
        unsafe { text(sys::ggml_backend_buft_name(self.0)) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({})", self.name())
    }
}

/// Most devices that can have a share of a model.
#[must_use]
pub fn max_devices() -> usize {
    // SAFETY: no arguments; returns a constant.
    unsafe { sys::max_devices() }
}

impl Placement {
    /// `n` layers on GPUs, all else as by default.
    #[must_use]
    pub fn layers(n: u32) -> Self {
        Self { n_gpu_layers: GpuLayers::Most(n), ..Self::default() }
    }

    /// What of it decides where weights are, and so the bits of what is computed.
    #[must_use]
    pub fn arithmetic(&self) -> String {
        let Self { n_gpu_layers, split, main_gpu, tensor_split, overrides, .. } = self;
        let on_workers = (self.workers.len(), &self.worker_split, self.no_repack);
        let overrides: Vec<_> =
            overrides.iter().map(|of| format!("{:?} {}", of.pattern, of.buffer.name())).collect();
        format!(
            "{n_gpu_layers:?} {split:?} {main_gpu} {tensor_split:?} {overrides:?} {on_workers:?}"
        )
    }

    /// Whether the CPU computes everything.
    #[must_use]
    pub fn is_on_cpu(&self) -> bool {
        let on_gpus = self.n_gpu_layers != GpuLayers::default() && supports_gpu_offload();
        self.workers.is_empty() && !on_gpus
    }

    /// Sets what C needs; with workers, their `division`. The parameters point into the returned value,
    /// which must live until they were used.
    pub(super) fn set(&self, c: &mut sys::model_params, division: Option<&Division>) -> Lists {
        c.n_gpu_layers = match self.n_gpu_layers {
            GpuLayers::Most(n) => i32::try_from(n).unwrap_or(i32::MAX),
            GpuLayers::Auto => i32::MAX,
        };
        c.load_mtp = self.draft_layers;
        c.split_mode = match self.split {
            SplitMode::None => sys::LLAMA_SPLIT_MODE_NONE,
            SplitMode::Row => sys::LLAMA_SPLIT_MODE_ROW,
            SplitMode::Tensor if supports_gpu_offload() => sys::LLAMA_SPLIT_MODE_TENSOR,
            SplitMode::Layer | SplitMode::Tensor => sys::LLAMA_SPLIT_MODE_LAYER,
        };
        c.main_gpu = i32::from(self.main_gpu);
        c.load_mode = match (self.load, self.lock) {
            (LoadMode::Auto, false) => sys::LLAMA_LOAD_MODE_AUTO,
            (LoadMode::Mapped, false) => sys::LLAMA_LOAD_MODE_MMAP,
            (LoadMode::Copied, false) => sys::LLAMA_LOAD_MODE_NONE,
            (LoadMode::Mapped, true) => sys::LLAMA_LOAD_MODE_MMAP_MLOCK,
            (LoadMode::Auto | LoadMode::Copied, true) => sys::LLAMA_LOAD_MODE_MLOCK,
        };
        c.use_extra_bufts = !self.no_repack;
        let mut shares = self.tensor_split.clone();
        let mut devices = vec![];
        if let Some(division) = division {
            shares = division.layers.iter().map(|&n| n as f32).collect();
            devices =
                division.devices.iter().map(|device| device.0).chain([ptr::null_mut()]).collect();
            c.n_gpu_layers = division.layers.iter().sum::<usize>() as i32;
            c.split_mode = sys::LLAMA_SPLIT_MODE_LAYER;
        }
        shares.resize(max_devices(), 0.0); // C reads as many
        let of = |of: &Override| sys::model_tensor_buft_override {
            pattern: of.pattern.0.as_ptr(),
            buft: of.buffer.0,
        };
        let end = sys::model_tensor_buft_override {
            pattern: ptr::null::<c_char>(),
            buft: ptr::null_mut(),
        };
        let at_head = division.map(|division| Override {
            // With any pattern llama.cpp computes batch after batch: several at a time would take more
            // buffers and need what engines here never send.
            pattern: if division.has_gpus { Pattern::of_none() } else { Pattern::of_head() },
            buffer: Buffer::host(),
        });
        let overrides = self.overrides.iter().chain(&at_head).map(of).chain([end]).collect();
        let mut lists = Lists { shares, overrides, devices, at_head };
        c.tensor_split = lists.shares.as_ptr();
        if lists.overrides.len() > 1 {
            c.tensor_buft_overrides = lists.overrides.as_ptr();
        }
        if division.is_some() {
            c.devices = lists.devices.as_mut_ptr();
        }
        lists
    }
}

/// What C's parameters of a model point to; all other patterns belong to the [`Placement`].
pub(super) struct Lists {
    shares: Vec<f32>,
    /// With C's end of a list.
    overrides: Vec<sys::model_tensor_buft_override>,
    /// With C's end of a list; empty: llama.cpp's own.
    devices: Vec<sys::ggml_backend_dev_t>,
    /// The override that is not the [`Placement`]'s.
    #[allow(dead_code, reason = "an entry of `overrides` points into it")]
    at_head: Option<Override>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_cpp() {
        for valid in [r"blk\.(?!1\.)\d+\.ffn", "a|b", "", "[[:digit:]]"] {
            assert!(Pattern::new(valid).is_ok(), "{valid}");
        }
        for invalid in ["(", "[a", "*", "a{2,1}", r"\", "a\0b"] {
            let why = Pattern::new(invalid).unwrap_err();
            assert!(!why.is_empty() && !why.contains('\n'), "{invalid}: {why}");
        }
    }

    #[test]
    fn an_unknown_buffer_is_refused_with_those_that_there_are() {
        assert_eq!(Buffer::by_name("CPU").unwrap(), Buffer::host());
        let why = Buffer::by_name("CUDA99").unwrap_err();
        assert!(why.contains("CUDA99") && why.contains("there is CPU"), "{why}");
    }

    #[test]
    fn lists_end_as_c_expects() {
        // SAFETY: no arguments; returns a struct by value.
        let mut c = unsafe { sys::model_default_params() };
        let (pattern, buffer) = (Pattern::of_experts(Some(3)), Buffer::host());
        let lists = Placement {
            tensor_split: vec![3.0, 1.0],
            overrides: vec![Override { pattern, buffer }],
            lock: true,
            ..Placement::layers(u32::MAX)
        }
        .set(&mut c, None);
        assert_eq!((lists.shares.len(), lists.overrides.len()), (max_devices(), 2));
        assert!(lists.overrides[1].pattern.is_null());
        assert_eq!(c.n_gpu_layers, i32::MAX);
        assert_eq!(c.load_mode, sys::LLAMA_LOAD_MODE_MLOCK);
        let lists = Placement::default().set(&mut c, None);
        assert_eq!((c.n_gpu_layers, lists.overrides.len()), (0, 1));
        assert!(c.devices.is_null());
        let division = Division { devices: vec![], layers: vec![3, 5], has_gpus: false };
        let lists = Placement::default().set(&mut c, Some(&division));
        assert_eq!((c.n_gpu_layers, &lists.shares[..3]), (8, &[3.0, 5.0, 0.0][..]));
        assert_eq!((lists.overrides.len(), lists.devices.len()), (2, 1));
    }
}
