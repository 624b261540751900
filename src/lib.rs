//! medusa-llama: a server that makes GGUF models answer faster.
//!
//! It links llama.cpp directly and serves many HTTP clients from one continuously batched engine.
//! Medusa heads, a smaller model and earlier text draft token trees, which the same forward pass
//! verifies. On a CUDA
//! device our own kernels run the heads and the verification.
//!
//! # Architecture
//!
//! A request flows in one direction; answers return only as [`Event`](request::Event)s on the
//! request's own channel.
//!
//! ```text
//! http ──> request ──> engine ──> { scheduler, slots, speculate, guide, sampler, text } ──> { llama ──> llama.cpp, gpu ──> cuda/ }
//! ```
//!
//! 1. [`http`] parses a body once into a checked [`Request`](request::Request).
//! 2. [`Handle::submit`](engine::Handle::submit) takes a place in the bounded queue or fails (429),
//!    tokenizes the prompt, and sends the job to the engine's thread.
//! 3. The engine admits it: [`slots`](engine::slots) finds a sequence id and the part of the prompt
//!    that is already cached; further cells come back from [`prefixes`].
//! 4. `engine::scheduler` picks the rows of the step: one for each
//!    decoding sequence, then prompt chunks of the size that `engine::pace` allows.
//! 5. [`speculate`] drafts a tree of candidates for each decoding sequence, with heads, a draft
//!    model or the model's own draft layers, and from text; the [`guide`](engine::guide), if any,
//!    removes those that its grammar forbids and adds those that it leaves alone; the policy keeps
//!    those that pay.
//! 6. One [`forward`](engine::Forward::forward) over all rows, including the trees.
//!    [`leaves`](engine::leaves) assigns sequence ids so that each node attends to its own path.
//! 7. Commit: at each row that ends a sequence, [`sampler`](engine::sampler) (after
//!    [`filter`](engine::filter)) chooses a token among those the guide allows, and continues
//!    from the child that holds it, if there is one. `engine::text` turns bytes into whole
//!    characters and finds stop strings, and the piece leaves as an event. Cells of rejected paths
//!    are freed. If the logits are on a device, [`speculate::device`] has already chosen there and
//!    drafted for the next step.
//! 8. `http` turns events into JSON or server-sent events; of a chat, [`chat`] first reads thoughts
//!    and calls of tools from the text.
//!
//! Dropping the receiver cancels a request; the engine notices at the next commit. There is no
//! abort message. `docs/architecture.md` follows one request through the modules.
//!
//! # Map
//!
//! | where | what | must not know |
//! |---|---|---|
//! | `build.rs`, `build/`, `vendor/` | llama.cpp's source, patched and compiled; its bindings | |
//! | [`config`] | arguments, checked; one table of all limits and defaults | |
//! | [`cli`] | the commands: start, signals, drain, terminal output | llama.cpp |
//! | [`http`] | accept loop, routes; `access`, the access log; `host`, `auth` and `cors`; `tls`; `api`, the bodies of requests and answers; `completions`, `responses`, `messages`, `embeddings`, `vocabulary` and `information`, their handlers; `load`, how busy the server is; `sections`, what an answer is made of; server-sent events; `page` for browsers; `openapi` and `docs` | cells, batches |
//! | [`telemetry`] | request spans for an OpenTelemetry collector | bodies, engine |
//! | [`models`] | the models of a server: one, or several that are loaded when a request names them and unloaded when memory is needed; what follows from a loaded one | sockets, JSON, cells |
//! | [`prefixes`] | cells that outlive the cache: `key` and `block`, `memory`, and `store`, a folder or an S3-like store through `object_store` and `client` | cells' meaning, requests |
//! | [`request`], [`error`] | what `http` and `engine` share | both |
//! | [`engine`] | the step; `turn`, a sequence's part in it; `admission`, its beginning; `commit` and `walk`, its end; `pool`, embeddings; `thread` runs it, `handle` is its public side, `load` prepares it, `plan` its sizes by what memory there is, `offload` the layers that fit GPUs, `drafts` the sources of drafts, `prefix` and `saving` what outlives the cache, `rate` how often requests come, `lanes` the threads that read requests, `stats` its counters, `forward` its interface to a model, `sharing` and `thread_count` the threads of each pass, `guide` what may come next in an answer, `grammar` its interface to llguidance, `closing` the way to the end of JSON, `gbnf` a translator for llguidance | sockets, JSON |
//! | [`metrics`] | `/metrics`: names for the counters of engine and HTTP | sockets, cells |
//! | [`speculate`] | `heads` and `pickle` (files), `medusa` and `conditioned` (heads), `nets` (their networks), `draft_model` (a smaller model, or the model's own draft layers, which go on from `states`; `lanes` are what it has read), `joint` (what two sources say together), `suffix` and `text` (text drafts), `tree`, `calibration`, `reliability`, `cost`, `policy`; `device` (heads and verification on a GPU); `simulated`, which `bench` wraps around a model, and `recording`, in which it keeps what was decided | requests, cells |
//! | [`chat`] | conversations: messages and tools to a prompt and the form of its answer, and an answer's text to thoughts and calls, for `http`, `train` and `bench` | dialects |
//! | [`hub`] | models and heads by their names on the Hugging Face Hub: `name`, `pick` the files that one means, `snapshot` a repository online or from the cache, `download` with further attempts, `transfer` with checksums | requests, engine |
//! | [`jinja`] | Jinja as Python's library renders it, with texts that know what came from outside | chats |
//! | [`train`] | training of heads: `own`, prompts that the model writes; `answers` to prompts, `features`, `fit` | HTTP |
//! | [`synth`] | models and heads with random weights: in the shapes of known models for benchmarks, of many architectures for tests | requests |
//! | `machine` | cores and memory that this process may use, and how busy others keep them | requests |
//! | `eval`, `plot`, [`files`] | perplexity; SVG plots; files that appear whole, and names of shards | requests |
//! | `tune` | recommends a quantization from measurements | files, models |
//! | [`vector`], [`matrix`] | vectorized loops over logits; a matrix of floats | their purpose |
//! | [`gpu`], `cuda/` | the fence around CUDA, and its kernels; `cuda/args.h` declares what both share | tokens, trees |
//! | [`llama`] | the fence around C: model, where its weights go, its adapters, context and what it takes of each device, samplers, and graphs on ggml's kernels; `workers`, layers on other machines, and `hello`, whether one is there | requests, slots, heads |
//!
//! # Invariants
//!
//! - `unsafe` occurs only in [`llama`] and [`gpu`].
//! - `scheduler`, `slots`, `leaves`, `sampler`'s draw, `text`, `pace`, `bursts`, `thread_count`, `turn`, and of
//!   `speculate` all but `heads`, `pickle`, `medusa`, `conditioned`, `nets`, `draft_model`, `lanes` and `device` do no I/O
//!   and read no clock.
//! - One thread creates and owns the llama context.
//! - Whatever grows after the start has a limit in [`config`]: queue, body, connections, cells,
//!   text to draft from, events per request.
//! - A request is admitted only when the cache has room for all it may need, so every running
//!   request can finish.
//! - A position's token depends on the request, its seed and the position: not on other requests
//!   in the batch, and not on the drafts.

pub mod chat;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
mod eval;
pub mod files;
pub mod gpu;
pub mod http;
pub mod hub;
pub mod jinja;
pub mod llama;
mod machine;
pub mod matrix;
pub mod metrics;
pub mod models;
mod plot;
pub mod prefixes;
pub mod request;
pub mod speculate;
pub mod synth;
pub mod telemetry;
pub mod train;
mod tune;
pub mod vector;
