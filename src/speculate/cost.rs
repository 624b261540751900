//! What a step of `n` rows takes on this machine: measured at start, kept current by every step.
//! Pure: durations come from outside.

/// Numbers of rows that are measured; in between it is a straight line.
pub const POINTS: [usize; 12] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];
/// Rounds of measuring, in which each number of rows adds up to at most [`MOST_ROWS`].
const ROUNDS: usize = 10;
const MOST_ROWS: usize = 96;
/// Numbers of rows that may be added to a step.
const FEW_ROWS: [usize; 4] = [1, 2, 4, 8];
/// Share of the time for the curve; the rest is for what a change of the number of rows costs.
const CURVE: f64 = 0.8;
/// Where time is up before two rows are measured, the second is taken to cost this share of the
/// first.
const SECOND_ROW: f64 = 0.5;
/// Weight of a step for the speed of the whole machine: others share it, contexts grow.
const SPEED: f64 = 0.1;
/// Weight of a step for what a change of the number of rows costs.
const CHANGE: f64 = 0.05;
/// Weight of a step for the shape of the curve near its number of rows.
const SHAPE: f64 = 0.02;
/// A step this many times slower or faster than predicted says nothing: the machine was elsewhere ...
const OUTLIER: f64 = 4.0;
/// ... unless so many are in a row, and none is farther off than this: the machine has changed, as when
/// what kept its cores busy while it was measured has ended.
const CHANGED: u32 = 8;
const FARTHEST: f64 = 64.0;

/// Measures what steps take by `time`, the seconds of a pass of `n` rows: seconds for each number
/// of rows, ascending, after a pass of as many, and the seconds more after one of another number:
/// the best of a few rounds. A pass begins only if it is predicted to end within `limit_s` of
/// passes, from its last time or in proportion to its rows. One row is measured in any case.
pub fn measure<E>(
    numbers: &[usize],
    limit_s: f64,
    mut time: impl FnMut(usize) -> Result<f64, E>,
) -> Result<(Vec<(usize, f64)>, f64), E> {
    let mut spent = 0.0;
    let mut timed = |n: usize, predicted: f64, limit_s: f64| -> Result<Option<f64>, E> {
        if spent + predicted > limit_s {
            return Ok(None);
        }
        let seconds = time(n)?;
        spent += seconds;
        Ok(Some(seconds))
    };
    let mut points: Vec<(usize, f64)> = vec![];
    for round in 0..ROUNDS {
        for (i, &n) in numbers.iter().enumerate().take_while(|(_, n)| **n * round <= MOST_ROWS) {
            let limit_s = if points.is_empty() { f64::INFINITY } else { CURVE * limit_s };
            let predicted = points.get(i).or(points.last());
            let predicted = predicted.map_or(0.0, |(known, s)| s * n as f64 / *known as f64);
            // The first pass of another number builds a graph.
            let Some(first) = timed(n, predicted, limit_s)? else { break };
            let Some(seconds) = timed(n, first, limit_s)? else { break };
            match points.get_mut(i) {
                Some((_, best)) => *best = best.min(seconds),
                None => points.push((n, seconds)),
            }
        }
    }
    let mut change_s = 0.0;
    if let [(1, one), (2, two), ..] = points[..] {
        let mut changed = [f64::INFINITY; 2];
        for i in (0..2).cycle().take(2 * ROUNDS) {
            let Some(seconds) = timed(i + 1, [one, two][i], limit_s)? else { break };
            changed[i] = changed[i].min(seconds);
        }
        if changed[1].is_finite() {
            change_s = f64::midpoint(changed[0] - one, changed[1] - two).max(0.0);
        }
    } else if let [(n, seconds)] = points[..] {
        points.push((n + 1, seconds * (1.0 + SECOND_ROW / n as f64)));
    }
    Ok((points, change_s))
}

/// Seconds by number of rows.
#[derive(Clone, Debug)]
pub struct Cost {
    /// (rows, seconds), both ascending.
    points: Vec<(usize, f64)>,
    /// Seconds more for a step that has another number of rows than the one before: its graph is
    /// built anew.
    change_s: f64,
    /// By what everything is multiplied now.
    speed: f64,
    /// Outliers since the last step that was none.
    n_outliers: u32,
}

