//! Which node a VM starts on. Pure.

use std::collections::BTreeMap;

use vmm::Processor;

use crate::state::{
    Assignment, ClusterState, Make, Node, NodeId, NodeService, Vm, report::NodeReport, report::ProcessState,
};

/// Memory of a node that is left to the system, the node's own processes and the page cache.
const RESERVED_BYTES: u64 = 384 << 20;

/// What a node has to have for a run.
struct Need<'a> {
    make: Make,
    /// The processor that the run has begun on, and why it matters.
    begun_on: Option<(&'a Processor, &'static str)>,
    preferred: Option<NodeId>,
}

/// Chooses a node: the preferred one when it can, else the one with the most memory left; the sentence says why none.
pub fn choose(
    state: &ClusterState,
    live: &BTreeMap<NodeId, NodeReport>,
    vm: &Vm,
    only: Option<NodeId>,
) -> Result<NodeId, String> {
    let begun_on = vm.saved().map(|saved| (&saved.processor, "was suspended on"));
    let need = Need { make: vm.make(), begun_on, preferred: vm.preferred_node };
    best(state, live, &need, |node| only.is_none_or(|only| only == node))
}

/// Chooses the node that a run goes on at: the named one, or any but its own.
pub fn choose_other(
    state: &ClusterState,
    live: &BTreeMap<NodeId, NodeReport>,
    vm: &Vm,
    run: Assignment,
    only: Option<NodeId>,
) -> Result<NodeId, String> {
    let processor = live.get(&run.node).and_then(|report| report.machine.processor.as_ref());
    let begun_on = processor.map(|processor| (processor, "runs on"));
    let need = Need { make: run.make, begun_on, preferred: vm.preferred_node };
    best(state, live, &need, |node| node != run.node && only.is_none_or(|only| only == node))
}

fn best(
    state: &ClusterState,
    live: &BTreeMap<NodeId, NodeReport>,
    need: &Need<'_>,
    may: impl Fn(NodeId) -> bool,
) -> Result<NodeId, String> {
    let mut best: Option<(bool, u64, NodeId)> = None;
    let mut reasons = Vec::new();
    for (node, report) in live.iter().filter(|(node, _)| may(**node)) {
        let Some(member) = state.nodes.get(node) else { continue };
        match room(state, member, report, need) {
            Ok(free) => {
                let rank = (need.preferred == Some(*node), free, *node);
                if best.is_none_or(|best| rank > best) {
                    best = Some(rank);
                }
            }
            Err(reason) => reasons.push(reason),
        }
    }
    best.map(|(_, _, node)| node).ok_or_else(|| match reasons.as_slice() {
        [] => "no node that could run it is there".to_owned(),
        reasons => {
            format!("{} MiB of memory needed, but {}", need.make.memory_bytes >> 20, reasons.join("; "))
        }
    })
}

/// Memory that the node has left, or why the run cannot be there.
fn room(state: &ClusterState, member: &Node, report: &NodeReport, need: &Need<'_>) -> Result<u64, String> {
    let (make, name) = (need.make, &member.name);
    if member.service != NodeService::InService {
        return Err(format!("{name} is being emptied"));
    }
    if report.local.data_process != ProcessState::Up {
        return Err(format!("the data process of {name} does not answer"));
    }
    if report.machine.cpu_models.is_empty() {
        return Err(format!("{name} has no KVM: is virtualization enabled in its firmware?"));
    }
    if !report.machine.cpu_models.contains(&make.cpu_model) {
        return Err(format!("{name} lacks CPU model {}", make.cpu_model));
    }
    if let (Some((begun_on, how)), Some(own)) = (need.begun_on, &report.machine.processor)
        && !own.carries(begun_on, make.cpu_model)
    {
        return Err(format!("{name} has another processor than the one that the VM {how}"));
    }
    let free = free_memory(state, member.id, report);
    if free < make.memory_bytes {
        return Err(format!("{name} has {} MiB of memory left", free >> 20));
    }
    Ok(free)
}

/// Memory of a node that no run has, in bytes.
pub fn free_memory(state: &ClusterState, node: NodeId, report: &NodeReport) -> u64 {
    let runs = state.vms_on(node).filter_map(|vm| vm.assignment);
    let arriving = state.vms_arriving(node).filter_map(|(vm, _)| vm.assignment);
    let taken: u64 = runs.chain(arriving).map(|run| run.make.memory_bytes).sum();
    report.machine.memory_bytes.saturating_sub(RESERVED_BYTES).saturating_sub(taken)
}

#[cfg(test)]
mod tests {
    use vmm::CpuModel;

    use super::*;
    use crate::state::{Command, Op, Timestamp, report::*, testing::*};

    #[test]
    fn a_vm_goes_only_where_its_cpu_model_is() {
        let mut state = cluster(3);
        let mut new = new_vm(1, vec![]);
        (new.cpu_model, new.preferred_node) = (CpuModel::X86_64V3, Some(node_id(1)));
        let id = new.id;
        let op = Op::CreateVm { vm: new, unreachable: vec![] };
        state.apply(&Command { at: Timestamp(1), task: None, op }).unwrap();
        let report = |models: &[CpuModel]| NodeReport {
            machine: MachineReport {
                memory_bytes: 8 << 30,
                cpu_models: models.iter().copied().collect(),
                ..Default::default()
            },
            local: LocalReport { data_process: ProcessState::Up, ..Default::default() },
            boot_files: vec![],
        };
        let old = report(&[CpuModel::Host, CpuModel::X86_64V2]);
        let mut live =
            BTreeMap::from([(node_id(1), old.clone()), (node_id(2), old), (node_id(3), report(&[]))]);
        let why = choose(&state, &live, &state.vms[&id], None).unwrap_err();
        assert!(why.contains("n1 lacks CPU model x86-64-v3") && why.contains("n3 has no KVM"), "{why}");
        live.insert(node_id(2), report(&[CpuModel::Host, CpuModel::X86_64V2, CpuModel::X86_64V3]));
        assert_eq!(choose(&state, &live, &state.vms[&id], None), Ok(node_id(2)));
    }
}
