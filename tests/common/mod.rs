//! A real server on a free port, and HTTP as bytes on a socket.
#![allow(dead_code, missing_docs)] // each test binary uses its part

pub mod context;
pub mod engines;
pub mod gguf;
pub mod hub;
pub mod worker;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use medusa_llama::engine::drafts::DraftParams;
use proptest::prelude::*;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// The default model, which `make model` fetches. Cargo runs tests in the package's folder; on another
/// host they run in a folder that has models and heads, too.
pub fn model_path() -> PathBuf {
    let path = PathBuf::from(medusa_llama::config::DEFAULT_MODEL);
    assert!(path.is_file(), "the default model is missing: run `make model`");
    path
}

/// Drafts from text, whether or not they pay.
pub fn text_drafts() -> DraftParams {
    DraftParams { n_shared_text: Some(4096), fixed_nodes: Some(6), ..DraftParams::default() }
}

/// Runs the binary to its end.
pub fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_medusa-llama"))
        .args(args)
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

/// The server with these arguments that other tests of the binary use at this moment, or a new one.
/// It ends with the last test that holds it: nothing drops a static.
pub fn shared(args: &'static [&'static str]) -> Arc<Server> {
    static SERVERS: Mutex<Vec<(&[&str], Weak<Server>)>> = Mutex::new(vec![]);
    let mut servers = SERVERS.lock().unwrap();
    let running = servers.iter().filter(|(other, _)| *other == args);
    running.filter_map(|(_, server)| server.upgrade()).next().unwrap_or_else(|| {
        let server = Arc::new(Server::start(args));
        servers.push((args, Arc::downgrade(&server)));
        server
    })
}

/// A running `medusa-llama serve`, killed when dropped.
pub struct Server {
    child: Child,
    pub addr: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts a server and waits until it listens; the model may still be loading. A pass gets one
    /// thread: threads of several servers on the same cores would wait for each other.
    pub fn start_loading(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_medusa-llama"));
        command.args(["serve", "--model"]).arg(model_path()).args(args);
        Self::launch(&mut command)
    }

