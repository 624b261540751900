//! Whether candidates are right as often as predicted, of those that were verified. Pure.

use serde::Serialize;

use crate::request::Source;

/// Depths that are counted apart; deeper ones share the last one's counts.
pub const N_DEPTHS: usize = 8;
/// Ranges of the predicted probability, equally wide.
pub const N_RANGES: usize = 10;

/// Candidates by source, depth and predicted probability.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reliability {
    counts: [[[Count; N_RANGES]; N_DEPTHS]; Source::ALL.len()],
}

/// Some candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Count {
    /// How many.
    pub n: u64,
    /// Sum of their predicted probabilities.
    pub predicted: f64,
    /// Those that were.
    pub accepted: u64,
}

impl Count {
    fn add(&mut self, other: &Self) {
        self.n += other.n;
        self.predicted += other.predicted;
        self.accepted += other.accepted;
    }
}

impl Reliability {
    /// Records a verified candidate at `depth` (1: after the root), whose predicted probability was
    /// `q`.
    pub fn record(&mut self, source: Source, depth: usize, q: f32, accepted: bool) {
        let range = ((q * N_RANGES as f32) as usize).min(N_RANGES - 1);
        let one = Count { n: 1, predicted: f64::from(q), accepted: u64::from(accepted) };
        self.counts[source as usize][depth.clamp(1, N_DEPTHS) - 1][range].add(&one);
    }

    /// Candidates of these sources and at this depth (all of them for `None`), by range of the
    /// predicted probability.
    #[must_use]
    pub fn ranges(&self, sources: &[Source], depth: Option<usize>) -> [Count; N_RANGES] {
        let mut sum = [Count::default(); N_RANGES];
        for source in sources {
            for (i, counts) in self.counts[*source as usize].iter().enumerate() {
                if depth.is_none_or(|depth| depth == i + 1) {
                    sum.iter_mut().zip(counts).for_each(|(sum, count)| sum.add(count));
                }
            }
        }
        sum
    }
}

/// Expected calibration error: the mean distance between what was predicted and what was accepted, over
/// ranges, weighted by how many candidates they have. C. Guo et al., "On Calibration of Modern
/// Neural Networks" (2017).
#[must_use]
pub fn calibration_error(ranges: &[Count]) -> f64 {
    let n: u64 = ranges.iter().map(|c| c.n).sum();
    let off: f64 = ranges.iter().map(|c| (c.predicted - c.accepted as f64).abs()).sum();
    off / n.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_mean_distance_over_ranges() {
        let mut reliability = Reliability::default();
        for i in 0..100 {
            reliability.record(Source::Heads, 1, 0.85, i < 80);
            reliability.record(Source::Text, 9, 0.35, i < 20);
        }
        let error =
            |sources: &[Source], depth| calibration_error(&reliability.ranges(sources, depth));
        assert!((error(&[Source::Heads], None) - 0.05).abs() < 1e-6);
        assert!((error(&[Source::Text], Some(N_DEPTHS)) - 0.15).abs() < 1e-6);
        assert!((error(&Source::ALL, None) - 0.10).abs() < 1e-6);
        assert_eq!(error(&[Source::Both], None), 0.0);
        assert_eq!(reliability.ranges(&[Source::Heads], Some(1))[8].accepted, 80);
    }
}
