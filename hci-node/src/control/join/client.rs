//! The joining node's side.
//!
//! The node keeps the key and the id that it asks with until it has its certificate, so that asking again after a lost
//! answer, or after a restart, is the same request. Its identity is stored last and in one step: before that it is in
//! no cluster, after it in this one.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use netfabric::pki::{Fingerprint, Identity, NodeKey};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{net::TcpStream, time::timeout};

use super::{
    protocol::{JoinAnswer, JoinRequest, ProofAnswer, ProofRequest},
    token::{Secret, TokenString, is_proven, random},
};
use crate::{
    api::problem::{Problem, ProblemKind},
    pinned_tls,
    state::{NodeAddresses, NodeId, Timestamp, TokenId},
};

/// How long one address may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Largest answer that is read.
const MAX_ANSWER: usize = 1 << 20;
const CANDIDATE_FILE: &str = "joining.json";

/// Where and with what to join.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// The token.
    pub token: TokenId,
    /// Its secret.
    pub secret: Secret,
    /// The CA of the cluster; none when it is to be proven by the secret.
    pub ca: Option<Fingerprint>,
    /// Where the API is; tried in order.
    pub addresses: Vec<SocketAddr>,
}

impl From<TokenString> for Invitation {
    fn from(token: TokenString) -> Self {
        Self { token: token.id, secret: token.secret, ca: Some(token.ca), addresses: token.addresses }
    }
}

/// The id and key that a node asks with.
#[derive(Serialize, Deserialize)]
struct Candidate {
    node: NodeId,
    key_pem: String,
}

fn local(detail: impl std::fmt::Display) -> Problem {
    Problem::new(ProblemKind::Internal, format!("the node cannot join: {detail}"), "see the log of hci-node")
}

fn unreachable(address: SocketAddr, why: impl std::fmt::Display) -> Problem {
    Problem::new(
        ProblemKind::Unavailable,
        format!("cannot join through {address}: {why}"),
        "check that this address can be reached from here and that the token is from this cluster",
    )
}

fn candidate(identity_dir: &Path) -> Result<Candidate, Problem> {
    let path = identity_dir.join(CANDIDATE_FILE);
    if let Ok(text) = fs::read(&path)
        && let Ok(candidate) = serde_json::from_slice(&text)
    {
        return Ok(candidate);
    }
    let key = NodeKey::generate().map_err(local)?;
    let fresh = Candidate { node: NodeId::random(), key_pem: key.pem() };
    let text = serde_json::to_vec(&fresh).map_err(local)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(identity_dir).map_err(local)?;
    // What an earlier crash left here could not be read.
    let _ = fs::remove_file(&path);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(local)?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(local)?;
    Ok(fresh)
}

/// Joins a cluster: the identity is stored when this returns. Also answers the cluster's members.
pub async fn join(
    invitation: &Invitation,
    identity_dir: &Path,
    name: &str,
    addresses: NodeAddresses,
) -> Result<(Identity, JoinAnswer), Problem> {
    let candidate = candidate(identity_dir)?;
    let key = NodeKey::from_pem(&candidate.key_pem).map_err(local)?;
    let mut last = Problem::new(ProblemKind::Invalid, "the token carries no address", "make a new token");
    for address in &invitation.addresses {
        let request = JoinRequest {
            token: invitation.token,
            secret: invitation.secret.clone(),
            node: candidate.node,
            name: name.to_owned(),
            addresses,
            csr_pem: key.csr(name).map_err(local)?,
            clock: Timestamp::now().0,
        };
        match timeout(DEADLINE, ask(invitation, *address, &request)).await {
            Ok(Ok((answer, ca))) => {
                let identity = Identity::new(&key, &answer.certificate_pem, &answer.ca_pem).map_err(local)?;
                if identity.ca_fingerprint().map_err(local)? != ca || identity.node() != candidate.node {
                    return Err(local("the certificate that came back is for something else"));
                }
                identity.store(identity_dir).map_err(local)?;
                // The identity is complete; what it was made from is of no use any more.
                let _ = fs::remove_file(identity_dir.join(CANDIDATE_FILE));
                return Ok((identity, answer));
            }
            // The cluster itself has refused; another address is the same cluster.
            Ok(Err(problem)) if !problem.is(ProblemKind::Unavailable) => return Err(problem),
            Ok(Err(problem)) => last = problem,
            Err(_) => last = unreachable(*address, format!("no answer within {} s", DEADLINE.as_secs())),
        }
    }
    Err(last)
}

async fn ask(
    invitation: &Invitation,
    address: SocketAddr,
    request: &JoinRequest,
) -> Result<(JoinAnswer, Fingerprint), Problem> {
    let ca = match invitation.ca {
        Some(ca) => ca,
        None => learn_ca(invitation, address).await?,
    };
    Ok((post(address, Some(ca), "/v1/join", request).await?, ca))
}

/// Learns the CA's fingerprint from a server that proves that it knows the token. Whoever stands in between can pass
/// the proof on, but it holds for the cluster's own CA only, which is pinned from then on.
async fn learn_ca(invitation: &Invitation, address: SocketAddr) -> Result<Fingerprint, Problem> {
    let nonce = random().map_err(local)?;
    let request = ProofRequest { token: invitation.token, nonce };
    let answer: ProofAnswer = post(address, None, "/v1/join/proof", &request).await?;
    let ca = Fingerprint::of_pem(&answer.ca_pem).map_err(|error| unreachable(address, error))?;
    if !is_proven(&invitation.secret.hash(), &nonce, &ca, &answer.proof) {
        return Err(Problem::new(
            ProblemKind::Forbidden,
            format!("{address} does not know the join secret"),
            "check the address and the secret in the answer file",
        ));
    }
    Ok(ca)
}

async fn post<Q: Serialize, A: DeserializeOwned>(
    address: SocketAddr,
    ca: Option<Fingerprint>,
    path: &str,
    body: &Q,
) -> Result<A, Problem> {
    let failed = |why: &dyn std::fmt::Display| unreachable(address, why);
    let tcp = TcpStream::connect(address).await.map_err(|error| failed(&error))?;
    let tls = match ca {
        Some(ca) => pinned_tls::connect(tcp, ca).await,
        None => pinned_tls::connect_unverified(tcp).await,
    }
    .map_err(|error| failed(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|error| failed(&error))?;
    // Ends with this exchange: it owns the only connection.
    let connection = tokio::spawn(connection);
    let request = Request::post(path)
        .header(header::HOST, address.to_string())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(serde_json::to_vec(body).map_err(local)?)))
        .map_err(local)?;
    let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
    let status = response.status();
    let bytes = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| failed(&error))?
        .to_bytes();
    drop(sender);
    connection.abort();
    if status.is_success() {
        return serde_json::from_slice(&bytes).map_err(|_| failed(&"it answered something else"));
    }
    match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => Err(problem),
        Err(_) => Err(failed(&status)),
    }
}
