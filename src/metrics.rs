//! `/metrics`: the engine's [`Stats`](crate::engine::stats::Stats), and what HTTP answered.
//!
//! Names are vLLM's, with `medusa_llama:` for `vllm:`, where vLLM has the same metric, so dashboards
//! need only another prefix; every series of an engine has vLLM's label `model_name`. While a model is
//! not loaded it has no engine metrics.

use std::borrow::Cow;
use std::fmt::Error;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use indexmap::IndexMap;
use indexmap::map::Entry;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::engine::Handle;
use crate::llama;
use crate::models::Loaded;
use crate::request::Source;
use crate::speculate::reliability::{Count, N_RANGES, calibration_error};

/// How [`Metrics::text`] writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    Classic,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The value of `Content-Type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Classic => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// All metrics of a server.
pub struct Metrics {
    registry: Registry,
    answers: Family<[(&'static str, String); 2], Counter>,
    refusals: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Metrics {
    /// Of a server whose only model is called `model_name`; `None`: there are several.
    pub fn new(model_name: Option<&str>) -> Self {
        let mut registry = labelled(model_name);
        let build = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("llama_cpp", llama::version()),
            ("backend", llama::device_kinds().to_owned()),
        ];
        registry.register("medusa_llama:build", "What is running", Info::new(build));
        let started = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
        let help = "When the process started, in seconds since 1970";
        registry.register("process_start_time_seconds", help, ConstGauge::new(started));
        let (answers, refusals) = (Family::default(), Family::default());
        let help = "HTTP requests by path and status";
        registry.register("medusa_llama:http_requests", help, answers.clone());
        let help = "Requests that got an error in place of an answer, by its type";
        registry.register("medusa_llama:request_refusals", help, refusals.clone());
        Self { registry, answers, refusals }
    }

    /// Counts an answer to a request for `path`, which is one of few.
    pub fn count_answer(&self, path: &'static str, status: u16) {
        let labels = [("path", path.to_owned()), ("status", status.to_string())];
        self.answers.get_or_create(&labels).inc();
    }

    /// Counts an error of type `kind`, which is one of few.
    pub fn count_refusal(&self, kind: &'static str) {
        self.refusals.get_or_create(&[("reason", kind)]).inc();
    }

    /// All of them as they are now, with those of the engines of these models.
    pub fn text(&self, format: Format, loaded: &[Arc<Loaded>]) -> String {
        let encode = match format {
            Format::Classic => prometheus_text::encode,
            Format::OpenMetrics => text::encode_registry,
        };
        let text_of = |registry: &Registry| {
            let mut text = String::new();
            encode(&mut text, registry).expect("a String takes everything");
            text
        };
        let engine = |model: &Arc<Loaded>| {
            let mut registry = labelled(Some(&model.id));
            model.handle.stats.register(&mut registry);
            registry.register_collector(Box::new(Derived(model.handle.clone())));
            registry.register(
                "medusa_llama:cache_config",
                CACHE_CONFIG,
                cache_config(&model.handle),
            );
            text_of(&registry)
        };
        let engines: Vec<String> = loaded.iter().map(engine).collect();
        let mut out = text_of(&self.registry) + &joined(&engines);
        if format == Format::OpenMetrics {
            text::encode_eof(&mut out).expect("a String takes everything");
        }
        out
    }
}

/// What a metric's first line begins with.
const HELP: &str = "# HELP ";

/// The texts of registries that have the same metrics: all lines of a metric must be together.
fn joined(texts: &[String]) -> String {
    let mut metrics: IndexMap<&str, String> = IndexMap::new();
    for metric in texts.iter().flat_map(|text| text.split(HELP)).filter(|text| !text.is_empty()) {
        let name = metric.split(' ').next().unwrap_or_default();
        match metrics.entry(name) {
            Entry::Vacant(new) => drop(new.insert(format!("{HELP}{metric}"))),
            Entry::Occupied(mut known) => {
                let samples = metric.lines().skip(1).filter(|line| !line.starts_with('#'));
                samples.for_each(|line| known.get_mut().extend([line, "\n"]));
            }
        }
    }
    metrics.into_values().collect()
}

/// Cells that count as a block for those who ask in blocks, such as llm-d's router, which hashes a
/// prompt's beginning a block at a time: vLLM's size. The cache itself has no blocks.
const BLOCK: usize = 16;

const CACHE_CONFIG: &str = "Size of the KV cache, in blocks of so many tokens";

fn cache_config(handle: &Handle) -> Info<[(&'static str, String); 2]> {
    let n_blocks = handle.limits.n_cells() / BLOCK;
    Info::new([("block_size", BLOCK.to_string()), ("num_gpu_blocks", n_blocks.to_string())])
}

fn labelled(model_name: Option<&str>) -> Registry {
    let label = |name: &str| (Cow::from("model_name"), Cow::from(name.to_owned()));
    Registry::with_labels(model_name.map(label).into_iter())
}

/// Metrics that are computed from the engine's when they are read.
struct Derived(Handle);

impl std::fmt::Debug for Derived {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Derived")
    }
}

impl Collector for Derived {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let stats = &self.0.stats;
        let kept = stats.cells_retained.get() as f64 / self.0.limits.n_cells() as f64;
        let shares = [
            (
                "medusa_llama:kv_cache_usage_perc",
                "Share of the KV cache that running requests hold; 1 is all of it",
                self.0.kv_usage(),
            ),
            (
                "medusa_llama:kv_cache_kept_perc",
                "Share that holds finished prompts for reuse, and is free when needed",
                kept,
            ),
        ];
        for (name, help, share) in shares {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(share).encode(metric)?;
        }
        let reliability = stats.reliability();
        let sources = Source::ALL.map(|source| (source, reliability.ranges(&[source], None)));
        let counters = [
            (
                "medusa_llama:spec_decode_source_draft_tokens",
                "Candidates verified and either accepted or rejected, by what offered them",
                (|range| range.n) as fn(&Count) -> u64,
            ),
            (
                "medusa_llama:spec_decode_source_accepted_tokens",
                "Those of them that were accepted",
                |range| range.accepted,
            ),
        ];
        for (name, help, count) in counters {
            let sum = |ranges: &[Count]| ConstCounter::new(ranges.iter().map(count).sum::<u64>());
            by_source(&mut encoder, name, help, &sources, sum)?;
        }
        by_source(
            &mut encoder,
            "medusa_llama:draft_calibration_error",
            "Mean gap between predicted and observed acceptance rate, by what offered the candidates",
            &sources,
            |ranges| ConstGauge::new(calibration_error(ranges)),
        )
    }
}

/// Writes a metric of each source of drafts.
fn by_source<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    sources: &[(Source, [Count; N_RANGES])],
    metric: impl Fn(&[Count]) -> M,
) -> Result<(), Error> {
    let kind = metric(&[]).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    sources.iter().try_for_each(|(source, ranges)| {
        metric(ranges).encode(family.encode_family(&[("source", source.name())])?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_the_model_loads_there_is_http_and_the_build() {
        let metrics = Metrics::new(Some("m"));
        metrics.count_answer("/health", 503);
        metrics.count_refusal("loading");
        let text = metrics.text(Format::OpenMetrics, &[]);
        let classic = metrics.text(Format::Classic, &[]);
        for (line, text) in [
            (
                r#"medusa_llama:http_requests_total{model_name="m",path="/health",status="503"} 1"#,
                &text,
            ),
            (r#"medusa_llama:request_refusals_total{model_name="m",reason="loading"} 1"#, &text),
            ("# EOF", &text),
            ("# TYPE medusa_llama:http_requests_total counter", &classic),
            ("# TYPE medusa_llama:build_info gauge", &classic),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in:\n{text}");
        }
        assert!(text.contains("medusa_llama:build_info{") && !text.contains("steps"));
        assert!(!classic.contains("# EOF"));
    }

    #[test]
    fn lines_of_a_metric_are_together() {
        let of = |model: &str| {
            let mut registry = labelled(Some(model));
            registry.register("a", "first", Counter::<u64>::default());
            registry.register("b", "second", ConstGauge::new(1));
            let mut text = String::new();
            prometheus_text::encode(&mut text, &registry).unwrap();
            text
        };
        let text = joined(&[of("x"), of("y")]);
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        let expected = [
            "# TYPE a_total counter",
            "a_total{model_name=\"x\"} 0",
            "a_total{model_name=\"y\"} 0",
            "# TYPE b gauge",
            "b{model_name=\"x\"} 1",
            "b{model_name=\"y\"} 1",
        ];
        assert_eq!(lines, expected);
    }
}
