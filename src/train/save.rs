//! Trained heads as a folder: weights, `config.json`, the loss as a plot, and a card.

use std::fmt::Write as _;
use std::path::Path;

use half::f16;
use safetensors::Dtype;

use super::fit::{Fitted, Parameter, evaluate::HeadScore};
use super::kind::HeadKind;
use super::{RawTensor, le_bytes, write_tensors};
use crate::files::{self, FileError};

/// Writes the weights of heads whose draft vocabulary is `vocab`, tokens with their counts, the most
/// frequent first. Conditioned heads are stored in 8 bits with a scale for each row, Medusa heads in
/// F16, as other projects read them.
pub fn weights(
    folder: &Path,
    kind: HeadKind,
    params: &[Parameter],
    vocab: &[(u32, f64)],
) -> Result<(), FileError> {
    let mut tensors: Vec<RawTensor<String>> = vec![];
    for Parameter { name, shape, values } in params {
        if kind == HeadKind::Medusa {
            tensors.push(medusa_v2_tensor(name, shape, values));
        } else if shape.len() == 2 {
            tensors.extend(eight_bit(name, shape, values));
        } else {
            tensors.push((name.clone(), Dtype::F32, shape.clone(), le_bytes!(values)));
        }
    }
    let map = vocab.iter().flat_map(|&(t, _)| (t as i32).to_le_bytes()).collect();
    tensors.push(("token_map".into(), Dtype::I32, vec![vocab.len()], map));
    if kind == HeadKind::Conditioned {
        let counts: Vec<f32> = vocab.iter().map(|&(_, n)| n as f32).collect();
        tensors.push(("token_counts".into(), Dtype::F32, vec![vocab.len()], le_bytes!(counts)));
    }
    write_tensors(&kind.file(folder), &tensors, None)
}

/// Renames `{h}.w` to Medusa v2's `{h}.0.linear.weight`.
fn medusa_v2_tensor(name: &str, shape: &[usize], values: &[f32]) -> RawTensor<String> {
    let (head, name) = name.split_once('.').expect("{head}.{name}");
    let name = if name == "b" { "bias" } else { "weight" };
    let bytes = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    (format!("{head}.0.linear.{name}"), Dtype::F16, shape.to_vec(), bytes)
}

/// A matrix as integers from -127 to 127, and the scale of each row.
fn eight_bit(name: &str, shape: &[usize], values: &[f32]) -> [RawTensor<String>; 2] {
    let n_in = shape[1];
    let scale = |row: &[f32]| row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let scales: Vec<f32> = values.chunks(n_in).map(scale).collect();
    let whole =
        |(i, v): (usize, &f32)| (v / scales[i / n_in].max(f32::MIN_POSITIVE)).round() as i8 as u8;
    let bytes = values.iter().enumerate().map(whole).collect();
    [
        (name.to_owned(), Dtype::I8, shape.to_vec(), bytes),
        (format!("{name}.scale"), Dtype::F32, vec![scales.len()], le_bytes!(scales)),
    ]
}

/// What the card says besides accuracy.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Provenance {
    /// The model's name and quantization.
    pub model: String,
    pub heads: HeadKind,
    pub n_heads: usize,
    /// Whether the model answered with LoRA adapters.
    pub lora: bool,
    pub width: usize,
    /// Tokens that the heads know.
    pub n_draft_vocab: usize,
    /// Tokens of the model's own answers that were trained on.
    pub answer_tokens: usize,
    /// Of the last run.
    pub collect_s: u64,
    pub fit_s: u64,
    pub command: String,
}

/// Writes `config.json` and the card, `README.md`.
pub fn card(folder: &Path, origin: &Provenance, fitted: &Fitted) -> Result<(), FileError> {
    let config = serde_json::to_string_pretty(origin).map_err(|e| FileError::new(folder, e))?;
    files::write(&folder.join("config.json"), config + "\n")?;

    let mut text = format!("# Heads for {}\n\n", origin.model);
    let Provenance { n_heads, width, n_draft_vocab, answer_tokens, collect_s, fit_s, .. } = origin;
    let kind = match origin.heads {
        HeadKind::Medusa => "Medusa heads",
        HeadKind::Conditioned => "Heads conditioned on the drafted path",
    };
    let _ = writeln!(
        text,
        "{kind}: {n_heads}, blocks of {width}, a draft vocabulary of {n_draft_vocab} tokens. Trained on {answer_tokens} tokens of \
         the model's own answers, collected in {collect_s} s and learnt in {fit_s} s.\n\n```sh\n{}\n```\n",
        origin.command
    );
    text += "Accuracy on held-out answers, given the true path; a token outside the draft vocabulary counts as missed:\n\n";
    text += "| epoch | head | top-1 | top-5 | loss |\n|---|---|---|---|---|\n";
    for (i, epoch) in fitted.history.iter().enumerate() {
        let kept = if i == fitted.best { " (kept)" } else { "" };
        for (h, score) in epoch.held.iter().enumerate() {
            let HeadScore { n: 1.., .. } = score else { continue };
            let (n, one, five, loss) = (i + 1, score.top(1), score.top(5), score.mean_loss());
            let _ = writeln!(text, "| {n}{kept} | {h} | {one:.3} | {five:.3} | {loss:.3} |");
        }
    }
    text += "\n![training loss](loss.svg)\n";
    files::write(&folder.join("README.md"), text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculate::heads::{HeadNets, Heads, Shape};
    use crate::train::fit::net::{FitNet, NetShape};

    /// Heads of both kinds come back from their files as they went in, to the precision of the
    /// file.
    #[test]
    fn what_is_saved_can_be_loaded() {
        for kind in [HeadKind::Medusa, HeadKind::Conditioned] {
            let shape = NetShape { kind, n_embd: 4, width: 6, n_heads: 2 };
            let mut rng = fastrand::Rng::with_seed(2);
            let net = FitNet::new(&shape, &candle_core::Device::Cpu, &mut rng).unwrap();
            let params = net.parameters().into_iter().map(|(name, var)| {
                let n = var.elem_count();
                let values = (0..n).map(|_| rng.f32() - 0.5).collect();
                Parameter { name, shape: var.dims().to_vec(), values }
            });
            let params: Vec<_> = params.collect();
            let folder = tempfile::tempdir().unwrap();
            weights(folder.path(), kind, &params, &[(5, 9.5), (2, 3.0), (7, 0.0)]).unwrap();
            let heads = Heads::load(folder.path(), Shape { n_embd: 4, n_vocab: 9 }, 9).unwrap();
            assert_eq!(heads.token_map.unwrap().iter().map(|t| t.0).collect::<Vec<_>>(), [5, 2, 7]);
            let of = |name: &str| {
                params.iter().find(|parameter| parameter.name == name).unwrap().values.clone()
            };
            let close = |a: &[f32], b: &[f32]| {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 5e-3)
            };
            match heads.nets {
                HeadNets::Plain(w) => {
                    assert!(close(&w.blocks[1][0].weight.values, &of("1.w")));
                    assert!(close(w.blocks[1][0].bias.as_ref().unwrap(), &of("1.b")));
                }
                HeadNets::Conditioned(w) => {
                    assert_eq!(w.steps.len(), 2);
                    assert_eq!(heads.token_counts, Some(vec![9.5, 3.0, 0.0]));
                    for (got, name) in
                        [(&w.steps[1].w, "1.w"), (&w.steps[1].u, "1.u"), (&w.steps[1].v, "1.v")]
                    {
                        assert!(close(&got.values, &of(name)), "{name}");
                    }
                    assert!(close(&w.steps[1].b, &of("1.b")));
                }
            }
        }
    }
}
