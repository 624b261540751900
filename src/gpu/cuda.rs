//! A CUDA device, through cudarc: the kernels that are built in, loaded once, and a stream of our
//! own in the primary context, which is the one that ggml works in, so that its addresses are ours
//! too.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::{Address, Device, GpuError, Launch, Plain, Slice};

/// What nvcc made of `cuda/`: machine code for the architectures of the build, and a portable form
/// for later ones.
static KERNELS: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The driver reads numbers in it.
#[repr(align(16))]
struct Aligned<T: ?Sized>(T);

/// A device and a stream on it. Belongs to one thread.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: sys::CUmodule,
    functions: RefCell<HashMap<&'static str, sys::CUfunction>>,
}

impl Cuda {
    /// The device of that number, as CUDA_VISIBLE_DEVICES lets count.
    ///
    /// # Errors
    /// [`GpuError::NoDevice`] without a driver, without such a device, or for one that is older
    /// than the kernels.
    pub fn new(ordinal: usize) -> Result<Self, GpuError> {
        // SAFETY: looks for the library, and runs its initialisers if it is there.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDevice(
                "the driver's library, libcuda.so.1, is not installed".into(),
            ));
        }
        let no_device = |e: DriverError| GpuError::NoDevice(e.to_string());
        let context = CudaContext::new(ordinal).map_err(no_device)?;
        let stream = context.new_stream().map_err(no_device)?;
        // SAFETY: a whole fatbin; the context is current on this thread since it was made.
        let module =
            unsafe { result::module::load_data(KERNELS.0.as_ptr().cast()) }.map_err(no_device)?;
        Ok(Self { context, stream, module, functions: RefCell::default() })
    }

    /// The device that holds these values: with several, the one that the model's last layer is on.
    ///
    /// # Errors
    /// [`GpuError::NoDevice`], also for values of the host's.
    pub fn holding<T: Plain>(values: Slice<'_, T>) -> Result<Self, GpuError> {
        let first = Self::new(0)?;
        let mut ordinal: c_int = -1;
        let attribute = sys::CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        // SAFETY: the driver is there, and writes one number.
        unsafe {
            sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, values.address())
        }
        .result()
        .map_err(|e| GpuError::NoDevice(format!("the logits are on none: {e}")))?;
        match usize::try_from(ordinal) {
            Ok(0) => Ok(first),
            Ok(other) => Self::new(other),
            Err(_) => Err(GpuError::NoDevice("the logits are on none".into())),
        }
    }

    /// The device's name, for example `NVIDIA H100 80GB HBM3`.
    #[must_use]
    pub fn name(&self) -> String {
        self.context.name().unwrap_or_else(|_| "a CUDA device".into())
    }

    /// Bytes of the second-level cache.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        let bytes =
            self.context.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
        bytes.ok().and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
    }

    /// Copies within the device.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    ///
    /// # Safety
    /// As many bytes are at both addresses, and they do not overlap.
    pub unsafe fn copy(&self, from: Address, to: Address, n_bytes: usize) -> Result<(), GpuError> {
        // SAFETY: by contract.
        unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.stream.cu_stream()) }
            .map_err(|e| GpuError::Memory { n_bytes, reason: e.to_string() })
    }

    /// Milliseconds on the device for what `queue` queues.
    ///
    /// # Errors
    /// What `queue` gives, or [`GpuError::Queue`].
    pub fn time(&self, queue: impl FnOnce() -> Result<(), GpuError>) -> Result<f32, GpuError> {
        let failed = |e: DriverError| GpuError::Queue(e.to_string());
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let [start, end] = [(); 2].map(|()| self.context.new_event(flags).map_err(failed));
        let (start, end) = (start?, end?);
        start.record(&self.stream).map_err(failed)?;
        queue()?;
        end.record(&self.stream).map_err(failed)?;
        start.elapsed_ms(&end).map_err(failed)
    }

    /// Makes this device's context the thread's: ggml, which works on the same thread, may have
    /// left another one's.
    fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()
    }

    fn function(&self, kernel: &'static str) -> Result<sys::CUfunction, DriverError> {
        if let Some(&function) = self.functions.borrow().get(kernel) {
            return Ok(function);
        }
        let name = CString::new(kernel).expect("a C name");
        // SAFETY: the module is loaded as long as this value lives.
        let function = unsafe { result::module::get_function(self.module, name) }?;
        self.functions.borrow_mut().insert(kernel, function);
        Ok(function)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let _ = self.stream.synchronize(); // makes the context the thread's, too
        // SAFETY: nothing of it runs any more.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

impl Device for Cuda {
    fn alloc(&self, n_bytes: usize) -> Result<Address, GpuError> {
        let fail = |e: DriverError| GpuError::Memory { n_bytes, reason: e.to_string() };
        self.bind().map_err(fail)?;
        // SAFETY: what it holds is written before it is read.
        unsafe { result::malloc_sync(n_bytes) }.map_err(fail)
    }

    unsafe fn free(&self, address: Address) {
        let _ = self.bind();
        // SAFETY: by contract; it waits for the device.
        let _ = unsafe { result::free_sync(address) };
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        let fail =
            |e: DriverError| GpuError::Memory { n_bytes: bytes.len(), reason: e.to_string() };
        self.bind().map_err(fail)?;
        // SAFETY: by contract. Memory that is not pinned is read before the call returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }.map_err(fail)
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        let n_bytes = bytes.len();
        let fail = |e: DriverError| GpuError::Memory { n_bytes, reason: e.to_string() };
        self.bind().map_err(fail)?;
        // SAFETY: by contract; `bytes` is borrowed until the queue has been waited for.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }.map_err(fail)?;
        self.synchronize()
    }

    unsafe fn launch(&self, launch: Launch, args: &mut [*mut c_void]) -> Result<(), GpuError> {
        let Launch { kernel, grid, block, shared } = launch;
        let fail = |e: DriverError| GpuError::Launch { kernel, grid, reason: e.to_string() };
        self.bind().map_err(fail)?;
        let function = self.function(kernel).map_err(fail)?;
        let (grid_dim, block_dim) = ((grid[0], grid[1], grid[2]), (block, 1, 1));
        // SAFETY: by contract.
        unsafe {
            result::launch_kernel(
                function,
                grid_dim,
                block_dim,
                shared,
                self.stream.cu_stream(),
                args,
            )
        }
        .map_err(fail)
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(|e| GpuError::Queue(e.to_string()))
    }
}
