//! The commands: what `main` calls once the arguments are checked.

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

/// Shows how far the model is loaded, where someone watches; returns when it is, or cannot be.
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
        match &*stage.borrow_and_update() {
            Stage::Loading(progress) => bar.set_position((progress * 100.0) as u64),
            Stage::Ready(_) | Stage::Failed(_) => break,
        }
        if stage.changed().await.is_err() {
            break;
        }
    }
    bar.finish_and_clear();
}
