//! Head files in the formats of other projects.
#![allow(dead_code)] // each test binary uses its part

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};

/// A tensor to be written.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    pub fn i64(values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::I64, shape: vec![values.len()], bytes }
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

pub fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// As `torch.save` writes a state dictionary of floats: a zip archive with a pickle of protocol 2,
/// and a file for each tensor.
pub fn write_pt(path: &Path, tensors: &Tensors) {
    let mut pickle = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    let text = |out: &mut Vec<u8>, text: &str| {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let numbers = |out: &mut Vec<u8>, numbers: &[usize]| {
        out.push(b'(');
        numbers.iter().for_each(|&n| {
            out.push(b'J');
            out.extend((n as u32).to_le_bytes());
        });
        out.push(b't');
    };
    for (i, (name, t)) in tensors.iter().enumerate() {
        text(&mut pickle, name);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(if t.dtype == Dtype::F16 {
            &b"ctorch\nHalfStorage\n"[..]
        } else {
            b"ctorch\nFloatStorage\n"
        });
        text(&mut pickle, &i.to_string());
        text(&mut pickle, "cpu");
        pickle.push(b'J');
        pickle.extend((t.shape.iter().product::<usize>() as u32).to_le_bytes());
        pickle.extend(b"tQK\0");
        numbers(&mut pickle, &t.shape);
        let strides: Vec<usize> =
            (0..t.shape.len()).map(|d| t.shape[d + 1..].iter().product()).collect();
        numbers(&mut pickle, &strides);
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    pickle.extend(b"u.");
    let bytes = tensors.values().map(|t| t.bytes.clone()).collect::<Vec<_>>();
    write_archive(path, &pickle, &bytes);
}

/// The archive around a pickle and its tensors' bytes.
pub fn write_archive(path: &Path, pickle: &[u8], tensors: &[Vec<u8>]) {
    let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let mut add = |name: String, bytes: &[u8]| {
        let stored = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        zip.start_file(name, stored).unwrap();
        std::io::Write::write_all(&mut zip, bytes).unwrap();
    };
    add("medusa_lm_head/data.pkl".into(), pickle);
    tensors
        .iter()
        .enumerate()
        .for_each(|(i, bytes)| add(format!("medusa_lm_head/data/{i}"), bytes));
    add("medusa_lm_head/version".into(), b"3\n");
    zip.finish().unwrap();
}

/// Medusa v2 heads that change nothing: each predicts the model's own next token.
pub fn identity(n_heads: usize, n_embd: usize) -> Tensors {
    let zero = |shape: &[usize]| Tensor::f32(shape, &vec![0.0; shape.iter().product()]);
    let of_head = |h| {
        [
            (format!("{h}.0.linear.weight"), zero(&[n_embd, n_embd])),
            (format!("{h}.0.linear.bias"), zero(&[n_embd])),
        ]
    };
    (0..n_heads).flat_map(of_head).collect()
}
