//! How many threads compute the next pass. Pure.
//!
//! Threads meet after each operation of a pass. Where one shares its core with another process, all
//! wait for it, and fewer threads are faster. How many depends on the system's scheduler, so it is
//! tried: a trial computes some passes with fewer threads or with more, and what they take, relative
//! to what passes of about as many rows usually take, decides.
//!
//! When to try: fewer, while others are busy on our cores; more, while cores are idle; and either
//! one where the system does not tell. A trial that failed is repeated after a time in proportion to
//! what it cost, so that all of them together cost at most a small share ([`SHARE`], [`BLIND_SHARE`]).

use crate::machine::Usage;

/// Cores that others use, from which on fewer threads are tried.
const OTHERS: f64 = 0.25;
/// Idle cores, from which on more threads are tried.
const IDLE: f64 = 0.5;
/// Passes of a trial.
const N_PASSES: usize = 5;
/// A trial ends once it has cost as much time as so many usual passes.
const MOST_EXTRA: f64 = 3.0;
/// Fewer threads must take at most this share of the usual time.
const FEWER: f64 = 0.95;
/// So must more threads.
const MORE: f64 = 0.97;
/// Share of the time that trials may cost for which there is a reason.
const SHARE: f64 = 1.0 / 100.0;
/// The same for those without.
const BLIND_SHARE: f64 = 1.0 / 400.0;
/// Seconds until a trial is repeated, at least.
const MIN_WAIT_S: f64 = 0.5;
/// A trial that took less than this share of the usual time made no difference.
const FLAT: f64 = 1.1;
/// Weight of a new pass for what passes usually take.
const ALPHA: f64 = 0.2;
/// Sizes of passes, by the logarithm of their rows.
const N_BUCKETS: usize = 16;
/// A usual time is known after so many passes.
const KNOWN: usize = 3;

/// What passes of a number of rows usually take.
#[derive(Clone, Copy, Debug, Default)]
struct Usual {
    seconds: f64,
    n_passes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Fewer,
    More,
}

/// When a direction may be tried again, and by how many threads.
#[derive(Clone, Copy, Debug)]
struct Next {
    with_reason_s: f64,
    blind_s: f64,
    /// `None`: as the cores' usage suggests.
    stride: Option<usize>,
}

#[derive(Debug)]
struct Trial {
    direction: Direction,
    n: usize,
    /// Seconds of its passes as shares of the usual ones.
    ratios: Vec<f64>,
    extra_s: f64,
}

/// The number of threads, from what passes took.
#[derive(Debug)]
pub struct ThreadCount {
    /// The most there may be, and the most there may be now.
    asked: usize,
    most: usize,
    n: usize,
    /// By the logarithm of the number of rows.
    usual: [Usual; N_BUCKETS],
    trial: Option<Trial>,
    fewer: Next,
    more: Next,
    usage: Option<Usage>,
}

