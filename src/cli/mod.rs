//! The commands, which `main` calls with parsed arguments.

mod bench;
mod generate;
mod perplexity;
mod quantize;
mod serve;
mod synth;
mod train;
mod tune;

pub use bench::bench;
pub use generate::generate;
pub use perplexity::perplexity;
pub use quantize::quantize;
pub use serve::serve;
pub use synth::synth;
pub use train::train;
pub use tune::tune;

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use crate::engine::Stage;

/// Shows a progress bar on a terminal until the model is loaded or has failed to load.
async fn show_loading(mut stage: watch::Receiver<Stage>) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let bar = ProgressBar::new(100);
    bar.set_style(
        ProgressStyle::with_template("loading model {bar:40} {percent:>3}% {eta}")
            .expect("a valid template"),
    );
    loop {
        let Stage::Loading(progress) = *stage.borrow_and_update() else { break };
        bar.set_position((progress * 100.0) as u64);
        if stage.changed().await.is_err() {
            break;
        }
    }
    bar.finish_and_clear();
}
