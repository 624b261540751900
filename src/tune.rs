//! Which form of a model to use, given measurements of each. Pure: files, models and clocks belong to
//! the command.

use serde::Serialize;

/// A figure's values over the rounds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    /// All, in the order of measurement.
    pub rounds: Vec<f64>,
}

impl Spread {
    /// Adds a round.
    pub fn add(&mut self, value: f64) {
        self.rounds.push(value);
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        self.median = f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]);
        (self.low, self.high) = (sorted[0], sorted[n - 1]);
    }
}

/// The time of a step with a number of rows.
#[derive(Clone, Debug, Serialize)]
pub struct StepTime {
    pub rows: usize,
    /// After a step of the same number of rows.
    pub seconds: Spread,
}

/// The speed with a number of threads.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    pub threads: usize,
    /// Tokens per second of one sequence.
    pub alone: Spread,
    /// Tokens per second of [`TOGETHER`] sequences, all together.
    pub together: Spread,
    /// By rows, ascending.
    pub steps: Vec<StepTime>,
    /// Extra seconds of a step whose number of rows differs from the step before.
    pub change_s: Spread,
}

impl Measured {
    pub fn speed(&self, load: Parallelism) -> &Spread {
        if load == Parallelism::Alone { &self.alone } else { &self.together }
    }
}

/// Parallel sequences of [`Measured::together`].
pub const TOGETHER: usize = 8;

#[derive(Clone, Debug, Default, Serialize)]
pub struct Candidate {
    pub name: String,
    /// llama.cpp's name for the type of most tensors.
    pub quantization: String,
    /// Whether its source was quantized already.
    pub quantized_twice: bool,
    pub bytes: u64,
    pub perplexity: f64,
    /// Its standard error.
    pub perplexity_error: f64,
    /// By threads, ascending.
    pub by_threads: Vec<Measured>,
}

/// How many sequences run in parallel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Parallelism {
    Alone,
    Together,
}

impl Parallelism {
    pub const ALL: [Self; 2] = [Self::Alone, Self::Together];

    pub fn parallel(self) -> usize {
        if self == Self::Alone { 1 } else { TOGETHER }
    }
}

/// The recommendation; everything by its index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub candidate: usize,
    /// Which of its `by_threads`.
    pub threads: usize,
    /// The candidate with the lowest perplexity.
    pub best: usize,
    /// The fastest candidate whose perplexity is allowed; differs from `candidate` if that is as fast
    /// within the spread, and better.
    pub fastest: usize,
    /// All that are as fast as `fastest` within the spread, including itself.
    pub as_fast: Vec<usize>,
    /// Faster than `fastest`, but their perplexity is too high.
    pub too_bad: Vec<usize>,
}

/// The fastest candidate, each with the threads it is fastest with, whose perplexity is at most
/// `max_loss` (0.05: 5%) above the lowest; of those whose spread of rounds meets the fastest's, the
/// one with the lowest perplexity. `None` without a candidate that has a perplexity and a speed.
pub fn choose(candidates: &[Candidate], max_loss: f64, load: Parallelism) -> Option<Choice> {
    let finite = || (0..candidates.len()).filter(|&i| candidates[i].perplexity.is_finite());
    let better = |&a: &usize, &b: &usize| {
        let key = |i: usize| candidates[i].perplexity;
        key(a).total_cmp(&key(b)).then(candidates[a].bytes.cmp(&candidates[b].bytes))
    };
    let best = finite().min_by(better)?;
    let most = candidates[best].perplexity * (1.0 + max_loss);
    let allowed = |i: &usize| candidates[*i].perplexity <= most;
    let speed = |i: usize| {
        fastest_threads(&candidates[i], load).map(|t| candidates[i].by_threads[t].speed(load))
    };
    let median = |i: usize| speed(i).map_or(0.0, |s| s.median);
    let fastest = finite().filter(allowed).max_by(|&a, &b| median(a).total_cmp(&median(b)))?;
    let low = speed(fastest)?.low;
    let as_fast: Vec<usize> = finite()
        .filter(allowed)
        .filter(|&i| i == fastest || speed(i).is_some_and(|s| s.high >= low))
        .collect();
    let candidate = as_fast.iter().copied().min_by(better)?;
    let too_bad =
        (0..candidates.len()).filter(|i| !allowed(i) && median(*i) > median(fastest)).collect();
    let threads = fastest_threads(&candidates[candidate], load)?;
    Some(Choice { candidate, threads, best, fastest, as_fast, too_bad })
}

/// The index in `by_threads` with which a candidate is fastest.
fn fastest_threads(candidate: &Candidate, load: Parallelism) -> Option<usize> {
    let median = |i: &usize| candidate.by_threads[*i].speed(load).median;
    (0..candidate.by_threads.len()).rev().max_by(|a, b| median(a).total_cmp(&median(b))) // of equals the fewest threads
}

