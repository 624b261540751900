//! A stub of the Hugging Face Hub on loopback: the list of a repository's files, their places, and
//! a host of large files that places lead to.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

pub const REPO: &str = "user/tiny";

/// What the stub has, and how it behaves. Tests change it while it runs.
#[derive(Default)]
pub struct State {
    /// Files of [`REPO`], by path.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The repository's commit.
    pub commit: String,
    /// Who may read: everyone, or who sends this token.
    pub token: Option<&'static str>,
    /// Everyone may list the files, but none may read them without the token.
    pub gated: bool,
    /// What goes wrong with the next large file.
    pub fault: Option<Fault>,
    /// Large files that were asked for, with the first byte.
    pub reads: Vec<(String, usize)>,
    /// All requests.
    pub n_requests: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends after this many bytes.
    Ends(usize),
    /// Nothing follows this many bytes.
    Stalls(usize),
    /// The rest follows this many bytes after two seconds.
    Pauses(usize),
    /// A byte is wrong.
    Wrong,
}

pub struct Stub {
    pub url: String,
    listener: TcpListener,
    state: Arc<Mutex<State>>,
}

impl Stub {
    pub fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect();
        let state = State { files, commit: "c1".repeat(20), ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let (accepting, shared, base) =
            (listener.try_clone().unwrap(), Arc::clone(&state), url.clone());
        std::thread::spawn(move || {
            for stream in accepting.incoming() {
                let Ok(stream) = stream else { break };
                let (shared, base) = (Arc::clone(&shared), base.clone());
                std::thread::spawn(move || drop(answer(stream, &shared, &base)));
            }
        });
        Self { url, listener, state }
    }

    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    /// Connections are refused from now on.
    pub fn stop(self) {
        socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both).unwrap();
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// Files that the Hub has in Git LFS.
fn is_large(path: &str) -> bool {
    path.ends_with(".gguf") || path.ends_with(".safetensors")
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, base: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default();
    let (mut token, mut range) = (None, None);
    for line in lines {
        let line = line?.to_lowercase();
        token = line.strip_prefix("authorization: bearer ").map(str::to_owned).or(token);
        range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
        if line.is_empty() {
            break;
        }
    }
    let mut state = state.lock().unwrap();
    state.n_requests += 1;
    let refused = if state.gated { 403 } else { 401 };
    let may_read = state.token.is_none_or(|expected| token.as_deref() == Some(expected));
    let commit = format!("X-Repo-Commit: {}\r\n", state.commit);
    let path = path.split('?').next().unwrap_or_default();

    if path == format!("/api/models/{REPO}/revision/main") {
        if !may_read && !state.gated {
            return send(&mut stream, refused, "", b"{}");
        }
        let file = |(path, bytes): (&String, &Vec<u8>)| {
            let lfs = is_large(path).then(|| json!({ "sha256": sha256(bytes) }));
            json!({ "rfilename": path, "size": bytes.len(), "lfs": lfs })
        };
        let files: Vec<_> = state.files.iter().map(file).collect();
        let body = json!({ "sha": state.commit, "siblings": files }).to_string();
        return send(&mut stream, 200, "", body.as_bytes());
    }
    if let Some(name) = path.strip_prefix(&format!("/{REPO}/resolve/main/")) {
        let Some(bytes) = state.files.get(name) else { return send(&mut stream, 404, "", b"") };
        if !may_read {
            return send(&mut stream, refused, "", b"");
        }
        let digest = sha256(bytes);
        if is_large(name) {
            let place = format!("Location: {base}/large/{digest}\r\n");
            let size = format!("X-Linked-Size: {}\r\n", bytes.len());
            let head = format!("{place}{commit}{size}X-Linked-Etag: \"{digest}\"\r\n");
            return send(&mut stream, 302, &head, b"");
        }
        let bytes = bytes.clone();
        let head = format!("{commit}ETag: \"{}\"\r\n", &digest[..40]);
        return send_range(&mut stream, &head, &bytes, range.as_deref(), None);
    }
    let found = path
        .strip_prefix("/large/")
        .and_then(|digest| state.files.iter().find(|(_, bytes)| sha256(bytes) == digest));
    let Some((name, bytes)) = found else { return send(&mut stream, 404, "", b"") };
    let (name, bytes) = (name.clone(), bytes.clone());
    let mut fault = None;
    if range.as_deref() != Some("0-0") {
        let from = range.as_deref().and_then(|range| range.split('-').next()?.parse().ok());
        state.reads.push((name, from.unwrap_or(0)));
        fault = state.fault.take();
    }
    drop(state);
    send_range(&mut stream, "", &bytes, range.as_deref(), fault)
}

fn send(stream: &mut TcpStream, status: u16, head: &str, body: &[u8]) -> std::io::Result<()> {
    let n = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} x\r\n{head}Content-Length: {n}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body)
}

fn send_range(
    stream: &mut TcpStream,
    head: &str,
    bytes: &[u8],
    range: Option<&str>,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let n = bytes.len();
    let (from, to) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let to = to.parse::<usize>().map_or(n, |last| n.min(last + 1));
    if from >= to {
        return send(stream, 416, &format!("Content-Range: bytes */{n}\r\n"), b"");
    }
    let head = format!("{head}Content-Range: bytes {from}-{}/{n}\r\n", to - 1);
    let mut part = bytes[from..to].to_vec();
    match fault {
        None => send(stream, 206, &head, &part),
        Some(Fault::Wrong) => {
            part[0] ^= 1;
            send(stream, 206, &head, &part)
        }
        Some(Fault::Ends(after) | Fault::Stalls(after) | Fault::Pauses(after)) => {
            write!(stream, "HTTP/1.1 206 x\r\n{head}Content-Length: {}\r\n\r\n", part.len())?;
            stream.write_all(&part[..after])?;
            if fault == Some(Fault::Stalls(after)) {
                std::thread::sleep(Duration::from_secs(600));
            }
            if fault == Some(Fault::Pauses(after)) {
                std::thread::sleep(Duration::from_secs(2));
                stream.write_all(&part[after..])?;
            }
            Ok(())
        }
    }
}
