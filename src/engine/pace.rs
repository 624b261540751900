//! How much of a prompt one step may carry while other sequences decode. Pure: durations come from outside.
//!
//! A running stream notices a newcomer's prompt as a longer step. The chunk is steered by what steps really take: after
//! each step that carried a full chunk it is scaled by the ratio of the time such a step may take to the time it took. A
//! step may take [`STALL`] times as long as a step of as many streams without a prompt, and at least [`MIN_STALL_S`], which
//! few notice. For a cost of `a + b n` the scaling settles at the `n` where the step takes just that long, whatever `a` and
//! `b` are; where even the fixed part is too long it stays at [`MIN_CHUNK`], below which prompts would never be done.

/// A step with a chunk may last this many times a step without one.
pub const STALL: f64 = 2.5;
/// A step may always last this long, in seconds.
pub const MIN_STALL_S: f64 = 0.045;
/// The smallest chunk, in rows.
pub const MIN_CHUNK: usize = 8;
/// The chunk before anything was measured.
const FIRST_CHUNK: f64 = 16.0;
/// Weight of a new measurement of a decode-only step.
const ALPHA: f64 = 0.2;
/// The most that one step changes the chunk: one slow step says little on a shared machine.
const SCALE: std::ops::RangeInclusive<f64> = 0.75..=1.25;

/// What steps took, and the chunk that follows.
#[derive(Debug)]
pub struct Pace {
    /// Running mean of the seconds of a decode-only step, by number of streams.
    decode_s: Vec<Option<f64>>,
    chunk: f64,
    n_batch: usize,
}

impl Pace {
    /// For steps of at most `n_batch` rows.
    #[must_use]
    pub fn new(n_batch: usize) -> Self {
        Self { decode_s: Vec::new(), chunk: FIRST_CHUNK, n_batch }
    }

    /// Notes what a step took: `n_decode` rows of running streams and `n_prompt` rows of prompts.
    pub fn record(&mut self, n_decode: usize, n_prompt: usize, seconds: f64) {
        if n_prompt == 0 {
            if self.decode_s.len() <= n_decode {
                self.decode_s.resize(n_decode + 1, None);
            }
            let mean = &mut self.decode_s[n_decode];
            *mean = Some(mean.map_or(seconds, |old| old + ALPHA * (seconds - old)));
        } else if n_decode > 0 && n_prompt >= self.n_prefill() {
            let allowed = (self.plain_step_s(n_decode) * STALL).max(MIN_STALL_S);
            let scale = (allowed / seconds.max(1e-9)).clamp(*SCALE.start(), *SCALE.end());
            self.chunk = (self.chunk * scale).clamp(MIN_CHUNK as f64, self.n_batch.max(MIN_CHUNK) as f64);
        }
    }

    /// Rows of prompts that the next step may have beside decoding ones; from 1 to `n_batch`.
    #[must_use]
    pub fn n_prefill(&self) -> usize {
        (self.chunk as usize).clamp(1, self.n_batch)
    }

    /// A step of `n` streams and nothing else, or of the nearest number of streams that was measured.
    fn plain_step_s(&self, n: usize) -> f64 {
        let known = self.decode_s.iter().enumerate().filter_map(|(i, s)| s.map(|s| (i.abs_diff(n), s)));
        known.min_by_key(|&(distance, _)| distance).map_or(0.0, |(_, s)| s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps of a machine where a pass costs `pass_s`, each row `row_s`, and a step with a chunk takes two passes.
    fn settle(pace: &mut Pace, n_decode: usize, pass_s: f64, row_s: f64) -> (f64, f64) {
        let step = |n_prompt: usize| pass_s * if n_prompt > 0 { 2.0 } else { 1.0 } + row_s * (n_decode + n_prompt) as f64;
        for _ in 0..60 {
            pace.record(n_decode, 0, step(0));
            pace.record(n_decode, pace.n_prefill(), step(pace.n_prefill()));
        }
        (step(pace.n_prefill()), (step(0) * STALL).max(MIN_STALL_S))
    }

    #[test]
    fn the_chunk_settles_where_a_step_takes_as_long_as_it_may() {
        for (n_decode, pass_s, row_s) in [(8, 0.004, 0.0028), (8, 0.005, 0.001), (32, 0.02, 0.0005)] {
            let mut pace = Pace::new(512);
            let (took, allowed) = settle(&mut pace, n_decode, pass_s, row_s);
            assert!((0.85..=1.05).contains(&(took / allowed)), "{} rows: {took} of {allowed}", pace.n_prefill());
        }
    }

    #[test]
    fn where_nothing_fits_there_is_still_some_progress_and_it_recovers() {
        let mut pace = Pace::new(512);
        settle(&mut pace, 1, 0.1, 0.05);
        assert_eq!(pace.n_prefill(), MIN_CHUNK);
        settle(&mut pace, 8, 0.005, 0.001);
        assert!(pace.n_prefill() > 16);
    }

    #[test]
    fn the_chunk_keeps_to_the_batch() {
        for n_batch in [1, 8, 64] {
            let mut pace = Pace::new(n_batch);
            assert!(pace.n_prefill() <= n_batch);
            settle(&mut pace, 4, 1e-4, 1e-6);
            assert_eq!(pace.n_prefill(), n_batch);
        }
    }

    #[test]
    fn a_prompt_that_ends_says_nothing_about_the_chunk() {
        let mut pace = Pace::new(512);
        let before = pace.n_prefill();
        pace.record(4, 0, 0.01);
        pace.record(4, 3, 0.5);
        pace.record(0, 512, 2.0);
        assert_eq!(pace.n_prefill(), before);
    }
}
