//! A node's key and identity, in memory and on disk.
//!
//! The directory holds `node.key`, `node.crt`, `ca.crt` and `node.json`, each written to a temporary name, made
//! durable and renamed. `node.json` comes last: its presence means that the node has an identity.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ED25519, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use super::ca::parse_certificate;
use super::{Fingerprint, PkiError, certificate_error, node_of_certificate};
use crate::NodeId;

const KEY_FILE: &str = "node.key";
const CERTIFICATE_FILE: &str = "node.crt";
const CA_FILE: &str = "ca.crt";
const NODE_FILE: &str = "node.json";

/// A node's Ed25519 key pair.
pub struct NodeKey(KeyPair);

impl NodeKey {
    /// Makes a new key.
    pub fn generate() -> Result<Self, PkiError> {
        KeyPair::generate_for(&PKCS_ED25519)
            .map(Self)
            .map_err(certificate_error("cannot create the node's key"))
    }

    /// Reads a key from PEM.
    pub fn from_pem(pem: &str) -> Result<Self, PkiError> {
        KeyPair::from_pem(pem).map(Self).map_err(certificate_error("cannot read the node's key"))
    }

    /// The private key as PEM: a secret.
    pub fn pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// A signing request for this key, as PEM. The name is informative; the CA decides.
    pub fn csr(&self, name: &str) -> Result<String, PkiError> {
        let failed = certificate_error("cannot make a signing request");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serialize_request(&self.0).and_then(|csr| csr.pem()).map_err(failed)
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey(secret)")
    }
}

/// Everything a node needs to prove who it is, and to check who others are.
#[derive(Clone)]
pub struct Identity {
    node: NodeId,
    key_pem: String,
    cert_pem: String,
    ca_pem: String,
}

#[derive(Serialize, Deserialize)]
struct NodeFile {
    node: NodeId,
}

impl Identity {
    /// Puts the parts together and checks that they belong together.
    pub fn new(key: &NodeKey, cert_pem: &str, ca_pem: &str) -> Result<Self, PkiError> {
        Self::from_pems(key.pem(), cert_pem.to_owned(), ca_pem.to_owned())
    }

    fn from_pems(key_pem: String, cert_pem: String, ca_pem: String) -> Result<Self, PkiError> {
        const WHAT: &str = "the parts of the identity do not belong together";
        let wrong = |reason: &str| PkiError::Certificate { what: WHAT, reason: reason.to_owned() };
        let key = NodeKey::from_pem(&key_pem)?;
        let (certificate, ca) = (parse_certificate(&cert_pem)?, parse_certificate(&ca_pem)?);
        let node = node_of_certificate(&certificate).ok_or_else(|| wrong("the certificate names no node"))?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&certificate)
            .map_err(|_| wrong("the node's certificate cannot be read"))?;
        let (_, ca) = x509_parser::parse_x509_certificate(&ca)
            .map_err(|_| wrong("the CA certificate cannot be read"))?;
        if certificate.public_key().subject_public_key.data.as_ref() != key.0.der_bytes() {
            return Err(wrong("the certificate is for another key"));
        }
        if certificate.verify_signature(Some(ca.public_key())).is_err() {
            return Err(wrong("the certificate is from another CA"));
        }
        Ok(Self { node, key_pem, cert_pem, ca_pem })
    }

    /// Which node this is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The node's certificate as PEM.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The cluster's CA certificate as PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The node's private key as PEM: a secret.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Fingerprint of the cluster's CA.
    pub fn ca_fingerprint(&self) -> Result<Fingerprint, PkiError> {
        Fingerprint::of_pem(&self.ca_pem)
    }

    /// The node's certificate, for TLS.
    pub fn certificate(&self) -> Result<CertificateDer<'static>, PkiError> {
        parse_certificate(&self.cert_pem)
    }

    /// The cluster's CA certificate, for TLS.
    pub fn ca_certificate(&self) -> Result<CertificateDer<'static>, PkiError> {
        parse_certificate(&self.ca_pem)
    }

    /// The node's private key, for TLS.
    pub fn private_key(&self) -> Result<PrivateKeyDer<'static>, PkiError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|e| PkiError::Certificate { what: "cannot read the node's key", reason: e.to_string() })
    }

    /// Reads the identity in `dir`; none if the node has not got one yet.
    pub fn load(dir: &Path) -> Result<Option<Self>, PkiError> {
        let damaged = |reason: String| PkiError::Inconsistent { path: dir.display().to_string(), reason };
        let Some(node_file) = read(&dir.join(NODE_FILE))? else { return Ok(None) };
        let expected: NodeFile = serde_json::from_str(&node_file).map_err(|e| damaged(e.to_string()))?;
        let part = |name: &str| read(&dir.join(name))?.ok_or_else(|| damaged(format!("{name} is missing")));
        let identity = Self::from_pems(part(KEY_FILE)?, part(CERTIFICATE_FILE)?, part(CA_FILE)?)
            .map_err(|e| damaged(e.to_string()))?;
        if identity.node != expected.node {
            return Err(damaged(format!(
                "{NODE_FILE} names {}, the certificate {}",
                expected.node, identity.node
            )));
        }
        Ok(Some(identity))
    }

    /// Writes the identity into `dir`, which is created if needed. Durable when it returns.
    pub fn store(&self, dir: &Path) -> Result<(), PkiError> {
        let node_file = serde_json::json!(NodeFile { node: self.node }).to_string();
        fs::create_dir_all(dir).map_err(io("cannot create", dir))?;
        write_atomic(dir, KEY_FILE, &self.key_pem)?;
        write_atomic(dir, CERTIFICATE_FILE, &self.cert_pem)?;
        write_atomic(dir, CA_FILE, &self.ca_pem)?;
        sync_dir(dir)?;
        write_atomic(dir, NODE_FILE, &node_file)?;
        sync_dir(dir)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).finish_non_exhaustive()
    }
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> PkiError {
    let path = path.display().to_string();
    move |source| PkiError::Io { what, path, source }
}

fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("cannot read", path)(error)),
    }
}

fn write_atomic(dir: &Path, name: &str, text: &str) -> Result<(), PkiError> {
    let (path, temporary) = (dir.join(name), dir.join(format!(".{name}.new")));
    // A leftover of a crash may have other permissions.
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io("cannot create", &temporary))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io("cannot write", &temporary))?;
    fs::rename(&temporary, &path).map_err(io("cannot replace", &path))
}

fn sync_dir(dir: &Path) -> Result<(), PkiError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("cannot make durable", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::ClusterCa;
    use std::os::unix::fs::PermissionsExt;

    fn identity(ca: &ClusterCa) -> Identity {
        let key = NodeKey::generate().unwrap();
        let cert = ca.issue_node(NodeId::random(), &key.csr("n1").unwrap(), &[]).unwrap();
        Identity::new(&key, &cert, ca.cert_pem()).unwrap()
    }

    #[test]
    fn stored_identity_loads_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("identity");
        assert!(Identity::load(&dir).unwrap().is_none());
        let ca = ClusterCa::create("lab").unwrap();
        let identity = identity(&ca);
        identity.store(&dir).unwrap();
        let loaded = Identity::load(&dir).unwrap().unwrap();
        assert_eq!((loaded.node(), loaded.cert_pem()), (identity.node(), identity.cert_pem()));
        assert_eq!(loaded.ca_fingerprint().unwrap(), ca.fingerprint());
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        }
    }

    #[test]
    fn parts_of_different_identities_are_refused() {
        let (ca, other_ca) = (ClusterCa::create("a").unwrap(), ClusterCa::create("b").unwrap());
        let (one, two) = (identity(&ca), identity(&ca));
        let key = NodeKey::from_pem(one.key_pem()).unwrap();
        assert!(Identity::new(&key, two.cert_pem(), ca.cert_pem()).is_err());
        assert!(Identity::new(&key, one.cert_pem(), other_ca.cert_pem()).is_err());

        let dir = tempfile::tempdir().unwrap();
        one.store(dir.path()).unwrap();
        fs::write(dir.path().join(CERTIFICATE_FILE), two.cert_pem()).unwrap();
        assert!(matches!(Identity::load(dir.path()), Err(PkiError::Inconsistent { .. })));
        fs::write(dir.path().join(KEY_FILE), "garbage").unwrap();
        assert!(matches!(Identity::load(dir.path()), Err(PkiError::Inconsistent { .. })));
    }
}