impl Cost {
    /// From measured (rows, seconds), at least one and ascending in rows. A point below its
    /// predecessor is noise and is raised to it.
    #[must_use]
    pub fn from_points(measured: &[(usize, f64)]) -> Self {
        assert!(!measured.is_empty() && measured.is_sorted_by(|a, b| a.0 < b.0), "points in order");
        let mut cost = Self { points: measured.to_vec(), change_s: 0.0, speed: 1.0, n_outliers: 0 };
        cost.keep_order();
        cost
    }

    /// The same, where a step takes `change_s` seconds more if it has another number of rows than
    /// the one before.
    #[must_use]
    pub fn with_change(self, change_s: f64) -> Self {
        Self { change_s: change_s.max(0.0), ..self }
    }

    /// Seconds of a step of `n` rows after one of `before`.
    #[must_use]
    pub fn seconds_after(&self, before: usize, n: usize) -> f64 {
        self.seconds(n) + if n == before { 0.0 } else { self.change_s * self.speed }
    }

    /// Seconds of a step of `n` rows after one of as many. Beyond the last point it goes on as
    /// between the last two.
    #[must_use]
    pub fn seconds(&self, n: usize) -> f64 {
        let points = &self.points;
        let after = points.partition_point(|&(rows, _)| rows < n).clamp(1, points.len().max(2) - 1);
        let Some(&(n1, s1)) = points.get(after) else { return points[0].1 * self.speed };
        let (n0, s0) = points[after - 1];
        let slope = (s1 - s0) / (n1 - n0) as f64;
        (s0 + slope * (n as f64 - n0 as f64)).max(0.5 * points[0].1) * self.speed
    }

    /// Seconds that each of a few rows more costs in a step of `n` rows: of as many as are cheapest.
    /// Often the first one is dear, because another kernel computes several, and the next ones are not.
    #[must_use]
    pub fn row_seconds(&self, n: usize) -> f64 {
        let base = self.seconds(n);
        let each = |more: &usize| (self.seconds(n + more) - base) / *more as f64;
        FEW_ROWS.iter().map(each).fold(f64::INFINITY, f64::min)
    }

    /// Records that a step of `n` rows after one of `before` took `seconds`.
    pub fn record(&mut self, before: usize, n: usize, seconds: f64) {
        let predicted = self.seconds_after(before, n);
        let ratio = seconds / predicted;
        if !(1.0 / OUTLIER..OUTLIER).contains(&ratio) {
            let is_near = (1.0 / FARTHEST..FARTHEST).contains(&ratio);
            self.n_outliers = if is_near { self.n_outliers + 1 } else { 0 };
            if self.n_outliers == CHANGED {
                (self.speed, self.n_outliers) = (self.speed * ratio, 0);
            }
            return;
        }
        self.n_outliers = 0;
        if n != before {
            self.change_s = (self.change_s + CHANGE * (seconds - predicted) / self.speed).max(0.0);
            return;
        }
        self.speed *= 1.0 + SPEED * (ratio - 1.0);
        let near = self.points.iter_mut().min_by_key(|(rows, _)| rows.abs_diff(n));
        near.expect("there are points").1 *= 1.0 + SHAPE * (ratio - 1.0);
        self.keep_order();
    }

