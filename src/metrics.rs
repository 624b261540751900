//! What `/metrics` shows to Prometheus: the engine's [`Stats`](crate::engine::stats::Stats) under
//! names, and what HTTP answered.
//!
//! Names are vLLM's, with `medusa_llama:` in front in place of `vllm:`, where vLLM has the same
//! thing, so that dashboards need only another prefix; every series has vLLM's label `model_name`.
//! The engine's part is read when it is asked for: while the model loads there is none. Knows no
//! sockets and no cells.

use std::borrow::Cow;
use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::engine::stats::{Ended, Histogram, Snapshot};
use crate::engine::{Handle, Stage};
use crate::llama;
use crate::request::Source;
use crate::speculate::reliability::{Reliability, calibration_error};

/// The format of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Labels by name.
type Labels<const N: usize> = [(&'static str, String); N];

/// All metrics of a server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    answers: Family<Labels<2>, Counter>,
    refusals: Family<Labels<1>, Counter>,
}

impl Metrics {
    /// Of a server that calls its model `model_name`, with an engine that is as far as `stage`
    /// says.
    #[must_use]
    pub fn new(model_name: &str, stage: watch::Receiver<Stage>) -> Self {
        let label = (Cow::from("model_name"), Cow::from(model_name.to_owned()));
        let mut registry = Registry::with_labels([label].into_iter());
        let build = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("llama_cpp", llama::version()),
            ("backend", if llama::supports_gpu_offload() { "cuda" } else { "cpu" }.to_owned()),
        ];
        registry.register("medusa_llama:build", "What is running", Info::new(build));
        let (answers, refusals) = (Family::default(), Family::default());
        registry.register(
            "medusa_llama:http_requests",
            "HTTP requests by path and status",
            answers.clone(),
        );
        registry.register(
            "medusa_llama:request_refusals",
            "Requests that got an error in place of an answer, by its type",
            refusals.clone(),
        );
        registry.register_collector(Box::new(EngineMetrics(stage)));
        Self { registry, answers, refusals }
    }

    /// Counts an answer to a request for `path`, which is one of few.
    pub fn count_answer(&self, path: &'static str, status: u16) {
        self.answers
            .get_or_create(&[("path", path.to_owned()), ("status", status.to_string())])
            .inc();
    }

    /// Counts an error of type `kind`, which is one of few.
    pub fn count_refusal(&self, kind: &'static str) {
        self.refusals.get_or_create(&[("reason", kind.to_owned())]).inc();
    }

    /// All of them as they are now.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("a String takes everything");
        out
    }
}

/// What the engine counts, once there is one.
struct EngineMetrics(watch::Receiver<Stage>);

impl std::fmt::Debug for EngineMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineMetrics")
    }
}

impl Collector for EngineMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let Stage::Ready(handle) = self.0.borrow().clone() else { return Ok(()) };
        let mut out = Out(encoder);
        let stats = handle.stats();
        write_load(&mut out, &handle, &stats)?;
        write_tokens(&mut out, &stats)?;
        write_drafts(&mut out, &stats)?;
        write_reliability(&mut out, &handle.reliability())?;
        write_histograms(&mut out, &handle)
    }
}

