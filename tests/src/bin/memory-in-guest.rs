//! `memory-in-guest`: listens on vsock port 1024 of the guest that it runs in, and does what the first line of each connection asks for.
//!
//! | line | does |
//! |---|---|
//! | `echo` | sends back what comes, and ends its half after the other one has ended |
//! | `fill MIB` | fills so much memory with numbers and keeps it |
//! | `check` | says `ok` if what it keeps is what it filled it with |
//! | `drop` | gives up what it keeps |
//! | `total` | says how many bytes of memory the kernel has |
//! | `call PORT` | connects to that port of the host, and sends back what comes there |

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, shutdown,
    socket,
};

const PORT: u32 = 1024;
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
const WORDS_OF_A_MIB: usize = (1 << 20) / size_of::<u64>();

type Kept = Arc<Mutex<Vec<u64>>>;

fn main() -> Result<()> {
    let listener = stream()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, PORT))?;
    listen(&listener, Backlog::new(64)?)?;
    println!("listening");
    let kept = Kept::default();
    loop {
        let accepted = accept(listener.as_raw_fd())?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let stream = File::from(unsafe { OwnedFd::from_raw_fd(accepted) });
        let kept = kept.clone();
        std::thread::spawn(move || {
            if let Err(error) = serve(stream, &kept) {
                println!("a connection ended with {error:#}");
            }
        });
    }
}

fn stream() -> Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("no vsock here")
}

fn serve(mut stream: File, kept: &Kept) -> Result<()> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        ensure!(line.len() < 64, "a long line");
        line.push(byte[0]);
    }
    let line = String::from_utf8(line)?;
    let said = match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["echo"] => return echo(stream),
        ["call", port] => {
            let called = stream_to(port.parse()?)?;
            echo(called)?;
            "ok".to_owned()
        }
        ["fill", mib] => {
            let words = mib.parse::<usize>()? * WORDS_OF_A_MIB;
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            // First, or there would have to be room for both.
            *kept = Vec::new();
            *kept = (1..=words as u64).collect();
            "ok".to_owned()
        }
        ["check"] => {
            let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let sound = (1..).zip(kept.iter()).all(|(number, word)| number == *word);
            if sound && !kept.is_empty() { "ok" } else { "damaged" }.to_owned()
        }
        ["drop"] => {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
            "ok".to_owned()
        }
        ["total"] => total()?.to_string(),
        _ => bail!("asked for {line:?}"),
    };
    stream.write_all(said.as_bytes())?;
    Ok(())
}

fn stream_to(port: u32) -> Result<File> {
    let called = stream()?;
    connect(called.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(File::from(called))
}

fn echo(mut stream: File) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(shutdown(stream.as_raw_fd(), Shutdown::Write)?),
            len => stream.write_all(&piece[..len])?,
        }
    }
}

/// Bytes of memory that the kernel has.
fn total() -> Result<u64> {
    let said = std::fs::read_to_string("/proc/meminfo")?;
    let line = said.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("no MemTotal")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}
