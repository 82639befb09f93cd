//! A VM's screen in a browser: a page, and RFB in a WebSocket.
//!
//! A browser has no token, neither for a page nor for a WebSocket. So the page and its two files are open to all: they are part of the
//! executable and say nothing of the cluster. What the page needs comes in the URL's fragment, which browsers never send: the VM's id, and a
//! [ticket](tickets) that somebody with a token has asked for. The page takes it out of the address bar and shows it once, as one of the
//! WebSocket's protocols, where no log has it.
//!
//! # Invariants
//! - Without a token, a certificate or the local socket a WebSocket is opened with a ticket only, which is spent by that.
//! - A WebSocket is not opened for a page of another origin, whoever asks.
//! - What a client sends is bounded before it is kept, and one that does not read, or is gone without a word, is let go.

mod tickets;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{
        Extension, FromRequestParts, Path as UrlPath, Request, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code},
    },
    http::{HeaderMap, HeaderName, Method, Uri, header, uri::Authority},
    response::{IntoResponse, Response},
};
use futures_util::{SinkExt, Stream, StreamExt, stream::SplitSink};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    time::{MissedTickBehavior, interval, timeout},
};

pub(crate) use tickets::Tickets;

use super::{
    certificates,
    http::{Peer, member, no_channel, running},
    problem::{Problem, ProblemKind},
    service::ApiResponse,
    types as api,
};
use crate::{
    control::{app::App, member::ChannelStream},
    reconcile::channels::ChannelKind,
    state::{Timestamp, VmId},
};

/// Paths of the page and its files.
pub(super) const PAGE: &str = "/display/";
pub(super) const SCRIPT: &str = "/display/display.js";
pub(super) const STYLE: &str = "/display/display.css";

/// The WebSocket protocol whose binary messages are RFB's stream of bytes, cut anywhere.
const PROTOCOL: &str = "hci-display";
/// Start of the protocol entry that is a ticket.
const TICKET: &str = "ticket.";
/// Longest message of a client. RFB's are short.
const MAX_MESSAGE: usize = 64 << 10;
/// Output sent in one message.
const READ_SIZE: usize = 64 << 10;
/// Most that waits to be sent: one message, and answers to pings.
const MAX_UNSENT: usize = 1 << 20;
/// Close codes for why there is no screen, followed by the status that HTTP would have: 4000 and more are an application's own.
const NO_SCREEN: u16 = 4000;
/// Longest reason in a close frame.
const MAX_REASON: usize = 123;

/// For how long each side may keep the other one waiting.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Between two pings.
    ping: Duration,
    /// How long a client may be silent, pongs included, or take nothing.
    client: Duration,
    /// How long the guest's side may take nothing.
    guest: Duration,
    /// How long a client may take to agree to the end.
    close: Duration,
}

const PATIENCE: Patience = Patience {
    ping: Duration::from_secs(15),
    client: Duration::from_secs(45),
    guest: Duration::from_secs(30),
    close: Duration::from_secs(2),
};

/// What goes along with each of the static files.
const HEADERS: [(HeaderName, &str); 8] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CACHE_CONTROL, "no-cache"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("permissions-policy"), "camera=(), microphone=(), geolocation=()"),
];

fn file(media: &'static str, text: &'static str) -> Response {
    (HEADERS, [(header::CONTENT_TYPE, media)], text).into_response()
}

/// `GET /display/`.
pub(super) async fn page() -> Response {
    file("text/html; charset=utf-8", include_str!("display/page.html"))
}

/// `GET /display/display.js`.
pub(super) async fn script() -> Response {
    file("text/javascript; charset=utf-8", include_str!("display/display.js"))
}

/// `GET /display/display.css`.
pub(super) async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("display/display.css"))
}

