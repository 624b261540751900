//! Small networks on ggml's kernels: residual blocks and output matrices, for heads. Weights are 8-bit where their rows
//! allow it, F16 elsewhere.

use std::ffi::c_void;
use std::ptr::NonNull;

use super::{LlamaError, start_backend, sys};

/// A matrix as it stands in a file: `n_out` rows of `n_in` values.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub n_out: usize,
    /// Columns.
    pub n_in: usize,
    /// Row after row.
    pub values: Vec<f32>,
}

/// `x + SiLU(W x + b)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// `W`: square.
    pub weight: Matrix,
    /// `b`; absent in some layouts.
    pub bias: Option<Vec<f32>>,
}

/// Networks that share an input: each a run of blocks and then an output matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// Width of the input and of all blocks.
    pub n_embd: usize,
    /// The blocks of each network.
    pub blocks: Vec<Vec<Block>>,
    /// One output matrix for each network, or one for all. All have as many rows.
    pub outputs: Vec<Matrix>,
}

/// Weights in ggml's memory, and room to compute. Belongs to one thread.
pub struct Net {
    weights: NonNull<sys::ggml_context>,
    blocks: Vec<Vec<(Tensor, Option<Tensor>)>>,
    outputs: Vec<Tensor>,
    n_embd: usize,
    n_out: usize,
    n_threads: usize,
    /// Where graphs are built and computed.
    arena: Vec<u64>,
    results: Vec<f32>,
}

type Tensor = NonNull<sys::ggml_tensor>;

impl Drop for Net {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, freed once; the tensors live in it.
        unsafe { sys::ggml_free(self.weights.as_ptr()) };
    }
}

/// A run of `Tensor`s needs at most this many bytes besides its data: headers, alignment, the graph.
const OVERHEAD: usize = 1 << 20;

impl Net {
    /// Takes weights over, quantized.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for shapes that do not fit together, [`LlamaError::Context`] without memory.
    pub fn new(w: &Weights, n_threads: usize) -> Result<Self, LlamaError> {
        start_backend();
        let misuse = |what: &str| LlamaError::Misuse(format!("network weights: {what}"));
        let n_out = w.outputs.first().ok_or_else(|| misuse("no output matrix"))?.n_out;
        let whole = |m: &Matrix| m.values.len() == m.n_out * m.n_in && m.n_in == w.n_embd && m.n_out > 0;
        if w.n_embd == 0 || w.blocks.is_empty() || ![1, w.blocks.len()].contains(&w.outputs.len()) {
            return Err(misuse("an output matrix for each network, or one for all"));
        }
        let fits = |b: &Block| {
            whole(&b.weight) && b.weight.n_out == w.n_embd && b.bias.as_ref().is_none_or(|bias| bias.len() == w.n_embd)
        };
        if !w.blocks.iter().flatten().all(fits) || !w.outputs.iter().all(|m| whole(m) && m.n_out == n_out) {
            return Err(misuse("shapes do not fit together"));
        }
        let n_values: usize =
            w.outputs.iter().chain(w.blocks.iter().flatten().map(|b| &b.weight)).map(|m| m.values.len()).sum();
        // 2 bytes a value are enough for either type; biases are F32.
        let bytes = 2 * n_values + 4 * w.n_embd * w.blocks.iter().map(Vec::len).sum::<usize>() + OVERHEAD;
        let params = sys::ggml_init_params { mem_size: bytes, mem_buffer: std::ptr::null_mut(), no_alloc: false };
        // SAFETY: no buffer of ours is passed; C allocates or returns null.
        let ctx = NonNull::new(unsafe { sys::ggml_init(params) })
            .ok_or_else(|| LlamaError::Context(format!("no memory for {bytes} bytes of weights")))?;
        let mut net = Self {
            weights: ctx,
            blocks: vec![],
            outputs: vec![],
            n_embd: w.n_embd,
            n_out,
            n_threads: n_threads.max(1),
            arena: vec![],
            results: vec![],
        };
        for blocks in &w.blocks {
            let taken =
                blocks.iter().map(|b| Ok((net.matrix(&b.weight)?, b.bias.as_deref().map(|b| net.vector(b)).transpose()?)));
            let taken = taken.collect::<Result<_, LlamaError>>()?;
            net.blocks.push(taken);
        }
        net.outputs = w.outputs.iter().map(|m| net.matrix(m)).collect::<Result<_, _>>()?;
        Ok(net)
    }

    /// Number of networks.
    #[must_use]
    pub fn n_nets(&self) -> usize {
        self.blocks.len()
    }

