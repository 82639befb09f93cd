//! The data plane as it runs: three `hci data run` in network namespaces, one volume with three replicas, a vhost-user-blk
//! client that checks every answer, and faults: processes killed, links cut, disks full, garbage on every port.

use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hci_tests::bench::storage::usage::resident;
use hci_tests::blkclient::BlkClient;
use hci_tests::native::checker::Checker;
use hci_tests::native::cluster::{Cut, DataCluster, Disks, Options, PATIENCE};
use hci_tests::native::control::LEASE;
use hci_tests::native::fabric::Fabric;
use hci_tests::native::guest_vm::{self, GuestVm};
use hci_tests::native::load::{Load, connect, connect_with_patience};
use netfabric::overlay::{NetworkConfig, OverlayConfig, PortConfig, PortId, PortStanding, Vni};
use nix::sys::signal::Signal;
use storage::ids::{BLOCK_SIZE, SEGMENT_SIZE};
use storage::status::{DiskHealth, VolumeState};
use storage::store::disk::Encryption;

const VOLUME: u64 = 64 << 20;
/// Blocks that the loads work on: a part of the volume, so that "only what changed" can be told from "all".
const HOT: u64 = 2048;
/// A replica that is silent for 2.5 s is given up; the rest is for a busy machine.
const GIVEN_UP: Duration = Duration::from_secs(5);
/// A replica whose process is gone is given up as soon as its node says so; nearly all of this is for a busy machine.
const GONE: Duration = Duration::from_secs(1);
/// Enough answers to know that I/O goes on.
const SOME: u64 = 200;

/// Runs a test on a cluster; a failure comes with the nodes' logs.
fn on_cluster(options: &Options, test: impl FnOnce(&mut DataCluster) -> Result<()>) -> Result<()> {
    let mut cluster = DataCluster::start(options)?;
    let result = test(&mut cluster).and_then(|()| cluster.check_processes());
    result.with_context(|| cluster.logs())
}

/// A checked load on the volume, which is open on that node and written once.
fn start_load(cluster: &DataCluster, node: usize) -> Result<Load> {
    start_load_on(connect(&cluster.socket(node))?)
}

fn start_load_on(mut client: BlkClient) -> Result<Load> {
    let mut checker = Checker::new(HOT);
    checker.fill(&mut client)?;
    let load = Load::start(client, checker)?;
    load.wait_for_answers(SOME, PATIENCE)?;
    Ok(load)
}

/// Writes the part of the volume that the loads leave alone.
fn fill_the_rest(client: &mut BlkClient) -> Result<()> {
    const PIECE: u64 = 64 << 10;
    for offset in (HOT * BLOCK_SIZE..VOLUME).step_by(PIECE as usize) {
        client.write(offset, &vec![0x5a; PIECE as usize])?;
    }
    client.flush()
}

/// Ends the load, verifies everything, and compares what is on the disks.
fn verify_all(cluster: &mut DataCluster, load: Load) -> Result<()> {
    let (mut client, mut checker) = load.finish()?;
    checker.verify(&mut client)?;
    ensure!(checker.writes > SOME && checker.flushes > 0, "the load did nothing");
    client.flush()?;
    drop(client);
    cluster.check_processes()?;
    cluster.compare_replicas()
}

#[test]
fn what_is_written_is_read_and_a_clean_close_needs_no_comparison() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        let first = cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        load.wait_for_answers(20 * SOME, PATIENCE)?;
        let (mut client, mut checker) = load.finish()?;
        checker.verify(&mut client)?;
        ensure!(client.size()? == VOLUME, "the volume has the wrong size");
        drop(client);
        cluster.close()?;
        // Open on another node: the same data.
        ensure!(cluster.open(1)? > first, "the generation was not raised");
        let mut client = connect(&cluster.socket(1))?;
        checker.verify(&mut client)?;
        ensure!(cluster.record().lock().in_sync() == 3, "a replica was lost on the way");
        let metrics = cluster.metrics(1)?;
        let made_equal = metrics
            .lines()
            .find(|line| line.starts_with("hci_volume_events_total") && line.contains("block_reconciled"))
            .context("no such metric")?;
        ensure!(made_equal.ends_with(" 0"), "replicas differed after a clean close: {made_equal}");
        drop(client);
        cluster.compare_replicas()
    })
}

