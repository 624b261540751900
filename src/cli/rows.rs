//! `medusa-llama rows`: what a step takes by its number of rows.

use serde::Serialize;

use super::fetch;
use super::shared::{load, write_json};
use crate::config::RowsArgs;
use crate::engine::LlamaForward;
use crate::llama::ContextParams;

#[derive(Serialize)]
struct Report {
    model: String,
    threads: usize,
    cells: usize,
    rows: Vec<Measured>,
}

#[derive(Serialize)]
struct Measured {
    rows: usize,
    /// Of each round.
    seconds: Vec<f64>,
}

impl Measured {
    fn best_ms(&self) -> f64 {
        1e3 * self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn median_ms(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        1e3 * seconds[seconds.len() / 2]
    }
}

/// Measures all numbers of rows in turn, round after round, and prints a table.
pub(super) fn rows(args: &RowsArgs) -> anyhow::Result<()> {
    let most = args.rows.iter().copied().max().unwrap_or(1);
    // The cells before are filled by as many rows as a micro-batch has.
    let n_batch = most.max(args.micro_batch);
    let params = args.model.context(args.cells + most, n_batch)?;
    let params = ContextParams { n_ubatch: args.micro_batch, ..params };
    let context = load(&args.model, &fetch::named_model(&args.model)?, &params)?;
    let name = context.model().name().unwrap_or_else(|| "unnamed model".into());
    let description = format!("{name} ({})", context.model().quantization());
    let mut forward = LlamaForward::new(context);
    forward.fill(args.cells)?;
    let mut measured: Vec<Measured> =
        args.rows.iter().map(|&rows| Measured { rows, seconds: vec![] }).collect();
    for _ in 0..args.rounds {
        for m in &mut measured {
            forward.time(args.cells, m.rows, !args.last)?; // builds the graph, if the number changed
            m.seconds.push(forward.time(args.cells, m.rows, !args.last)?);
        }
    }
    println!("{description}, {} threads, {} cells before", args.model.threads(), args.cells);
    println!(
        "{:>6} {:>10} {:>10} {:>10} {:>8}",
        "rows", "best ms", "median ms", "ms a row", "to one"
    );
    let one = measured[0].best_ms() / measured[0].rows as f64;
    for m in &measured {
        let best = m.best_ms();
        let (a_row, to_one) = (best / m.rows as f64, best / one);
        println!("{:>6} {best:>10.2} {:>10.2} {a_row:>10.2} {to_one:>8.2}", m.rows, m.median_ms());
    }
    if let Some(path) = &args.json {
        let (threads, cells) = (args.model.threads(), args.cells);
        write_json(path, &Report { model: description, threads, cells, rows: measured })?;
    }
    Ok(())
}
