//! The cluster, its nodes and its tokens.

use super::{Applied, check_name, conflict, not_found};
use crate::state::{
    Availability, Cluster, ClusterState, Node, NodeAddresses, NodeId, Refusal, RefusalKind, Severity,
    Subject, Timestamp, Token, TokenId, TokenKind, command::NewNode,
};

pub(super) fn create(
    state: &mut ClusterState,
    cluster: &Cluster,
    node: &NewNode,
    admin: &Token,
    join: Option<&Token>,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    if let Some(present) = &state.cluster {
        if present.id == cluster.id {
            return Ok(Applied::now("cluster create", Subject::Cluster, &cluster.name));
        }
        return Err(conflict(
            format!("this node is in the cluster {} already", present.name),
            "see it: hci cluster get",
        ));
    }
    check_name("cluster", &cluster.name)?;
    check_name("node", &node.name)?;
    state.cluster = Some(cluster.clone());
    state.next_vni = 1;
    state.nodes.insert(node.id, member(node, at));
    for token in std::iter::once(admin).chain(join) {
        state.tokens.insert(token.id, token.clone());
    }
    let message = format!("cluster {} was created on {}", cluster.name, node.name);
    state.note(at, Severity::Info, "cluster-created", Subject::Cluster, message);
    Ok(Applied::now("cluster create", Subject::Cluster, &cluster.name))
}

fn member(node: &NewNode, at: Timestamp) -> Node {
    Node {
        id: node.id,
        name: node.name.clone(),
        addresses: node.addresses,
        public_key_pem: node.public_key_pem.clone(),
        certificate_pem: node.certificate_pem.clone(),
        joined: at,
        availability: Availability::Available,
    }
}

/// Whether a token lets a node in now. The leader asks before it issues a certificate, `apply` asks again.
pub fn check_join_token(token: &Token, node: NodeId, at: Timestamp) -> Result<(), Refusal> {
    let next = "make a new one on a member: hci cluster token create";
    let refuse = |detail: &str| Err(Refusal::new(RefusalKind::Token, detail, next));
    let TokenKind::Join { uses_left } = token.kind else {
        return refuse("this token is for the API, not for joining");
    };
    if token.expires.is_some_and(|end| end <= at) {
        return refuse("the token has expired");
    }
    if uses_left == 0 && !token.used_by.contains(&node) {
        return refuse("the token is used up");
    }
    Ok(())
}

pub(super) fn add_node(
    state: &mut ClusterState,
    node: &NewNode,
    token: TokenId,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    if let Some(present) = state.nodes.get(&node.id) {
        if present.public_key_pem == node.public_key_pem {
            return Ok(Applied::now("node join", Subject::Node(node.id), &present.name));
        }
        return Err(conflict(
            format!("node {} is a member with another key", present.name),
            "remove the identity of the joining node and join again",
        ));
    }
    check_name("node", &node.name)?;
    if state.nodes.values().any(|other| other.name == node.name) {
        return Err(Refusal::new(
            RefusalKind::Taken,
            format!("the cluster has a node named {} already", node.name),
            "join with another name: hci cluster join TOKEN --name NAME",
        ));
    }
    if let Some(other) = state.nodes.values().find(|other| other.addresses.control == node.addresses.control)
    {
        return Err(Refusal::new(
            RefusalKind::Taken,
            format!("node {} has the address {} already", other.name, node.addresses.control),
            "give the joining node an address of its own",
        ));
    }
    let entry = state.tokens.get_mut(&token).ok_or_else(|| {
        Refusal::new(RefusalKind::Token, "the token was revoked", "make a new one: hci cluster token create")
    })?;
    check_join_token(entry, node.id, at)?;
    if let TokenKind::Join { uses_left } = &mut entry.kind {
        *uses_left -= 1;
    }
    entry.used_by.insert(node.id);
    state.nodes.insert(node.id, member(node, at));
    let message = format!("node {} joined", node.name);
    state.note(at, Severity::Info, "node-joined", Subject::Node(node.id), message);
    Ok(Applied::now("node join", Subject::Node(node.id), &node.name))
}

pub(super) fn set_addresses(
    state: &mut ClusterState,
    id: NodeId,
    addresses: NodeAddresses,
) -> Result<Applied, Refusal> {
    let node = state.nodes.get_mut(&id).ok_or_else(|| not_found("node", id))?;
    node.addresses = addresses;
    Ok(Applied::now("node set", Subject::Node(id), &node.name))
}

pub(super) fn set_availability(
    state: &mut ClusterState,
    id: NodeId,
    availability: Availability,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let node = state.nodes.get_mut(&id).ok_or_else(|| not_found("node", id))?;
    let name = node.name.clone();
    let before = std::mem::replace(&mut node.availability, availability);
    match (before, availability) {
        (Availability::Available, Availability::Lost { .. }) => {
            let message = format!("node {name} is lost: its lease ran out, its VMs start elsewhere");
            state.note(at, Severity::Critical, "node-lost", Subject::Node(id), message);
        }
        (Availability::Lost { since }, Availability::Available) => {
            let seconds = (at.0 - since.0).max(0) / 1000;
            let message = format!("node {name} is back after {seconds} s");
            state.note(at, Severity::Info, "node-returned", Subject::Node(id), message);
        }
        _ => {}
    }
    Ok(Applied::now("node availability", Subject::Node(id), name))
}

pub(super) fn create_token(state: &mut ClusterState, token: &Token) -> Result<Applied, Refusal> {
    state.tokens.entry(token.id).or_insert_with(|| token.clone());
    Ok(Applied::now("cluster token create", Subject::Token(token.id), token.id.to_string()))
}

pub(super) fn revoke_token(state: &mut ClusterState, id: TokenId) -> Result<Applied, Refusal> {
    let admins = state.tokens.values().filter(|token| token.kind == TokenKind::Admin).count();
    let token = state.tokens.get(&id).ok_or_else(|| not_found("token", id))?;
    if token.kind == TokenKind::Admin && admins == 1 {
        return Err(conflict("this is the last admin token", "create another one first"));
    }
    state.tokens.remove(&id);
    Ok(Applied::now("cluster token delete", Subject::Token(id), id.to_string()))
}