#[test]
fn a_replica_that_is_killed_comes_back_with_what_changed() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        fill_the_rest(&mut connect(&cluster.socket(0))?)?;
        let load = start_load(cluster, 0)?;
        load.measure_gaps();
        cluster.kill(&[2])?;
        cluster.wait("the lost replica is taken out", GIVEN_UP, |c| c.record().lock().in_sync() == 2)?;
        load.wait_for_answers(SOME, GIVEN_UP)?;
        let gap = load.progress().longest_gap;
        println!("a replica's process is killed: I/O stands still for {gap:?}");
        ensure!(gap < GONE, "I/O stood still for {gap:?}");

        cluster.start_node(2)?;
        cluster.wait_in_sync()?;
        let lost = cluster.disk(2);
        let copied = cluster.volume(0).and_then(|volume| {
            let replica = volume.replicas.into_iter().find(|replica| replica.disk == lost)?;
            Some(replica.resync?.blocks_copied)
        });
        let copied = copied.context("no word of a resync")?;
        // Some may be copied twice, because they are written meanwhile.
        ensure!((1..=2 * HOT).contains(&copied), "{copied} blocks were copied, {HOT} may have changed");
        load.wait_for_answers(SOME, PATIENCE)?;
        verify_all(cluster, load)
    })
}

#[test]
fn a_coordinator_that_is_killed_goes_on_where_it_was() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        let mut generation = cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        for round in 0..2 {
            cluster.restart(0)?;
            let next = cluster.open(0)?;
            ensure!(next > generation, "round {round}: generation {next} after {generation}");
            generation = next;
            load.wait_for_answers(SOME, PATIENCE)?;
        }
        cluster.wait_in_sync()?;
        verify_all(cluster, load)
    })
}

#[test]
fn what_was_flushed_is_there_when_all_are_killed_at_once() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        for _ in 0..2 {
            load.wait_for_answers(SOME, PATIENCE)?;
            cluster.kill(&[0, 1, 2])?;
            // Answers that were in the ring already have been taken.
            sleep(Duration::from_millis(200));
            load.checker.lock().all_lost();
            for node in 0..3 {
                cluster.start_node(node)?;
            }
            for node in 0..3 {
                cluster.wait_until_up(node)?;
            }
            cluster.open(0)?;
            load.wait_for_answers(SOME, PATIENCE)?;
        }
        cluster.wait_in_sync()?;
        verify_all(cluster, load)
    })
}

#[test]
fn a_coordinator_that_is_cut_off_completes_nothing_more() -> Result<()> {
    for way in [Cut::BothWays, Cut::Outgoing] {
        on_cluster(&Options::default(), |cluster| cut_off_coordinator(cluster, way))
            .with_context(|| format!("{way:?}"))?;
    }
    Ok(())
}

fn cut_off_coordinator(cluster: &mut DataCluster, way: Cut) -> Result<()> {
    cluster.open(0)?;
    // Once node 0 has given the volume up, nobody will ever answer there.
    let load = start_load_on(connect_with_patience(&cluster.socket(0), Duration::from_secs(2))?)?;
    cluster.isolate(0, way)?;
    // Its lease ends; only then may the volume be opened elsewhere.
    sleep(LEASE + Duration::from_millis(500));
    let at_the_end_of_the_lease = load.progress().answers;
    cluster.open(1)?;
    sleep(Duration::from_secs(1));
    let later = load.progress().answers;
    ensure!(later == at_the_end_of_the_lease, "{} answers after the lease", later - at_the_end_of_the_lease);

    // All that the old one acknowledged is there; the new one goes on.
    cluster.heal()?;
    let fenced = |cluster: &DataCluster| {
        let state = cluster.volume(0).map(|volume| volume.state);
        matches!(state, None | Some(VolumeState::Fenced | VolumeState::Closed))
    };
    cluster.wait("the old coordinator gives up", PATIENCE, fenced)?;
    let after_healing = load.progress().answers;
    ensure!(after_healing == later, "{} answers by a coordinator that was replaced", after_healing - later);
    let mut checker = load.abandon()?;
    let mut client = connect(&cluster.socket(1))?;
    checker.verify(&mut client)?;
    let load = Load::start(client, checker)?;
    load.wait_for_answers(SOME, PATIENCE)?;
    cluster.wait_in_sync()?;
    verify_all(cluster, load)
}

