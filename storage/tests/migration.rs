//! What the move of a running VM needs of its volumes: they are handed over under load, their targets stand by with a VMM that is
//! connected, and log what they write into guest memory.

// A test may panic.
#![allow(clippy::unwrap_used)]

#[path = "../../netfabric/tests/front_end/mod.rs"]
mod front_end;
mod support;

use bytes::Bytes;
use front_end::{BUFFERS, FrontEnd, PAGE, Piece, WRITE};
use nix::fcntl::SealFlag;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use storage::config::{Access, CleanState, StandbyConfig, VolumeConfig};
use storage::device::{BlockDevice, BlockOp, Completion};
use storage::ids::Generation;
use storage::status::{Handover, VolumeState};
use storage::target::{self, Target, TargetOptions};
use storage::{BusyPoll, StorageConfig, StorageError, Timing};
use support::{LONG, three, until};

/// The flag of a descriptor that leads to a table.
const INDIRECT: u16 = 4;
const READ: u32 = 0;
const SERIAL: u32 = 8;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + PAGE;
const TABLE: u64 = BUFFERS + 2 * PAGE;
const DATA: u64 = BUFFERS + 4 * PAGE;
const LOG: u64 = 4096;

/// The chain of a request, its header written.
fn request(guest: &FrontEnd, number: u64, kind: u32, sector: u64, data: Piece) -> [Piece; 3] {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    guest.write(HEADER + 16 * number, &header);
    guest.write(STATUS + number, &[0xff]);
    [(HEADER + 16 * number, 16, 0), data, (STATUS + number, 1, WRITE)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_in_standby_is_taken_over_with_its_connection() {
    let dir = tempfile::tempdir().unwrap();
    let (control, nodes, mut volume) = three(dir.path()).await;
    let socket = dir.path().join("volume.sock");
    let config = |node: usize, volumes: &[&VolumeConfig], standby: Vec<StandbyConfig>| StorageConfig {
        disks: nodes[node].disks.clone(),
        volumes: volumes.iter().map(|volume| (*volume).clone()).collect(),
        standby,
    };
    let (from, to) = (nodes[0].storage.clone(), nodes[1].storage.clone());
    from.apply(config(0, &[&volume], vec![])).await.unwrap();
    let content: Bytes = (0..4 * 4096u32).map(|n| (n % 251) as u8).collect::<Vec<_>>().into();
    from.write(volume.id, 0, content.clone()).await.unwrap();

    let ready = StandbyConfig { id: volume.id, size: volume.size, socket: socket.clone() };
    for _ in 0..2 {
        to.apply(config(1, &[], vec![ready.clone()])).await.unwrap();
    }
    let mut guest = FrontEnd::connect(&socket, 1);
    for number in 0..3 {
        let chain = request(&guest, number, READ, 8 * number, (DATA + PAGE * number, 4096, WRITE));
        guest.offer(0, 3 * number as u16, &chain);
    }
    assert_eq!(guest.take(0, Duration::from_millis(300)), None, "nothing is answered in standby");

    assert_eq!(from.hand_over(volume.id, Generation(1)).await.unwrap(), Handover::Clean);
    volume = VolumeConfig {
        generation: Generation(2),
        clean: CleanState::Clean,
        access: Access::VhostUser { socket: socket.clone() },
        ..volume
    };
    *control.0.lock() = volume.clone();
    for _ in 0..2 {
        to.apply(config(1, &[&volume], vec![])).await.unwrap();
    }
    for number in 0..3usize {
        // Reads may overtake each other.
        let (_, length) = guest.take(0, LONG).unwrap();
        assert_eq!(length, 4097);
        assert_eq!(guest.read(STATUS + number as u64, 1).len(), 1);
    }
    assert_eq!(guest.read(STATUS, 3), [0; 3]);
    assert!(guest.read(DATA, 3 * 4096) == content[..3 * 4096]);
    // The same connection works on.
    let chain = request(&guest, 3, READ, 24, (DATA, 4096, WRITE));
    guest.offer(0, 9, &chain);
    assert_eq!(guest.take(0, LONG), Some((9, 4097)));
    assert!(guest.read(DATA, 4096) == content[3 * 4096..]);

    // Handed over, requests wait; given up, they go on, still on the same connection.
    assert_eq!(to.hand_over(volume.id, Generation(2)).await.unwrap(), Handover::Clean);
    let chain = request(&guest, 4, READ, 0, (DATA, 4096, WRITE));
    guest.offer(0, 12, &chain);
    assert_eq!(guest.take(0, Duration::from_millis(300)), None);
    volume.generation = Generation(3);
    *control.0.lock() = volume.clone();
    to.apply(config(1, &[&volume], vec![])).await.unwrap();
    assert_eq!(guest.take(0, LONG), Some((12, 4097)));
    assert!(guest.read(DATA, 4096) == content[..4096]);

    // Without a word of it the socket is gone.
    to.apply(config(1, &[], vec![])).await.unwrap();
    until("the socket is gone", || !socket.exists()).await;
}

/// Reads are all sevens.
struct Sevens;

impl BlockDevice for Sevens {
    fn size(&self) -> u64 {
        1 << 30
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        done(Ok(if let BlockOp::Read { len, .. } = op {
            vec![7; len as usize].into()
        } else {
            Bytes::new()
        }));
    }
}

fn pages(pieces: &[(u64, u64)]) -> BTreeSet<u64> {
    pieces.iter().flat_map(|(at, length)| at / PAGE..=(at + length - 1) / PAGE).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_what_was_written_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let options = TargetOptions {
        socket: dir.path().join("socket"),
        socket_group: None,
        inflight: dir.path().join("inflight"),
        queues: 1,
        serial: "volume".to_owned(),
        access: target::Access::ReadWrite,
        runtime: tokio::runtime::Handle::current(),
        poll: BusyPoll::new(),
    };
    let socket = options.socket.clone();
    let _target = Target::start(options, Arc::new(Sevens)).unwrap();

    // Logs that could end the process end the connection.
    for (bytes, file_bytes, seals) in [
        (LOG, LOG, SealFlag::empty()),
        (LOG, LOG, SealFlag::F_SEAL_GROW),
        (LOG, 32, SealFlag::F_SEAL_SHRINK),
        (32, LOG, SealFlag::F_SEAL_SHRINK),
        (0, LOG, SealFlag::F_SEAL_SHRINK),
    ] {
        let mut guest = FrontEnd::connect(&socket, 1);
        guest.start_log(bytes, file_bytes, seals).unwrap_err();
    }

    let mut guest = FrontEnd::connect(&socket, 1);
    let used = (guest.used_page(0) * PAGE, 1);
    let run = |guest: &mut FrontEnd, kind, at: u64, length: u32, indirect: bool| {
        let chain = request(guest, 0, kind, 0, (at, length, WRITE));
        if indirect {
            guest.describe(TABLE, 0, &chain);
            guest.offer(0, 0, &[(TABLE, 48, INDIRECT)]);
        } else {
            guest.offer(0, 0, &chain);
        }
        assert_eq!(guest.take(0, LONG), Some((0, length + 1)));
        assert_eq!(guest.read(STATUS, 1), [0]);
        // What the target asks of the next kick is in the used ring as well, a moment later.
        std::thread::sleep(Duration::from_millis(20));
    };
    run(&mut guest, READ, DATA, 4096, false);
    guest.start_log(LOG, LOG, SealFlag::F_SEAL_SHRINK).unwrap();
    assert!(guest.take_log().is_empty());
    for indirect in [false, true] {
        for (at, length) in [(DATA, 512), (DATA, 4096), (DATA + 100, 4096), (DATA + 3 * PAGE, 65536)] {
            run(&mut guest, READ, at, length, indirect);
            assert_eq!(
                guest.take_log(),
                pages(&[(at, length.into()), (STATUS, 1), used]),
                "{length} at {at:#x}"
            );
        }
    }
    run(&mut guest, SERIAL, DATA + PAGE, 20, false);
    assert_eq!(guest.take_log(), pages(&[(DATA + PAGE, 20), (STATUS, 1), used]));
    guest.stop_log();
    run(&mut guest, READ, DATA, 4096, false);
    assert!(guest.take_log().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_handed_over_under_load() {
    const ROUNDS: u64 = 5;
    const WRITERS: u64 = 8;
    const BLOCK: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let (control, nodes, mut volume) = three(dir.path()).await;
    let config = |node: usize, volumes: &[&VolumeConfig]| StorageConfig {
        disks: nodes[node].disks.clone(),
        volumes: volumes.iter().map(|volume| (*volume).clone()).collect(),
        standby: vec![],
    };
    let mut expected = vec![0u64; WRITERS as usize];
    let (mut closing, mut opening) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Each time at another node.
        let at = (round % 3) as usize;
        let here = nodes[at].storage.clone();
        volume.generation = Generation(round + 1);
        volume.clean = control.0.lock().clean;
        *control.0.lock() = volume.clone();
        let started = std::time::Instant::now();
        here.apply(config(at, &[&volume])).await.unwrap();
        for (writer, expected) in expected.iter().enumerate() {
            let read = here.read(volume.id, writer as u64 * BLOCK, 8).await;
            // Whole sectors only.
            assert!(matches!(read, Err(StorageError::Block(_))), "{read:?}");
            let read = here.read(volume.id, writer as u64 * BLOCK, 512).await.unwrap();
            assert_eq!(u64::from_le_bytes(read[..8].try_into().unwrap()), *expected, "round {round}");
            if writer == 0 {
                opening.push(started.elapsed());
            }
        }
        // Each writer counts up in a block of its own until it is refused.
        let writers: Vec<_> = (0..WRITERS)
            .zip(&expected)
            .map(|(writer, from)| {
                let (here, id, mut done) = (here.clone(), volume.id, *from);
                tokio::spawn(async move {
                    loop {
                        let mut data = vec![0; BLOCK as usize];
                        data[..8].copy_from_slice(&(done + 1).to_le_bytes());
                        match here.write(id, writer * BLOCK, data.into()).await {
                            Ok(()) => done += 1,
                            Err(_) => return done,
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let started = std::time::Instant::now();
        let other = here.hand_over(volume.id, Generation(round)).await;
        assert!(matches!(other, Err(StorageError::OtherGeneration { .. })), "{other:?}");
        let both = tokio::join!(
            here.hand_over(volume.id, volume.generation),
            here.hand_over(volume.id, volume.generation),
        );
        closing.push(started.elapsed());
        assert_eq!((both.0.unwrap(), both.1.unwrap()), (Handover::Clean, Handover::Clean));
        assert_eq!(control.0.lock().clean, CleanState::Clean);
        for (writer, expected) in writers.into_iter().zip(&mut expected) {
            let done = writer.await.unwrap();
            assert!(done > *expected, "no load in round {round}");
            *expected = done;
        }
        // It stays closed, whatever is applied of the same generation.
        here.apply(config(at, &[&volume])).await.unwrap();
        let status = here.status().volumes.remove(0);
        assert_eq!((status.state, status.generation), (VolumeState::Closed, volume.generation));
        assert!(here.read(volume.id, 0, 512).await.is_err());
        here.apply(config(at, &[])).await.unwrap();
        assert!(matches!(here.hand_over(volume.id, volume.generation).await, Err(StorageError::NotOpen(_))));
    }
    println!("handed over in {closing:?}; opened and read in {opening:?}");
    // Neither waits for a retry or a deadline. The shortest: a machine may be busy, but a timer is there each time.
    for times in [closing, opening] {
        assert!(times.iter().min().is_some_and(|time| *time < Timing::default().retry), "{times:?}");
    }
}
