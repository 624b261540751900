//! The part of `serve`'s table that is about clients: who may ask, from where, and how.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, bail, ensure};
use clap::Args as ClapArgs;
use clap::builder::BoolishValueParser;
use hyper::Uri;
use hyper::header::HeaderValue;

use crate::http::api::Unknown;
use crate::http::auth::{Auth, Key, MetricsAccess};
use crate::http::cors::{self, Cors};
use crate::http::host::{self, Hosts};
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
    /// Name that clients may ask for this server by, beside those of loopback, or * for any;
    /// repeat it, or separate several by commas [default: none if HOST is a loopback address and
    /// there is no key, else *]
    #[arg(long, env = "ALLOWED_HOSTS", value_name = "ALLOWED_HOSTS", value_delimiter = ',', value_parser = host)]
    pub allowed_hosts: Vec<String>,
    /// Refuse fields that nobody knows in OpenAI's dialect too, where they are ignored and named in
    /// a header otherwise
    #[arg(long, env = "STRICT_FIELDS", value_parser = BoolishValueParser::new())]
    pub strict_fields: bool,
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
    pub(super) fn cors(&self) -> anyhow::Result<Cors> {
        let origins = self.cors_origins.clone();
        let mixed = origins.len() > 1 && origins.iter().any(|origin| origin == cors::ANY);
        ensure!(!mixed, "CORS_ORIGIN has * and others: * alone is every origin");
        Ok(Cors(origins))
    }

    /// The names that a server on `listen`, with or without keys, answers to. Without a key a
    /// server on loopback trusts whoever reaches it, so it must know pages of other names.
    pub(super) fn hosts(&self, listen: IpAddr, has_keys: bool) -> Hosts {
        let any = match self.allowed_hosts.as_slice() {
            [] => has_keys || !listen.is_loopback(),
            names => names.iter().any(|name| name == host::ANY),
        };
        if any { Hosts::Any } else { Hosts::Only(self.allowed_hosts.clone()) }
    }

    /// What becomes of fields that nobody knows, in OpenAI's dialect.
    pub(super) fn unknown_fields(&self) -> Unknown {
        if self.strict_fields { Unknown::Refused } else { Unknown::Ignored }
    }

    /// What TLS needs, if it is on.
    pub(super) fn tls(&self) -> anyhow::Result<Option<Tls>> {
        match (&self.tls_cert, &self.tls_key) {
            (None, None) => Ok(None),
            (Some(cert), Some(key)) => Tls::read(cert, key).map(Some).map_err(Error::msg),
            (Some(cert), None) => {
                bail!(
                    "TLS_CERT is {}, but its private key is missing: give TLS_KEY",
                    cert.display()
                )
            }
            (None, Some(key)) => {
                bail!("TLS_KEY is {}, but its certificate is missing: give TLS_CERT", key.display())
            }
        }
    }

    /// The keys, those of the file included.
    pub(super) fn auth(&self) -> anyhow::Result<Auth> {
        let keys = self.api_keys.iter().map(|s| key(&s.0, "API_KEY"));
        let mut keys = keys.collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = &self.api_key_file {
            keys.extend(keys_in(path)?);
        }
        let metrics_key =
            self.metrics_key.as_ref().map(|s| key(&s.0, "METRICS_KEY")).transpose()?;
        let auth = Auth { keys, metrics: self.metrics, metrics_key };
        match &auth.metrics_key {
            Some(_) if auth.metrics != MetricsAccess::Key => {
                bail!("METRICS_KEY is given, but METRICS does not ask for it: set METRICS to key")
            }
            Some(key) if auth.tenant(key).is_some() => {
                bail!(
                    "METRICS_KEY is one of the API keys, but it must be for /metrics alone: choose another"
                )
            }
            None if auth.metrics == MetricsAccess::Key && auth.keys.is_empty() => {
                bail!(
                    "METRICS is key, but there is none: give METRICS_KEY, API_KEY or API_KEY_FILE"
                )
            }
            _ => Ok(auth),
        }
    }
}

/// An origin as browsers send it.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let allowed = |b: u8| b.is_ascii_graphic() && b != b'/' && !b.is_ascii_uppercase();
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let is_origin = host.is_some_and(|host| !host.is_empty() && host.bytes().all(allowed));
    let value = HeaderValue::from_str(text).ok().filter(|_| is_origin || text == cors::ANY);
    value.ok_or_else(|| {
        "must be * or an origin such as https://example.org:8443, with no path and no / at its end".into()
    })
}

/// A host's name or address, without a port.
fn host(text: &str) -> Result<String, String> {
    let is_host = !text.is_empty() && host::host_of(text) == Some(text);
    is_host.then(|| text.trim_end_matches('.').to_owned()).ok_or_else(|| {
        "must be * or a host's name or address, such as example.org, with no port".into()
    })
}

/// A collector's address: it is close by, so no TLS.
fn collector(text: &str) -> Result<Uri, String> {
    let uri = text.parse::<Uri>().ok().filter(|uri| {
        uri.scheme_str() == Some("http") && uri.host().is_some() && uri.query().is_none()
    });
    uri.ok_or_else(|| "must be the address of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318".into())
}

/// The keys of a file.
fn keys_in(path: &Path) -> anyhow::Result<Vec<Key>> {
    let name = format!("API_KEY_FILE {}", path.display());
    let text = std::fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
    let lines = text.lines().map(str::trim).zip(1..);
    let keys = lines
        .filter(|(line, _)| !line.is_empty() && !line.starts_with('#'))
        .map(|(line, i)| key(line, &format!("{name}: line {i}")))
        .collect::<Result<Vec<_>, _>>()?;
    ensure!(!keys.is_empty(), "{name} holds no key: it must have one a line");
    Ok(keys)
}

/// A key; `name` says where it is from.
fn key(text: &str, name: &str) -> anyhow::Result<Key> {
    ensure!(!text.is_empty(), "{name} is empty: give a key, or leave it unset");
    ensure!(
        text.bytes().all(|b| b.is_ascii_graphic()),
        "{name} has a key with a space or another character that is not visible ASCII (it is not shown)"
    );
    Ok(Key::of(text))
}