/// `POST /v1/vms/NAME/display/tickets`.
pub(super) async fn create_ticket(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    UrlPath(name): UrlPath<String>,
    headers: HeaderMap,
) -> Result<ApiResponse, Problem> {
    let member = member(&app)?;
    let (node, vm) = running(&member, &name)?;
    let host = host(&app, peer, &headers)?;
    // That there is nothing to see is said now, and not in a browser.
    drop(member.local.open_channel(node, vm, ChannelKind::Display).await.map_err(no_channel)?);
    let ticket = app.display_tickets.issue(vm, Instant::now()).map_err(|error| {
        Problem::new(ProblemKind::Unavailable, error.to_string(), "try again in a minute")
    })?;
    tracing::info!(%vm, "a browser may see and use a VM's screen once");
    let name = member.state().vms.get(&vm).map_or_else(|| vm.to_string(), |vm| vm.name.clone());
    let life = i64::try_from(tickets::LIFE.as_secs()).unwrap_or(i64::MAX);
    let answer = api::DisplayTicket {
        // Names and ids are of letters that need no encoding.
        url: format!("https://{host}{PAGE}#vm={vm}&name={name}&ticket={ticket}"),
        expires: Timestamp::now().plus_seconds(life).to_string(),
        certificate: certificates::browser_fingerprint(&app.options.paths.identity())
            .map(|fingerprint| fingerprint.to_string()),
    };
    ApiResponse::json(200, &answer)
}

/// Where a browser finds this node: where its client has found it, or, on the node itself, at its address.
fn host(app: &App, peer: Peer, headers: &HeaderMap) -> Result<String, Problem> {
    if peer == Peer::Local {
        let addresses = app.options.addresses().map_err(|error| {
            Problem::new(
                ProblemKind::Unavailable,
                format!("this node does not know its address: {error}"),
                "set advertise = \"ADDRESS\" in /etc/hci/node.toml",
            )
        })?;
        return Ok(addresses.api.to_string());
    }
    let host = host_of(headers).ok_or_else(|| {
        Problem::new(ProblemKind::Invalid, "the header Host cannot be read", "send it as documented")
    })?;
    Ok(host.to_string())
}

fn host_of(headers: &HeaderMap) -> Option<Authority> {
    headers.get(header::HOST)?.to_str().ok()?.parse().ok()
}