#[test]
fn a_replica_that_is_heard_but_does_not_hear_is_taken_out_and_comes_back() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        for (from, to) in [(2, 0), (0, 1)] {
            load.measure_gaps();
            cluster.fabric().cut_one_way(from, to)?;
            cluster.wait("the replica is taken out", GIVEN_UP, |c| c.record().lock().in_sync() == 2)?;
            load.wait_for_answers(SOME, GIVEN_UP)?;
            let gap = load.progress().longest_gap;
            ensure!(gap < GIVEN_UP, "I/O stood still for {gap:?}");
            cluster.heal()?;
            cluster.wait_in_sync()?;
        }
        load.wait_for_answers(SOME, PATIENCE)?;
        verify_all(cluster, load)
    })
}

/// What an attacker or a broken peer may send, from a scan to a length that promises the world.
fn garbage() -> Vec<Vec<u8>> {
    let noise = |length: usize| (0..length).map(|i| (i * 131 + i / 7) as u8).collect::<Vec<u8>>();
    vec![
        vec![0],
        vec![0xff; 1200],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        noise(1200),
        // A QUIC long header of a version that nobody has, and one of ours cut short.
        [&[0xc3, 0xde, 0xad, 0xbe, 0xef, 8][..], &noise(1190)].concat(),
        [&[0xc3, 0, 0, 0, 1, 20][..], &noise(40)].concat(),
        // Lengths of 4 GiB in both byte orders, with a little behind them.
        [&[0xff; 16][..], &noise(64)].concat(),
        [&[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f][..], &noise(64)].concat(),
        noise(60_000),
    ]
}

/// Sends each piece of garbage on a connection of its own.
fn pester(socket: &Path) -> Result<()> {
    for bytes in garbage() {
        let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_write_timeout(Some(Duration::from_millis(200)))?;
        // The other side may close at the first wrong byte, or serve somebody else now.
        let _ = stream.write_all(&bytes);
    }
    Ok(())
}

#[test]
fn garbage_on_every_port_harms_nobody() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        let port = PortConfig {
            id: PortId::random(),
            vni: Vni::try_from(1)?,
            mac: "02:00:00:00:00:01".parse()?,
            ip: "198.19.0.10".parse()?,
            hostname: "vm".to_owned(),
            socket: cluster.paths(0).run().join("port.sock"),
            standing: PortStanding::Active,
        };
        let network = NetworkConfig {
            vni: port.vni,
            subnet: "198.19.0.0/24".parse()?,
            gateway: "198.19.0.1".parse()?,
            mtu: 1500,
            dns: Vec::new(),
            domain: String::new(),
        };
        let socket = port.socket.clone();
        cluster.set_overlay(
            0,
            OverlayConfig { networks: vec![network], ports: vec![port], forwarding: Vec::new() },
        );
        cluster.wait("the port is there", PATIENCE, |_| socket.exists())?;
        cluster.open(0)?;
        // Nobody is connected yet: garbage comes first.
        pester(&cluster.socket(0))?;
        let load = start_load(cluster, 0)?;
        for node in 0..3 {
            cluster.fabric().node(node).enter(|| {
                let own = UdpSocket::bind((Fabric::address(node), 0))?;
                for port in [7401, 7402] {
                    for target in 0..3 {
                        for bytes in garbage() {
                            own.send_to(&bytes, SocketAddr::from((Fabric::address(target), port)))?;
                        }
                    }
                }
                Ok(())
            })?;
            pester(&cluster.paths(node).data_socket())?;
            // Calls that are begun and never ended, all at once.
            let held: Vec<_> =
                (0..20).map(|_| UnixStream::connect(cluster.paths(node).data_socket())).collect();
            load.wait_for_answers(SOME, PATIENCE)?;
            drop(held);
        }
        pester(&socket)?;
        pester(&cluster.socket(0))?;
        load.wait_for_answers(SOME, PATIENCE)?;
        cluster.check_processes()?;
        ensure!(cluster.record().lock().in_sync() == 3, "a replica was lost to garbage");
        verify_all(cluster, load)
    })
}