/// A [`Choice`] in words: the choice, then its reasons, a sentence per item.
pub fn reasons(
    candidates: &[Candidate],
    choice: &Choice,
    max_loss: f64,
    load: Parallelism,
) -> Vec<String> {
    let name = |i: usize| candidates[i].name.as_str();
    let speed = |i: usize| {
        fastest_threads(&candidates[i], load)
            .map_or(0.0, |t| candidates[i].by_threads[t].speed(load).median)
    };
    let above =
        |i: usize| 100.0 * (candidates[i].perplexity / candidates[choice.best].perplexity - 1.0);
    let (chosen, limit) = (choice.candidate, 100.0 * max_loss);
    let threads = candidates[chosen].by_threads[choice.threads].threads;
    let mut out = vec![format!(
        "{} with {}: {:.1} tokens/s, perplexity {:.3}",
        name(chosen),
        counted(threads),
        speed(chosen),
        candidates[chosen].perplexity
    )];
    let allowed = if chosen == choice.best {
        "its perplexity is the lowest".to_owned()
    } else {
        let of_best = candidates[choice.best].perplexity;
        format!(
            "its perplexity is {:.1}% above the lowest ({}, {of_best:.3}), and {limit:.1}% are allowed",
            above(chosen),
            name(choice.best)
        )
    };
    if choice.as_fast.len() > 1 {
        let others: Vec<String> = choice
            .as_fast
            .iter()
            .filter(|&&i| i != chosen)
            .map(|&i| format!("{} ({:.1})", name(i), speed(i)))
            .collect();
        out.push(format!(
            "it and {} are equally fast within the measured spread; of these it has the smallest perplexity: {allowed}",
            others.join(", ")
        ));
    } else {
        out.push(format!("it is the fastest of those allowed: {allowed}"));
    }
    for &i in &choice.too_bad {
        let loss = if candidates[i].perplexity.is_finite() {
            format!("{:.1}% above the lowest", above(i))
        } else {
            "not a number".into()
        };
        out.push(format!(
            "{} is faster ({:.1} tokens/s), but its perplexity is {loss}",
            name(i),
            speed(i)
        ));
    }
    let own = &candidates[chosen].by_threads;
    let low = own[choice.threads].speed(load).low;
    for (_, other) in
        own.iter().enumerate().filter(|(t, m)| *t != choice.threads && m.speed(load).high >= low)
    {
        out.push(format!("{} would be as fast within the measured spread", counted(other.threads)));
    }
    out
}

/// The cost of an additional row, as a share of a step of one row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RowCost {
    pub second: f64,
    /// The mean of the second to the eighth row.
    pub up_to_eight: f64,
}

/// From a cost curve with 1, 2 and 8 rows; `None` without them.
pub fn row_cost(steps: &[StepTime]) -> Option<RowCost> {
    let of = |rows: usize| {
        steps.iter().find(|s| s.rows == rows).map(|s| s.seconds.median).filter(|s| *s > 0.0)
    };
    let (one, two, eight) = (of(1)?, of(2)?, of(8)?);
    Some(RowCost { second: two / one - 1.0, up_to_eight: (eight / one - 1.0) / 7.0 })
}

/// A row's cost up to which even unlikely candidates pay, and from which hardly any do.
const CHEAP: f64 = 0.2;
const EXPENSIVE: f64 = 0.6;

/// What a cost curve means for drafts, in words.
pub fn about_drafts(cost: RowCost) -> String {
    let (second, each) = (100.0 * cost.second.max(0.0), 100.0 * cost.up_to_eight.max(0.0));
    // A candidate costs a row and gives a token if it is accepted: it pays if the acceptance rate
    // exceeds the cost of a row.
    let verdict = match cost.second {
        c if c <= CHEAP => "drafts are cheap here",
        c if c < EXPENSIVE => "drafts pay where they are often right",
        _ => "drafts seldom pay here",
    };
    format!(
        "a second row costs {second:.0}% of a step of one, rows up to the eighth {each:.0}% each: {verdict}; a first candidate pays \
         where it is right more often than {second:.0}% of the time"
    )
}

