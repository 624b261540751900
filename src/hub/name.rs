//! Names of repositories and of models in them.

use std::fmt;
use std::str::FromStr;

/// A repository, `user/repo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoName(String);

impl RepoName {
    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RepoName {
    type Err = String;

    /// # Errors
    /// What a name must be like. It becomes a part of paths and addresses, so nothing else is taken.
    fn from_str(text: &str) -> Result<Self, String> {
        let is_part = |part: &str| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            let ends = [part.bytes().next(), part.bytes().last()];
            part.bytes().all(allowed)
                && !part.contains("..")
                && !part.contains("--") // the cache writes it for the slash
                && ends.iter().all(|end| end.is_some_and(|b| !b".-".contains(&b)))
        };
        match text.split_once('/') {
            Some((user, repo)) if is_part(user) && is_part(repo) => Ok(Self(text.to_owned())),
            _ => Err("must be the name of a repository on the Hub, such as user/repo".into()),
        }
    }
}

/// A model, `user/repo` or `user/repo:quant`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    /// Where it is.
    pub repo: RepoName,
    /// Its quantization, in any case; `None` leaves the choice to [`pick`](super::pick).
    pub quant: Option<String>,
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.quant {
            Some(quant) => write!(f, "{}:{quant}", self.repo),
            None => self.repo.fmt(f),
        }
    }
}

impl FromStr for ModelName {
    type Err = String;

    /// # Errors
    /// What a name must be like.
    fn from_str(text: &str) -> Result<Self, String> {
        let why = || {
            "must be a repository on the Hub and maybe a quantization, such as user/repo or user/repo:Q4_K_M"
                .to_owned()
        };
        let (repo, quant) = match text.split_once(':') {
            Some((repo, quant)) => (repo, Some(quant)),
            None => (text, None),
        };
        let is_quant = |quant: &str| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            !quant.is_empty() && quant.bytes().all(allowed)
        };
        if !quant.is_none_or(is_quant) {
            return Err(why());
        }
        let repo = repo.parse().map_err(|_| why())?;
        Ok(Self { repo, quant: quant.map(str::to_owned) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_repositories_with_or_without_a_quantization() {
        for name in ["a/b", "TheBloke/x_1.5-GGUF", "a/b:q4_k_m", "unsloth/x:UD-Q4_K_XL"] {
            assert_eq!(name.parse::<ModelName>().unwrap().to_string(), name);
        }
        for name in ["", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/b:", "a/b:x/y", "a b/c"] {
            assert!(name.parse::<ModelName>().unwrap_err().contains("user/repo"), "{name}");
        }
        assert!("a/b:Q8_0".parse::<RepoName>().is_err());
    }
}
