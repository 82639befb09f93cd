//! A VM moves between nodes while its guest runs, as users do it: three nodes of real processes, the command line, a real guest under KVM; then
//! with every process of both nodes killed at every moment of the way.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;

use std::{
    fs,
    time::{Duration, Instant},
};

use cluster::{Cluster, eventually, letters};

/// Between two letters of the guest.
const PAUSE: u32 = 20_000;

#[test]
fn a_vm_moves_while_it_runs_and_nobody_notices() {
    if !cluster::has_kvm() {
        return;
    }
    let cluster = Cluster::start();
    cluster.create_vm(PAUSE);
    let mut at = 1;
    for to in [2, 3, 1] {
        let before = cluster.follow(at);
        std::thread::sleep(Duration::from_millis(300));
        eprintln!("{}", cluster.move_vm(at, &["vm", "migrate", "web1", "--to", &format!("n{to}")]));
        assert_eq!(cluster.vm(1), ("running".to_owned(), Some(format!("n{to}"))));
        // The console there begins where the one here ended.
        let (_, last) = before.join().unwrap();
        let after = eventually("it prints there", || Some(cluster.printed(1)).filter(|said| said.len() > 3));
        assert_eq!(after[0] as char, letters::following(Some(last)) as char);
        eventually("nothing is left here", || (cluster.vmms() == [to]).then_some(()));
        at = to;
    }
    // Without a node it finds one; a paused one stays paused.
    cluster.ok(2, &["vm", "pause", "web1"]);
    cluster.ok(2, &["vm", "migrate", "web1"]);
    assert_ne!(cluster.node_of_vm(2), at);
    eventually("it is seen paused there", || (cluster.vm(2).0 == "paused").then_some(()));
    assert_eq!(cluster.printed(2), b"", "it runs while it is paused");
    cluster.ok(2, &["vm", "resume", "web1"]);
    eventually("it prints there", || (cluster.printed(2).len() > 3).then_some(()));

    let at = cluster.node_of_vm(2);
    let refused = cluster.fails(2, &["vm", "migrate", "web1", "--to", &format!("n{at}")]);
    assert!(refused.contains("runs on node") && refused.contains("already"), "{refused}");
    assert!(cluster.fails(2, &["vm", "migrate", "web1", "--to", "n9"]).contains("n9"));
    assert!(cluster.fails(2, &["vm", "migrate", "web1", "--cancel"]).contains("not being migrated"));

    // A node that is emptied has its VMs moved, not restarted.
    let before = cluster.follow(at);
    cluster.ok(2, &["node", "drain", &format!("n{at}")]);
    assert_ne!(cluster.node_of_vm(2), at);
    let (_, last) = before.join().unwrap();
    let after = eventually("it prints there", || Some(cluster.printed(2)).filter(|said| said.len() > 3));
    assert_eq!(after[0] as char, letters::following(Some(last)) as char);
}

/// What is killed on the way.
#[derive(Clone, Copy, Debug)]
enum Victim {
    ControlHere,
    ControlThere,
    DataHere,
    DataThere,
    VmmHere,
    VmmThere,
    /// Nothing; somebody changes their mind.
    Cancel,
}

const VICTIMS: [Victim; 7] = [
    Victim::ControlHere,
    Victim::ControlThere,
    Victim::DataHere,
    Victim::DataThere,
    Victim::VmmHere,
    Victim::VmmThere,
    Victim::Cancel,
];

