//! Getting a file from a web server, over any number of broken connections and restarts.
//!
//! What came is in the target file; beside it (`.source`) stands from where, and the server's validator (`ETag` or
//! `Last-Modified`) of that version. Whoever calls [`Download::run`] again, in this process or the next one, goes on
//! where the file ends, if the server says that it still has the same version (`If-Range`); otherwise it starts over.
//! A SHA-256, if one was given, is checked over the whole file at the end.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use reqwest::{
    Client, Response, StatusCode, Url,
    header::{CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED, RANGE},
    redirect,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};

use super::{room, sha256::Sha256};
use crate::{
    files::{self, Durability},
    state::Sha256Sum,
};

const REDIRECTS: usize = 5;
const CONNECT: Duration = Duration::from_secs(15);
/// The longest silence of a server.
const SILENCE: Duration = Duration::from_secs(30);
/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Progress is told, room looked for and the file synced after this much.
const STEP: u64 = 64 << 20;
/// How rustls says that nobody whom we trust vouches for the server.
const UNTRUSTED: &str = "invalid peer certificate";
/// What administrators have added to the public authorities is here on Debian.
const LOCAL_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Why a file did not come. Trying again would not help.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The URL makes no sense, or is none that we follow.
    #[error("{0}")]
    Url(String),
    /// The server does not give it.
    #[error("{url} answered {status}")]
    Refused {
        /// From where.
        url: String,
        /// What the server said.
        status: StatusCode,
    },
    /// Connections broke again and again.
    #[error("{url} does not come: {cause}")]
    Broken {
        /// From where.
        url: String,
        /// The last cause.
        cause: String,
    },
    /// It is larger than allowed.
    #[error("the source has more than {0} bytes")]
    TooLarge(u64),
    /// It does not fit on the node.
    #[error(transparent)]
    Room(#[from] room::RoomError),
    /// It is not what it should be.
    #[error("the SHA-256 of the source is {found}, not {expected}")]
    Sum {
        /// What came.
        found: Sha256Sum,
        /// What was to come.
        expected: Sha256Sum,
    },
    /// The file cannot be written.
    #[error("the source cannot be kept: {0}")]
    File(#[from] io::Error),
}

/// A file to get.
#[derive(Clone, Debug)]
pub struct Download {
    /// From where: http or https.
    pub url: String,
    /// Where to.
    pub to: PathBuf,
    /// The most bytes it may have.
    pub limit: u64,
    /// What its SHA-256 must be.
    pub sha256: Option<Sha256Sum>,
}

/// What stands beside the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    url: String,
    validator: Option<String>,
}

/// An attempt that ended early.
enum Attempt {
    Broken(String),
    Final(DownloadError),
}

impl<E: Into<DownloadError>> From<E> for Attempt {
    fn from(error: E) -> Self {
        Self::Final(error.into())
    }
}

/// Where the origin of a file is kept.
pub fn origin_file(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".source");
    file.with_file_name(name)
}

/// Checks a URL before anything is done about it.
pub fn check_url(text: &str) -> Result<Url, DownloadError> {
    let wrong = |why: &str| DownloadError::Url(format!("{text:?} cannot be fetched: {why}"));
    let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong("only http and https are"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("a password in it would be seen by everybody who sees the task"));
    }
    Ok(url)
}

