//! The network side: bytes on a socket to a checked [`Request`](crate::request::Request), events back to bytes.
//!
//! [`routes`] knows what each path does, [`generate`] and [`openai`] the JSON of either dialect, [`fields`] how a body's fields are
//! read, [`page`] what browsers get, [`template`] how messages become a prompt, [`reply`] how an answer is written, [`tokens`] what is told of its tokens. None of them sees a KV cell, a batch or
//! llama.cpp; they know the engine's [`Handle`](crate::engine::Handle) only, and the model's template.

pub mod fields;
pub mod generate;
pub mod openai;
pub mod page;
pub mod reply;
pub mod routes;
pub mod template;
pub mod tokens;

use std::convert::Infallible;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::config::HttpLimits;
use crate::engine::Stage;

/// What every connection shares.
pub struct App {
    /// How far the engine is.
    pub stage: watch::Receiver<Stage>,
    /// Set once: new work is refused from then on.
    pub draining: AtomicBool,
    /// What a client may take.
    pub limits: HttpLimits,
    /// How OpenAI's clients name the model.
    pub model_id: String,
    /// The model's chat template, read at the first chat; or why there is none.
    pub template: OnceLock<Result<template::ChatTemplate, String>>,
}

/// Accepts connections until `end` completes, then lets open ones finish their current answer for up to `grace`.
pub async fn serve(listener: TcpListener, app: Arc<App>, end: impl Future<Output = ()>, grace: Duration) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(app.limits.max_connections));
    tokio::pin!(end);
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await.expect("never closed");
            (listener.accept().await, place)
        };
        tokio::select! {
            () = &mut end => break,
            (accepted, place) = accepted => match accepted {
                Ok((stream, _)) => {
                    let connection = graceful.watch(connection(stream, &app));
                    tokio::spawn(async move {
                        // A client that hangs up or talks no HTTP is its own affair.
                        if let Err(error) = connection.await { tracing::debug!(%error, "connection ended") }
                        drop(place);
                    });
                }
                // Out of file descriptors, for example: it passes when connections close.
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("closing connections that did not finish in time");
    }
}

fn connection(stream: TcpStream, app: &Arc<App>) -> impl GracefulConnection<Error = hyper::Error> + Send + 'static {
    // Pieces are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let app = Arc::clone(app);
    let timeout = app.limits.read_timeout;
    let service = service_fn(move |request| {
        let app = Arc::clone(&app);
        async move { Ok::<_, Infallible>(routes::answer(&app, request).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .serve_connection(TokioIo::new(stream), service)
}
