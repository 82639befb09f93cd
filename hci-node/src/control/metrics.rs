//! `/metrics`: Raft, the control mesh, leases, VMs and the process, with the text of the data process behind.

use prometheus::{Encoder, IntGaugeVec, Opts, Registry, TextEncoder, process_collector::ProcessCollector};

use super::running::Running;
use crate::reconcile::cluster::Lease;
use crate::state::{Availability, report::VmRunState};

/// Metrics of this process only: a node that is in no cluster has no others.
pub fn process_text() -> String {
    encode(&process_registry())
}

fn process_registry() -> Registry {
    let registry = Registry::new();
    // Registered once in a registry of its own; it cannot collide.
    let _ = registry.register(Box::new(ProcessCollector::for_self()));
    registry
}

fn encode(registry: &Registry) -> String {
    let mut text = Vec::new();
    if let Err(error) = TextEncoder::new().encode(&registry.gather(), &mut text) {
        tracing::warn!(%error, "metrics cannot be written");
    }
    String::from_utf8(text).unwrap_or_default()
}

/// Gauges that are made anew for each scrape.
struct Scrape(Registry);

impl Scrape {
    fn family(&self, name: &str, help: &str, labels: &[&str], values: &[(Vec<&str>, i64)]) {
        let Ok(family) = IntGaugeVec::new(Opts::new(name, help), labels) else { return };
        for (labels, value) in values {
            if let Ok(gauge) = family.get_metric_with_label_values(labels) {
                gauge.set(*value);
            }
        }
        // Names are distinct constants.
        let _ = self.0.register(Box::new(family));
    }

    fn gauge(&self, name: &str, help: &str, value: i64) {
        self.family(name, help, &[], &[(vec![], value)]);
    }
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// All metrics of a member.
pub async fn text(running: &Running) -> String {
    let scrape = Scrape(process_registry());
    raft(&scrape, running);
    cluster(&scrape, running);
    mesh(&scrape, running);
    let mut text = encode(&scrape.0);
    match running.member.local.data_metrics().await {
        // The data process has process metrics of its own under other names; same names stay apart by `role`.
        Ok(data) => text.push_str(&data),
        Err(error) => tracing::debug!(%error, "the data process gave no metrics"),
    }
    text
}

fn raft(scrape: &Scrape, running: &Running) {
    let status = running.consensus.status();
    let me = running.member.id;
    scrape.gauge("hci_raft_term", "Term of the leader.", number(status.leadership.term));
    scrape.gauge("hci_raft_is_leader", "1 on the leader.", i64::from(status.leadership.leader == Some(me)));
    scrape.gauge(
        "hci_raft_has_leader",
        "1 while a leader is known.",
        i64::from(status.leadership.leader.is_some()),
    );
    scrape.gauge("hci_raft_log_index", "Newest entry of the log.", number(status.last_log_index));
    scrape.gauge("hci_raft_committed_index", "Newest committed entry.", number(status.committed_index));
    scrape.gauge("hci_raft_applied_index", "Newest applied entry.", number(status.applied_index));
    scrape.gauge("hci_raft_snapshot_index", "Newest entry in the snapshot.", number(status.snapshot_index));
    scrape.gauge("hci_raft_failed", "1 when Raft has stopped for good.", i64::from(status.failure.is_some()));
    scrape.gauge("hci_raft_members", "Members of the group.", number(status.members.len() as u64));
}

fn cluster(scrape: &Scrape, running: &Running) {
    let member = &running.member;
    let state = member.state();
    let left = match *running.lease.borrow() {
        Lease::None => 0,
        Lease::Until { at, .. } => at.saturating_duration_since(tokio::time::Instant::now()).as_millis(),
    };
    scrape.gauge(
        "hci_lease_left_milliseconds",
        "How long this node's lease holds.",
        i64::try_from(left).unwrap_or(0),
    );
    scrape.gauge("hci_state_revision", "Commands applied here.", number(state.revision));
    let lost = state.nodes.values().filter(|node| node.availability != Availability::Available).count();
    scrape.gauge("hci_nodes", "Nodes of the cluster.", number(state.nodes.len() as u64));
    scrape.gauge("hci_nodes_lost", "Nodes whose lease ran out.", number(lost as u64));
    scrape.gauge("hci_volumes", "Volumes.", number(state.volumes.len() as u64));
    let degraded = state.volumes.values().filter(|volume| volume.is_degraded()).count();
    scrape.gauge("hci_volumes_degraded", "Volumes with too few complete copies.", number(degraded as u64));
    let segments = || state.volumes.values().flat_map(|volume| &volume.segments);
    let moving = segments()
        .flat_map(|segment| &segment.replicas)
        .filter(|copy| copy.replaces.is_some() && copy.state == crate::state::ReplicaState::OutOfSync);
    scrape.gauge("hci_pool_moves", "Copies on their way to another disk.", number(moving.count() as u64));
    let lacking: usize = state
        .volumes
        .values()
        .map(|volume| {
            let wanted = usize::from(volume.replicas);
            volume.segments.iter().filter(|segment| segment.in_sync() < wanted).count()
        })
        .sum();
    scrape.gauge("hci_pool_segments", "Segments of all volumes.", number(segments().count() as u64));
    scrape.gauge(
        "hci_pool_segments_degraded",
        "Segments with too few complete copies.",
        number(lacking as u64),
    );
    let copies: Vec<_> = state
        .volumes
        .values()
        .map(|volume| (vec![volume.name.as_str()], number(volume.fewest_in_sync() as u64)))
        .collect();
    scrape.family("hci_volume_copies_in_sync", "Complete copies of a volume.", &["volume"], &copies);
    let local = member.local.report();
    let running_here = |vm: &crate::state::Vm| {
        let seen = local.vms.iter().find(|seen| seen.vm == vm.id && seen.epoch == vm.epoch);
        i64::from(seen.is_some_and(|seen| seen.state == VmRunState::Running))
    };
    let vms: Vec<_> = state.vms_on(member.id).map(|vm| (vec![vm.name.as_str()], running_here(vm))).collect();
    scrape.family("hci_vm_running", "1 while a VM that is assigned to this node runs.", &["vm"], &vms);
}

fn mesh(scrape: &Scrape, running: &Running) {
    let state = running.member.state();
    let up: Vec<_> = state
        .nodes
        .values()
        .filter(|node| node.id != running.member.id)
        .map(|node| {
            let connected =
                matches!(running.consensus.mesh().peer_state(node.id), netfabric::mesh::PeerState::Up { .. });
            (vec![node.name.as_str()], i64::from(connected))
        })
        .collect();
    scrape.family("hci_mesh_control_peer_up", "1 while the control mesh reaches a node.", &["peer"], &up);
}