#[test]
fn a_replica_that_falls_silent_is_taken_out_and_comes_back() -> Result<()> {
    /// A silent replica may cost that long; the rest is for a busy machine.
    const SILENT: Duration = Duration::from_secs(3);
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        load.measure_gaps();
        cluster.signal(2, Signal::SIGSTOP)?;
        cluster.wait("the silent replica is taken out", GIVEN_UP, |c| c.record().lock().in_sync() == 2)?;
        load.wait_for_answers(SOME, GIVEN_UP)?;
        let gap = load.progress().longest_gap;
        println!("a replica's process is stopped: I/O stands still for {gap:?}");
        ensure!(gap < SILENT, "I/O stood still for {gap:?}");
        cluster.signal(2, Signal::SIGCONT)?;
        cluster.wait_in_sync()?;
        load.wait_for_answers(SOME, PATIENCE)?;
        verify_all(cluster, load)
    })
}

#[test]
fn a_replica_that_is_slow_is_taken_out_and_comes_back() -> Result<()> {
    const STALL: Duration = Duration::from_millis(300);
    const BREATH: Duration = Duration::from_millis(30);
    /// It is watched for ten seconds at least.
    const FOUND: Duration = Duration::from_secs(40);
    /// It stays out for a minute.
    const BACK: Duration = Duration::from_secs(100);
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        load.measure_gaps();
        let begun = Instant::now();
        while cluster.record().lock().in_sync() == 3 {
            ensure!(begun.elapsed() < FOUND, "not taken out within {FOUND:?}");
            cluster.signal(2, Signal::SIGSTOP)?;
            sleep(STALL);
            cluster.signal(2, Signal::SIGCONT)?;
            sleep(BREATH);
        }
        println!("a slow replica is taken out after {:?}", begun.elapsed());
        load.wait_for_answers(SOME, GIVEN_UP)?;
        let gap = load.progress().longest_gap;
        ensure!(gap < Duration::from_secs(3), "I/O stood still for {gap:?}");
        // What the node says of it may be a look older than what it has had committed.
        cluster.wait("it is said to be slow", PATIENCE, |c| format!("{:?}", c.volume(0)).contains("slow"))?;
        cluster.wait("it comes back", BACK, |c| c.record().lock().in_sync() == 3)?;
        load.wait_for_answers(SOME, PATIENCE)?;
        verify_all(cluster, load)
    })
}

#[test]
fn an_idle_data_process_uses_next_to_no_processor() -> Result<()> {
    /// Of one processor; a hundredth is the goal.
    const MOST: f64 = 0.03;
    const WATCHED: Duration = Duration::from_secs(5);
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        let (client, _) = load.finish()?;
        // What was begun under load comes to rest.
        sleep(Duration::from_secs(2));
        let before = cluster.processor_times()?;
        sleep(WATCHED);
        let after = cluster.processor_times()?;
        for (node, (before, after)) in before.into_iter().zip(after).enumerate() {
            let used = (after - before).as_secs_f64() / WATCHED.as_secs_f64();
            println!("node {node}: idle at {:.2} % of a processor", used * 100.0);
            ensure!(used < MOST, "node {node} uses {:.1} % of a processor for nothing", used * 100.0);
        }
        drop(client);
        Ok(())
    })
}

/// Flips a bit in every copy of a content that a disk holds; returns how many there were.
fn damage(disk: &Path, content: &[u8]) -> Result<u64> {
    let file = File::options().read(true).write(true).open(disk)?;
    let (mut block, mut found) = (vec![0; content.len()], 0);
    for offset in (0..file.metadata()?.len()).step_by(BLOCK_SIZE as usize) {
        if file.read_at(&mut block, offset)? == block.len() && block == content {
            file.write_at(&[content[100] ^ 4], offset + 100)?;
            found += 1;
        }
    }
    Ok(found)
}

#[test]
fn bits_that_rot_are_found_by_a_scrub_and_repaired_unread() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let mut client = connect(&cluster.socket(0))?;
        let content: Vec<u8> = (0..BLOCK_SIZE as u32).map(|i| (i * 131 + i / 7) as u8).collect();
        let elsewhere = vec![0x5a; 64 << 10];
        client.write(8 << 20, &content)?;
        client.flush()?;
        // The log holds it, too, until enough is written behind it.
        for piece in (16 << 20..VOLUME).step_by(elsewhere.len()) {
            client.write(piece, &elsewhere)?;
        }
        client.flush()?;
        sleep(Duration::from_secs(1));
        let damaged = damage(cluster.disk_path(2), &content)?;
        ensure!(damaged > 0, "the content is nowhere on the disk");
        cluster.scrub(2);
        let repaired = |cluster: &DataCluster| {
            cluster.scrub_status(2).is_some_and(|scrub| scrub.repaired > 0 && scrub.damaged == 0)
        };
        let waited = cluster.wait("the damage is found and repaired", 2 * PATIENCE, repaired);
        waited.with_context(|| format!("{:?}, {damaged} copies damaged", cluster.scrub_status(2)))?;
        ensure!(cluster.record().lock().in_sync() == 3, "a replica was lost for it");
        ensure!(client.read(8 << 20, BLOCK_SIZE as u32)? == content);
        drop(client);
        cluster.compare_replicas()
    })
}

