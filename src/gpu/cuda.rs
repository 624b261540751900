//! A CUDA device, through cudarc: the compiled kernels, loaded once, and a stream of our own in the
//! primary context. ggml works in the same context, so its addresses are valid here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::device::{Address, Device, GpuError, Launch};
use super::memory::Slice;

/// `cuda/` as nvcc compiled it: machine code for the architectures of the build, and PTX for later
/// ones.
static KERNELS: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The driver reads the fatbin's header in place, as 8-byte numbers.
#[repr(align(16))]
struct Aligned<T: ?Sized>(T);

/// A device and a stream on it. Belongs to one thread. Drop waits for the stream and unloads the
/// kernels.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    functions: RefCell<HashMap<&'static str, sys::CUfunction>>,
}

impl Cuda {
    /// Opens the device with this ordinal among CUDA_VISIBLE_DEVICES.
    ///
    /// # Errors
    /// [`GpuError::NoDevice`] without a driver or such a device, or for one older than the kernels.
    pub fn new(ordinal: usize) -> Result<Self, GpuError> {
        // SAFETY: loads the driver's library, which runs its initialisers.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDevice(
                "the driver library libcuda.so.1 is not installed".into(),
            ));
        }
        let no_device = |e: DriverError| GpuError::NoDevice(e.to_string());
        let context = CudaContext::new(ordinal).map_err(no_device)?;
        let stream = context.new_stream().map_err(no_device)?;
        // SAFETY: a complete fatbin; creating the context made it current on this thread.
        let module =
            unsafe { result::module::load_data(KERNELS.0.as_ptr().cast()) }.map_err(no_device)?;
        Ok(Self { context, stream, module, functions: RefCell::default() })
    }

    /// Opens the device that holds these logits: with several devices, that of the model's last
    /// layer.
    ///
    /// # Errors
    /// [`GpuError::NoDevice`], also if the logits are in host memory.
    pub fn holding(logits: Slice<'_, f32>) -> Result<Self, GpuError> {
        let first = Self::new(0)?;
        let mut ordinal: c_int = -1;
        let attribute = sys::CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        let address = logits.as_ptr() as Address;
        // SAFETY: the driver is loaded; for this attribute it writes one `int`.
        unsafe { sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address) }
            .result()
            .map_err(|e| GpuError::NoDevice(format!("the logits are on no device: {e}")))?;
        match usize::try_from(ordinal) {
            Ok(0) => Ok(first),
            Ok(other) => Self::new(other),
            Err(_) => Err(GpuError::NoDevice("the logits are on no device".into())),
        }
    }

    /// The stream that kernels are queued on; for benchmarks, which time it with events.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Makes this device's context current: ggml, which works on the same thread, may have switched
    /// to another device.
    fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()
    }

    fn function(&self, kernel: &'static str) -> Result<sys::CUfunction, DriverError> {
        if let Some(&function) = self.functions.borrow().get(kernel) {
            return Ok(function);
        }
        let name = CString::new(kernel).expect("a C name");
        // SAFETY: the module stays loaded while this value lives.
        let function = unsafe { result::module::get_function(self.module, name) }?;
        self.functions.borrow_mut().insert(kernel, function);
        Ok(function)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let _ = self.stream.synchronize(); // also makes the context current
        // SAFETY: the stream is idle, so no kernel of the module runs.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

impl Device for Cuda {
    fn alloc(&self, n_bytes: usize) -> Result<Address, GpuError> {
        let fail = |e: DriverError| GpuError::Memory { n_bytes, reason: e.to_string() };
        self.bind().map_err(fail)?;
        // SAFETY: `Device` declares the content undefined; callers write before they read.
        unsafe { result::malloc_sync(n_bytes) }.map_err(fail)
    }

    unsafe fn free(&self, address: Address) {
        let _ = self.bind();
        // SAFETY: by contract; the call waits for the device.
        let _ = unsafe { result::free_sync(address) };
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        let fail =
            |e: DriverError| GpuError::Memory { n_bytes: bytes.len(), reason: e.to_string() };
        self.bind().map_err(fail)?;
        // SAFETY: by contract. The driver copies pageable memory before the call returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }.map_err(fail)
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        let n_bytes = bytes.len();
        let fail = |e: DriverError| GpuError::Memory { n_bytes, reason: e.to_string() };
        self.bind().map_err(fail)?;
        // SAFETY: by contract; `bytes` stays borrowed until `synchronize` returns.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }.map_err(fail)?;
        self.synchronize()
    }

    unsafe fn launch(&self, launch: Launch, args: *mut c_void) -> Result<(), GpuError> {
        let Launch { kernel, grid: [x, y, z], block, shared } = launch;
        let fail =
            |e: DriverError| GpuError::Launch { kernel, grid: [x, y, z], reason: e.to_string() };
        self.bind().map_err(fail)?;
        let (function, stream) = (self.function(kernel).map_err(fail)?, self.stream.cu_stream());
        // SAFETY: by contract.
        unsafe {
            result::launch_kernel(function, (x, y, z), (block, 1, 1), shared, stream, &mut [args])
        }
        .map_err(fail)
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(|e| GpuError::Queue(e.to_string()))
    }
}
