//! Who may ask for what. Keys are kept as digests, so that comparing them reveals no length.

use std::fmt;

use clap::ValueEnum;
use hyper::header::{AUTHORIZATION, HeaderMap};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::problem::Problem;
use crate::prefixes::key::Owner;

/// A key's SHA-256.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    pub fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Open,
    /// Who has an API key, if there are any.
    Key,
    Metrics,
}

/// Who may read `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MetricsAccess {
    /// Everybody
    #[default]
    Open,
    /// Who has an API key, or the key for metrics
    Key,
    /// Nobody: there are none
    Off,
}

#[derive(Clone, Debug, Default)]
pub struct Auth {
    /// For everything. Without any, nothing but metrics asks for a key.
    pub keys: Vec<Key>,
    pub metrics: MetricsAccess,
    /// For `/metrics` and nothing else.
    pub metrics_key: Option<Key>,
}

impl Auth {
    /// Admits a request to a route and returns its tenant: the number of its key; 0 where there are
    /// none.
    pub fn admit(&self, access: Access, headers: &HeaderMap) -> Result<u32, Problem> {
        match (access, self.metrics) {
            (Access::Open, _) | (Access::Metrics, MetricsAccess::Open) => return Ok(0),
            (Access::Metrics, MetricsAccess::Off) => return Err(Problem::MetricsOff),
            (Access::Key, _) | (Access::Metrics, MetricsAccess::Key) => {}
        }
        let given = sent(headers).map(Key::of);
        let keys = given.as_ref().zip(self.metrics_key.as_ref());
        let is_for_metrics = keys.is_some_and(|(given, key)| key.0.ct_eq(&given.0).into());
        match (access, is_for_metrics) {
            (Access::Metrics, true) => Ok(0),
            (_, true) => Err(Problem::MetricsKey),
            (Access::Key, false) if self.keys.is_empty() => Ok(0),
            _ => self.tenant(&given.ok_or(Problem::KeyMissing)?).ok_or(Problem::KeyUnknown),
        }
    }

    /// Whose what is kept is, by the number of the key.
    pub fn owners(&self) -> Vec<Owner> {
        self.keys.iter().map(|key| Owner::with(&key.0)).collect()
    }

    /// The number of a key. Looks at all keys, whichever it is.
    pub fn tenant(&self, given: &Key) -> Option<u32> {
        let (mut known, mut tenant) = (Choice::from(0), 0);
        for (i, key) in (0..).zip(&self.keys) {
            let same = key.0.ct_eq(&given.0);
            tenant.conditional_assign(&i, same);
            known |= same;
        }
        bool::from(known).then_some(tenant)
    }
}

/// A key as OpenAI's clients send it, or as Anthropic's do.
fn sent(headers: &HeaderMap) -> Option<&str> {
    bearer(headers).or_else(|| Some(headers.get("x-api-key")?.to_str().ok()?.trim()))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderName;

    use super::*;
    use crate::http::problem::ErrorShape;
    use crate::http::routes;

    /// The tenant, or the status of a refusal.
    fn ask(auth: &Auth, path: &str, authorization: &str) -> Result<u32, u16> {
        ask_with(auth, path, AUTHORIZATION, authorization)
    }

    fn ask_with(auth: &Auth, path: &str, name: HeaderName, value: &str) -> Result<u32, u16> {
        let access = routes::find(path).map_or(Access::Key, |route| route.access);
        let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
        auth.admit(access, &headers)
            .map_err(|problem| problem.status_and_kind(ErrorShape::Own).0.as_u16())
    }

    fn keys(texts: &[&str]) -> Auth {
        Auth { keys: texts.iter().map(|text| Key::of(text)).collect(), ..Auth::default() }
    }

    #[test]
    fn a_key_has_its_number_and_what_is_no_key_is_refused() {
        let auth = keys(&["first", "second"]);
        assert_eq!(ask(&auth, "/generate", "Bearer first"), Ok(0));
        assert_eq!(ask(&auth, "/v1/models", "bearer second"), Ok(1));
        let name = || HeaderName::from_static("x-api-key");
        assert_eq!(ask_with(&auth, "/generate", name(), "second"), Ok(1));
        assert_eq!(ask_with(&auth, "/generate", name(), "third"), Err(401));
        for wrong in [
            "",
            "first",
            "Basic first",
            "Bearer ",
            "Bearer firs",
            "Bearer first,second",
            "Bearer FIRST",
        ] {
            assert_eq!(ask(&auth, "/", wrong), Err(401), "{wrong}");
            assert_eq!(ask(&auth, "/what/ever", wrong), Err(401), "{wrong}");
            assert_eq!(ask(&auth, "/health", wrong), Ok(0));
        }
        assert_eq!(ask(&Auth::default(), "/generate", "Bearer any"), Ok(0));
    }

    #[test]
    fn metrics_are_open_or_for_a_key_or_off() {
        let with = |metrics, metrics_key: Option<&str>| Auth {
            metrics,
            metrics_key: metrics_key.map(Key::of),
            ..keys(&["full"])
        };
        assert_eq!(ask(&with(MetricsAccess::Open, None), "/metrics", ""), Ok(0));
        assert_eq!(ask(&with(MetricsAccess::Off, None), "/metrics", "Bearer full"), Err(404));
        let auth = with(MetricsAccess::Key, Some("scrape"));
        for (key, expected) in [
            ("Bearer scrape", Ok(0)),
            ("Bearer full", Ok(0)),
            ("Bearer other", Err(401)),
            ("", Err(401)),
        ] {
            assert_eq!(ask(&auth, "/metrics", key), expected, "{key}");
        }
        assert_eq!(ask(&auth, "/generate", "Bearer scrape"), Err(403));
        let alone = Auth { keys: vec![], ..auth };
        assert_eq!((ask(&alone, "/generate", ""), ask(&alone, "/metrics", "")), (Ok(0), Err(401)));
        assert_eq!(ask(&alone, "/", "Bearer scrape"), Err(403));
    }

    #[test]
    fn keys_are_not_shown() {
        let shown = format!("{:?}", keys(&["first"]));
        assert!(!shown.contains("first") && shown.contains("[Key]"), "{shown}");
    }
}
