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
    /// Tokens before them, which their rows attend to.
    pub n_computed: usize,
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
    /// Of prompts while other sequences decode.
    pub prefill: Prefill,
}

/// How much of prompts a step may compute while other sequences decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefill {
    /// So many rows.
    Rows(usize),
    /// Rows of so many [`row_cells`] in all, and at least one.
    Cells(usize),
}

/// What a row takes beside attention, as a number of cells that it attends to. Small models have
/// about this; of large ones a row takes as long as more cells, and their long prompts begin with
/// fewer rows than they might, until steps were timed.
pub const ROW_CELLS: usize = 1000;

/// What a row takes after `n_computed` others, as a number of cells that it attends to.
pub fn row_cells(n_computed: usize) -> usize {
    ROW_CELLS + n_computed
}

/// The rows of prompts in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptRows {
    pub n: usize,
    /// Sum of their [`row_cells`].
    pub cells: usize,
    /// A prompt has fewer of them than it wanted.
    pub cut: bool,
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
pub fn plan(
    demands: &[Demand],
    budget: Budget,
    scratch: &mut Vec<Demand>,
    plan: &mut Vec<Share>,
) -> PromptRows {
    plan.clear();
    let row = |d: &Demand| Share { seq: d.seq, n_rows: 1, to_end: true };
    plan.extend(demands.iter().filter(|d| d.decodes()).take(budget.n_batch).map(row));

    let mut left = budget.n_batch - plan.len();
    let mut cells_left = usize::MAX;
    if !plan.is_empty() {
        match budget.prefill {
            Prefill::Rows(n) => left = left.min(n),
            Prefill::Cells(n) => cells_left = n,
        }
    }
    scratch.clear();
    scratch.extend(demands.iter().filter(|d| !d.decodes()));
    scratch.sort_unstable_by_key(|d| d.order);
    let mut left_read = MOST_READ;
    let mut prompts = PromptRows::default();
    for demand in scratch.iter() {
        let row_cells = row_cells(demand.n_computed);
        let by_cells = (cells_left / row_cells).max(usize::from(prompts.n == 0));
        let room = left.min(by_cells).min(if demand.reads { left_read } else { left });
        let wanted = demand.n_pending.min(demand.n_most);
        let n_rows = wanted.min(room);
        prompts.cut |= n_rows < wanted;
        if n_rows == 0 {
            continue;
        }
        left -= n_rows;
        left_read -= if demand.reads { n_rows } else { 0 };
        cells_left = cells_left.saturating_sub(n_rows * row_cells);
        prompts.n += n_rows;
        prompts.cells += n_rows * row_cells;
        plan.push(Share { seq: demand.seq, n_rows, to_end: n_rows == demand.n_pending });
    }
    plan.sort_unstable_by_key(|s| s.seq);
    prompts
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
        let seq = SeqId(seq);
        Demand { seq, n_computed: 0, n_pending, n_most: usize::MAX, reads: false, order }
    }

    #[test]
    fn prompts_whose_rows_are_read_share_few_rows_and_hold_up_no_other() {
        let read = |seq, n_pending| Demand { reads: true, ..demand(seq, n_pending, seq.into()) };
        let all = [read(0, 100), read(1, 100), read(2, 100), demand(3, 600, 3)];
        let shares = planned(&all, Budget { n_batch: 512, prefill: Prefill::Rows(16) });
        let rows: Vec<_> = shares.iter().map(|s| (s.seq.0, s.n_rows)).collect();
        assert_eq!(rows, [(0, 100), (1, 28), (3, 384)]);
    }

    #[test]
    fn a_prompt_alone_gets_the_whole_budget_and_beside_a_stream_a_chunk() {
        let budget = Budget { n_batch: 512, prefill: Prefill::Rows(16) };
        assert_eq!(planned(&[demand(0, 900, 0)], budget)[0].n_rows, 512);
        let both = planned(&[demand(0, 900, 0), demand(1, 1, 1)], budget);
        assert_eq!(both[0], Share { seq: SeqId(0), n_rows: 16, to_end: false });
        assert_eq!(both[1], Share { seq: SeqId(1), n_rows: 1, to_end: true });
    }

    #[test]
    fn a_share_ends_where_a_state_is_to_be_kept() {
        let stops = Demand { n_most: 29, ..demand(0, 30, 0) };
        let shares =
            planned(&[stops, demand(1, 30, 1)], Budget { n_batch: 512, prefill: Prefill::Rows(1) });
        assert_eq!(shares[0], Share { seq: SeqId(0), n_rows: 29, to_end: false });
        assert_eq!(shares[1], Share { seq: SeqId(1), n_rows: 30, to_end: true });
    }

    #[test]
    fn rows_after_many_cells_use_up_a_budget_of_cells_sooner() {
        let after = |seq, n_computed, n_pending| Demand {
            n_computed,
            ..demand(seq, n_pending, seq.into())
        };
        let rows = |cells, prompts: &[Demand]| {
            let all: Vec<_> = prompts.iter().copied().chain([demand(9, 1, 9)]).collect();
            let budget = Budget { n_batch: 512, prefill: Prefill::Cells(cells) };
            let mut shares = vec![];
            let used = plan(&all, budget, &mut vec![], &mut shares);
            (shares.iter().map(|s| (s.seq.0, s.n_rows)).collect::<Vec<_>>(), used.cells, used.cut)
        };
        assert_eq!(rows(16_000, &[after(0, 0, 900)]), (vec![(0, 16), (9, 1)], 16_000, true));
        assert_eq!(rows(16_000, &[after(0, 3000, 900)]), (vec![(0, 4), (9, 1)], 16_000, true));
        let one = (vec![(0, 1), (9, 1)], 33_000, true);
        assert_eq!(rows(16_000, &[after(0, 32_000, 900)]), one, "never none");
        let short_first = [after(0, 0, 6), after(1, 32_000, 900), after(2, 1000, 3)];
        let shares = vec![(0, 6), (2, 3), (9, 1)];
        assert_eq!(
            rows(16_000, &short_first),
            (shares, 12_000, true),
            "no row of the long one fits"
        );
        assert_eq!(rows(16_000, &[after(0, 0, 6)]), (vec![(0, 6), (9, 1)], 6000, false));
    }

    #[test]
    fn the_older_prompt_goes_first() {
        let shares = planned(
            &[demand(0, 30, 7), demand(1, 30, 3)],
            Budget { n_batch: 40, prefill: Prefill::Rows(1) },
        );
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
            let budget = Budget { n_batch: demands.len() + spare, prefill: Prefill::Rows(n_prefill) };
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
