//! How large an engine becomes: what was asked for, what the model is, and what memory there is.
//!
//! llama.cpp counts what a context would take of each device without allocating it. That is a line
//! over the number of cells, so two counts tell how many cells fit.

use std::fmt;
use std::sync::Arc;

use super::Limits;
use super::slots::Layout;
use crate::llama::{
    AdapterFile, Context, ContextParams, DeviceUse, LlamaError, Memory, Model, Rope, max_sequences,
};
use crate::machine::available_memory;

/// Sizes as they were asked for. What is not named follows from the model and the memory.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences that run together.
    pub n_slots: usize,
    /// Tokens of one sequence, prompt and answer; `None`: as the model was trained for, as far as
    /// memory allows.
    pub n_ctx: Option<usize>,
    /// Rows of one step; at least `n_slots`.
    pub n_batch: usize,
    /// Rows of prompts in a step beside streams that run; `None`: as many as pace allows.
    pub n_prefill: Option<usize>,
    /// Cells of a pool; `None`: for `n_ctx` tokens in each slot, as far as memory allows.
    pub n_cells: Option<usize>,
    /// Most cells of a pool that only retained sequences hold; `None`: all.
    pub n_retained: Option<usize>,
    /// One stream of cells for each slot instead of a pool.
    pub streams: bool,
    /// States kept for later prompts, of a model that has a state for each sequence.
    pub n_states_kept: usize,
}

/// The longest context.
pub const LONGEST_CONTEXT: usize = 1 << 20;
/// The shortest one: where less would fit, memory is tried.
const SHORTEST_AUTO: usize = 512;
/// The context that as many layers as fit a GPU leave memory for, or the model's if that is shorter.
const SHORTEST_ON_GPU: usize = 4096;
/// llama.cpp allocates cells in multiples of this.
const CELLS_STEP: usize = 256;
/// Bytes of each device that are left to others where sizes are chosen.
const SPARE: u64 = 1 << 30;

impl Sizes {
    /// `n_slots` sequences of up to `n_ctx` tokens each, in a pool that keeps nothing.
    #[must_use]
    pub fn new(n_slots: usize, n_ctx: usize) -> Self {
        Self {
            n_slots,
            n_ctx: Some(n_ctx),
            n_batch: 512,
            n_prefill: None,
            n_cells: None,
            n_retained: Some(0),
            streams: false,
            n_states_kept: 0,
        }
    }

    /// The limits of an engine for a model with such a memory, with these cells.
    fn limits(&self, memory: Memory, n_ctx: usize, n_cells: usize) -> Limits {
        let &Self { n_slots, n_batch, n_prefill, n_states_kept, .. } = self;
        let n_retained = self.n_retained.unwrap_or(n_cells).min(n_cells);
        let n_seqs = |n_kept: usize| (n_slots + n_kept).min(max_sequences()).max(n_slots);
        let unified = Layout::Unified { n_cells, n_retained, n_seqs: n_seqs(n_slots) };
        let layout = match memory {
            _ if self.streams => Layout::Streams { n_cells: n_cells / n_slots },
            Memory::Cells => unified,
            Memory::State => {
                Layout::States { n_cells, n_retained, n_seqs: n_seqs(n_states_kept), window: 0 }
            }
            Memory::Window(window) => {
                let n_seqs = n_seqs(n_states_kept.min(n_slots));
                let states = Layout::States { n_cells, n_retained, n_seqs, window };
                // Prompts part anywhere in a cache that keeps all tokens, so windows must be worth it.
                let limits = Limits { n_slots, n_ctx, n_batch, n_prefill, layout: states };
                let is_worth = limits.n_window_cells().is_some_and(|n| 2 * n <= n_cells);
                if is_worth { states } else { unified }
            }
        };
        Limits { n_slots, n_ctx, n_batch, n_prefill, layout }
    }
}

/// The sizes of an engine, and what it will take.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The engine's sizes.
    pub limits: Limits,
    /// What each device is to hold, the host first.
    pub uses: Vec<Use>,
    /// The sizes are those that were asked for, or the model's, and fit.
    pub is_whole: bool,
}

/// What one device is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// By model and context.
    pub model: DeviceUse,
    /// By heads.
    pub heads: u64,
    /// By a draft model and its context.
    pub drafter: u64,
    /// By adapters.
    pub adapters: u64,
    /// Bytes that are free before; `None` where the system does not tell.
    pub free: Option<u64>,
    /// Bytes that it may take; `None`: what is free.
    pub most: Option<u64>,
}

impl Use {
    fn total(&self) -> u64 {
        self.model.total() + self.heads + self.drafter + self.adapters
    }

    /// `true` if it fits, with some bytes to spare.
    fn fits(&self, spare: u64) -> bool {
        self.free.is_none_or(|free| self.total() + spare <= free)
            && self.most.is_none_or(|most| self.total() <= most)
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.model.device.as_ref().map_or("the host", |device| &device.name);
        let DeviceUse { weights, cache, compute, .. } = self.model;
        let [total, weights, cache, compute] = [self.total(), weights, cache, compute].map(bytes);
        write!(f, "{total} on {device}: weights {weights}, cache {cache}, buffers {compute}")?;
        let beside =
            [("heads", self.heads), ("draft model", self.drafter), ("adapters", self.adapters)];
        for (what, n) in beside {
            if n > 0 {
                write!(f, ", {what} {}", bytes(n))?;
            }
        }
        if let Some(free) = self.free {
            write!(f, "; {} are free", bytes(free))?;
        }
        self.most.map_or(Ok(()), |most| write!(f, "; {} are left for it", bytes(most)))
    }
}

