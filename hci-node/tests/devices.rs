//! Disks and NICs come and go while a VM runs, and it gets processors, as users do it: three nodes of real processes, the command line, a
//! real guest under KVM.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;

use cluster::{Cluster, eventually};
use serde_json::Value;

#[path = "../../vmm/tests/guest/lets_go.rs"]
mod lets_go;

impl Cluster {
    fn shown(&self, n: usize) -> Value {
        serde_json::from_str(&self.ok(n, &["vm", "get", "web1", "-o", "json"])).unwrap()
    }

    /// Volumes of the VM's disks, and how far each is.
    fn disks(&self, n: usize) -> Vec<(String, String)> {
        let shown = self.shown(n);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let disks = shown["disks"].as_array().unwrap().iter();
        disks.map(|disk| (text(&disk["volume"]), text(&disk["state"]))).collect()
    }

    fn macs(&self, n: usize) -> Vec<String> {
        let shown = self.shown(n);
        let nics = shown["nics"].as_array().unwrap().iter();
        nics.map(|nic| nic["mac"].as_str().unwrap().to_owned()).collect()
    }

    /// How often the guest has let go of something in its present run.
    fn dots(&self, n: usize) -> usize {
        self.run(n, &["vm", "console", "web1", "--log"]).stdout.len()
    }
}

fn attached(names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|name| ((*name).to_owned(), "attached".to_owned())).collect()
}

#[test]
fn devices_come_and_go_while_a_vm_runs_and_move_with_it() {
    if !cluster::has_kvm() {
        return;
    }
    let mut cluster = Cluster::start();
    cluster.create_vm_with(&lets_go::code(), "64MiB");
    let began = cluster.shown(1)["epoch"].clone();
    cluster.ok(2, &["vm", "disk", "add", "web1", "--size", "64MiB"]);
    cluster.ok(2, &["volume", "create", "data1", "--size", "32MiB"]);
    cluster.ok(2, &["volume", "attach", "data1", "web1"]);
    cluster.ok(3, &["vm", "nic", "add", "web1", "--network", "lan"]);
    assert_eq!(cluster.disks(1), attached(&["web1-disk0", "web1-disk1", "data1"]));
    assert_eq!((cluster.macs(1).len(), cluster.dots(1)), (2, 0));
    assert!(cluster.fails(1, &["volume", "attach", "data1", "web1"]).contains("belongs to VM web1"));
    assert!(cluster.fails(1, &["volume", "delete", "data1", "--yes"]).contains("in use"));
    assert!(cluster.fails(1, &["volume", "detach", "web1-disk0", "web1"]).contains("booted from"));

    // One goes: the others stay where they are, also on another node.
    cluster.ok(1, &["vm", "disk", "remove", "web1", "web1-disk1", "--yes"]);
    assert_eq!((cluster.disks(1), cluster.dots(1)), (attached(&["web1-disk0", "data1"]), 1));
    assert!(!cluster.volumes(1).contains("web1-disk1"));
    cluster.ok(1, &["vm", "migrate", "web1", "--to", "n2"]);
    assert_eq!(cluster.vm(1), ("running".to_owned(), Some("n2".to_owned())));
    cluster.ok(1, &["volume", "detach", "data1", "web1"]);
    assert_eq!((cluster.disks(1), cluster.dots(1)), (attached(&["web1-disk0"]), 1));
    eventually("its node closes the volume", || {
        cluster.run(1, &["volume", "delete", "data1", "--yes"]).status.success().then_some(())
    });
    let macs = cluster.macs(1);
    assert!(cluster.fails(1, &["vm", "nic", "remove", "web1", "lan"]).contains("several"));
    cluster.ok(1, &["vm", "nic", "remove", "web1", &macs[1]]);
    assert_eq!(cluster.macs(1), macs[..1]);

    // Processors come, and come along.
    cluster.ok(1, &["vm", "set", "web1", "--cpu", "3"]);
    assert_eq!(cluster.shown(1)["machine"]["vcpus"], 3);
    cluster.ok(1, &["vm", "migrate", "web1", "--to", "n3"]);
    cluster.ok(1, &["vm", "set", "web1", "--cpu", "4"]);
    assert_eq!(cluster.shown(1)["machine"]["vcpus"], 4);

    // What was asked for comes, whoever is restarted meanwhile.
    cluster.ok(1, &["vm", "disk", "add", "web1", "--size", "64MiB", "--name", "late", "--no-wait"]);
    cluster.restart_control(3);
    eventually("the disk comes", || (cluster.disks(1) == attached(&["web1-disk0", "late"])).then_some(()));
    assert_eq!(cluster.vm(1).0, "running");
    let moves = cluster.shown(1)["epoch"].as_u64().unwrap() - began.as_u64().unwrap();
    assert_eq!(moves, 2, "it never ended");
    cluster.ok(1, &["vm", "restart", "web1", "--force"]);
    assert_eq!(cluster.disks(1), attached(&["web1-disk0", "late"]));
}

#[test]
fn a_guest_that_keeps_a_disk_has_it_until_it_ends() {
    if !cluster::has_kvm() {
        return;
    }
    let cluster = Cluster::start();
    cluster.create_vm(20_000);
    cluster.ok(1, &["vm", "disk", "add", "web1", "--size", "64MiB"]);
    let asked = cluster.run(1, &["vm", "disk", "remove", "web1", "web1-disk1", "--yes", "--timeout", "5s"]);
    assert_eq!(asked.status.code(), Some(7), "the wait ends, the task does not");
    assert_eq!(cluster.disks(1)[1], ("web1-disk1".to_owned(), "detaching".to_owned()));
    assert!(cluster.fails(1, &["vm", "migrate", "web1"]).contains("gets or loses a device"));
    // It can be held meanwhile, and goes on.
    cluster.ok(1, &["vm", "pause", "web1"]);
    cluster.ok(1, &["vm", "resume", "web1"]);
    cluster.letters(1, b'a');
    cluster.ok(1, &["vm", "stop", "web1", "--force"]);
    assert_eq!(cluster.disks(1), attached(&["web1-disk0"]));
    eventually("the volume is gone", || (!cluster.volumes(1).contains("web1-disk1")).then_some(()));
    let tasks: Value = serde_json::from_str(&cluster.ok(1, &["task", "list", "-o", "json"])).unwrap();
    let running: Vec<_> =
        tasks["items"].as_array().unwrap().iter().filter(|task| task["state"] == "running").collect();
    assert!(running.is_empty(), "{running:?}");
}
