//! The parent's side: starts a worker for an image, watches it, yields what it says the disk holds.
//!
//! The worker is never trusted and never waited for without end: what breaks the protocol, a silence of
//! [`Worker::patience`] or its death is an error. When the [`Reading`] is dropped the worker is killed.

use std::{
    fs::File,
    io,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use super::protocol::{Decoder, Event, Extent, Header, MAX_DATA, Mode, ProtocolError, printable};

/// The executable that runs, even after an upgrade has put another one in its place.
const SELF: &str = "/proc/self/exe";
/// The longest silence of a worker: it may walk many empty tables, or wait for a slow disk.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a worker that is being killed, or has said everything, may take to be gone.
const GONE: Duration = Duration::from_secs(10);
/// How much of a worker's last words is read.
const LAST_WORDS: u64 = 1024;

/// Why an image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The worker could not be started.
    #[error("the image worker cannot be started: {0}")]
    Start(#[source] io::Error),
    /// The image cannot be used; the worker says why.
    #[error("{0}")]
    Image(String),
    /// It said nothing for too long.
    #[error("the image worker said nothing for {} s and was ended", .0.as_secs())]
    Silent(Duration),
    /// It died.
    #[error("the image worker ended early: {0}")]
    Died(String),
    /// It broke the rules.
    #[error("the image worker sent {0}; the image may have been made to break it")]
    Garbage(#[from] ProtocolError),
    /// Its pipe failed.
    #[error("the image worker cannot be listened to: {0}")]
    Pipe(#[source] io::Error),
}

/// How workers are started.
#[derive(Clone, Debug)]
pub struct Worker {
    /// The `hci` executable.
    pub program: PathBuf,
    /// The longest silence.
    pub patience: Duration,
}

impl Default for Worker {
    fn default() -> Self {
        Self { program: SELF.into(), patience: PATIENCE }
    }
}

impl Worker {
    /// Starts a worker on an image that is open for reading, from this offset of the disk on.
    pub async fn open(&self, image: File, mode: Mode, from: u64) -> Result<Reading, ReadError> {
        let mut child = Command::new(&self.program)
            .args(["image-worker", mode.name(), "--from", &from.to_string()])
            .env_clear()
            // An arena that is only reserved does not count as used: the worker's limit of memory is a real one.
            .env("MIMALLOC_ARENA_EAGER_COMMIT", "0")
            .current_dir("/")
            .stdin(Stdio::from(image))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(ReadError::Start)?;
        let Some(pipe) = child.stdout.take() else {
            return Err(ReadError::Start(io::Error::other("no pipe")));
        };
        let mut reading =
            Reading { child, pipe, decoder: Decoder::new(mode), patience: self.patience, header: None };
        match reading.event().await? {
            Event::Header(header) if header.start == from => reading.header = Some(header),
            // The disk is shorter than it was: there is nothing left that could be read.
            _ => return Err(ProtocolError::BadHeader.into()),
        }
        Ok(reading)
    }

    /// Walks all tables of an image without reading its data: what it is, and how many bytes have content.
    pub async fn probe(&self, image: File) -> Result<(Header, u64), ReadError> {
        let mut reading = self.open(image, Mode::Probe, 0).await?;
        let header = reading.header()?;
        let mut present = 0;
        while let Some(extent) = reading.next().await? {
            if let Extent::Present { length, .. } = extent {
                present += length;
            }
        }
        Ok((header, present))
    }
}

/// A worker at work.
#[derive(Debug)]
pub struct Reading {
    child: Child,
    pipe: ChildStdout,
    decoder: Decoder,
    patience: Duration,
    header: Option<Header>,
}

impl Reading {
    /// What the image is.
    pub fn header(&self) -> Result<Header, ReadError> {
        self.header.ok_or(ReadError::Garbage(ProtocolError::BadHeader))
    }

    /// The worker's process id, while it lives.
    pub fn process(&self) -> Option<u32> {
        self.child.id()
    }

    /// The next piece of the disk; none when all of it came. Not to be called again after an error.
    pub async fn next(&mut self) -> Result<Option<Extent>, ReadError> {
        match self.event().await? {
            Event::Extent(extent) => Ok(Some(extent)),
            Event::End => {
                // An end is believed only of a process that agrees that it has ended.
                match timeout(GONE, self.child.wait()).await {
                    Ok(Ok(status)) if status.success() => Ok(None),
                    Ok(Ok(status)) => Err(ReadError::Died(self.last_words(status).await)),
                    Ok(Err(error)) => Err(ReadError::Pipe(error)),
                    Err(_) => Err(ReadError::Silent(GONE)),
                }
            }
            Event::Header(_) | Event::Refused(_) => Err(ProtocolError::OutOfOrder.into()),
        }
    }

    async fn event(&mut self) -> Result<Event, ReadError> {
        loop {
            if let Some(event) = self.decoder.decode()? {
                return match event {
                    Event::Refused(reason) => Err(ReadError::Image(reason)),
                    event => Ok(event),
                };
            }
            let buffer = self.decoder.buffer();
            buffer.reserve(MAX_DATA as usize / 4);
            match timeout(self.patience, self.pipe.read_buf(buffer)).await {
                Err(_) => return Err(ReadError::Silent(self.patience)),
                Ok(Err(error)) => return Err(ReadError::Pipe(error)),
                Ok(Ok(0)) => {
                    let status = match timeout(GONE, self.child.wait()).await {
                        Ok(Ok(status)) => status,
                        Ok(Err(error)) => return Err(ReadError::Pipe(error)),
                        Err(_) => return Err(ReadError::Silent(GONE)),
                    };
                    return Err(ReadError::Died(self.last_words(status).await));
                }
                Ok(Ok(_)) => {}
            }
        }
    }

    /// How the worker ended, and what it wrote before.
    async fn last_words(&mut self, status: ExitStatus) -> String {
        let mut words = Vec::new();
        if let Some(stderr) = &mut self.child.stderr {
            // Without them the status has to do.
            let _ = timeout(GONE, stderr.take(LAST_WORDS).read_to_end(&mut words)).await;
        }
        let words = printable(&words);
        let end = match status.signal() {
            // How Rust says it, before it does what the sandbox does not let it do.
            Some(libc::SIGSYS) if words.contains("memory allocation") => {
                return "it needed more memory than it may have".to_owned();
            }
            Some(libc::SIGSYS) => "it was ended for a forbidden system call".to_owned(),
            Some(libc::SIGXCPU) => "it used too much CPU time".to_owned(),
            Some(libc::SIGKILL) => "it was killed (CPU time, memory, or by hand)".to_owned(),
            Some(signal) => format!("signal {signal}"),
            None => format!("exit code {}", status.code().unwrap_or_default()),
        };
        if words.is_empty() { end } else { format!("{end}: {words}") }
    }
}
