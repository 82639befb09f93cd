//! HTTP around the API: the local socket, HTTPS, who may do what, uploads, channels into guests.
//!
//! The local socket is readable by root only: whoever connects may do everything. HTTPS lets in whoever has an admin
//! token or a certificate of the cluster's CA; without one only `/healthz`, joining and the page of [`display`] are served, which has
//! no secret, and to who has a ticket the WebSocket for that page.

use std::{io, os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{
        DefaultBodyLimit, Extension, Path as UrlPath, Query, Request, State, rejection::QueryRejection,
    },
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use bytes::Bytes;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use netfabric::{NodeId, pki::node_of_certificate};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    display, guest,
    linger::Lingering,
    problem::{MEDIA_TYPE, Problem, ProblemKind},
    requests::not_found,
    service::{self, ApiRequest, ApiResponse},
    types as api,
};
use crate::{
    control::{
        app::App,
        export,
        import::{self, Asker, Piece, Upload},
        join::token::TokenString,
        member::Member,
    },
    reconcile::channels::ChannelKind,
    state::{ContentHash, ImagePart, Timestamp, TokenKind},
};

/// Largest JSON body.
const MAX_BODY: usize = 1 << 20;
/// Connections at a time, each listener.
const MAX_CONNECTIONS: usize = 512;
/// How long a client may take for TLS and for the head of a request.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Pause after an accept that failed, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a client is let in by its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Over the local socket: root.
    Local,
    /// Over HTTPS with a certificate of the cluster's CA, and whose it is, if it is a node's.
    Certified(Option<NodeId>),
    /// Over HTTPS without; a token may come with each request.
    Anonymous,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        ApiResponse::from(self).into_response()
    }
}

impl IntoResponse for ApiResponse {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let media = if status.as_u16() >= 400 { MEDIA_TYPE } else { "application/json" };
        (status, [(header::CONTENT_TYPE, media)], self.body).into_response()
    }
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .route("/v1/cluster", get(cluster).post(create_cluster))
        .route("/v1/cluster/join", post(join_cluster))
        .route(
            "/v1/images/{image}/{part}",
            put(upload).layer(DefaultBodyLimit::disable()).get(upload_offset).post(fetch_part),
        )
        .route("/v1/images/{image}/export", get(export_image))
        .route("/v1/volumes/{volume}/export", get(export_volume))
        .route("/v1/vms/{vm}/console", get(console))
        .route("/v1/vms/{vm}/console/log", get(console_log))
        .route("/v1/vms/{vm}/display", get(open_display))
        .route("/v1/vms/{vm}/display/tickets", post(display::create_ticket))
        .route(display::PAGE, get(display::page))
        .route(display::SCRIPT, get(display::script))
        .route(display::STYLE, get(display::style))
        .route("/v1/vms/{vm}/ports/{port}", get(port))
        .route("/v1/vms/{vm}/exec", post(guest::exec))
        .route("/v1/vms/{vm}/exec/{pid}", get(guest::exec_progress))
        .fallback(other)
        .method_not_allowed_fallback(other)
        .layer(middleware::from_fn_with_state(app.clone(), authorize))
        .with_state(app)
}

/// What anybody may ask: whether the node is there, to join with a token, and the static files by which a browser shows a screen.
fn is_open(method: &Method, path: &str) -> bool {
    matches!(
        (method, path),
        (&Method::GET, "/healthz" | display::PAGE | display::SCRIPT | display::STYLE)
            | (&Method::POST, "/v1/join" | "/v1/join/proof")
    )
}

