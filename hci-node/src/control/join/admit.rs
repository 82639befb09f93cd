//! The cluster's side of joining. It runs on the leader.
//!
//! The certificate is issued before the command that makes the node a member: a node whose answer is lost asks again
//! with the same key and gets the certificate that is stored. Nothing is kept of a request that is refused.

use netfabric::pki::ClusterCa;
use x509_parser::{certification_request::X509CertificationRequest, pem::parse_x509_pem, prelude::FromDer};

use super::{
    protocol::{JoinAnswer, JoinMember, JoinRequest, ProofAnswer, ProofRequest},
    token::prove,
};
use crate::{
    api::problem::{Problem, ProblemKind},
    state::{
        Cluster, ClusterState, Op, RefusalKind, Timestamp, Token, TokenId, TokenKind, check_join_token,
        command::NewNode,
    },
};

/// Largest difference of clocks. Certificates, token lifetimes and the order of events in logs depend on them.
const MAX_CLOCK_SKEW_MS: i64 = 30_000;

/// A wrong id and a wrong secret look the same from outside.
fn wrong_token() -> Problem {
    Problem::new(
        ProblemKind::Forbidden,
        "the token is wrong: this cluster did not issue it, or revoked it",
        "make a new one on a member: hci cluster token create",
    )
}

fn no_cluster() -> Problem {
    Problem::new(ProblemKind::Unavailable, "this node is in no cluster", "hci cluster create NAME")
}

/// Answers a proof request.
pub fn proof(state: &ClusterState, request: &ProofRequest) -> Result<ProofAnswer, Problem> {
    let cluster = state.cluster.as_ref().ok_or_else(no_cluster)?;
    let token = join_token(state, request.token).ok_or_else(wrong_token)?;
    let ca = cluster.ca_fingerprint.parse().map_err(|_| broken("the CA's fingerprint cannot be read"))?;
    let proof = prove(&token.secret, &request.nonce, &ca);
    Ok(ProofAnswer { ca_pem: cluster.ca_cert_pem.clone(), proof })
}

fn join_token(state: &ClusterState, id: TokenId) -> Option<&Token> {
    state.tokens.get(&id).filter(|token| matches!(token.kind, TokenKind::Join { .. }))
}

fn broken(detail: &str) -> Problem {
    Problem::new(ProblemKind::Internal, detail, "see the log: journalctl -u hci-node")
}

/// What a join request leads to.
#[derive(Debug)]
pub enum Admission {
    /// The command that makes the node a member; answer with the certificate in it once it is applied.
    Propose(Box<Op>),
    /// It is a member already; this is the answer.
    Member(JoinAnswer),
}

/// Checks a join request and issues the certificate.
pub fn check(state: &ClusterState, request: &JoinRequest, now: Timestamp) -> Result<Admission, Problem> {
    let cluster = state.cluster.as_ref().ok_or_else(no_cluster)?;
    let token = join_token(state, request.token).ok_or_else(wrong_token)?;
    if !request.secret.matches(&token.secret) {
        return Err(wrong_token());
    }
    let skew = now.0.saturating_sub(request.clock);
    if skew.abs() > MAX_CLOCK_SKEW_MS {
        let (seconds, word) = (skew.abs() / 1000, if skew > 0 { "behind" } else { "ahead of" });
        return Err(Problem::new(
            ProblemKind::Refused,
            format!("the clock of {} is {seconds} s {word} the cluster's", request.name),
            "set the clock (timedatectl set-time, or a time server), then join again",
        ));
    }
    let key = public_key(&request.csr_pem)?;
    if let Some(member) = state.nodes.get(&request.node)
        && member.public_key_pem == key
    {
        return Ok(Admission::Member(answer(state, cluster, &member.certificate_pem)));
    }
    check_join_token(token, request.node, now)
        .map_err(|refusal| Problem::new(ProblemKind::Forbidden, refusal.detail, refusal.next))?;
    if state.nodes.values().any(|node| node.name == request.name) {
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!("the cluster has a node named {} already", request.name),
            "join with another name: hci cluster join TOKEN --node-name NAME",
        ));
    }
    let ca = ClusterCa::from_pem(&cluster.ca_cert_pem, &cluster.ca_key_pem.0)
        .map_err(|error| broken(&format!("the cluster's CA cannot be used: {error}")))?;
    let mut sans = vec![request.addresses.api.ip().to_string()];
    let control = request.addresses.control.ip().to_string();
    if !sans.contains(&control) {
        sans.push(control);
    }
    let certificate_pem = ca.issue_node(request.node, &request.csr_pem, &sans).map_err(|error| {
        Problem::new(
            ProblemKind::Invalid,
            format!("the signing request is not usable: {error}"),
            "join again",
        )
    })?;
    let node = NewNode {
        id: request.node,
        name: request.name.clone(),
        addresses: request.addresses,
        public_key_pem: key,
        certificate_pem,
    };
    Ok(Admission::Propose(Box::new(Op::AddNode { node, token: request.token })))
}

/// The answer to a node that is a member.
pub fn answer(state: &ClusterState, cluster: &Cluster, certificate_pem: &str) -> JoinAnswer {
    let member = |node: &crate::state::Node| JoinMember { node: node.id, addresses: node.addresses };
    JoinAnswer {
        cluster: cluster.name.clone(),
        certificate_pem: certificate_pem.to_owned(),
        ca_pem: cluster.ca_cert_pem.clone(),
        members: state.nodes.values().map(member).collect(),
    }
}

