//! Head files of every layout give the same heads; what does not fit is refused by name.
#![allow(missing_docs)]

#[path = "common/heads.rs"]
mod files;

use std::path::Path;

use files::{Tensor, Tensors, write, write_archive, write_pt};
use medusa_llama::llama::Token;
use medusa_llama::speculate::heads::{HeadNets, Heads, HeadsError, Shape};
use medusa_llama::speculate::nets::MedusaWeights;
use proptest::prelude::*;
use safetensors::Dtype;

const SHAPE: Shape = Shape { n_embd: 4, n_vocab: 6 };
const N_HEADS: usize = 3;
const N_BLOCKS: usize = 2;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + seed * 13) % 32) as f32 / 8.0 - 2.0).collect() // exact in F16 and BF16
}

/// Keys as a layout names them.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    V1,
    V2,
    Full,
    Vllm,
}

fn tensors(layout: Layout) -> Tensors {
    let mut all = Tensors::new();
    let (d, v) = (SHAPE.n_embd, SHAPE.n_vocab);
    for h in 0..N_HEADS {
        for l in 0..N_BLOCKS {
            let name = match layout {
                Layout::V1 | Layout::V2 => format!("{h}.{l}.linear"),
                Layout::Full => format!("medusa_head.{h}.{l}.linear"),
                Layout::Vllm => format!("blocks.{h}.layers.{l}"),
            };
            all.insert(format!("{name}.weight"), Tensor::f32(&[d, d], &values(d * d, 10 * h + l)));
            all.insert(format!("{name}.bias"), Tensor::f32(&[d], &values(d, 100 + 10 * h + l)));
        }
        let output = match layout {
            Layout::V1 => format!("{h}.{N_BLOCKS}.weight"),
            Layout::V2 => continue,
            Layout::Full => format!("medusa_head.{h}.{N_BLOCKS}.weight"),
            Layout::Vllm => format!("lm_heads.{h}.weight"),
        };
        all.insert(output, Tensor::f32(&[v, d], &values(v * d, 200 + h)));
    }
    all
}

fn load(folder: &Path) -> Result<Heads, HeadsError> {
    Heads::load(folder, SHAPE, 16)
}

/// The networks of a layout whose heads see the hidden state only.
fn plain(heads: &Heads) -> &MedusaWeights {
    match &heads.nets {
        HeadNets::Plain(weights) => weights,
        HeadNets::Conditioned(_) => panic!("these are conditioned"),
    }
}

fn load_tensors(name: &str, tensors: &Tensors) -> Result<Heads, HeadsError> {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join(name), tensors);
    load(folder.path())
}

fn refusal(tensors: &Tensors) -> String {
    load_tensors("medusa_lm_head.safetensors", tensors).unwrap_err().to_string()
}

#[test]
fn all_layouts_of_the_same_weights_are_the_same_heads() {
    let v1 = load_tensors("medusa_lm_head.safetensors", &tensors(Layout::V1)).unwrap();
    assert_eq!(
        (plain(&v1).blocks.len(), plain(&v1).blocks[0].len(), plain(&v1).outputs.len()),
        (N_HEADS, N_BLOCKS, N_HEADS)
    );
    assert_eq!(plain(&v1).outputs[2].values, values(24, 202));

    assert_eq!(load_tensors("model.safetensors", &tensors(Layout::Vllm)).unwrap(), v1);
    let v2 = load_tensors("medusa_lm_head.safetensors", &tensors(Layout::V2)).unwrap();
    assert_eq!(plain(&v2).blocks, plain(&v1).blocks);
    assert!(plain(&v2).outputs.is_empty(), "the model's own serves");

    // A full model in two shards, with its own tensors among the heads'.
    let folder = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Tensors::new(), Tensors::new());
    for (i, (name, tensor)) in tensors(Layout::Full).into_iter().enumerate() {
        if i % 2 == 0 { &mut a } else { &mut b }.insert(name, tensor);
    }
    a.insert("model.embed_tokens.weight".into(), Tensor::f32(&[2, 9], &values(18, 1)));
    let map: serde_json::Map<_, _> = [("a.safetensors", &a), ("b.safetensors", &b)]
        .into_iter()
        .flat_map(|(file, tensors)| tensors.keys().map(move |key| (key.clone(), file.into())))
        .collect();
    write(&folder.path().join("a.safetensors"), &a);
    write(&folder.path().join("b.safetensors"), &b);
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(load(folder.path()).unwrap(), v1);
}

#[test]
fn pytorchs_own_files_are_the_same_heads() {
    for layout in [Layout::V1, Layout::V2] {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = tensors(layout);
        let expected = load_tensors("medusa_lm_head.safetensors", &tensors).unwrap();
        let half = tensors.get_mut("0.0.linear.weight").unwrap();
        let floats = half.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        let bytes = floats.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect();
        *half = Tensor { dtype: Dtype::F16, shape: half.shape.clone(), bytes };
        write_pt(&folder.path().join("medusa_lm_head.pt"), &tensors);
        assert_eq!(load(folder.path()).unwrap(), expected);
    }
}

