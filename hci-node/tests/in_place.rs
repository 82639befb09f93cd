//! A VM goes on in a new process of its node, made from an executable that has come meanwhile, as after an upgrade: three nodes of real processes, the
//! command line, a real guest under KVM; then with every process of the node killed at every moment of the way.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use cluster::{Cluster, eventually, letters};

/// Between two letters of the guest.
const PAUSE: u32 = 20_000;
const MIGRATE: [&str; 4] = ["vm", "migrate", "web1", "--in-place"];

/// Puts another copy of the executable in the place of the one that is there, as an upgrade does. Returns which file it is.
fn install(executable: &Path) -> u64 {
    let new = executable.with_extension("new");
    fs::copy(env!("CARGO_BIN_EXE_hci"), &new).unwrap();
    fs::rename(&new, executable).unwrap();
    fs::metadata(executable).unwrap().ino()
}

/// Which file a process runs.
fn executable_of(process: i64) -> u64 {
    fs::metadata(format!("/proc/{process}/exe")).unwrap().ino()
}

/// What is said of the VM's process.
fn executable_told(cluster: &Cluster) -> String {
    let shown = cluster.ok(2, &["vm", "get", "web1", "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    shown["machine"]["executable"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_vm_goes_on_in_a_process_of_the_new_executable_and_nobody_notices() {
    if !cluster::has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let executable = dir.path().join("hci");
    let first = install(&executable);
    let cluster = Cluster::start_from(executable.clone());
    cluster.create_vm(PAUSE);
    let process = cluster.process(1, "vmm.pid").unwrap();
    assert_eq!(executable_of(process), first);
    let mut last_process = process;
    for _ in 0..3 {
        assert_eq!(executable_told(&cluster), "present");
        let new = install(&executable);
        eventually("it is told that it is older", || (executable_told(&cluster) == "older").then_some(()));
        let before = cluster.follow(1);
        std::thread::sleep(Duration::from_millis(300));
        eprintln!("{}", cluster.move_vm(2, &MIGRATE));
        assert_eq!(cluster.vm(1), ("running".to_owned(), Some("n1".to_owned())));
        let (_, last) = before.join().unwrap();
        let after = eventually("it prints on", || Some(cluster.printed(1)).filter(|said| said.len() > 3));
        assert_eq!(after[0] as char, letters::following(Some(last)) as char);
        let process = cluster.process(1, "vmm.pid").unwrap();
        assert_ne!(process, last_process);
        assert_eq!(executable_of(process), new);
        assert_eq!(cluster.vmms(), [1], "the one before has ended");
        last_process = process;
        eventually("it is told", || (executable_told(&cluster) == "present").then_some(()));
    }
    // One that is paused stays so.
    cluster.ok(2, &["vm", "pause", "web1"]);
    cluster.ok(2, &MIGRATE);
    eventually("it is seen paused", || (cluster.vm(2).0 == "paused").then_some(()));
    assert_eq!(cluster.printed(2), b"", "it runs while it is paused");
    cluster.ok(2, &["vm", "resume", "web1"]);
    eventually("it prints on", || (cluster.printed(2).len() > 3).then_some(()));
    // It can move as before, and everything else, too.
    cluster.ok(2, &["vm", "migrate", "web1", "--to", "n3"]);
    cluster.ok(2, &MIGRATE);
    assert_eq!(cluster.vm(1), ("running".to_owned(), Some("n3".to_owned())));
    cluster.ok(2, &["vm", "disk", "add", "web1", "--size", "1GiB", "--no-wait"]);
    cluster.ok(2, &["vm", "stop", "web1", "--force"]);
    assert!(cluster.fails(2, &MIGRATE).contains("does not run"));
    cluster.ok(2, &["vm", "start", "web1"]);
}

/// What is killed on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Control,
    Data,
    Predecessor,
    Successor,
}

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
    cluster.ok(1, &MIGRATE);
    let whole = began.elapsed() / 2;
    let (mut moved, mut stayed) = (0, 0);
    for round in 0..rounds {
        for victim in [Victim::Control, Victim::Data, Victim::Predecessor, Victim::Successor] {
            let at = cluster.node_of_vm(3);
            let third = at % 3 + 1;
            let moment = whole.mul_f64((round as f64 + 0.5) / rounds as f64);
            // What was asked for last may not have come to its end yet.
            let asked = [&MIGRATE[..], &["--no-wait"]].concat();
            eventually("it is asked for", || cluster.run(third, &asked).status.success().then_some(()));
            let process = cluster.process(at, "vmm.pid");
            std::thread::sleep(moment);
            match victim {
                Victim::Control => cluster.restart_control(at),
                Victim::Data => cluster.restart_data(at),
                Victim::Predecessor => process.into_iter().for_each(cluster::guests::kill),
                Victim::Successor => cluster.kill_vmm(at, "next-vmm.pid"),
            }
            let now = cluster.runs_once(third);
            match cluster.process(now, "vmm.pid") == process {
                true => stayed += 1,
                false => moved += 1,
            }
            // A VMM that was killed while it had the guest is a crash: its guest boots.
            let may_boot = matches!(victim, Victim::Predecessor | Victim::Successor);
            cluster.prints_on(third, may_boot.then_some(b'a'), &format!("{victim:?} at {moment:?}"));
        }
    }
    eprintln!("it moved {moved} times and stayed {stayed} times");
}
