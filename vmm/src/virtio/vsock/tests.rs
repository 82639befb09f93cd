//! Sockets between a driver and programs outside, both of which misbehave.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use proptest::prelude::*;

use super::connection::{Connection, ROOM};
use super::packet::{HEADER_BYTES, HOST_CID, Header, NO_RECEIVE, NO_SEND, Op, STREAM};
use super::switch::{Key, MOST, Switch};
use super::*;
use crate::virtio::test_driver::{Buffer, Driver};

const DEADLINE: Duration = Duration::from_secs(20);
const CID: u32 = 5;
const BOTH: u32 = NO_RECEIVE | NO_SEND;

/// A packet of the guest's.
fn packet(key: Key, op: Op, flags: u32, credit: (u32, u32), data: &[u8]) -> Vec<u8> {
    let header = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: key.guest,
        dst_port: key.host,
        len: data.len() as u32,
        kind: STREAM,
        op: Some(op),
        flags,
        buf_alloc: credit.0,
        fwd_cnt: credit.1,
    };
    [&header.bytes()[..], data].concat()
}

fn send(driver: &mut Driver, key: Key, op: Op, flags: u32, data: &[u8]) {
    let bytes = packet(key, op, flags, (1 << 20, 0), data);
    driver.exchange(FROM_GUEST.into(), &[Buffer::Readable(bytes)]);
}

fn receive(driver: &mut Driver) -> (Header, Vec<u8>) {
    let used = driver.exchange(TO_GUEST.into(), &[Buffer::Writable(4096)]);
    let bytes = &used.data[..used.written as usize];
    let header = Header::parse(bytes.first_chunk().unwrap());
    assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID.into(), STREAM));
    assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
    (header, bytes[HEADER_BYTES..].to_vec())
}

fn told(driver: &mut Driver) -> (Option<Op>, u32) {
    let (header, _) = receive(driver);
    (header.op, header.flags)
}

fn timed(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A program outside that talks to port 1024 of the guest, and the connection.
fn called(driver: &mut Driver, path: &Path) -> (UnixStream, Key) {
    let mut caller = timed(UnixStream::connect(path).unwrap());
    caller.write_all(b"CONNECT 1024\nfirst").unwrap();
    let (asked, _) = receive(driver);
    assert_eq!((asked.op, asked.dst_port, asked.buf_alloc), (Some(Op::Request), 1024, ROOM as u32));
    let key = Key { guest: 1024, host: asked.src_port };
    send(driver, key, Op::Response, 0, &[]);
    let ok = format!("OK {}\n", key.host);
    assert_eq!(read(&mut caller, ok.len()), ok.as_bytes());
    assert_eq!(receive(driver).1, b"first");
    (caller, key)
}

#[test]
fn a_program_outside_talks_to_the_guest_and_each_ends_its_half() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let mut device = Vsock::new(CID, &path).unwrap();
    let mut driver = Driver::start(&mut device);
    let (mut caller, key) = called(&mut driver, &path);
    send(&mut driver, key, Op::Data, 0, b"answer");
    assert_eq!(read(&mut caller, 6), b"answer");
    caller.write_all(b"last").unwrap();
    assert_eq!(receive(&mut driver).1, b"last");
    caller.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(told(&mut driver), (Some(Op::Shutdown), NO_SEND));
    send(&mut driver, key, Op::Data, 0, b"still");
    send(&mut driver, key, Op::Shutdown, BOTH, &[]);
    assert_eq!(told(&mut driver), (Some(Op::Reset), 0));
    assert_eq!(read(&mut caller, 5), b"still");
    assert_eq!(caller.read(&mut [0]).unwrap(), 0);
    send(&mut driver, key, Op::Data, 0, b"who?");
    assert_eq!(told(&mut driver), (Some(Op::Reset), 0), "there is no such connection any more");
}

#[test]
fn callers_that_are_refused_or_say_nonsense_see_the_end_of_their_stream() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let mut device = Vsock::new(CID, &path).unwrap();
    let mut driver = Driver::start(&mut device);
    for line in ["CONNECT x\n", "GET / HTTP/1.1\r\nHost: localhost\r\n", "CONNECT 4294967296\n", "\n"] {
        let mut caller = timed(UnixStream::connect(&path).unwrap());
        caller.write_all(line.as_bytes()).unwrap();
        assert!(matches!(caller.read(&mut [0]), Ok(0) | Err(_)), "{line}");
    }
    let mut caller = timed(UnixStream::connect(&path).unwrap());
    caller.write_all(b"CONNECT 7\n").unwrap();
    let (asked, _) = receive(&mut driver);
    send(&mut driver, Key { guest: 7, host: asked.src_port }, Op::Reset, 0, &[]);
    assert_eq!(caller.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_guest_talks_to_who_listens_and_is_refused_where_nobody_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let mut device = Vsock::new(CID, &path).unwrap();
    let mut driver = Driver::start(&mut device);
    let key = Key { guest: 99, host: 53 };
    send(&mut driver, key, Op::Request, 0, &[]);
    assert_eq!(told(&mut driver), (Some(Op::Reset), 0));
    let listener = UnixListener::bind(dir.path().join("vsock_53")).unwrap();
    send(&mut driver, key, Op::Request, 0, &[]);
    let (granted, _) = receive(&mut driver);
    assert_eq!((granted.op, granted.src_port, granted.dst_port), (Some(Op::Response), 53, 99));
    let mut server = timed(listener.accept().unwrap().0);
    send(&mut driver, key, Op::Data, 0, b"question");
    assert_eq!(read(&mut server, 8), b"question");
    // It answers and is gone: the guest hears all of it, then that nobody is there.
    server.write_all(&[9; 6000]).unwrap();
    drop(server);
    let (first, second) = (receive(&mut driver).1, receive(&mut driver).1);
    assert_eq!([first, second].concat(), [9; 6000]);
    assert_eq!(told(&mut driver), (Some(Op::Shutdown), BOTH));
}

