//! How much of a prompt one step may carry while other sequences decode. Pure: durations come from outside.
//!
//! A running stream notices a newcomer's prompt as a longer step. The chunk is sized from what steps really took, so that a
//! step with a chunk stays within [`STALL`] times a step without one (but never aims below [`MIN_STALL_S`], which nobody
//! sees). Two running means are kept: the seconds of a decode-only step, and the seconds that each row of a prompt adds.
//! The second one includes whatever a mixed step costs beyond its rows, so the chunk settles where the whole step fits.

/// A step with a chunk may last this many times a step without one.
pub const STALL: f64 = 2.5;
/// Shorter steps than this are not worth keeping short.
pub const MIN_STALL_S: f64 = 0.030;
/// Weight of a new measurement.
const ALPHA: f64 = 0.2;
/// The chunk before anything was measured.
const FIRST_CHUNK: usize = 16;

/// The running means.
#[derive(Debug, Default)]
pub struct Pace {
    decode_s: Option<f64>,
    prompt_row_s: Option<f64>,
}

impl Pace {
    /// Notes what a step took: `n_decode` rows of running streams and `n_prompt` rows of prompts.
    pub fn record(&mut self, n_decode: usize, n_prompt: usize, seconds: f64) {
        if n_prompt == 0 {
            mix(&mut self.decode_s, seconds);
            return;
        }
        let decode_s = if n_decode == 0 { 0.0 } else { self.decode_s.unwrap_or(0.0) };
        mix(&mut self.prompt_row_s, (seconds - decode_s).max(0.0) / n_prompt as f64);
    }

    /// Rows of prompts that the next step may have beside decoding ones; from 1 to `n_batch`.
    #[must_use]
    pub fn n_prefill(&self, n_batch: usize) -> usize {
        let (Some(decode_s), Some(row_s)) = (self.decode_s, self.prompt_row_s) else { return FIRST_CHUNK.min(n_batch) };
        let room_s = (decode_s * STALL).max(MIN_STALL_S) - decode_s;
        let n = room_s.max(decode_s * 0.5) / row_s.max(1e-9);
        (n as usize).clamp(1, n_batch)
    }
}

fn mix(mean: &mut Option<f64>, new: f64) {
    *mean = Some(mean.map_or(new, |old| old + ALPHA * (new - old)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of a machine where a pass costs `pass_s` and each row `row_s`: the chunk settles where a step fits the bound.
    #[test]
    fn the_chunk_settles_where_a_step_stays_within_the_bound() {
        for (n_decode, pass_s, row_s) in [(8, 0.004, 0.0028), (1, 0.004, 0.0028), (8, 0.005, 0.001), (32, 0.02, 0.0001)] {
            let step =
                |n_prompt: usize| pass_s + row_s * (n_decode + n_prompt) as f64 + if n_prompt > 0 { pass_s } else { 0.0 };
            let mut pace = Pace::default();
            for _ in 0..40 {
                pace.record(n_decode, 0, step(0));
                let n = pace.n_prefill(512);
                pace.record(n_decode, n, step(n));
            }
            let bound = (step(0) * STALL).max(MIN_STALL_S) * 1.1;
            let n = pace.n_prefill(512);
            assert!(step(n) <= bound, "{n} rows: {} over {bound}", step(n));
            assert!(n == 512 || step(n + n / 4 + 2) > bound * 0.8, "{n} rows: not needlessly few");
        }
    }

    #[test]
    fn there_is_always_some_progress_and_never_more_than_the_batch() {
        let mut pace = Pace::default();
        assert_eq!(pace.n_prefill(8), 8);
        pace.record(1, 0, 1e-9);
        pace.record(0, 1, 1e9);
        assert_eq!(pace.n_prefill(8), 1);
        pace.record(0, 1_000_000, 0.0);
        (0..200).for_each(|_| pace.record(0, 1_000_000, 0.0));
        assert_eq!(pace.n_prefill(8), 8);
    }
}