#[test]
fn broken_and_hostile_pickles_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("medusa_lm_head.pt");
    let refused = || load(folder.path()).unwrap_err().to_string();

    let changed = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors(Layout::V1);
        change(&mut tensors);
        write_pt(&path, &tensors);
        refused()
    };
    assert!(
        changed(&|t| drop(t.remove("1.0.linear.bias"))).contains("1.0.linear.bias: is missing")
    );
    let nan = |t: &mut Tensors| {
        drop(t.insert("0.1.linear.bias".into(), Tensor::f32(&[4], &[f32::NAN; 4])))
    };
    assert!(changed(&nan).contains("0.1.linear.bias: holds NaN"));
    let huge =
        |t: &mut Tensors| t.get_mut("0.0.linear.weight").unwrap().shape = vec![1 << 30, 1 << 30];
    assert!(changed(&huge).contains("0.0.linear.weight: its shape is [1073741824, 1073741824]"));
    let short = |t: &mut Tensors| t.get_mut("0.0.linear.weight").unwrap().bytes.truncate(5);
    assert!(changed(&short).contains("0.0.linear.weight"));

    // A pickle that would run a command where pickles are run, alone and as a dictionary's value.
    let witness = folder.path().join("it-ran");
    let command = format!("touch {}", witness.display());
    let call = [
        b"cposix\nsystem\n(X".as_slice(),
        &(command.len() as u32).to_le_bytes(),
        command.as_bytes(),
        b"tR",
    ]
    .concat();
    let value = [b"}(X\x01\0\0\0a".as_slice(), &call, b"u"].concat();
    let epoch = b"}(X\x05\0\0\0epochK\x03u".to_vec();
    for (program, why) in [
        (call, "no dictionary of tensors"),
        (value, ": a: is no tensor"),
        (epoch, ": epoch: is no tensor"),
    ] {
        write_archive(&path, &[b"\x80\x02".as_slice(), &program, b"."].concat(), &[]);
        assert!(refused().contains(why), "{}", refused());
        assert!(!witness.exists());
    }

    write_pt(&path, &tensors(Layout::V1));
    let bytes = std::fs::read(&path).unwrap();
    for n in [0, 1, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..n]).unwrap();
        assert!(load(folder.path()).is_err(), "{n} bytes");
    }
}

#[test]
fn half_floats_and_fewer_heads() {
    let mut halves = tensors(Layout::V1);
    for (i, t) in halves.values_mut().enumerate() {
        let floats = t.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        (t.dtype, t.bytes) = match i % 2 {
            0 => (Dtype::F16, floats.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect()),
            _ => {
                (Dtype::BF16, floats.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect())
            }
        };
    }
    let v1 = load_tensors("medusa_lm_head.safetensors", &tensors(Layout::V1)).unwrap();
    assert_eq!(load_tensors("medusa_lm_head.safetensors", &halves).unwrap(), v1);

    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("medusa_lm_head.safetensors"), &halves);
    let two = Heads::load(folder.path(), SHAPE, 2).unwrap();
    assert_eq!((plain(&two).blocks.len(), plain(&two).outputs.len()), (2, 2));
}

#[test]
fn a_reduced_vocabulary_has_a_map() {
    let mut reduced = tensors(Layout::V2);
    reduced.insert("token_map".into(), Tensor::i64(&[5, 0, 3]));
    let heads = load_tensors("medusa_lm_head.safetensors", &reduced).unwrap();
    assert_eq!(heads.token_map, Some(vec![Token(5), Token(0), Token(3)]));
    for bad in [&[5, 6][..], &[-1], &[2, 2], &[]] {
        reduced.insert("token_map".into(), Tensor::i64(bad));
        assert!(refusal(&reduced).contains("token_map"), "{bad:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let whole = tensors(Layout::V1);
    let without = |key: &str| {
        let mut t = whole.clone();
        t.remove(key).unwrap();
        refusal(&t)
    };
    assert!(without("1.0.linear.bias").contains("1.0.linear.bias: is missing"));
    assert!(without("2.2.weight").contains("2.2.weight: is missing"));
    assert!(without("0.0.linear.weight").contains("there is no head"));

    let with = |key: &str, tensor: Tensor| {
        let mut t = whole.clone();
        t.insert(key.into(), tensor);
        refusal(&t)
    };
    assert!(
        with("what.is.this", Tensor::f32(&[1], &[0.0]))
            .contains("what.is.this: is a key that no layout has")
    );
    assert!(
        with("0.0.linear.bias", Tensor::f32(&[4], &[0.0, f32::NAN, 0.0, 0.0]))
            .contains("0.0.linear.bias: holds NaN")
    );
    let other_model = with("0.0.linear.weight", Tensor::f32(&[5, 5], &[0.0; 25]));
    assert!(
        other_model.contains("0.0.linear.weight: its shape is [5, 5]; this model needs [4, 4]"),
        "{other_model}"
    );
    assert!(
        with("1.2.weight", Tensor::f32(&[7, 4], &[0.0; 28])).contains("this model needs [6, 4]")
    );
    assert!(
        with("1.0.linear.bias", Tensor { dtype: Dtype::U8, shape: vec![4], bytes: vec![0; 4] })
            .contains("U8")
    );
}

#[test]
fn broken_and_hostile_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(load(folder.path()).unwrap_err().to_string().contains("no heads here"));
    let path = folder.path().join("medusa_lm_head.safetensors");
    write(&path, &tensors(Layout::V1));
    let bytes = std::fs::read(&path).unwrap();
    for n in [0, 7, 8, 100, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..n]).unwrap();
        assert!(load(folder.path()).is_err(), "{n} bytes");
    }
    let header = br#"{"0.0.linear.weight":{"dtype":"F32","shape":[1000000000000,4],"data_offsets":[0,16000000000000]}}"#;
    let huge = [&(header.len() as u64).to_le_bytes()[..], header].concat();
    let endless = [&u64::MAX.to_le_bytes()[..], header].concat();
    for hostile in [huge, endless] {
        std::fs::write(&path, hostile).unwrap();
        assert!(load(folder.path()).is_err());
    }
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(
        &index,
        r#"{"weight_map": {"medusa_head.0.0.linear.weight": "../../etc/passwd"}}"#,
    )
    .unwrap();
    assert!(
        load(folder.path())
            .unwrap_err()
            .to_string()
            .contains("not the name of a file in this folder")
    );
}