fn write_load(out: &mut Out<'_>, handle: &Handle, stats: &Snapshot) -> Result<(), Error> {
    out.gauge(
        "medusa_llama:num_requests_running",
        "Requests that the engine works on",
        stats.running as f64,
    )?;
    out.gauge(
        "medusa_llama:num_requests_waiting",
        "Requests that wait for a place",
        stats.waiting as f64,
    )?;
    let used = stats.cells_active as f64 / handle.limits().n_cells() as f64;
    out.gauge(
        "medusa_llama:kv_cache_usage_perc",
        "Share of the KV cache that running requests hold; 1 is all of it",
        used,
    )?;
    let kept = stats.cells_retained as f64 / handle.limits().n_cells() as f64;
    out.gauge(
        "medusa_llama:kv_cache_kept_perc",
        "Share that holds finished prompts for reuse, and is free when needed",
        kept,
    )?;
    out.counter("medusa_llama:steps", "Steps of the engine, each one forward pass", stats.steps)?;
    let ended = |which: &[(Ended, &'static str)], label| {
        let count = |&(ended, name): &(Ended, &str)| {
            ([(label, name.to_owned())], stats.ended[ended as usize])
        };
        which.iter().map(count).collect::<Vec<_>>()
    };
    let complete = ended(&[(Ended::Stop, "stop"), (Ended::Length, "length")], "finished_reason");
    out.counters("medusa_llama:request_success", "Complete answers, by what ended them", complete)?;
    let others =
        [(Ended::Deadline, "deadline"), (Ended::Cancelled, "cancelled"), (Ended::Failed, "engine")];
    let others = ended(&others, "reason");
    out.counters(
        "medusa_llama:request_failures",
        "Requests without a complete answer, by who ended them",
        others,
    )
}

fn write_tokens(out: &mut Out<'_>, stats: &Snapshot) -> Result<(), Error> {
    out.counter(
        "medusa_llama:prompt_tokens",
        "Tokens of prompts read, cached ones included",
        stats.prompt_tokens,
    )?;
    out.counter("medusa_llama:generation_tokens", "Tokens generated", stats.tokens)?;
    out.counter(
        "medusa_llama:prefix_cache_queries",
        "Tokens of prompts looked for in the cache",
        stats.prefix_queries,
    )?;
    out.counter(
        "medusa_llama:prefix_cache_hits",
        "Tokens of prompts found in the cache",
        stats.prefix_hits,
    )
}

fn write_drafts(out: &mut Out<'_>, stats: &Snapshot) -> Result<(), Error> {
    let accepted = &stats.accepted[..stats.deepest];
    out.counter(
        "medusa_llama:draft_candidates_offered",
        "Candidates that heads and text offered",
        stats.offered,
    )?;
    out.counter(
        "medusa_llama:draft_candidates_chosen",
        "Candidates that were worth a row",
        stats.chosen,
    )?;
    out.counter(
        "medusa_llama:spec_decode_num_drafts",
        "Trees of candidates verified",
        stats.drafts,
    )?;
    out.counter("medusa_llama:spec_decode_num_draft_tokens", "Candidates verified", stats.drafted)?;
    out.counter(
        "medusa_llama:spec_decode_num_accepted_tokens",
        "Candidates accepted",
        stats.accepted.iter().sum(),
    )?;
    out.counters(
        "medusa_llama:spec_decode_num_accepted_tokens_per_pos",
        "Candidates accepted, by place behind the last token, from 0",
        accepted.iter().enumerate().map(|(place, &n)| ([("position", place.to_string())], n)),
    )
}

fn write_reliability(out: &mut Out<'_>, reliability: &Reliability) -> Result<(), Error> {
    let ranges = Source::ALL.map(|source| (source.name(), reliability.ranges(&[source], None)));
    let label = |source: &str| [("source", source.to_owned())];
    out.counters(
        "medusa_llama:spec_decode_source_draft_tokens",
        "Candidates verified whose fate is known, by what offered them",
        ranges.iter().map(|(source, ranges)| (label(source), ranges.iter().map(|c| c.n).sum())),
    )?;
    out.counters(
        "medusa_llama:spec_decode_source_accepted_tokens",
        "Those of them that were accepted",
        ranges
            .iter()
            .map(|(source, ranges)| (label(source), ranges.iter().map(|c| c.accepted).sum())),
    )?;
    out.gauges(
        "medusa_llama:draft_calibration_error",
        "Mean distance between how often candidates were foreseen to be accepted and were, by what offered them",
        ranges.iter().map(|(source, ranges)| (label(source), calibration_error(ranges))),
    )
}

fn write_histograms(out: &mut Out<'_>, handle: &Handle) -> Result<(), Error> {
    let stats = handle.record();
    let all = [
        (
            "medusa_llama:rows_per_step",
            "Rows (tokens) of a step: running requests', prompts' and candidates'",
            &stats.rows,
        ),
        (
            "medusa_llama:time_to_first_token_seconds",
            "From acceptance to the first token",
            &stats.first_token,
        ),
        (
            "medusa_llama:inter_token_latency_seconds",
            "Between two steps that gave a request tokens; with drafts a step can give several",
            &stats.inter_token,
        ),
        (
            "medusa_llama:request_time_per_output_token_seconds",
            "Mean of a complete answer behind its first token",
            &stats.per_token,
        ),
        (
            "medusa_llama:request_queue_time_seconds",
            "From acceptance to the first step, of complete answers",
            &stats.queue,
        ),
        (
            "medusa_llama:request_prefill_time_seconds",
            "From there to the first token, of complete answers",
            &stats.prefill,
        ),
        (
            "medusa_llama:request_decode_time_seconds",
            "From there to the last token, of complete answers",
            &stats.decode,
        ),
        (
            "medusa_llama:e2e_request_latency_seconds",
            "From acceptance to the last token, of complete answers",
            &stats.end_to_end,
        ),
    ];
    all.into_iter().try_for_each(|(name, help, histogram)| out.histogram(name, help, histogram))
}

/// Where values go, by name.
struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) -> Result<(), Error> {
        self.0.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values
            .into_iter()
            .try_for_each(|(labels, value)| metric.encode_family(&labels)?.encode_gauge(&value))
    }

    /// `_total` is added to the name.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        let mut write = |(labels, value): (L, u64)| {
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
        };
        values.into_iter().try_for_each(&mut write)
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> Result<(), Error> {
        let (sum, buckets) = histogram.read();
        let count = buckets.iter().map(|(_, n)| n).sum();
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_the_model_loads_there_is_http_and_the_build() {
        let (_stage, receiver) = watch::channel(Stage::Loading(0.0));
        let metrics = Metrics::new("m", receiver);
        metrics.count_answer("/health", 503);
        metrics.count_refusal("loading");
        let text = metrics.text();
        for line in [
            r#"medusa_llama:http_requests_total{model_name="m",path="/health",status="503"} 1"#,
            r#"medusa_llama:request_refusals_total{model_name="m",reason="loading"} 1"#,
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in:\n{text}");
        }
        assert!(text.contains("medusa_llama:build_info{") && !text.contains("steps"));
    }
}
