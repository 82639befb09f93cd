//! The API's client: one HTTP/1.1 exchange over the node's local socket, or over TLS with the cluster's CA pinned by
//! its fingerprint and a token as the credential.
//!
//! Each request has its own connection: the command line makes few, and none can be disturbed by an earlier one.

use std::io::SeekFrom;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::io::ReaderStream;

use super::exit::{CliError, Exit};
use crate::pinned_tls;

/// Where the API of a node is.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// The socket of the node that this runs on.
    Local(PathBuf),
    /// Another machine: `host:port`.
    Remote(String),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix://") {
            return Ok(Self::Local(PathBuf::from(path)));
        }
        let host = text.strip_prefix("https://").ok_or("an endpoint is https://HOST:PORT or unix:///PATH")?;
        let host = host.trim_end_matches('/');
        if host.is_empty() || host.contains('/') {
            return Err("an endpoint is https://HOST:PORT or unix:///PATH".to_owned());
        }
        Ok(Self::Remote(if host.contains(':') { host.to_owned() } else { format!("{host}:7443") }))
    }
}

/// The credential and the pinned identity for a remote endpoint.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// The bearer token.
    pub token: Option<String>,
    /// `sha256:…` of the cluster's CA certificate.
    pub ca_fingerprint: Option<String>,
}

/// A file to send.
#[derive(Debug, Clone, Copy)]
pub struct Upload<'a> {
    /// The file.
    pub file: &'a Path,
    /// Its length.
    pub size: u64,
    /// BLAKE3 of its content.
    pub blake3: &'a str,
    /// What its SHA-256 must be.
    pub sha256: Option<&'a str>,
}

/// Talks to the API of one node.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: Endpoint,
    credentials: Credentials,
}

type Body = BoxBody<Bytes, std::io::Error>;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A request that has no answer after this long has lost its node: even a forwarded write is answered with a task.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

impl Client {
    /// A client of that endpoint; nothing is connected yet.
    pub fn new(endpoint: Endpoint, credentials: Credentials) -> Self {
        Self { endpoint, credentials }
    }

    /// `GET path`, answered with JSON.
    pub async fn get(&self, path: &str) -> Result<Value, CliError> {
        self.json(Method::GET, path, None).await
    }

