//! Channels into a guest on the user's machine: its screen for a viewer, a program in it on standard input and output.

use std::net::SocketAddr;

use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional};
use tokio::net::TcpListener;

use super::client::Client;
use super::exit::{CliError, Exit};
use super::nouns::{Context, say};
use super::output::{self, Format};

/// Connects standard input and output until the guest's side ends.
pub async fn pipe(client: &Client, path: &str) -> Result<(), CliError> {
    let stream = TokioIo::new(client.upgrade(path).await?);
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let input = async {
        let mut typed = tokio::io::stdin();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match typed.read(&mut buffer).await {
                // What the guest has to say to it still comes.
                Ok(0) | Err(_) => std::future::pending::<()>().await,
                Ok(count) => {
                    if to_guest.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let mut out = tokio::io::stdout();
    tokio::select! {
        // A reader that went away has what it wanted.
        _ = copy(&mut from_guest, &mut out) => {}
        () = input => {}
    }
    let _ = out.flush().await;
    Ok(())
}

/// Prints a link with which a browser shows a VM's screen, and nothing else where scripts read.
pub async fn link(context: &Context, path: &str) -> Result<(), CliError> {
    let answer = context.client.post(&format!("{path}/tickets"), &json!({})).await?;
    let text = |key: &str| answer.get(key).and_then(Value::as_str);
    if let Some(fingerprint) = text("certificate") {
        say(&format!("the browser does not know this node's certificate; its fingerprint is {fingerprint}"));
    }
    match (context.format, text("url")) {
        (Format::Table | Format::Wide | Format::Name, Some(url)) => output::line(url),
        (format, _) => output::print(format, &answer, &[])?,
    }
    Ok(())
}

/// Serves a channel to whoever connects on this machine, until the user ends it.
pub async fn serve(client: &Client, name: &str, path: &str, listen: SocketAddr) -> Result<(), CliError> {
    let failed =
        |error: std::io::Error| CliError::new(Exit::Failed, format!("cannot listen on {listen}")).why(error);
    // Whether there is anything to see is said now, not to the first viewer.
    drop(client.upgrade(path).await?);
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?;
    say(&format!("the screen of {name} is at vnc://{at}, for a VNC viewer on this machine; Ctrl-C ends it"));
    loop {
        let (mut viewer, _) = listener.accept().await.map_err(failed)?;
        let (client, path) = (client.clone(), path.to_owned());
        tokio::spawn(async move {
            match client.upgrade(&path).await {
                // Either side may go away at any time.
                Ok(guest) => drop(copy_bidirectional(&mut viewer, &mut TokioIo::new(guest)).await),
                Err(error) => say(&error.to_string()),
            }
        });
    }
}
