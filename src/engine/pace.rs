//! How much of prompts one step may compute while other sequences decode. Pure.
//!
//! A new request's prompt makes the steps of running streams longer. After each step that carried a
//! full chunk, the chunk is scaled by the ratio of the time such a step may take to the time it
//! took. A step may take [`STALL`] times as long as a step of as many streams without a prompt, and
//! at least [`MIN_STALL_S`]. For a cost of `a + b n` the scaling settles at the `n` where the step
//! takes just that long; where even `a` is too long, steps have one row. Streams become slower as
//! they grow, so while a long prompt is read one of [`LOOK_EVERY`] steps goes without it.
//!
//! A chunk is a number of cells, [`row_cells`](super::scheduler::row_cells) for each row: one row
//! after 30,000 tokens takes as long as dozens of a short prompt, whose chunk would stall the streams
//! for seconds.
//!
//! Where more prompts wait than streams run, that time is multiplied by the prompts per stream: the
//! prompts of a burst are read together, and a single new request is read in small chunks.

use super::scheduler::{Prefill, PromptRows, ROW_CELLS};

/// A step with a chunk may last this many times a step without one.
pub const STALL: f64 = 2.5;
/// A step may always last this long, in seconds.
pub const MIN_STALL_S: f64 = 0.036;
/// So many steps with prompts are followed by one without.
const LOOK_EVERY: usize = 32;
/// The chunk before anything was measured: so many rows without cells before them.
const FIRST_CHUNK: f64 = 16.0 * ROW_CELLS as f64;
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
    /// Cells.
    chunk: f64,
    /// Rows of prompts in a step, whatever it takes.
    fixed: Option<usize>,
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
    /// Always with `fixed` rows of prompts, if given.
    pub fn new(fixed: Option<usize>) -> Self {
        Self { decode_s: Vec::new(), n_since: 0, chunk: FIRST_CHUNK, fixed }
    }

    /// Records what a step took under this load with these rows of prompts.
    pub fn record(&mut self, load: Load, prompts: PromptRows, seconds: f64) {
        self.n_since = if prompts.n == 0 || load.n_decode == 0 { 0 } else { self.n_since + 1 };
        if prompts.n == 0 {
            if self.decode_s.len() <= load.n_decode {
                self.decode_s.resize(load.n_decode + 1, None);
            }
            let mean = &mut self.decode_s[load.n_decode];
            *mean = Some(mean.map_or(seconds, |old| old + ALPHA * (seconds - old)));
        } else if load.n_decode > 0 && prompts.cut {
            let allowed =
                (self.plain_step_s(load.n_decode) * STALL).max(MIN_STALL_S) * load.crowd();
            let scale = (allowed / seconds.max(1e-9)).clamp(*SCALE.start(), *SCALE.end());
            // A row, and not far beyond what the batch had room for.
            let one = (prompts.cells / prompts.n) as f64;
            let most = 2.0 * prompts.cells as f64 / load.crowd();
            self.chunk = (self.chunk * scale).min(most).max(one);
        }
    }

    /// What the next step may compute of prompts beside decoding sequences.
    pub fn prefill(&self, load: Load) -> Prefill {
        match self.fixed {
            Some(n) => Prefill::Rows(n),
            None if self.n_since >= LOOK_EVERY => Prefill::Rows(0),
            None => Prefill::Cells((self.chunk * load.crowd()) as usize),
        }
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

    /// Steps of at most 512 rows on a machine.
    struct Machine {
        pass_s: f64,
        row_s: f64,
        /// For each cell that a row attends to.
        cell_s: f64,
    }

    const N_BATCH: usize = 512;

    impl Machine {
        fn new(pass_s: f64, row_s: f64) -> Self {
            Self { pass_s, row_s, cell_s: 0.0 }
        }

        fn plain_s(&self, load: Load) -> f64 {
            self.pass_s + self.row_s * load.n_decode as f64
        }

        /// The rows that a long prompt after `n_before` cells gets, and what the step takes: two
        /// passes, if it has any.
        fn step(&self, pace: &Pace, load: Load, n_before: usize) -> (PromptRows, f64) {
            let row_cells = ROW_CELLS + n_before;
            let n = match pace.prefill(load) {
                Prefill::Rows(n) => n,
                Prefill::Cells(cells) => (cells / row_cells).max(1),
            };
            let n = n.min(N_BATCH - load.n_decode);
            let rows_s = (self.row_s + self.cell_s * n_before as f64) * n as f64;
            let pass_s = if n > 0 { self.pass_s } else { 0.0 };
            let prompts = PromptRows { n, cells: n * row_cells, cut: true };
            (prompts, self.plain_s(load) + pass_s + rows_s)
        }

        /// Runs steps with and without the prompt; returns the rows of the last one, what it took,
        /// and what it may take.
        fn settle(&self, pace: &mut Pace, load: Load, n_before: usize) -> (usize, f64, f64) {
            for _ in 0..60 {
                pace.record(load, PromptRows::default(), self.plain_s(load));
                let (prompts, seconds) = self.step(pace, load, n_before);
                pace.record(load, prompts, seconds);
            }
            let (prompts, seconds) = self.step(pace, load, n_before);
            (prompts.n, seconds, (self.plain_s(load) * STALL).max(MIN_STALL_S) * load.crowd())
        }
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
            let (n, took, allowed) =
                Machine::new(pass_s, row_s).settle(&mut Pace::new(None), load, 0);
            let share = took / allowed;
            assert!((0.8..=1.05).contains(&share), "{load:?}, {n} rows: {took} of {allowed}");
        }
    }

    #[test]
    fn a_prompt_after_many_cells_begins_with_few_rows() {
        let machine = Machine { cell_s: 1e-6, ..Machine::new(0.005, 0.001) };
        let mut pace = Pace::new(None);
        let load = streams(8);
        let (n_short, ..) = machine.settle(&mut pace, load, 0);
        let (prompts, seconds) = machine.step(&pace, load, 30_000);
        assert!(prompts.n <= 2 && seconds < 0.08, "{n_short} rows became {prompts:?}, {seconds} s");
        machine.settle(&mut pace, load, 30_000);
        let (prompts, _) = machine.step(&pace, load, 0);
        assert!((n_short / 2..=2 * n_short).contains(&prompts.n), "{n_short} and {prompts:?}");
    }

    #[test]
    fn the_prompts_of_a_burst_are_read_together() {
        let (machine, mut pace) = (Machine::new(0.005, 0.001), Pace::new(None));
        machine.settle(&mut pace, streams(8), 0);
        let rows = |n_decode, n_prompts| machine.step(&pace, Load { n_decode, n_prompts }, 0).0.n;
        let lone = rows(7, 1);
        assert_eq!(rows(7, 7), lone, "as many as run: no crowd");
        let many = rows(1, 7);
        assert!((6 * lone..=8 * lone).contains(&many), "{lone} {many}");
    }

    #[test]
    fn where_nothing_fits_there_is_still_some_progress_and_it_recovers() {
        let slow = Machine { cell_s: 1e-4, ..Machine::new(0.005, 0.001) };
        let mut pace = Pace::new(None);
        assert_eq!(slow.settle(&mut pace, streams(1), 10_000).0, 1);
        let (n, ..) = Machine::new(0.005, 0.001).settle(&mut pace, streams(8), 0);
        assert!(n > 16, "{n}");
    }

    #[test]
    fn a_chunk_that_fills_the_batch_still_shrinks_where_steps_become_slow() {
        let (fast, mut pace) = (Machine::new(1e-4, 1e-6), Pace::new(None));
        assert_eq!(fast.settle(&mut pace, streams(4), 0).0, N_BATCH - 4);
        for _ in 0..20 {
            let (prompts, _) = fast.step(&pace, streams(4), 0);
            pace.record(streams(4), prompts, 1.0);
        }
        assert!(fast.step(&pace, streams(4), 0).0.n < 60);
    }

    #[test]
    fn streams_that_grow_while_a_prompt_is_read_leave_it_its_share() {
        let (machine, mut pace) = (Machine::new(0.0, 0.002), Pace::new(None));
        let load = streams(4);
        let (mut n_read, mut n_without) = (0, 0);
        for step in 0..2000 {
            let (prompts, _) = machine.step(&pace, load, 0);
            let plain_s = 0.02 * (1.0 + step as f64 / 500.0);
            let prompts = if prompts.n == 0 { PromptRows::default() } else { prompts };
            pace.record(load, prompts, plain_s + 0.002 * prompts.n as f64);
            n_read += prompts.n;
            n_without += usize::from(prompts.n == 0);
        }
        // Half as many rows again as a plain step takes, and more as these become slower.
        assert!(n_read > 2000 * 25, "{n_read}");
        assert!((55..=65).contains(&n_without), "{n_without}");
    }

    #[test]
    fn a_fixed_chunk_stays() {
        let mut pace = Pace::new(Some(48));
        Machine::new(1e-4, 1e-6).settle(&mut pace, streams(4), 0);
        assert_eq!(pace.prefill(Load { n_decode: 1, n_prompts: 9 }), Prefill::Rows(48));
    }

    #[test]
    fn a_prompt_that_ends_says_nothing_about_the_chunk() {
        let mut pace = Pace::new(None);
        let before = pace.prefill(streams(4));
        pace.record(streams(4), PromptRows::default(), 0.01);
        pace.record(streams(4), PromptRows { n: 3, cells: 3000, cut: false }, 0.5);
        pace.record(streams(0), PromptRows { n: 512, cells: 512_000, cut: true }, 2.0);
        assert_eq!(pace.prefill(streams(4)), before);
    }
}
