//! GGUF files in parts that can be changed, and models in several files.

use std::path::Path;

use medusa_llama::llama::{ALIGNMENT, Quantization};
use medusa_llama::synth::{self, ModelShape};

pub const TEXT: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U32: u32 = 4;
const U16: u32 = 2;
const I32: u32 = 5;

/// A file in parts that can be changed: keys with type and value as they are in the file, tensors
/// with name, dimensions, type and offset, and the tensors' values.
#[derive(Clone, Debug)]
pub struct File {
    pub meta: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<(String, Vec<u64>, u32, u64)>,
    pub values: Vec<u8>,
}

pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }

    pub fn text(&mut self) -> String {
        let n = self.u64() as usize;
        String::from_utf8(self.take(n).to_vec()).unwrap()
    }

    /// A value of a type, as bytes.
    pub fn value(&mut self, kind: u32) -> Vec<u8> {
        let before = self.0;
        match kind {
            0 | 1 | 7 => self.0 = &self.0[1..],
            2 | 3 => self.0 = &self.0[2..],
            TEXT => drop(self.text()),
            ARRAY => {
                let (of, n) = (self.u32(), self.u64());
                (0..n).for_each(|_| drop(self.value(of)));
            }
            10..=12 => self.0 = &self.0[8..],
            _ => self.0 = &self.0[4..],
        }
        before[..before.len() - self.0.len()].to_vec()
    }
}

impl File {
    pub fn read(bytes: &[u8]) -> Self {
        let mut rest = Bytes(bytes);
        assert_eq!((rest.take(4), rest.u32()), (&b"GGUF"[..], 3));
        let (n_tensors, n_meta) = (rest.u64(), rest.u64());
        let mut entry = || {
            let (key, kind) = (rest.text(), rest.u32());
            (key, kind, rest.value(kind))
        };
        let meta = (0..n_meta).map(|_| entry()).collect();
        let mut tensor = || {
            let (name, n_dims) = (rest.text(), rest.u32());
            ((name, (0..n_dims).map(|_| rest.u64()).collect()), rest.u32(), rest.u64())
        };
        let tensors = (0..n_tensors).map(|_| tensor());
        let tensors = tensors.map(|((name, dims), kind, at)| (name, dims, kind, at)).collect();
        let at = (bytes.len() - rest.0.len()).next_multiple_of(ALIGNMENT);
        Self { meta, tensors, values: bytes[at..].to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.meta {
            out.extend([text(key), kind.to_le_bytes().to_vec(), value.clone()].concat());
        }
        for (name, dims, kind, at) in &self.tensors {
            out.extend([text(name), (dims.len() as u32).to_le_bytes().to_vec()].concat());
            dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend([&kind.to_le_bytes()[..], &at.to_le_bytes()].concat());
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(&self.values);
        out
    }

    pub fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) {
        match self.meta.iter_mut().find(|(k, ..)| k == key) {
            Some(entry) => (entry.1, entry.2) = (kind, value),
            None => self.meta.push((key.into(), kind, value)),
        }
    }

    pub fn with_number(mut self, key: &str, n: u32) -> Self {
        self.set(key, U32, n.to_le_bytes().to_vec());
        self
    }

    pub fn with_text(mut self, key: &str, value: &str) -> Self {
        self.set(key, TEXT, [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat());
        self
    }

    /// The model in `n` files, as gguf-split writes them, but with tensors dealt in turn and none of
    /// the first ones in the first file.
    pub fn split(&self, n: usize) -> Vec<Self> {
        let mut starts: Vec<u64> = self.tensors.iter().map(|tensor| tensor.3).collect();
        starts.push(self.values.len() as u64);
        starts.sort_unstable();
        let empty = |no: usize| {
            let meta = if no == 0 { self.meta.clone() } else { vec![] };
            let mut file = Self { meta, tensors: vec![], values: vec![] };
            file.set("split.no", U16, (no as u16).to_le_bytes().to_vec());
            file.set("split.count", U16, (n as u16).to_le_bytes().to_vec());
            let n_tensors = self.tensors.len() as i32;
            file.set("split.tensors.count", I32, n_tensors.to_le_bytes().to_vec());
            file
        };
        let mut files: Vec<Self> = (0..n).map(empty).collect();
        for (i, (name, dims, kind, at)) in self.tensors.iter().enumerate() {
            let end = starts[starts.partition_point(|start| start <= at)];
            let file = &mut files[(i + 1) % n];
            let to = file.values.len() as u64;
            file.tensors.push((name.clone(), dims.clone(), *kind, to));
            file.values.extend(&self.values[*at as usize..end as usize]);
            file.values.resize(file.values.len().next_multiple_of(ALIGNMENT), 0);
        }
        files
    }
}

/// A model with random weights.
pub fn tiny(folder: &Path) -> File {
    random(folder, "tiny")
}

/// A model with random weights in the shape of this name.
pub fn random(folder: &Path, name: &str) -> File {
    let path = folder.join(format!("{name}.gguf"));
    let quantization = Quantization::by_name("F16").unwrap();
    let shape = ModelShape::by_name(name).unwrap();
    synth::model(&path, &shape, quantization, 1, &mut |_, _| ()).unwrap();
    File::read(&std::fs::read(path).unwrap())
}
