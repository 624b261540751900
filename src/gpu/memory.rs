//! Typed values in a device's memory. Slices and copies panic where a range exceeds the values; what
//! allocates or copies returns [`GpuError::Memory`], or [`GpuError::Queue`] of earlier work.

use std::marker::PhantomData;
use std::rc::Rc;

use bytemuck::Pod;

use super::device::{Address, Device, GpuError};

/// Values on the device, borrowed from their owner.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a, T> {
    address: Address,
    len: usize,
    of: PhantomData<&'a [T]>,
}

impl<'a, T: Pod> Slice<'a, T> {
    /// Values that another library allocated, such as a tensor of llama.cpp's.
    ///
    /// # Safety
    /// For `'a`, `len` values are at `address` of the device it is used with, and nothing writes to
    /// them.
    #[must_use]
    pub unsafe fn from_raw(address: Address, len: usize) -> Self {
        Self { address, len, of: PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The device's pointer to the first value; not to be read on the host.
    pub(super) fn as_ptr(&self) -> *const T {
        self.address as *const T
    }

    /// The first `n` values.
    #[must_use]
    pub fn first(self, n: usize) -> Self {
        self.part(0, n)
    }

    /// `n` values from index `from` on.
    #[must_use]
    pub fn part(self, from: usize, n: usize) -> Self {
        assert!(from + n <= self.len, "{n} values from {from} on, of {}", self.len);
        let address = self.address + (from * size_of::<T>()) as Address;
        Self { address, len: n, of: PhantomData }
    }

    /// The same bytes as values of another type of the same size.
    #[must_use]
    pub fn cast<U: Pod>(self) -> Slice<'a, U> {
        assert_eq!(size_of::<T>(), size_of::<U>());
        Slice { address: self.address, len: self.len, of: PhantomData }
    }
}

/// Memory on the device for values that a kernel writes.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    all: Slice<'a, T>,
    of: PhantomData<&'a mut [T]>,
}

impl<'a, T: Pod> SliceMut<'a, T> {
    fn over(all: Slice<'a, T>) -> Self {
        Self { all, of: PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len
    }

    /// The device's pointer to the first value; not to be used on the host.
    pub(super) fn as_mut_ptr(&self) -> *mut T {
        self.all.address as *mut T
    }

    /// For kernels queued later, which read what was written.
    #[must_use]
    pub fn slice(&self) -> Slice<'_, T> {
        self.all
    }

    /// A shorter borrow of the same memory.
    #[must_use]
    pub fn reborrow(&mut self) -> SliceMut<'_, T> {
        SliceMut::over(self.all)
    }

    /// The first `n` values, and the rest.
    #[must_use]
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let first = self.all.first(n);
        (Self::over(first), Self::over(self.all.part(n, self.len() - n)))
    }

    /// The same memory for values of another type of the same size.
    #[must_use]
    pub fn cast<U: Pod>(self) -> SliceMut<'a, U> {
        SliceMut::over(self.all.cast())
    }
}

/// Owned values on a device; freed when dropped.
pub struct Buffer<T> {
    device: Rc<dyn Device>,
    address: Address,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    pub fn zeros(device: &Rc<dyn Device>, len: usize) -> Result<Self, GpuError> {
        Self::from_host(device, &vec![T::zeroed(); len])
    }

    /// A copy of the host's values.
    pub fn from_host(device: &Rc<dyn Device>, values: &[T]) -> Result<Self, GpuError> {
        let address = device.alloc(size_of_val(values).max(1))?;
        let mut buffer =
            Self { device: Rc::clone(device), address, len: values.len(), of: PhantomData };
        buffer.upload(0, values)?;
        Ok(buffer)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All values.
    #[must_use]
    pub fn slice(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, of: PhantomData }
    }

    /// All values, to be written.
    #[must_use]
    pub fn slice_mut(&mut self) -> SliceMut<'_, T> {
        SliceMut::over(self.slice())
    }

    /// Overwrites the values from index `from` on.
    pub fn upload(&mut self, from: usize, values: &[T]) -> Result<(), GpuError> {
        let to = self.slice().part(from, values.len()).address;
        // SAFETY: `part` checked that the buffer holds as many values there.
        unsafe { self.device.upload(to, bytemuck::cast_slice(values)) }
    }

    /// Waits for the queue and copies the first values into all of `values`.
    pub fn download(&self, values: &mut [T]) -> Result<(), GpuError> {
        let from = self.slice().first(values.len()).address;
        // SAFETY: `first` checked that the buffer holds as many values.
        unsafe { self.device.download(from, bytemuck::cast_slice_mut(values)) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: the address came from `alloc` and is freed once; kernels get it by slices, whose
        // borrows have ended.
        unsafe { self.device.free(self.address) };
    }
}