#[test]
fn a_guest_that_takes_nothing_makes_its_peer_wait_and_one_that_gives_too_much_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let mut device = Vsock::new(CID, &path).unwrap();
    let mut driver = Driver::start(&mut device);
    let (mut caller, key) = called(&mut driver, &path);
    // It has room for 8 bytes, 5 of which are taken.
    let credit = packet(key, Op::CreditUpdate, 0, (8, 0), &[]);
    driver.exchange(FROM_GUEST.into(), &[Buffer::Readable(credit)]);
    caller.write_all(b"abcdef").unwrap();
    assert_eq!(receive(&mut driver).1, b"abc");
    assert_eq!(told(&mut driver), (Some(Op::CreditRequest), 0));
    let credit = packet(key, Op::CreditUpdate, 0, (8, 8), &[]);
    driver.exchange(FROM_GUEST.into(), &[Buffer::Readable(credit)]);
    assert_eq!(receive(&mut driver).1, b"def");
    // Nobody reads outside: what the kernel keeps for the stream, and then our room, are finite.
    let mut sent = 0;
    while sent < 64 * ROOM {
        send(&mut driver, key, Op::Data, 0, &[1; ROOM / 4]);
        sent += ROOM / 4;
    }
    loop {
        // Credit updates for what the kernel took come first.
        match told(&mut driver) {
            (Some(Op::CreditUpdate), _) => {}
            other => break assert_eq!(other, (Some(Op::Reset), 0)),
        }
    }
    let mut rest = Vec::new();
    assert!(caller.read_to_end(&mut rest).is_ok() && rest.len() < sent);
}

#[test]
fn connections_end_with_their_process_and_the_driver_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (path, elsewhere) = (dir.path().join("vsock"), dir.path().join("elsewhere"));
    let mut old = Vsock::new(CID, &path).unwrap();
    let mut driver = Driver::start(&mut old);
    let (mut caller, key) = called(&mut driver, &path);
    // Stopped and going on at the same place, nothing has happened.
    old.reset();
    driver.go_on(&mut old);
    send(&mut driver, key, Op::Data, 0, b"there");
    assert_eq!(read(&mut caller, 5), b"there");
    let mut new = Vsock::new(CID, &elsewhere).unwrap();
    driver.move_to(&mut old, &mut new);
    let used = driver.exchange(EVENTS.into(), &[Buffer::Writable(8)]);
    assert_eq!((used.written, &used.data[..4]), (4, &[0; 4][..]));
    send(&mut driver, key, Op::Data, 0, b"lost");
    assert_eq!(told(&mut driver), (Some(Op::Reset), 0));
    called(&mut driver, &elsewhere);
    drop(old);
    assert_eq!(caller.read(&mut [0]).unwrap(), 0);
    assert!(!path.exists());
}

