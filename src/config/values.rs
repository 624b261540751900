//! Values of arguments. An error says what a value must be.

use std::time::Duration;

use tracing::Level;

use crate::llama::{CacheTypes, GpuLayers, TensorType};

/// A whole number in a range; the error names both ends.
pub(super) fn between(
    min: usize,
    max: usize,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("must be a whole number from {min} to {max}")),
    }
}

/// Seconds, with fractions, from `min` to a day.
pub(super) fn seconds(
    min: f64,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(s) if (min..=86_400.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err(format!("must be a number of seconds from {min} to 86400")),
    }
}

pub(super) fn cache_type(name: &str) -> Result<TensorType, String> {
    let names = || CacheTypes::ALL.map(TensorType::name).join(", ");
    CacheTypes::by_name(name).ok_or_else(|| format!("must be one of {}", names()))
}

/// A log level by its name; Python's `WARNING` is accepted too.
pub(super) fn level(name: &str) -> Result<Level, String> {
    let name = if name.eq_ignore_ascii_case("warning") { "warn" } else { name };
    name.parse().map_err(|_| "must be ERROR, WARN, INFO, DEBUG or TRACE".into())
}

/// A number in a range.
pub(super) fn number(
    min: f32,
    max: f32,
) -> impl Fn(&str) -> Result<f32, String> + Clone + Send + Sync {
    move |text| match text.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("must be a number from {min} to {max}")),
    }
}

/// A number of layers on GPUs.
pub(super) fn layers(text: &str) -> Result<GpuLayers, String> {
    match text {
        "auto" => Ok(GpuLayers::Auto),
        "all" => Ok(GpuLayers::ALL),
        n => n
            .parse()
            .map(GpuLayers::Most)
            .map_err(|_| format!("must be a whole number from 0 to {}, all or auto", u32::MAX)),
    }
}
