//! A VM of the cluster, seen from its nodes: its processes and what its guest prints.

use std::{fs, io::Read, os::unix::net::UnixStream, path::PathBuf, thread::JoinHandle};

use super::{Cluster, eventually, letters};

impl Cluster {
    pub fn node_of_vm(&self, n: usize) -> usize {
        let node = self.vm(n).1.expect("the VM has a node");
        node.trim_start_matches('n').parse().unwrap()
    }

    /// The directory of the VM on a node.
    pub fn vm_dir(&self, n: usize) -> Option<PathBuf> {
        let vms = fs::read_dir(self.path(n, "run/vm")).ok()?;
        vms.flatten().map(|entry| entry.path()).find(|dir| dir.join("console.sock").exists())
    }

    /// Follows the guest's console on a node to its end; returns the first and the last letter. Each has to be the one after the one before.
    pub fn follow(&self, n: usize) -> JoinHandle<(u8, u8)> {
        let dir = self.vm_dir(n).expect("the VM is there");
        let mut console = UnixStream::connect(dir.join("console.sock")).unwrap();
        std::thread::spawn(move || {
            let mut all = Vec::new();
            console.read_to_end(&mut all).unwrap();
            for pair in all.windows(2) {
                assert_eq!(pair[1] as char, letters::following(Some(pair[0])) as char);
            }
            (all[0], *all.last().unwrap())
        })
    }

    /// What was printed since the present run began, or arrived.
    pub fn printed(&self, n: usize) -> Vec<u8> {
        self.run(n, &["vm", "console", "web1", "--log"]).stdout
    }

    /// Processes that run the VM, by node.
    pub fn vmms(&self) -> Vec<usize> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = cmdline.split(|byte| *byte == 0).collect();
            if words.get(1) == Some(&&b"vmm"[..]) {
                let config = String::from_utf8_lossy(words.get(4).copied().unwrap_or_default()).into_owned();
                found.extend((1..=3).filter(|n| config.starts_with(&*self.path(*n, "").to_string_lossy())));
            }
        }
        found
    }

    /// The process that runs the VM on a node, or the one that is about to (`next-vmm.pid`).
    pub fn process(&self, n: usize, record: &str) -> Option<i64> {
        let record = fs::read_to_string(self.vm_dir(n)?.join(record)).ok()?;
        let record: serde_json::Value = serde_json::from_str(&record).ok()?;
        record["pid"].as_i64()
    }

    pub fn kill_vmm(&self, n: usize, record: &str) {
        if let Some(process) = self.process(n, record) {
            kill(process);
        }
    }

    /// Waits until the VM runs, in one process; returns its node.
    pub fn runs_once(&self, seen_from: usize) -> usize {
        eventually("the VM runs, once", || {
            let shown = self.run(seen_from, &["vm", "get", "web1", "-o", "json"]);
            let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).ok()?;
            let node = shown["node"].as_str()?.trim_start_matches('n').parse::<usize>().ok()?;
            (shown["state"] == "running" && self.vmms() == [node]).then_some(node)
        })
    }

    /// Waits until its guest prints on. Each letter has to be the one after the one before, or the first one of a guest that may have booted.
    pub fn prints_on(&self, seen_from: usize, first: Option<u8>, when: &str) {
        let before = self.printed(seen_from);
        eventually("it prints on", || (self.printed(seen_from) != before).then_some(()));
        let printed = self.printed(seen_from);
        for pair in printed.windows(2) {
            let fits = pair[1] == letters::following(Some(pair[0])) || first == Some(pair[1]);
            assert!(fits, "{when}: {}", String::from_utf8_lossy(&printed));
        }
    }

    pub fn restart_data(&mut self, n: usize) {
        let [data, _] = &mut self.nodes[n - 1];
        data.kill().unwrap();
        data.wait().unwrap();
        self.nodes[n - 1][0] = self.spawn(n, "data");
    }

    /// Moves the VM, by this command; returns the sentence about its pause.
    pub fn move_vm(&self, n: usize, command: &[&str]) -> String {
        let before = self.pauses_told(n).len();
        self.ok(n, command);
        // Two of them may be the same.
        eventually("the pause is told", || self.pauses_told(n).into_iter().nth(before))
    }

    /// The sentences about the pauses of migrations, the oldest first.
    fn pauses_told(&self, n: usize) -> Vec<String> {
        let events = self.ok(n, &["event", "list", "-o", "json"]);
        let events: serde_json::Value = serde_json::from_str(&events).unwrap();
        let events = events["items"].as_array().cloned().unwrap_or_default();
        let told = events.iter().filter(|event| event["kind"] == "vm-migration-pause");
        told.filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
    }
}

/// Kills a process at once.
pub fn kill(process: i64) {
    let process = nix::unistd::Pid::from_raw(process as i32);
    let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL);
}
