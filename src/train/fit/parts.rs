//! Work on rows in parts, each in a thread.

/// Calls `each` with parts of some rows and the index of each part's first, all at once; returns the
/// results in order.
pub fn in_parts<T: Send>(
    rows: &[u32],
    n_parts: usize,
    each: impl Fn(usize, &[u32]) -> candle_core::Result<T> + Sync,
) -> candle_core::Result<Vec<T>> {
    let (n, n_parts) = (rows.len(), n_parts.max(1));
    std::thread::scope(|scope| {
        let each = &each;
        let part = |i: usize| {
            let range = i * n / n_parts..(i + 1) * n / n_parts;
            scope.spawn(move || each(range.start, &rows[range]))
        };
        let workers: Vec<_> = (0..n_parts).map(part).collect();
        workers.into_iter().map(|w| w.join().expect("a worker does not panic")).collect()
    })
}