/// Public authorities, and those that the node's administrators have added.
fn client() -> Result<Client, DownloadError> {
    let wrong = |error: String| DownloadError::Url(format!("no client for web servers: {error}"));
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Ok(local) = CertificateDer::pem_file_iter(LOCAL_AUTHORITIES) {
        roots.add_parsable_certificates(local.filter_map(Result::ok));
    }
    let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let redirects = redirect::Policy::custom(|attempt| {
        let was_safe = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
        if attempt.previous().len() > REDIRECTS {
            attempt.error("too many redirects")
        } else if was_safe && attempt.url().scheme() != "https" {
            attempt.error("a redirect from https to http")
        } else {
            attempt.follow()
        }
    });
    Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(redirects)
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .user_agent(concat!("hci/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| wrong(error.to_string()))
}

impl Download {
    /// Gets the file, or what is left of it. `progress` is told how many bytes are there, and of how many.
    pub async fn run(&self, mut progress: impl FnMut(u64, Option<u64>)) -> Result<u64, DownloadError> {
        let url = check_url(&self.url)?;
        let client = client()?;
        let (mut attempts, mut pause) = (0, FIRST_PAUSE);
        loop {
            let before = self.length();
            match self.attempt(&client, url.clone(), &mut progress).await {
                Ok(()) => break,
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Broken(cause)) => {
                    if self.length() > before {
                        (attempts, pause) = (0, FIRST_PAUSE);
                    }
                    attempts += 1;
                    tracing::info!(url = self.url, cause, attempts, "a download broke off");
                    if attempts == ATTEMPTS {
                        return Err(DownloadError::Broken { url: self.url.clone(), cause });
                    }
                    tokio::time::sleep(pause).await;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
            }
        }
        let (path, expected) = (self.to.clone(), self.sha256);
        let checked = tokio::task::spawn_blocking(move || check_sum(&path, expected)).await;
        let checked = checked.map_err(io::Error::other)?;
        if let Err(DownloadError::Sum { .. }) = &checked {
            // Going on with it would never help.
            self.forget();
        }
        checked?;
        Ok(self.length())
    }

    fn length(&self) -> u64 {
        fs::metadata(&self.to).map_or(0, |metadata| metadata.len())
    }

    fn forget(&self) {
        // What stays is overwritten or swept.
        let _ = files::remove_if_there(&self.to);
        let _ = files::remove_if_there(&origin_file(&self.to));
    }

    /// What is there already, and the validator of its version; nothing if it is of something else.
    fn begun(&self) -> Option<(u64, String)> {
        let origin: Origin = serde_json::from_slice(&fs::read(origin_file(&self.to)).ok()?).ok()?;
        let length = self.length();
        let validator = origin.validator?;
        (origin.url == self.url && length > 0).then_some((length, validator))
    }

    async fn attempt(
        &self,
        client: &Client,
        url: Url,
        progress: &mut impl FnMut(u64, Option<u64>),
    ) -> Result<(), Attempt> {
        let broken = |error: reqwest::Error| {
            let is_final = error.is_redirect() || error.is_builder();
            match chain(&error.without_url()) {
                // Neither where the way leads nor who answers changes by asking again.
                why if is_final || why.contains(UNTRUSTED) => {
                    Attempt::Final(DownloadError::Url(format!("{} cannot be fetched: {why}", self.url)))
                }
                why => Attempt::Broken(why),
            }
        };
        let mut request = client.get(url);
        let begun = self.begun();
        if let Some((length, validator)) = &begun {
            request = request.header(RANGE, format!("bytes={length}-")).header(IF_RANGE, validator);
        }
        let response = request.send().await.map_err(broken)?;
        let (mut file, mut length, total) = match (response.status(), begun) {
            (StatusCode::OK, _) => {
                let file = File::create(&self.to)?;
                let origin = Origin { url: self.url.clone(), validator: validator(response.headers()) };
                let text = serde_json::to_vec(&origin).map_err(io::Error::other)?;
                files::replace(&origin_file(&self.to), &text, 0o600, Durability::Durable)?;
                (file, 0, response.content_length())
            }
            (StatusCode::PARTIAL_CONTENT, Some((length, _))) => {
                let (start, total) = content_range(response.headers())
                    .ok_or_else(|| Attempt::Broken("an answer without Content-Range".to_owned()))?;
                if start != length {
                    self.forget();
                    return Err(Attempt::Broken("another range than the one asked for".to_owned()));
                }
                let mut file = OpenOptions::new().write(true).open(&self.to)?;
                file.seek(io::SeekFrom::End(0))?;
                (file, length, total)
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Some((length, _))) => {
                if unsatisfied_total(response.headers()) == Some(length) {
                    return Ok(());
                }
                self.forget();
                return Err(Attempt::Broken("the source is shorter than what came of it".to_owned()));
            }
            (status, _) => return Err(self.refused(status)),
        };
        if total.is_some_and(|total| total > self.limit) {
            return Err(DownloadError::TooLarge(self.limit).into());
        }
        let dir = self.to.parent().unwrap_or(Path::new("/")).to_owned();
        room::check(&dir, total.unwrap_or(0).saturating_sub(length))?;
        self.receive(response, &mut file, &mut length, total, progress, &dir).await?;
        file.sync_all()?;
        match total {
            Some(total) if length < total => Err(Attempt::Broken(format!("{length} of {total} bytes came"))),
            _ => Ok(()),
        }
    }

    async fn receive(
        &self,
        mut response: Response,
        file: &mut File,
        length: &mut u64,
        total: Option<u64>,
        progress: &mut impl FnMut(u64, Option<u64>),
        dir: &Path,
    ) -> Result<(), Attempt> {
        let mut step = *length;
        progress(*length, total);
        loop {
            let piece = match response.chunk().await {
                Ok(Some(piece)) => piece,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // What came stays for the next attempt, in this process or after a crash.
                    file.sync_all()?;
                    return Err(Attempt::Broken(chain(&error.without_url())));
                }
            };
            *length += piece.len() as u64;
            if *length > self.limit {
                return Err(DownloadError::TooLarge(self.limit).into());
            }
            file.write_all(&piece)?;
            if *length - step >= STEP {
                step = *length;
                // So that the next sync has little left to do, and a power cut takes little away.
                file.sync_data()?;
                room::check(dir, STEP)?;
                progress(*length, total);
            }
        }
    }

    fn refused(&self, status: StatusCode) -> Attempt {
        let passes = status.is_server_error()
            || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
        if passes {
            return Attempt::Broken(format!("the server answered {status}"));
        }
        DownloadError::Refused { url: self.url.clone(), status }.into()
    }
}

/// An error with its causes: reqwest's own text says little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What tells this version of the source from others. A weak tag does not: its bytes may differ.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let strong = text(ETAG).filter(|tag| !tag.starts_with("W/"));
    strong.or_else(|| text(LAST_MODIFIED)).map(str::to_owned)
}

