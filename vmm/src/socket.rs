//! Sockets that the VMM serves for those outside.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket's place in the file system. Dropped, it is removed, unless something else is there by then: a successor of this process makes its own
/// sockets, and is given the names of ours when we have ended.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// Device and number of the file.
    file: Option<(u64, u64)>,
}

impl Place {
    fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), file: file_at(path) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.file.is_some() && file_at(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Listens on `path`, without blocking. A socket left by a VMM that was killed goes; anything else at that path is not ours to remove.
pub(crate) fn listen(path: &Path) -> io::Result<(UnixListener, Place)> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(ErrorKind::AlreadyExists, "is there and is not a socket")),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok((listener, Place::of(path)))
}

/// Connects to who listens on `path`; does not wait, neither for that nor later. Fails when nobody does, or when too many others wait to be let in.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes plain numbers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    // SAFETY: a structure of numbers, for which zeroes are values.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // One byte is left for the zero at the end.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "no path of a socket"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a `sockaddr_un` of that length, and outlives the call.
    let connected = unsafe { libc::connect(fd, std::ptr::from_ref(&address).cast(), length) };
    if connected < 0 { Err(io::Error::last_os_error()) } else { Ok(stream) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_but_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        drop(listen(&path).unwrap());
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(listen(&path).is_err());
    }

    #[test]
    fn a_socket_that_another_process_has_put_in_its_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let (_old, place) = listen(&path).unwrap();
        let new = dir.path().join("b.sock");
        let (_new, _place) = listen(&new).unwrap();
        fs::rename(&new, &path).unwrap();
        drop(place);
        connect(&path).unwrap();
    }

    #[test]
    fn connecting_never_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        assert_eq!(connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let (listener, _place) = listen(&path).unwrap();
        let streams: Vec<_> = std::iter::from_fn(|| connect(&path).ok()).take(100_000).collect();
        assert!(!streams.is_empty());
        assert_eq!(connect(&path).unwrap_err().kind(), ErrorKind::WouldBlock);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        drop(streams);
        assert!(connect(&dir.path().join("x".repeat(200))).is_err());
    }
}
