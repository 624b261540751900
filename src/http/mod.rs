//! The network side: bytes on a socket to a checked [`Request`](crate::request::Request), events
//! back to bytes.
//!
//! [`server`] accepts connections. Around each request [`access`] assigns an id and writes the
//! access log ([`record`] collects what goes into it); [`routes`] finds the path's entry in the one
//! table of routes, lets [`auth`] admit the request, and calls the handler: [`information`],
//! [`health`], [`completions`], [`page`] or [`docs`]. [`api`] has the bodies of requests and answers,
//! [`openai`] and [`reply`] write answers, [`problem`]
//! errors. [`app`] is what they share. [`accept`], [`cors`] and [`tls`] are what their names say, and
//! [`openapi`] documents it all. None of them sees a KV cell, a batch or llama.cpp; they know the
//! engine's [`Handle`](crate::engine::Handle) only, and the model's template.

pub mod accept;
pub mod access;
pub mod api;
pub mod app;
pub mod auth;
pub mod completions;
pub mod cors;
pub mod docs;
pub mod health;
pub mod information;
pub mod openai;
pub mod openapi;
pub mod page;
pub mod problem;
pub mod record;
pub mod reply;
pub mod routes;
pub mod server;
pub mod tls;
