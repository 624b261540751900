//! Values in a device's memory.

use std::marker::PhantomData;
use std::rc::Rc;

use super::{Address, Device, GpuError};

/// Types whose values are their bytes, on both sides.
///
/// # Safety
/// Without padding, and any bytes are a value.
pub unsafe trait Plain: Copy + Default + 'static {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}

/// Some values on the device, which live as long as what they were borrowed of.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a, T> {
    address: Address,
    len: usize,
    of: PhantomData<&'a [T]>,
}

impl<'a, T: Plain> Slice<'a, T> {
    /// Values that somebody else put there, as a tensor of llama.cpp's.
    ///
    /// # Safety
    /// `len` values are at `address` on the device it is used with, for as long as `'a`, and nobody
    /// writes to them meanwhile.
    #[must_use]
    pub unsafe fn from_raw(address: Address, len: usize) -> Self {
        Self { address, len, of: PhantomData }
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// `true` without a value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// The first `n`.
    ///
    /// # Panics
    /// With fewer.
    #[must_use]
    pub fn first(self, n: usize) -> Slice<'a, T> {
        self.part(0, n)
    }

    /// `n` of them from place `from` on.
    ///
    /// # Panics
    /// With fewer.
    #[must_use]
    pub fn part(self, from: usize, n: usize) -> Slice<'a, T> {
        assert!(from + n <= self.len, "{n} from {from} on of {}", self.len);
        Slice {
            address: self.address + (from * size_of::<T>()) as Address,
            len: n,
            of: PhantomData,
        }
    }

    /// The same bytes as values of another type.
    ///
    /// # Panics
    /// If they have another size.
    #[must_use]
    pub fn cast<U: Plain>(self) -> Slice<'a, U> {
        assert_eq!(size_of::<T>(), size_of::<U>());
        Slice { address: self.address, len: self.len, of: PhantomData }
    }
}

/// Room on the device for values that a kernel is to write.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    room: Slice<'a, T>,
    of: PhantomData<&'a mut [T]>,
}

impl<'a, T: Plain> SliceMut<'a, T> {
    fn over(room: Slice<'a, T>) -> Self {
        Self { room, of: PhantomData }
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.room.len()
    }

    /// `true` without a value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.room.is_empty()
    }

    pub(super) fn address(&self) -> Address {
        self.room.address()
    }

    /// For reading what is written there: by a kernel that is queued later.
    #[must_use]
    pub fn slice(&self) -> Slice<'_, T> {
        self.room
    }

    /// The same room under a shorter loan.
    #[must_use]
    pub fn again(&mut self) -> SliceMut<'_, T> {
        SliceMut::over(self.room)
    }

    /// The first `n` values, and the rest.
    ///
    /// # Panics
    /// With fewer.
    #[must_use]
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let first = self.room.first(n);
        (Self::over(first), Self::over(self.room.part(n, self.len() - n)))
    }

    /// The same room for values of another type.
    ///
    /// # Panics
    /// If they have another size.
    #[must_use]
    pub fn cast<U: Plain>(self) -> SliceMut<'a, U> {
        SliceMut::over(self.room.cast())
    }
}

/// Owned values on a device.
pub struct Buffer<T> {
    device: Rc<dyn Device>,
    address: Address,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Room for `len` values, all zero.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    pub fn zeros(device: &Rc<dyn Device>, len: usize) -> Result<Self, GpuError> {
        Self::from_host(device, &vec![T::default(); len])
    }

    /// A copy of the host's values.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    pub fn from_host(device: &Rc<dyn Device>, values: &[T]) -> Result<Self, GpuError> {
        let address = device.alloc(size_of_val(values).max(1))?;
        let mut buffer =
            Self { device: Rc::clone(device), address, len: values.len(), of: PhantomData };
        buffer.upload(0, values)?;
        Ok(buffer)
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// `true` without a value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    #[must_use]
    pub fn slice(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, of: PhantomData }
    }

    /// All of it, to be written to.
    #[must_use]
    pub fn slice_mut(&mut self) -> SliceMut<'_, T> {
        SliceMut::over(self.slice())
    }

    /// Overwrites values from place `from` on.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    ///
    /// # Panics
    /// Where there is no room for them.
    pub fn upload(&mut self, from: usize, values: &[T]) -> Result<(), GpuError> {
        assert!(
            from + values.len() <= self.len,
            "{} values at {from} of {}",
            values.len(),
            self.len
        );
        // SAFETY: `Plain` values are their bytes.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        // SAFETY: there is room, as checked.
        unsafe { self.device.upload(self.address + (from * size_of::<T>()) as Address, bytes) }
    }

    /// Waits for the queue and copies the first values out, as many as `values` has room for.
    ///
    /// # Errors
    /// [`GpuError::Memory`], or [`GpuError::Queue`].
    ///
    /// # Panics
    /// With fewer.
    pub fn download(&self, values: &mut [T]) -> Result<(), GpuError> {
        assert!(values.len() <= self.len, "{} of {}", values.len(), self.len);
        let n_bytes = size_of_val(values);
        // SAFETY: any bytes are `Plain` values.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), n_bytes) };
        // SAFETY: that much is there, as checked.
        unsafe { self.device.download(self.address, bytes) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: it came from `alloc`, and slices that kernels were given borrow it no more.
        unsafe { self.device.free(self.address) };
    }
}
