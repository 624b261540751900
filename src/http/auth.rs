//! Who may ask for what. Keys are kept as digests: what was typed is forgotten, and comparing them
//! tells nothing of their length.

use std::fmt;

use hyper::header::{AUTHORIZATION, HeaderMap, WWW_AUTHENTICATE};
use hyper::{Request, StatusCode};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::reply::Problem;
use crate::config::network::MetricsAccess;

/// A key's SHA-256.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    /// Of a key as it is typed and sent.
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    fn is(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// What a path asks of who wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Demand {
    Nothing,
    Key,
    Metrics(MetricsAccess),
}

/// The keys there are.
#[derive(Clone, Debug, Default)]
pub struct Auth {
    /// For everything. Without any, nothing but metrics asks for a key.
    pub keys: Vec<Key>,
    /// Who may read `/metrics`.
    pub metrics: MetricsAccess,
    /// For `/metrics` and nothing else.
    pub metrics_key: Option<Key>,
}

impl Auth {
    /// Lets a request in and says whose it is: the number of its key; 0 where there are none.
    ///
    /// # Errors
    /// 401 without a key or with a wrong one, 403 with one that is for something else, 404 for
    /// metrics that are off.
    pub fn admit<B>(&self, request: &Request<B>) -> Result<u32, Problem> {
        let demand = self.demand(request.uri().path());
        if demand == Demand::Metrics(MetricsAccess::Off) {
            return Err(Problem::new(
                StatusCode::NOT_FOUND,
                "not_found",
                "this server has its metrics off",
            ));
        }
        if matches!(demand, Demand::Nothing | Demand::Metrics(MetricsAccess::Open)) {
            return Ok(0);
        }
        let given = bearer(request.headers()).map(Key::of);
        let is_for_metrics = given
            .as_ref()
            .zip(self.metrics_key.as_ref())
            .is_some_and(|(given, key)| key.is(given).into());
        match (demand, is_for_metrics) {
            (Demand::Metrics(_), true) => return Ok(0),
            (_, true) => {
                let message = "this key may read /metrics and nothing else";
                return Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", message));
            }
            (Demand::Key, false) if self.keys.is_empty() => return Ok(0),
            _ => {}
        }
        match given {
            Some(given) => self
                .owner(&given)
                .ok_or_else(|| unauthorized("the API key in Authorization is not known here")),
            None => Err(unauthorized("this needs an API key: send `Authorization: Bearer KEY`")),
        }
    }

    /// What is not listed needs a key: so does what may come to be.
    fn demand(&self, path: &str) -> Demand {
        match path {
            "/health" | "/ready" | "/docs" | "/openapi.json" => Demand::Nothing,
            path if path.starts_with("/docs/") => Demand::Nothing,
            "/metrics" => Demand::Metrics(self.metrics),
            _ => Demand::Key,
        }
    }

    /// Looks at all keys, whichever it is.
    fn owner(&self, given: &Key) -> Option<u32> {
        let (mut known, mut owner) = (Choice::from(0), 0);
        for (i, key) in (0..).zip(&self.keys) {
            let same = key.is(given);
            owner.conditional_assign(&i, same);
            known |= same;
        }
        bool::from(known).then_some(owner)
    }

    /// `true` if `key` is one of those for everything.
    #[must_use]
    pub fn knows(&self, key: &Key) -> bool {
        self.owner(key).is_some()
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn unauthorized(message: &str) -> Problem {
    let mut problem = Problem::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
    problem.header = Some((WWW_AUTHENTICATE, "Bearer"));
    problem
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The owner, or the status of a refusal.
    fn ask(auth: &Auth, path: &str, authorization: &str) -> Result<u32, u16> {
        let request = Request::get(path).header(AUTHORIZATION, authorization).body(()).unwrap();
        auth.admit(&request).map_err(|problem| problem.status.as_u16())
    }

    fn keys(texts: &[&str]) -> Auth {
        Auth { keys: texts.iter().map(|text| Key::of(text)).collect(), ..Auth::default() }
    }

    #[test]
    fn a_key_has_its_number_and_what_is_no_key_is_refused() {
        let auth = keys(&["first", "second"]);
        assert_eq!(ask(&auth, "/generate", "Bearer first"), Ok(0));
        assert_eq!(ask(&auth, "/v1/models", "bearer second"), Ok(1));
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
