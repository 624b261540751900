//! medusa-llama: a server that makes GGUF models answer faster.
//!
//! It links llama.cpp directly and serves many HTTP clients from one continuously batched engine.
//! Medusa heads, and the text that was there before, draft trees of tokens that are verified in the
//! same pass. On a CUDA device heads and verification run in kernels of our own.
//!
//! # Architecture
//!
//! A request flows one way; answers return only as [`Event`](request::Event)s on the request's own
//! channel.
//!
//! ```text
//! http ──> request ──> engine ──> { scheduler, slots, speculate, grammar, sampler, text } ──> { llama ──> llama.cpp, gpu ──> cuda/ }
//! ```
//!
//! 1. [`http`] reads a body and parses it, once, into a checked [`Request`](request::Request).
//! 2. [`Handle::submit`](engine::Handle::submit) takes a place in the bounded queue, or refuses
//!    (429), tokenises the prompt, and sends the job to the engine's thread.
//! 3. The engine admits it: [`slots`](engine::slots) finds a sequence id and whatever of the prompt
//!    is cached already.
//! 4. [`scheduler::plan`](engine::scheduler::plan) picks the rows of the step: one for each running
//!    stream, then chunks of prompts as large as [`pace`](engine::pace) allows.
//! 5. [`speculate`] drafts a tree of candidates for each running stream, by heads and from text;
//!    its [`grammar`](engine::grammar), if it has one, cuts out what it forbids; and the nodes that
//!    pay are kept.
//! 6. One [`forward`](engine::Forward::forward) over all rows, the trees' among them.
//!    [`leaves`](engine::leaves) lends sequence ids, so that a node sees its own path.
//! 7. Commit: [`sampler`](engine::sampler) (after [`filter`](engine::filter)) chooses a token from
//!    each row that ends a sequence, of those that its grammar allows, and goes on from the child
//!    that holds it, if there is one. [`text`](engine::text) turns bytes into whole characters and
//!    looks for stop strings, and the piece leaves as an event. The cells of paths not taken are
//!    free again. Where the logits are on a device, [`speculate::device`] has chosen there, and
//!    drafted for the next step, before that.
//! 8. `http` turns events into JSON or server-sent events.
//!
//! To cancel is to drop the receiver; the engine sees it when it commits the next step. There is no
//! abort message.
//!
//! # Map
//!
//! | where | what | must not know |
//! |---|---|---|
//! | `build.rs`, `vendor/` | llama.cpp's source, patched and compiled; its bindings | |
//! | [`config`] | arguments as typed, and checked; every limit and default in one table | |
//! | [`cli`] | the commands: start, signals, drain, terminal | llama.cpp |
//! | [`http`] | accept loop, routes; `access`, what is logged of a request; `auth` and `cors`, who may ask; `tls`; `generate` and `openai`, the two dialects; server-sent events; `page`, for browsers; `openapi` and `docs` document it all | cells, batches |
//! | [`telemetry`] | spans of requests, to OpenTelemetry's collector | bodies, engine |
//! | [`request`], [`error`] | what `http` and `engine` share | both |
//! | [`engine`] | the loop, with a step's end in `commit`; `thread` starts and runs it, `handle` is its outside, `stats` what it counts, `forward` its way to a model, `grammar` its way to llguidance | sockets, JSON |
//! | [`metrics`] | what `/metrics` shows: names for what the engine and HTTP count | sockets, cells |
//! | [`speculate`] | `heads` and `pickle` (files), `medusa` and `conditioned` (drafting by heads), `suffix` and `text` (from text), `tree`, `calibration`, `reliability`, `cost`, `policy`; `device` (heads and verification on a GPU); `simulated` for `bench` | requests, cells |
//! | [`chat`] | chat templates: messages to a prompt, for `http`, `train` and `bench` | requests |
//! | [`train`] | heads from a model's own answers: answers, features, fit | HTTP |
//! | [`synth`] | models and heads of random weights in known shapes, to measure with | requests |
//! | [`eval`], [`plot`], [`files`] | perplexity; SVG plots; files that appear whole | requests |
//! | [`tune`] | which form of a model to use, from what was measured | files, models |
//! | [`vector`] | loops over logits as vector code | what they are for |
//! | [`gpu`], `cuda/` | the fence around CUDA, and the kernels behind it, which know nothing of Rust | tokens, trees |
//! | [`llama`] | the fence around C: model, context, samplers, and small networks on ggml's kernels | requests, slots |
//!
//! # Invariants
//!
//! - `unsafe` stands in [`llama`] and [`gpu`] only.
//! - `scheduler`, `slots`, `leaves`, `sampler`'s draw, `text`, `pace`, `company`, and of
//!   `speculate` all but `heads`, `pickle`, `medusa`, `conditioned` and `device` do no I/O and read
//!   no clock.
//! - One thread owns the llama context, and builds it there.
//! - Nothing grows after the start without a limit in [`config`]: queue, body, connections, cells,
//!   text to draft from, events per request.
//! - A request is admitted only when the cache holds all it may come to need, so a running request
//!   always can finish.
//! - What a position's token is depends on the request, its seed and the position: not on who else
//!   is in the batch, and not on what was drafted.

pub mod chat;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod eval;
pub mod files;
pub mod gpu;
pub mod http;
pub mod llama;
pub mod metrics;
pub mod plot;
pub mod request;
pub mod speculate;
pub mod synth;
pub mod telemetry;
pub mod train;
pub mod tune;
pub mod vector;
