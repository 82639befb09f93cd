//! The serial console of a VM on the user's terminal.

use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};

use hyper_util::rt::TokioIo;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::Client;
use super::exit::{CliError, Exit};

/// Ctrl-], as telnet has it.
const DETACH: u8 = 0x1d;

/// Prints the ring of the last output.
pub async fn log(client: &Client, path: &str) -> Result<(), CliError> {
    let log = client.get(&format!("{path}/log")).await?;
    let text = log.as_str().unwrap_or_default();
    // A reader that went away has what it wanted.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

/// Connects the terminal to the console until the VM's end closes it or the user detaches.
pub async fn attach(client: &Client, path: &str) -> Result<(), CliError> {
    let stream = client.upgrade(path).await?;
    let _raw = RawTerminal::enter();
    let (mut from_vm, mut to_vm) = tokio::io::split(TokioIo::new(stream));
    let output = async {
        let mut buffer = [0; 4096];
        loop {
            match from_vm.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    let mut out = std::io::stdout().lock();
                    if out.write_all(&buffer[..count]).and_then(|()| out.flush()).is_err() {
                        return;
                    }
                }
            }
        }
    };
    let input = async {
        let mut keys = tokio::io::stdin();
        let mut buffer = [0; 256];
        loop {
            match keys.read(&mut buffer).await {
                // End of input is no wish to leave: `hci vm console web1 </dev/null` shows the output.
                Ok(0) | Err(_) => std::future::pending::<()>().await,
                Ok(count) => {
                    let typed = &buffer[..count];
                    let end = typed.iter().position(|key| *key == DETACH);
                    if to_vm.write_all(&typed[..end.unwrap_or(count)]).await.is_err() || end.is_some() {
                        return;
                    }
                }
            }
        }
    };
    tokio::select! {
        () = output => Err(CliError::new(Exit::Unreachable, "the console was closed: the VM ended or its node is lost")),
        () = input => Ok(()),
    }
}

/// The terminal in raw mode, put back when dropped.
struct RawTerminal(Option<(OwnedFd, Termios)>);

impl RawTerminal {
    fn enter() -> Self {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Self(None);
        }
        let entered = stdin.as_fd().try_clone_to_owned().ok().and_then(|terminal| {
            let before = tcgetattr(&terminal).ok()?;
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            tcsetattr(&terminal, SetArg::TCSANOW, &raw).ok()?;
            Some((terminal, before))
        });
        Self(entered)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some((terminal, before)) = &self.0 {
            // Nothing can be done about a terminal that went away.
            let _ = tcsetattr(terminal, SetArg::TCSANOW, before);
        }
    }
}
