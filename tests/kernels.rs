//! Each kernel against a twin in plain Rust: on the CPU by emulation and, if built with
//! `cuda-kernels`, on a GPU, which must then be there. MEDUSA_TEST_DEVICE=emulation or =cuda chooses
//! one of the two.

#[path = "common/emulated.rs"]
mod emulated;

use std::rc::Rc;

use emulated::Emulated;
use half::f16;
use medusa_llama::engine::filter::Filter;
use medusa_llama::engine::sampler::{Sampler, Scratch};
use medusa_llama::gpu::kernels::{
    self, Finish, Input, N_BINS, NextPaths, Paths, Reliability, RowRule, Rows, Span, Verification,
    choose_paths, product, top_k,
};
use medusa_llama::gpu::weights::{Matrices, Precision, Table};
use medusa_llama::gpu::{Buffer, Device, GpuError};
use medusa_llama::llama::Token;
use medusa_llama::matrix::Matrix;
use medusa_llama::request::SamplingParams;
use medusa_llama::vector::{largest_k, log_sum_exp};

/// Runs a check on every device that MEDUSA_TEST_DEVICE and the build allow.
fn on_devices(check: impl Fn(&Rc<dyn Device>)) {
    let chosen = std::env::var("MEDUSA_TEST_DEVICE").unwrap_or_default();
    assert!(["", "emulation", "cuda"].contains(&chosen.as_str()), "MEDUSA_TEST_DEVICE={chosen}");
    if chosen != "cuda" {
        check(&Emulated::device());
    }
    #[cfg(feature = "cuda-kernels")]
    if chosen != "emulation" {
        let cuda = medusa_llama::gpu::cuda::Cuda::new(0)
            .unwrap_or_else(|e| panic!("{e}; MEDUSA_TEST_DEVICE=emulation tests without a GPU"));
        check(&(Rc::new(cuda) as Rc<dyn Device>));
    }
    #[cfg(not(feature = "cuda-kernels"))]
    assert!(chosen != "cuda", "built without cuda-kernels");
}

