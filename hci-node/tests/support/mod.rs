//! What tests of images share: disks, `qemu-img`, a web server that breaks off.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use hci_node::{images::sha256::Sha256, state::Sha256Sum};

pub(crate) const MIB: usize = 1 << 20;

pub(crate) fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().expect("qemu-img (Debian: qemu-utils)");
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A raw disk with data, holes and zeroes written out, not a multiple of anything large.
pub(crate) fn disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len((9 * MIB + 512) as u64).unwrap();
    let mut seed = 7u64;
    let mut noise = vec![0; 300_000];
    for byte in &mut noise {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (seed >> 56) as u8;
    }
    file.write_all_at(&noise, 0).unwrap();
    file.write_all_at(&[0; MIB], MIB as u64).unwrap();
    file.write_all_at(&[b'a'; 200_000], (3 * MIB + 4096) as u64).unwrap();
    file.write_all_at(&noise[..100_001], (6 * MIB + 77) as u64).unwrap();
    file.write_all_at(b"the end", (9 * MIB + 505) as u64).unwrap();
    path
}

/// A web server with one file, which breaks off each answer after some bytes.
pub(crate) struct Server {
    address: std::net::SocketAddr,
    pub(crate) requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `version` is the tag of the file: a later request gets the content of the last one that was set.
    pub(crate) fn start(content: Arc<Mutex<(String, Vec<u8>)>>, at_most: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let head: Vec<_> =
                    lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
                let field = |name: &str| {
                    head.iter().find_map(|line| {
                        let (key, value) = line.split_once(": ")?;
                        key.eq_ignore_ascii_case(name).then(|| value.to_owned())
                    })
                };
                let (tag, bytes) = content.lock().unwrap().clone();
                let range = field("range").filter(|_| field("if-range").is_some_and(|asked| asked == tag));
                seen.lock().unwrap().push(format!("{} {}", head[0], range.clone().unwrap_or_default()));
                let from =
                    range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
                let answer = match (head[0].contains("/moved"), from) {
                    (true, _) => "HTTP/1.1 302 Found\r\nlocation: /file\r\ncontent-length: 0\r\n".to_owned(),
                    _ if head[0].contains("/none") => {
                        "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n".to_owned()
                    }
                    _ if head[0].contains("/circle") => {
                        "HTTP/1.1 302 Found\r\nlocation: /circle\r\ncontent-length: 0\r\n".to_owned()
                    }
                    (_, None) => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", bytes.len()),
                    (_, Some(from)) if from == bytes.len() => {
                        format!("HTTP/1.1 416 No\r\ncontent-range: bytes */{from}\r\ncontent-length: 0\r\n")
                    }
                    (_, Some(from)) => {
                        let (last, all) = (bytes.len() - 1, bytes.len());
                        let left = all - from;
                        format!(
                            "HTTP/1.1 206 Part\r\ncontent-range: bytes {from}-{last}/{all}\r\ncontent-length: {left}\r\n"
                        )
                    }
                };
                let body = match answer.starts_with("HTTP/1.1 20") {
                    true => &bytes[from.unwrap_or(0)..],
                    false => &[],
                };
                let body = &body[..body.len().min(at_most)];
                // A client that has gone is no concern of ours.
                let _ = write!(stream, "{answer}etag: {tag}\r\nconnection: close\r\n\r\n");
                let _ = stream.write_all(body);
            }
        });
        Self { address, requests }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

pub(crate) fn sum(bytes: &[u8]) -> Sha256Sum {
    let mut sum = Sha256::new();
    sum.update(bytes);
    Sha256Sum(sum.finish())
}