fn counted(n: usize) -> String {
    format!("{n} thread{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        let mut spread = Spread::default();
        values.iter().for_each(|v| spread.add(*v));
        spread
    }

    /// With one thread as fast as given, with two twice as fast; eight sequences are four times as
    /// fast as one.
    fn candidate(name: &str, perplexity: f64, speeds: &[f64]) -> Candidate {
        let measured = |threads: usize| {
            let times =
                |x: f64| spread(&speeds.iter().map(|s| s * x * threads as f64).collect::<Vec<_>>());
            Measured { threads, alone: times(1.0), together: times(4.0), ..Measured::default() }
        };
        Candidate {
            name: name.into(),
            perplexity,
            by_threads: vec![measured(1), measured(2)],
            ..Candidate::default()
        }
    }

    fn chosen(candidates: &[Candidate]) -> (Choice, String) {
        let choice = choose(candidates, 0.05, Parallelism::Alone).unwrap();
        let words = reasons(candidates, &choice, 0.05, Parallelism::Alone).join("\n");
        (choice, words)
    }

    #[test]
    fn a_spread_is_of_all_rounds() {
        let s = spread(&[3.0, 1.0, 2.0, 9.0]);
        assert_eq!((s.median, s.low, s.high, s.rounds), (2.5, 1.0, 9.0, vec![3.0, 1.0, 2.0, 9.0]));
    }

    #[test]
    fn the_fastest_allowed_is_chosen_and_a_worse_one_named() {
        let all = [
            candidate("input", 10.0, &[10.0, 10.5]),
            candidate("Q4_0", 10.4, &[20.0, 21.0]),
            candidate("Q2_K", 11.0, &[30.0, 31.0]),
        ];
        let (choice, words) = chosen(&all);
        assert_eq!(
            choice,
            Choice {
                candidate: 1,
                threads: 1,
                best: 0,
                fastest: 1,
                as_fast: vec![1],
                too_bad: vec![2]
            }
        );
        assert!(
            words.starts_with("Q4_0 with 2 threads: 41.0 tokens/s, perplexity 10.400"),
            "{words}"
        );
        assert!(
            words.contains("4.0% above the lowest (input, 10.000), and 5.0% are allowed"),
            "{words}"
        );
        assert!(
            words.contains("Q2_K is faster (61.0 tokens/s), but its perplexity is 10.0% above"),
            "{words}"
        );
        assert!(!words.contains("spread"), "{words}");
    }

    #[test]
    fn of_equally_fast_ones_the_better_is_chosen() {
        let all = [
            candidate("input", 10.0, &[5.0, 6.0]),
            candidate("Q4_1", 10.1, &[18.0, 20.5]),
            candidate("Q4_0", 10.2, &[20.0, 22.0]),
        ];
        let (choice, words) = chosen(&all);
        assert_eq!((choice.candidate, choice.fastest, choice.as_fast), (1, 2, vec![1, 2]));
        assert!(
            words.contains("it and Q4_0 (42.0) are equally fast within the measured spread"),
            "{words}"
        );
    }

    #[test]
    fn of_equally_good_ones_the_smaller_file_is_chosen() {
        let sized = |name: &str, bytes| Candidate { bytes, ..candidate(name, 10.0, &[5.0, 6.0]) };
        assert_eq!(chosen(&[sized("a", 9), sized("b", 8)]).0.candidate, 1);
    }

    #[test]
    fn a_perplexity_that_is_not_a_number_is_never_chosen() {
        let all = [candidate("broken", f64::NAN, &[90.0]), candidate("whole", 10.0, &[5.0])];
        let (choice, words) = chosen(&all);
        assert_eq!((choice.candidate, choice.best, choice.too_bad), (1, 1, vec![0]));
        assert!(words.contains("its perplexity is not a number"), "{words}");
        assert_eq!(choose(&all[..1], 0.05, Parallelism::Alone), None);
        assert_eq!(
            choose(
                &[Candidate { perplexity: 1.0, ..Candidate::default() }],
                0.05,
                Parallelism::Together
            ),
            None
        );
    }

    #[test]
    fn one_sequence_and_several_may_want_different_ones() {
        let mut all = [candidate("input", 10.0, &[5.0, 5.1]), candidate("Q4_0", 10.1, &[6.0, 6.1])];
        all[0].by_threads[0].together = spread(&[99.0]);
        let of = |load| choose(&all, 0.05, load).map(|c| (c.candidate, c.threads));
        assert_eq!(
            (of(Parallelism::Alone), of(Parallelism::Together)),
            (Some((1, 1)), Some((0, 0)))
        );
    }

    #[test]
    fn a_thread_count_within_the_spread_is_reported() {
        let all = [candidate("input", 10.0, &[5.0, 11.0])];
        assert!(chosen(&all).1.contains("1 thread would be as fast within the measured spread"));
    }

    #[test]
    fn a_row_costs_its_share_of_a_step() {
        let steps = |seconds: [f64; 3]| {
            let of = |(rows, s): (usize, f64)| StepTime { rows, seconds: spread(&[s]) };
            [1, 2, 8].into_iter().zip(seconds).map(of).collect::<Vec<_>>()
        };
        let cost = row_cost(&steps([1.0, 1.125, 1.875])).unwrap();
        assert_eq!(cost, RowCost { second: 0.125, up_to_eight: 0.125 });
        assert!(about_drafts(cost).contains("drafts are cheap here"));
        let about = |seconds| about_drafts(row_cost(&steps(seconds)).unwrap());
        assert!(about([1.0, 2.0, 8.0]).contains("drafts seldom pay"));
        // Noise may make two rows quicker than one: they cost nothing then.
        assert!(about([1.0, 0.9, 1.0]).starts_with("a second row costs 0%"));
        assert_eq!(row_cost(&steps([1.0, 1.1, 2.0])[..2]), None);
    }
}
