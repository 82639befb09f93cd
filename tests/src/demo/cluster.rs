//! The cluster as its administrator sees it: `hci` commands over SSH, JSON read back.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use installer::lab::Lab;
use serde_json::Value;

use super::workload::Report;

/// The names of the lab's servers, in the lab's order.
pub const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// A command that shows something answers soon, even on an emulated CPU.
const QUESTION: Duration = Duration::from_secs(60);

/// Runs `hci` on the servers of the lab.
#[derive(Debug)]
pub struct Cluster<'lab> {
    lab: &'lab Lab,
    /// The server that is asked; the others are used when it does not answer.
    first: usize,
}

impl<'lab> Cluster<'lab> {
    /// The cluster of that lab.
    pub fn new(lab: &'lab Lab) -> Self {
        Self { lab, first: 0 }
    }

    /// From now on asks this server first.
    pub fn ask_first(&mut self, server: usize) {
        self.first = server;
    }

    /// Runs one `hci` command on one server; returns what it printed.
    pub fn hci_on(&self, server: usize, arguments: &str, limit: Duration) -> Result<String> {
        let output = self.lab.node(server).ssh(&format!("hci {arguments}"), limit)?;
        if !output.success() {
            bail!("`hci {arguments}` on {} failed: {}", NODES[server], output.stderr.trim());
        }
        Ok(output.stdout)
    }

    /// Runs one `hci` command on the server that is asked first.
    pub fn hci(&self, arguments: &str, limit: Duration) -> Result<String> {
        self.hci_on(self.first, arguments, limit)
    }

    /// Runs a command that shows something and reads its JSON.
    pub fn show(&self, arguments: &str) -> Result<Value> {
        let text = self.hci(&format!("{arguments} -o json"), QUESTION)?;
        serde_json::from_str(&text)
            .with_context(|| format!("`hci {arguments} -o json` printed no JSON: {text}"))
    }

    /// The items of a list command.
    pub fn list(&self, arguments: &str) -> Result<Vec<Value>> {
        let list = self.show(arguments)?;
        Ok(list.get("items").and_then(Value::as_array).cloned().unwrap_or_default())
    }

    /// What the workload in a VM said last; an error in it fails.
    pub fn workload(&self, vm: &str) -> Result<Report> {
        let report = self.workload_unjudged(vm)?;
        report.check(vm)?;
        Ok(report)
    }

    /// What the workload in a VM said last.
    pub fn workload_unjudged(&self, vm: &str) -> Result<Report> {
        Ok(Report::parse(&self.hci(&format!("vm console {vm} --log"), QUESTION)?))
    }

    /// Copies a file of this machine to a server.
    pub fn copy_to(&self, server: usize, file: &std::path::Path, to: &str, limit: Duration) -> Result<()> {
        ensure!(file.is_file(), "{} is not there", file.display());
        self.lab.node(server).copy_to(file, to, limit)
    }
}

/// A text member of an object; empty when there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A number in an object; 0 when there is none.
pub fn number(object: &Value, pointer: &str) -> u64 {
    object.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}