    /// `POST path` with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, CliError> {
        self.json(Method::POST, path, Some(body)).await
    }

    /// `DELETE path`.
    pub async fn delete(&self, path: &str) -> Result<Value, CliError> {
        self.json(Method::DELETE, path, None).await
    }

    /// Any method with an optional JSON body; an answer without a body is `null`, one that is no JSON a string.
    pub async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, CliError> {
        let bytes = body.map(Value::to_string).unwrap_or_default();
        let mut request = self.request(method, path)?;
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = build(request, Full::from(bytes).map_err(|never| match never {}).boxed())?;
        let response = tokio::time::timeout(ANSWER_LIMIT, self.send(request)).await.map_err(|_| {
            CliError::new(
                Exit::Unreachable,
                format!("no answer to {path} within {} s", ANSWER_LIMIT.as_secs()),
            )
            .next("hci status")
        })??;
        let bytes = collect(response.into_body()).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        Ok(serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned())))
    }

    /// `PUT path` with a file from an offset on as the body, streamed; `progress` is told of every piece that left.
    pub async fn upload(
        &self,
        path: &str,
        upload: &Upload<'_>,
        offset: u64,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Value, CliError> {
        let unreadable = |error: std::io::Error| {
            CliError::new(Exit::Usage, format!("cannot read {}", upload.file.display())).why(error)
        };
        let mut source = tokio::fs::File::open(upload.file).await.map_err(unreadable)?;
        source.seek(SeekFrom::Start(offset)).await.map_err(unreadable)?;
        let source = source.take(upload.size.saturating_sub(offset));
        let pieces = ReaderStream::with_capacity(source, 256 << 10)
            .inspect_ok(move |piece| progress(piece.len() as u64))
            .map_ok(Frame::data);
        let mut request = self
            .request(Method::PUT, path)?
            .header(CONTENT_LENGTH, upload.size.saturating_sub(offset))
            .header(CONTENT_TYPE, "application/octet-stream")
            .header("upload-offset", offset)
            .header("upload-length", upload.size)
            .header("x-blake3", upload.blake3);
        if let Some(sha256) = upload.sha256 {
            request = request.header("x-sha256", sha256);
        }
        let response = self.send(build(request, BodyExt::boxed(StreamBody::new(pieces)))?).await?;
        let bytes = collect(response.into_body()).await?;
        Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    /// `GET path`, answered with a stream.
    pub async fn stream(&self, path: &str) -> Result<Response<Incoming>, CliError> {
        let request = self.request(Method::GET, path)?;
        let request = build(request, Full::default().map_err(|never| match never {}).boxed())?;
        tokio::time::timeout(ANSWER_LIMIT, self.send(request)).await.unwrap_or_else(|_| {
            Err(CliError::new(Exit::Unreachable, format!("no answer to {path}")).next("hci status"))
        })
    }

    /// `GET path` as a switch to a raw stream of bytes in both directions.
    pub async fn upgrade(&self, path: &str) -> Result<hyper::upgrade::Upgraded, CliError> {
        let request =
            self.request(Method::GET, path)?.header(CONNECTION, "upgrade").header(UPGRADE, "hci-channel");
        let request = build(request, Full::default().map_err(|never| match never {}).boxed())?;
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(CliError::new(Exit::Failed, "the node did not open the stream"));
        }
        hyper::upgrade::on(response)
            .await
            .map_err(|error| CliError::new(Exit::Unreachable, "the stream broke").why(error))
    }

    fn request(&self, method: Method, path: &str) -> Result<hyper::http::request::Builder, CliError> {
        let host = match &self.endpoint {
            Endpoint::Local(_) => "localhost",
            Endpoint::Remote(host) => host,
        };
        let request = Request::builder().method(method).uri(path).header(HOST, host);
        Ok(match &self.credentials.token {
            Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        })
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, CliError> {
        let stream = self.connect().await?;
        let broken = |error: hyper::Error| {
            CliError::new(Exit::Unreachable, "the connection to the node broke").why(error).next("hci status")
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Ends with the exchange: it owns the only connection, which closes when the response was read.
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_client_error() || status.is_server_error() {
            let body = collect(response.into_body()).await?;
            return Err(CliError::from_problem(status.as_u16(), &body));
        }
        Ok(response)
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, CliError> {
        tokio::time::timeout(CONNECT_LIMIT, self.connect_unbounded())
            .await
            .unwrap_or_else(|_| Err(CliError::new(Exit::Unreachable, "the node did not answer within 10 s")))
    }

    async fn connect_unbounded(&self) -> Result<Box<dyn Stream>, CliError> {
        match &self.endpoint {
            Endpoint::Local(path) => match UnixStream::connect(path).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) => Err(CliError::new(
                    Exit::Unreachable,
                    format!("no hci node runs here ({} does not answer)", path.display()),
                )
                .why(error)
                .next("systemctl status hci-node, or give --endpoint https://NODE:7443")),
            },
            Endpoint::Remote(host) => {
                let unreachable =
                    |why: String| CliError::new(Exit::Unreachable, format!("cannot reach {host}")).why(why);
                let tcp = TcpStream::connect(host).await.map_err(|error| unreachable(error.to_string()))?;
                let fingerprint = self.credentials.ca_fingerprint.as_deref().ok_or_else(|| {
                    CliError::new(Exit::Usage, "a remote endpoint needs the CA's fingerprint")
                        .next("hci cluster get (on a node) shows it; give it as --ca-fingerprint")
                })?;
                let fingerprint = fingerprint.parse().map_err(|error| {
                    CliError::new(Exit::Usage, "the CA's fingerprint is not of the form sha256:HEX")
                        .why(error)
                })?;
                let stream = pinned_tls::connect(tcp, fingerprint)
                    .await
                    .map_err(|error| unreachable(error.to_string()))?;
                Ok(Box::new(stream))
            }
        }
    }
}

fn build(request: hyper::http::request::Builder, body: Body) -> Result<Request<Body>, CliError> {
    request
        .body(body)
        .map_err(|error| CliError::new(Exit::Usage, "a name or value cannot be sent").why(error))
}

async fn collect(body: Incoming) -> Result<Bytes, CliError> {
    match body.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(CliError::new(Exit::Unreachable, "the answer broke off").why(error)),
    }
}

/// Writes a name so that it can stand in a path.
pub fn segment(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_parsed_and_wrong_ones_are_explained() {
        assert!(
            matches!("unix:///run/x.sock".parse(), Ok(Endpoint::Local(path)) if path == Path::new("/run/x.sock"))
        );
        assert!(matches!("https://n1".parse(), Ok(Endpoint::Remote(host)) if host == "n1:7443"));
        assert!("http://n1".parse::<Endpoint>().is_err());
        assert!("https://n1/v1".parse::<Endpoint>().is_err());
    }

    #[test]
    fn a_name_cannot_leave_its_path_segment() {
        assert_eq!(segment("web1"), "web1");
        assert_eq!(segment("../nodes"), "..%2Fnodes");
        assert_eq!(segment("a b?c"), "a%20b%3Fc");
    }
}