    /// The same from a command that begins with `serve`.
    pub fn launch(command: &mut Command) -> Self {
        let mut child = command
            .args(["--host", "127.0.0.1", "--port", "0"])
            .env("N_THREADS", "1")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let addr = line
            .split("://")
            .nth(1)
            .and_then(|l| l.split(',').next())
            .unwrap_or_else(|| panic!("{line}"));
        let addr = addr.parse().unwrap();
        let log = Arc::new(Mutex::new(line));
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).for_each(|l| *sink.lock().unwrap() += &(l + "\n"))
        });
        Self { child, addr, log }
    }

    /// Starts a server and waits until it is ready.
    pub fn start(args: &[&str]) -> Self {
        let server = Self::start_loading(args);
        server.wait(|| server.get("/ready").status == 200);
        server
    }

    /// Polls for up to five minutes: tests run in parallel, and on busy machines.
    pub fn wait(&self, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(
                start.elapsed() < Duration::from_secs(300),
                "waited in vain; the log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn terminate(&self) {
        assert!(
            Command::new("kill")
                .args(["-TERM", &self.pid().to_string()])
                .status()
                .unwrap()
                .success()
        );
    }

    pub fn wait_for_exit(mut self) -> ExitStatus {
        self.ended()
    }

    fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "still running");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until it has ended with status 1, and returns all that it logged.
    pub fn log_when_ended(mut self) -> String {
        assert_eq!(self.ended().code(), Some(1));
        std::thread::sleep(Duration::from_millis(200)); // its last line is on its way
        self.log()
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path}"), &[], b"")
    }

    /// Sends [`request_bytes`].
    pub fn ask(&self, what: &str, headers: &[&str], body: &[u8]) -> Answer {
        exchange(self.addr, &request_bytes(what, headers, body))
    }

    pub fn post(&self, body: &[u8]) -> Answer {
        exchange(self.addr, &post_bytes(body))
    }

    pub fn generate(&self, body: &Value) -> Answer {
        self.post(body.to_string().as_bytes())
    }

    /// Posts JSON to any path.
    pub fn post_to(&self, path: &str, body: &Value) -> Answer {
        self.ask(&format!("POST {path}"), &[], body.to_string().as_bytes())
    }

    /// The sum of a metric's series with all of these labels, each like `status="200"`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let answer = self.get("/metrics");
        let series = answer
            .text()
            .lines()
            .filter_map(|line| line.strip_prefix("medusa_llama:")?.strip_prefix(name));
        let series = series.filter(|rest| {
            rest.starts_with('{') && labels.iter().all(|label| rest.contains(label))
        });
        series.map(|rest| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// The `load` object of `GET /`.
    pub fn load(&self) -> Value {
        self.get("/").json()["load"].clone()
    }

    /// Nothing runs, waits or holds a cell.
    pub fn is_idle(&self) -> bool {
        let load = self.load();
        ["in_flight", "running", "waiting", "kv_cells_running"].iter().all(|name| load[name] == 0)
    }

    /// Sends a request to stream and leaves the connection open.
    pub fn open_stream(&self, body: &Value) -> TcpStream {
        self.send(&post_bytes(body.to_string().as_bytes()))
    }

    /// A connection that holds little: small segments and a small buffer here keep the server's
    /// buffer small, too.
    pub fn narrow_connection(&self) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(2048).unwrap();
        socket.set_tcp_mss(536).unwrap();
        socket.connect(&self.addr.into()).unwrap();
        socket.into()
    }

    /// Sends bytes and leaves the connection open.
    pub fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut socket = TcpStream::connect(self.addr).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.write_all(bytes).unwrap();
        socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn post_bytes(body: &[u8]) -> Vec<u8> {
    request_bytes("POST /generate", &[], body)
}

/// `what` is method and path; `headers` are lines.
pub fn request_bytes(what: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let more: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let length =
        if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let head =
        format!("{what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}{length}\r\n");
    [head.as_bytes(), body].concat()
}

/// Sends bytes and reads the answer to the end.
pub fn exchange(addr: SocketAddr, request: &[u8]) -> Answer {
    let mut socket = TcpStream::connect(addr).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let _ = socket.write_all(request); // an answer may come before all is sent
    read_answer(socket)
}

pub fn read_answer(mut socket: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let _ = socket.read_to_end(&mut bytes); // a reset after the answer is fine
    Answer::parse(&bytes)
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .unwrap_or_else(|| panic!("no head in {bytes:?}"));
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = &bytes[end + 4..];
        let body =
            if head.contains("transfer-encoding: chunked") { unchunk(body) } else { body.to_vec() };
        Self { status, head, body }
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The data of each server-sent event.
    pub fn events(&self) -> Vec<Value> {
        let data = self.text().lines().filter_map(|l| l.strip_prefix("data: "));
        data.map(|d| serde_json::from_str(d).unwrap()).collect()
    }

    /// The text of a stream's events.
    pub fn streamed_text(&self) -> String {
        self.events().iter().map(|e| e["generated_text"].as_str().unwrap_or_default()).collect()
    }
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = body.windows(2).position(|w| w == b"\r\n") {
        let n =
            usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap().trim(), 16).unwrap();
        if n == 0 {
            break;
        }
        let chunk = &body[end + 2..];
        out.extend_from_slice(&chunk[..n.min(chunk.len())]);
        body = chunk.get(n + 2..).unwrap_or_default(); // the server may have cut the stream here
    }
    out
}

/// Any JSON value.
pub fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3i64..30).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "[a-z_]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(".{0,6}", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// The file of a chat template of another model.
pub fn template_path(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".tools/templates").join(name);
    assert!(path.is_file(), "{name} is missing: run `scripts/setup templates`");
    path.to_str().unwrap().to_owned()
}
