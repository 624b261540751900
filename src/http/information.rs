//! What is served: `GET /`, `GET /v1/models` and `GET /props`.

use bytes::Bytes;
use hyper::header::{ACCEPT, HeaderValue, VARY};
use hyper::{Request, StatusCode};

use super::api::answers::{
    BUILD, EngineLoad, ErrorBody, GenerationSettings, Information, KvInformation, Modalities,
    ModelEntry, ModelInformation, Models, Props,
};
use super::app::{App, RequestContext};
use super::page;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::engine::{Handle, Layout, Stage};
use crate::llama;
use crate::request::SamplingParams;

/// What is served
///
/// Version, model, sizes and load; for browsers, which prefer HTML, a page.
#[utoipa::path(get, path = "/", tag = "server", responses(
    (status = 200, description = "What is served", content((Information = "application/json"), (String = "text/html; charset=utf-8"))),
    (status = 304, description = "The page is as the client has it"),
    (status = 401, description = "The server asks for a key, and there is none or a wrong one", body = ErrorBody),
    (status = 403, description = "The key does not allow this", body = ErrorBody),
))]
pub async fn information(cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    if let Some(page) = page::file("/", &request) {
        return Ok(page);
    }
    let mut body = Information {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        llama_cpp: llama::version(),
        backend: if llama::supports_gpu_offload() { "cuda" } else { "cpu" },
        endpoints: cx.app.endpoints.clone(),
        ..Information::default()
    };
    match &*cx.app.stage.borrow() {
        Stage::Loading(progress) => body.loading = Some(*progress),
        Stage::Ready(handle) => describe(handle, &mut body),
        Stage::Failed(_) => {}
    }
    let mut reply = reply::json(StatusCode::OK, &body);
    reply.headers_mut().insert(VARY, HeaderValue::from_name(ACCEPT)); // browsers get the page
    Ok(reply)
}

fn describe(handle: &Handle, body: &mut Information) {
    let (model, limits, load) = (&handle.model, handle.limits, &handle.stats);
    let (layout, cells) = match limits.layout {
        Layout::Unified { n_cells, .. } => ("unified", n_cells),
        Layout::States { n_cells, .. } => ("unified", n_cells),
        Layout::Streams { n_cells } => ("streams", n_cells * limits.n_slots),
    };
    body.model = Some(ModelInformation {
        name: model.name(),
        architecture: model.architecture(),
        quantization: model.quantization(),
        parameters: model.n_params(),
        size_bytes: model.size_bytes(),
        n_ctx_train: model.n_ctx_train(),
        n_vocab: model.n_vocab(),
    });
    body.context_size = Some(limits.n_ctx);
    body.slots = Some(limits.n_slots);
    let states = match limits.layout {
        Layout::States { n_seqs, window: 0, .. } => Some(n_seqs),
        _ => None,
    };
    body.kv = Some(KvInformation { layout, cells, states });
    body.heads = Some(handle.n_heads);
    body.text_drafts = Some(handle.drafts_text);
    body.drafting_on = Some(handle.drafting_on);
    body.drafts = Some(handle.draft_shape.name());
    body.load = Some(EngineLoad {
        in_flight: handle.n_in_flight(),
        running: load.running.get(),
        waiting: load.waiting.get(),
        kv_cells_running: load.cells_active.get(),
        kv_cells_kept: load.cells_retained.get(),
        steps: load.steps.get(),
        tokens_generated: load.tokens.get(),
    });
}

/// The served model
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, description = "A list of one", body = Models)))]
pub async fn models(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    Ok(reply::json(StatusCode::OK, &Models { object: "list", data: vec![entry(&cx.app)?] }))
}

/// The served model, by its id
#[utoipa::path(get, path = "/v1/models/{id}", tag = "openai", params(("id" = String, Path)), responses(
    (status = 200, description = "The model", body = ModelEntry),
    (status = 404, description = "The server does not serve this model", body = ErrorBody),
))]
pub async fn model(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    let model = entry(&cx.app)?;
    if cx.tail != model.id {
        return Err(Problem::ModelNotFound(cx.tail));
    }
    Ok(reply::json(StatusCode::OK, &model))
}

/// What is served, as llama-server has it
#[utoipa::path(get, path = "/props", tag = "server", responses((status = 200, description = "Settings, files and the chat template", body = Props)))]
pub async fn props(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    let handle = cx.app.engine()?;
    let (model, limits) = (&handle.model, handle.limits);
    let params = SamplingParams::default().into();
    let props = Props {
        default_generation_settings: GenerationSettings { n_ctx: limits.n_ctx, params },
        total_slots: limits.n_slots,
        model_alias: &cx.app.model_id,
        model_path: model.path().display().to_string(),
        chat_template: cx.app.template_source(model),
        bos_token: model.bos_text(),
        eos_token: model.eos_text(),
        modalities: Modalities::default(),
        build_info: BUILD,
    };
    Ok(reply::json(StatusCode::OK, &props))
}

fn entry(app: &App) -> Result<ModelEntry<'_>, Problem> {
    Ok(ModelEntry {
        id: &app.model_id,
        object: "model",
        created: 0,
        owned_by: env!("CARGO_PKG_NAME"),
        max_model_len: app.engine()?.limits.n_ctx,
    })
}