#[test]
fn whatever_is_killed_on_the_way_there_is_one_guest() {
    if !cluster::has_kvm() {
        return;
    }
    let rounds: u64 = std::env::var("MIGRATION_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    let mut cluster = Cluster::start();
    cluster.create_vm(PAUSE);
    // How long it takes undisturbed, most of which are the command line's looks at the task, is where the moments of the kills are spread over.
    let began = Instant::now();
    cluster.ok(1, &["vm", "migrate", "web1", "--to", "n2"]);
    let whole = began.elapsed() / 3;
    let (mut moved, mut stayed) = (0, 0);
    for round in 0..rounds {
        for victim in VICTIMS {
            let at = cluster.node_of_vm(3);
            let to = at % 2 + 1;
            let third = 3;
            let moment = whole.mul_f64((round as f64 + 0.5) / rounds as f64);
            cluster.ok(third, &["vm", "migrate", "web1", "--to", &format!("n{to}"), "--no-wait"]);
            std::thread::sleep(moment);
            match victim {
                Victim::ControlHere => cluster.restart_control(at),
                Victim::ControlThere => cluster.restart_control(to),
                Victim::DataHere => cluster.restart_data(at),
                Victim::DataThere => cluster.restart_data(to),
                Victim::VmmHere => cluster.kill_vmm(at, "vmm.pid"),
                Victim::VmmThere => cluster.kill_vmm(to, "vmm.pid"),
                Victim::Cancel => drop(cluster.run(third, &["vm", "migrate", "web1", "--cancel"])),
            }
            let now = cluster.runs_once(third);
            if now == at {
                stayed += 1
            } else {
                moved += 1
            }
            // A VMM that was killed is a crash: its guest boots.
            let may_boot = matches!(victim, Victim::VmmHere | Victim::VmmThere);
            cluster.prints_on(third, may_boot.then_some(b'a'), &format!("{victim:?} at {moment:?}"));
        }
    }
    eprintln!("it moved {moved} times and stayed {stayed} times");
}

/// What there is to be measured: guests of 2 GiB that are full of something.
const MEMORY_PAGES: u32 = (2 << 30) / 4096 - 1024;
/// Nothing at all, and a tenth of it about once a second: what a processor of software does of it in a second is measured, too.
const WRITTEN: [(&str, u32); 2] = [("idle", 0), ("writes a tenth of its memory", MEMORY_PAGES / 10)];
/// Turns of a loop between two pages.
const WRITER_PAUSE: u32 = 12;

/// The number in the sentence about a pause.
fn paused_ms(said: &str) -> f64 {
    let number = said.split_once("paused for ").unwrap().1;
    number.split_once(" ms").unwrap().0.parse().unwrap()
}

#[test]
#[ignore = "a measurement: make bench-migration"]
fn how_long_guests_are_paused() {
    if !cluster::has_kvm() {
        return;
    }
    let mut rows = Vec::new();
    for (name, written) in WRITTEN {
        let cluster = Cluster::start();
        cluster.create_vm_with(&cluster::writer::code(MEMORY_PAGES, written, WRITER_PAUSE), "2GiB");
        eventually("the guest has filled its memory", || (cluster.printed(1) == b"R").then_some(()));
        for (from, to) in [(1, 2), (2, 1), (1, 2)] {
            let log = cluster.vm_dir(from).unwrap().join("vmm.log");
            let said = cluster.move_vm(3, &["vm", "migrate", "web1", "--to", &format!("n{to}")]);
            let log = fs::read_to_string(log).unwrap_or_default();
            let parts =
                log.lines().rev().find_map(|line| line.split_once("written and held ")).map(|found| found.1);
            let data = fs::read_to_string(cluster.path(from, "data").with_extension("log")).unwrap();
            let handed =
                data.lines().rev().find_map(|line| line.split_once("handed over ")).map(|found| found.1);
            eprintln!("{name}: {said}\n  {}\n  {}", parts.unwrap_or_default(), handed.unwrap_or_default());
            rows.push(serde_json::json!({
                "guest": name, "move": "to another node", "migrate_pause_ms": paused_ms(&said),
                "said": said, "vmm": parts, "volume": handed
            }));
        }
        for _ in 0..3 {
            let said = cluster.move_vm(3, &["vm", "migrate", "web1", "--in-place"]);
            eprintln!("{name}: {said}");
            let paused = paused_ms(&said);
            rows.push(serde_json::json!({
                "guest": name, "move": "in place", "migrate_pause_ms": paused, "said": said
            }));
        }
    }
    if let Ok(file) = std::env::var("MIGRATION_FIGURES") {
        fs::write(file, serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
    }
}
