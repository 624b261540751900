//! Whether a worker is there: ggml asks nobody and ends the process where one is not, or waits for ever
//! where it serves another client.
//!
//! A client of ggml's RPC says first which version it speaks: command 14, the length of what follows,
//! and 24 bytes about other transports than TCP, zero for none. The worker answers with a length, its
//! version of three numbers, and as many bytes.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, SocketAddrV4, TcpStream, ToSocketAddrs as _};
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::sys;

/// The address of a worker, `host:port`; IPv4, as ggml has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    host: String,
    port: u16,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("must be HOST:PORT")?;
        let port = port.parse().ok().filter(|&port| port > 0);
        let port = port.ok_or("the port must be a number from 1 to 65535")?;
        if host.is_empty() || host.contains([':', '[', ' ', '/']) {
            return Err("the host must be a name or an IPv4 address".into());
        }
        Ok(Self { host: host.into(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// What ggml's RPC is called here.
const PROTOCOL: &str = "ggml's RPC";
/// `RPC_CMD_HELLO`, the same in all versions.
const HELLO: u8 = 14;
/// Bytes about other transports.
const N_CAPS: usize = 24;
/// Bytes of an answer after its length.
const N_ANSWER: usize = 4 + N_CAPS;
/// By how much the system may be late with the end of a wait.
const GRACE: Duration = Duration::from_secs(1);
/// Length and answer.
type Answer = [u8; 8 + N_ANSWER];

/// Version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version([u8; 3]);

/// This build's. The last number changes with ggml's operations.
const OWN: Version = Version([
    sys::RPC_PROTO_MAJOR_VERSION as u8,
    sys::RPC_PROTO_MINOR_VERSION as u8,
    sys::RPC_PROTO_PATCH_VERSION as u8,
]);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([major, minor, patch]) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

fn question() -> Vec<u8> {
    let mut bytes = vec![HELLO];
    bytes.extend((N_CAPS as u64).to_le_bytes());
    bytes.extend([0; N_CAPS]);
    bytes
}

/// The version of a worker; `None`: this is no answer of one.
fn version(answer: &Answer) -> Option<Version> {
    let (length, rest) = answer.split_first_chunk::<8>()?;
    let [major, minor, patch, ..] = rest else { return None };
    (u64::from_le_bytes(*length) == N_ANSWER as u64).then_some(Version([*major, *minor, *patch]))
}

/// What is wrong with a worker that answered.
fn judge(answer: &Answer) -> Result<(), String> {
    match version(answer) {
        None => Err(format!("is no worker: it does not speak {PROTOCOL}")),
        Some(OWN) => Ok(()),
        Some(other) => Err(format!(
            "speaks version {other} of {PROTOCOL}, and this program {OWN}: both must be of the same build"
        )),
    }
}

/// Asks all workers at a time, for at most `limit`, and a second more for names. Connections are closed when it returns.
///
/// # Errors
/// The first worker that cannot be used, and why, to follow its address.
pub(super) fn probe(
    endpoints: &[Endpoint],
    limit: Duration,
) -> Result<Vec<SocketAddrV4>, (Endpoint, String)> {
    let until = Instant::now() + limit;
    let probes = endpoints.iter().map(|endpoint| {
        let (sender, receiver) = mpsc::sync_channel(1);
        let asked = endpoint.clone();
        // Not joined: a name may take longer to be found.
        thread::spawn(move || sender.send(ask(&asked, until)));
        (endpoint, receiver)
    });
    let probes: Vec<_> = probes.collect();
    let answers = probes.into_iter().map(|(endpoint, receiver)| {
        let left = until.saturating_duration_since(Instant::now()) + GRACE;
        let answer = receiver.recv_timeout(left);
        let answer =
            answer.unwrap_or_else(|_| Err("cannot be found: its name has no address".into()));
        answer.map_err(|why| (endpoint.clone(), why))
    });
    answers.collect()
}

/// Asks a worker for its version, and returns its address.
fn ask(endpoint: &Endpoint, until: Instant) -> Result<SocketAddrV4, String> {
    let found = (endpoint.host.as_str(), endpoint.port).to_socket_addrs();
    let found = found.map_err(|why| format!("cannot be found: {why}"))?;
    let mut found = found.filter_map(|address| match address {
        SocketAddr::V4(address) => Some(address),
        SocketAddr::V6(_) => None,
    });
    let address = found.next().ok_or("cannot be found: it has no IPv4 address")?;
    let left = || match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Duration::from_millis(1), // zero would be no limit
        left => left,
    };
    let unreachable = |why| format!("cannot be reached: {why}; is a worker running there?");
    let stream = TcpStream::connect_timeout(&address.into(), left()).map_err(unreachable)?;
    exchange(stream, left()).and_then(|answer| judge(&answer))?;
    Ok(address)
}

/// Says hello on a new connection, and reads the answer.
fn exchange(mut stream: TcpStream, limit: Duration) -> Result<Answer, String> {
    let mut answer = [0; 8 + N_ANSWER];
    let mut talk = || {
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(&question())?;
        stream.read_exact(&mut answer)
    };
    match talk() {
        Ok(()) => Ok(answer),
        Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(
            "does not answer: it serves another client, and a worker serves one at a time; or it is no worker"
                .into(),
        ),
        Err(_) => Err(format!("is no worker: it does not speak {PROTOCOL}")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn answer(length: u64, version: [u8; 3]) -> Answer {
        let mut answer = [0; 8 + N_ANSWER];
        answer[..8].copy_from_slice(&length.to_le_bytes());
        answer[8..11].copy_from_slice(&version);
        answer
    }

    #[test]
    fn an_endpoint_is_a_host_and_a_port() {
        let endpoint: Endpoint = "box-1.lan:50052".parse().unwrap();
        assert_eq!(endpoint.to_string(), "box-1.lan:50052");
        for bad in ["", "host", ":1", "host:", "host:0", "host:65536", "[::1]:1", "::1:1", "a b:1"]
        {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_question_has_a_command_a_length_and_no_transports() {
        let question = question();
        assert_eq!(question.len(), 33);
        assert_eq!(question[..9], [14, 24, 0, 0, 0, 0, 0, 0, 0]);
        assert!(question[9..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn an_answer_has_the_same_version_or_is_refused() {
        let Version(own) = OWN;
        assert_eq!(judge(&answer(28, own)), Ok(()));
        for i in 0..3 {
            let mut other = own;
            other[i] += 1;
            let why = judge(&answer(28, other)).unwrap_err();
            let [ours, theirs] = [OWN, Version(other)].map(|version| version.to_string());
            assert!(why.contains(&ours) && why.contains(&theirs), "{why}");
        }
        assert!(judge(&answer(4, own)).unwrap_err().contains("no worker"));
        let mut http = [0; 8 + N_ANSWER];
        http.copy_from_slice(b"HTTP/1.1 400 Bad Request\r\nDate: Mon,");
        assert!(judge(&http).unwrap_err().contains("no worker"));
    }

    #[test]
    fn what_is_no_worker_is_told_apart_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent =
            Endpoint { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let gone = Endpoint { host: "127.0.0.1".into(), port: gone };
        let began = Instant::now();
        let why = |endpoint: &Endpoint| {
            let all = [endpoint.clone(), silent.clone()];
            let (of, why) = probe(&all, Duration::from_millis(300)).unwrap_err();
            assert_eq!(of, *endpoint);
            why
        };
        assert!(why(&gone).contains("cannot be reached"));
        assert!(why(&silent).contains("does not answer"));
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}