proptest! {
    /// Whatever bytes are changed, reading ends with heads or an error.
    #[test]
    fn changed_bytes_never_panic(
        pt in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(if pt { "medusa_lm_head.pt" } else { "medusa_lm_head.safetensors" });
        if pt { write_pt(&path, &tensors(Layout::V1)) } else { write(&path, &tensors(Layout::V1)) }
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        std::fs::write(&path, bytes).unwrap();
        let _ = load(folder.path());
    }
}

/// Conditioned heads of width 2.
fn conditioned() -> Tensors {
    let (d, m) = (SHAPE.n_embd, 2);
    let of_head = |h: usize| {
        [("w", vec![m, d], 1), ("u", vec![m, d], 2), ("v", vec![d, m], 3), ("b", vec![m], 4)].map(
            |(name, shape, seed)| {
                let n = shape.iter().product();
                (format!("{h}.{name}"), Tensor::f32(&shape, &values(n, 10 * h + seed)))
            },
        )
    };
    (0..N_HEADS).flat_map(of_head).collect()
}

#[test]
fn conditioned_heads_may_be_in_8_bit_with_scales() {
    let name = "conditioned_heads.safetensors";
    let heads = load_tensors(name, &conditioned()).unwrap();
    let HeadNets::Conditioned(floats) = &heads.nets else {
        panic!("conditioned heads were written")
    };
    assert_eq!(
        (floats.steps.len(), floats.steps[1].v.n_out, floats.steps[1].b.len()),
        (N_HEADS, 4, 2)
    );
    assert_eq!(floats.steps[2].u.values, values(8, 22));

    // Eighths from -2 to 2 are whole numbers times an eighth.
    let mut tensors = conditioned();
    let bytes = |v: &[f32]| v.iter().map(|v| (v * 8.0) as i8 as u8).collect();
    tensors.insert(
        "2.u".into(),
        Tensor { dtype: Dtype::I8, shape: vec![2, 4], bytes: bytes(&values(8, 22)) },
    );
    tensors.insert("2.u.scale".into(), Tensor::f32(&[2], &[0.125; 2]));
    assert_eq!(load_tensors(name, &tensors).unwrap(), heads);
}

#[test]
fn conditioned_heads_that_do_not_fit_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = conditioned();
        change(&mut tensors);
        load_tensors("conditioned_heads.safetensors", &tensors).unwrap_err().to_string()
    };
    let put = |t: &mut Tensors, key: &str, shape: &[usize]| {
        t.insert(key.into(), Tensor::f32(shape, &values(shape.iter().product(), 1)));
    };
    assert!(refused(&|t| drop(t.remove("1.b"))).contains("1.b: is missing"));
    assert!(refused(&|t| put(t, "1.u", &[2, 5])).contains("1.u: its shape is [2, 5]"));
    assert!(refused(&|t| put(t, "0.v.scale", &[3])).contains("0.v.scale"));
    assert!(refused(&|t| put(t, "9.w.scale", &[3])).contains("9.w, which is missing"));
    assert!(refused(&|t| put(t, "more", &[3])).contains("more"));
    let wider = |t: &mut Tensors| {
        [("1.w", vec![3, 4]), ("1.u", vec![3, 4]), ("1.v", vec![4, 3]), ("1.b", vec![3])]
            .iter()
            .for_each(|(k, s)| put(t, k, s));
    };
    assert!(refused(&wider).contains("1.w: is not as wide"));
}
