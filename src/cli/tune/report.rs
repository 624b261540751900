//! The measurements as a table, in words, as JSON and as a plot.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use crate::config::TuneArgs;
use crate::llama::Model;
use crate::machine::cores;
use crate::plot::{self, Series};
use crate::tune::{self, Candidate, Choice, Parallelism, RowCost, Spread, TOGETHER};

/// A warning if the input is quantized.
pub(super) const QUANTIZED_TWICE: &str = "the model is quantized already: all types but its own lose quality twice, and would be \
                                          better made from F16 or BF16";

/// All measurements and recommendations.
#[derive(Debug, Serialize)]
pub(super) struct TuneReport {
    model: String,
    quantization: String,
    /// Whether the input is quantized, so that the others were quantized twice.
    quantized: bool,
    text: String,
    cores: usize,
    rounds: usize,
    max_tokens: usize,
    max_perplexity_loss: f32,
    pub(super) candidates: Vec<Candidate>,
    recommendations: Vec<Recommendation>,
}

/// For one number of sequences.
#[derive(Debug, Serialize)]
struct Recommendation {
    parallel: usize,
    candidate: String,
    threads: usize,
    /// As fast within the spread, including the candidate itself.
    as_fast: Vec<String>,
    reasons: Vec<String>,
    row_cost: Option<RowCost>,
    #[serde(skip)]
    choice: Choice,
}

impl TuneReport {
    pub(super) fn new(args: &TuneArgs, model: &Model, quantized: bool) -> Self {
        Self {
            model: model.name().unwrap_or_else(|| "unnamed model".into()),
            quantization: model.quantization(),
            quantized,
            text: args.file.display().to_string(),
            cores: cores(),
            rounds: args.rounds,
            max_tokens: args.max_tokens,
            max_perplexity_loss: args.max_perplexity_loss,
            candidates: vec![],
            recommendations: vec![],
        }
    }

    /// Chooses a candidate for each load.
    pub(super) fn conclude(&mut self) -> anyhow::Result<()> {
        // Via its digits, so that 0.05 does not become the nearest f32.
        let max_loss: f64 = self.max_perplexity_loss.to_string().parse()?;
        for load in Parallelism::ALL {
            let choice = tune::choose(&self.candidates, max_loss, load)
                .context("no candidate has a perplexity")?;
            let chosen = &self.candidates[choice.candidate];
            let measured = &chosen.by_threads[choice.threads];
            self.recommendations.push(Recommendation {
                parallel: load.parallel(),
                candidate: chosen.name.clone(),
                threads: measured.threads,
                as_fast: choice.as_fast.iter().map(|&i| self.candidates[i].name.clone()).collect(),
                reasons: tune::reasons(&self.candidates, &choice, max_loss, load),
                row_cost: tune::row_cost(&measured.steps),
                choice,
            });
        }
        Ok(())
    }

    pub(super) fn print(&self) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        let Self { model, quantization, text, rounds, max_tokens, .. } = self;
        writeln!(
            out,
            "{model} ({quantization}), {max_tokens} tokens a sequence, perplexity on {text}"
        )?;
        writeln!(out, "medians of the rounds, of which there are {rounds} (lowest to highest)\n")?;
        let best = self.candidates.iter().map(|c| c.perplexity).fold(f64::INFINITY, f64::min);
        let width =
            self.candidates.iter().map(|c| c.name.len()).max().unwrap_or(0).max("candidate".len());
        let mut line = |[name, mib, perplexity, threads, alone, together, steps]: [&str; 7]| {
            writeln!(
                out,
                "{name:width$}  {mib:>8}  {perplexity:>26}  {threads:>7}  {alone:>26}  {together:>26}  {steps}"
            )
        };
        line(["", "", "", "", "", "", "  ms of a step by its rows"])?;
        let rows: String = self.candidates[0].by_threads[0]
            .steps
            .iter()
            .map(|s| format!("{:>8}", s.rows))
            .collect();
        let together = format!("{TOGETHER} sequences, tokens/s");
        let alone = "1 sequence, tokens/s";
        line(["candidate", "MiB", "perplexity", "threads", alone, &together, &rows])?;
        for candidate in &self.candidates {
            for (i, measured) in candidate.by_threads.iter().enumerate() {
                let above = format!("{:+.1}%", 100.0 * (candidate.perplexity / best - 1.0));
                let (value, error) = (candidate.perplexity, candidate.perplexity_error);
                let perplexity = format!("{value:.3} +- {error:.3} {above:>7}");
                let mib = format!("{:.1}", candidate.bytes as f64 / f64::from(1 << 20));
                // Print what holds for all thread counts once.
                let (name, mib, perplexity) =
                    if i == 0 { (&*candidate.name, &*mib, &*perplexity) } else { ("", "", "") };
                let steps = measured.steps.iter();
                let steps: String =
                    steps.map(|s| format!("{:8.2}", s.seconds.median * 1e3)).collect();
                let (alone, together) = (spread(&measured.alone), spread(&measured.together));
                let threads = measured.threads.to_string();
                line([name, mib, perplexity, &threads, &alone, &together, &steps])?;
            }
        }
        writeln!(out)?;
        if self.quantized && self.candidates.len() > 1 {
            writeln!(out, "{QUANTIZED_TWICE}")?;
        }
        if self.rounds == 1 {
            writeln!(
                out,
                "one round shows no spread: use --rounds 3 to separate noise from differences"
            )?;
        }
        for recommendation in &self.recommendations {
            let sequences =
                if recommendation.parallel == 1 { "one sequence" } else { "parallel sequences" };
            let [what, why @ ..] = &recommendation.reasons[..] else { continue };
            writeln!(out, "for {sequences} use {what}")?;
            for reason in why {
                writeln!(out, "  {reason}")?;
            }
            if let Some(cost) = recommendation.row_cost {
                writeln!(out, "  {}", tune::about_drafts(cost))?;
            }
        }
        Ok(())
    }

    /// A line a candidate, with the threads recommended for one sequence.
    pub(super) fn plot(&self, path: &Path) -> anyhow::Result<()> {
        let Some(t) = self.recommendations.first().map(|r| r.choice.threads) else { return Ok(()) };
        let line = |candidate: &Candidate| Series {
            name: candidate.name.clone(),
            points: candidate.by_threads[t]
                .steps
                .iter()
                .map(|s| (s.rows as f64, s.seconds.median * 1e3))
                .collect(),
        };
        let lines: Vec<Series> = self.candidates.iter().map(line).collect();
        let title = format!("{}, threads: {}", self.model, self.recommendations[0].threads);
        plot::lines(path, &title, ["rows of a step", "ms"], &lines, true)
    }
}

fn spread(spread: &Spread) -> String {
    format!("{:.1} ({:.1} to {:.1})", spread.median, spread.low, spread.high)
}
