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
    let make = vm.make();
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
        if report.machine.cpu_models.is_empty() {
            reasons.push(format!("{} has no KVM: is virtualization enabled in its firmware?", member.name));
            continue;
        }
        if !report.machine.cpu_models.contains(&make.cpu_model) {
            reasons.push(format!("{} lacks CPU model {}", member.name, make.cpu_model));
            continue;
        }
        if let (Some(saved), Some(own)) = (vm.saved(), &report.machine.processor)
            && !own.carries(&saved.processor, make.cpu_model)
        {
            reasons.push(format!(
                "{} has another processor than the one that the VM was suspended on",
                member.name
            ));
            continue;
        }
        let others = state.vms_on(*node).filter_map(|other| other.assignment);
        let taken: u64 = others.map(|run| run.make.memory_bytes).sum();
        let free = report.machine.memory_bytes.saturating_sub(RESERVED_BYTES).saturating_sub(taken);
        if free < make.memory_bytes {
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
        reasons => format!("{} MiB of memory needed, but {}", make.memory_bytes >> 20, reasons.join("; ")),
    })
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
