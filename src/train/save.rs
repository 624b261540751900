//! Trained heads as a folder: weights, `config.json`, the loss as a plot, and a card.

use std::fmt::Write as _;
use std::path::Path;

use half::f16;
use safetensors::Dtype;

use super::fit::net::{Kind, Net, Tensor};
use super::fit::{Fitted, evaluate::HeadScore};
use super::{TrainError, write_tensors};

/// A tensor of a file: name, type, shape, bytes.
type Named = (String, Dtype, Vec<usize>, Vec<u8>);

/// Writes the weights, of heads that know the tokens of `vocab`, met so many times, the most
/// frequent one first. Conditioned heads are in 8 bits, a scale for each row; plain ones in F16, as
/// others read them.
///
/// # Errors
/// When the file cannot be written.
pub fn weights(
    folder: &Path,
    kind: Kind,
    net: &Net,
    params: &[f32],
    vocab: &[(u32, f64)],
) -> Result<(), TrainError> {
    let mut tensors: Vec<Named> = vec![];
    for tensor in net.tensors() {
        let values = &params[tensor.range.clone()];
        if kind == Kind::Medusa {
            tensors.push(plain(&tensor, values));
        } else if tensor.shape.len() == 2 {
            tensors.extend(eight_bit(&tensor, values));
        } else {
            tensors.push((tensor.name, Dtype::F32, tensor.shape, le_bytes(values)));
        }
    }
    let map = vocab.iter().flat_map(|&(t, _)| (t as i32).to_le_bytes()).collect();
    tensors.push(("token_map".into(), Dtype::I32, vec![vocab.len()], map));
    if kind == Kind::Conditioned {
        let counts: Vec<f32> = vocab.iter().map(|&(_, n)| n as f32).collect();
        tensors.push(("token_counts".into(), Dtype::F32, vec![vocab.len()], le_bytes(&counts)));
    }
    let named: Vec<_> =
        tensors.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.clone(), b.clone())).collect();
    let name = if kind == Kind::Medusa {
        "medusa_lm_head.safetensors"
    } else {
        "conditioned_heads.safetensors"
    };
    write_tensors(&folder.join(name), &named, None)
}

/// `{h}.w` becomes `{h}.0.linear.weight`, as in Medusa v2.
fn plain(tensor: &Tensor, values: &[f32]) -> Named {
    let mut parts: Vec<&str> = tensor.name.split('.').collect();
    let last = if parts.pop() == Some("b") { "bias" } else { "weight" };
    let (head, block) = (parts[0], parts.get(1).unwrap_or(&"0"));
    let bytes = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    (format!("{head}.{block}.linear.{last}"), Dtype::F16, tensor.shape.clone(), bytes)
}

/// A matrix as whole numbers from -127 to 127, and what each row is multiplied by.
fn eight_bit(tensor: &Tensor, values: &[f32]) -> [Named; 2] {
    let n_in = tensor.shape[1];
    let scales: Vec<f32> = values
        .chunks(n_in)
        .map(|row| row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0)
        .collect();
    let whole =
        |(i, v): (usize, &f32)| (v / scales[i / n_in].max(f32::MIN_POSITIVE)).round() as i8 as u8;
    let bytes = values.iter().enumerate().map(whole).collect();
    [
        (tensor.name.clone(), Dtype::I8, tensor.shape.clone(), bytes),
        (format!("{}.scale", tensor.name), Dtype::F32, vec![scales.len()], le_bytes(&scales)),
    ]
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// What the card says besides accuracy.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Origin {
    /// The model's name and quantization.
    pub model: String,
    /// `conditioned` or `medusa`.
    pub heads: Kind,
    /// Number of heads.
    pub n_heads: usize,
    /// Width of a block.
    pub width: usize,
    /// Tokens that the heads know.
    pub n_draft_vocab: usize,
    /// Tokens of the model's own answers that were trained on.
    pub answer_tokens: usize,
    /// Seconds that those took which the last run collected.
    pub collect_s: u64,
    /// Seconds that fitting took.
    pub fit_s: u64,
    /// How it was called.
    pub command: String,
}

/// Writes `config.json` and the card, `README.md`.
///
/// # Errors
/// When a file cannot be written.
pub fn card(folder: &Path, origin: &Origin, fitted: &Fitted) -> Result<(), TrainError> {
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|e| TrainError::file(&path, e))
    };
    let config = serde_json::to_string_pretty(origin).map_err(|e| TrainError::file(folder, e))?;
    write("config.json", config + "\n")?;

    let mut text = format!("# Heads for {}\n\n", origin.model);
    let Origin { n_heads, width, n_draft_vocab, answer_tokens, collect_s, fit_s, .. } = origin;
    let kind = if origin.heads == Kind::Medusa {
        "Medusa heads"
    } else {
        "Heads conditioned on the drafted path"
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
            let (one, five) = (score.top(1), score.top(5));
            let _ = writeln!(
                text,
                "| {}{kept} | {h} | {one:.3} | {five:.3} | {:.3} |",
                i + 1,
                score.mean_loss()
            );
        }
    }
    text += "\n![training loss](loss.svg)\n";
    write("README.md", text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculate::heads::{HeadNets, Heads, Shape};
    use crate::train::fit::net;

    /// Heads of both kinds come back from their files as they went in, to the precision of the
    /// file.
    #[test]
    fn what_is_saved_can_be_loaded() {
        for kind in [Kind::Medusa, Kind::Conditioned] {
            let shape = net::Shape {
                kind,
                n_embd: 4,
                width: 6,
                n_heads: 2,
                n_blocks: vec![1],
                previous: false,
            };
            let net = Net::new(&shape);
            let params: Vec<f32> = (0..net.n_params()).map(|i| (i as f32 * 0.7).sin()).collect();
            let folder = tempfile::tempdir().unwrap();
            weights(folder.path(), kind, &net, &params, &[(5, 9.5), (2, 3.0), (7, 0.0)]).unwrap();
            let heads = Heads::load(folder.path(), Shape { n_embd: 4, n_vocab: 9 }, 9).unwrap();
            assert_eq!(heads.token_map.unwrap().iter().map(|t| t.0).collect::<Vec<_>>(), [5, 2, 7]);
            let of = |name: &str| {
                let tensor = net.tensors().into_iter().find(|t| t.name == name).unwrap();
                params[tensor.range].to_vec()
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
