//! How often something happens, as of late.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// An event's weight falls to 1/e in this time.
const MEMORY: Duration = Duration::from_secs(10);

/// Events per second: each counts for 1 / `MEMORY`, and less as it becomes older. From its start
/// the rate needs as long to reach what it measures.
#[derive(Debug)]
pub struct Rate(Mutex<(Instant, f64)>);

impl Rate {
    /// No event so far.
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new((now, 0.0)))
    }

    /// Counts an event.
    pub(super) fn count(&self, now: Instant) {
        let mut last = self.0.lock();
        *last = (now, faded(*last, now) + 1.0 / MEMORY.as_secs_f64());
    }

    /// Events per second.
    pub fn per_second(&self, now: Instant) -> f64 {
        faded(*self.0.lock(), now)
    }
}

/// What is left of a rate that was known at a time before.
fn faded((at, rate): (Instant, f64), now: Instant) -> f64 {
    rate * (-now.saturating_duration_since(at).div_duration_f64(MEMORY)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let rate = Rate::new(start);
        assert_eq!(rate.per_second(start), 0.0);
        (0..400).for_each(|i| rate.count(at(f64::from(i) / 4.0)));
        let known = rate.per_second(at(100.0));
        assert!((known - 4.0).abs() < 0.1, "{known}");
        let later = rate.per_second(at(110.0));
        assert!((later - known / std::f64::consts::E).abs() < 1e-9, "{later}");
        rate.count(at(90.0)); // another thread's clock was read earlier
        assert!(rate.per_second(at(100.0)) > 0.0);
    }
}
