//! Whether an idle engine should wait a moment for more requests before it starts on the first. Pure.
//!
//! A new request joins at the next step, so waiting only helps where a burst's prompts would enter
//! one by one:
//!
//! - Each time the engine starts from idle, it later learns whether a concurrent request came
//!   within `MAX_WAIT_TIME`, and how soon.
//! - It waits only if one came after more than half of the last starts, and then for twice the mean
//!   time until it came, at most `MAX_WAIT_TIME`. A client that sends one request after another never
//!   waits.
//! - The wait ends as soon as every slot has a request.

/// Weight of a new observation; some ten starts are remembered.
const ALPHA: f64 = 0.2;

/// What earlier starts from idle taught about bursts.
#[derive(Debug)]
pub struct Bursts {
    max_wait_s: f64,
    /// Running share of starts that were followed by another request in time.
    share: f64,
    /// Running mean of the seconds until it came.
    delay_s: f64,
    /// A start whose outcome is not known yet.
    started_at: Option<f64>,
}

impl Bursts {
    /// Nothing is known yet, so the first starts do not wait.
    pub fn new(max_wait_s: f64) -> Self {
        Self { max_wait_s, share: 0.0, delay_s: 0.0, started_at: None }
    }

    /// A request arrived at `now` (seconds on any steady clock). Returns how long the engine, if it
    /// was `idle`, should wait for more before it starts.
    pub fn arrival(&mut self, now: f64, idle: bool) -> f64 {
        if let Some(start) = self.started_at.take() {
            // Requests that come together may arrive in another order than they were accepted in.
            let delay_s = (now - start).max(0.0);
            let in_time = !idle && delay_s <= self.max_wait_s;
            self.share += ALPHA * (f64::from(u8::from(in_time)) - self.share);
            if in_time {
                self.delay_s += ALPHA * (delay_s - self.delay_s);
            }
        }
        if !idle {
            return 0.0;
        }
        self.started_at = Some(now);
        if self.share > 0.5 { (2.0 * self.delay_s).min(self.max_wait_s) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_sends_one_request_after_another_never_waits() {
        let mut bursts = Bursts::new(0.1);
        for i in 0..100 {
            assert_eq!(bursts.arrival(f64::from(i) * 0.02, true), 0.0);
        }
    }

    #[test]
    fn requests_that_overtake_each_other_ask_for_no_wait_below_zero() {
        for max_wait_s in [0.0, 0.1] {
            let mut bursts = Bursts::new(max_wait_s);
            for burst in 1..20 {
                assert!(bursts.arrival(f64::from(burst), true) >= 0.0);
                bursts.arrival(f64::from(burst) - 1e-6, false);
            }
        }
    }

    #[test]
    fn where_bursts_are_usual_the_first_of_one_waits_briefly() {
        let mut bursts = Bursts::new(0.1);
        let waits: Vec<f64> = (0..20)
            .map(|burst| {
                let start = f64::from(burst) * 10.0;
                let wait = bursts.arrival(start, true);
                assert_eq!(bursts.arrival(start + 0.004, false), 0.0);
                let second = bursts.arrival(start + 0.008, false);
                assert_eq!(second, 0.0, "only the first of a burst teaches");
                wait
            })
            .collect();
        assert_eq!(waits[0], 0.0);
        assert!((0.003..=0.01).contains(&waits[19]), "{waits:?}");
        // Bursts end: after some lone requests there is no wait any more.
        let after: Vec<f64> =
            (0..10).map(|i| bursts.arrival(1000.0 + f64::from(i), true)).collect();
        assert_eq!(after[9], 0.0, "{after:?}");
    }

    #[test]
    fn the_wait_is_never_longer_than_allowed() {
        let mut bursts = Bursts::new(0.05);
        for burst in 0..50 {
            let start = f64::from(burst);
            assert!(bursts.arrival(start, true) <= 0.05);
            bursts.arrival(start + 0.049, false);
        }
    }
}
