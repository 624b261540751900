//! The network side: bytes on a socket to a checked [`Request`](crate::request::Request), events
//! back to bytes.
//!
//! `server` accepts connections. Around each request `access` assigns an id and writes the access log;
//! `routes` finds the path's entry in the one table of routes, lets `auth` admit the request, `body`
//! receive it, and calls its handler. [`api`] has the bodies of requests and answers, [`reply`] writes answers, `problem`
//! errors; `app` is what they share. None of them sees a KV cell, a batch or llama.cpp: they know the
//! engine's [`Handle`](crate::engine::Handle) only, and the model's template.

mod accept;
mod access;
pub mod api;
pub(crate) mod app;
pub(crate) mod auth;
mod body;
pub mod chunks;
mod completions;
pub(crate) mod cors;
mod docs;
mod embeddings;
mod health;
pub(crate) mod host;
mod information;
mod load;
mod messages;
pub(crate) mod openapi;
mod page;
mod problem;
pub mod reply;
mod responses;
pub(crate) mod routes;
pub(crate) mod sections;
pub(crate) mod server;
pub(crate) mod tls;
mod vocabulary;
