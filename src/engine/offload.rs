//! How many layers of a model go to GPUs: as many as were asked for, or as many as fit.

use std::path::Path;

use crate::llama::{GpuLayers, LlamaError, Model, Placement, supports_gpu_offload};

/// A placement whose number of layers is known: of [`GpuLayers::Auto`] it is the most for which `fits`
/// holds, which gets an [outline](Model::outline) with that many layers on GPUs. Logs how many more than
/// asked for would fit. Without a GPU none are there, and with workers the shares decide: nothing is
/// tried.
///
/// # Errors
/// As [`Model::outline`], and those of `fits`.
pub(crate) fn settle<E: From<LlamaError>>(
    path: &Path,
    placement: &Placement,
    fits: impl Fn(Model) -> Result<bool, E>,
) -> Result<Placement, E> {
    let with = |n| Placement { n_gpu_layers: GpuLayers::Most(n), ..placement.clone() };
    if !placement.workers.is_empty() {
        return Ok(placement.clone());
    }
    if !supports_gpu_offload() {
        return Ok(with(0));
    }
    let all = Model::outline(path, &with(u32::MAX))?;
    let n_all = u32::try_from(all.n_offloadable()).unwrap_or(u32::MAX);
    let from = match placement.n_gpu_layers {
        GpuLayers::Auto => 0,
        GpuLayers::Most(n) if n >= n_all => return Ok(with(n)),
        GpuLayers::Most(n) => n,
    };
    drop(all);
    let n_most = most(from, n_all, |n| fits(Model::outline(path, &with(n))?))?;
    if placement.n_gpu_layers == GpuLayers::Auto {
        tracing::info!("{n_most} of {n_all} layers go to GPUs, as many as fit");
        return Ok(with(n_most));
    }
    if n_most > from {
        tracing::info!(
            "{} of {n_all} layers stay behind on the CPU that would fit GPUs: --n-gpu-layers auto takes them",
            n_most - from
        );
    }
    Ok(with(from))
}

/// The most from `least` to `all` for which `fits` holds, if it holds up to some number and not beyond;
/// `least` if it does for none. All are tried first, then halves.
fn most<E>(least: u32, all: u32, mut fits: impl FnMut(u32) -> Result<bool, E>) -> Result<u32, E> {
    if least >= all || fits(all)? {
        return Ok(all);
    }
    let (mut good, mut bad) = (least, all);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        *(if fits(middle)? { &mut good } else { &mut bad }) = middle;
    }
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_that_fits_is_found_in_few_attempts() {
        for all in [0, 1, 2, 33, 512] {
            for least in [0, 1, 25, 600] {
                for limit in 0..=all {
                    let mut n_tries = 0;
                    let found = most(least, all, |n| {
                        n_tries += 1;
                        Ok::<_, ()>(n <= limit)
                    });
                    let expected = if least >= all { all } else { limit.max(least) };
                    assert_eq!(found, Ok(expected), "{least} to {all}, limit {limit}");
                    assert!(n_tries <= 10, "{n_tries}");
                }
            }
        }
        assert_eq!(most(0, 9, |n| if n < 9 { Err(n) } else { Ok(false) }), Err(4));
    }
}
