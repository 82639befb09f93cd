//! The page's files, who is let in, and WebSockets against a guest's side that the test plays.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll},
};

use axum::{Router, http::HeaderValue, routing::get};
use futures_util::future::Either;
use parking_lot::Mutex;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, client::IntoClientRequest, protocol::CloseFrame as ClientCloseFrame},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::api::http::serve_one;

/// For what must happen; it happens at once.
const SOON: Duration = Duration::from_secs(20);

fn header_map(headers: &[(HeaderName, &'static str)]) -> HeaderMap {
    headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
}

#[tokio::test]
async fn the_page_lets_nothing_foreign_in_and_nothing_out() {
    for (response, media) in
        [(page().await, "text/html"), (script().await, "text/javascript"), (style().await, "text/css")]
    {
        let headers = response.headers();
        assert!(headers[header::CONTENT_TYPE].to_str().unwrap().starts_with(media));
        assert_eq!(headers[header::X_FRAME_OPTIONS], "DENY");
        assert_eq!(headers[header::REFERRER_POLICY], "no-referrer");
        assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        let policy = headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none';") && policy.contains("frame-ancestors 'none'"));
        assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    }
    let html = include_str!("page.html");
    assert!(html.contains(r#"<script type="module" src="display.js"></script>"#));
    assert_eq!(html.matches("<script").count(), 1, "the policy lets no inline script run");
    assert!(!html.contains("style=") && !html.contains(" on"), "nor handlers and styles in tags");
}

fn ticketed(method: Method, path: &str, protocols: &str, upgrade: &str) -> Request {
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::UPGRADE, upgrade)
        .header(header::SEC_WEBSOCKET_PROTOCOL, protocols)
        .body(axum::body::Body::empty())
        .unwrap()
}

#[test]
fn a_ticket_opens_one_websocket_and_nothing_else() {
    let (tickets, vm, other) = (Tickets::default(), VmId::random(), VmId::random());
    let ticket = || format!("hci-display, ticket.{}", tickets.issue(vm, Instant::now()).unwrap());
    let path = format!("/v1/vms/{vm}/display");

    let offered = ticket();
    let request = || ticketed(Method::GET, &path, &offered, "websocket");
    assert!(ticket_admits(&tickets, &request()));
    assert!(!ticket_admits(&tickets, &request()), "a second time");

    let refused = |method, path: &str, protocols: &str, upgrade| {
        let request = ticketed(method, path, protocols, upgrade);
        assert!(!ticket_admits(&tickets, &request), "{request:?}");
    };
    refused(Method::GET, &path, &ticket(), "hci-channel");
    refused(Method::POST, &path, &ticket(), "websocket");
    refused(Method::POST, &format!("{path}/tickets"), &ticket(), "websocket");
    for elsewhere in [
        format!("/v1/vms/{vm}/console"),
        format!("/v1/vms/{vm}/display/"),
        format!("/v1/vms/{other}/display"),
        format!("/v1/vms/{vm}/ports/22"),
        "/v1/vms/web1/display".to_owned(),
        "/v1/vms//display".to_owned(),
        "/v1/vms/display".to_owned(),
        "/v1/vms".to_owned(),
    ] {
        refused(Method::GET, &elsewhere, &ticket(), "websocket");
    }
    for protocols in ["", "hci-display", "ticket.", "hci-display, ticket.AAAA"] {
        refused(Method::GET, &path, protocols, "websocket");
    }
}

#[test]
fn pages_of_other_sites_are_refused() {
    for (origin, host, own) in [
        ("https://10.0.0.1:7443", "10.0.0.1:7443", true),
        ("https://[fd00::1]:7443", "[fd00::1]:7443", true),
        ("https://Node1:7443", "node1:7443", true),
        ("https://evil.example", "10.0.0.1:7443", false),
        ("https://10.0.0.1:8443", "10.0.0.1:7443", false),
        ("https://10.0.0.1", "10.0.0.1:7443", false),
        ("https://10.0.0.1:7443.evil.example", "10.0.0.1:7443", false),
        ("null", "10.0.0.1:7443", false),
        ("", "10.0.0.1:7443", false),
    ] {
        let headers = header_map(&[(header::ORIGIN, origin), (header::HOST, host)]);
        assert_eq!(is_own_origin(&headers), own, "{origin} at {host}");
    }
    assert!(!is_own_origin(&header_map(&[(header::ORIGIN, "https://10.0.0.1:7443")])));
    assert!(is_own_origin(&header_map(&[(header::HOST, "10.0.0.1:7443")])), "no page asks");
}

/// A connection that has been upgraded, and what came with that.
async fn connect(
    guest: Result<Box<dyn ChannelStream>, Problem>,
    patience: Patience,
) -> WebSocketStream<DuplexStream> {
    let guest = Arc::new(Mutex::new(Some(guest)));
    let open = move |request: Request| async move {
        let guest = guest.lock().take().expect("one connection each");
        Ok::<_, Problem>(serve(upgrade(request).await?, guest, patience))
    };
    let (client, server) = tokio::io::duplex(4096);
    let router = Router::new().route("/", get(open));
    tokio::spawn(serve_one(server, router, CancellationToken::new()));
    let mut request = "ws://node/".into_client_request().unwrap();
    let protocols = HeaderValue::from_static("hci-display, ticket.secret");
    request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocols);
    let (socket, response) = client_async(request, client).await.unwrap();
    assert_eq!(response.headers()[header::SEC_WEBSOCKET_PROTOCOL], PROTOCOL, "the ticket is not told again");
    socket
}

async fn connected(patience: Patience) -> (WebSocketStream<DuplexStream>, DuplexStream) {
    let (guest, ours) = tokio::io::duplex(1024);
    (connect(Ok(Box::new(ours)), patience).await, guest)
}

/// The guest's side, which notices if the server panics while it has it.
struct Watched {
    stream: DuplexStream,
    panicked: Arc<AtomicBool>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.panicked.fetch_or(std::thread::panicking(), Ordering::Relaxed);
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// How the server ends it.
async fn closed(socket: &mut WebSocketStream<DuplexStream>) -> Option<ClientCloseFrame> {
    timeout(SOON, async {
        loop {
            match socket.next().await {
                Some(Ok(tungstenite::Message::Close(frame))) => return frame,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    })
    .await
    .expect("it is closed")
}

async fn is_let_go(guest: &mut DuplexStream) {
    timeout(SOON, async { while !matches!(guest.read(&mut [0; 256]).await, Ok(0) | Err(_)) {} })
        .await
        .expect("the guest's side ends");
}

#[tokio::test]
async fn bytes_go_both_ways_in_order() {
    let (mut socket, guest) = connected(PATIENCE).await;
    let (mut from_client, mut to_client) = tokio::io::split(guest);
    let output: Vec<u8> = (0..200_000_u32).map(|at| at as u8).collect();
    let sent = output.clone();
    tokio::spawn(async move { to_client.write_all(&sent).await.unwrap() });
    for piece in ["typed", "", " here"] {
        socket.send(tungstenite::Message::binary(piece.as_bytes().to_vec())).await.unwrap();
    }
    let mut typed = [0; 10];
    timeout(SOON, from_client.read_exact(&mut typed)).await.unwrap().unwrap();
    assert_eq!(&typed, b"typed here");
    let mut shown = Vec::new();
    while shown.len() < output.len() {
        match timeout(SOON, socket.next()).await.unwrap().unwrap().unwrap() {
            tungstenite::Message::Binary(piece) => shown.extend_from_slice(&piece),
            tungstenite::Message::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(shown == output);
}

#[tokio::test]
async fn why_it_ends_is_said() {
    let (mut socket, guest) = connected(PATIENCE).await;
    drop(guest);
    assert_eq!(u16::from(closed(&mut socket).await.unwrap().code), 1000);

    let (mut socket, mut guest) = connected(PATIENCE).await;
    socket.send(tungstenite::Message::text("hello")).await.unwrap();
    assert_eq!(u16::from(closed(&mut socket).await.unwrap().code), 1003);
    is_let_go(&mut guest).await;

    let detail = format!("the VM does not run, or has no display{}", "é".repeat(100));
    let nothing = Problem::new(ProblemKind::Unavailable, detail.clone(), "");
    let frame = closed(&mut connect(Err(nothing), PATIENCE).await).await.unwrap();
    assert_eq!(u16::from(frame.code), 4503);
    assert!(detail.starts_with(frame.reason.as_str()) && frame.reason.len() > 100, "{}", frame.reason);
}

#[tokio::test]
async fn who_leaves_sends_too_much_or_is_silent_is_let_go() {
    let (mut socket, mut guest) = connected(PATIENCE).await;
    socket.close(None).await.unwrap();
    is_let_go(&mut guest).await;

    let (socket, mut guest) = connected(PATIENCE).await;
    drop(socket);
    is_let_go(&mut guest).await;

    let (mut socket, mut guest) = connected(PATIENCE).await;
    let long = tungstenite::Message::binary(vec![0; MAX_MESSAGE + 1]);
    let _ = timeout(SOON, socket.send(long)).await.unwrap();
    let mut first = [0];
    assert_eq!(timeout(SOON, guest.read(&mut first)).await.unwrap().unwrap(), 0, "not a byte of it");

    let hasty = Patience { client: Duration::from_millis(200), ..PATIENCE };
    let (_silent, mut guest) = connected(hasty).await;
    is_let_go(&mut guest).await;

    // Its guest has much to say, and it does not read.
    let (_full, guest) = connected(hasty).await;
    let (_from_client, mut to_client) = tokio::io::split(guest);
    let flood = async { while to_client.write_all(&[0; 4096]).await.is_ok() {} };
    timeout(SOON, flood).await.expect("the guest's side ends");
}

#[tokio::test]
async fn who_answers_pings_may_be_silent() {
    let short = Duration::from_millis(50);
    let patience = Patience { ping: short, client: 20 * short, ..PATIENCE };
    let (mut socket, mut guest) = connected(patience).await;
    let waited = tokio::time::sleep(40 * short);
    let listening = async { while let Some(Ok(_)) = socket.next().await {} };
    let first = futures_util::future::select(Box::pin(waited), Box::pin(listening)).await;
    assert!(matches!(first, Either::Left(_)), "it was let go");
    drop(first);
    guest.write_all(b"still there").await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Frames and fragments that are none: that connection ends or goes on, and the next one is served.
    #[test]
    fn garbage_harms_nobody(
        garbage in prop::collection::vec(any::<u8>(), 0..2000),
        start in prop::option::of(prop::sample::select(vec![0x00_u8, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8a, 0xf2])),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut guest, stream) = tokio::io::duplex(1024);
            let panicked = Arc::new(AtomicBool::new(false));
            let watched = Watched { stream, panicked: panicked.clone() };
            let mut raw = connect(Ok(Box::new(watched)), PATIENCE).await.into_inner();
            let _ = raw.write_all(&start.into_iter().chain(garbage).collect::<Vec<_>>()).await;
            drop(raw);
            is_let_go(&mut guest).await;
            assert!(!panicked.load(Ordering::Relaxed));

            let (mut socket, mut guest) = connected(PATIENCE).await;
            socket.send(tungstenite::Message::binary(vec![1])).await.unwrap();
            let mut typed = [0];
            timeout(SOON, guest.read_exact(&mut typed)).await.unwrap().unwrap();
        });
    }
}
