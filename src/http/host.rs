//! `Host`: every request names one host (RFC 9112, 3.2), and one that this server answers to.
//!
//! A page whose own name was made to lead here (DNS rebinding) is of the same origin to its browser,
//! so only the name tells it from a page of this server.

use std::net::{IpAddr, Ipv6Addr};

use hyper::header::HOST;
use hyper::{Request, Version};

use super::problem::Problem;

/// The option's value for [`Hosts::Any`].
pub const ANY: &str = "*";

/// The names that a server answers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Hosts {
    /// Every one.
    #[default]
    Any,
    /// Those of loopback, and these.
    Only(Vec<String>),
}

impl Hosts {
    /// Checks what a request names. A client of HTTP/1.0 need not name any.
    pub fn check<B>(&self, request: &Request<B>) -> Result<(), Problem> {
        let mut given = request.headers().get_all(HOST).iter();
        let host = match (given.next(), given.next()) {
            (None, _) if request.version() < Version::HTTP_11 => "",
            (None, _) => return Err(Problem::InvalidHost("is missing")),
            (Some(_), Some(_)) => return Err(Problem::InvalidHost("is there twice")),
            (Some(value), None) => {
                let host = value.to_str().ok().and_then(host_of);
                host.ok_or(Problem::InvalidHost("is no host"))?
            }
        };
        // A target with a name of its own counts (RFC 9112, 3.2.2).
        let name = request.uri().host().unwrap_or(host);
        if self.answers_to(name) { Ok(()) } else { Err(Problem::HostNotAllowed(name.to_owned())) }
    }

    /// Nobody can make a browser send no name.
    fn answers_to(&self, name: &str) -> bool {
        let Self::Only(names) = self else { return true };
        let name = name.trim_end_matches('.');
        name.is_empty()
            || is_loopback(name)
            || names.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
    }
}

fn is_loopback(name: &str) -> bool {
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name);
    match address.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => name.rsplit('.').next().is_some_and(|top| top.eq_ignore_ascii_case("localhost")),
    }
}

/// The host of `host[:port]`, if it is one (RFC 3986, 3.2.2); it may be empty.
pub fn host_of(value: &str) -> Option<&str> {
    let end = match value.starts_with('[') {
        true => value.find(']')? + 1,
        false => value.find(':').unwrap_or(value.len()),
    };
    let (host, port) = value.split_at(end);
    let is_port = |port: &str| {
        port.bytes().all(|b| b.is_ascii_digit()) && (port.is_empty() || port.parse::<u16>().is_ok())
    };
    let is_host = match host.strip_prefix('[') {
        Some(address) => address.strip_suffix(']')?.parse::<Ipv6Addr>().is_ok(),
        None => is_name(host),
    };
    let ends_well = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
    (is_host && ends_well).then_some(host)
}

fn is_name(host: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(&b);
    let is_escape = |rest: &str| {
        rest.as_bytes().get(..2).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
    };
    host.bytes().all(is_allowed) && host.split('%').skip(1).all(is_escape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::problem::ErrorShape;

    /// The status of a refusal; 200 for none.
    fn status(hosts: &Hosts, version: Version, target: &str, given: &[&[u8]]) -> u16 {
        let mut request = Request::builder().version(version).uri(target);
        for host in given {
            request = request.header(HOST, *host);
        }
        let checked = hosts.check(&request.body(()).unwrap());
        checked.map_or_else(|problem| problem.status_and_kind(ErrorShape::Own).0.as_u16(), |()| 200)
    }

    #[test]
    fn a_request_names_one_host() {
        let ask = |given: &[&[u8]]| status(&Hosts::Any, Version::HTTP_11, "/", given);
        for host in
            ["x", "x:80", "x:", "", "[::1]", "[::1]:8000", "127.0.0.1:1", "a%20b", "a_b", "*"]
        {
            assert_eq!(ask(&[host.as_bytes()]), 200, "{host}");
        }
        for host in [
            "a b/c", "a/b", "x:y", "x:65536", "x:-1", "x:1:2", "::1", "[::1", "[x]", "[::1]x",
            "a@b", "a%2", "a%zz", "http://x", "x?", "x#", "x,y z",
        ] {
            assert_eq!(ask(&[host.as_bytes()]), 400, "{host}");
        }
        assert_eq!(ask(&["\u{e9}".as_bytes()]), 400);
        assert_eq!((ask(&[]), ask(&[b"x", b"x"])), (400, 400));
        assert_eq!(status(&Hosts::Any, Version::HTTP_10, "/", &[]), 200);
        assert_eq!(status(&Hosts::Any, Version::HTTP_10, "/", &[b"x", b"y"]), 400);
        assert_eq!(status(&Hosts::Any, Version::HTTP_11, "http://x/", &[]), 400);
        assert_eq!(status(&Hosts::Any, Version::HTTP_11, "http://x/", &[b"x"]), 200);
    }

    #[test]
    fn a_server_answers_to_its_names() {
        let hosts = Hosts::Only(vec!["api.example".into()]);
        let ask =
            |target: &str, host: &str| status(&hosts, Version::HTTP_11, target, &[host.as_bytes()]);
        for host in [
            "localhost",
            "LOCALHOST:8000",
            "localhost.",
            "a.localhost",
            "127.0.0.1:8000",
            "127.9.8.7",
            "[::1]:8000",
            "[::ffff:127.0.0.1]",
            "api.example:8000",
            "API.Example.",
            "",
        ] {
            assert_eq!(ask("/", host), 200, "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "notlocalhost",
            "x.api.example",
            "[::2]",
            "0.0.0.0",
            "128.0.0.1",
        ] {
            assert_eq!(ask("/", host), 403, "{host}");
        }
        assert_eq!(ask("http://localhost/", "evil.example"), 200, "the target's name counts");
        assert_eq!(ask("http://evil.example/", "localhost"), 403);
    }
}
