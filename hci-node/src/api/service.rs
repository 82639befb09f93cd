//! The API without HTTP: a request in, a JSON answer or a problem out.
//!
//! Whatever concerns the cluster is answered by the leader: only it has the nodes' reports. Other nodes pass requests on
//! to it, once; without a leader they answer what they can read from their copy of the state.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout_at};

use super::{
    guest,
    problem::{Problem, ProblemKind},
    requests::{Context, not_found},
    types as api,
    views::{self, Views},
};
use crate::{
    control::{
        join::{
            admit::{self, Admission},
            protocol::{JoinRequest, ProofRequest},
            token::{Purpose, Secret, TokenString},
        },
        member::Member,
        replicated::ReplicationError,
    },
    state::{
        Availability, ClusterState, Command, DesiredRun, Node, NodeId, NodeService, Op, Outcome, Refusal,
        RefusalKind, StopMode, Task, TaskId, Timestamp, Token, TokenId, TokenKind, report::NodeReport,
    },
};

/// How long a join token is good when nothing was said: a day.
const USUAL_TOKEN_SECONDS: u64 = 24 * 3600;
/// Longest life of a token that can be asked for: ten years.
const MAX_TOKEN_SECONDS: u64 = 10 * 365 * 24 * 3600;
/// How long a request waits for a leader.
const ELECTION_PATIENCE: Duration = Duration::from_secs(5);
/// Pause before a request is sent again to a leader that could not be reached.
const FORWARD_PAUSE: Duration = Duration::from_millis(100);
/// How long is waited for nodes that have not said how they are.
const HEAR_PATIENCE: Duration = Duration::from_secs(3);
/// How long this node's copy of the state may take to show a command that was committed.
const CATCH_UP: Duration = Duration::from_secs(5);

/// A request, understood as far as HTTP goes.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    /// The method, in capitals.
    pub method: String,
    /// The path.
    pub path: String,
    /// The body.
    pub body: Bytes,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiResponse {
    /// HTTP status.
    pub status: u16,
    /// JSON.
    pub body: Bytes,
}

impl ApiResponse {
    /// A JSON answer.
    pub fn json<T: Serialize>(status: u16, value: &T) -> Result<Self, Problem> {
        let body = serde_json::to_vec(value).map_err(|error| {
            Problem::new(
                ProblemKind::Internal,
                format!("cannot write the answer: {error}"),
                "hci support bundle",
            )
        })?;
        Ok(Self { status, body: body.into() })
    }
}

impl From<Problem> for ApiResponse {
    fn from(problem: Problem) -> Self {
        let status = problem.status;
        // A problem is strings and numbers, which serialize.
        Self { status, body: serde_json::to_vec(&problem).unwrap_or_default().into() }
    }
}

/// Reads a JSON body; an empty one counts as an empty object.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let body: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| {
        Problem::new(
            ProblemKind::Invalid,
            format!("the body is not what is expected: {error}"),
            "see docs/api.md",
        )
    })
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal.kind {
            RefusalKind::NotFound => ProblemKind::NotFound,
            RefusalKind::Invalid => ProblemKind::Invalid,
            RefusalKind::Taken | RefusalKind::Conflict | RefusalKind::Fenced => ProblemKind::Conflict,
            RefusalKind::Capacity => ProblemKind::Capacity,
            RefusalKind::Unsafe => ProblemKind::Refused,
            RefusalKind::Token => ProblemKind::Forbidden,
        };
        Self::new(kind, refusal.detail, refusal.next)
    }
}

impl From<ReplicationError> for Problem {
    fn from(error: ReplicationError) -> Self {
        Self::new(ProblemKind::Unavailable, error.to_string(), "see which nodes are there: hci node list")
    }
}