/// What a random guest, and random programs outside, do.
#[derive(Debug, Clone)]
enum Act {
    Packet { guest: u32, host: u32, op: u16, flags: u32, credit: (u32, u32), len: usize },
    Call(u32),
    Read(usize),
    Write(usize),
    Gone,
    Take(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let credit = (prop_oneof![Just(0), Just(100_000), any::<u32>()], prop_oneof![Just(0), any::<u32>()]);
    let packet =
        (0u32..3, 0u32..4, 0u16..9, 0u32..4, credit, prop_oneof![0usize..9, Just(ROOM), Just(ROOM + 1)]);
    prop_oneof![
        6 => packet.prop_map(|(guest, host, op, flags, credit, len)| Act::Packet { guest, host, op, flags, credit, len }),
        1 => (0u32..3).prop_map(Act::Call),
        1 => (0usize..ROOM).prop_map(Act::Read),
        1 => (0usize..ROOM).prop_map(Act::Write),
        1 => Just(Act::Gone),
        2 => (0usize..9000).prop_map(Act::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_packets_cost_their_own_connections_only_and_nothing_grows(acts in prop::collection::vec(act(), 0..120)) {
        let mut switch = Switch::new(CID);
        // Those that calls get come behind the small numbers that the guest chooses from.
        let keys: Vec<Key> = (0..3).flat_map(|guest| (0..4).chain((0..40).map(|call| (1 << 30) + call)).map(move |host| Key { guest, host })).collect();
        let each = |switch: &mut Switch, act: &mut dyn FnMut(&mut Connection)| {
            for key in &keys {
                if let Some(connection) = switch.get(*key) {
                    act(connection);
                }
            }
        };
        for act in &acts {
            match act.clone() {
                Act::Packet { guest, host, op, flags, credit, len } if switch.has_room() => {
                    let mut bytes = packet(Key { guest, host }, Op::Data, flags, credit, &[]);
                    bytes[24..28].copy_from_slice(&(len as u32).to_le_bytes());
                    bytes[30..32].copy_from_slice(&op.to_le_bytes());
                    let header = Header::parse(bytes.first_chunk().unwrap());
                    if let Some(wish) = switch.receive(&header, &vec![3; len]) {
                        if host == 0 { switch.refuse(&wish) } else { switch.grant(&wish) }
                    }
                }
                Act::Packet { .. } => {}
                Act::Call(port) => drop(switch.ask(port, b"x")),
                Act::Read(len) => each(&mut switch, &mut |one| one.read(&vec![4; len.min(one.room())])),
                Act::Write(len) => each(&mut switch, &mut |one| {
                    one.wrote(len.min(one.pending().len()));
                    one.ends_outward();
                }),
                Act::Gone => each(&mut switch, &mut |one| one.gone()),
                Act::Take(most) => {
                    if let Some((header, data)) = switch.next(most) {
                        prop_assert!(data.len() <= most && header.len as usize == data.len() && header.op.is_some());
                    }
                }
            }
            each(&mut switch, &mut |one| assert!(one.pending().len() <= ROOM && one.room() <= ROOM));
            switch.forget_ended();
        }
        // Whatever was done, telling the guest comes to an end: each connection has a few things to say beside its data.
        let packets = std::iter::from_fn(|| switch.next(ROOM)).take(4000).count();
        prop_assert!(packets < 4000 && !switch.has_news());
    }

    #[test]
    fn what_goes_in_comes_out_in_order_and_within_the_credit(
        sizes in prop::collection::vec((1usize..20_000, 1usize..20_000, 1usize..5000, 0usize..3), 1..60), room in 200u32..100_000,
    ) {
        let mut outside = Connection::from_guest(room, 0);
        prop_assert_eq!(outside.next(0).map(|told| told.op), Some(Op::Response));
        let (mut into, mut out_of) = (Vec::new(), Vec::new());
        let (mut given, mut sent) = (0usize, 0usize);
        let (mut taken_by_guest, mut known_room, mut known_taken) = (0u32, ROOM as u32, 0u32);
        let pattern = |from: usize, len: usize| (from..from + len).map(|at| (at % 251) as u8).collect::<Vec<_>>();
        for (read, say, most, slow) in sizes {
            let len = read.min(outside.room());
            if len > 0 {
                outside.read(&pattern(given, len));
                given += len;
            }
            // The guest sends what it has credit for.
            let credit = known_room - (sent as u32 - known_taken);
            let len = say.min(credit as usize);
            outside.receive(Op::Data, 0, (room, taken_by_guest), &pattern(sent, len)).unwrap();
            sent += len;
            if slow > 0 {
                let piece = outside.pending()[..outside.pending().len().div_ceil(slow)].to_vec();
                outside.wrote(piece.len());
                out_of.extend(piece);
            }
            while let Some(told) = outside.next(most) {
                let (said_room, said_taken) = outside.credit();
                (known_room, known_taken) = (said_room, said_taken);
                into.extend(told.data);
                prop_assert!(into.len() as u32 - taken_by_guest <= room, "more than the guest has room for");
            }
            if slow < 2 {
                taken_by_guest = into.len() as u32;
                outside.receive(Op::CreditUpdate, 0, (room, taken_by_guest), &[]).unwrap();
            }
        }
        prop_assert!(into == pattern(0, into.len()) && out_of == pattern(0, out_of.len()));
        // Left alone, all of it arrives, and the end behind it.
        outside.read(&[]);
        let mut ended = false;
        for _ in 0..100 + 3 * given {
            outside.receive(Op::CreditUpdate, 0, (room, into.len() as u32), &[]).unwrap();
            let Some(told) = outside.next(8192) else { break };
            ended |= told.op == Op::Shutdown;
            into.extend(told.data);
        }
        prop_assert!(ended && into.len() == given);
    }
}

#[test]
fn there_is_a_most_of_connections_and_of_answers_to_packets_of_none() {
    let mut switch = Switch::new(CID);
    let keys: Vec<_> = std::iter::from_fn(|| switch.ask(1, &[])).take(2 * MOST).collect();
    assert_eq!(keys.len(), MOST);
    let bytes = packet(Key { guest: 9, host: 9 }, Op::Request, 0, (0, 0), &[]);
    let header = Header::parse(bytes.first_chunk().unwrap());
    let mut heard = 0;
    while switch.has_room() && heard < 10_000 {
        assert_eq!(switch.receive(&header, &[]), None);
        heard += 1;
    }
    assert!(heard < 10_000);
    switch.forget_all();
    assert!(!switch.has_news() && switch.receive(&header, &[]).is_some());
}
