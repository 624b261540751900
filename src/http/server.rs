//! Accepts connections, and serves HTTP on each.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use super::access::log_access;
use super::app::App;

const MAX_HEADERS: usize = 100;

/// Accepts connections until `end` completes, then lets open ones finish their current answer for
/// up to the time that it says.
pub async fn serve(listener: TcpListener, app: Arc<App>, end: impl Future<Output = Duration>) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(app.limits.max_connections));
    tokio::pin!(end);
    let grace = loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await.expect("never closed");
            (listener.accept().await, place)
        };
        tokio::select! {
            grace = &mut end => break grace,
            (accepted, place) = accepted => match accepted {
                Ok((stream, _)) => {
                    let (app, watcher) = (Arc::clone(&app), graceful.watcher());
                    tokio::spawn(async move {
                        // The client disconnected or did not speak HTTP.
                        if let Err(error) = handle_connection(stream, &app, watcher).await {
                            tracing::debug!(%error, "connection ended");
                        }
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
    };
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("closing connections that did not finish in time");
    }
}

async fn handle_connection(
    stream: TcpStream,
    app: &Arc<App>,
    watcher: Watcher,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    // Pieces are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    // A stalled reader ends its connection; that drops its answer, which cancels the request.
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
        let answer = log_access(Arc::clone(&app), request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.read_timeout) // from the end of the last answer: it bounds idle connections, too
        .max_header_size(limits.max_header_bytes)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service)
}