impl ThreadCount {
    /// At most `most` threads, which is where it begins.
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        let next = Next { with_reason_s: 0.0, blind_s: 0.0, stride: None };
        Self {
            asked: most,
            most,
            n: most,
            usual: Default::default(),
            trial: None,
            fewer: next,
            more: next,
            usage: None,
        }
    }

    /// Threads for the next pass, of `n_rows`. A trial is of sizes whose usual time is known: the
    /// others become known meanwhile.
    pub fn now(&self, n_rows: usize) -> usize {
        let trial = self.trial.as_ref().filter(|_| self.usual[bucket(n_rows)].n_passes >= KNOWN);
        trial.map_or(self.n, |trial| trial.n)
    }

    /// The usual number of threads, whatever is tried.
    pub fn usual(&self) -> usize {
        self.n
    }

    /// What there is now: so many cores for all threads, and their usage, if the system tells.
    pub fn look(&mut self, n_cores: usize, usage: Option<Usage>) {
        self.usage = usage;
        self.most = n_cores.clamp(1, self.asked);
        if self.most < self.n {
            (self.n, self.trial) = (self.most, None);
            self.usual = Default::default();
        }
    }

    /// Records that a pass of `n_rows` took `seconds` and ended at `at` (seconds on any steady
    /// clock).
    pub fn record(&mut self, n_rows: usize, seconds: f64, at: f64) {
        let usual = &mut self.usual[bucket(n_rows)];
        let Some(trial) = self.trial.as_mut().filter(|_| usual.n_passes >= KNOWN) else {
            usual.n_passes += 1;
            let weight = ALPHA.max(1.0 / usual.n_passes as f64);
            usual.seconds += weight * (seconds - usual.seconds);
            if self.trial.is_none() {
                self.begin(at);
            }
            return;
        };
        trial.ratios.push(seconds / usual.seconds);
        trial.extra_s += seconds - usual.seconds;
        if trial.ratios.len() == N_PASSES || trial.extra_s > MOST_EXTRA * usual.seconds {
            self.end(at);
        }
    }

    /// Begins a trial if there is one to begin.
    fn begin(&mut self, at: f64) {
        if self.usual.iter().all(|usual| usual.n_passes < KNOWN) {
            return;
        }
        let reason = |of: fn(&Usage) -> bool| self.usage.as_ref().map(of);
        let due = |next: &Next, reason: Option<bool>| {
            at >= if reason == Some(true) { next.with_reason_s } else { next.blind_s }
        };
        // More without a reason is tried all the same: a system may call a core busy that waits.
        let (direction, n) =
            if self.n < self.most && due(&self.more, reason(|usage| usage.idle >= IDLE)) {
                let suggested = self.usage.map_or(self.n as f64 / 3.0, |usage| usage.idle);
                let stride = self.more.stride.unwrap_or(suggested.round() as usize).max(1);
                (Direction::More, (self.n + stride).min(self.most))
            } else if self.n > 1
                && reason(|usage| usage.others >= OTHERS) != Some(false)
                && due(&self.fewer, reason(|usage| usage.others >= OTHERS))
            {
                let suggested = self.usage.map_or(self.n as f64 / 4.0, |usage| usage.others);
                let stride = self.fewer.stride.unwrap_or(suggested.round() as usize).max(1);
                (Direction::Fewer, self.n.saturating_sub(stride).max(1))
            } else {
                return;
            };
        let ratios = Vec::with_capacity(N_PASSES);
        self.trial = Some(Trial { direction, n, ratios, extra_s: 0.0 });
    }

    /// Decides by the trial.
    fn end(&mut self, at: f64) {
        let Some(mut trial) = self.trial.take() else { return };
        trial.ratios.sort_by(f64::total_cmp);
        let median = trial.ratios.get(trial.ratios.len() / 2).copied();
        let (least, next, back) = match trial.direction {
            Direction::Fewer => (FEWER, &mut self.fewer, &mut self.more),
            Direction::More => (MORE, &mut self.more, &mut self.fewer),
        };
        let whole = trial.ratios.len() == N_PASSES;
        if let Some(median) = median.filter(|median| whole && *median <= least) {
            *next = Next { with_reason_s: at, blind_s: at, stride: None };
            let wait_s = at + MIN_WAIT_S;
            *back = Next {
                with_reason_s: wait_s,
                blind_s: at + MIN_WAIT_S * SHARE / BLIND_SHARE,
                stride: None,
            };
            self.n = trial.n;
            self.usual.iter_mut().for_each(|usual| usual.seconds *= median);
            return;
        }
        // Where it made no difference, the right number may be farther away; else nearer, or where
        // the usage suggests.
        let stride = trial.n.abs_diff(self.n);
        let stride = match (median, next.stride) {
            (Some(median), _) if median < FLAT => Some(2 * stride),
            (_, None) => Some(stride / 2),
            (_, Some(_)) => None,
        };
        let after = |share: f64| at + (trial.extra_s / share).max(MIN_WAIT_S);
        *next = Next { with_reason_s: after(SHARE), blind_s: after(BLIND_SHARE), stride };
    }
}

