//! Where the quantized files are made: a folder to keep, or one that goes with the command, however
//! it ends.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

/// A folder that is there, and is removed when dropped if it is not to be kept.
pub(super) struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    /// `keep`, made if it is not there; or a temporary one.
    pub(super) fn new(keep: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(path) = keep {
            std::fs::create_dir_all(path)
                .with_context(|| format!("cannot make {}", path.display()))?;
            return Ok(Self { path: path.to_owned(), keep: true });
        }
        let path = std::env::temp_dir().join(format!("medusa-llama-tune-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let folder = Self { path, keep: false };
        folder.remove_when_interrupted()?;
        Ok(folder)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A signal ends the process without dropping anything, and these files are large.
    fn remove_when_interrupted(&self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut term, mut int) = {
            let _inside = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        let path = self.path.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            });
            let _ = std::fs::remove_dir_all(&path);
            std::process::exit(130);
        })?;
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
