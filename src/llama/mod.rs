//! The fence around llama.cpp: all calls to C are in this folder, and none of C's types leave it.
//!
//! Any thread may read a [`Model`]. A [`Context`] (KV cache and compute buffers) belongs to the thread
//! that built it and keeps its model alive. A [`Batch`] holds the rows of one forward pass. A
//! [`SamplerChain`] changes one row of logits; it does not draw from it. [`ggml`] computes small
//! networks on the same kernels. A [`ChatFormat`] knows how a chat template's models write calls of
//! tools.
//!
//! Nothing in this folder knows of requests, slots, heads or HTTP.
#![allow(unsafe_code)]

mod adapter;
mod backend;
mod batch;
mod cache_types;
mod cells;
mod chat;
mod check;
mod context;
mod error;
mod exit;
mod footprint;
pub mod ggml;
mod gguf;
mod hello;
mod ids;
mod layout;
mod loading;
mod log;
mod model;
mod nextn;
mod pieces;
mod placement;
mod pooling;
mod quantize;
mod rope;
mod sampler;
mod shards;
mod sys;
mod tap;
mod tensor_type;
mod threads;
mod workers;
mod writer;

pub use adapter::AdapterFile;
pub use backend::{
    ARITHMETIC, Numa, cpu_features, max_sequences, supports_gpu_offload, use_numa, version,
};
pub use batch::Batch;
pub use cache_types::CacheTypes;
pub use chat::{AnswerParser, ChatFormat, ParsedAnswer, ParsedCall};
pub use context::{Context, ContextParams};
pub use error::LlamaError;
pub use exit::exit_now;
pub use footprint::DeviceUse;
pub use gguf::MatrixRows;
pub use hello::Endpoint;
pub use ids::{SeqId, Token};
pub use layout::tensors_of;
pub use model::{Memory, Model};
pub use placement::{
    Buffer, GpuLayers, LoadMode, Override, Pattern, Placement, SplitMode, max_devices,
};
pub use pooling::Pooling;
pub use quantize::{Quantization, convert, quantize};
pub use rope::{Rope, RopeScaling};
pub use sampler::{Candidates, SamplerChain};
pub use shards::{model_bytes, model_files};
pub use tap::Tapped;
pub use tensor_type::TensorType;
pub use threads::Threads;
pub use workers::{MOST_WORKERS, connect, device_kinds, offered_names, serve_layers};
pub use writer::{ALIGNMENT, Meta, TensorInfo, tensor_types, write_header};
