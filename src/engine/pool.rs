//! A prompt's embedding, from the hidden states of its tokens. Pure.

use crate::llama::Pooling;

/// What is known so far of an embedding.
pub struct Pool {
    pooling: Pooling,
    /// Tokens of the prompt.
    n_tokens: usize,
    /// The sum of the states that were pushed.
    sum: Vec<f32>,
}

impl Pool {
    /// Of a prompt of `n_tokens` tokens, none of which is pushed yet.
    pub fn new(pooling: Pooling, n_tokens: usize) -> Self {
        Self { pooling, n_tokens, sum: Vec::new() }
    }

    /// Whether the state of the token at `position` matters.
    pub fn reads(&self, position: usize) -> bool {
        match self.pooling {
            Pooling::Mean => position < self.n_tokens,
            Pooling::Cls => position == 0,
            Pooling::Last => position + 1 == self.n_tokens,
        }
    }

    /// Takes a state that it [reads](Self::reads), once.
    pub fn push(&mut self, hidden: &[f32]) {
        self.sum.resize(hidden.len(), 0.0);
        self.sum.iter_mut().zip(hidden).for_each(|(sum, &value)| *sum += value);
    }

    /// The embedding, once all states that it reads are pushed: `n_embd` values.
    pub fn finish(self) -> Vec<f32> {
        let n = if self.pooling == Pooling::Mean { self.n_tokens } else { 1 };
        self.sum.into_iter().map(|sum| sum / n as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_of_pooling_reads_its_tokens() {
        let states = [[1.0, 2.0], [3.0, 4.0], [8.0, -9.0]];
        for (pooling, expected) in
            [(Pooling::Mean, [4.0, -1.0]), (Pooling::Cls, [1.0, 2.0]), (Pooling::Last, [8.0, -9.0])]
        {
            let mut pool = Pool::new(pooling, states.len());
            for (position, state) in states.iter().enumerate() {
                if pool.reads(position) {
                    pool.push(state);
                }
            }
            assert_eq!(pool.finish(), expected, "{pooling:?}");
        }
    }
}
