//! Cells of a sequence as bytes, and back: what llama.cpp keeps of it, with their positions.

use std::ops::Range;

use super::context::Context;
use super::error::LlamaError;
use super::ids::SeqId;
use super::sys;

impl Context {
    /// The cells of a sequence at these positions, as llama.cpp writes them. `spare` is an id that
    /// holds nothing. Needs `unified`, and a model that keeps no state.
    ///
    /// # Errors
    /// When the sequence has no such cells, or they cannot be read.
    pub fn save_cells(
        &mut self,
        seq: SeqId,
        positions: Range<usize>,
        spare: SeqId,
    ) -> Result<Vec<u8>, LlamaError> {
        self.share(seq, spare, positions.clone())?;
        let saved = self.copy_out(spare, &positions);
        self.remove_from(spare, 0)?;
        saved
    }

    fn copy_out(&mut self, spare: SeqId, positions: &Range<usize>) -> Result<Vec<u8>, LlamaError> {
        if self.cached_len(spare) != Some(positions.end) {
            return Err(LlamaError::Misuse(format!("no cells at positions {positions:?}")));
        }
        let c_seq = spare.0 as i32; // in range: it holds cells
        // SAFETY: a live context and an id in range.
        let n = unsafe { sys::state_seq_get_size(self.as_mut_ptr(), c_seq) };
        let mut bytes = vec![0; n];
        // SAFETY: as above, and the buffer has `n` bytes.
        let written =
            unsafe { sys::state_seq_get_data(self.as_mut_ptr(), bytes.as_mut_ptr(), n, c_seq) };
        match written == n && n > 0 {
            true => Ok(bytes),
            false => Err(LlamaError::Misuse(format!("{written} of {n} bytes of cells were read"))),
        }
    }

    /// Gives a sequence the cells at `wanted` positions of those that [`save_cells`](Self::save_cells)
    /// wrote, which must end where `wanted` does. `spare` is an id that holds nothing. There must be
    /// room for all cells that were saved.
    ///
    /// # Errors
    /// When there is no room, or the bytes are of another kind of cache; the sequence is as before.
    pub fn restore_cells(
        &mut self,
        seq: SeqId,
        wanted: Range<usize>,
        bytes: &[u8],
        spare: SeqId,
    ) -> Result<(), LlamaError> {
        let c_seq = self.check_seq(spare)?;
        // SAFETY: a live context, an id in range, and a buffer of this size. llama.cpp checks what it
        // reads against its cache and clears the sequence if it does not fit.
        let read = unsafe {
            sys::state_seq_set_data(self.as_mut_ptr(), bytes.as_ptr(), bytes.len(), c_seq)
        };
        let end = self.cached_len(spare);
        let restored = match read == bytes.len() && end == Some(wanted.end) {
            true => self.share(spare, seq, wanted),
            false => Err(LlamaError::Misuse(format!(
                "{read} of {} bytes of cells were restored",
                bytes.len()
            ))),
        };
        self.remove_from(spare, 0)?;
        restored
    }
}