/// How many blocks of a disk have a content.
fn copies(disk: &Path, content: &[u8]) -> Result<usize> {
    let disk = fs::read(disk)?;
    Ok(disk.chunks(content.len()).filter(|block| *block == content).count())
}

#[test]
fn an_encrypted_disk_has_nothing_to_read_and_loses_nothing() -> Result<()> {
    for encryption in [Encryption::None, Encryption::Aes256Xts] {
        on_cluster(&Options { encryption, ..Default::default() }, |cluster| {
            cluster.open(0)?;
            let content: Vec<u8> = (0..BLOCK_SIZE as u32).map(|i| (i * 131 + i / 7) as u8).collect();
            let mut client = connect(&cluster.socket(0))?;
            client.write(HOT * BLOCK_SIZE, &content)?;
            client.flush()?;
            let load = start_load_on(client)?;
            cluster.kill(&[0, 1, 2])?;
            sleep(Duration::from_millis(200));
            load.checker.lock().all_lost();
            for node in 0..3 {
                let copies = copies(cluster.disk_path(node), &content)?;
                match encryption {
                    Encryption::None => ensure!(copies > 0, "it was looked for in a way that finds nothing"),
                    Encryption::Aes256Xts => ensure!(copies == 0, "node {node} has it in clear"),
                }
            }
            (0..3).try_for_each(|node| cluster.start_node(node))?;
            (0..3).try_for_each(|node| cluster.wait_until_up(node))?;
            cluster.open(0)?;
            load.wait_for_answers(SOME, PATIENCE)?;
            cluster.wait_in_sync()?;
            verify_all(cluster, load)
        })?;
    }
    Ok(())
}

#[test]
fn a_volume_of_64_tib_opens_and_holds_its_first_and_its_last_block() -> Result<()> {
    const SIZE: u64 = 64 << 40;
    /// For the table of its segments: much less than the 128 MiB for each TiB that a full one may take.
    const MEMORY: u64 = 256 << 20;
    on_cluster(&Options { volume_bytes: SIZE, ..Default::default() }, |cluster| {
        let last = SIZE - BLOCK_SIZE;
        let content = |n: u64| vec![n as u8 + 1; BLOCK_SIZE as usize];
        let places = [0, SIZE / 2, last];
        cluster.open(0)?;
        let mut client = connect(&cluster.socket(0))?;
        for (n, place) in (0..).zip(places) {
            client.write(place, &content(n))?;
        }
        client.flush()?;
        drop(client);
        cluster.kill(&[0, 1, 2])?;
        (0..3).try_for_each(|node| cluster.start_node(node))?;
        (0..3).try_for_each(|node| cluster.wait_until_up(node))?;
        let before = Instant::now();
        cluster.open(1)?;
        println!("open again after {:?}", before.elapsed());
        let mut client = connect(&cluster.socket(1))?;
        for (n, place) in (0..).zip(places) {
            ensure!(
                client.read(place, BLOCK_SIZE as u32)? == content(n),
                "block {place} is not what was written"
            );
        }
        let read = client.read(SIZE / 4, BLOCK_SIZE as u32)?;
        ensure!(read.iter().all(|byte| *byte == 0), "what was never written has something");
        for pid in cluster.pids() {
            let used = resident(&[pid])?;
            println!("memory of a data process: {} MiB", used >> 20);
            ensure!(used < MEMORY, "a data process takes {} MiB", used >> 20);
        }
        Ok(())
    })
}