fn bytes(n: u64) -> String {
    let (gib, mib) = (n as f64 / f64::from(1 << 30), n as f64 / f64::from(1 << 20));
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{mib:.0} MiB") }
}

/// What an engine has beside its context and its model, and what it may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beside<'a> {
    /// Bytes of heads, on the host.
    pub heads: u64,
    /// What a draft model and its context take of each device.
    pub drafter: &'a [DeviceUse],
    /// On each device there is the same share of them as of the weights.
    pub adapters: &'a [AdapterFile],
    /// Most bytes of the host for all of it; `None`: what is free.
    pub most: Option<u64>,
}

/// What a context takes of each device, the host first.
fn uses(context: &Context, beside: Beside<'_>) -> Vec<Use> {
    // A file that cannot be read is an error later.
    let bytes = |file: &AdapterFile| std::fs::metadata(&file.path).map_or(0, |of| of.len());
    let adapters: u64 = beside.adapters.iter().map(bytes).sum();
    let all = context.footprint();
    let weights: u64 = all.iter().map(|of| of.weights).sum();
    let name = |of: &DeviceUse| of.device.as_ref().map(|device| device.name.clone());
    let drafter = |model: &DeviceUse| {
        let there = beside.drafter.iter().filter(|of| name(of) == name(model));
        there.map(DeviceUse::total).sum()
    };
    let of = |(i, model): (usize, DeviceUse)| Use {
        free: model.device.as_ref().map_or_else(available_memory, |device| Some(device.free)),
        heads: if i == 0 { beside.heads } else { 0 },
        drafter: drafter(&model),
        adapters: (adapters as f64 * model.weights as f64 / weights.max(1) as f64) as u64,
        most: beside.most.filter(|_| i == 0),
        model,
    };
    all.into_iter().enumerate().map(of).collect()
}

/// Whether a context, of an outline, and adapters fit all devices but the host.
pub(crate) fn fits_devices(context: &Context, adapters: &[AdapterFile]) -> bool {
    let uses = uses(context, Beside { heads: 0, drafter: &[], adapters, most: None });
    uses.iter().filter(|of| of.model.device.is_some()).all(|of| of.fits(SPARE))
}

/// The smallest sizes that an engine on a GPU is to have, if they are not named.
pub(super) fn limits_on_gpu(model: &Model, sizes: &Sizes, rope: &Rope) -> Limits {
    let n_ctx = sizes.n_ctx.unwrap_or_else(|| rope.n_ctx(model).min(SHORTEST_ON_GPU));
    let n_cells = sizes.n_cells.unwrap_or(n_ctx * sizes.n_slots).max(n_ctx);
    sizes.limits(model.memory(), n_ctx, n_cells)
}

/// Plans an engine for a model, of which this is an [outline](Model::outline), and what is beside it.
/// `context_params` makes a context's parameters of limits.
///
/// # Errors
/// As [`Context::new`].
pub(super) fn plan(
    model: Model,
    sizes: &Sizes,
    rope: &Rope,
    beside: Beside<'_>,
    context_params: impl Fn(&Limits) -> ContextParams,
) -> Result<Plan, LlamaError> {
    let model = Arc::new(model);
    let memory = model.memory();
    let measure = |n_ctx: usize, n_cells: usize| -> Result<Plan, LlamaError> {
        let limits = sizes.limits(memory, n_ctx, n_cells);
        let context = Context::new(Arc::clone(&model), &context_params(&limits))?;
        let uses = uses(&context, beside);
        let is_whole = uses.iter().all(|of| of.fits(SPARE));
        Ok(Plan { limits, uses, is_whole })
    };
    let n_ctx = sizes.n_ctx.unwrap_or_else(|| rope.n_ctx(&model).clamp(1, LONGEST_CONTEXT));
    let n_cells = sizes.n_cells.unwrap_or(n_ctx * sizes.n_slots).max(n_ctx);
    let is_fixed = sizes.n_ctx.is_some() && sizes.n_cells.is_some();
    let wanted = measure(n_ctx, n_cells)?;
    if is_fixed || wanted.is_whole {
        return Ok(wanted);
    }
    let shortest = sizes.n_ctx.unwrap_or(SHORTEST_AUTO).min(n_ctx);
    let few = measure(shortest, shortest)?;
    let n_cells = most_cells(&few, &wanted).clamp(shortest, n_cells);
    let n_cells = (n_cells / CELLS_STEP * CELLS_STEP).max(shortest);
    let fitting = measure(sizes.n_ctx.unwrap_or(n_ctx.min(n_cells)), n_cells)?;
    Ok(Plan { is_whole: false, ..fitting })
}

