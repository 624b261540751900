//! `medusa-llama worker` on a free port of loopback, and ggml's RPC as bytes on a socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A worker of one thread, killed when dropped.
pub struct Worker {
    child: Child,
    pub addr: SocketAddr,
}

impl Worker {
    pub fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_medusa-llama"))
            .args(["worker", "--listen", "127.0.0.1:0", "--threads", "1"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let addr = line.split("listening on ").nth(1).and_then(|rest| rest.split(',').next());
        let addr = addr.unwrap_or_else(|| panic!("{line}")).parse().unwrap();
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(drop));
        Self { child, addr }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&mut self, name: &str) -> ExitStatus {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
        self.child.wait().unwrap()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Commands of ggml's RPC.
pub mod command {
    pub const ALLOC_BUFFER: u8 = 0;
    pub const BUFFER_GET_BASE: u8 = 3;
    pub const SET_TENSOR: u8 = 6;
    pub const GET_TENSOR: u8 = 8;
    pub const GRAPH_COMPUTE: u8 = 10;
    pub const GET_ALLOC_SIZE: u8 = 13;
    pub const HELLO: u8 = 14;
    pub const GRAPH_RECOMPUTE: u8 = 16;
}

/// A client that says what it likes.
pub struct Client(TcpStream);

impl Client {
    /// Connects and says hello.
    pub fn connect(worker: SocketAddr) -> Self {
        let stream = TcpStream::connect(worker).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Self(stream);
        assert_eq!(client.ask(command::HELLO, &[0; 24]).map(|answer| answer.len()), Some(28));
        client
    }

    /// Sends a command that has no answer.
    pub fn send(&mut self, command: u8, body: &[u8]) {
        self.send_with_length(command, body.len() as u64, body);
    }

    pub fn send_with_length(&mut self, command: u8, length: u64, body: &[u8]) {
        let message = [&[command][..], &length.to_le_bytes(), body].concat();
        let _ = self.0.write_all(&message); // the worker may have closed the connection
    }

    /// The answer to a command; `None`: the worker closed the connection.
    pub fn ask(&mut self, command: u8, body: &[u8]) -> Option<Vec<u8>> {
        self.send(command, body);
        let mut length = [0; 8];
        self.0.read_exact(&mut length).ok()?;
        let mut answer = vec![0; u64::from_le_bytes(length) as usize];
        self.0.read_exact(&mut answer).ok()?;
        Some(answer)
    }

    /// Whether the worker closes the connection.
    pub fn is_refused(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }

    /// A buffer of so many bytes: its handle and its address.
    pub fn buffer(&mut self, size: u64) -> (u64, u64) {
        let body = [&0u32.to_le_bytes()[..], &size.to_le_bytes()].concat();
        let answer = self.ask(command::ALLOC_BUFFER, &body).unwrap();
        let handle = u64::from_le_bytes(answer[..8].try_into().unwrap());
        let base = self.ask(command::BUFFER_GET_BASE, &handle.to_le_bytes()).unwrap();
        (handle, u64::from_le_bytes(base[..8].try_into().unwrap()))
    }
}

/// ggml's flag of a node that is to be computed.
const COMPUTED: i32 = 16;

/// A tensor as it is sent: floats unless `kind` says otherwise.
#[derive(Clone, Copy, Default)]
pub struct Tensor {
    pub id: u64,
    pub kind: u32,
    pub buffer: u64,
    pub n: u32,
    pub op: u32,
    pub param: i32,
    pub src: [u64; 2],
    pub data: u64,
}

impl Tensor {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut add = |part: &[u8]| bytes.extend_from_slice(part);
        add(&self.id.to_le_bytes());
        add(&self.kind.to_le_bytes());
        add(&self.buffer.to_le_bytes());
        for n in [self.n, 1, 1, 1, 4, 4 * self.n, 4 * self.n, 4 * self.n, self.op] {
            add(&n.to_le_bytes());
        }
        add(&self.param.to_le_bytes());
        add(&[0; 60]); // further parameters
        add(&COMPUTED.to_le_bytes());
        for id in self.src {
            add(&id.to_le_bytes());
        }
        add(&[0; 8 * 8 + 8 + 8]); // further sources, a view's tensor and offset
        add(&self.data.to_le_bytes());
        add(&[0; 64 + 4]); // name, uses
        assert_eq!(bytes.len(), 296);
        bytes
    }
}

/// A graph of these nodes, by their ids.
pub fn graph(nodes: &[u64], tensors: &[Tensor]) -> Vec<u8> {
    let mut bytes = [0u32.to_le_bytes(), (nodes.len() as u32).to_le_bytes()].concat();
    nodes.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
    bytes.extend((tensors.len() as u32).to_le_bytes());
    tensors.iter().for_each(|tensor| bytes.extend(tensor.bytes()));
    bytes
}
