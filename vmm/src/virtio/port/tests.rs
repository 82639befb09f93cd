//! The port between a driver and clients, both of which misbehave.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::control::tests::{CLOSED, OPENED, READY, TAKEN};
use super::*;
use crate::virtio::test_driver::{Buffer, Driver};

const DEADLINE: Duration = Duration::from_secs(20);
const NAME: &str = "org.example.port";

fn to_device(driver: &mut Driver, queue: u16, bytes: &[u8]) {
    driver.exchange(queue.into(), &[Buffer::Readable(bytes.to_vec())]);
}

fn from_device(driver: &mut Driver, queue: u16) -> Vec<u8> {
    let used = driver.exchange(queue.into(), &[Buffer::Writable(64)]);
    used.data[..used.written as usize].to_vec()
}

/// A driver that has taken the port.
fn taken(port: &mut Port) -> Driver {
    let mut driver = Driver::start(port);
    to_device(&mut driver, CONTROL_FROM_GUEST, &READY);
    assert_eq!(from_device(&mut driver, CONTROL_TO_GUEST), [1, 0, 0, 0, 1, 0, 1, 0]);
    to_device(&mut driver, CONTROL_FROM_GUEST, &TAKEN);
    let named = from_device(&mut driver, CONTROL_TO_GUEST);
    assert_eq!(named[8..], *NAME.as_bytes());
    driver
}

fn opened(port: &mut Port) -> Driver {
    let mut driver = taken(port);
    to_device(&mut driver, CONTROL_FROM_GUEST, &OPENED);
    driver
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// A client that the guest knows of.
fn client(driver: &mut Driver, path: &Path) -> UnixStream {
    let client = connect(path);
    assert_eq!(from_device(driver, CONTROL_TO_GUEST), OPENED);
    client
}

fn ends(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn bytes_go_both_ways_while_both_ends_are_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port.sock");
    let mut port = Port::new(NAME, &path).unwrap();
    let mut driver = taken(&mut port);
    assert!(ends(&mut connect(&path)), "nobody in the guest has it open");

    to_device(&mut driver, CONTROL_FROM_GUEST, &OPENED);
    let mut client = client(&mut driver, &path);
    client.write_all(b"question").unwrap();
    assert_eq!(from_device(&mut driver, TO_GUEST), b"question");
    to_device(&mut driver, FROM_GUEST, b"answer");
    assert_eq!(read(&mut client, 6), b"answer");

    to_device(&mut driver, FROM_GUEST, b"bye");
    to_device(&mut driver, CONTROL_FROM_GUEST, &CLOSED);
    assert_eq!(read(&mut client, 3), b"bye");
    assert!(ends(&mut client), "the guest closed it");
    assert_eq!(from_device(&mut driver, CONTROL_TO_GUEST), CLOSED);
    drop(port);
    assert!(!path.exists());
}

#[test]
fn a_new_client_takes_the_place_of_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port.sock");
    let mut port = Port::new(NAME, &path).unwrap();
    let mut driver = opened(&mut port);
    let mut first = client(&mut driver, &path);
    let mut second = connect(&path);
    assert!(ends(&mut first));
    to_device(&mut driver, FROM_GUEST, b"for the second");
    assert_eq!(read(&mut second, 14), b"for the second");
    drop(second);
    assert_eq!(from_device(&mut driver, CONTROL_TO_GUEST), CLOSED, "the guest learns that it is gone");
    to_device(&mut driver, FROM_GUEST, b"for nobody");
    let mut third = client(&mut driver, &path);
    to_device(&mut driver, FROM_GUEST, b"for the third");
    assert_eq!(read(&mut third, 13), b"for the third");
}