/// Lets in who may: everybody on the local socket and with a certificate; else who shows an admin's token, or, for the one WebSocket
/// that it is for, a ticket. Nothing behind this asks again.
async fn authorize(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let allowed = match peer {
        Peer::Local => true,
        Peer::Certified(node) => !has_left(&app, node),
        Peer::Anonymous => {
            is_open(request.method(), request.uri().path())
                || bearer_is_admin(&app, request.headers())
                || display::ticket_admits(&app.display_tickets, &request)
        }
    };
    if allowed {
        return next.run(request).await;
    }
    let problem = Problem::new(
        ProblemKind::Unauthorized,
        "this needs an admin token or a client certificate",
        "set HCI_TOKEN to the token that `hci cluster create` printed, or run hci on a node",
    );
    let mut response = problem.into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

/// Whether a certificate is of a node that has left the cluster: it is not good any more.
fn has_left(app: &App, node: Option<NodeId>) -> bool {
    let Some((node, member)) = node.zip(app.member()) else { return false };
    member.state().removed_nodes.contains(&node)
}

fn bearer_is_admin(app: &App, headers: &HeaderMap) -> bool {
    let Some(member) = app.member() else { return false };
    let text = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some(Ok(token)) = text.and_then(|text| text.strip_prefix("Bearer ")).map(TokenString::decode) else {
        return false;
    };
    let state = member.state();
    let Some(known) = state.tokens.get(&token.id) else { return false };
    let in_time = known.expires.is_none_or(|end| Timestamp::now() < end);
    token.secret.matches(&known.secret) && known.kind == TokenKind::Admin && in_time
}

fn only_local(peer: Peer) -> Result<(), Problem> {
    if peer == Peer::Local {
        return Ok(());
    }
    Err(Problem::new(
        ProblemKind::Forbidden,
        "this is only possible on the node itself",
        "log in to the node and run the command there",
    ))
}

pub(super) fn member(app: &App) -> Result<Arc<Member>, Problem> {
    app.member().ok_or_else(|| {
        Problem::new(
            ProblemKind::Unavailable,
            "this node is in no cluster yet",
            "hci cluster create NAME, or hci cluster join TOKEN",
        )
    })
}

async fn body_of(request: Request) -> Result<Bytes, Problem> {
    axum::body::to_bytes(request.into_body(), MAX_BODY).await.map_err(|_| {
        Problem::new(
            ProblemKind::TooLarge,
            format!("the body has more than {MAX_BODY} bytes, or broke off"),
            "send less",
        )
    })
}

async fn healthz(State(app): State<Arc<App>>) -> Response {
    let Some(member) = app.member() else { return "not in a cluster\n".into_response() };
    match member.replicated.leadership().borrow().leader {
        Some(_) => "ok\n".into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "no leader\n").into_response(),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.metrics().await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn cluster(State(app): State<Arc<App>>, request: Request) -> Response {
    other(State(app), request).await
}

async fn create_cluster(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Result<ApiResponse, Problem> {
    only_local(peer)?;
    let request: api::CreateCluster = service::parse(&body_of(request).await?)?;
    ApiResponse::json(200, &app.create_cluster(request, None).await?)
}

async fn join_cluster(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Result<ApiResponse, Problem> {
    only_local(peer)?;
    let request: api::JoinCluster = service::parse(&body_of(request).await?)?;
    ApiResponse::json(200, &app.join_with_token(request).await?)
}

async fn upload(
    State(app): State<Arc<App>>,
    UrlPath((image, part)): UrlPath<(String, String)>,
    request: Request,
) -> Result<ApiResponse, Problem> {
    let member = member(&app)?;
    let upload = announced(image, part_named(&part)?, request.headers())?;
    let body = request.into_body().into_data_stream();
    import::upload(&member, upload, body).await
}

async fn upload_offset(
    State(app): State<Arc<App>>,
    UrlPath((image, part)): UrlPath<(String, String)>,
) -> Result<ApiResponse, Problem> {
    import::offset(&member(&app)?, &image, part_named(&part)?).await
}

async fn fetch_part(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    UrlPath((image, part)): UrlPath<(String, String)>,
    request: Request,
) -> Result<ApiResponse, Problem> {
    let member = member(&app)?;
    let asker = if peer == Peer::Local { Asker::Root } else { Asker::Admin };
    let request: api::FetchImagePart = service::parse(&body_of(request).await?)?;
    import::fetch_part(&member, &image, part_named(&part)?, request, asker).await
}

type ExportQuery = Result<Query<api::ExportQuery>, QueryRejection>;

async fn export_image(
    State(app): State<Arc<App>>,
    UrlPath(image): UrlPath<String>,
    query: ExportQuery,
) -> Result<Response, Problem> {
    exported(&app, "image", &image, query).await
}

async fn export_volume(
    State(app): State<Arc<App>>,
    UrlPath(volume): UrlPath<String>,
    query: ExportQuery,
) -> Result<Response, Problem> {
    exported(&app, "volume", &volume, query).await
}

async fn exported(app: &App, noun: &str, name: &str, query: ExportQuery) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|error| {
        Problem::new(ProblemKind::Invalid, error.body_text(), "ask with ?from=OFFSET&snapshot=NAME")
    })?;
    let member = member(app)?;
    let volume = export::find(&member, noun, name)?;
    let request = export::Request { volume, snapshot: query.snapshot, from: query.from };
    let (frames, reading) = export::export(&member, request).await?;
    app.tasks().spawn(reading);
    let media = [(header::CONTENT_TYPE, "application/vnd.hci.disk")];
    Ok((media, Body::from_stream(frames)).into_response())
}

fn part_named(name: &str) -> Result<ImagePart, Problem> {
    let parts = [ImagePart::Kernel, ImagePart::Initramfs, ImagePart::Disk];
    let part = parts.into_iter().find(|part| part.name() == name);
    part.ok_or_else(|| not_found("part of an image", name))
}

/// An upload, as far as the client says what it is.
fn announced(image: String, part: ImagePart, headers: &HeaderMap) -> Result<Upload, Problem> {
    fn read<T: std::str::FromStr>(headers: &HeaderMap, name: &str) -> Result<Option<T>, Problem> {
        let Some(value) = headers.get(name) else { return Ok(None) };
        let read = value.to_str().ok().and_then(|text| text.parse().ok());
        read.map(Some).ok_or_else(|| {
            let detail = format!("the header {name} cannot be read");
            Problem::new(ProblemKind::Invalid, detail, "send it as documented")
        })
    }
    let (length, offset) = (read(headers, "content-length")?, read(headers, "upload-offset")?);
    let piece = match (offset, read(headers, "upload-length")?) {
        (Some(offset), Some(total)) => Some(Piece { offset, total }),
        (None, None) => None,
        _ => {
            let detail = "an upload that may be continued has both Upload-Offset and Upload-Length";
            return Err(Problem::new(ProblemKind::Invalid, detail, "send both or neither"));
        }
    };
    let (hash, sha256): (Option<ContentHash>, _) = (read(headers, "x-blake3")?, read(headers, "x-sha256")?);
    Ok(Upload { image, part, length, piece, hash, sha256 })
}

/// The VM's id and node.
pub(super) fn running(
    member: &Member,
    name: &str,
) -> Result<(crate::state::NodeId, crate::state::VmId), Problem> {
    let state = member.state();
    let vm = state.find_vm(name).ok_or_else(|| not_found("vm", name))?;
    let run = vm.assignment.ok_or_else(|| {
        Problem::new(
            ProblemKind::Conflict,
            format!("VM {} does not run", vm.name),
            format!("start it: hci vm start {}", vm.name),
        )
    })?;
    Ok((run.node, vm.id))
}

pub(super) fn no_channel(detail: String) -> Problem {
    Problem::new(ProblemKind::Unavailable, detail, "see the VM: hci vm get")
}

async fn console_log(State(app): State<Arc<App>>, UrlPath(vm): UrlPath<String>) -> Result<Response, Problem> {
    let member = member(&app)?;
    let (node, vm) = running(&member, &vm)?;
    let log = member.local.console_log(node, vm).await.map_err(no_channel)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], log).into_response())
}

