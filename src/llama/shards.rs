//! Models in several files. llama.cpp loads all of them if it is given the first one.

use std::path::{Path, PathBuf};

use super::error::LlamaError;
use super::gguf::Gguf;
use crate::files::ShardName;

/// The files of the model that `path` is a file of, in order: itself alone, or all shards if it is
/// any of them.
///
/// # Errors
/// [`LlamaError::File`] for a file that is no GGUF, for a shard with a name by which the others
/// cannot be found, and for one that is missing.
pub fn model_files(path: &Path) -> Result<Vec<PathBuf>, LlamaError> {
    let fail = |path: &Path, reason: String| LlamaError::File {
        action: "load",
        path: path.to_owned(),
        reason,
    };
    std::fs::File::open(path).map_err(|e| fail(path, e.to_string()))?;
    let header = Gguf::open(path)?;
    let count = u32::from(header.short("split.count").unwrap_or(1));
    if count <= 1 {
        return Ok(vec![path.to_owned()]);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some(shard) = ShardName::parse(&name).filter(|shard| shard.count == count) else {
        let reason = format!(
            "it is one of {count} files of a model, which must be named as gguf-split names them: \
             MODEL-00001-of-{count:05}.gguf"
        );
        return Err(fail(path, reason));
    };
    let files: Vec<_> = shard.all().iter().map(|name| path.with_file_name(name)).collect();
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => {
            let reason = format!("it is missing; the model has {count} files, and all are needed");
            Err(fail(missing, reason))
        }
        None => Ok(files),
    }
}

/// Bytes of all files of the model that `path` is a file of.
///
/// # Errors
/// As [`model_files`].
pub fn model_bytes(path: &Path) -> Result<u64, LlamaError> {
    let bytes = |file: &PathBuf| {
        std::fs::metadata(file).map(|m| m.len()).map_err(|e| LlamaError::File {
            action: "load",
            path: file.clone(),
            reason: e.to_string(),
        })
    };
    model_files(path)?.iter().map(bytes).sum()
}
