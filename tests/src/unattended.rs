//! An install that nobody attends: servers of different kinds boot the ISO, install themselves by an answer file that
//! names a cluster, and are that cluster, with no command typed.
//!
//! Between them they cover the ways in which the ISO starts: Secure Boot, UEFI and BIOS, from a stick and from a CD.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use installer::lab::{Boot, Firmware, Forming, Lab, LabOptions, Medium};

use crate::demo::cluster::{Cluster, NODES, text};
use crate::demo::run::wait_node_state;
use crate::demo::timeline::{Look, Progress, Timeline};

const CLUSTER: &str = "unattended";
const SERVERS: [Boot; 3] = [
    Boot { firmware: Firmware::SecureBoot, medium: Medium::UsbStick },
    Boot { firmware: Firmware::Uefi, medium: Medium::Cd },
    Boot { firmware: Firmware::Bios, medium: Medium::UsbStick },
];
const INSTALL_LIMIT: Duration = Duration::from_secs(600);
const FORM_LIMIT: Duration = Duration::from_secs(180);
const QUESTION: Duration = Duration::from_secs(60);

/// What a run needs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The install ISO.
    pub iso: PathBuf,
    /// Where the lab keeps its disks and logs.
    pub lab: PathBuf,
}

/// Runs all steps and ends the lab.
pub fn run(options: &Options, timeline: &mut Timeline) -> Result<()> {
    let name = "a server with Secure Boot, one with UEFI and one with a BIOS install themselves";
    let outcome = timeline.step(name, |progress| install(options, progress)).and_then(|lab| {
        let outcome = check(&lab, timeline);
        if outcome.is_err() {
            for server in lab.nodes() {
                println!(
                    "--- last lines of the console of {} ---\n{}",
                    server.name(),
                    server.console_tail(25)
                );
            }
        }
        outcome
    });
    Lab::down(&options.lab)?;
    outcome
}

fn install(options: &Options, progress: &Progress) -> Result<Lab> {
    let mut lab = LabOptions::from_iso(&options.lab, &options.iso);
    lab.servers = SERVERS.to_vec();
    lab.forming = Forming::ByAnswerFile(CLUSTER.to_owned());
    let lab = Lab::up(&lab, &mut |line| progress.note(line))?;
    for server in lab.nodes() {
        server
            .wait_ssh(INSTALL_LIMIT)
            .with_context(|| format!("{} did not come up from its disk", server.name()))?;
        progress.note(&format!("{} is installed and runs from its disk", server.name()));
    }
    Ok(lab)
}

fn check(lab: &Lab, timeline: &mut Timeline) -> Result<()> {
    timeline.step("each was started by the firmware that it was given", |progress| {
        for (server, boot) in lab.nodes().iter().zip(SERVERS) {
            let found = firmware(server)?;
            ensure!(
                found == boot.firmware,
                "{} was started by {found:?}, not by {:?}",
                server.name(),
                boot.firmware
            );
            progress.note(&format!("{}: {found:?}", server.name()));
        }
        Ok(())
    })?;
    let cluster = Cluster::new(lab);
    timeline.step("the three are a cluster, with no command typed", |progress| {
        progress.wait("three nodes", FORM_LIMIT, || {
            let nodes = cluster.list("node list")?;
            let names: Vec<_> = nodes.iter().map(|node| text(node, "/name").to_owned()).collect();
            Ok(if names.len() == NODES.len() { Look::Done(()) } else { Look::NotYet(names.join(", ")) })
        })?;
        for node in NODES {
            wait_node_state(&cluster, node, "available", progress)?;
        }
        let name = text(&cluster.show("cluster get")?, "/name").to_owned();
        ensure!(name == CLUSTER, "the cluster is called {name}");
        Ok(())
    })
}

/// The firmware that started a server, as its kernel says.
fn firmware(server: &installer::lab::Server) -> Result<Firmware> {
    let question = "if [ ! -d /sys/firmware/efi ]; then echo bios; \
         elif dmesg | grep -qi 'secure boot enabled'; then echo secure-boot; else echo uefi; fi";
    let answer = server.ssh(question, QUESTION)?.stdout;
    match answer.trim() {
        "bios" => Ok(Firmware::Bios),
        "uefi" => Ok(Firmware::Uefi),
        "secure-boot" => Ok(Firmware::SecureBoot),
        other => anyhow::bail!("{} does not know its firmware: {other:?}", server.name()),
    }
}
