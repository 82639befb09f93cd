//! Which node a certificate belongs to.

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

use crate::NodeId;

/// The node that a certificate names; none unless it names exactly one. Says nothing about who issued it: call this
/// on certificates that TLS has verified against our CA.
pub fn node_of_certificate(certificate: &CertificateDer<'_>) -> Option<NodeId> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut nodes = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => NodeId::from_dns_name(name),
        _ => None,
    });
    let node = nodes.next()?;
    nodes.next().is_none().then_some(node)
}