/// Where the usual time of passes of so many rows is.
fn bucket(n_rows: usize) -> usize {
    (n_rows.max(1).ilog2() as usize).min(N_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CORES: usize = 8;

    /// Seconds of a pass of one row with `n` threads beside `busy` processes: work that threads
    /// share, meetings, and waits for threads without a core of their own.
    fn pass_s(n: usize, busy: usize) -> f64 {
        let crowded = (n + busy).saturating_sub(CORES);
        0.008 / n as f64 + 0.0001 + if crowded > 0 { 0.01 } else { 0.0 }
    }

    struct Machine {
        count: ThreadCount,
        at: f64,
        told: bool,
    }

    impl Machine {
        fn new(told: bool) -> Self {
            Self { count: ThreadCount::new(CORES), at: 0.0, told }
        }

        /// Runs for some seconds beside busy processes; returns passes in a second.
        fn run(&mut self, seconds: f64, busy: usize) -> f64 {
            let (start, mut n_passes) = (self.at, 0);
            while self.at < start + seconds {
                let n = self.count.now(1);
                if n_passes % 20 == 0 {
                    let others = busy.min(CORES) as f64;
                    let idle = (CORES as f64 - others - n as f64).max(0.0);
                    let usage = Usage { others, idle };
                    self.count.look(CORES, self.told.then_some(usage));
                }
                let seconds = pass_s(n, busy);
                self.at += seconds;
                self.count.record(1, seconds, self.at);
                n_passes += 1;
            }
            f64::from(n_passes) / seconds
        }
    }

    fn best(busy: usize) -> f64 {
        (1..=CORES).map(|n| 1.0 / pass_s(n, busy)).fold(0.0, f64::max)
    }

    #[test]
    fn alone_all_threads_compute_and_little_is_lost() {
        for (told, least) in [(true, 0.999), (false, 0.98)] {
            let mut machine = Machine::new(told);
            let rate = machine.run(60.0, 0);
            assert!(rate > least * best(0), "{told}: {rate} of {}", best(0));
        }
    }

    #[test]
    fn beside_busy_processes_the_best_number_is_found_and_left_when_they_end() {
        for told in [true, false] {
            for busy in [1, 3, 7] {
                let mut machine = Machine::new(told);
                machine.run(5.0, 0);
                machine.run(4.0, busy);
                let rate = machine.run(20.0, busy);
                assert!(rate > 0.9 * best(busy), "{told}, {busy}: {rate} of {}", best(busy));
                machine.run(8.0, 0);
                let rate = machine.run(20.0, 0);
                assert!(rate > 0.97 * best(0), "{told}, {busy}: {rate} of {} after", best(0));
            }
        }
    }

    #[test]
    fn a_start_beside_busy_processes_is_no_different() {
        for told in [true, false] {
            let mut machine = Machine::new(told);
            machine.run(4.0, 2);
            assert!(machine.run(20.0, 2) > 0.9 * best(2), "{told}: {:?}", machine.count);
        }
    }

    #[test]
    fn a_quota_holds_from_the_next_pass_on() {
        let mut count = ThreadCount::new(4);
        count.look(2, None);
        assert_eq!(count.now(1), 2);
        count.look(0, None);
        assert_eq!(count.now(1), 1);
        let idle = Some(Usage { others: 0.0, idle: 3.0 });
        count.look(4, idle);
        for i in 0..200 {
            count.record(1, 1.0 / count.now(1) as f64, f64::from(i));
        }
        assert_eq!(count.now(1), 4);
    }

    /// Passes of all sizes: only those of sizes that were seen before decide.
    #[test]
    fn passes_of_any_size_decide() {
        let mut count = ThreadCount::new(2);
        count.look(2, Some(Usage { others: 1.0, idle: 0.0 }));
        let mut rng = fastrand::Rng::with_seed(1);
        for i in 0..300 {
            let n_rows = 1 << rng.usize(0..9);
            let slow = if count.now(n_rows) == 2 { 5.0 } else { 1.0 };
            count.record(n_rows, slow * n_rows as f64, f64::from(i));
        }
        assert_eq!(count.now(1), 1);
    }

    #[test]
    fn a_size_that_is_not_known_is_not_tried() {
        let mut count = ThreadCount::new(2);
        for i in 0..KNOWN {
            count.record(1, 1.0, i as f64);
        }
        assert_eq!((count.now(1), count.now(2), count.usual()), (1, 2, 2));
        for i in 0..KNOWN {
            count.record(2, 1.0, 10.0 + i as f64);
        }
        assert_eq!(count.now(2), 1, "now it is");
    }
}