    /// Values that one network gives for one input row.
    #[must_use]
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    fn tensor(&self, kind: sys::ggml_type, n_in: usize, n_out: usize) -> Result<Tensor, LlamaError> {
        // SAFETY: a live context with memory allocated for all weights; null if that were not so.
        let t = unsafe { sys::ggml_new_tensor_2d(self.weights.as_ptr(), kind, n_in as i64, n_out as i64) };
        NonNull::new(t).ok_or_else(|| LlamaError::Context("no memory for weights".into()))
    }

    fn matrix(&self, m: &Matrix) -> Result<Tensor, LlamaError> {
        // Q8_0 has a scale for each 32 values of a row.
        let kind = if m.n_in.is_multiple_of(32) { sys::GGML_TYPE_Q8_0 } else { sys::GGML_TYPE_F16 };
        let tensor = self.tensor(kind, m.n_in, m.n_out)?;
        // SAFETY: the tensor holds `n_out` rows of `n_in` values of that type, `values` as many floats (checked in `new`).
        unsafe {
            let data = (*tensor.as_ptr()).data;
            let (n_out, n_in) = (m.n_out as i64, m.n_in as i64);
            sys::ggml_quantize_chunk(kind, m.values.as_ptr(), data, 0, n_out, n_in, std::ptr::null());
        }
        Ok(tensor)
    }

    fn vector(&self, values: &[f32]) -> Result<Tensor, LlamaError> {
        let tensor = self.tensor(sys::GGML_TYPE_F32, values.len(), 1)?;
        // SAFETY: the tensor holds as many floats.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), (*tensor.as_ptr()).data.cast(), values.len()) };
        Ok(tensor)
    }

    /// The outputs of all networks for `input`, rows of `n_embd` values: for each network, for each row, `n_out` values.
    ///
    /// # Errors
    /// [`LlamaError::Misuse`] for a part of a row, [`LlamaError::Context`] without memory.
    pub fn forward(&mut self, input: &[f32]) -> Result<&[f32], LlamaError> {
        let (n_rows, rest) = (input.len() / self.n_embd, input.len() % self.n_embd);
        if n_rows == 0 || rest != 0 {
            return Err(LlamaError::Misuse(format!("{} values are not rows of {}", input.len(), self.n_embd)));
        }
        let n_nets = self.n_nets();
        // Every tensor of the graph has its own memory, and so has the product's working copy of its input.
        let n_blocks: usize = self.blocks.iter().map(Vec::len).sum();
        let floats = n_rows * (self.n_embd * (2 + 4 * n_blocks + 2 * n_nets) + 2 * n_nets * self.n_out);
        let bytes = 4 * floats + 4 * self.n_embd * n_rows * n_nets + 2 * OVERHEAD + 4096 * self.n_threads;
        if self.arena.len() * 8 < bytes {
            self.arena.resize(bytes.div_ceil(8), 0);
        }
        let params = sys::ggml_init_params {
            mem_size: self.arena.len() * 8,
            mem_buffer: self.arena.as_mut_ptr().cast::<c_void>(),
            no_alloc: false,
        };
        // SAFETY: the buffer is ours, 8-byte aligned, of that size, and outlives the context, which is freed below.
        let ctx = NonNull::new(unsafe { sys::ggml_init(params) }).ok_or_else(|| LlamaError::Context("no graph".into()))?;
        // SAFETY: as the function asks; `ctx` has room as computed above.
        let computed = unsafe { self.compute(ctx.as_ptr(), input, n_rows) };
        // SAFETY: made above, freed once; no tensor of it is used any more.
        unsafe { sys::ggml_free(ctx.as_ptr()) };
        computed.map(|()| self.results.as_slice())
    }

