//! What is served: `GET /`, `GET /v1/models` and `GET /props`.

use bytes::Bytes;
use hyper::header::{ACCEPT, HeaderValue, VARY};
use hyper::{Request, StatusCode};

use super::api::answers::ErrorBody;
use super::api::information::{
    BUILD, EngineLoad, GenerationSettings, Information, KvInformation, Modalities, ModelEntry,
    ModelInformation, ModelList, ModelQuery, Props,
};
use super::app::{App, RequestContext};
use super::page;
use super::problem::Problem;
use super::reply::{self, Reply};
use crate::engine::{Handle, Layout};
use crate::llama;
use crate::models::{Entry, Phase};
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
        backend: llama::device_kinds(),
        cpu: llama::cpu_features(),
        endpoints: cx.app.endpoints.clone(),
        ..Information::default()
    };
    match cx.app.models.only().map(|only| only.phase().borrow().clone()) {
        Some(Phase::Loading(progress)) => body.loading = Some(progress),
        Some(Phase::Ready(model)) => describe(&model.handle, &mut body),
        Some(_) => {}
        None => body.models = Some(entries(&cx.app)?),
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
    body.draft_model = handle.draft_model.clone();
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

/// The served models
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, description = "A list of one, or of several", body = ModelList)))]
pub async fn models(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    Ok(reply::json(StatusCode::OK, &ModelList { object: "list", data: entries(&cx.app)? }))
}

/// A served model, by its id
#[utoipa::path(get, path = "/v1/models/{id}", tag = "openai", params(("id" = String, Path)), responses(
    (status = 200, description = "The model", body = ModelEntry),
    (status = 404, description = "The server does not serve this model", body = ErrorBody),
))]
pub async fn model(cx: RequestContext, _: Request<Bytes>) -> Result<Reply, Problem> {
    match entries(&cx.app)?.into_iter().find(|entry| entry.id == cx.tail) {
        Some(entry) => Ok(reply::json(StatusCode::OK, &entry)),
        None => Err(Problem::ModelNotFound(cx.tail)),
    }
}

/// What is served, as llama-server has it
#[utoipa::path(get, path = "/props", tag = "server", params(ModelQuery), responses((status = 200, description = "Settings, files and the chat template", body = Props)))]
pub async fn props(mut cx: RequestContext, request: Request<Bytes>) -> Result<Reply, Problem> {
    let loaded = cx.model(&request).await?;
    let (model, limits) = (loaded.model(), loaded.handle.limits);
    let params = SamplingParams::default().into();
    let props = Props {
        default_generation_settings: GenerationSettings { n_ctx: limits.n_ctx, params },
        total_slots: limits.n_slots,
        model_alias: &loaded.id,
        model_path: model.path().display().to_string(),
        chat_template: loaded.template_source(),
        bos_token: model.bos_text(),
        eos_token: model.eos_text(),
        modalities: Modalities::default(),
        build_info: BUILD,
    };
    Ok(reply::json(StatusCode::OK, &props))
}

/// All models; a single one is there once it is loaded.
fn entries(app: &App) -> Result<Vec<ModelEntry>, Problem> {
    let are_several = app.models.only().is_none();
    if !are_several && app.models.loaded().is_empty() {
        return Err(Problem::Loading);
    }
    let entry = |model: &Entry| {
        let phase = model.phase().borrow().clone();
        ModelEntry {
            id: model.id().to_owned(),
            object: "model",
            created: 0,
            owned_by: env!("CARGO_PKG_NAME"),
            max_model_len: model.loaded().map(|loaded| loaded.n_ctx()),
            status: are_several.then(|| (&phase).into()),
        }
    };
    Ok(app.models.entries().iter().map(entry).collect())
}