#[test]
fn a_client_that_does_not_read_makes_the_guest_wait_and_loses_nothing() {
    const PIECE: usize = 16 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port.sock");
    let mut port = Port::new(NAME, &path).unwrap();
    let mut driver = opened(&mut port);
    let mut client = client(&mut driver, &path);
    let mut sent = 0usize;
    let stuck = loop {
        let piece = vec![(sent / PIECE) as u8; PIECE];
        let pending = driver.offer(FROM_GUEST.into(), &[Buffer::Readable(piece)]);
        sent += PIECE;
        assert!(sent < 64 << 20, "there is no end to what is kept for a client");
        let deadline = Instant::now() + Duration::from_millis(300);
        while !driver.is_used(FROM_GUEST.into()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !driver.is_used(FROM_GUEST.into()) {
            break pending;
        }
    };
    let received = read(&mut client, sent);
    assert!(received.chunks(PIECE).enumerate().all(|(at, piece)| piece.iter().all(|byte| *byte == at as u8)));
    assert!(driver.finish(stuck).is_some());
}

#[test]
fn a_guest_that_does_not_read_makes_the_client_wait_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port.sock");
    let mut port = Port::new(NAME, &path).unwrap();
    let mut driver = opened(&mut port);
    let mut client = client(&mut driver, &path);
    let sent: Vec<u8> = (0..1_000_000u32).map(|at| (at % 251) as u8).collect();
    let expected = sent.clone();
    let writer = std::thread::spawn(move || client.write_all(&sent).map(|()| client));
    let mut received = Vec::new();
    while received.len() < expected.len() {
        let used = driver.exchange(TO_GUEST.into(), &[Buffer::Writable(1000), Buffer::Writable(3000)]);
        assert!(used.written > 0);
        received.extend_from_slice(&used.data[..used.written as usize]);
    }
    assert_eq!(received, expected);
    writer.join().unwrap().unwrap();
}

#[test]
fn buffers_that_make_no_sense_are_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port.sock");
    let mut port = Port::new(NAME, &path).unwrap();
    let mut driver = opened(&mut port);
    let mut client = client(&mut driver, &path);
    for queue in [CONTROL_FROM_GUEST, FROM_GUEST] {
        for buffers in [[Buffer::Outside(64)], [Buffer::Writable(64)], [Buffer::Readable(vec![])]] {
            assert_eq!(driver.exchange(queue.into(), &buffers).written, 0, "{buffers:?}");
        }
    }
    client.write_all(b"x").unwrap();
    assert_eq!(driver.exchange(TO_GUEST.into(), &[Buffer::Readable(vec![0; 8])]).written, 0);
    assert_eq!(from_device(&mut driver, TO_GUEST), b"x", "it is still served");
}

#[test]
fn a_driver_starts_anew_after_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port.sock");
    let mut port = Port::new(NAME, &path).unwrap();
    let mut driver = opened(&mut port);
    let mut before = client(&mut driver, &path);
    port.reset();
    assert!(ends(&mut before));
    let mut driver = opened(&mut port);
    let mut after = client(&mut driver, &path);
    after.write_all(b"again").unwrap();
    assert_eq!(from_device(&mut driver, TO_GUEST), b"again");
}

#[test]
fn the_port_stays_open_over_a_move_and_rings_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (old_path, new_path) = (dir.path().join("old.sock"), dir.path().join("new.sock"));
    let mut old = Port::new(NAME, &old_path).unwrap();
    let mut driver = opened(&mut old);
    let mut before = client(&mut driver, &old_path);
    let mut new = Port::new(NAME, &new_path).unwrap();
    driver.move_to(&mut old, &mut new);
    assert!(ends(&mut before));
    assert_eq!(from_device(&mut driver, CONTROL_TO_GUEST), CLOSED, "its client is not there");
    let mut after = client(&mut driver, &new_path);
    to_device(&mut driver, FROM_GUEST, b"still open");
    assert_eq!(read(&mut after, 10), b"still open");
}

#[test]
fn a_hostile_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut port = Port::new(NAME, &dir.path().join("port.sock")).unwrap();
    assert!(port.restore(&[7; 5]).is_err());
    assert!(port.restore(&[]).is_err());
}
