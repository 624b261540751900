//! Which of a repository's files a name means: llama.cpp's rules (`common/download.cpp`).

use super::error::HubError;
use super::name::{ModelName, RepoName};
use crate::files::ShardName;

/// Quantizations that are taken if none is named and the repository has one of them.
const PREFERRED: [&str; 2] = ["Q4_K_M", "Q8_0"];

/// Parts of the names of GGUF files that hold something else than a model: projectors of images,
/// matrices of importance, and networks that draft for a model.
const NO_MODELS: [&str; 6] = ["mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"];

/// The files of the model that a name means, several if it is split; the first one comes first.
/// `file` is a path in the repository, and more than the name's quantization.
///
/// # Errors
/// [`HubError::NoFile`] with what the repository has, and for a model of which a file is missing.
pub fn model_files(
    files: &[&str],
    name: &ModelName,
    file: Option<&str>,
) -> Result<Vec<String>, HubError> {
    let no_file = |reason: String| HubError::NoFile { repo: name.repo.to_string(), reason };
    let picked = match file {
        Some(file) => files.iter().find(|path| **path == file).copied(),
        None => pick(files, name.quant.as_deref()),
    };
    let Some(picked) = picked else {
        let wanted = match (file, &name.quant) {
            (Some(file), _) => format!("it has no file {file}"),
            (None, Some(quant)) => format!("it has no GGUF file of the quantization {quant}"),
            (None, None) => "it has no GGUF file of a model".into(),
        };
        return Err(no_file(format!("{wanted}; {}", what_there_is(files, file.is_some()))));
    };
    let Some(shard) = ShardName::parse(picked) else { return Ok(vec![picked.to_owned()]) };
    let all = shard.all();
    match all.iter().find(|shard| !files.contains(&shard.as_str())) {
        Some(missing) => Err(no_file(format!(
            "{missing} is missing; the model has {} files, and all are needed",
            shard.count
        ))),
        None => Ok(all),
    }
}

/// The heads of a repository: the first of `names` that it has.
///
/// # Errors
/// [`HubError::NoFile`] with the names.
pub fn first_of<'a>(
    files: &[&str],
    repo: &RepoName,
    names: &[&'a str],
) -> Result<&'a str, HubError> {
    let found = names.iter().find(|name| files.contains(name)).copied();
    found.ok_or_else(|| HubError::NoFile {
        repo: repo.to_string(),
        reason: format!("it has no heads; looked for {}", names.join(", ")),
    })
}

fn pick<'a>(files: &[&'a str], quant: Option<&str>) -> Option<&'a str> {
    let models = || files.iter().copied().filter(|path| is_model(path));
    let wanted = quant.map_or(PREFERRED.to_vec(), |quant| vec![quant]);
    let named = wanted.iter().find_map(|quant| models().find(|path| has_quant(path, quant)));
    named.or_else(|| models().next().filter(|_| quant.is_none()))
}

/// A GGUF file of a model; of one in several files, the first.
pub(crate) fn is_model(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    path.ends_with(".gguf")
        && !NO_MODELS.iter().any(|part| name.contains(part))
        && ShardName::parse(path).is_none_or(|shard| shard.number == 1)
}

/// Whether a path has the quantization before a `.` or `-`, in any case. It must not be the end of
/// a longer one: Q4_K_M is no part of UD-IQ4_K_M, and `4_0` of none.
fn has_quant(path: &str, quant: &str) -> bool {
    let (path, quant) = (path.to_ascii_lowercase(), quant.to_ascii_lowercase());
    path.match_indices(&quant).any(|(at, _)| {
        let before = path[..at].bytes().last();
        let after = path[at + quant.len()..].bytes().next();
        before.is_none_or(|b| !b.is_ascii_alphanumeric() && b != b'_')
            && after.is_some_and(|b| b".-".contains(&b))
    })
}

