//! The cluster's certificate authority.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::{PkiError, certificate_error};
use crate::NodeId;

/// First and last year of every certificate. Wide on purpose, see the module page.
const VALID_YEARS: std::ops::Range<i32> = 2020..2120;

/// The certificate authority of one cluster: whoever holds its key can make nodes.
pub struct ClusterCa {
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl ClusterCa {
    /// Makes the CA of a new cluster.
    pub fn create(cluster: &str) -> Result<Self, PkiError> {
        let failed = certificate_error("cannot create the cluster's CA");
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(&failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("{cluster} cluster CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params);
        let certificate = params.self_signed(&key).map_err(&failed)?;
        Ok(Self { certificate_pem: certificate.pem(), certificate: certificate.der().clone(), key })
    }

    /// Restores a CA from its two PEM texts.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let failed = certificate_error("cannot read the cluster's CA");
        let key = KeyPair::from_pem(key_pem).map_err(&failed)?;
        let certificate = parse_certificate(certificate_pem)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(|e| {
            PkiError::Certificate { what: "cannot read the CA certificate", reason: e.to_string() }
        })?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(PkiError::Certificate {
                what: "cannot use the cluster's CA",
                reason: "its key belongs to another certificate".to_owned(),
            });
        }
        Ok(Self { certificate_pem: certificate_pem.to_owned(), certificate, key })
    }

    /// The CA certificate, which every node holds.
    pub fn cert_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The CA's private key: a secret of the cluster.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// Fingerprint of the CA certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Certifies the key of a signing request for `node`. `sans` are further names and addresses under which its
    /// HTTPS API is reached. The names that the request asks for are ignored.
    pub fn issue_node(&self, node: NodeId, csr_pem: &str, sans: &[String]) -> Result<String, PkiError> {
        let failed = certificate_error("cannot certify the node");
        let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(&failed)?;
        if request.public_key.algorithm() != &PKCS_ED25519 {
            return Err(PkiError::Certificate {
                what: "cannot certify the node",
                reason: "node keys are Ed25519".to_owned(),
            });
        }
        let mut params = CertificateParams::new(vec![node.dns_name()]).map_err(&failed)?;
        for san in sans {
            let name = match san.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                // Only the issuer's own argument decides which node this is.
                Err(_) if NodeId::from_dns_name(san).is_some() => continue,
                Err(_) => SanType::DnsName(san.as_str().try_into().map_err(&failed)?),
            };
            params.subject_alt_names.push(name);
        }
        params.distinguished_name.push(DnType::CommonName, node.dns_name());
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        set_validity(&mut params);
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(&failed)?;
        Ok(params.signed_by(&request.public_key, &issuer).map_err(&failed)?.pem())
    }
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterCa").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

fn set_validity(params: &mut CertificateParams) {
    params.not_before = rcgen::date_time_ymd(VALID_YEARS.start, 1, 1);
    params.not_after = rcgen::date_time_ymd(VALID_YEARS.end, 1, 1);
}

pub(super) fn parse_certificate(pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| PkiError::Certificate { what: "cannot read a certificate", reason: e.to_string() })
}

/// SHA-256 of the CA certificate; a join token carries it so that a new node knows whom it talks to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Fingerprint([u8; 32]);

const FINGERPRINT_PREFIX: &str = "sha256:";

impl Fingerprint {
    /// Of a certificate in DER form.
    pub fn of(certificate: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }

    /// Of a certificate in PEM form.
    pub fn of_pem(certificate_pem: &str) -> Result<Self, PkiError> {
        Ok(Self::of(&parse_certificate(certificate_pem)?))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FINGERPRINT_PREFIX}{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        let digits = text.strip_prefix(FINGERPRINT_PREFIX).ok_or(PkiError::Fingerprint)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| PkiError::Fingerprint)?;
        Ok(Self(bytes))
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = PkiError;

    fn try_from(text: String) -> Result<Self, PkiError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{NodeKey, node_of_certificate};

    #[test]
    fn ca_survives_its_pem_and_refuses_a_foreign_key() {
        let ca = ClusterCa::create("lab").unwrap();
        let again = ClusterCa::from_pem(ca.cert_pem(), &ca.key_pem()).unwrap();
        assert_eq!(again.fingerprint(), ca.fingerprint());
        assert_eq!(ca.fingerprint().to_string().parse::<Fingerprint>().unwrap(), ca.fingerprint());
        let other = ClusterCa::create("lab").unwrap();
        assert!(ClusterCa::from_pem(ca.cert_pem(), &other.key_pem()).is_err());
        assert!("sha256:12".parse::<Fingerprint>().is_err());
    }

    #[test]
    fn a_request_cannot_choose_its_node() {
        let ca = ClusterCa::create("lab").unwrap();
        let (node, victim) = (NodeId::random(), NodeId::random());
        let csr = NodeKey::generate().unwrap().csr(&victim.dns_name()).unwrap();
        let pem =
            ca.issue_node(node, &csr, &["10.0.0.1".to_owned(), "n1".to_owned(), victim.dns_name()]).unwrap();
        assert_eq!(node_of_certificate(&parse_certificate(&pem).unwrap()), Some(node));
    }

    #[test]
    fn garbage_requests_are_errors() {
        let ca = ClusterCa::create("lab").unwrap();
        assert!(ca.issue_node(NodeId::random(), "garbage", &[]).is_err());
        let foreign = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let csr = CertificateParams::default().serialize_request(&foreign).unwrap().pem().unwrap();
        assert!(ca.issue_node(NodeId::random(), &csr, &[]).is_err());
    }
}
