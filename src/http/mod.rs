//! The network side: bytes on a socket to a checked [`Request`](crate::request::Request), events
//! back to bytes.
//!
//! [`routes`] knows what each path does, [`generate`] and [`openai`] the JSON of either dialect,
//! [`fields`] how a body's fields are read, [`reply`]
//! how an answer is written, [`tokens`] what is told of its tokens, [`access`] what is logged of
//! it, [`auth`] who may ask, [`cors`] which pages, [`tls`] in what secrecy; [`page`] is what
//! browsers get, [`openapi`] and [`docs`] document it all. None of them sees a KV cell, a batch or
//! llama.cpp; they know the engine's [`Handle`](crate::engine::Handle) only, and the model's
//! template.

pub mod access;
pub mod auth;
pub mod cors;
pub mod docs;
pub mod fields;
pub mod generate;
pub mod openai;
pub mod openapi;
pub mod page;
pub mod reply;
pub mod routes;
pub mod tls;
pub mod tokens;

use std::convert::Infallible;
use std::error::Error;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;

use crate::config::HttpLimits;
use crate::engine::Stage;
use crate::metrics::Metrics;
use crate::telemetry::Telemetry;
use auth::Auth;
use cors::Cors;
use tls::Tls;

/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// What every connection shares.
pub struct App {
    /// How far the engine is.
    pub stage: watch::Receiver<Stage>,
    /// Set once: new work is refused from then on.
    pub draining: AtomicBool,
    /// What a client may take.
    pub limits: HttpLimits,
    /// Who may ask.
    pub auth: Auth,
    /// Which pages may read answers.
    pub cors: Cors,
    /// Where connections are to be encrypted.
    pub tls: Option<Tls>,
    /// What Prometheus is told.
    pub metrics: Metrics,
    /// Where requests are traced.
    pub telemetry: Option<Telemetry>,
    /// How OpenAI's clients name the model.
    pub model_id: String,
    /// `/openapi.json`.
    pub openapi: Bytes,
    /// The model's chat template, read at the first chat; or why there is none.
    pub template: OnceLock<Result<crate::chat::Template, String>>,
}

/// Accepts connections until `end` completes, then lets open ones finish their current answer for
/// up to `grace`.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    end: impl Future<Output = ()>,
    grace: Duration,
) {
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
                    let (app, watcher) = (Arc::clone(&app), graceful.watcher());
                    tokio::spawn(async move {
                        // A client that hangs up or talks no HTTP is its own affair.
                        if let Err(error) = converse(stream, &app, watcher).await { tracing::debug!(%error, "connection ended") }
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

/// One connection, from its handshake to its end.
async fn converse(
    stream: TcpStream,
    app: &Arc<App>,
    watcher: Watcher,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    // Pieces are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    // A reader that stalls ends its connection, and that drops its answer, which cancels the
    // request.
    let mut stream = Box::pin(TimeoutStream::new(stream));
    stream.as_mut().set_write_timeout_pinned(Some(app.limits.write_timeout));
    match &app.tls {
        None => watcher.watch(connection(stream, app)).await?,
        Some(tls) => {
            let stream = tls.accept(stream, app.limits.read_timeout).await?;
            watcher.watch(connection(stream, app)).await?;
        }
    }
    Ok(())
}

fn connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    app: &Arc<App>,
) -> impl GracefulConnection<Error = hyper::Error> + Send + use<S> {
    let app = Arc::clone(app);
    let limits = app.limits;
    let service = service_fn(move |request| {
        let answer = access::answer(Arc::clone(&app), request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.read_timeout) // from the end of the answer before: it bounds idle connections, too
        .max_header_size(limits.max_header_bytes)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service)
}