/// The quantizations of a repository, by its file names, or the names if they tell none or were
/// asked for.
fn what_there_is(files: &[&str], by_name: bool) -> String {
    let models: Vec<&str> = files.iter().copied().filter(|path| is_model(path)).collect();
    if models.is_empty() {
        return "it has no GGUF files of models at all".into();
    }
    let mut quants: Vec<String> = models.iter().filter_map(|path| quant_of(path)).collect();
    quants.sort();
    quants.dedup();
    if by_name || quants.is_empty() {
        return format!("it has {}", models.join(", "));
    }
    format!("it has {}", quants.join(", "))
}

/// The quantization that a path ends with: letters, digits and `_` after the last `-` or `.`,
/// such as Q4_K_M, IQ4_XS or F16.
fn quant_of(path: &str) -> Option<String> {
    let stem = ShardName::parse(path)
        .map_or_else(|| path.trim_end_matches(".gguf").to_owned(), |shard| shard.stem);
    let last = stem.rsplit(['-', '.', '/']).next()?.to_ascii_uppercase();
    let digits = last.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let kind = &last[..last.len() - digits.len()];
    let is_quant = ["Q", "IQ", "TQ", "F", "BF", "MXFP", "NVFP"].contains(&kind)
        && digits.starts_with(|c: char| c.is_ascii_digit());
    is_quant.then_some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick_of(files: &[&str], name: &str) -> Result<Vec<String>, String> {
        model_files(files, &name.parse().unwrap(), None).map_err(|error| error.to_string())
    }

    #[test]
    fn a_quantization_is_found_in_any_case() {
        let files = ["README.md", "m-Q8_0.gguf", "m-q4_k_m.gguf", "m-IQ4_K_M.gguf", "m-F16.gguf"];
        assert_eq!(pick_of(&files, "a/m:Q8_0").unwrap(), ["m-Q8_0.gguf"]);
        assert_eq!(pick_of(&files, "a/m:Q4_K_M").unwrap(), ["m-q4_k_m.gguf"]);
        assert_eq!(pick_of(&files, "a/m:f16").unwrap(), ["m-F16.gguf"]);
        let error = pick_of(&files, "a/m:Q2_K").unwrap_err();
        assert_eq!(
            error,
            "a/m: it has no GGUF file of the quantization Q2_K; it has F16, IQ4_K_M, Q4_K_M, Q8_0"
        );
    }

    #[test]
    fn without_one_q4_k_m_is_preferred_and_then_q8_0_and_then_the_first() {
        assert_eq!(
            pick_of(&["m.F16.gguf", "m.Q8_0.gguf", "m.Q4_K_M.gguf"], "a/m").unwrap(),
            ["m.Q4_K_M.gguf"]
        );
        assert_eq!(pick_of(&["m-F16.gguf", "m-Q8_0.gguf"], "a/m").unwrap(), ["m-Q8_0.gguf"]);
        assert_eq!(pick_of(&["mmproj-Q8_0.gguf", "m-F16.gguf"], "a/m").unwrap(), ["m-F16.gguf"]);
        let error = pick_of(&["mmproj-F16.gguf", "x.safetensors"], "a/m").unwrap_err();
        assert!(error.contains("no GGUF file of a model"), "{error}");
    }

    #[test]
    fn all_files_of_a_split_model_are_taken() {
        let files = ["Q8_0/m-Q8_0-00002-of-00002.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf"];
        assert_eq!(pick_of(&files, "a/m").unwrap(), [files[1], files[0]]);
        assert_eq!(pick_of(&files, "a/m:q8_0").unwrap(), [files[1], files[0]]);
        let error = pick_of(&files[1..], "a/m").unwrap_err();
        assert!(error.contains("Q8_0/m-Q8_0-00002-of-00002.gguf is missing"), "{error}");
    }

    #[test]
    fn a_file_may_be_named() {
        let (files, name) = (["a.gguf", "x/mmproj-b.gguf"], "a/m:Q8_0".parse().unwrap());
        assert_eq!(model_files(&files, &name, Some(files[1])).unwrap(), [files[1]]);
        let error = model_files(&files, &name, Some("c.gguf")).unwrap_err().to_string();
        assert_eq!(error, "a/m: it has no file c.gguf; it has a.gguf");
    }
}
