//! What is served: `GET /` and `GET /v1/models`.

use hyper::StatusCode;
use hyper::header::{ACCEPT, HeaderValue, VARY};
use serde_json::json;

use super::App;
use super::openai;
use super::reply::{self, Problem, Reply};
use super::routes::{PATHS, engine};
use crate::engine::{Layout, Stage};
use crate::llama;

/// `GET /`.
pub fn information(app: &App) -> Result<Reply, Problem> {
    let mut body = json!({
        "name": "medusa-llama",
        "version": env!("CARGO_PKG_VERSION"),
        "llama_cpp": llama::version(),
        "backend": if llama::supports_gpu_offload() { "cuda" } else { "cpu" },
        "endpoints": PATHS.map(|(path, allow)| format!("{} {path}", allow.split(',').next().unwrap_or(allow))),
    });
    let stage = app.stage.borrow().clone();
    if let Stage::Loading(progress) = stage {
        body["loading"] = progress.into();
    }
    if let Stage::Ready(handle) = stage {
        let (model, limits, load) = (handle.model(), handle.limits(), handle.stats());
        body["model"] = json!({
            "name": model.name(),
            "quantization": model.quantization(),
            "parameters": model.n_params(),
            "size_bytes": model.size_bytes(),
            "n_ctx_train": model.n_ctx_train(),
            "n_vocab": model.n_vocab(),
        });
        body["context_size"] = limits.n_ctx.into();
        body["slots"] = limits.n_slots.into();
        body["kv"] = match limits.layout {
            Layout::Unified { n_cells, .. } => json!({ "layout": "unified", "cells": n_cells }),
            Layout::Streams { n_cells } => {
                json!({ "layout": "streams", "cells": n_cells * limits.n_slots })
            }
        };
        body["heads"] = handle.n_heads().into();
        body["text_drafts"] = handle.drafts_from_text().into();
        body["drafting_on"] = handle.side().name().into();
        body["load"] = json!({
            "in_flight": handle.n_in_flight(),
            "running": load.running,
            "waiting": load.waiting,
            "kv_cells_running": load.cells_active,
            "kv_cells_kept": load.cells_retained,
            "steps": load.steps,
            "tokens_generated": load.tokens,
        });
    }
    let mut reply = reply::json(StatusCode::OK, &body);
    reply.headers_mut().insert(VARY, HeaderValue::from_name(ACCEPT)); // browsers get the page
    Ok(reply)
}

/// `GET /v1/models`.
pub fn models(app: &App) -> Result<Reply, Problem> {
    let handle = engine(app)?;
    Ok(reply::json(StatusCode::OK, &openai::models(&app.model_id, handle.limits().n_ctx)))
}