/// `bytes START-END/TOTAL`: start and total.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, total) = text.split_once('/')?;
    let start = range.split_once('-')?.0.trim().parse().ok()?;
    Some((start, total.trim().parse().ok()))
}

/// `bytes */TOTAL`.
fn unsatisfied_total(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes */")?.trim().parse().ok()
}

/// Compares a file with a SHA-256.
pub fn check_sum(path: &Path, expected: Option<Sha256Sum>) -> Result<(), DownloadError> {
    let Some(expected) = expected else { return Ok(()) };
    let mut file = File::open(path)?;
    let (mut sum, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => sum.update(&buffer[..read]),
        }
    }
    let found = Sha256Sum(sum.finish());
    if found == expected { Ok(()) } else { Err(DownloadError::Sum { found, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_web_addresses_are_fetched() {
        assert!(check_url("https://cloud.debian.org/images/x.qcow2").is_ok());
        for wrong in ["file:///etc/shadow", "ftp://a/b", "nonsense", "https://me:secret@host/x", "http://"] {
            assert!(check_url(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_are_read() {
        let headers = |text: &str| HeaderMap::from_iter([(CONTENT_RANGE, text.parse().unwrap())]);
        assert_eq!(content_range(&headers("bytes 5-9/10")), Some((5, Some(10))));
        assert_eq!(content_range(&headers("bytes 5-9/*")), Some((5, None)));
        assert_eq!(content_range(&headers("lines 5-9/10")), None);
        assert_eq!(unsatisfied_total(&headers("bytes */10")), Some(10));
    }

    #[test]
    fn a_weak_tag_does_not_tell_versions_apart() {
        let headers = HeaderMap::from_iter([(ETAG, "W/\"a\"".parse().unwrap())]);
        assert_eq!(validator(&headers), None);
    }
}