fn random(n: usize, rng: &mut fastrand::Rng) -> Vec<f32> {
    (0..n).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

fn matrix(n_out: usize, n_in: usize, rng: &mut fastrand::Rng) -> Matrix {
    Matrix { n_out, n_in, values: random(n_out * n_in, rng) }
}

/// A row of weights as a precision stores it.
fn rounded(row: &[f32], precision: Precision) -> Vec<f64> {
    let half = |v: f32| f16::from_f32(v);
    match precision {
        Precision::F16 => row.iter().map(|&v| half(v).to_f64()).collect(),
        Precision::Q8 => row
            .chunks(32)
            .flat_map(|block| {
                let scale = half(block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0).to_f32();
                block.iter().map(move |v| {
                    if scale == 0.0 {
                        0.0
                    } else {
                        f64::from(scale) * f64::from((v / scale).round())
                    }
                })
            })
            .collect(),
    }
}

/// One case of a product.
#[derive(Clone, Copy, Debug)]
struct Case {
    n_out: usize,
    n_x: usize,
    n_table: usize,
    n_rows: usize,
    n_nets: usize,
    precision: Precision,
    finish: Finish,
    indexed: bool,
    by_net: bool,
    biased: bool,
}

#[allow(clippy::too_many_lines)] // a formula in one piece
fn check_product(device: &Rc<dyn Device>, c: Case, rng: &mut fastrand::Rng) {
    let Case { n_out, n_x, n_table, n_rows, n_nets, .. } = c;
    let w: Vec<Matrix> = (0..n_nets).map(|_| matrix(n_out, n_x, rng)).collect();
    let u: Vec<Matrix> = (0..n_nets).map(|_| matrix(n_out, n_table.max(1), rng)).collect();
    let parts: Vec<Vec<&Matrix>> =
        w.iter().zip(&u).map(|(w, u)| if n_table > 0 { vec![w, u] } else { vec![w] }).collect();
    let matrices = Matrices::new(device, &parts, c.precision).unwrap();

    let n_sources = if c.indexed { n_rows + 3 } else { n_rows };
    let copies = if c.by_net { n_nets } else { 1 };
    let x = random(copies * n_sources * n_x, rng);
    let residual = random(copies * n_sources * n_out, rng);
    let index: Vec<i32> = (0..n_rows).map(|_| rng.usize(0..n_sources) as i32).collect();
    let bias = random(n_nets * n_out, rng);
    let table = matrix(17, n_table.max(1), rng);
    let tokens: Vec<i32> = (0..n_rows).map(|_| rng.usize(0..17) as i32).collect();

    let upload = |values: &[f32]| Buffer::from_host(device, values).unwrap();
    let (d_x, d_residual, d_bias) = (upload(&x), upload(&residual), upload(&bias));
    let (d_index, d_tokens) =
        (Buffer::from_host(device, &index).unwrap(), Buffer::from_host(device, &tokens).unwrap());
    let d_table = Table::new(device, &table).unwrap();
    let rows =
        |values| Rows { values, index: c.indexed.then(|| d_index.slice()), by_net: c.by_net };
    let has_residual = matches!(c.finish, Finish::Residual | Finish::SiluResidual);
    let input = Input {
        x: rows(d_x.slice()),
        table: (n_table > 0).then(|| (&d_table, d_tokens.slice())),
        n_rows,
        bias: c.biased.then(|| d_bias.slice()),
        residual: has_residual.then(|| rows(d_residual.slice())),
        finish: c.finish,
    };
    let mut y = Buffer::zeros(device, n_nets * n_rows * n_out).unwrap();
    product(&**device, &matrices, input, y.slice_mut()).unwrap();
    let mut got = vec![0.0; n_nets * n_rows * n_out];
    y.download(&mut got).unwrap();

    for net in 0..n_nets {
        let weights: Vec<Vec<f64>> = (0..n_out)
            .map(|o| {
                let mut row = w[net].values[o * n_x..][..n_x].to_vec();
                row.extend_from_slice(&u[net].values[o * n_table..][..n_table]);
                rounded(&row, c.precision)
            })
            .collect();
        for row in 0..n_rows {
            let source = if c.indexed { index[row] as usize } else { row }
                + if c.by_net { net * n_sources } else { 0 };
            let mut input: Vec<f64> =
                x[source * n_x..][..n_x].iter().map(|&v| f64::from(v)).collect();
            let embedded = &table.values[tokens[row] as usize * n_table.max(1)..][..n_table];
            input.extend(embedded.iter().map(|&v| f16::from_f32(v).to_f64()));
            for (o, weights) in weights.iter().enumerate() {
                let mut want: f64 = weights.iter().zip(&input).map(|(a, b)| a * b).sum();
                want += if c.biased { f64::from(bias[net * n_out + o]) } else { 0.0 };
                if matches!(c.finish, Finish::Silu | Finish::SiluResidual) {
                    want /= 1.0 + (-want).exp();
                }
                want += if has_residual { f64::from(residual[source * n_out + o]) } else { 0.0 };
                let got = f64::from(got[(net * n_rows + row) * n_out + o]);
                let tolerance = 2e-5 * (1.0 + (weights.len() as f64).sqrt());
                assert!(
                    (got - want).abs() < tolerance,
                    "{c:?}: net {net}, row {row}, {o}: {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn products_are_what_the_formula_says_at_any_size() {
    on_devices(|device| {
        let mut rng = fastrand::Rng::with_seed(1);
        let plain = Case {
            n_out: 33,
            n_x: 64,
            n_table: 0,
            n_rows: 1,
            n_nets: 1,
            precision: Precision::F16,
            finish: Finish::Plain,
            indexed: false,
            by_net: false,
            biased: false,
        };
        for precision in [Precision::F16, Precision::Q8] {
            for n_out in [1, 7, 31, 32, 33, 101] {
                for n_x in [1, 8, 31, 257, 576] {
                    check_product(
                        device,
                        Case { n_out, n_x, precision, n_rows: 1 + n_x % 3, ..plain },
                        &mut rng,
                    );
                }
            }
            for n_rows in [1, 2, 3, 4, 5, 7, 8, 9, 17, 64] {
                check_product(device, Case { n_rows, n_x: 67, precision, ..plain }, &mut rng);
            }
            // More than one chunk of x, at each number of columns.
            for n_rows in [1, 2, 4, 8] {
                check_product(
                    device,
                    Case { n_rows, n_out: 5, n_x: 9000, precision, ..plain },
                    &mut rng,
                );
            }
            for finish in [Finish::Plain, Finish::Silu, Finish::SiluResidual, Finish::Residual] {
                for (indexed, by_net) in
                    [(false, false), (true, false), (false, true), (true, true)]
                {
                    let case = Case { finish, indexed, by_net, biased: true, precision, ..plain };
                    check_product(
                        device,
                        Case { n_nets: 3, n_rows: 5, n_table: 41, n_x: 37, ..case },
                        &mut rng,
                    );
                }
            }
        }
    });
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    on_devices(|device| {
        let mut rng = fastrand::Rng::with_seed(2);
        let m = matrix(5, 6, &mut rng);
        let w = Matrices::new(device, &[vec![&m]], Precision::F16).unwrap();
        let x = Buffer::from_host(device, &random(12, &mut rng)).unwrap();
        let mut y = Buffer::zeros(device, 10).unwrap();
        let input = Input {
            x: Rows { values: x.slice(), index: None, by_net: false },
            table: None,
            n_rows: 2,
            bias: None,
            residual: None,
            finish: Finish::Plain,
        };
        assert!(product(&**device, &w, input, y.slice_mut()).is_ok());
        let bad = [
            Input { n_rows: 3, ..input },
            Input { n_rows: 0, ..input },
            Input { bias: Some(x.slice()), ..input },
            Input { finish: Finish::Residual, ..input },
            Input { residual: Some(input.x), ..input },
        ];
        for input in bad {
            assert!(matches!(
                product(&**device, &w, input, y.slice_mut()),
                Err(GpuError::Shape { .. })
            ));
        }
        let other = matrix(5, 7, &mut rng);
        assert!(Matrices::new(device, &[vec![&m], vec![&other]], Precision::Q8).is_err());

        let (mut tokens, mut p) =
            (Buffer::zeros(device, 10).unwrap(), Buffer::zeros(device, 10).unwrap());
        for (n, k) in [(5, 3), (12, 0), (12, 13), (0, 1)] {
            assert!(
                top_k(&**device, x.slice(), n, None, k, tokens.slice_mut(), p.slice_mut()).is_err(),
                "{n} {k}"
            );
        }
        let mut memory = Verification::new(device, 4, 2).unwrap();
        let mut chosen = Buffer::zeros(device, 4).unwrap();
        let rule = RowRule { parent: -1, ..RowRule::default() };
        let span = |first, n| Span { first, n };
        for (rules, spans) in [
            (vec![], vec![]),
            (vec![rule; 2], vec![span(0, 1)]),
            (vec![rule; 2], vec![span(0, 2)]),
            (vec![RowRule { logits_row: 2, ..rule }], vec![span(0, 1)]),
            (vec![RowRule { sequence: 1, ..rule }], vec![span(0, 1)]),
            (vec![rule; 5], vec![span(0, 1)]),
        ] {
            assert!(
                kernels::verify(
                    &**device,
                    x.slice(),
                    6,
                    &rules,
                    &spans,
                    &mut memory,
                    chosen.slice_mut()
                )
                .is_err(),
                "{rules:?}"
            );
        }
    });
}

/// Difficult rows for a selection.
fn hard_rows(n: usize, rng: &mut fastrand::Rng) -> Vec<Vec<f32>> {
    let stride = |i: usize| if i % 512 == 3 { 50.0 } else { 0.0 };
    let some = |keep: &dyn Fn(usize) -> bool, rng: &mut fastrand::Rng| -> Vec<f32> {
        (0..n).map(|i| if keep(i) { rng.f32() } else { f32::NEG_INFINITY }).collect()
    };
    vec![
        (0..n).map(|_| rng.f32() * 20.0 - 10.0).collect(),
        (0..n).map(|_| (rng.f32() * 6.0).floor()).collect(),
        vec![1.5; n],
        (0..n).map(|i| i as f32 * 1e-3).collect(),
        (0..n).map(|i| -(i as f32) * 1e-3).collect(),
        // One thread owns all large values.
        (0..n).map(|i| rng.f32() + stride(i)).collect(),
        some(&|i| i == n - 1, rng),
        some(&|i| i % 7 == 0, rng),
        (0..n).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 }).collect(),
        (0..n).map(|_| rng.f32() * 1e30).collect(),
        (0..n).map(|i| if i == n / 2 { 90.0 } else { rng.f32() }).collect(),
    ]
}

#[test]
fn top_k_is_the_first_of_all_sorted() {
    on_devices(|device| {
        let mut rng = fastrand::Rng::with_seed(3);
        for n in [1, 2, 31, 100, 511, 513, 4099, 49_152] {
            let mut rows = hard_rows(n, &mut rng);
            if n > 2000 {
                rows.truncate(6);
            }
            let logits = Buffer::from_host(device, &rows.concat()).unwrap();
            let map: Vec<i32> = (0..n as i32).map(|i| 7 * i + 1).collect();
            let d_map = Buffer::from_host(device, &map).unwrap();
            for (k, mapped) in [(1, false), (10, true), (64, false)] {
                let k = k.min(n);
                let mut tokens = Buffer::zeros(device, rows.len() * k).unwrap();
                let mut p = Buffer::zeros(device, rows.len() * k).unwrap();
                let token_map = mapped.then(|| d_map.slice());
                top_k(
                    &**device,
                    logits.slice(),
                    n,
                    token_map,
                    k,
                    tokens.slice_mut(),
                    p.slice_mut(),
                )
                .unwrap();
                let (mut got, mut got_p) = (vec![0; rows.len() * k], vec![0.0; rows.len() * k]);
                tokens.download(&mut got).unwrap();
                p.download(&mut got_p).unwrap();
                for (i, row) in rows.iter().enumerate() {
                    let mut want = vec![];
                    largest_k(row, k, &mut want);
                    let norm = log_sum_exp(row);
                    for (j, (Token(place), value)) in want.into_iter().enumerate() {
                        let token = if mapped { map[place as usize] } else { place };
                        assert_eq!(got[i * k + j], token, "row {i} of {n}, the {j}th of {k}");
                        let (p, want) = (got_p[i * k + j], (value - norm).exp());
                        assert!(
                            (p - want).abs() <= 2e-5 * want + 1e-9,
                            "row {i} of {n}, the {j}th: {p}, not {want}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn a_row_that_is_not_a_number_anywhere_still_gives_tokens() {
    on_devices(|device| {
        let logits = Buffer::from_host(device, &[f32::NAN; 700]).unwrap();
        let (mut tokens, mut p) =
            (Buffer::zeros(device, 3).unwrap(), Buffer::zeros(device, 3).unwrap());
        top_k(&**device, logits.slice(), 700, None, 3, tokens.slice_mut(), p.slice_mut()).unwrap();
        let mut got = [9; 3];
        tokens.download(&mut got).unwrap();
        assert_eq!(got, [0, 1, 2]);
    });
}

#[test]
fn paths_are_chosen_by_what_they_are_likely_to_bring() {
    on_devices(|device| {
        let mut rng = fastrand::Rng::with_seed(4);
        for (n_paths, k, n_next, n_origins) in
            [(1, 10, 4, 1), (1, 1, 1, 1), (7, 10, 13, 3), (64, 10, 64, 32), (100, 10, 1000, 5)]
        {
            let path_q: Vec<f32> = (0..n_paths).map(|_| rng.f32()).collect();
            let origins: Vec<i32> = (0..n_paths).map(|_| rng.usize(0..n_origins) as i32).collect();
            let trust: Vec<f32> = (0..n_origins).map(|_| 0.5 + rng.f32()).collect();
            let ratios: Vec<f32> = (0..N_BINS).map(|_| 0.2 + rng.f32()).collect();
            let tokens: Vec<i32> = (0..n_paths * k).map(|_| rng.i32(0..50_000)).collect();
            let mut p = random(n_paths * k, &mut rng);
            p.iter_mut().for_each(|p| *p = p.abs().powi(4));
            p.chunks_mut(k).for_each(|p| p.sort_by(|a, b| b.total_cmp(a)));

            let (lowest, highest) = (1e-3f32, 0.99f32);
            let mut all = vec![]; // score, place, q
            for path in 0..n_paths {
                let t = trust[origins[path] as usize];
                let mut above = path_q[path];
                for i in 0..k {
                    let p = p[path * k + i];
                    let bin =
                        ((1.0 - p.clamp(lowest, 1.0).ln() / lowest.ln()) * N_BINS as f32) as usize;
                    let estimate = (p * ratios[bin.min(N_BINS - 1)] * t).clamp(0.0, highest);
                    above = above.min(path_q[path] * estimate);
                    all.push((above * t, path * k + i, above));
                }
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));

            let int = |values: &[i32]| Buffer::from_host(device, values).unwrap();
            let float = |values: &[f32]| Buffer::from_host(device, values).unwrap();
            let (d_q, d_origins, d_tokens, d_p) =
                (float(&path_q), int(&origins), int(&tokens), float(&p));
            let (d_ratios, d_trust) = (float(&ratios), float(&trust));
            let paths = Paths {
                q: d_q.slice(),
                origins: d_origins.slice(),
                candidates: d_tokens.slice(),
                p: d_p.slice(),
                k,
            };
            let reliability =
                Reliability { ratios: d_ratios.slice(), lowest, highest, trust: d_trust.slice() };
            let mut out = int(&vec![0; 4 * n_next]);
            let (next_q, rest) = out.slice_mut().split_at(n_next);
            let (origins_out, rest) = rest.split_at(n_next);
            let (parents_out, tokens_out) = rest.split_at(n_next);
            let mut next = NextPaths {
                q: next_q.cast(),
                origins: origins_out,
                parents: parents_out,
                tokens: tokens_out,
            };
            choose_paths(&**device, paths, reliability, &mut next).unwrap();
            let mut words = vec![0; 4 * n_next];
            out.download(&mut words).unwrap();
            let q: Vec<f32> = words[..n_next].iter().map(|&w| f32::from_bits(w as u32)).collect();
            let [whose, parents, got] = [1, 2, 3].map(|i| &words[i * n_next..][..n_next]);
            for i in 0..n_next {
                // A range's edge may be met on the other side: then the neighbours differ by
                // rounding only.
                let (score, place, want_q) = all[i];
                if (parents[i] as usize, got[i]) == (place / k, tokens[place]) {
                    assert!(
                        (q[i] - want_q).abs() < 1e-5,
                        "{i} of {n_paths}: {} and {want_q}",
                        q[i]
                    );
                    assert_eq!(whose[i], origins[place / k]);
                } else {
                    let own = q[i] * trust[whose[i] as usize];
                    assert!(
                        (own - score).abs() < 1e-5,
                        "{i} of {n_paths} paths: {own} and {score}"
                    );
                }
            }
        }
    });
}

fn rule(params: &SamplingParams, position: u64, logits_row: usize) -> RowRule {
    let half = |n: u64| [n as u32, (n >> 32) as u32];
    RowRule {
        seed: half(params.seed),
        position: half(position),
        inverse_temperature: if params.temperature > 0.0 { 1.0 / params.temperature } else { 0.0 },
        top_p: params.top_p,
        min_logit: if params.min_p > 0.0 { params.min_p.ln() } else { f32::NEG_INFINITY },
        top_k: params.top_k as i32,
        logits_row: logits_row as i32,
        parent: -1,
        ..RowRule::default()
    }
}

/// How far rounding may move a draw: to a neighbour at an edge; and if top-p falls on an edge, by one
/// token more or less.
fn tolerance(params: &SamplingParams, logits: &[f32]) -> f64 {
    let mut best: Vec<f64> = logits.iter().filter(|l| !l.is_nan()).map(|&l| f64::from(l)).collect();
    best.sort_by(|a, b| b.total_cmp(a));
    best.truncate(if params.top_k > 0 { params.top_k } else { best.len() });
    let mass: Vec<f64> = best.iter().map(|l| (l - best[0]).exp()).collect();
    let (sum, mut before) = (mass.iter().sum::<f64>(), 0.0);
    for (i, m) in mass.iter().enumerate() {
        before += m / sum;
        if (before - f64::from(params.top_p)).abs() < 1e-5 {
            return 2.0 / (i + 1) as f64;
        }
    }
    1e-4
}

/// Distance of a token from the drawn one, as a share of the sum, in double precision; 0 for the drawn
/// one.
fn distance(params: &SamplingParams, logits: &[f32], position: usize, token: usize) -> f64 {
    let mut kept = vec![];
    let f = Filter {
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        temperature: params.temperature,
        ..Filter::default()
    };
    f.apply(logits, &mut kept, &mut vec![]);
    // The draw's uniform number, from a row in which each token is one of 2^20 equal shares.
    let fine = vec![0.0; 1 << 20];
    let open =
        SamplingParams { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, ..params.clone() };
    let Token(at) = Sampler::new(&open, &[], &[], fine.len()).unwrap().draw(
        &fine,
        position,
        &[],
        &mut Scratch::default(),
    );
    let u = (f64::from(at) + 0.5) / fine.len() as f64;
    let sum: f64 = kept.iter().map(|k| f64::from(k.1)).sum();
    let mut before = 0.0;
    for &(Token(t), weight) in &kept {
        let through = before + f64::from(weight) / sum;
        if t as usize == token {
            return (before - u).max(u - through).max(0.0);
        }
        before = through;
    }
    1.0
}

#[test]
fn verified_rows_get_the_samplers_tokens() {
    on_devices(|device| {
        let mut rng = fastrand::Rng::with_seed(5);
        let base = SamplingParams { seed: 0x1234_5678_9abc_def0, ..SamplingParams::default() };
        let with = |temperature: f32, top_k: usize, top_p: f32, min_p: f32| SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            ..base.clone()
        };
        let (mut n_drawn, mut n_other) = (0, 0);
        for n in [1, 2, 37, 512, 1500, 5003] {
            let mut rows = hard_rows(n, &mut rng);
            rows.push(vec![f32::NAN; n]);
            rows.push(vec![f32::NEG_INFINITY; n]);
            rows.push((0..n).map(|i| if i % 3 == 0 { f32::NAN } else { rng.f32() }).collect());
            let logits = Buffer::from_host(device, &rows.concat()).unwrap();
            for params in [
                with(0.0, 0, 1.0, 0.0),
                with(0.8, 40, 0.95, 0.05),
                with(0.8, 0, 0.95, 0.0),
                with(1.0, 0, 1.0, 0.0),
                with(1.0, 0, 0.5, 0.0),
                with(1.3, 3, 1.0, 0.0),
                with(1e6, 0, 1.0, 0.0),
                with(1e6, 1400, 0.9, 0.0),
                with(0.01, 0, 0.99, 0.0),
                with(0.7, 0, 1.0, 0.1),
                with(1.0, 0, 0.0, 0.0),
                with(2.0, 1, 0.9, 1.0),
            ] {
                let position = rng.usize(0..9_000_000_000);
                let rules: Vec<RowRule> = (0..rows.len())
                    .map(|i| RowRule {
                        sequence: i as i32,
                        ..rule(&params, (position + i) as u64, i)
                    })
                    .collect();
                let spans: Vec<Span> =
                    (0..rows.len()).map(|i| Span { first: i as i32, n: 1 }).collect();
                let mut memory = Verification::new(device, rows.len(), rows.len()).unwrap();
                let mut out = Buffer::zeros(device, rows.len()).unwrap();
                kernels::verify(
                    &**device,
                    logits.slice(),
                    n,
                    &rules,
                    &spans,
                    &mut memory,
                    out.slice_mut(),
                )
                .unwrap();
                let mut chosen = vec![0; rows.len()];
                out.download(&mut chosen).unwrap();
                let mut sampler = Sampler::new(&params, &[], &[], n).unwrap();
                for (i, row) in rows.iter().enumerate() {
                    let Token(want) = sampler.draw(row, position + i, &[], &mut Scratch::default());
                    n_drawn += 1;
                    if chosen[i] == want {
                        continue;
                    }
                    n_other += 1;
                    let far = distance(&params, row, position + i, chosen[i] as usize);
                    assert!(
                        far < tolerance(&params, row),
                        "row {i} of {n}, {params:?}: {} is {far} from {want}",
                        chosen[i]
                    );
                }
            }
        }
        assert!(n_other * 100 <= n_drawn, "{n_other} of {n_drawn} rows drew another token");
    });
}

#[test]
fn trees_are_walked_by_what_was_chosen() {
    on_devices(|device| {
        let mut rng = fastrand::Rng::with_seed(6);
        let n_vocab = 5; // few tokens, so that drafts are often right
        for round in 0..12 {
            let n_sequences = 1 + rng.usize(0..5);
            let (mut rules, mut spans) = (vec![], vec![]);
            for sequence in 0..n_sequences {
                let n = 1 + rng.usize(0..if round % 3 == 0 { 65 } else { 9 });
                let first = rules.len();
                for row in first..first + n {
                    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
                    let parent = if row == first { -1 } else { rng.usize(first..row) as i32 };
                    let taken = |t: i32| {
                        rules[first..].iter().any(|r: &RowRule| r.parent == parent && r.token == t)
                    };
                    let free: Vec<i32> = (0..n_vocab as i32).filter(|&t| !taken(t)).collect();
                    let Some(&token) = rng.choice(&free) else { break };
                    let on_host = i32::from(sequence == 3 && row > first);
                    let sequence = sequence as i32;
                    rules.push(RowRule {
                        sequence,
                        parent,
                        token,
                        on_host,
                        ..rule(&greedy, 0, row)
                    });
                }
                spans.push(Span { first: first as i32, n: (rules.len() - first) as i32 });
            }
            // Logits rows in another order than rows.
            let n_rows = rules.len();
            rules.iter_mut().for_each(|r| r.logits_row = n_rows as i32 - 1 - r.logits_row);
            let values = random(n_rows * n_vocab, &mut rng);
            let logits = Buffer::from_host(device, &values).unwrap();
            let mut memory = Verification::new(device, 400, 8).unwrap();
            let mut out = Buffer::zeros(device, n_rows).unwrap();
            for _ in 0..2 {
                // The second starts from the counters that the first left.
                kernels::verify(
                    &**device,
                    logits.slice(),
                    n_vocab,
                    &rules,
                    &spans,
                    &mut memory,
                    out.slice_mut(),
                )
                .unwrap();
            }
            let (mut chosen, mut last, mut roots) =
                (vec![0; n_rows], vec![0; n_sequences], vec![0; n_sequences]);
            out.download(&mut chosen).unwrap();
            memory.last.download(&mut last).unwrap();
            memory.roots.download(&mut roots).unwrap();
            for (sequence, span) in spans.iter().enumerate() {
                let rows = span.first as usize..(span.first + span.n) as usize;
                let mut at = rows.start;
                let choice = |row: usize| {
                    let mut best = vec![];
                    largest_k(
                        &values[rules[row].logits_row as usize * n_vocab..][..n_vocab],
                        1,
                        &mut best,
                    );
                    if rules[row].on_host == 0 { best[0].0.0 } else { -1 }
                };
                for row in rows.clone() {
                    assert_eq!(chosen[row], choice(row));
                }
                while let Some(child) = rows
                    .clone()
                    .find(|&r| rules[r].parent == at as i32 && rules[r].token == choice(at))
                {
                    at = child;
                }
                let known = choice(at) >= 0;
                let end = if known { at } else { rows.start };
                assert_eq!(
                    (last[sequence], roots[sequence]),
                    (rules[end].logits_row, choice(at).max(0))
                );
            }
        }
    });
}
