//! The part of `serve`'s table that is about clients: who may ask, from where, and how.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use hyper::Uri;
use hyper::header::HeaderValue;

use crate::http::auth::{Auth, Key, MetricsAccess};
use crate::http::cors::{self, Cors};
use crate::http::tls::Tls;

/// Flags about clients.
#[derive(Clone, Debug, ClapArgs)]
pub struct NetworkArgs {
    /// Key that clients must send as `Authorization: Bearer KEY`; repeat it, or separate several by
    /// commas [default: none]
    #[arg(long = "api-key", env = "API_KEY", value_name = "API_KEY", value_delimiter = ',', value_parser = secret,
          hide_env_values = true)]
    pub api_keys: Vec<Secret>,
    /// File with a key a line; blank lines and lines that begin with # are skipped
    #[arg(long, env = "API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Who may read /metrics
    #[arg(long, env = "METRICS", default_value = "open")]
    pub metrics: MetricsAccess,
    /// Key that may read /metrics and nothing else; with METRICS=key
    #[arg(long, env = "METRICS_KEY", value_parser = secret, hide_env_values = true)]
    pub metrics_key: Option<Secret>,
    /// Origin whose pages may read answers, such as `https://example.org`, or * for every one;
    /// repeat it, or separate several by commas [default: none]
    #[arg(long = "cors-origin", env = "CORS_ORIGIN", value_name = "CORS_ORIGIN", value_delimiter = ',', value_parser = origin)]
    pub cors_origins: Vec<HeaderValue>,
    /// Certificate chain in PEM, for HTTPS [default: none]
    #[arg(long, env = "TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM
    #[arg(long, env = "TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// OpenTelemetry collector that gets a trace of each request, such as `http://127.0.0.1:4318`
    /// [default: none]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "OTEL_EXPORTER_OTLP_ENDPOINT", value_parser = collector)]
    pub otlp_endpoint: Option<Uri>,
}

/// A value that is never shown, not even in an error.
#[derive(Clone)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Takes anything: the error of a parser would show what it was given.
#[allow(clippy::unnecessary_wraps)]
fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret(text.to_owned()))
}

impl NetworkArgs {
    /// The origins.
    ///
    /// # Errors
    /// When some are named beside all.
    pub fn cors(&self) -> Result<Cors, String> {
        let origins = self.cors_origins.clone();
        if origins.len() > 1 && origins.iter().any(|origin| origin == cors::ANY) {
            return Err("CORS_ORIGIN has * and others: * alone is every origin".into());
        }
        Ok(Cors(origins))
    }

    /// What TLS needs, if it is on.
    ///
    /// # Errors
    /// When a file is missing, cannot be read, or does not fit the other.
    pub fn tls(&self) -> Result<Option<Tls>, String> {
        match (&self.tls_cert, &self.tls_key) {
            (None, None) => Ok(None),
            (Some(cert), Some(key)) => Tls::read(cert, key).map(Some),
            (Some(cert), None) => Err(format!(
                "TLS_CERT is {}, but its private key is missing: give TLS_KEY",
                cert.display()
            )),
            (None, Some(key)) => Err(format!(
                "TLS_KEY is {}, but its certificate is missing: give TLS_CERT",
                key.display()
            )),
        }
    }

    /// The keys, those of the file included.
    ///
    /// # Errors
    /// One line that names the variable and what it must be; no key is shown.
    pub fn auth(&self) -> Result<Auth, String> {
        let mut keys =
            self.api_keys.iter().map(|s| key(&s.0, "API_KEY")).collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = &self.api_key_file {
            keys.extend(keys_in(path)?);
        }
        let metrics_key =
            self.metrics_key.as_ref().map(|s| key(&s.0, "METRICS_KEY")).transpose()?;
        let auth = Auth { keys, metrics: self.metrics, metrics_key };
        match &auth.metrics_key {
            Some(_) if auth.metrics != MetricsAccess::Key => {
                Err("METRICS_KEY is given, but METRICS does not ask for it: set METRICS to key".into())
            }
            Some(key) if auth.tenant(key).is_some() => {
                Err("METRICS_KEY is one of the API keys, but it must be for /metrics alone: choose another".into())
            }
            None if auth.metrics == MetricsAccess::Key && auth.keys.is_empty() => {
                Err("METRICS is key, but there is none: give METRICS_KEY, API_KEY or API_KEY_FILE".into())
            }
            _ => Ok(auth),
        }
    }
}

/// An origin as browsers send it.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let wanted = || {
        "must be * or an origin such as https://example.org:8443, with no path and no / at its end"
            .to_owned()
    };
    let is_origin = |text: &str| {
        let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        host.is_some_and(|host| {
            !host.is_empty()
                && host
                    .bytes()
                    .all(|b| b.is_ascii_graphic() && b != b'/' && !b.is_ascii_uppercase())
        })
    };
    if text != cors::ANY && !is_origin(text) {
        return Err(wanted());
    }
    HeaderValue::from_str(text).map_err(|_| wanted())
}

/// A collector's address: it is close by, so no TLS.
fn collector(text: &str) -> Result<Uri, String> {
    let uri = text.parse::<Uri>().ok().filter(|uri| {
        uri.scheme_str() == Some("http") && uri.host().is_some() && uri.query().is_none()
    });
    uri.ok_or_else(|| "must be the address of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318".into())
}

/// The keys of a file.
fn keys_in(path: &Path) -> Result<Vec<Key>, String> {
    let name = format!("API_KEY_FILE {}", path.display());
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("{name} cannot be read: {error}"))?;
    let lines = text
        .lines()
        .map(str::trim)
        .enumerate()
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<Key> = lines
        .map(|(i, line)| key(line, &format!("{name}: line {}", i + 1)))
        .collect::<Result<_, _>>()?;
    if keys.is_empty() {
        return Err(format!("{name} holds no key: it must have one a line"));
    }
    Ok(keys)
}

/// A key; `name` says where it is from.
fn key(text: &str, name: &str) -> Result<Key, String> {
    if text.is_empty() {
        return Err(format!("{name} is empty: give a key, or leave it unset"));
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "{name} has a key with a space or another character that is not visible ASCII (it is not shown)"
        ));
    }
    Ok(Key::of(text))
}
