//! What a disk says of itself, for people: its figures, and one sentence when something is to be done.

use super::api;
use crate::data::disks::smart::{Remedy, Smart};

/// The view of what the disk of this name said, if it said anything.
pub(super) fn view(said: Option<&Smart>, disk: &str) -> api::DiskSmart {
    let warning = said.and_then(|smart| warning(smart, disk));
    let state = match (said, &warning) {
        (None, _) => api::SmartState::NotAvailable,
        (Some(_), None) => api::SmartState::Good,
        (Some(_), Some(_)) => api::SmartState::Warning,
    };
    let said = said.cloned().unwrap_or_default();
    api::DiskSmart {
        state,
        warning,
        temperature_celsius: said.temperature_celsius,
        available_spare_percent: said.available_spare_percent,
        percentage_used: said.percentage_used,
        power_on_hours: said.power_on_hours,
        media_errors: said.media_errors,
    }
}

fn warning(smart: &Smart, disk: &str) -> Option<String> {
    let what = smart.warnings().join(", ");
    Some(match smart.remedy()? {
        Remedy::Cool => format!("SMART says {what}; see to its cooling"),
        Remedy::Replace => format!("SMART says {what}; replace it: hci disk evict {disk}"),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{super::Views, *};
    use crate::{
        data::disks::smart::Alarm,
        state::{
            ClusterState, NodeId,
            report::{DiskHealth, DiskReport, LocalReport, NodeReport, ProcessState},
            testing::*,
        },
    };

    /// A node whose disk said this.
    fn reports(smart: Option<Smart>) -> BTreeMap<NodeId, NodeReport> {
        let disk = DiskReport {
            disk: disk_id(1),
            capacity_bytes: 1 << 40,
            used_bytes: 0,
            health: DiskHealth::Ok,
            scrub: Default::default(),
            smart,
            volumes: Vec::new(),
        };
        let local = LocalReport { disks: vec![disk], data_process: ProcessState::Up, ..Default::default() };
        BTreeMap::from([(node_id(1), NodeReport { local, ..Default::default() })])
    }

    fn see(state: &ClusterState, smart: Option<Smart>) -> (api::Disk, api::Status) {
        let reports = reports(smart);
        let leader = Some(node_id(1));
        let views = Views { state, reports: &reports, etas: &Default::default(), members: &[], leader };
        let id = disk_id(1).to_string();
        let disk = views.disks().into_iter().find(|disk| disk.id.as_ref() == Some(&id)).unwrap();
        (disk, views.status())
    }

    #[test]
    fn a_virtual_disk_says_nothing_and_is_not_warned_of() {
        let (disk, status) = see(&cluster(1), None);
        assert_eq!(disk.smart.unwrap().state, api::SmartState::NotAvailable);
        assert_eq!((disk.message, status.health), (None, api::Health::Healthy));
    }

    #[test]
    fn a_well_disk_shows_its_figures_only() {
        let smart = Smart { percentage_used: Some(12), temperature_celsius: Some(38), ..Smart::default() };
        let (disk, status) = see(&cluster(1), Some(smart));
        let shown = disk.smart.unwrap();
        assert_eq!((shown.state, shown.percentage_used), (api::SmartState::Good, Some(12)));
        assert_eq!((disk.message, status.problems), (None, vec![]));
    }

    #[test]
    fn a_warning_is_in_the_list_and_in_the_status_with_what_to_do() {
        let smart = Smart { alarms: vec![Alarm::SpareLow], media_errors: Some(3), ..Smart::default() };
        let (disk, status) = see(&cluster(1), Some(smart));
        let expected =
            "SMART says its spare blocks run out, 3 media errors; replace it: hci disk evict n1:/dev/vdb";
        assert_eq!((disk.state, disk.message.as_deref()), (api::DiskState::Ready, Some(expected)));
        let problem = &status.problems[0];
        assert_eq!((problem.kind.as_str(), problem.name.as_str()), ("disk", "n1:/dev/vdb"));
        assert_eq!((problem.message.as_str(), status.health), (expected, api::Health::Degraded));
    }

    #[test]
    fn a_disk_that_is_only_warm_is_to_be_cooled() {
        let smart = Smart { alarms: vec![Alarm::Temperature], ..Smart::default() };
        let (disk, _) = see(&cluster(1), Some(smart));
        assert_eq!(disk.message.unwrap(), "SMART says it is too warm or too cold; see to its cooling");
    }
}