/// The path's elements, percent-decoded.
fn elements(path: &str) -> Option<Vec<String>> {
    path.strip_prefix("/v1/")?.trim_end_matches('/').split('/').map(percent_decoded).collect()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

fn unknown_path(path: &str) -> Problem {
    Problem::new(ProblemKind::NotFound, format!("there is nothing at {path}"), "see docs/api.md")
}

/// Answers a request about the cluster on a member node; passes it on to the leader when that is another node. Waits a
/// little while the cluster elects one: the loss of a leader is a pause, not an error.
pub async fn answer(member: &Arc<Member>, request: ApiRequest) -> ApiResponse {
    let mut leadership = member.replicated.leadership();
    let deadline = Instant::now() + ELECTION_PATIENCE;
    loop {
        let known = timeout_at(deadline, leadership.wait_for(|leadership| leadership.leader.is_some())).await;
        let leader = known.ok().and_then(Result::ok).and_then(|leadership| leadership.leader);
        let result = match leader {
            Some(leader) if leader != member.id => match member.forward(leader, &request).await {
                Err(error) if error.may_repeat(&request) && Instant::now() < deadline => {
                    tokio::time::sleep(FORWARD_PAUSE).await;
                    continue;
                }
                forwarded => forwarded.map_err(Problem::from),
            },
            _ => answer_here(member, &request).await,
        };
        return result.unwrap_or_else(ApiResponse::from);
    }
}

/// Answers a request on this node, which leads or knows of no leader.
pub async fn answer_here(member: &Arc<Member>, request: &ApiRequest) -> Result<ApiResponse, Problem> {
    let elements = elements(&request.path).ok_or_else(|| unknown_path(&request.path))?;
    let path: Vec<&str> = elements.iter().map(String::as_str).collect();
    match request.method.as_str() {
        "GET" | "HEAD" => read(member, &path, &request.path),
        "POST" | "PATCH" | "DELETE" if member.replicated.leadership().borrow().leader.is_none() => {
            Err(Problem::new(
                ProblemKind::Unavailable,
                "the cluster has no leader now: no majority of its nodes answers",
                "wait a few seconds and try again; see which nodes are there: hci node list",
            ))
        }
        "POST" | "PATCH" | "DELETE" => write(member, request, &path).await,
        _ => Err(Problem::new(
            ProblemKind::MethodNotAllowed,
            format!("{} {} does not exist", request.method, request.path),
            "see docs/api.md",
        )),
    }
}

fn list<T: Serialize>(items: Vec<T>) -> Result<ApiResponse, Problem> {
    ApiResponse::json(200, &api::List { items })
}

fn read(member: &Arc<Member>, path: &[&str], full: &str) -> Result<ApiResponse, Problem> {
    let state = member.state();
    let reports = member.leader.reports();
    let members = member.replicated.members();
    let leader = member.replicated.leadership().borrow().leader;
    let etas = member.leader.etas();
    let views = Views { state: &state, reports: &reports, etas: &etas, members: &members, leader };
    match path {
        ["status"] => ApiResponse::json(200, &views.status()),
        ["cluster"] => match views.cluster() {
            Some(cluster) => ApiResponse::json(200, &cluster),
            None => Err(not_found("cluster", "")),
        },
        ["cluster", "tokens"] => list(state.tokens.values().map(views::token).collect()),
        ["nodes"] => list(state.nodes.values().map(|node| views.node(node)).collect()),
        ["nodes", name] => match state.find_node(name) {
            Some(node) => ApiResponse::json(200, &views.node(node)),
            None => Err(not_found("node", name)),
        },
        ["pool"] => ApiResponse::json(200, &views.pool()),
        ["disks"] => list(views.disks()),
        ["disks", id] => match views
            .disks()
            .into_iter()
            .find(|disk| disk.id.as_deref() == Some(*id) || *id == format!("{}:{}", disk.node, disk.path))
        {
            Some(disk) => ApiResponse::json(200, &disk),
            None => Err(not_found("disk", id)),
        },
        ["volumes"] => list(state.volumes.values().map(|volume| views.volume(volume)).collect()),
        ["volumes", name] => match state.find_volume(name) {
            Some(volume) => ApiResponse::json(200, &views.volume(volume)),
            None => Err(not_found("volume", name)),
        },
        ["volumes", name, "snapshots"] => match state.find_volume(name) {
            Some(volume) => list(views::volumes::snapshots(volume)),
            None => Err(not_found("volume", name)),
        },
        ["images"] => list(state.images.values().map(|image| views.image(image)).collect()),
        ["images", name] => match state.find_image(name) {
            Some(image) => ApiResponse::json(200, &views.image(image)),
            None => Err(not_found("image", name)),
        },
        ["networks"] => list(state.networks.values().map(|network| views.network(network)).collect()),
        ["networks", name] => match state.find_network(name) {
            Some(network) => ApiResponse::json(200, &views.network(network)),
            None => Err(not_found("network", name)),
        },
        ["vms"] => list(state.vms.values().map(|vm| views.vm(vm)).collect()),
        ["vms", name] => match state.find_vm(name) {
            Some(vm) => ApiResponse::json(200, &views.vm(vm)),
            None => Err(not_found("vm", name)),
        },
        ["tasks"] => {
            let mut tasks: Vec<_> = state.tasks.values().collect();
            tasks.sort_by_key(|task| (task.created, task.id));
            list(tasks.into_iter().map(views::task).collect())
        }
        ["tasks", id] => match id.parse().ok().and_then(|id: TaskId| state.tasks.get(&id)) {
            Some(task) => ApiResponse::json(200, &views::task(task)),
            None => Err(not_found("task", id)),
        },
        ["events"] => list(state.events.iter().map(views::event).collect()),
        _ => Err(unknown_path(full)),
    }
}

/// A leader that has just taken over has not heard of every node yet. What depends on what all of them have waits for that, but not for ever: a node that
/// is about to be lost says nothing.
async fn hear_all(member: &Member) {
    let deadline = Instant::now() + HEAR_PATIENCE;
    let is_there = |node: &&Node| node.availability == Availability::Available;
    while Instant::now() < deadline {
        let (state, reports) = (member.state(), member.leader.reports());
        if state.nodes.values().filter(is_there).all(|node| reports.contains_key(&node.id)) {
            return;
        }
        tokio::time::sleep(FORWARD_PAUSE).await;
    }
}

async fn write(member: &Arc<Member>, request: &ApiRequest, path: &[&str]) -> Result<ApiResponse, Problem> {
    if let ("POST", ["vms"] | ["vms", _, "migrate"]) | ("PATCH", ["vms", _]) = (request.method.as_str(), path)
    {
        hear_all(member).await;
    }
    let state = member.state();
    let reports: BTreeMap<NodeId, NodeReport> = member.leader.reports();
    let context = Context { state: &state, reports: &reports, silent: member.leader.silent(&state) };
    let body = &request.body;
    let op = match (request.method.as_str(), path) {
        ("POST", ["join"]) => return join(member, &state, &parse(body)?).await,
        ("POST", ["join", "proof"]) => {
            return ApiResponse::json(200, &admit::proof(&state, &parse::<ProofRequest>(body)?)?);
        }
        ("POST", ["cluster", "tokens"]) => return create_token(member, &state, &parse(body)?).await,
        ("DELETE", ["cluster", "tokens", id]) => {
            Op::RevokeToken(id.parse::<TokenId>().map_err(|_| not_found("token", id))?)
        }
        ("PATCH", ["pool"]) => context.set_pool(parse(body)?),
        ("POST", ["disks"]) => context.add_disk(parse(body)?)?,
        ("POST", ["disks", disk, "evict"]) => context.evict_disk(disk, parse(body)?)?,
        ("POST", ["disks", disk, "scrub"]) => context.scrub_disk(disk)?,
        ("POST", ["disks", disk, "resume"]) => context.resume_disk(disk)?,
        ("PATCH", ["nodes", node]) => context.set_node(node, parse(body)?)?,
        ("POST", ["nodes", node, "drain"]) => context.set_node_service(node, NodeService::Draining)?,
        ("POST", ["nodes", node, "resume"]) => context.set_node_service(node, NodeService::InService)?,
        ("POST", ["nodes", node, "evict"]) => context.set_node_service(node, NodeService::Leaving)?,
        ("PATCH", ["volumes", volume]) => context.set_volume(volume, parse(body)?)?,
        ("POST", ["volumes", volume, "grow"]) => context.grow_volume(volume, parse(body)?)?,
        ("POST", ["snapshots"]) => {
            let api::TakeSnapshots { name, volumes } = parse(body)?;
            context.take_snapshots(name, &volumes)?
        }
        ("POST", ["volumes", volume, "snapshots"]) => {
            context.take_snapshots(parse::<api::TakeSnapshot>(body)?.name, &[(*volume).to_owned()])?
        }
        ("DELETE", ["volumes", volume, "snapshots", snapshot]) => {
            context.delete_snapshot(volume, snapshot)?
        }
        ("POST", ["volumes", volume, "snapshots", snapshot, "restore"]) => {
            context.restore_snapshot(volume, snapshot)?
        }
        ("POST", ["volumes", volume, "snapshots", snapshot, "clone"]) => {
            context.clone_snapshot(volume, snapshot, parse::<api::CloneSnapshot>(body)?.name)?
        }
        ("POST", ["vms", vm, "snapshots"]) => {
            let op = context.take_vm_snapshot(vm, parse::<api::TakeSnapshot>(body)?.name)?;
            let vm = state.find_vm(vm).ok_or_else(|| not_found("vm", vm))?;
            return guest::snapshot(member, vm, op).await;
        }
        ("POST", ["volumes"]) => context.create_volume(parse(body)?),
        ("DELETE", ["volumes", name]) => {
            Op::DeleteVolume(state.find_volume(name).ok_or_else(|| not_found("volume", name))?.id)
        }
        ("POST", ["images"]) => context.create_image(parse(body)?),
        ("DELETE", ["images", name]) => {
            Op::DeleteImage(state.find_image(name).ok_or_else(|| not_found("image", name))?.id)
        }
        ("POST", ["networks"]) => context.create_network(parse(body)?)?,
        ("DELETE", ["networks", name]) => {
            Op::DeleteNetwork(state.find_network(name).ok_or_else(|| not_found("network", name))?.id)
        }
        ("PATCH", ["vms", vm]) => context.set_vm(vm, parse(body)?)?,
        ("POST", ["vms"]) => context.create_vm(parse(body)?)?,
        ("DELETE", ["vms", name]) => {
            Op::DeleteVm(state.find_vm(name).ok_or_else(|| not_found("vm", name))?.id)
        }
        ("POST", ["vms", vm, "disks"]) => context.attach_disk(vm, parse(body)?)?,
        ("POST", ["vms", vm, "disks", volume, "detach"]) => context.detach_disk(vm, volume, parse(body)?)?,
        ("POST", ["vms", vm, "nics"]) => context.attach_nic(vm, &parse(body)?)?,
        ("DELETE", ["vms", vm, "nics", nic]) => context.detach_nic(vm, nic)?,
        ("DELETE", ["vms", name, "migration"]) => {
            Op::CancelMigration(state.find_vm(name).ok_or_else(|| not_found("vm", name))?.id)
        }
        ("POST", ["vms", name, action]) => {
            let vm = state.find_vm(name).ok_or_else(|| not_found("vm", name))?.id;
            match *action {
                "start" => context.start_vm(name, parse(body)?)?,
                "stop" => {
                    let api::StopVm { force, discard_state } = parse(body)?;
                    let mode = if force { StopMode::Force } else { StopMode::Graceful };
                    let desired = DesiredRun::Stopped(mode);
                    match discard_state {
                        true => Op::DiscardSuspension { vm, desired },
                        false => Op::SetVmDesired { vm, desired },
                    }
                }
                "pause" => Op::PauseVm(vm),
                "resume" => context.resume_vm(name)?,
                "suspend" => context.suspend_vm(name)?,
                "migrate" => context.migrate_vm(name, parse(body)?)?,
                "restart" if parse::<api::RestartVm>(body)?.force => Op::ResetVm(vm),
                "restart" => Op::RestartVm(vm),
                _ => return Err(unknown_path(&request.path)),
            }
        }
        _ => return Err(unknown_path(&request.path)),
    };
    ask(member, op).await
}

/// Has something committed that somebody asked for; answers its task.
pub async fn ask(member: &Arc<Member>, op: Op) -> Result<ApiResponse, Problem> {
    let task = propose(member, op).await?;
    ApiResponse::json(202, &api::Accepted { task: views::task(&task) })
}

/// Has something committed that somebody asked for; returns its task.
pub(super) async fn propose(member: &Arc<Member>, op: Op) -> Result<Task, Problem> {
    let command = Command::asked(op);
    match member.replicated.propose(command).await?? {
        Outcome::Task(id) => task_of(member, id).await,
        other => Err(Problem::new(
            ProblemKind::Internal,
            format!("the change was made, but answered {other:?}"),
            "see it in the list",
        )),
    }
}

async fn task_of(member: &Arc<Member>, id: TaskId) -> Result<Task, Problem> {
    let mut state = member.replicated.state();
    let seen = tokio::time::timeout(CATCH_UP, state.wait_for(|state| state.tasks.contains_key(&id))).await;
    match seen {
        Ok(Ok(state)) => state.tasks.get(&id).cloned().ok_or_else(|| not_found("task", &id.to_string())),
        _ => Err(Problem::new(
            ProblemKind::Timeout,
            format!("the change was committed as task {id}, but this node does not see it yet"),
            format!("see it: hci task get {id}"),
        )),
    }
}

async fn create_token(
    member: &Arc<Member>,
    state: &ClusterState,
    request: &api::CreateToken,
) -> Result<ApiResponse, Problem> {
    let cluster = state.cluster.as_ref().ok_or_else(|| not_found("cluster", ""))?;
    let now = Timestamp::now();
    let uses = request.uses.unwrap_or(1);
    let invalid = |detail: &str, next: &str| Err(Problem::new(ProblemKind::Invalid, detail, next));
    if !(1..=1000).contains(&uses) {
        return invalid("a token has 1 to 1000 uses", "use --uses 1");
    }
    let seconds = match (request.kind, request.ttl_seconds) {
        (_, Some(0)) => return invalid("a token that has expired lets nobody in", "use --expires 1h"),
        (_, Some(seconds)) => Some(seconds),
        (api::TokenPurpose::Join, None) => Some(USUAL_TOKEN_SECONDS),
        (api::TokenPurpose::Admin, None) => None,
    };
    let expires = seconds.map(|seconds| {
        let seconds = seconds.min(MAX_TOKEN_SECONDS);
        now.plus_seconds(i64::try_from(seconds).unwrap_or(i64::MAX))
    });
    let (kind, purpose) = match request.kind {
        api::TokenPurpose::Join => (TokenKind::Join { uses_left: uses }, Purpose::Join),
        api::TokenPurpose::Admin => (TokenKind::Admin, Purpose::Admin),
    };
    let secret = Secret::generate()
        .map_err(|error| Problem::new(ProblemKind::Internal, error.to_string(), "try again"))?;
    let token = Token {
        id: TokenId::random(),
        kind,
        secret: secret.hash(),
        created: now,
        expires,
        used_by: Default::default(),
    };
    let text = TokenString {
        purpose,
        id: token.id,
        secret,
        ca: cluster.ca_fingerprint.parse().map_err(|_| {
            Problem::new(ProblemKind::Internal, "the CA's fingerprint cannot be read", "hci support bundle")
        })?,
        addresses: state.nodes.values().map(|node| node.addresses.api).collect(),
    };
    let info = views::token(&token);
    ask(member, Op::CreateToken(token)).await?;
    ApiResponse::json(200, &api::TokenCreated { token: text.encode(), info })
}

async fn join(
    member: &Arc<Member>,
    state: &ClusterState,
    request: &JoinRequest,
) -> Result<ApiResponse, Problem> {
    let answer = match admit::check(state, request, Timestamp::now())? {
        Admission::Member(answer) => answer,
        Admission::Propose(op) => {
            member
                .replicated
                .propose(Command::now(*op))
                .await?
                .map_err(|refusal| admit::refused(&refusal))?;
            let mut states = member.replicated.state();
            let joined = tokio::time::timeout(
                CATCH_UP,
                states.wait_for(|state| state.nodes.contains_key(&request.node)),
            );
            let state = match joined.await {
                Ok(Ok(state)) => state.clone(),
                _ => {
                    return Err(Problem::new(
                        ProblemKind::Timeout,
                        "the node is a member, but not seen yet",
                        "join again",
                    ));
                }
            };
            let (Some(cluster), Some(node)) = (&state.cluster, state.nodes.get(&request.node)) else {
                return Err(not_found("node", &request.name));
            };
            admit::answer(&state, cluster, &node.certificate_pem)
        }
    };
    ApiResponse::json(200, &answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart_and_bad_ones_refused() {
        assert_eq!(
            elements("/v1/vms/web%201/start"),
            Some(vec!["vms".into(), "web 1".into(), "start".into()])
        );
        for bad in ["/v2/vms", "/v1/%", "/v1/%zz", "/v1/%ff"] {
            assert_eq!(elements(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_empty_body_is_an_empty_object_and_unknown_fields_are_named() {
        assert!(!parse::<api::StopVm>(b"").unwrap().force);
        let problem = parse::<api::StopVm>(b"{\"forced\":true}").unwrap_err();
        assert!(problem.detail.contains("forced"), "{problem}");
    }
}