/// Whether a request is for a WebSocket.
pub(super) fn is_websocket(headers: &HeaderMap) -> bool {
    headers.get(header::UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Whether a request is for the WebSocket of a VM's screen, and shows a ticket for it. The ticket is spent by this.
pub(super) fn ticket_admits(tickets: &Tickets, request: &Request) -> bool {
    if request.method() != Method::GET || !is_websocket(request.headers()) {
        return false;
    }
    let vm = vm_of(request.uri().path());
    let ticket = ticket_of(request.headers());
    vm.zip(ticket).is_some_and(|(vm, ticket)| tickets.redeem(ticket, vm, Instant::now()))
}

/// The VM whose screen is at a path, where the VM is named by its id: a name might stand for something else later.
fn vm_of(path: &str) -> Option<VmId> {
    path.strip_prefix("/v1/vms/")?.strip_suffix("/display")?.parse().ok()
}

fn ticket_of(headers: &HeaderMap) -> Option<&str> {
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let mut entries = offered.filter_map(|value| value.to_str().ok()).flat_map(|list| list.split(','));
    entries.find_map(|entry| entry.trim().strip_prefix(TICKET))
}

/// Whether a request is of no page, or of one of this node.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let page = origin.as_ref().and_then(Uri::authority);
    page.zip(host_of(headers).as_ref()).is_some_and(|(page, host)| page == host)
}

/// `GET /v1/vms/NAME/display` as a WebSocket. Why there is no screen is said in its close frame: of an HTTP answer a page learns nothing.
pub(super) async fn websocket(app: &App, name: &str, request: Request) -> Result<Response, Problem> {
    if !is_own_origin(request.headers()) {
        return Err(Problem::new(
            ProblemKind::Forbidden,
            "this is asked for by a page of another site",
            "hci vm display NAME --browser",
        ));
    }
    let upgrade = upgrade(request).await?;
    let guest = async {
        let member = member(app)?;
        let (node, vm) = running(&member, name)?;
        member.local.open_channel(node, vm, ChannelKind::Display).await.map_err(no_channel)
    };
    Ok(serve(upgrade, guest.await, PATIENCE))
}

async fn upgrade(request: Request) -> Result<WebSocketUpgrade, Problem> {
    let (mut parts, _) = request.into_parts();
    WebSocketUpgrade::from_request_parts(&mut parts, &()).await.map_err(|rejection| {
        Problem::new(ProblemKind::Invalid, rejection.body_text(), "open it with a browser's WebSocket")
    })
}

fn serve(
    upgrade: WebSocketUpgrade,
    guest: Result<Box<dyn ChannelStream>, Problem>,
    patience: Patience,
) -> Response {
    upgrade
        .protocols([PROTOCOL])
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .write_buffer_size(0)
        .max_write_buffer_size(MAX_UNSENT)
        .on_upgrade(move |socket| bridge(socket, guest, patience))
}

/// Why a conversation ends.
#[derive(Debug)]
enum End {
    /// The client closed it, broke it, or did not speak WebSocket.
    ClientGone,
    /// It sent text.
    NotBinary,
    /// It was silent, or did not read.
    ClientSilent,
    /// The guest's side closed it.
    GuestGone,
    /// There is nothing to show.
    NoScreen(Problem),
}

impl End {
    fn close(&self) -> Option<(u16, &str)> {
        Some(match self {
            Self::ClientGone => return None,
            Self::NotBinary => (close_code::UNSUPPORTED, "messages are binary"),
            Self::ClientSilent => (close_code::POLICY, "nothing was heard for too long"),
            Self::GuestGone => (close_code::NORMAL, "the VM has stopped, or shows its screen elsewhere"),
            Self::NoScreen(problem) => (NO_SCREEN + problem.status, &problem.detail),
        })
    }
}

/// Moves bytes both ways until one side ends.
async fn bridge(socket: WebSocket, guest: Result<Box<dyn ChannelStream>, Problem>, patience: Patience) {
    let (mut to_client, mut from_client) = socket.split();
    let end = match guest {
        Ok(guest) => {
            let (from_guest, to_guest) = tokio::io::split(guest);
            tokio::select! {
                end = pump_output(from_guest, &mut to_client, patience) => end,
                end = pump_input(&mut from_client, to_guest, patience) => end,
            }
        }
        Err(problem) => End::NoScreen(problem),
    };
    tracing::debug!(?end, "a screen in a browser ended");
    let Some((code, reason)) = end.close() else { return };
    let frame = CloseFrame { code, reason: reason[..reason.floor_char_boundary(MAX_REASON)].into() };
    let closed = async {
        to_client.send(Message::Close(Some(frame))).await?;
        // Until the client has agreed: a connection that is cut at once may lose what was said last.
        while let Some(Ok(_)) = from_client.next().await {}
        Ok::<_, axum::Error>(())
    };
    // It ends either way.
    let _ = timeout(patience.close, closed).await;
}

async fn pump_output(
    mut from_guest: ReadHalf<Box<dyn ChannelStream>>,
    to_client: &mut SplitSink<WebSocket, Message>,
    patience: Patience,
) -> End {
    let mut piece = vec![0; READ_SIZE];
    let mut pings = interval(patience.ping);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            read = from_guest.read(&mut piece) => match read {
                Ok(read @ 1..) => Message::Binary(piece[..read].to_vec().into()),
                Ok(_) | Err(_) => return End::GuestGone,
            },
            _ = pings.tick() => Message::Ping(Default::default()),
        };
        match timeout(patience.client, to_client.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return End::ClientGone,
            Err(_) => return End::ClientSilent,
        }
    }
}

async fn pump_input(
    from_client: &mut (impl Stream<Item = Result<Message, axum::Error>> + Unpin),
    mut to_guest: WriteHalf<Box<dyn ChannelStream>>,
    patience: Patience,
) -> End {
    loop {
        let input = match timeout(patience.client, from_client.next()).await {
            Ok(Some(Ok(Message::Binary(input)))) => input,
            Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => continue,
            Ok(Some(Ok(Message::Text(_)))) => return End::NotBinary,
            Ok(Some(Ok(Message::Close(_)) | Err(_)) | None) => return End::ClientGone,
            Err(_) => return End::ClientSilent,
        };
        if !matches!(timeout(patience.guest, to_guest.write_all(&input)).await, Ok(Ok(()))) {
            return End::GuestGone;
        }
    }
}

#[cfg(test)]
mod tests;
