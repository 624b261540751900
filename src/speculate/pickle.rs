//! PyTorch's own files: a zip archive with the tensors' bytes and a pickle, which is a program.
//! candle reads the pickle without running it; entries that are not tensors are refused by name.
//! Sizes are checked against the file's before anything is allocated.

use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::pickle::{Object, PthTensors, Stack};
use candle_core::{DType, Error};
use zip::ZipArchive;

/// A tensor: name, shape, values.
pub type Named = (String, Vec<usize>, Vec<f32>);

/// Reads all tensors of a file's dictionary.
///
/// # Errors
/// What is wrong with the file, with the name of the tensor if one is invalid.
pub fn read(path: &Path) -> Result<Vec<Named>, (Option<String>, String)> {
    let whole = |reason: String| (None, reason);
    let n_bytes = std::fs::metadata(path).map_err(|e| whole(e.to_string()))?.len();
    let file = guarded(|| PthTensors::new(path, None));
    let file = file.map_err(|reason| {
        whole(format!("not a file that torch.save wrote, or not of tensors only: {reason}"))
    })?;
    let entries = guarded(|| entries(path)).map_err(whole)?;
    if let Some(name) = entries.into_iter().find(|name| !file.tensor_infos().contains_key(name)) {
        return Err((Some(name), "is no tensor, or one of a kind that is not supported".into()));
    }
    let mut left = n_bytes;
    let mut tensors = vec![];
    for (name, info) in file.tensor_infos() {
        let fail = |reason: String| (Some(name.clone()), reason);
        let shape = info.layout.dims().to_vec();
        let size = shape
            .iter()
            .try_fold(info.dtype.size_in_bytes() as u64, |n, &d| n.checked_mul(d as u64));
        left = size.and_then(|size| left.checked_sub(size)).ok_or_else(|| {
            fail(format!("its shape is {shape:?}: with those before more than the file's {n_bytes} bytes can hold"))
        })?;
        if info.layout.start_offset() != 0 {
            return Err(fail(
                "is a part of another tensor: save a copy of it, as `.clone()` makes".into(),
            ));
        }
        let read = || {
            file.get(name)?
                .ok_or_else(|| Error::Msg("is missing".into()))?
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1()
        };
        tensors.push((name.clone(), shape, guarded(read).map_err(fail)?));
    }
    Ok(tensors)
}

/// All names in a file's dictionary, also of entries that are not tensors.
fn entries(path: &Path) -> Result<Vec<String>, Error> {
    let mut archive = ZipArchive::new(BufReader::new(File::open(path)?))?;
    let name = archive
        .file_names()
        .find_map(|name| name.ok().filter(|name| name.ends_with("data.pkl")).map(String::from));
    let name = name.ok_or_else(|| Error::Msg("no data.pkl".into()))?;
    let mut stack = Stack::empty();
    stack.read_loop(&mut BufReader::new(archive.by_name(&name)?))?;
    let Object::Dict(entries) = stack.finalize()? else {
        return Err(Error::Msg("no dictionary of tensors".into()));
    };
    let text = |(key, _)| match key {
        Object::Unicode(name) => name,
        other => format!("{other:?}"),
    };
    Ok(entries.into_iter().map(text).collect())
}

/// Runs candle's reader, which panics on some malformed files.
fn guarded<T>(read: impl FnOnce() -> Result<T, Error>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("it cannot be understood".into()),
    }
}