async fn console(
    State(app): State<Arc<App>>,
    UrlPath(vm): UrlPath<String>,
    request: Request,
) -> Result<Response, Problem> {
    channel(&app, &vm, ChannelKind::Console, request).await
}

async fn open_display(
    State(app): State<Arc<App>>,
    UrlPath(vm): UrlPath<String>,
    request: Request,
) -> Result<Response, Problem> {
    if display::is_websocket(request.headers()) {
        return display::websocket(&app, &vm, request).await;
    }
    channel(&app, &vm, ChannelKind::Display, request).await
}

async fn port(
    State(app): State<Arc<App>>,
    UrlPath((vm, port)): UrlPath<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    let port = port.parse().map_err(|_| {
        Problem::new(ProblemKind::Invalid, format!("{port:?} is no port"), "hci vm connect NAME --port 22")
    })?;
    channel(&app, &vm, ChannelKind::Port(port), request).await
}

/// Switches the connection to a channel into a guest.
async fn channel(app: &App, vm: &str, kind: ChannelKind, mut request: Request) -> Result<Response, Problem> {
    let member = member(app)?;
    let (node, vm) = running(&member, vm)?;
    if !request.headers().contains_key(header::UPGRADE) {
        return Err(Problem::new(
            ProblemKind::Invalid,
            format!("a {kind} is reached by an upgrade of the connection"),
            "hci vm console NAME, hci vm display NAME, hci vm connect NAME --port PORT",
        ));
    }
    let mut guest = member.local.open_channel(node, vm, kind).await.map_err(no_channel)?;
    let upgrade = hyper::upgrade::on(&mut request);
    app.tasks().spawn(async move {
        match upgrade.await {
            Ok(client) => {
                // Either side may go away at any time.
                let _ = copy_bidirectional(&mut TokioIo::new(client), &mut guest).await;
            }
            Err(error) => tracing::debug!(%error, "a channel into a guest was not opened"),
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "hci-channel")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}

async fn other(State(app): State<Arc<App>>, request: Request) -> Response {
    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
    let answered = async {
        let member = match member(&app) {
            // `hci status` says so instead of failing.
            Err(_) if method == "GET" && path == "/v1/status" => return ApiResponse::json(200, &unjoined()),
            member => member?,
        };
        let body = body_of(request).await?;
        Ok(service::answer(&member, ApiRequest { method, path, body }).await)
    };
    let answered: Result<ApiResponse, Problem> = answered.await;
    answered.into_response()
}

fn unjoined() -> api::Status {
    api::Status {
        cluster: None,
        health: api::Health::Healthy,
        problems: vec![],
        can_lose: "this node is in no cluster: hci cluster create NAME, or hci cluster join TOKEN".to_owned(),
        can_lose_nodes: 0,
        leader: None,
        nodes: 0,
        nodes_available: 0,
        disks: 0,
        volumes: 0,
        volumes_degraded: 0,
        moves: 0,
        vms: 0,
        vms_running: 0,
        raw_bytes: 0,
        used_bytes: 0,
        usable_bytes: 0,
        usable_copies: 0,
    }
}

/// Serves the local socket until `shutdown`.
pub async fn serve_local(router: Router, path: PathBuf, shutdown: CancellationToken) -> io::Result<()> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let router = router.layer(Extension(Peer::Local));
    let tasks = TaskTracker::new();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed: this function owns it.
        let Ok(slot) = slots.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (router, shutdown) = (router.clone(), shutdown.clone());
                tasks.spawn(async move {
                    serve_one(stream, router, shutdown).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the local socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

/// Serves HTTPS until `shutdown`.
pub async fn serve_https(
    router: Router,
    listener: TcpListener,
    tls: ServerConfig,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let tasks = TaskTracker::new();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed: this function owns it.
        let Ok(slot) = slots.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                let (router, shutdown, acceptor) = (router.clone(), shutdown.clone(), acceptor.clone());
                tasks.spawn(async move {
                    match tokio::time::timeout(HEAD_DEADLINE, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                            let peer = match shown {
                                Some(certificate) => Peer::Certified(node_of_certificate(certificate)),
                                None => Peer::Anonymous,
                            };
                            serve_one(stream, router.layer(Extension(peer)), shutdown).await;
                        }
                        Ok(Err(error)) => tracing::debug!(%address, %error, "no TLS"),
                        Err(_) => tracing::debug!(%address, "TLS took too long"),
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept HTTPS");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

pub(super) async fn serve_one<S>(stream: S, router: Router, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE);
    let service = TowerToHyperService::new(tower::ServiceExt::map_request(
        router,
        |request: hyper::Request<hyper::body::Incoming>| request.map(|body| Body::new(Lingering::new(body))),
    ));
    let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(Duration::from_secs(2), connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended badly");
    }
}
