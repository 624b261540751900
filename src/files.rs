//! Files that appear whole, models in several files, and errors that name their file.

use std::fmt::Display;
use std::fs::File;
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
/// never sees a part of it. The file has the rights of any new file, whatever made it. Removes the
/// file if `write` fails.
pub(crate) fn write_whole<T, E: From<FileError>>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let part = with_suffix(path, ".part");
    let fail = |e| FileError::new(path, e);
    let rights = File::create(&part).and_then(|file| file.metadata()).map_err(fail)?.permissions();
    let written = write(&part).and_then(|written| {
        std::fs::set_permissions(&part, rights).map_err(fail)?;
        std::fs::rename(&part, path).map_err(fail)?;
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

/// The name of one of the files that a large model is split into, as `gguf-split` writes it:
/// `{stem}-00001-of-00003.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardName {
    /// What all of them begin with, a path in a repository included.
    pub stem: String,
    /// Which one, from 1.
    pub number: u32,
    /// How many there are.
    pub count: u32,
}

impl ShardName {
    /// Reads a name; `None` if it is no shard's.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            let is_number = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|_| is_number)
        };
        let (number, count) = (digits(number)?, digits(count)?);
        let is_one = !stem.is_empty() && (1..=count).contains(&number);
        is_one.then(|| Self { stem: stem.to_owned(), number, count })
    }

    /// The names of all shards of its model, in order.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        let Self { stem, count, .. } = self;
        (1..=*count).map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf")).collect()
    }
}

/// What a model is called after its file: the name without `.gguf` and without a shard's number.
pub(crate) fn model_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match ShardName::parse(&name) {
        Some(shard) => shard.stem,
        None => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

/// Bytes of the files directly in a folder; 0 if it cannot be read.
pub(crate) fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(|of| of.is_file());
    files.map(|of| of.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writers that make a file by way of a temporary one leave it to its owner alone.
    #[cfg(unix)]
    #[test]
    fn a_whole_file_has_the_rights_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (whole, plain) = (folder.path().join("whole"), folder.path().join("plain"));
        std::fs::write(&plain, "").unwrap();
        write_whole::<_, FileError>(&whole, |part| {
            std::fs::remove_file(part).unwrap();
            std::fs::write(part, "text").unwrap();
            std::fs::set_permissions(part, PermissionsExt::from_mode(0o600)).unwrap();
            Ok(())
        })
        .unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&whole), mode(&plain));
        assert_eq!(std::fs::read_to_string(&whole).unwrap(), "text");
    }

    #[test]
    fn shards_are_known_by_their_names() {
        let shard = ShardName::parse("q4/big-00002-of-00003.gguf").unwrap();
        assert_eq!((shard.stem.as_str(), shard.number, shard.count), ("q4/big", 2, 3));
        assert_eq!(shard.all()[2], "q4/big-00003-of-00003.gguf");
        for name in [
            "big.gguf",
            "big-2-of-3.gguf",
            "big-00004-of-00003.gguf",
            "big-00000-of-00003.gguf",
            "big-00001-of-00003.bin",
            "-00001-of-00003.gguf",
            "big-+0001-of-00003.gguf",
        ] {
            assert_eq!(ShardName::parse(name), None, "{name}");
        }
        assert_eq!(model_name(Path::new("a/big-00001-of-00003.gguf")), "big");
        assert_eq!(model_name(Path::new("a/v1.5.gguf")), "v1.5");
    }
}
