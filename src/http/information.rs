//! What is served: `GET /` and `GET /v1/models`.

use hyper::StatusCode;
use hyper::header::{ACCEPT, HeaderValue, VARY};

use super::App;
use super::api::answers::{Information, KvInformation, Load, ModelInformation, Models};
use super::reply::{self, Problem, Reply};
use super::routes::{PATHS, engine};
use crate::engine::{Handle, Layout, Stage};
use crate::llama;

/// `GET /`.
pub fn information(app: &App) -> Result<Reply, Problem> {
    let endpoint = |(path, allow): (&str, &str)| {
        format!("{} {path}", allow.split(',').next().unwrap_or(allow))
    };
    let mut body = Information {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        llama_cpp: llama::version(),
        backend: if llama::supports_gpu_offload() { "cuda" } else { "cpu" },
        endpoints: PATHS.map(endpoint).into(),
        ..Information::default()
    };
    match &*app.stage.borrow() {
        Stage::Loading(progress) => body.loading = Some(*progress),
        Stage::Ready(handle) => describe(handle, &mut body),
        Stage::Failed(_) => {}
    }
    let mut reply = reply::json(StatusCode::OK, &body);
    reply.headers_mut().insert(VARY, HeaderValue::from_name(ACCEPT)); // browsers get the page
    Ok(reply)
}

/// Adds what is known once the model is read.
fn describe(handle: &Handle, body: &mut Information) {
    let (model, limits, load) = (handle.model(), handle.limits(), handle.stats());
    let (layout, cells) = match limits.layout {
        Layout::Unified { n_cells, .. } => ("unified", n_cells),
        Layout::Streams { n_cells } => ("streams", n_cells * limits.n_slots),
    };
    body.model = Some(ModelInformation {
        name: model.name(),
        quantization: model.quantization(),
        parameters: model.n_params(),
        size_bytes: model.size_bytes(),
        n_ctx_train: model.n_ctx_train(),
        n_vocab: model.n_vocab(),
    });
    body.context_size = Some(limits.n_ctx);
    body.slots = Some(limits.n_slots);
    body.kv = Some(KvInformation { layout, cells });
    body.heads = Some(handle.n_heads());
    body.text_drafts = Some(handle.drafts_from_text());
    body.drafting_on = Some(handle.side().name());
    body.load = Some(Load {
        in_flight: handle.n_in_flight(),
        running: load.running,
        waiting: load.waiting,
        kv_cells_running: load.cells_active,
        kv_cells_kept: load.cells_retained,
        steps: load.steps,
        tokens_generated: load.tokens,
    });
}

/// `GET /v1/models`.
pub fn models(app: &App) -> Result<Reply, Problem> {
    let n_ctx = engine(app)?.limits().n_ctx;
    Ok(reply::json(StatusCode::OK, &Models::new(&app.model_id, n_ctx)))
}
