//! TLS: a certificate and its key, read once at the start, and handshakes that are bounded in time.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

#[derive(Clone, Debug)]
pub struct Tls(Arc<ServerConfig>);

impl Tls {
    /// From files in PEM: the certificate with those that lead to its root, and its private key.
    pub fn read(cert: &Path, key: &Path) -> Result<Self, String> {
        let cert_name = format!("TLS_CERT {}", cert.display());
        let key_name = format!("TLS_KEY {}", key.display());
        let chain: Vec<_> = CertificateDer::pem_file_iter(cert)
            .and_then(Iterator::collect)
            .map_err(|error| format!("{cert_name} cannot be read: {error}"))?;
        if chain.is_empty() {
            return Err(format!(
                "{cert_name} holds no certificate: it must be a PEM file with at least one"
            ));
        }
        let private = PrivateKeyDer::from_pem_file(key).map_err(|error| {
            format!("{key_name} cannot be read as a private key in PEM: {error}")
        })?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has what TLS 1.2 and 1.3 need")
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .map_err(|error| {
                format!("{cert_name} and {key_name} cannot be used together: {error}")
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        timeout: Duration,
    ) -> io::Result<TlsStream<S>> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long");
        let acceptor = TlsAcceptor::from(Arc::clone(&self.0));
        tokio::time::timeout(timeout, acceptor.accept(stream)).await.map_err(late)?
    }
}
