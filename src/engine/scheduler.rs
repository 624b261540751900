//! Which rows the next step computes. Pure.
//!
//! Decoding sequences (one pending token) always get their row. The rest of the step's budget goes
//! to prompts in the order of admission, so that a long prompt enters in chunks between the steps
//! of the streams that run.

use crate::llama::SeqId;

/// The rows that a sequence wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    pub seq: SeqId,
    /// Tokens known but not computed: 1 while decoding, more while a prompt is read. Never 0.
    pub n_pending: usize,
    /// Most of them that a step may compute; never 0.
    pub n_most: usize,
    /// Its rows have results.
    pub reads: bool,
    /// Admission order.
    pub order: u64,
}

impl Demand {
    /// `true` if one row decides its next token.
    pub fn decodes(&self) -> bool {
        self.n_pending == 1
    }
}

/// How many rows a step may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// All rows; at least the number of sequences.
    pub n_batch: usize,
    /// Rows of prompts while other sequences decode.
    pub n_prefill: usize,
}

/// Most rows of prompts in a step that have results: each has logits of the whole vocabulary.
pub const MOST_READ: usize = 128;

/// The first `n_rows` pending tokens of `seq` go into the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub seq: SeqId,
    /// Never 0.
    pub n_rows: usize,
    /// `true` if nothing is pending after them, so that the last row decides the next token.
    pub to_end: bool,
}

impl Share {
    /// `true` if its one row decides the next token.
    pub fn decodes(&self) -> bool {
        self.n_rows == 1 && self.to_end
    }
}

/// Fills `plan` with the shares of the next step in ascending order of sequence id: streams of a
/// divided cache are only computed together when their ids follow on one another. `scratch` is
/// working memory.
pub fn plan(demands: &[Demand], budget: Budget, scratch: &mut Vec<Demand>, plan: &mut Vec<Share>) {
    plan.clear();
    let row = |d: &Demand| Share { seq: d.seq, n_rows: 1, to_end: true };
    plan.extend(demands.iter().filter(|d| d.decodes()).take(budget.n_batch).map(row));

    let mut left = budget.n_batch - plan.len();
    if !plan.is_empty() {
        left = left.min(budget.n_prefill);
    }
    scratch.clear();
    scratch.extend(demands.iter().filter(|d| !d.decodes()));
    scratch.sort_unstable_by_key(|d| d.order);
    let mut left_read = MOST_READ;
    for demand in scratch.iter() {
        let room = if demand.reads { left.min(left_read) } else { left };
        let n_rows = demand.n_pending.min(demand.n_most).min(room);
        if left == 0 {
            break;
        }
        if n_rows == 0 {
            continue;
        }
        left -= n_rows;
        left_read -= if demand.reads { n_rows } else { 0 };
        plan.push(Share { seq: demand.seq, n_rows, to_end: n_rows == demand.n_pending });
    }
    plan.sort_unstable_by_key(|s| s.seq);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn planned(demands: &[Demand], budget: Budget) -> Vec<Share> {
        let (mut scratch, mut out) = (vec![], vec![]);
        plan(demands, budget, &mut scratch, &mut out);
        out
    }

    fn demand(seq: u32, n_pending: usize, order: u64) -> Demand {
        Demand { seq: SeqId(seq), n_pending, n_most: usize::MAX, reads: false, order }
    }

    #[test]
    fn prompts_whose_rows_are_read_share_few_rows_and_hold_up_no_other() {
        let read = |seq, n_pending| Demand { reads: true, ..demand(seq, n_pending, seq.into()) };
        let all = [read(0, 100), read(1, 100), read(2, 100), demand(3, 600, 3)];
        let shares = planned(&all, Budget { n_batch: 512, n_prefill: 16 });
        let rows: Vec<_> = shares.iter().map(|s| (s.seq.0, s.n_rows)).collect();
        assert_eq!(rows, [(0, 100), (1, 28), (3, 384)]);
    }

    #[test]
    fn a_prompt_alone_gets_the_whole_budget_and_beside_a_stream_a_chunk() {
        let budget = Budget { n_batch: 512, n_prefill: 16 };
        assert_eq!(planned(&[demand(0, 900, 0)], budget)[0].n_rows, 512);
        let both = planned(&[demand(0, 900, 0), demand(1, 1, 1)], budget);
        assert_eq!(both[0], Share { seq: SeqId(0), n_rows: 16, to_end: false });
        assert_eq!(both[1], Share { seq: SeqId(1), n_rows: 1, to_end: true });
    }

    #[test]
    fn a_share_ends_where_a_state_is_to_be_kept() {
        let stops = Demand { n_most: 29, ..demand(0, 30, 0) };
        let shares = planned(&[stops, demand(1, 30, 1)], Budget { n_batch: 512, n_prefill: 1 });
        assert_eq!(shares[0], Share { seq: SeqId(0), n_rows: 29, to_end: false });
        assert_eq!(shares[1], Share { seq: SeqId(1), n_rows: 30, to_end: true });
    }

    #[test]
    fn the_older_prompt_goes_first() {
        let shares =
            planned(&[demand(0, 30, 7), demand(1, 30, 3)], Budget { n_batch: 40, n_prefill: 1 });
        assert_eq!(shares.iter().map(|s| s.n_rows).collect::<Vec<_>>(), [10, 30]);
    }

    proptest! {
        #[test]
        fn a_plan_keeps_the_budget_and_starves_no_stream(
            pending in prop::collection::vec(1usize..600, 0..32),
            n_prefill in 1usize..64,
            spare in 0usize..512,
        ) {
            let demands: Vec<_> = (0..).zip(&pending).map(|(i, &n)| demand(i, n, u64::from(31 - i))).collect();
            let budget = Budget { n_batch: demands.len() + spare, n_prefill };
            let shares = planned(&demands, budget);
            let rows: usize = shares.iter().map(|s| s.n_rows).sum();
            prop_assert!(rows <= budget.n_batch);
            prop_assert!(shares.is_sorted_by(|a, b| a.seq < b.seq), "each sequence once, ascending");
            for share in &shares {
                let n = demands[share.seq.0 as usize].n_pending;
                prop_assert!(share.n_rows >= 1 && share.n_rows <= n);
                prop_assert_eq!(share.to_end, share.n_rows == n);
            }
            let decoding = pending.iter().filter(|&&n| n == 1).count();
            prop_assert_eq!(shares.iter().filter(|s| demands[s.seq.0 as usize].n_pending == 1).count(), decoding);
            if decoding > 0 {
                prop_assert!(rows - decoding <= n_prefill, "a chunk at most beside streams");
            }
            prop_assert!(demands.is_empty() || rows > 0, "some progress in every step");
        }
    }
}