    /// Builds the graph in `ctx`, computes it, and copies the outputs to `results`.
    ///
    /// # Safety
    /// `ctx` is live and has room for the graph of `n_rows` rows; `input` holds that many.
    unsafe fn compute(&mut self, ctx: *mut sys::ggml_context, input: &[f32], n_rows: usize) -> Result<(), LlamaError> {
        // SAFETY: all tensors are live, their shapes fit together (checked in `new`), and `ctx` has room by contract. ggml
        // stops the process when it has not.
        unsafe {
            let x = sys::ggml_new_tensor_2d(ctx, sys::GGML_TYPE_F32, self.n_embd as i64, n_rows as i64);
            std::ptr::copy_nonoverlapping(input.as_ptr(), (*x).data.cast(), input.len());
            let mut states = vec![];
            for blocks in &self.blocks {
                let mut state = x;
                for (weight, bias) in blocks {
                    let mut inner = sys::ggml_mul_mat(ctx, weight.as_ptr(), state);
                    if let Some(bias) = bias {
                        inner = sys::ggml_add(ctx, inner, bias.as_ptr());
                    }
                    state = sys::ggml_add(ctx, state, sys::ggml_silu(ctx, inner));
                }
                states.push(state);
            }
            let graph = sys::ggml_new_graph(ctx);
            let mut results = vec![];
            if let [output] = self.outputs.as_slice() {
                // One matrix for all: one product over the rows of all networks.
                let mut all = states[0];
                for &state in &states[1..] {
                    all = sys::ggml_concat(ctx, all, state, 1);
                }
                results.push(sys::ggml_mul_mat(ctx, output.as_ptr(), all));
            } else {
                results.extend(states.iter().zip(&self.outputs).map(|(&s, o)| sys::ggml_mul_mat(ctx, o.as_ptr(), s)));
            }
            results.iter().for_each(|&r| sys::ggml_build_forward_expand(graph, r));
            let status = sys::ggml_graph_compute_with_ctx(ctx, graph, self.n_threads as i32);
            if status != sys::GGML_STATUS_SUCCESS {
                return Err(LlamaError::Decode { code: status, reason: "a head's network was not computed".into() });
            }
            self.results.clear();
            for r in results {
                let n = sys::ggml_nelements(r) as usize;
                self.results.extend_from_slice(std::slice::from_raw_parts((*r).data.cast::<f32>(), n));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula in plain Rust.
    fn twin(w: &Weights, x: &[f32]) -> Vec<f32> {
        let product = |m: &Matrix, x: &[f32]| -> Vec<f32> {
            m.values.chunks(m.n_in).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        let mut out = vec![];
        for (i, blocks) in w.blocks.iter().enumerate() {
            for row in x.chunks(w.n_embd) {
                let mut state = row.to_vec();
                for block in blocks {
                    let mut inner = product(&block.weight, &state);
                    inner.iter_mut().zip(block.bias.iter().flatten()).for_each(|(v, b)| *v += b);
                    state.iter_mut().zip(inner).for_each(|(s, v)| *s += v / (1.0 + (-v).exp()));
                }
                out.extend(product(w.outputs.get(i).unwrap_or(&w.outputs[0]), &state));
            }
        }
        out
    }

    fn random(n: usize, seed: u64, scale: f32) -> Vec<f32> {
        let mut x = seed * 2 + 1;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * scale
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn ggml_computes_the_formula() {
        // Odd sizes are F16, multiples of 32 8-bit.
        for (n_embd, n_out, n_nets, n_blocks, shared, n_rows) in
            [(64, 100, 3, 1, true, 5), (96, 33, 2, 2, false, 1), (30, 7, 4, 1, false, 9), (32, 1, 1, 0, true, 2)]
        {
            let matrix = |n_out, seed| Matrix { n_out, n_in: n_embd, values: random(n_out * n_embd, seed, 1.0) };
            let block =
                |seed| Block { weight: matrix(n_embd, seed), bias: (seed % 2 == 0).then(|| random(n_embd, seed + 9, 1.0)) };
            let w = Weights {
                n_embd,
                blocks: (0..n_nets).map(|i| (0..n_blocks).map(|j| block(10 * i + j)).collect()).collect(),
                outputs: (0..if shared { 1 } else { n_nets }).map(|i| matrix(n_out, 77 + i)).collect(),
            };
            let mut net = Net::new(&w, 2).unwrap();
            for n_rows in [n_rows, n_rows + 3] {
                let x = random(n_rows * n_embd, 5, 4.0);
                let (got, want) = (net.forward(&x).unwrap().to_vec(), twin(&w, &x));
                assert_eq!(got.len(), want.len());
                let size = (want.iter().map(|v| v * v).sum::<f32>() / want.len() as f32).sqrt();
                let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 0.05 * size, "{n_embd} {n_out} {n_nets}: {far} of {size}");
            }
        }
    }

    #[test]
    fn weights_that_do_not_fit_together_are_refused() {
        let m = |n_out, n_in| Matrix { n_out, n_in, values: vec![0.0; n_out * n_in] };
        let good = Weights { n_embd: 4, blocks: vec![vec![Block { weight: m(4, 4), bias: None }]], outputs: vec![m(3, 4)] };
        assert!(Net::new(&good, 1).is_ok_and(|mut net| net.forward(&[0.0; 5]).is_err()));
        let mut bad = vec![good.clone(); 4];
        bad[0].outputs.clear();
        bad[1].outputs[0].values.pop();
        bad[2].blocks[0][0].bias = Some(vec![0.0; 3]);
        bad[3].blocks[0][0].weight = m(5, 4);
        assert!(bad.iter().all(|w| Net::new(w, 1).is_err()));
    }
}
