//! TLS to the API of a node that is known by one thing only: the fingerprint of its cluster's CA.
//!
//! A token and a context carry that fingerprint. The node sends its own certificate and the CA's; the connection stands
//! only when the CA's has the pinned fingerprint and has signed the node's. Names are not checked: a node is reached by
//! whatever address or forwarded port its administrator has, and the CA signs nothing but nodes of the cluster.

use std::sync::Arc;

use netfabric::pki::Fingerprint;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Opens TLS over an established connection, with the peer's CA pinned.
///
/// # Errors
/// When the handshake fails, which includes a CA with another fingerprint.
pub async fn connect(stream: TcpStream, ca: Fingerprint) -> std::io::Result<TlsStream<TcpStream>> {
    connect_to(stream, Some(ca)).await
}

/// Opens TLS with whoever answers. Only for learning a CA that is proven by other means before anything is told.
///
/// # Errors
/// When the handshake fails.
pub async fn connect_unverified(stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
    connect_to(stream, None).await
}

async fn connect_to(stream: TcpStream, ca: Option<Fingerprint>) -> std::io::Result<TlsStream<TcpStream>> {
    let config = client_config(ca).map_err(std::io::Error::other)?;
    let name = ServerName::try_from("node.hci").map_err(std::io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

fn client_config(ca: Option<Fingerprint>) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(PinnedCa { ca, algorithms: provider.signature_verification_algorithms });
    let builder =
        ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

#[derive(Debug)]
struct PinnedCa {
    ca: Option<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(pinned) = self.ca else { return Ok(ServerCertVerified::assertion()) };
        let Some(ca) = intermediates.iter().find(|certificate| Fingerprint::of(certificate) == pinned) else {
            return Err(CertificateError::UnknownIssuer.into());
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let node = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&node, &roots, &[], now, self.algorithms.all)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