#[test]
fn a_volume_that_grows_is_larger_for_its_front_end_too() -> Result<()> {
    on_cluster(&Options::default(), |cluster| {
        cluster.open(0)?;
        let load = start_load(cluster, 0)?;
        // Within its segment, then by another one.
        let sizes = [2 * VOLUME, SEGMENT_SIZE + VOLUME];
        for size in sizes {
            load.measure_gaps();
            cluster.grow(size);
            load.wait_for_reconnect(PATIENCE)?;
            load.wait_for_answers(SOME, PATIENCE)?;
            let gap = load.progress().longest_gap;
            println!("the volume grows: I/O stands still for {gap:?}");
        }
        let (mut client, checker) = load.finish()?;
        ensure!(client.size()? == sizes[1], "the front end sees {} bytes", client.size()?);
        client.write(sizes[1] - BLOCK_SIZE, &vec![0x5a; BLOCK_SIZE as usize])?;
        client.flush()?;
        let load = Load::start(client, checker)?;
        load.wait_for_answers(SOME, PATIENCE)?;
        verify_all(cluster, load)
    })
}

#[test]
fn a_guest_of_qemu_keeps_its_data_through_lost_replicas_and_a_lost_coordinator() -> Result<()> {
    /// A guest on an emulated CPU takes its time.
    const BOOT: Duration = Duration::from_secs(120);
    let image = guest_vm::image()?;
    on_cluster(&Options { volume_bytes: 128 << 20, ..Options::default() }, |cluster| {
        cluster.open(0)?;
        guest_vm::install(&image, &mut connect(&cluster.socket(0))?)?;
        let console = |boot: u32| cluster.paths(0).run().join(format!("console{boot}"));
        let (first, second) = (console(1), console(2));
        let mut guest = GuestVm::boot(&image, &cluster.socket(0), &first)?;
        guest.wait("the guest to boot and write", BOOT, |report| report.flushed >= Some(16))?;
        cluster.kill(&[2])?;
        cluster.wait("the lost replica is taken out", GIVEN_UP, |c| c.record().lock().in_sync() == 2)?;
        guest.goes_on(PATIENCE)?;
        cluster.start_node(2)?;
        cluster.wait_in_sync()?;
        cluster.restart(0)?;
        cluster.open(0)?;
        guest.goes_on(PATIENCE)?;
        let flushed = guest.goes_on(PATIENCE)?;
        drop(guest);

        let mut guest = GuestVm::boot(&image, &cluster.socket(0), &second)?;
        let found = guest.wait("the guest to look at its data", BOOT, |report| report.verified.is_some())?;
        ensure!(found.verified >= Some(flushed), "{flushed} were flushed, found {:?}", found.verified);
        guest.goes_on(PATIENCE)?;
        drop(guest);
        cluster.wait_in_sync()?;
        connect(&cluster.socket(0))?.flush()?;
        cluster.compare_replicas()
    })
}

#[test]
fn a_full_disk_is_left_out_and_reads_and_writes_go_on() -> Result<()> {
    const SMALL: u64 = 40 << 20;
    // The disk of another node, then that of the coordinator itself.
    for full in [2, 0] {
        let mut bytes = vec![512 << 20; 3];
        bytes[full] = SMALL;
        let options = Options { disks: Disks::Memory(bytes), ..Options::default() };
        on_cluster(&options, |cluster| {
            cluster.open(0)?;
            let load = start_load(cluster, 0)?;
            let (mut client, mut checker) = load.finish()?;
            // More than the small disk holds.
            fill_the_rest(&mut client)?;
            let disk = cluster.disk(full);
            cluster.wait("the full disk is left out", PATIENCE, |c| c.record().lock().in_sync() == 2)?;
            cluster.wait("the full disk is reported", PATIENCE, |cluster| {
                let record = cluster.record().lock();
                let disks = record.nodes[full].observed.iter().flat_map(|seen| &seen.storage.disks);
                disks.filter(|seen| seen.id == disk).any(|seen| seen.health == DiskHealth::Full)
            })?;
            checker.verify(&mut client)?;
            let load = Load::start(client, checker)?;
            load.wait_for_answers(SOME, PATIENCE)?;
            let (mut client, mut checker) = load.finish()?;
            checker.verify(&mut client)?;
            ensure!(client.read(VOLUME - BLOCK_SIZE, BLOCK_SIZE as u32)? == vec![0x5a; BLOCK_SIZE as usize]);
            Ok(())
        })
        .with_context(|| format!("the disk of node {full} is full"))?;
    }
    Ok(())
}
