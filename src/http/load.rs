//! How busy the server is, for balancers: `GET /v1/loads` as SGLang has it, and the report that comes
//! with any answer whose request asks for one (ORCA, open request cost aggregation).

use std::time::Instant;

use bytes::Bytes;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, StatusCode};
use jiff::Timestamp;
use serde_json::json;

use super::api::information::{Loads, ModelLoad};
use super::app::RequestContext;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::engine::Handle;
use crate::models::Models;

/// Asks for a report, and in which [`Format`].
const FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
/// The report.
pub const REPORT: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// How busy each model is
///
/// With SGLang's fields. A model that is not loaded has no entry.
#[utoipa::path(get, path = "/v1/loads", tag = "server", responses((status = 200, description = "An entry for each loaded model", body = Loads)))]
pub async fn loads(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    let loaded = cx.app.models.loaded();
    if cx.app.models.only().is_some() && loaded.is_empty() {
        return Err(Problem::Loading);
    }
    let entries = loaded.iter().enumerate();
    let loads: Vec<ModelLoad<'_>> = entries
        .map(|(i, model)| ModelLoad {
            dp_rank: i,
            model_name: &model.id,
            ..ModelLoad::of(&model.handle)
        })
        .collect();
    let body = Loads { timestamp: Timestamp::now().to_string(), dp_rank_count: loads.len(), loads };
    Ok(reply::json(StatusCode::OK, &body))
}

impl ModelLoad<'_> {
    /// All but which model it is.
    fn of(handle: &Handle) -> Self {
        let (stats, limits) = (&handle.stats, handle.limits);
        let in_flight = handle.n_in_flight();
        // The engine counts once a step; what came since then waits.
        let running = usize::try_from(stats.running.get()).unwrap_or_default().min(in_flight);
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        Self {
            num_running_reqs: running,
            num_waiting_reqs: in_flight - running,
            num_total_reqs: in_flight,
            num_used_tokens: usize::try_from(stats.cells_active.get()).unwrap_or_default(),
            max_total_num_tokens: limits.n_cells(),
            token_usage: handle.kv_usage(),
            utilization: (in_flight as f64 / limits.n_slots as f64).max(handle.kv_usage()),
            cache_hit_rate: share(stats.prefix_hits.get(), stats.prefix_queries.get()),
            max_running_requests: limits.n_slots,
            ..Self::default()
        }
    }
}

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

/// The format in which a request asks for a report. One that nobody knows asks for none, as with
/// vLLM.
pub fn asked(headers: &HeaderMap) -> Option<Format> {
    let format = headers.get(FORMAT)?.as_bytes();
    match format {
        _ if format.eq_ignore_ascii_case(b"text") => Some(Format::Text),
        _ if format.eq_ignore_ascii_case(b"json") => Some(Format::Json),
        _ => None,
    }
}

/// The report; none while no model is loaded.
pub fn report(models: &Models, format: Format) -> Option<HeaderValue> {
    let (loaded, now) = (models.loaded(), Instant::now());
    let report = loaded.iter().map(|model| Report::of(&model.handle, now)).reduce(Report::and)?;
    HeaderValue::from_str(&report.text(format)).ok()
}

/// What a report says.
#[derive(Clone, Copy, Debug)]
struct Report {
    utilization: f64,
    rps: f64,
    kv_usage: f64,
    n_waiting: usize,
}

impl Report {
    fn of(handle: &Handle, now: Instant) -> Self {
        let load = ModelLoad::of(handle);
        Self {
            // Balancers ignore a utilization of 0. The request that is answered had a slot.
            utilization: load.utilization.max(1.0 / handle.limits.n_slots as f64),
            rps: handle.arrivals.per_second(now),
            kv_usage: load.token_usage,
            n_waiting: load.num_waiting_reqs,
        }
    }

    /// Of two models: the busier one limits what the server can take.
    fn and(self, other: Self) -> Self {
        Self {
            utilization: self.utilization.max(other.utilization),
            rps: self.rps + other.rps,
            kv_usage: self.kv_usage.max(other.kv_usage),
            n_waiting: self.n_waiting + other.n_waiting,
        }
    }

    fn text(self, format: Format) -> String {
        let Self { utilization, rps, kv_usage, n_waiting } = self;
        match format {
            Format::Text => format!(
                "TEXT application_utilization={utilization},rps_fractional={rps},named_metrics.kv_cache_usage_perc={kv_usage},named_metrics.num_requests_waiting={n_waiting}"
            ),
            Format::Json => {
                let named =
                    json!({ "kv_cache_usage_perc": kv_usage, "num_requests_waiting": n_waiting });
                let report = json!({ "application_utilization": utilization, "rps_fractional": rps, "named_metrics": named });
                format!("JSON {report}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_comes_in_the_format_that_is_asked_for() {
        let asked = |format: &'static str| {
            asked(&HeaderMap::from_iter([(FORMAT, HeaderValue::from_static(format))]))
        };
        assert_eq!((asked("TEXT"), asked("json")), (Some(Format::Text), Some(Format::Json)));
        assert_eq!((asked("BIN"), asked("")), (None, None));
        assert_eq!(super::asked(&HeaderMap::new()), None);
    }

    #[test]
    fn of_several_models_the_busiest_counts() {
        let report = |utilization, rps, kv_usage, n_waiting| Report {
            utilization,
            rps,
            kv_usage,
            n_waiting,
        };
        let both = report(0.5, 0.25, 0.125, 1).and(report(0.25, 1.0, 0.5, 2));
        assert_eq!(
            both.text(Format::Text),
            "TEXT application_utilization=0.5,rps_fractional=1.25,named_metrics.kv_cache_usage_perc=0.5,named_metrics.num_requests_waiting=3"
        );
        assert_eq!(
            both.text(Format::Json),
            r#"JSON {"application_utilization":0.5,"rps_fractional":1.25,"named_metrics":{"kv_cache_usage_perc":0.5,"num_requests_waiting":3}}"#
        );
    }
}