    fn keep_order(&mut self) {
        let mut least = 0.0f64;
        for (_, seconds) in &mut self.points {
            *seconds = seconds.max(least);
            least = *seconds;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measures a machine whose passes take `pass_s` and `row_s` for each row, and `first_s` more
    /// where their number changed. Returns the points, the change, and the seconds of all passes.
    fn measured(pass_s: f64, row_s: f64, first_s: f64) -> (Vec<(usize, f64)>, f64, f64) {
        let (mut spent, mut before) = (0.0, 0);
        let time = |n: usize| -> Result<f64, ()> {
            let seconds = pass_s + row_s * n as f64 + if n == before { 0.0 } else { first_s };
            before = n;
            spent += seconds;
            Ok(seconds)
        };
        let (points, change_s) = measure(&POINTS, 1.5, time).unwrap();
        (points, change_s, spent)
    }

    #[test]
    fn a_fast_machine_is_measured_whole_and_a_slow_one_within_the_time() {
        let (points, change_s, spent) = measured(0.001, 0.0001, 0.0005);
        assert!(points.iter().map(|p| p.0).eq(POINTS) && spent < 1.5, "{points:?} {spent}");
        let exact = |&(n, s): &(usize, f64)| (s - 0.001 - 0.0001 * n as f64).abs() < 1e-9;
        assert!(points.iter().all(exact) && (change_s - 0.0005).abs() < 1e-9, "{points:?}");
        for pass_s in [0.02, 0.1, 0.2, 0.3] {
            let (points, _, spent) = measured(pass_s, pass_s / 5.0, pass_s / 10.0);
            assert!(spent < 1.5, "{pass_s}: {spent} s for {points:?}");
            assert!(points.len() >= 2 && points[0].0 == 1, "{pass_s}: {points:?}");
        }
        let (points, _, spent) = measured(2.0, 0.5, 1.0);
        assert_eq!((points, spent), (vec![(1, 2.5), (2, 3.75)], 6.0), "one row, twice");
    }

    #[test]
    fn it_is_a_line_between_points_and_goes_on_beyond() {
        let cost = Cost::from_points(&[(1, 1.0), (3, 2.0), (5, 6.0)]);
        for (n, s) in [(1, 1.0), (2, 1.5), (3, 2.0), (4, 4.0), (5, 6.0), (7, 10.0)] {
            assert!((cost.seconds(n) - s).abs() < 1e-9, "{n}: {}", cost.seconds(n));
        }
        assert_eq!(Cost::from_points(&[(4, 2.0)]).seconds(9), 2.0);
        assert_eq!(
            Cost::from_points(&[(1, 2.0), (2, 1.0)]).seconds(2),
            2.0,
            "more rows never cost less"
        );
    }

    #[test]
    fn a_dear_second_row_does_not_hide_cheap_ones_after_it() {
        let cost = Cost::from_points(&[(1, 1.0), (2, 1.8), (5, 2.1), (9, 4.5)]);
        assert!((cost.row_seconds(1) - 1.1 / 4.0).abs() < 1e-9, "{}", cost.row_seconds(1));
        assert!((cost.row_seconds(5) - 0.6).abs() < 1e-9, "{}", cost.row_seconds(5));
    }

    #[test]
    fn it_follows_the_machine_and_ignores_a_hiccup() {
        let mut cost = Cost::from_points(&[(1, 1.0), (2, 1.2), (8, 2.0)]);
        cost.record(1, 1, 50.0);
        assert_eq!(cost.seconds(1), 1.0);
        (0..CHANGED).for_each(|_| cost.record(1, 1, 50.0));
        assert_eq!(cost.seconds(1), 50.0, "no hiccup, but another machine");
        (0..100).for_each(|_| cost.record(1, 1, 1e-3));
        assert_eq!(cost.seconds(1), 50.0, "no machine is so fast");
        (0..CHANGED).for_each(|_| cost.record(1, 1, 2.0));
        (0..200).for_each(|_| cost.record(1, 1, 2.0));
        assert!(
            (cost.seconds(1) - 2.0).abs() < 0.05 && (cost.seconds(8) - 4.0).abs() < 1.0,
            "{cost:?}"
        );
        (0..400)
            .for_each(|i| if i % 2 == 0 { cost.record(1, 1, 2.0) } else { cost.record(2, 2, 3.8) });
        assert!((cost.seconds(2) - 3.8).abs() < 0.3, "the shape follows too: {cost:?}");
    }
    #[test]
    fn a_change_of_rows_costs_what_it_was_seen_to_cost() {
        let mut cost = Cost::from_points(&[(1, 1.0), (2, 1.2)]).with_change(0.5);
        assert_eq!((cost.seconds_after(2, 2), cost.seconds_after(1, 2)), (1.2, 1.7));
        (0..200).for_each(|_| cost.record(1, 2, 1.3));
        assert!(
            (cost.seconds_after(1, 2) - 1.3).abs() < 0.01 && cost.seconds(2) == 1.2,
            "{cost:?}"
        );
    }
}