/// The cells that fit all devices, from what few of them take and what many do.
fn most_cells(few: &Plan, many: &Plan) -> usize {
    let (n_few, n_many) = (few.limits.n_cells() as f64, many.limits.n_cells() as f64);
    let most = |(few, many): (&Use, &Use)| {
        let free = few.free.map(|free| free.saturating_sub(SPARE));
        let free = free.into_iter().chain(few.most).min()? as f64 - few.total() as f64;
        let each = (many.total() as f64 - few.total() as f64) / (n_many - n_few).max(1.0);
        (each > 0.0).then_some(n_few + free / each)
    };
    let most = few.uses.iter().zip(&many.uses).filter_map(most).fold(n_many, f64::min);
    most.max(0.0) as usize
}

impl Plan {
    /// Bytes of the host's memory.
    pub(super) fn host_memory(&self) -> u64 {
        self.uses.first().map_or(0, Use::total)
    }

    /// Logs what each device is to hold, and what does not fit.
    pub(super) fn log(&self, sizes: &Sizes) {
        for of in &self.uses {
            tracing::info!("memory: {of}");
            if !of.fits(0) {
                let advice = match of.model.device {
                    None => {
                        "a smaller --ctx or --kv-cells, --cache-type-k and -v q8_0, or a smaller quantization"
                    }
                    Some(_) if of.model.is_remote() => {
                        "another --rpc-split, a smaller --ctx or --kv-cells, or --cache-type-k and -v q8_0"
                    }
                    Some(_) => {
                        "a smaller --n-gpu-layers, --ctx or --kv-cells, or --cache-type-k and -v q8_0"
                    }
                };
                tracing::warn!("that may not fit; what takes less: {advice}");
            }
        }
        let (Limits { n_ctx, n_slots, .. }, n_cells) = (self.limits, self.limits.n_cells());
        if sizes.n_ctx.is_none() || (sizes.n_cells.is_none() && n_cells < n_ctx * n_slots) {
            tracing::info!(
                "context of {n_ctx} tokens, {n_cells} cells for {n_slots} slots, as the model and the memory allow: --ctx and --kv-cells set others"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan_of(n_cells: usize, free: u64) -> Plan {
        let limits = Sizes::new(1, n_cells).limits(Memory::Cells, n_cells, n_cells);
        let cache = n_cells as u64 * (1 << 20);
        let model = DeviceUse { device: None, weights: 4 * GIB, cache, compute: GIB };
        let of = Use { model, heads: 0, drafter: 0, adapters: 0, free: Some(free), most: None };
        Plan { limits, uses: vec![of], is_whole: true }
    }

    #[test]
    fn as_many_cells_as_fit_beside_what_they_do_not_change() {
        let most = |free| most_cells(&plan_of(512, free), &plan_of(8192, free));
        assert_eq!(most(8 * GIB), 2048, "a GiB is spare");
        assert_eq!(most(4 * GIB), 0, "not even the weights");
        assert_eq!(most(80 * GIB), 8192, "no more than wanted");
        let limited = |n_cells| {
            let mut plan = plan_of(n_cells, 80 * GIB);
            plan.uses[0].most = Some(7 * GIB);
            plan
        };
        assert_eq!(most_cells(&limited(512), &limited(8192)), 2048, "a limit has nothing to spare");
    }

    #[test]
    fn sizes_say_what_they_hold() {
        let mut on_host = plan_of(2048, 8 * GIB).uses.remove(0);
        assert_eq!(
            on_host.to_string(),
            "7.0 GiB on the host: weights 4.0 GiB, cache 2.0 GiB, buffers 1.0 GiB; 8.0 GiB are free"
        );
        on_host.adapters = 2 * GIB;
        assert!(on_host.to_string().contains("buffers 1.0 GiB, adapters 2.0 GiB; 8.0"));
        assert!(!on_host.fits(0));
    }

    #[test]
    fn a_pool_keeps_what_it_may_and_states_have_their_own_number() {
        let sizes = Sizes { n_retained: None, n_states_kept: 8, ..Sizes::new(4, 100) };
        let layout = |sizes: Sizes, memory| sizes.limits(memory, 100, 400).layout;
        assert_eq!(
            layout(sizes, Memory::Cells),
            Layout::Unified { n_cells: 400, n_retained: 400, n_seqs: 8 }
        );
        assert_eq!(
            layout(Sizes { n_retained: Some(50), ..sizes }, Memory::State),
            Layout::States { n_cells: 400, n_retained: 50, n_seqs: 12, window: 0 }
        );
        let windows = Sizes { n_batch: 16, n_states_kept: 2, ..sizes };
        assert_eq!(
            windows.limits(Memory::Window(32), 800, 3200).layout,
            Layout::States { n_cells: 3200, n_retained: 3200, n_seqs: 6, window: 32 }
        );
        assert!(
            matches!(windows.limits(Memory::Window(512), 800, 3200).layout, Layout::Unified { .. }),
            "nothing would be saved"
        );
        assert_eq!(
            layout(Sizes { streams: true, ..sizes }, Memory::Cells),
            Layout::Streams { n_cells: 100 }
        );
    }
}
