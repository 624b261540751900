//! What a step of `n` rows takes on this machine: measured at start, kept current by every step.
//! Pure: durations come from outside.

/// Numbers of rows that are measured; in between it is a straight line.
pub const POINTS: [usize; 12] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];
/// Weight of a step for the speed of the whole machine: others share it, it heats up, contexts
/// grow.
const SPEED: f64 = 0.1;
/// Weight of a step for what a change of the number of rows costs.
const CHANGE: f64 = 0.05;
/// Weight of a step for the shape of the curve near its number of rows.
const SHAPE: f64 = 0.02;
/// A step this many times slower or faster than foreseen says nothing: the machine was elsewhere.
const OUTLIER: f64 = 4.0;

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
}

impl Cost {
    /// From measured (rows, seconds), ascending in rows. A point below its predecessor is noise and
    /// is raised to it.
    ///
    /// # Panics
    /// Without a point, or when rows do not ascend.
    #[must_use]
    pub fn from_points(measured: &[(usize, f64)]) -> Self {
        assert!(!measured.is_empty() && measured.is_sorted_by(|a, b| a.0 < b.0), "points in order");
        let mut cost = Self { points: measured.to_vec(), change_s: 0.0, speed: 1.0 };
        cost.keep_order();
        cost
    }

    /// The same, where a step takes so many seconds more if it has another number of rows than the
    /// one before.
    #[must_use]
    pub fn with_change(self, change_s: f64) -> Self {
        Self { change_s: change_s.max(0.0), ..self }
    }

    /// Seconds of a step of `n` rows behind one of `before`.
    #[must_use]
    pub fn seconds_behind(&self, before: usize, n: usize) -> f64 {
        self.seconds(n) + if n == before { 0.0 } else { self.change_s * self.speed }
    }

    /// Seconds of a step of `n` rows behind one of as many. Beyond the last point it goes on as
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

    /// Notes that a step of `n` rows behind one of `before` took `seconds`.
    pub fn note(&mut self, before: usize, n: usize, seconds: f64) {
        let foreseen = self.seconds_behind(before, n);
        let ratio = seconds / foreseen;
        if !(1.0 / OUTLIER..OUTLIER).contains(&ratio) {
            return;
        }
        if n != before {
            self.change_s = (self.change_s + CHANGE * (seconds - foreseen) / self.speed).max(0.0);
            return;
        }
        self.speed *= 1.0 + SPEED * (ratio - 1.0);
        let near = self
            .points
            .iter_mut()
            .min_by_key(|(rows, _)| rows.abs_diff(n))
            .expect("there are points");
        near.1 *= 1.0 + SHAPE * (ratio - 1.0);
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
    fn it_follows_the_machine_and_ignores_a_hiccup() {
        let mut cost = Cost::from_points(&[(1, 1.0), (2, 1.2), (8, 2.0)]);
        cost.note(1, 1, 50.0);
        assert_eq!(cost.seconds(1), 1.0);
        (0..200).for_each(|_| cost.note(1, 1, 2.0));
        assert!(
            (cost.seconds(1) - 2.0).abs() < 0.05 && (cost.seconds(8) - 4.0).abs() < 1.0,
            "{cost:?}"
        );
        (0..400).for_each(|i| if i % 2 == 0 { cost.note(1, 1, 2.0) } else { cost.note(2, 2, 3.8) });
        assert!((cost.seconds(2) - 3.8).abs() < 0.3, "the shape follows too: {cost:?}");
    }
    #[test]
    fn a_change_of_rows_costs_what_it_was_seen_to_cost() {
        let mut cost = Cost::from_points(&[(1, 1.0), (2, 1.2)]).with_change(0.5);
        assert_eq!((cost.seconds_behind(2, 2), cost.seconds_behind(1, 2)), (1.2, 1.7));
        (0..200).for_each(|_| cost.note(1, 2, 1.3));
        assert!(
            (cost.seconds_behind(1, 2) - 1.3).abs() < 0.01 && cost.seconds(2) == 1.2,
            "{cost:?}"
        );
    }
}
