//! Which node a VM starts on. Pure.

use std::collections::BTreeMap;

use crate::state::{ClusterState, NodeId, NodeService, Vm, report::NodeReport, report::ProcessState};

/// Memory of a node that is left to the system, the node's own processes and the page cache.
const RESERVED_BYTES: u64 = 384 << 20;

/// Chooses a node: the preferred one when it can, else the one with the most memory left; the sentence says why none.
pub fn choose(
    state: &ClusterState,
    live: &BTreeMap<NodeId, NodeReport>,
    vm: &Vm,
    only: Option<NodeId>,
) -> Result<NodeId, String> {
    let mut best: Option<(bool, u64, NodeId)> = None;
    let mut reasons = Vec::new();
    for (node, report) in live {
        let Some(member) = state.nodes.get(node) else { continue };
        if only.is_some_and(|only| only != *node) {
            continue;
        }
        if member.service != NodeService::InService {
            reasons.push(format!("{} is being emptied", member.name));
            continue;
        }
        if report.local.data_process != ProcessState::Up {
            reasons.push(format!("the data process of {} does not answer", member.name));
            continue;
        }
        let taken: u64 = state.vms_on(*node).map(|other| other.memory_bytes).sum();
        let free = report.machine.memory_bytes.saturating_sub(RESERVED_BYTES).saturating_sub(taken);
        if free < vm.memory_bytes {
            reasons.push(format!("{} has {} MiB of memory left", member.name, free >> 20));
            continue;
        }
        let rank = (vm.preferred_node == Some(*node), free, *node);
        if best.is_none_or(|best| rank > best) {
            best = Some(rank);
        }
    }
    best.map(|(_, _, node)| node).ok_or_else(|| match reasons.as_slice() {
        [] => "no node that could run it is there".to_owned(),
        reasons => format!("{} MiB of memory needed, but {}", vm.memory_bytes >> 20, reasons.join("; ")),
    })
}
