//! What a node shows of itself over HTTPS.
//!
//! A node's own certificate, which `hci` and other programs check by the cluster's CA, is Ed25519 as all keys of the cluster are. No
//! browser takes such a one: it says which signatures it knows, and this is none of them. Who does not know Ed25519 is therefore shown another
//! certificate, ECDSA on P-256, which the node signs itself: a browser could not check the CA's signature on it. It is kept beside the
//! node's identity, so that a browser that was told to trust it need not be told again; `hci` shows its fingerprint.

use std::{io, net::IpAddr, path::Path, sync::Arc};

use netfabric::pki::{Fingerprint, Identity, PkiError};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{
    RootCertStore, ServerConfig, SignatureScheme,
    crypto::CryptoProvider,
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use crate::files::{self, Durability};

/// Certificate and key for browsers, in the directory of the node's identity.
const BROWSER_FILE: &str = "browser.pem";
/// First and last year of it, as of all certificates here.
const VALID_YEARS: std::ops::Range<i32> = 2020..2120;

/// Why HTTPS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The node's identity.
    #[error("the node's identity cannot be used for HTTPS")]
    Identity(#[from] PkiError),
    /// The certificate for browsers cannot be made.
    #[error("the certificate for browsers cannot be made")]
    Create(#[from] rcgen::Error),
    /// It cannot be read or kept.
    #[error("the certificate for browsers cannot be kept")]
    File(#[from] io::Error),
    /// It cannot be read again.
    #[error("the certificate for browsers is damaged")]
    Damaged(#[from] pem::Error),
    /// TLS refuses what it was given.
    #[error("TLS cannot be served: {0}")]
    Tls(String),
}

fn tls(error: impl std::fmt::Display) -> CertificateError {
    CertificateError::Tls(error.to_string())
}

/// The fingerprint of the certificate that browsers are shown, of the node whose identity is in `dir`; none before HTTPS is served.
pub(super) fn browser_fingerprint(dir: &Path) -> Option<Fingerprint> {
    let (certificate, _) = read(dir).ok()?;
    Some(Fingerprint::of(&certificate))
}

type Pair = (CertificateDer<'static>, PrivateKeyDer<'static>);

fn read(dir: &Path) -> Result<Pair, CertificateError> {
    let pem = std::fs::read(dir.join(BROWSER_FILE))?;
    Ok((CertificateDer::from_pem_slice(&pem)?, PrivateKeyDer::from_pem_slice(&pem)?))
}

/// Makes the certificate for browsers, for a node of that name and address.
fn create(dir: &Path, name: &str, address: Option<IpAddr>) -> Result<(), CertificateError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let names: Vec<_> = address.map(|address| address.to_string()).into_iter().collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, format!("{name}, for browsers"));
    params.not_before = rcgen::date_time_ymd(VALID_YEARS.start, 1, 1);
    params.not_after = rcgen::date_time_ymd(VALID_YEARS.end, 1, 1);
    let pem = format!("{}{}", params.self_signed(&key)?.pem(), key.serialize_pem());
    Ok(files::replace(&dir.join(BROWSER_FILE), pem.as_bytes(), 0o600, Durability::Durable)?)
}

/// The certificate for browsers; a new one where there is none that can be read.
fn obtain(dir: &Path, name: &str, address: Option<IpAddr>) -> Result<Pair, CertificateError> {
    match read(dir) {
        Ok(kept) => Ok(kept),
        Err(why) => {
            tracing::info!(%why, "making a certificate for browsers");
            create(dir, name, address)?;
            read(dir)
        }
    }
}

/// TLS as the node whose identity that is and lies in `dir`; clients may show a certificate of the cluster's CA. `name` and `address`
/// are the node's, for browsers.
pub fn server_config(
    identity: &Identity,
    dir: &Path,
    name: &str,
    address: Option<IpAddr>,
) -> Result<ServerConfig, CertificateError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let (certificate, ca) = (identity.certificate()?, identity.ca_certificate()?);
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(tls)?;
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(tls)?;
    let (for_browsers, browsers_key) = obtain(dir, name, address)?;
    let certificates = Certificates {
        // The CA goes along: clients pin its fingerprint.
        node: signer(&provider, vec![certificate, ca], identity.private_key()?)?,
        browsers: signer(&provider, vec![for_browsers], browsers_key)?,
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn signer(
    provider: &CryptoProvider,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, CertificateError> {
    let key = provider.key_provider.load_private_key(key).map_err(tls)?;
    Ok(Arc::new(CertifiedKey::new(chain, key)))
}

/// What clients are shown.
#[derive(Debug)]
struct Certificates {
    node: Arc<CertifiedKey>,
    browsers: Arc<CertifiedKey>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let shown = match client.signature_schemes().contains(&SignatureScheme::ED25519) {
            true => &self.node,
            false => &self.browsers,
        };
        Some(shown.clone())
    }
}

#[cfg(test)]
mod tests {
    use netfabric::{
        NodeId,
        pki::{ClusterCa, NodeKey},
    };
    use rustls::{
        ClientConfig, ClientConnection, DigitallySignedStruct, Error, ServerConnection,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    };
    use rustls_pki_types::{ServerName, UnixTime};

    use super::*;

    /// Knows these signatures, and trusts everybody.
    #[derive(Debug)]
    struct Knows(Vec<SignatureScheme>);

    impl ServerCertVerifier for Knows {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("only TLS 1.3 is spoken".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let known = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, certificate, signature, &known)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.clone()
        }
    }

    /// The certificate that a client is shown which knows these signatures.
    fn shown(server: &Arc<ServerConfig>, known: &[SignatureScheme]) -> Fingerprint {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Knows(known.to_vec())))
            .with_no_client_auth();
        let mut client = ClientConnection::new(Arc::new(config), "node.hci".try_into().unwrap()).unwrap();
        let mut server = ServerConnection::new(server.clone()).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut &wire[..]).unwrap();
            server.process_new_packets().unwrap();
            wire.clear();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut &wire[..]).unwrap();
            client.process_new_packets().unwrap();
        }
        Fingerprint::of(&client.peer_certificates().unwrap()[0])
    }

    #[test]
    fn each_client_is_shown_what_it_can_check() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, key) = (ClusterCa::create("prod").unwrap(), NodeKey::generate().unwrap());
        let certificate = ca.issue_node(NodeId::random(), &key.csr("n1").unwrap(), &[]).unwrap();
        let identity = Identity::new(&key, &certificate, ca.cert_pem()).unwrap();
        let server = server_config(&identity, dir.path(), "n1", Some([10, 0, 0, 1].into())).unwrap();
        let server = Arc::new(server);

        let node = Fingerprint::of(&identity.certificate().unwrap());
        let browsers = browser_fingerprint(dir.path()).unwrap();
        let (p256, ed25519) = (SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519);
        assert_eq!(shown(&server, &[p256, ed25519]), node);
        assert_eq!(shown(&server, &[ed25519]), node);
        assert_eq!(shown(&server, &[p256]), browsers);
    }

    #[test]
    fn browsers_are_shown_the_same_certificate_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(browser_fingerprint(dir.path()), None);
        let address = Some([10, 0, 0, 1].into());
        let (certificate, _) = obtain(dir.path(), "n1", address).unwrap();
        let first = browser_fingerprint(dir.path()).unwrap();
        assert_eq!(Fingerprint::of(&certificate), first);
        obtain(dir.path(), "n1", None).unwrap();
        assert_eq!(browser_fingerprint(dir.path()), Some(first));

        std::fs::write(dir.path().join(BROWSER_FILE), "damaged").unwrap();
        obtain(dir.path(), "n1", address).unwrap();
        assert_ne!(browser_fingerprint(dir.path()).unwrap(), first);
    }
}
