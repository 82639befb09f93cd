//! A VM's screen in a browser, as far as this goes without one: three nodes of real processes, the command line, the page over HTTPS and a WebSocket
//! opened with a ticket. The guest is real; its display is played by the test.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::PathBuf,
};

use cluster::{Cluster, eventually};
use futures_util::{SinkExt, StreamExt};
use hci_node::pinned_tls;
use tokio::{net::TcpStream, runtime::Runtime};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message, client::IntoClientRequest},
};

/// Plays the display of the VM, which has none as it boots without firmware: greets, and sends back what it gets.
fn play_display(cluster: &Cluster) {
    let vms = || fs::read_dir(cluster.path(1, "run/vm")).ok();
    let dir: PathBuf = eventually("the VM has a directory", || Some(vms()?.next()?.ok()?.path()));
    let listener = UnixListener::bind(dir.join("display.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut piece = [0; 4096];
                let mut sent = stream.write_all(b"RFB 003.008\n").is_ok();
                while sent {
                    let read = stream.read(&mut piece).unwrap_or(0);
                    sent = read > 0 && stream.write_all(&piece[..read]).is_ok();
                }
            });
        }
    });
}

/// What `hci vm display web1 --browser` prints of a node: host, VM and ticket.
fn link(cluster: &Cluster, n: usize) -> [String; 3] {
    let url = cluster.ok(n, &["vm", "display", "web1", "--browser"]);
    let rest = url.strip_prefix("https://").and_then(|rest| rest.strip_suffix('\n')).unwrap();
    let (host, fragment) = rest.split_once("/display/#").unwrap();
    let part = |key: &str| {
        let parts = fragment.split('&').filter_map(|part| part.split_once('='));
        parts.filter(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).next().unwrap()
    };
    assert_eq!(part("name"), "web1");
    [host.to_owned(), part("vm"), part("ticket")]
}

async fn tls(host: &str) -> TlsStream<TcpStream> {
    pinned_tls::connect_unverified(TcpStream::connect(host).await.unwrap()).await.unwrap()
}

/// Opens a WebSocket as the page does.
async fn open(
    host: &str,
    origin: &str,
    vm: &str,
    ticket: &str,
) -> Result<WebSocketStream<TlsStream<TcpStream>>, u16> {
    let mut request = format!("wss://{host}/v1/vms/{vm}/display").into_client_request().unwrap();
    let headers = request.headers_mut();
    headers.insert("origin", format!("https://{origin}").parse().unwrap());
    headers.insert("sec-websocket-protocol", format!("hci-display, ticket.{ticket}").parse().unwrap());
    match client_async(request, tls(host).await).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_browser_gets_a_vms_screen_with_a_link_and_only_once() {
    if !cluster::has_kvm() {
        return;
    }
    let cluster = Cluster::start();
    cluster.create_vm(500_000);
    let said = cluster.fails(2, &["vm", "display", "web1", "--browser"]);
    assert!(said.contains("no display"), "{said}");
    play_display(&cluster);

    let runtime = Runtime::new().unwrap();
    // The VM's own node, and another one.
    for n in [1, 2] {
        let [host, vm, ticket] = link(&cluster, n);
        runtime.block_on(async {
            let mut socket = open(&host, &host, &vm, &ticket).await.unwrap();
            socket.send(Message::binary(b"typed".to_vec())).await.unwrap();
            let mut shown = Vec::new();
            while shown.len() < 17 {
                if let Message::Binary(piece) = socket.next().await.unwrap().unwrap() {
                    shown.extend_from_slice(&piece);
                }
            }
            assert_eq!(shown, b"RFB 003.008\ntyped");
            assert_eq!(open(&host, &host, &vm, &ticket).await.err(), Some(401), "a second time");
        });
    }

    let [host, vm, ticket] = link(&cluster, 1);
    let [elsewhere, _, other_ticket] = link(&cluster, 3);
    runtime.block_on(async {
        assert_eq!(open(&elsewhere, &elsewhere, &vm, &ticket).await.err(), Some(401), "on another node");
        assert_eq!(open(&host, &host, &vm, &other_ticket).await.err(), Some(401));
        assert_eq!(open(&host, &host, "web1", &ticket).await.err(), Some(401), "by a name");
        assert_eq!(open(&host, "evil.example", &vm, &ticket).await.err(), Some(403), "of another site");
        assert_eq!(open(&host, &host, &vm, "").await.err(), Some(401), "without one");

        // The page needs none; whatever else there is does.
        for (path, status) in [
            ("/display/", "200"),
            ("/display/display.js", "200"),
            ("/display/display.css", "200"),
            ("/display/tickets.rs", "401"),
            ("/display", "401"),
            ("/v1/vms", "401"),
        ] {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut stream = tls(&host).await;
            let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            let answer = String::from_utf8_lossy(&answer);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
            assert_eq!(
                answer.contains("content-security-policy: default-src 'none'"),
                status == "200",
                "{path}"
            );
        }
    });
}
