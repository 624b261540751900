//! Arguments of `serve`, and the checked configuration made from them.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::ensure;
use clap::{Args as ClapArgs, ValueEnum};
use hyper::Uri;

use super::engine::{EngineArgs, ModelConfig};
use super::network::NetworkArgs;
use super::several::SeveralArgs;
use super::values::{between, seconds};
use crate::http::api::Unknown;
use crate::http::app::HttpLimits;
use crate::http::auth::Auth;
use crate::http::cors::Cors;
use crate::http::host::Hosts;
use crate::http::tls::Tls;
use crate::models::ModelLimits;

/// `medusa-llama serve`.
#[derive(Clone, Debug, ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) several: SeveralArgs,
    /// Log format, also of llama.cpp's messages: text, or one JSON object per line
    #[arg(long, env = "LOG_FORMAT", default_value = "text", ignore_case = true)]
    pub log_format: LogFormat,
    /// Address to listen on
    #[arg(long, env = "HOST", default_value = "0.0.0.0")]
    pub host: IpAddr,
    /// Port to listen on; 0 picks a free one
    #[arg(short = 'p', long, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Threads of the HTTP server; the model has its own
    #[arg(long, env = "WORKERS", default_value_t = 1, value_parser = between(1, 256))]
    pub workers: usize,
    /// Time after SIGTERM in which /ready answers 503 but requests are still served, in seconds: for
    /// balancers to notice
    #[arg(long, env = "DRAIN_DELAY", default_value = "0", value_parser = seconds(0.0))]
    pub drain_delay: Duration,
    /// Time that running requests have to finish after SIGTERM and DRAIN_DELAY, in seconds
    #[arg(long, env = "DRAIN_TIMEOUT", default_value = "30", value_parser = seconds(0.0))]
    pub drain_timeout: Duration,
    /// Maximum size of a request body, in bytes
    #[arg(long, env = "MAX_BODY_BYTES", default_value_t = 1 << 20, value_parser = between(1, 1 << 30))]
    pub max_body_bytes: usize,
    /// Maximum number of open connections; further ones wait to be accepted
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 1024, value_parser = between(1, 65_536))]
    pub max_connections: usize,
    /// Maximum size of a request's head, in bytes
    #[arg(long, env = "MAX_HEADER_BYTES", default_value_t = 1 << 15, value_parser = between(1024, 1 << 20))]
    pub max_header_bytes: usize,
    /// Time that a client has to send a request's head, and then its body, in seconds; also the
    /// idle limit between requests
    #[arg(long, env = "READ_TIMEOUT", default_value = "30", value_parser = seconds(0.0))]
    pub read_timeout: Duration,
    /// Maximum duration of a request, in seconds; generation stops then. A request's own timeout_s
    /// may be shorter [default: no limit]
    #[arg(long, env = "REQUEST_TIMEOUT", value_parser = seconds(0.0))]
    pub request_timeout: Option<Duration>,
    /// Time without a byte read by the client after which its connection is closed and its request
    /// cancelled, in seconds
    #[arg(long, env = "WRITE_TIMEOUT", default_value = "60", value_parser = seconds(0.1))]
    pub write_timeout: Duration,
    /// Time without an event after which a stream gets a comment, so that proxies and clients keep
    /// waiting, in seconds; its head is sent by then, too. 0 sends none
    #[arg(long, env = "SSE_KEEP_ALIVE", default_value = "10", value_parser = seconds(0.0))]
    pub sse_keep_alive: Duration,
    /// Time for a forward pass, after which /ready answers 503, in seconds; 0 sets no limit
    #[arg(long, env = "STALL_TIMEOUT", default_value = "60", value_parser = seconds(0.0))]
    pub stall_timeout: Duration,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    /// The command line.
    #[arg(skip)]
    pub(crate) words: Vec<OsString>,
}

/// Log format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

/// The checked configuration of `serve`.
pub(crate) struct Config {
    pub listen: SocketAddr,
    /// Threads of the HTTP server.
    pub workers: usize,
    /// At least one.
    pub models: Vec<ModelConfig>,
    /// `None`: there is one model, which is loaded at the start.
    pub several: Option<ModelLimits>,
    pub http: HttpLimits,
    pub auth: Auth,
    pub cors: Cors,
    pub hosts: Hosts,
    pub unknown_fields: Unknown,
    /// Certificate and key; `None` serves plain HTTP.
    pub tls: Option<Tls>,
    pub otlp_endpoint: Option<Uri>,
    pub drain_delay: Duration,
    pub drain_timeout: Duration,
}

