//! The body of a request, received whole before its handler is called.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_ENCODING, HeaderMap};
use tokio::time::timeout;

use super::app::HttpLimits;
use super::problem::Problem;

/// Bytes of a refused body that are read, and the longest wait for some of them. A connection that is
/// closed on what its client still sends loses the answer, too, most of all through a proxy; one whose
/// body was read can be used again.
const MAX_DRAINED: usize = 64 << 20;
const PAUSE: Duration = Duration::from_secs(1);

/// Receives a body.
///
/// # Errors
/// [`Problem`] for a body that is too large, comes too slowly, breaks off, or is compressed.
pub async fn receive(
    headers: &HeaderMap,
    body: &mut Incoming,
    limits: &HttpLimits,
) -> Result<Bytes, Problem> {
    if is_compressed(headers) {
        return Err(Problem::CompressedBody);
    }
    let limit = limits.max_body_bytes;
    // What is announced need not be sent.
    if body.size_hint().exact().is_some_and(|n| n > limit as u64) {
        return Err(Problem::BodyTooLarge(limit));
    }
    match timeout(limits.read_timeout, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(Problem::BodyTooLarge(limit)),
        Ok(Err(e)) => Err(Problem::BrokenBody(e)),
        Err(_) => Err(Problem::BodyTimeout),
    }
}

/// Reads what is left of a body that nobody wants. Returns `false` if that is too much or comes too
/// slowly, so that the connection cannot be used again.
pub async fn drain(body: &mut Incoming, limits: &HttpLimits) -> bool {
    if body.size_hint().lower() > MAX_DRAINED as u64 {
        return false;
    }
    let read = async {
        let mut n_read = 0;
        while let Some(frame) = timeout(PAUSE, body.frame()).await.ok()? {
            n_read += frame.ok()?.data_ref().map_or(0, Bytes::len);
            (n_read <= MAX_DRAINED).then_some(())?;
        }
        Some(())
    };
    matches!(timeout(limits.read_timeout, read).await, Ok(Some(())))
}

/// Whether a body is encoded in any way; `identity` is none.
fn is_compressed(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_ENCODING).iter();
    values.any(|value| {
        let mut codings = value.as_bytes().split(|&b| b == b',').map(<[u8]>::trim_ascii);
        codings.any(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity"))
    })
}
