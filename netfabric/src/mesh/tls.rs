//! Mutual TLS 1.3 from a node's identity.
//!
//! The only trust anchor is the cluster's CA. A dialler asks for the name of the very node it wants, so a certificate
//! of another node fails the handshake; the accepting side reads the node id from the certificate that TLS verified.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, version::TLS13};
use rustls_pki_types::CertificateDer;

use super::{Class, MeshError};
use crate::NodeId;
use crate::pki::{Identity, node_of_certificate};

pub(super) fn configs(
    identity: &Identity,
    class: Class,
    transport: &Arc<quinn::TransportConfig>,
) -> Result<(quinn::ServerConfig, quinn::ClientConfig), MeshError> {
    let tls = |e: &dyn std::fmt::Display| MeshError::Tls(e.to_string());
    // Given explicitly, so that nothing depends on a provider installed for the whole process.
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca_certificate()?).map_err(|e| tls(&e))?;
    let roots = Arc::new(roots);
    let chain = vec![identity.certificate()?];

    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|e| tls(&e))?;
    let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| tls(&e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), identity.private_key()?)
        .map_err(|e| tls(&e))?;
    server.alpn_protocols = vec![class.alpn().to_vec()];
    // Every connection authenticates in full: no resumption, no early data.
    server.send_tls13_tickets = 0;
    let server = QuicServerConfig::try_from(server).map_err(|e| tls(&e))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(transport.clone()).migration(false);

    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| tls(&e))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, identity.private_key()?)
        .map_err(|e| tls(&e))?;
    client.alpn_protocols = vec![class.alpn().to_vec()];
    client.resumption = Resumption::disabled();
    let client = QuicClientConfig::try_from(client).map_err(|e| tls(&e))?;
    let mut client = quinn::ClientConfig::new(Arc::new(client));
    client.transport_config(transport.clone());
    Ok((server, client))
}

/// The node at the other end of an established connection.
pub(super) fn peer_of(connection: &quinn::Connection) -> Option<NodeId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    node_of_certificate(chain.first()?)
}