/// The public key of a signing request, as hex: by it a node that asks again is known.
pub fn public_key(csr_pem: &str) -> Result<String, Problem> {
    let unusable = || Problem::new(ProblemKind::Invalid, "the signing request cannot be read", "join again");
    let (_, pem) = parse_x509_pem(csr_pem.as_bytes()).map_err(|_| unusable())?;
    let (_, csr) = X509CertificationRequest::from_der(&pem.contents).map_err(|_| unusable())?;
    Ok(hex::encode(csr.certification_request_info.subject_pki.subject_public_key.data.as_ref()))
}

/// Whether a refused `AddNode` was a race that the checks above would have caught.
pub fn refused(refusal: &crate::state::Refusal) -> Problem {
    let kind = match refusal.kind {
        RefusalKind::Token => ProblemKind::Forbidden,
        RefusalKind::Invalid => ProblemKind::Invalid,
        _ => ProblemKind::Conflict,
    };
    Problem::new(kind, &refusal.detail, &refusal.next)
}

#[cfg(test)]
mod tests {
    use netfabric::pki::NodeKey;

    use super::*;
    use crate::{
        control::join::token::Secret,
        state::{CaKey, Command, testing::*},
    };

    const NOW: Timestamp = Timestamp(1_000_000);

    fn world(uses: u32) -> (ClusterState, Secret) {
        let ca = ClusterCa::create("prod").unwrap();
        let secret = Secret::from_phrase("open sesame");
        let mut create = create_cluster();
        if let Op::CreateCluster { cluster, join, .. } = &mut create.op {
            cluster.ca_cert_pem = ca.cert_pem().to_owned();
            cluster.ca_key_pem = CaKey(ca.key_pem());
            cluster.ca_fingerprint = ca.fingerprint().to_string();
            let mut token = token(3, TokenKind::Join { uses_left: uses });
            token.id = secret.agreed_id();
            token.secret = secret.hash();
            token.expires = Some(NOW.plus_seconds(60));
            *join = Some(token);
        }
        let mut state = ClusterState::default();
        state.apply(&create).unwrap();
        (state, secret)
    }

    fn request(n: u128, secret: &Secret) -> JoinRequest {
        let node = new_node(n);
        JoinRequest {
            token: secret.agreed_id(),
            secret: secret.clone(),
            node: node.id,
            name: node.name,
            addresses: node.addresses,
            csr_pem: NodeKey::generate().unwrap().csr("node").unwrap(),
            clock: NOW.0,
        }
    }

    fn join(state: &mut ClusterState, request: &JoinRequest, now: Timestamp) -> Result<String, Problem> {
        match check(state, request, now)? {
            Admission::Member(answer) => Ok(answer.certificate_pem),
            Admission::Propose(op) => {
                let Op::AddNode { node, .. } = op.as_ref() else { panic!("another command") };
                let certificate = node.certificate_pem.clone();
                let command = Command { at: now, task: None, op: *op };
                state.apply(&command).map_err(|refusal| refused(&refusal))?;
                Ok(certificate)
            }
        }
    }

    #[test]
    fn a_lost_answer_is_given_again() {
        let (mut state, secret) = world(1);
        let request = request(2, &secret);
        let first = join(&mut state, &request, NOW).unwrap();
        assert_eq!(join(&mut state, &request, NOW).unwrap(), first);
        assert_eq!(state.nodes.len(), 2);
    }

    #[test]
    fn each_bad_join_has_an_error_of_its_own_and_leaves_nothing() {
        let (mut state, secret) = world(1);
        let good = request(2, &secret);
        let mut said = std::collections::BTreeSet::new();
        let mut refuse = |state: &mut ClusterState, request: &JoinRequest, now, word: &str| {
            let before = state.clone();
            let problem = join(state, request, now).unwrap_err();
            assert!(problem.detail.contains(word), "{problem}");
            assert!(!problem.next.is_empty());
            assert_eq!(*state, before);
            said.insert(problem.detail);
        };
        let wrong = JoinRequest { secret: Secret::from_phrase("x"), ..good.clone() };
        refuse(&mut state, &wrong, NOW, "wrong");
        let slow = JoinRequest { clock: NOW.0 - 31_000, ..good.clone() };
        refuse(&mut state, &slow, NOW, "31 s behind");
        let late = JoinRequest { clock: NOW.plus_seconds(61).0, ..good.clone() };
        refuse(&mut state, &late, NOW.plus_seconds(61), "expired");
        let twin = JoinRequest { name: "n1".into(), ..good.clone() };
        refuse(&mut state, &twin, NOW, "n1 already");
        let garbage = JoinRequest { csr_pem: "garbage".into(), ..good.clone() };
        refuse(&mut state, &garbage, NOW, "signing request");
        join(&mut state, &good, NOW).unwrap();
        let third = request(3, &secret);
        refuse(&mut state, &third, NOW, "used up");
        let other_key = JoinRequest { csr_pem: third.csr_pem.clone(), ..good };
        refuse(&mut state, &other_key, NOW, "already");
        assert_eq!(said.len(), 7);
    }

    #[test]
    fn the_cluster_proves_that_it_knows_the_token() {
        let (state, secret) = world(1);
        let nonce = [7; 32];
        let answer = proof(&state, &ProofRequest { token: secret.agreed_id(), nonce }).unwrap();
        let ca = netfabric::pki::Fingerprint::of_pem(&answer.ca_pem).unwrap();
        assert!(super::super::token::is_proven(&secret.hash(), &nonce, &ca, &answer.proof));
        assert!(proof(&state, &ProofRequest { token: TokenId::random(), nonce }).is_err());
    }
}
