//! What a model's own draft layers continue from, of a sequence's last tokens. Pure.

/// Most tokens of which states are kept, and beyond which half of them are dropped.
const MOST: usize = 2048;

/// States by position, without gaps.
#[derive(Debug, Default)]
pub struct States {
    first: usize,
    n: usize,
    values: Vec<f32>,
}

impl States {
    /// Adds the state of the token at `position`. Where it does not continue the others, these are
    /// dropped.
    pub fn push(&mut self, position: usize, state: &[f32]) {
        if position != self.first + self.n {
            (self.first, self.n) = (position, 0);
            self.values.clear();
        }
        if self.n == MOST {
            let n_dropped = MOST / 2;
            self.values.drain(..n_dropped * state.len());
            (self.first, self.n) = (self.first + n_dropped, self.n - n_dropped);
        }
        self.values.extend_from_slice(state);
        self.n += 1;
    }

    /// The first position with a state; the one after the last, where there is none.
    #[must_use]
    pub fn first(&self) -> usize {
        self.first
    }

    /// The state of the token at `position`, if it is kept.
    #[must_use]
    pub fn at(&self, position: usize) -> Option<&[f32]> {
        let i = position.checked_sub(self.first).filter(|&i| i < self.n)?;
        let n = self.values.len() / self.n;
        Some(&self.values[i * n..][..n])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_found_by_position_until_there_are_too_many() {
        let mut states = States::default();
        assert_eq!(states.at(0), None);
        (5..5 + MOST).for_each(|i| states.push(i, &[i as f32, 1.0]));
        assert_eq!((states.first(), states.at(4)), (5, None));
        assert_eq!(states.at(5), Some(&[5.0, 1.0][..]));
        let next = 5 + MOST;
        states.push(next, &[7.0, 7.0]);
        assert_eq!((states.first(), states.at(5)), (5 + MOST / 2, None));
        assert_eq!((states.at(next), states.at(next + 1)), (Some(&[7.0, 7.0][..]), None));
        states.push(2, &[3.0, 3.0]);
        assert_eq!(
            (states.first(), states.at(2), states.at(next)),
            (2, Some(&[3.0, 3.0][..]), None)
        );
    }
}
