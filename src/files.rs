//! Files that appear whole, and errors that name their file.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// A file or folder that cannot be read, written or used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct FileError {
    /// Which one.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

impl FileError {
    /// Blames `path`.
    pub fn new(path: &Path, reason: impl Display) -> Self {
        Self { path: path.to_owned(), reason: reason.to_string() }
    }
}

pub(crate) fn write(path: &Path, text: String) -> Result<(), FileError> {
    std::fs::write(path, text).map_err(|e| FileError::new(path, e))
}

/// Runs `write` with another path in the same folder, then renames that file to `path`: a reader
/// never sees a part of it. Removes the file if `write` fails.
pub(crate) fn write_whole<T, E: From<FileError>>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let part = with_suffix(path, ".part");
    let written = write(&part).and_then(|written| {
        std::fs::rename(&part, path).map_err(|e| FileError::new(path, e))?;
        Ok(written)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

/// `path` with `suffix` after its extension.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
