//! The cluster, its nodes and its tokens.

use super::{Applied, check_name, conflict, disks, not_found, tasks};
use crate::state::{
    Availability, Cluster, ClusterState, DiskService, Goal, Node, NodeAddresses, NodeId, NodeService,
    Refusal, RefusalKind, Severity, Subject, TaskError, Timestamp, Token, TokenId, TokenKind, Volume,
    command::NewNode,
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
        rack: None,
        service: NodeService::InService,
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
    if state.removed_nodes.contains(&node.id) {
        return Err(conflict(
            "this node has left the cluster for good",
            "install it anew, then join: hci cluster join TOKEN",
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

pub(super) fn set_rack(state: &mut ClusterState, id: NodeId, rack: Option<&str>) -> Result<Applied, Refusal> {
    if let Some(rack) = rack {
        check_name("rack", rack)?;
    }
    let node = state.nodes.get_mut(&id).ok_or_else(|| not_found("node", id))?;
    node.rack = rack.map(str::to_owned);
    Ok(Applied::now("node set", Subject::Node(id), &node.name))
}

pub(super) fn set_service(
    state: &mut ClusterState,
    id: NodeId,
    service: NodeService,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let node = state.nodes.get(&id).ok_or_else(|| not_found("node", id))?;
    let (name, before, lost) = (node.name.clone(), node.service, node.is_lost());
    let others =
        state.nodes.values().filter(|other| other.id != id && other.service == NodeService::InService);
    if service != NodeService::InService && others.count() == 0 {
        return Err(conflict(
            format!("there is no other node in service that could take over from {name}"),
            "let another node join, or resume one: hci node list",
        ));
    }
    let disks: Vec<_> =
        state.disks.values().filter(|disk| disk.node == id).map(|disk| (disk.id, disk.service)).collect();
    let (kind, goal) = match service {
        NodeService::InService => ("node resume", Goal::Applied),
        NodeService::Draining => ("node drain", Goal::NodeDrained(id)),
        NodeService::Leaving => {
            let segments = disks.iter().map(|(disk, _)| state.segments_on(*disk)).sum();
            ("node evict", Goal::NodeGone { node: id, segments })
        }
    };
    // The disks of a lost node cannot be emptied: either each copy is elsewhere too, or the node has to come back.
    let disk_service = match (service, lost) {
        (NodeService::Leaving, true) => {
            let ids: Vec<_> = disks.iter().map(|(disk, _)| *disk).collect();
            disks::check_dispensable(state, &ids)?;
            Some(DiskService::Dead)
        }
        (NodeService::Leaving, false) => Some(DiskService::Draining),
        (NodeService::InService, _) if before == NodeService::Leaving => Some(DiskService::InService),
        _ => None,
    };
    for (disk, present) in disks {
        if let Some(wanted) = disk_service
            && present != DiskService::Dead
        {
            disks::set(state, disk, wanted, at);
        }
    }
    if let Some(node) = state.nodes.get_mut(&id) {
        node.service = service;
    }
    if before != service {
        let (kind, message) = match service {
            NodeService::InService => ("node-in-service", format!("node {name} is in service again")),
            NodeService::Draining => ("node-draining", format!("node {name} is emptied of VMs")),
            NodeService::Leaving => ("node-leaving", format!("node {name} is emptied and leaves")),
        };
        state.note(at, Severity::Info, kind, Subject::Node(id), message);
        if service == NodeService::InService {
            let stays = TaskError {
                detail: format!("node {name} was put in service again"),
                next: format!("see it: hci node get {name}"),
            };
            tasks::settle_where(state, |goal| is_about(goal, id), Some(&stays), at);
        }
    }
    Ok(Applied::now(kind, Subject::Node(id), name).until(goal))
}

fn is_about(goal: &Goal, id: NodeId) -> bool {
    matches!(goal, Goal::NodeDrained(node) | Goal::NodeGone { node, .. } if *node == id)
}

pub(super) fn remove_node(state: &mut ClusterState, id: NodeId, at: Timestamp) -> Result<Applied, Refusal> {
    let done = Applied::now("node remove", Subject::Node(id), "");
    let Some(node) = state.nodes.get(&id) else { return Ok(done) };
    let name = node.name.clone();
    if node.service != NodeService::Leaving {
        return Err(conflict(format!("node {name} is not meant to leave"), format!("hci node evict {name}")));
    }
    let lost = node.is_lost();
    let is_open_there = |volume: &Volume| volume.coordinator == Some(id);
    if state.vms_on(id).next().is_some()
        || state.vms_arriving(id).next().is_some()
        || state.disks.values().any(|disk| disk.node == id)
        || (!lost && state.volumes.values().any(is_open_there))
    {
        return Err(conflict(format!("node {name} still carries VMs or data"), "wait until it is empty"));
    }
    for vm in state.vms.values_mut().filter(|vm| vm.preferred_node == Some(id)) {
        vm.preferred_node = None;
    }
    // Of a lost node only: its lease has ended, so nobody has them open any more.
    for volume in state.volumes.values_mut().filter(|volume| volume.coordinator == Some(id)) {
        volume.coordinator = None;
    }
    state.nodes.remove(&id);
    state.removed_nodes.insert(id);
    let message = format!("node {name} has left the cluster");
    state.note(at, Severity::Info, "node-removed", Subject::Cluster, message);
    tasks::settle_where(state, |goal| is_about(goal, id), None, at);
    Ok(done)
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