impl ServeArgs {
    /// Checks values against each other. An error names the variable, its value and the limit.
    pub(crate) fn check(&self) -> anyhow::Result<Config> {
        let auth = self.network.auth()?;
        let (models, are_several) = match self.several.models(&self.words)? {
            Some(several) => (several, true),
            None => (vec![self.engine.clone()], false),
        };
        ensure!(
            !are_several || models.iter().all(|args| args.model.placement.rpc.is_empty()),
            "RPC is of one model, but MODEL_DIR or MODEL_LIST names several: leave it unset"
        );
        let owners = auth.owners();
        let models: Vec<ModelConfig> =
            models.iter().map(|args| args.check(&owners)).collect::<Result<_, _>>()?;
        for (i, model) in models.iter().enumerate() {
            let is_other = models[..i].iter().all(|other| other.id != model.id);
            ensure!(is_other, "two models have the name {}: give one an alias", model.id);
        }
        Ok(Config {
            models,
            several: are_several.then(|| self.several.limits()),
            listen: SocketAddr::new(self.host, self.port),
            workers: self.workers,
            http: HttpLimits {
                max_body_bytes: self.max_body_bytes,
                max_connections: self.max_connections,
                max_header_bytes: self.max_header_bytes,
                read_timeout: self.read_timeout,
                timeout: self.request_timeout,
                write_timeout: self.write_timeout,
                sse_keep_alive: Some(self.sse_keep_alive).filter(|period| !period.is_zero()),
                stall_timeout: Some(self.stall_timeout).filter(|limit| !limit.is_zero()),
            },
            unknown_fields: self.network.unknown_fields(),
            hosts: self.network.hosts(self.host, !auth.keys.is_empty()),
            auth,
            cors: self.network.cors()?,
            tls: self.network.tls()?,
            otlp_endpoint: self.network.otlp_endpoint.clone(),
            drain_delay: self.drain_delay,
            drain_timeout: self.drain_timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{Args, Command};

    fn serve(args: &[&str]) -> Result<ServeArgs, clap::Error> {
        let all = ["medusa-llama", "serve"].iter().chain(args);
        Args::try_parse_from(all).map(|a| match a.command {
            Command::Serve(s) => *s,
            _ => unreachable!("`serve` was given"),
        })
    }

    #[test]
    fn a_bad_value_is_rejected_with_its_variable() {
        let bad = [
            (["--batch-size", "0"], "BATCH_SIZE"),
            (["--port", "70000"], "PORT"),
            (["--max-wait-time", "100000"], "MAX_WAIT_TIME"),
            (["--max-wait-time", "nan"], "MAX_WAIT_TIME"),
            (["--write-timeout", "0"], "WRITE_TIMEOUT"),
            (["--ctx", "x"], "MODEL_CONTEXT_SIZE"),
            (["--log-level", "loud"], "LOG_LEVEL"),
            (["--kv", "both"], "KV_LAYOUT"),
            (["--host", "here"], "HOST"),
        ];
        for (args, name) in bad {
            let text = serve(&args).unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn rates_of_acceptance_are_probabilities() {
        let bench = |rates: &str| {
            Args::try_parse_from(["x", "bench", "--prompts=p", &format!("--acceptance={rates}")])
        };
        for rates in ["0.5,1.5", "-0.1", "0.5,nan", "", "0.5,x"] {
            let text = bench(rates).unwrap_err().to_string();
            assert!(text.contains("acceptance"), "{text}");
        }
        let Command::Bench(args) = bench("0.56,0.32,1").unwrap().command else {
            unreachable!("`bench` was given")
        };
        assert_eq!(args.acceptance, Some(vec![0.56, 0.32, 1.0]));
    }

    #[test]
    fn an_unknown_shape_is_rejected_with_the_known_ones() {
        let text = Args::try_parse_from(["x", "synth", "--like", "gpt-9", "-o", "f"])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("--like") && text.contains("vicuna-7b") && text.contains("tiny"),
            "{text}"
        );
    }

    #[test]
    fn values_that_contradict_each_other_are_rejected() {
        let rejected = |args: &[&str]| serve(args).unwrap().check().err().unwrap().to_string();
        assert!(rejected(&["--n-batch", "2"]).contains("N_BATCH is 2"));
        let few = ["--kv-cells", "100", "--ctx", "200"];
        assert!(rejected(&few).contains("KV_CELLS is 100"));
        assert!(rejected(&["--kv", "streams", "--heads", "x"]).contains("MEDUSA_HEADS"));
        for (args, why) in [
            (&["--rpc", "a:1,b:1,c:1"][..], "names 3 workers"),
            (&["--rpc", "a:1,a:1"], "twice"),
            (&["--rpc", "a:1", "--rpc-split", "1"], "it needs 2"),
            (&["--rpc-split", "1,1"], "it needs 1"),
            (&["--rpc", "a:1", "--split-mode", "row"], "by layers"),
        ] {
            assert!(rejected(args).contains(why), "{}", rejected(args));
        }
    }

    #[test]
    fn the_cache_is_one_pool_unless_streams_are_named() {
        let sizes = |args: &[&str]| serve(args).unwrap().engine.sizes();
        let of_all = sizes(&[]);
        assert_eq!((of_all.streams, of_all.n_ctx, of_all.n_states_kept), (false, None, 8));
        assert_eq!(sizes(&["--prefix-cells", "100"]).n_retained, Some(100));
        assert!(sizes(&["--kv", "streams"]).streams);
    }

    #[test]
    fn names_are_checked_where_a_server_trusts_whoever_reaches_it() {
        let hosts = |args: &[&str], has_keys: bool| {
            let args = serve(args).unwrap();
            args.network.hosts(args.host, has_keys)
        };
        let only = |names: &[&str]| Hosts::Only(names.iter().map(ToString::to_string).collect());
        assert_eq!(hosts(&[], false), Hosts::Any);
        assert_eq!(hosts(&["--host", "127.0.0.1"], true), Hosts::Any);
        for loopback in ["127.0.0.1", "127.1.2.3", "::1"] {
            assert_eq!(hosts(&["--host", loopback], false), only(&[]), "{loopback}");
        }
        assert_eq!(hosts(&["--host", "::1", "--allowed-hosts", "*"], false), Hosts::Any);
        let named = ["--allowed-hosts", "a.example.,[::2]"];
        assert_eq!(hosts(&named, true), only(&["a.example", "[::2]"]));
        for bad in ["", "a b", "a:80", "http://a"] {
            let text = serve(&["--allowed-hosts", bad]).unwrap_err().to_string();
            assert!(text.contains("ALLOWED_HOSTS") && text.contains("example.org"), "{text}");
        }
    }
}
