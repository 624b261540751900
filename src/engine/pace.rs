//! How many rows of prompts one step may carry while other sequences decode. Pure.
//!
//! A new request's prompt makes the steps of running streams longer. After each step that carried a
//! full chunk, the chunk is scaled by the ratio of the time such a step may take to the time it
//! took. A step may take [`STALL`] times as long as a step of as many streams without a prompt, and
//! at least [`MIN_STALL_S`]. For a cost of `a + b n` the scaling settles at the `n` where the step
//! takes just that long; where even `a` is too long it stays at [`MIN_CHUNK`]. Streams become slower
//! as they grow, so while a long prompt is read one of [`LOOK_EVERY`] steps goes without it.
//!
//! Where more prompts wait than streams run, that time is multiplied by the prompts per stream: the
//! prompts of a burst are read together, and a single new request is read in small chunks.

/// A step with a chunk may last this many times a step without one.
pub const STALL: f64 = 2.5;
/// A step may always last this long, in seconds.
pub const MIN_STALL_S: f64 = 0.036;
/// The smallest chunk, in rows: after 30,000 cells one row can take as long as a step of streams.
pub const MIN_CHUNK: usize = 1;
/// So many steps with prompts are followed by one without.
const LOOK_EVERY: usize = 32;
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
    /// Steps with prompts since the last one without.
    n_since: usize,
    chunk: f64,
    n_batch: usize,
    /// The chunk does not follow what steps take.
    is_fixed: bool,
}

/// The sequences that want rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub n_decode: usize,
    /// Sequences whose prompts are being read.
    pub n_prompts: usize,
}

impl Load {
    /// Prompts to a stream, at least 1.
    fn crowd(self) -> f64 {
        (self.n_prompts as f64 / self.n_decode.max(1) as f64).max(1.0)
    }
}

impl Pace {
    /// For steps of at most `n_batch` rows; always with `fixed` rows of prompts, if given.
    pub fn new(n_batch: usize, fixed: Option<usize>) -> Self {
        let chunk = fixed.map_or(FIRST_CHUNK, |n| n as f64);
        Self { decode_s: Vec::new(), n_since: 0, chunk, n_batch, is_fixed: fixed.is_some() }
    }

    /// Records what a step took under this load, where `n_prompt` rows were prompts'.
    pub fn record(&mut self, load: Load, n_prompt: usize, seconds: f64) {
        self.n_since = if n_prompt == 0 || load.n_decode == 0 { 0 } else { self.n_since + 1 };
        if n_prompt == 0 {
            if self.decode_s.len() <= load.n_decode {
                self.decode_s.resize(load.n_decode + 1, None);
            }
            let mean = &mut self.decode_s[load.n_decode];
            *mean = Some(mean.map_or(seconds, |old| old + ALPHA * (seconds - old)));
        } else if load.n_decode > 0 && n_prompt >= self.full_chunk(load) && !self.is_fixed {
            let allowed =
                (self.plain_step_s(load.n_decode) * STALL).max(MIN_STALL_S) * load.crowd();
            let scale = (allowed / seconds.max(1e-9)).clamp(*SCALE.start(), *SCALE.end());
            self.chunk =
                (self.chunk * scale).clamp(MIN_CHUNK as f64, self.n_batch.max(MIN_CHUNK) as f64);
        }
    }

    /// Rows of prompts that the next step may have beside decoding ones; up to `n_batch`.
    pub fn n_prefill(&self, load: Load) -> usize {
        let looks = self.n_since >= LOOK_EVERY && !self.is_fixed;
        if looks { 0 } else { self.chunk(load) }
    }

    fn chunk(&self, load: Load) -> usize {
        let crowd = if self.is_fixed { 1.0 } else { load.crowd() };
        ((self.chunk * crowd) as usize).clamp(1, self.n_batch)
    }

    /// Rows of prompts in a step that has as many as it may: the streams' rows are in the batch,
    /// too.
    fn full_chunk(&self, load: Load) -> usize {
        self.chunk(load).min(self.n_batch.saturating_sub(load.n_decode)).max(1)
    }

