//! Whole control processes on loopback addresses of their own: forming clusters, the API, restarts, the leader's loss.

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{join::token::TokenString, options::Args};
use crate::{
    data::{self, EngineOptions},
    paths::NodePaths,
    pinned_tls,
};

/// Long enough for a loaded machine; every wait ends as soon as it may.
const PATIENCE: Duration = Duration::from_secs(60);

struct Node {
    args: Args,
    dir: PathBuf,
    shutdown: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

/// A machine room: a directory, and a range of loopback addresses that nobody else uses.
struct Room {
    dir: tempfile::TempDir,
    net: [u8; 2],
}

impl Room {
    fn new() -> Self {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        Self { dir: tempfile::tempdir().unwrap(), net: [a.clamp(1, 250), b] }
    }

    async fn node(&self, n: u8) -> Node {
        let ip = Ipv4Addr::new(127, self.net[0], self.net[1], n);
        let at = |port| Some((ip, port).into());
        let dir = self.dir.path().join(format!("n{n}"));
        let args = Args {
            config: None,
            state: Some(dir.join("state")),
            run: Some(dir.join("run")),
            advertise: Some(ip.into()),
            node_name: Some(format!("n{n}")),
            listen_control: at(7400),
            listen_storage: at(7401),
            listen_frames: at(7402),
            listen_api: at(7443),
            link_mtu: None,
        };
        std::fs::create_dir_all(dir.join("state")).unwrap();
        let (shutdown, task) = start(&args);
        let node = Node { args, dir, shutdown, task };
        node.answers().await;
        node
    }
}

fn start(args: &Args) -> (CancellationToken, JoinHandle<anyhow::Result<()>>) {
    let shutdown = CancellationToken::new();
    let options = args.clone().complete().unwrap();
    let served = super::serve(options, shutdown.clone());
    let task = tokio::spawn(async move {
        let ended = served.await;
        if let Err(error) = &ended {
            eprintln!("the node ended: {error:#}");
        }
        ended
    });
    (shutdown, task)
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> (StatusCode, Bytes)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(request).await.unwrap();
    let status = response.status();
    (status, response.into_body().collect().await.unwrap().to_bytes())
}

fn request(method: Method, path: &str, body: Bytes) -> Request<Full<Bytes>> {
    Request::builder().method(method).uri(path).header("host", "node").body(Full::new(body)).unwrap()
}

fn body(value: &Value) -> Bytes {
    if value.is_null() { Bytes::new() } else { value.to_string().into() }
}

impl Node {
    async fn raw(&self, request: Request<Full<Bytes>>) -> (StatusCode, Value) {
        let stream = UnixStream::connect(self.dir.join("run/node.sock")).await.unwrap();
        let (status, bytes) = exchange(stream, request).await;
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    async fn ask(&self, method: Method, path: &str, value: Value) -> (StatusCode, Value) {
        self.raw(request(method, path, body(&value))).await
    }

    async fn get(&self, path: &str) -> Value {
        let (status, value) = self.ask(Method::GET, path, Value::Null).await;
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    async fn post(&self, path: &str, value: Value) -> Value {
        let (status, answer) = self.ask(Method::POST, path, value).await;
        assert!(status.is_success(), "{path}: {answer}");
        answer
    }

    /// The detail of a problem that is expected; it always says what to do next.
    async fn problem(&self, method: Method, path: &str, value: Value, expected: u16) -> String {
        let (status, problem) = self.ask(method, path, value).await;
        assert_eq!(status, expected, "{path}: {problem}");
        assert!(!problem["next"].as_str().unwrap().is_empty(), "{problem}");
        problem["detail"].as_str().unwrap().to_owned()
    }

    async fn answers(&self) {
        eventually("the local socket answers", async || {
            UnixStream::connect(self.dir.join("run/node.sock")).await.ok()
        })
        .await;
    }

    /// Runs a data process on threads of its own until the token ends.
    fn start_data(&self) -> CancellationToken {
        let options = EngineOptions {
            paths: NodePaths::new(self.dir.join("state"), self.dir.join("run")),
            listen_storage: self.args.listen_storage.unwrap(),
            listen_frames: self.args.listen_frames.unwrap(),
            link_mtu: Some(1500),
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            // What it says of its end is of no interest: the test kills it.
            let _ = runtime.block_on(data::serve(options, stopped));
            runtime.shutdown_timeout(Duration::from_secs(5));
        });
        stop
    }

    /// Gives a directory of this node to the pool.
    async fn add_disk(&self, name: &str) -> String {
        let path = self.dir.join(name);
        std::fs::create_dir_all(&path).unwrap();
        let path = path.display().to_string();
        let node = self.args.node_name.as_deref().unwrap();
        self.post("/v1/disks", json!({ "node": node, "path": path })).await;
        eventually("the disk is in the pool", async || {
            let disks = self.get("/v1/disks").await;
            let ready = |disk: &Value| {
                disk["path"] == path.as_str() && disk["state"] == "ready" && disk["used_bytes"].is_u64()
            };
            disks["items"].as_array()?.iter().any(ready).then_some(())
        })
        .await;
        path
    }

    async fn stop(self) -> (Args, PathBuf) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
        (self.args, self.dir)
    }

