//! A VM is paused, suspended on one node and resumed on another, as users do it: three nodes of real processes, the command line, a real
//! guest under KVM.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;

use cluster::{Cluster, eventually};

/// Between two letters of the guest: a few come in a second.
const PAUSE: u32 = 500_000;

#[test]
fn a_vm_is_paused_suspended_and_goes_on_on_another_node() {
    if !cluster::has_kvm() {
        return;
    }
    let mut cluster = Cluster::start();
    cluster.create_vm(PAUSE);
    cluster.letters(2, b'a');

    // A pause outlives the control process of its node.
    cluster.ok(2, &["vm", "pause", "web1"]);
    let paused_at = cluster.letters(2, b'a');
    cluster.restart_control(1);
    eventually("the VM is seen paused again", || (cluster.vm(2).0 == "paused").then_some(()));
    assert_eq!(cluster.letters(2, b'a'), paused_at, "it runs while it is paused");
    cluster.ok(2, &["vm", "resume", "web1"]);
    eventually("it prints more", || (cluster.letters(2, b'a') != paused_at).then_some(()));

    // Suspended it is nowhere; what it printed last is known, because it was paused before.
    cluster.ok(2, &["vm", "pause", "web1"]);
    let next = cluster.letters(2, b'a');
    cluster.ok(2, &["vm", "suspend", "web1"]);
    assert_eq!(cluster.vm(2), ("suspended".to_owned(), None));
    assert!(cluster.volumes(2).contains("web1-state"));
    assert!(cluster.fails(2, &["vm", "stop", "web1"]).contains("--discard-state"));
    assert!(cluster.fails(2, &["volume", "delete", "web1-state", "--yes"]).contains("suspended VM web1"));

    // Its node is lost, and takes nothing of it along.
    cluster.lose(1);
    eventually("the node is lost", || {
        let nodes = cluster.run(2, &["node", "list", "-o", "json"]).stdout;
        String::from_utf8_lossy(&nodes).contains("\"lost\"").then_some(())
    });
    cluster.ok(2, &["vm", "resume", "web1"]);
    let (state, node) = cluster.vm(2);
    assert!(state == "running" && node.is_some_and(|node| node != "n1"), "{state}");
    cluster.letters(2, next);
    assert!(!cluster.volumes(2).contains("web1-state"), "what it went on with is used up");
}