    /// A step of `n` streams and nothing else, or of the nearest number of streams that was
    /// measured.
    fn plain_step_s(&self, n: usize) -> f64 {
        let known = self.decode_s.iter().enumerate().filter(|(_, s)| s.is_some());
        known.min_by_key(|(i, _)| i.abs_diff(n)).and_then(|(_, s)| *s).unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps of a machine where a pass costs `pass_s`, each row `row_s`, and a step with a
    /// chunk takes two passes.
    fn settle(pace: &mut Pace, load: Load, pass_s: f64, row_s: f64) -> (f64, f64) {
        let step = |n_prompt: usize| {
            pass_s * if n_prompt > 0 { 2.0 } else { 1.0 }
                + row_s * (load.n_decode + n_prompt) as f64
        };
        for _ in 0..60 {
            pace.record(load, 0, step(0));
            pace.record(load, pace.n_prefill(load), step(pace.n_prefill(load)));
        }
        (step(pace.n_prefill(load)), (step(0) * STALL).max(MIN_STALL_S) * load.crowd())
    }

    fn streams(n_decode: usize) -> Load {
        Load { n_decode, n_prompts: 1 }
    }

    #[test]
    fn the_chunk_settles_where_a_step_takes_as_long_as_it_may() {
        for (load, pass_s, row_s) in [
            (streams(8), 0.004, 0.0028),
            (streams(8), 0.005, 0.001),
            (streams(32), 0.02, 0.0005),
            (Load { n_decode: 2, n_prompts: 6 }, 0.004, 0.002),
        ] {
            let mut pace = Pace::new(512, None);
            let (took, allowed) = settle(&mut pace, load, pass_s, row_s);
            let (n, share) = (pace.n_prefill(load), took / allowed);
            assert!((0.85..=1.05).contains(&share), "{load:?}, {n} rows: {took} of {allowed}");
        }
    }

    #[test]
    fn the_prompts_of_a_burst_are_read_together() {
        let mut pace = Pace::new(512, None);
        settle(&mut pace, streams(8), 0.005, 0.001);
        let lone = pace.n_prefill(streams(7));
        let chunk = |n_decode, n_prompts| pace.n_prefill(Load { n_decode, n_prompts });
        assert_eq!(chunk(7, 7), lone, "as many as run: no crowd");
        let many = chunk(1, 7);
        assert!((6 * lone..=8 * lone).contains(&many), "{lone} {many}");
        assert!(chunk(1, 200) <= 512);
    }

    #[test]
    fn where_nothing_fits_there_is_still_some_progress_and_it_recovers() {
        let mut pace = Pace::new(512, None);
        for _ in 0..60 {
            pace.record(streams(1), 0, 0.012);
            let n = pace.n_prefill(streams(1));
            pace.record(streams(1), n, 0.012 + 0.1 * n as f64); // after many cells
        }
        assert_eq!(pace.n_prefill(streams(1)), MIN_CHUNK);
        settle(&mut pace, streams(8), 0.005, 0.001);
        assert!(pace.n_prefill(streams(8)) > 16);
    }

    #[test]
    fn the_chunk_keeps_to_the_batch() {
        for n_batch in [1, 8, 64] {
            let mut pace = Pace::new(n_batch, None);
            assert!(pace.n_prefill(streams(4)) <= n_batch);
            settle(&mut pace, streams(4), 1e-4, 1e-6);
            assert_eq!(pace.n_prefill(streams(4)), n_batch);
        }
    }

    #[test]
    fn a_chunk_that_fills_the_batch_still_shrinks_where_steps_become_slow() {
        let mut pace = Pace::new(64, None);
        settle(&mut pace, streams(4), 1e-4, 1e-6);
        for _ in 0..20 {
            pace.record(streams(4), 60, 1.0);
        }
        assert!(pace.n_prefill(streams(4)) < 60);
    }

    #[test]
    fn streams_that_grow_while_a_prompt_is_read_leave_it_its_share() {
        let mut pace = Pace::new(512, None);
        let load = streams(4);
        let (mut n_read, mut n_without) = (0, 0);
        for step in 0..2000 {
            let n = pace.n_prefill(load);
            let plain_s = 0.02 * (1.0 + step as f64 / 500.0);
            pace.record(load, n, plain_s + 0.002 * n as f64);
            n_read += n;
            n_without += usize::from(n == 0);
        }
        // Half as many rows again as a plain step takes, and more as these become slower.
        assert!(n_read > 2000 * 25, "{n_read}");
        assert!((55..=65).contains(&n_without), "{n_without}");
    }

    #[test]
    fn a_fixed_chunk_stays() {
        let mut pace = Pace::new(512, Some(48));
        settle(&mut pace, streams(4), 1e-4, 1e-6);
        assert_eq!(pace.n_prefill(Load { n_decode: 1, n_prompts: 9 }), 48);
    }

    #[test]
    fn a_prompt_that_ends_says_nothing_about_the_chunk() {
        let mut pace = Pace::new(512, None);
        let before = pace.n_prefill(streams(4));
        pace.record(streams(4), 0, 0.01);
        pace.record(streams(4), 3, 0.5);
        pace.record(streams(0), 512, 2.0);
        assert_eq!(pace.n_prefill(streams(4)), before);
    }
}
