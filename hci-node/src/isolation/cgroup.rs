//! A control group for each VMM: it gets no more memory, CPU time and threads than its VM is worth.
//!
//! With cgroup v2 there is one tree, and the group is `hci-vm/<name>` in it, outside of the groups of systemd's units: a VMM outlives the
//! service that started it. Hosts with v1 have a tree for each controller, with the same group in each. What a host does not offer is left out
//! and named ([`join`] returns it), as a node that runs VMs with fewer limits is better than one that runs none.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where control groups are.
pub const TREE: &str = "/sys/fs/cgroup";
/// The group that the groups of all VMMs are in.
const PARENT: &str = "hci-vm";
/// The period that CPU time is counted in, in microseconds.
const CPU_PERIOD: u64 = 100_000;

/// How much a process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, page tables included.
    pub memory: u64,
    /// Processors.
    pub cpus: u64,
    /// Threads.
    pub threads: u64,
}

/// The files of a limit.
struct Controller {
    name: &'static str,
    v1: fn(Limits) -> Vec<(&'static str, String)>,
    v2: fn(Limits) -> (&'static str, String),
}

const CONTROLLERS: [Controller; 3] = [
    Controller {
        name: "memory",
        v1: |limits| vec![("memory.limit_in_bytes", limits.memory.to_string())],
        v2: |limits| ("memory.max", limits.memory.to_string()),
    },
    Controller {
        name: "cpu",
        v1: |limits| {
            vec![
                ("cpu.cfs_period_us", CPU_PERIOD.to_string()),
                ("cpu.cfs_quota_us", (limits.cpus * CPU_PERIOD).to_string()),
            ]
        },
        v2: |limits| ("cpu.max", format!("{} {CPU_PERIOD}", limits.cpus * CPU_PERIOD)),
    },
    Controller {
        name: "pids",
        v1: |limits| vec![("pids.max", limits.threads.to_string())],
        v2: |limits| ("pids.max", limits.threads.to_string()),
    },
];

/// Moves this process into a group of that name. Returns which controllers could not be had, and why.
pub fn join(tree: &Path, name: &str, limits: Limits) -> Vec<(&'static str, io::Error)> {
    let mut missing = Vec::new();
    if !is_unified(tree) {
        for controller in &CONTROLLERS {
            let group = tree.join(controller.name).join(PARENT).join(name);
            if let Err(error) = make(&tree.join(controller.name), &group, &(controller.v1)(limits))
                .and_then(|()| enter(&group))
            {
                missing.push((controller.name, error));
            }
        }
        return missing;
    }
    let group = tree.join(PARENT).join(name);
    for controller in &CONTROLLERS {
        let delegated = fs::create_dir_all(tree.join(PARENT)).and_then(|()| {
            for level in [tree.to_owned(), tree.join(PARENT)] {
                fs::write(level.join("cgroup.subtree_control"), format!("+{}", controller.name))?;
            }
            Ok(())
        });
        if let Err(error) = delegated.and_then(|()| make(tree, &group, &[(controller.v2)(limits)])) {
            missing.push((controller.name, error));
        }
    }
    if let Err(error) = enter(&group) {
        missing.push(("cgroup", error));
    }
    missing
}

/// Gives a group that is there other limits. Returns which could not be set, and why.
pub fn resize(tree: &Path, name: &str, limits: Limits) -> Vec<(&'static str, io::Error)> {
    let unified = is_unified(tree);
    let set = |controller: &Controller| {
        let (group, settings) = match unified {
            true => (tree.join(PARENT).join(name), vec![(controller.v2)(limits)]),
            false => (tree.join(controller.name).join(PARENT).join(name), (controller.v1)(limits)),
        };
        settings.iter().try_for_each(|(file, value)| write(&group, file, value)).err()
    };
    CONTROLLERS.iter().filter_map(|controller| Some((controller.name, set(controller)?))).collect()
}

/// Removes the group of a process that has ended. One that is not there is fine.
pub fn remove(tree: &Path, name: &str) {
    let groups: Vec<PathBuf> = match is_unified(tree) {
        true => vec![tree.join(PARENT).join(name)],
        false => {
            CONTROLLERS.iter().map(|controller| tree.join(controller.name).join(PARENT).join(name)).collect()
        }
    };
    for group in groups {
        match fs::remove_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(group = %group.display(), %error, "a control group is left");
            }
            _ => {}
        }
    }
}

/// Whether this is cgroup v2 as a whole, not v1 with v2 in a corner.
fn is_unified(tree: &Path) -> bool {
    tree.join("cgroup.controllers").exists()
}

fn make(mounted: &Path, group: &Path, settings: &[(&str, String)]) -> io::Result<()> {
    if !mounted.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} is not there", mounted.display())));
    }
    fs::create_dir_all(group)?;
    settings.iter().try_for_each(|(file, value)| write(group, file, value))
}

fn write(group: &Path, file: &str, value: &str) -> io::Result<()> {
    // It is there when the controller is. Making a file would hide that it is not.
    fs::OpenOptions::new()
        .write(true)
        .open(group.join(file))
        .and_then(|mut opened| io::Write::write_all(&mut opened, value.as_bytes()))
        .map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))
}

fn enter(group: &Path) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(group.join("cgroup.procs"))
        .and_then(|mut procs| io::Write::write_all(&mut procs, std::process::id().to_string().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { memory: 1 << 30, cpus: 3, threads: 20 };

    /// A tree in which a group's files are there before the group is made, as a kernel would have it.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for file in files {
            let path = tree.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        tree
    }

    #[test]
    fn one_tree_gets_one_group() {
        let files =
            ["memory.max", "cpu.max", "pids.max", "cgroup.procs"].map(|file| format!("hci-vm/a/{file}"));
        let mut all: Vec<&str> = files.iter().map(String::as_str).collect();
        all.extend(["cgroup.controllers", "cgroup.subtree_control", "hci-vm/cgroup.subtree_control"]);
        let tree = tree(&all);
        assert!(join(tree.path(), "a", LIMITS).is_empty());
        let read = |file: &str| fs::read_to_string(tree.path().join("hci-vm/a").join(file)).unwrap();
        assert_eq!(read("memory.max"), (1u64 << 30).to_string());
        assert_eq!(read("cpu.max"), "300000 100000");
        assert_eq!(read("pids.max"), "20");
        assert_eq!(read("cgroup.procs"), std::process::id().to_string());

        fs::write(tree.path().join("hci-vm/a/memory.max"), "").unwrap();
        assert!(resize(tree.path(), "a", Limits { memory: 2 << 30, ..LIMITS }).is_empty());
        assert_eq!(read("memory.max"), (2u64 << 30).to_string());
        assert_eq!(resize(tree.path(), "b", LIMITS).len(), 3, "it is not made");
    }

    #[test]
    fn what_a_host_lacks_is_named_and_the_rest_holds() {
        let tree =
            tree(&["pids/hci-vm/a/pids.max", "pids/hci-vm/a/cgroup.procs", "cpu/hci-vm/a/cgroup.procs"]);
        let missing = join(tree.path(), "a", LIMITS);
        let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["memory", "cpu"]);
        assert_eq!(fs::read_to_string(tree.path().join("pids/hci-vm/a/pids.max")).unwrap(), "20");
    }
}
