//! `Accept`: which type of content a client prefers.

use hyper::header::{ACCEPT, HeaderMap};

/// A type's weight, from 0 to 1, and its specificity, which breaks ties: those of the most specific
/// range that it is in (RFC 9110, 12.5.1).
pub fn quality(headers: &HeaderMap, kind: &str, subtype: &str) -> (f32, u8) {
    let ranges = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let matching = ranges.flat_map(|value| value.split(',')).filter_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let (k, s) = parts.next()?.split_once('/')?;
        let specificity = match (k, s) {
            ("*", "*") => 0,
            (k, "*") if k.eq_ignore_ascii_case(kind) => 1,
            (k, s) if k.eq_ignore_ascii_case(kind) && s.eq_ignore_ascii_case(subtype) => 2,
            _ => return None,
        };
        let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
        // An invalid weight asks for nothing.
        let valid = |q: &str| q.parse().ok().filter(|q: &f32| (0.0..=1.0).contains(q));
        Some((weight.map_or(1.0, |q| valid(q).unwrap_or(0.0)), specificity))
    });
    matching
        .max_by(|a, b| a.1.cmp(&b.1).then(a.0.total_cmp(&b.0)))
        .filter(|&(weight, _)| weight > 0.0)
        .unwrap_or_default()
}