    async fn restart(self) -> Self {
        let (args, dir) = self.stop().await;
        let (shutdown, task) = start(&args);
        let node = Self { args, dir, shutdown, task };
        node.answers().await;
        node
    }

    /// Over HTTPS, with the CA pinned.
    async fn https(&self, admin: &TokenString, bearer: Option<&str>, path: &str) -> (StatusCode, Bytes) {
        let tcp = TcpStream::connect(self.args.listen_api.unwrap()).await.unwrap();
        let stream = pinned_tls::connect(tcp, admin.ca).await.unwrap();
        let mut request = request(Method::GET, path, Bytes::new());
        if let Some(bearer) = bearer {
            request.headers_mut().insert("authorization", format!("Bearer {bearer}").parse().unwrap());
        }
        exchange(stream, request).await
    }

    async fn sees_voters(&self, count: usize) {
        eventually("all nodes vote and renew", async || {
            let (_, nodes) = self.ask(Method::GET, "/v1/nodes", Value::Null).await;
            let nodes = nodes["items"].as_array()?;
            let in_order = |node: &&Value| {
                matches!(node["role"].as_str(), Some("voter" | "leader")) && node["version"].is_string()
            };
            (nodes.iter().filter(in_order).count() == count).then_some(())
        })
        .await;
    }
}

async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn join(node: &Node, token: &str) {
    let joined = node.post("/v1/cluster/join", json!({ "token": token })).await;
    assert_eq!(joined["cluster"], "prod");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_form_a_cluster_that_survives_restarts_and_the_loss_of_its_leader() {
    let room = Room::new();
    let (n1, n2, n3) = (room.node(1).await, room.node(2).await, room.node(3).await);
    let status = n1.get("/v1/status").await;
    assert_eq!(status["cluster"], Value::Null);
    let created = n1.post("/v1/cluster", json!({ "name": "prod" })).await;
    let admin = created["admin_token"].as_str().unwrap();
    let again = n1.problem(Method::POST, "/v1/cluster", json!({ "name": "other" }), 409).await;
    assert!(again.contains("prod already"), "{again}");

    let token = n1.post("/v1/cluster/tokens", json!({ "uses": 1 })).await;
    let (id, token) = (token["info"]["id"].clone(), token["token"].as_str().unwrap().to_owned());
    for (bad, word) in [("hello", "no token"), (admin, "for the API"), (&token[..token.len() - 2], "damaged")]
    {
        let detail = n2.problem(Method::POST, "/v1/cluster/join", json!({ "token": bad }), 400).await;
        assert!(detail.contains(word), "{detail}");
    }
    let twin = json!({ "token": token, "node_name": "n1" });
    let detail = n2.problem(Method::POST, "/v1/cluster/join", twin, 409).await;
    assert!(detail.contains("n1 already"), "{detail}");
    join(&n2, &token).await;
    let detail = n3.problem(Method::POST, "/v1/cluster/join", json!({ "token": token }), 403).await;
    assert!(detail.contains("used up"), "{detail}");
    let detail = n2.problem(Method::POST, "/v1/cluster/join", json!({ "token": token }), 409).await;
    assert!(detail.contains("already"), "{detail}");
    let (status, _) =
        n2.ask(Method::DELETE, &format!("/v1/cluster/tokens/{}", id.as_str().unwrap()), Value::Null).await;
    assert_eq!(status, 202);
    let detail = n3.problem(Method::POST, "/v1/cluster/join", json!({ "token": token }), 403).await;
    assert!(detail.contains("wrong"), "{detail}");
    let token = n2.post("/v1/cluster/tokens", json!({})).await["token"].as_str().unwrap().to_owned();
    join(&n3, &token).await;
    n1.sees_voters(3).await;

    // Any node takes writes, and shows what another one took.
    n3.post("/v1/networks", json!({ "name": "lan", "subnet": "10.9.0.0/24" })).await;
    assert_eq!(n2.get("/v1/networks/lan").await["gateway"], "10.9.0.1");

    let text = TokenString::decode(admin).unwrap();
    assert_eq!(n2.https(&text, None, "/v1/nodes").await.0, 401);
    assert_eq!(n2.https(&text, Some(&token), "/v1/nodes").await.0, 401, "a join token is no admin token");
    assert_eq!(n2.https(&text, None, "/healthz").await.0, 200);
    assert_eq!(n2.https(&text, Some(admin), "/v1/nodes").await.0, 200);
    let (status, metrics) = n2.https(&text, Some(admin), "/metrics").await;
    assert_eq!(status, 200);
    assert!(String::from_utf8_lossy(&metrics).contains("hci_raft_term"));

    let n2 = n2.restart().await;
    n2.sees_voters(3).await;
    assert_eq!(n2.get("/v1/networks/lan").await["name"], "lan");

    let leader = n2.get("/v1/cluster").await["leader"].as_str().unwrap().to_owned();
    let mut rest = Vec::new();
    for node in [n1, n2, n3] {
        if node.args.node_name.as_deref() == Some(&leader) {
            node.stop().await;
        } else {
            rest.push(node);
        }
    }
    eventually("the rest takes writes", async || {
        let network = json!({ "name": "after", "subnet": "10.8.0.0/24" });
        let (status, _) = rest[0].ask(Method::POST, "/v1/networks", network).await;
        (status == 202 || status == 409).then_some(())
    })
    .await;
    eventually("the lost node is named", async || {
        let status = rest[1].get("/v1/status").await;
        let named = status["problems"].as_array()?.iter().any(|problem| problem["name"] == leader.as_str());
        (status["health"] == "degraded" && named).then_some(())
    })
    .await;
    let events = rest[0].get("/v1/events").await;
    assert!(events["items"].as_array().unwrap().iter().any(|event| event["kind"] == "node-lost"));
    for node in rest {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_form_a_cluster_unattended() {
    let room = Room::new();
    let ip = |n: u8| format!("127.{}.{}.{n}", room.net[0], room.net[1]);
    let prepare = |n: u8, text: String| {
        let state = room.dir.path().join(format!("n{n}/state"));
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(state.join("firstboot.toml"), text).unwrap();
    };
    let secret = "correct horse battery staple";
    prepare(1, format!("[create]\nname = 'prod'\njoin_secret = '{secret}'"));
    prepare(2, format!("[join]\naddress = '{}:7443'\nsecret = '{secret}'", ip(1)));
    prepare(3, format!("[join]\naddress = '{}:7443'\nsecret = 'a secret that is wrong'", ip(1)));
    // The one that joins is up first, and a stranger knocks.
    let n2 = room.node(2).await;
    let n3 = room.node(3).await;
    let n1 = room.node(1).await;
    n1.sees_voters(2).await;
    n2.sees_voters(2).await;
    assert_eq!(n3.get("/v1/status").await["cluster"], Value::Null);
    for node in [n1, n2, n3] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_and_bad_uploads_change_nothing() {
    let room = Room::new();
    let n1 = room.node(1).await;
    n1.problem(Method::GET, "/v1/nodes", Value::Null, 503).await;
    n1.post("/v1/cluster", json!({ "name": "prod" })).await;
    let before = n1.get("/v1/cluster").await;
    for (method, path, value, status) in [
        (Method::GET, "/v1/nothing", Value::Null, 404),
        (Method::GET, "/v1/vms/none", Value::Null, 404),
        (Method::PUT, "/v1/vms", Value::Null, 405),
        (Method::POST, "/v1/networks", json!({ "name": "lan" }), 400),
        (Method::POST, "/v1/networks", json!({ "name": "lan", "subnet": "nonsense" }), 400),
        (Method::POST, "/v1/networks", json!({ "name": "../lan", "subnet": "10.9.0.0/24" }), 400),
        (Method::POST, "/v1/volumes", json!({ "name": "v", "size_bytes": 4096, "replicas": 3 }), 507),
        (Method::POST, "/v1/volumes", json!({ "name": "v", "size_bytes": 4096, "colour": 1 }), 400),
        (Method::POST, "/v1/vms", json!({ "name": "a", "image": "none" }), 404),
        (Method::POST, "/v1/disks", json!({ "node": "none", "path": "/dev/vdb" }), 404),
        (Method::DELETE, "/v1/volumes/none", Value::Null, 404),
        (Method::POST, "/v1/join", json!({ "token": "x" }), 400),
    ] {
        n1.problem(method, path, value, status).await;
    }
    let (status, _) = n1.raw(request(Method::POST, "/v1/networks", Bytes::from_static(b"{garbage"))).await;
    assert_eq!(status, 400);
    // Refused after its first bytes, and still read: a client that goes on writing gets the answer, each time.
    for _ in 0..20 {
        let (status, _) = n1.raw(request(Method::POST, "/v1/networks", vec![b' '; 8 << 20].into())).await;
        assert_eq!(status, 413);
    }

    n1.post("/v1/images", json!({ "name": "img", "kernel": true })).await;
    let put = |content: &'static [u8], hash: Option<String>, length: Option<usize>| {
        let mut request = request(Method::PUT, "/v1/images/img/kernel", Bytes::from_static(content));
        if let Some(hash) = hash {
            request.headers_mut().insert("x-blake3", hash.parse().unwrap());
        }
        if let Some(length) = length {
            request.headers_mut().insert("content-length", length.into());
        }
        request
    };
    let kernel = b"\x7fELF and so on";
    let other = blake3::hash(b"other").to_hex().to_string();
    for (request, word) in [
        (put(b"#!/bin/sh", None, None), "cannot be used"),
        (put(kernel, Some(other), None), "corrupt"),
        (put(kernel, Some("xyz".into()), None), "x-blake3"),
        (put(b"", None, None), "empty"),
    ] {
        let (status, problem) = n1.raw(request).await;
        assert_eq!(status, 400, "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(word), "{problem}");
    }
    // A client that goes away in the middle.
    let mut stream = UnixStream::connect(n1.dir.join("run/node.sock")).await.unwrap();
    stream
        .write_all(b"PUT /v1/images/img/kernel HTTP/1.1\r\nhost: n\r\ncontent-length: 99\r\n\r\n\x7fELF")
        .await
        .unwrap();
    drop(stream);
    // Garbage on both listeners ends that connection only.
    let mut garbage = UnixStream::connect(n1.dir.join("run/node.sock")).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    let mut rest = Vec::new();
    let _ = garbage.read_to_end(&mut rest).await;
    let mut garbage = TcpStream::connect(n1.args.listen_api.unwrap()).await.unwrap();
    garbage.write_all(&[0x16; 4096]).await.unwrap();
    let _ = garbage.read_to_end(&mut rest).await;

    eventually("no upload is left", async || {
        std::fs::read_dir(n1.dir.join("state/spool")).ok()?.next().is_none().then_some(())
    })
    .await;
    let image = n1.get("/v1/images/img").await;
    assert_eq!(image["parts"][0]["state"], "awaiting");
    let after = n1.get("/v1/cluster").await;
    let changes = after["revision"].as_u64().unwrap() - before["revision"].as_u64().unwrap();
    assert_eq!(changes, 1, "only the image was created");
    n1.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_drained_and_leaves_for_good() {
    let room = Room::new();
    let (n1, n2, n3) = (room.node(1).await, room.node(2).await, room.node(3).await);
    let created = n1.post("/v1/cluster", json!({ "name": "prod" })).await;
    assert!(created["admin_token"].is_string());
    let token = n1.post("/v1/cluster/tokens", json!({ "uses": 3 })).await["token"].clone();
    for node in [&n2, &n3] {
        join(node, token.as_str().unwrap()).await;
    }
    n1.sees_voters(3).await;

    let pool = n2.get("/v1/pool").await;
    assert_eq!((&pool["rebuild_grace_seconds"], &pool["rebalance"]), (&json!(600), &json!(true)));
    let (status, _) =
        n2.ask(Method::PATCH, "/v1/pool", json!({ "rebuild_grace_seconds": 60, "rebalance": false })).await;
    assert_eq!(status, 202);
    let pool = n3.get("/v1/pool").await;
    let policy = (&pool["rebuild_grace_seconds"], &pool["rebalance"], &pool["reserve_percent"]);
    assert_eq!(policy, (&json!(60), &json!(false), &json!(10)), "what is not given stays");
    n2.problem(Method::PATCH, "/v1/pool", json!({ "reserve_percent": 90 }), 400).await;
    let (status, _) = n2.ask(Method::PATCH, "/v1/nodes/n1", json!({ "rack": "r1" })).await;
    assert_eq!(status, 202);
    assert_eq!(n2.get("/v1/nodes/n1").await["rack"], "r1");
    for (method, path, value, status) in [
        (Method::POST, "/v1/disks/n1:%2Fdev%2Fnone/evict", json!({}), 404),
        (Method::POST, "/v1/nodes/none/drain", json!({}), 404),
        (Method::PATCH, "/v1/nodes/n1", json!({}), 400),
        (Method::PATCH, "/v1/volumes/none", json!({ "replicas": 2 }), 404),
        (Method::POST, "/v1/volumes/none/grow", json!({ "size_bytes": 4096 }), 404),
    ] {
        n1.problem(method, path, value, status).await;
    }

    n1.post("/v1/nodes/n3/drain", json!({})).await;
    assert_eq!(n1.get("/v1/nodes/n3").await["service"], "draining");
    n1.post("/v1/nodes/n3/resume", json!({})).await;
    let leaving = n1.post("/v1/nodes/n3/evict", json!({})).await["task"]["id"].clone();
    eventually("the node has left", async || {
        let nodes = n1.get("/v1/nodes").await;
        (nodes["items"].as_array()?.len() == 2).then_some(())
    })
    .await;
    let task = n1.get(&format!("/v1/tasks/{}", leaving.as_str().unwrap())).await;
    assert_eq!(task["state"], "done");
    n1.sees_voters(2).await;
    eventually("what is left still decides", async || {
        let network = json!({ "name": "lan", "subnet": "10.9.0.0/24" });
        let (status, _) = n2.ask(Method::POST, "/v1/networks", network).await;
        (status == 202 || status == 409).then_some(())
    })
    .await;
    n1.problem(Method::POST, "/v1/nodes/n3/drain", json!({}), 404).await;
    let (status, _) =
        n3.ask(Method::POST, "/v1/networks", json!({ "name": "x", "subnet": "10.8.0.0/24" })).await;
    assert!(!status.is_success(), "who has left changes nothing: {status}");
    for node in [n1, n2, n3] {
        node.stop().await;
    }
}

/// Four nodes with a disk each, and three copies of a volume: one node goes away and does not come back.
#[tokio::test(flavor = "multi_thread")]
async fn the_copies_of_a_lost_node_are_rebuilt_on_another_one() {
    let room = Room::new();
    let n1 = room.node(1).await;
    n1.post("/v1/cluster", json!({ "name": "prod" })).await;
    let token = n1.post("/v1/cluster/tokens", json!({ "uses": 3 })).await["token"].clone();
    let mut nodes = vec![n1];
    for n in 2..=4 {
        let node = room.node(n).await;
        join(&node, token.as_str().unwrap()).await;
        nodes.push(node);
    }
    let data: Vec<_> = nodes.iter().map(Node::start_data).collect();
    nodes[0].sees_voters(3).await;
    for node in &nodes[..3] {
        node.add_disk("disk").await;
    }
    nodes[0].post("/v1/volumes", json!({ "name": "v", "size_bytes": 1_u64 << 30, "replicas": 3 })).await;
    let (status, _) = nodes[0]
        .ask(Method::PATCH, "/v1/pool", json!({ "rebuild_grace_seconds": 2, "rebalance": false }))
        .await;
    assert_eq!(status, 202);
    nodes[3].add_disk("disk").await;

    // The last one that votes, so that the others go on; never the one that is asked.
    let lost = nodes.remove(2);
    data[2].cancel();
    lost.stop().await;
    let rebuilt = eventually("the volume has three copies again, none of them there", async || {
        let volume = nodes[0].ask(Method::GET, "/v1/volumes/v", Value::Null).await.1;
        let placement = volume["placement"].as_array()?;
        let elsewhere = placement.iter().all(|place| place["node"] != "n3" && place["state"] == "in-sync");
        (elsewhere && volume["in_sync"] == 3 && placement.len() == 3).then_some(volume)
    })
    .await;
    assert_eq!(rebuilt["tolerates"], "the loss of any 1 node");
    assert_eq!(rebuilt["at_risk"], json!([]));
    let events = nodes[0].get("/v1/events").await;
    let told = |kind: &str| events["items"].as_array().unwrap().iter().any(|event| event["kind"] == kind);
    assert!(told("node-lost") && told("rebuild"), "{events}");

    // What is left changes its number of copies and its size.
    let set = nodes[0].ask(Method::PATCH, "/v1/volumes/v", json!({ "replicas": 2 })).await;
    assert_eq!(set.0, 202, "{}", set.1);
    nodes[0].post("/v1/volumes/v/grow", json!({ "size_bytes": 2_u64 << 30 })).await;
    eventually("the volume has two copies of two segments", async || {
        let volume = nodes[0].get("/v1/volumes/v").await;
        let placement = volume["placement"].as_array()?;
        let copies: u64 = placement.iter().filter_map(|place| place["in_sync"].as_u64()).sum();
        (copies == 4 && volume["segments"] == 2).then_some(())
    })
    .await;
    data.iter().for_each(CancellationToken::cancel);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cloud_init_is_told_is_kept_and_never_shown() {
    let room = Room::new();
    let n1 = room.node(1).await;
    n1.post("/v1/cluster", json!({ "name": "prod" })).await;
    n1.post("/v1/images", json!({ "name": "img", "kernel": true })).await;
    let kernel = request(Method::PUT, "/v1/images/img/kernel", Bytes::from_static(b"\x7fELF and so on"));
    assert!(n1.raw(kernel).await.0.is_success());
    eventually("the image is there", async || {
        let image = n1.get("/v1/images/img").await;
        (image["parts"][0]["state"] == "ready").then_some(())
    })
    .await;

    let vm = |name: &str, cloud_init: Value| json!({ "name": name, "image": "img", "stopped": true, "cloud_init": cloud_init });
    let secret =
        json!({ "user_data": "#cloud-config\npassword: tulip\n", "ssh_keys": ["ssh-ed25519 tulip"] });
    let created = n1.post("/v1/vms", vm("web", secret)).await;
    assert!(!created.to_string().contains("tulip"), "{created}");
    for (bad, word) in [
        (json!({ "user_data": "x".repeat(70_000) }), "65536"),
        (json!({ "hostname": "no_name" }), "hostname"),
        (json!({ "ssh_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----"] }), "public key"),
    ] {
        let detail = n1.problem(Method::POST, "/v1/vms", vm("bad", bad), 400).await;
        assert!(detail.contains(word) && !detail.contains("BEGIN"), "{detail}");
    }

    let n1 = n1.restart().await;
    n1.sees_voters(1).await;
    let web = n1.get("/v1/vms/web").await;
    let given =
        json!({ "user_data_bytes": 30, "network_config_bytes": null, "ssh_keys": 1, "hostname": "web" });
    assert_eq!(web["cloud_init"], given);
    for path in ["/v1/vms", "/v1/vms/web", "/v1/tasks", "/v1/events"] {
        let shown = n1.get(path).await.to_string();
        assert!(!shown.contains("tulip"), "{path}: {shown}");
    }
    let exec = json!({ "command": ["/bin/true"] });
    let detail = n1.problem(Method::POST, "/v1/vms/web/exec", exec, 409).await;
    assert!(detail.contains("does not run"), "{detail}");
    n1.stop().await;
}
