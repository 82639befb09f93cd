//! `make bench`: what our storage and our overlay cost, each beside what it runs on, measured in one run.
//!
//! Real data processes in network namespaces (see [`crate::native`]); no VMs, so that nothing but the data path is
//! measured. There is no target and no verdict: figures of a shared machine differ from run to run, and the raw medium beside
//! them tells by how much.

pub mod network;
pub mod storage;
pub mod vmm;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value, json};

/// One line of the results: figures, with units in their names, of a workload on a target.
#[derive(Clone, Debug)]
pub struct Row {
    target: String,
    workload: String,
    figures: Vec<(&'static str, f64)>,
}

impl Row {
    /// A row.
    pub fn new(target: &str, workload: &str, figures: Vec<(&'static str, f64)>) -> Self {
        Self { target: target.to_owned(), workload: workload.to_owned(), figures }
    }

    /// What was measured.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// A figure by its name.
    pub fn figure(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    fn json(&self) -> Value {
        let mut row = Map::from_iter([
            ("target".to_owned(), json!(self.target)),
            ("workload".to_owned(), json!(self.workload)),
        ]);
        row.extend(self.figures.iter().map(|(name, value)| ((*name).to_owned(), json!(value))));
        Value::Object(row)
    }
}

/// Writes the rows as a JSON list.
pub fn write_json(file: &Path, rows: &[Row]) -> Result<()> {
    let rows: Vec<_> = rows.iter().map(Row::json).collect();
    Ok(fs::write(file, serde_json::to_vec_pretty(&rows)?)?)
}

/// Prints the rows as a table, the targets of each workload side by side.
pub fn print_table(title: &str, rows: &[Row]) {
    println!("\n{title}");
    let mut seen = BTreeSet::new();
    let mut columns = Vec::new();
    for (name, _) in rows.iter().flat_map(|row| &row.figures) {
        if seen.insert(*name) {
            columns.push(*name);
        }
    }
    let width = |text: fn(&Row) -> &str| rows.iter().map(|row| text(row).len()).max().unwrap_or(0).max(8);
    let (workloads, targets) = (width(|row| &row.workload), width(|row| &row.target));
    print!("{:<workloads$}  {:<targets$}", "workload", "target");
    columns.iter().for_each(|column| print!("  {column:>10}"));
    println!();
    let mut order: Vec<&Row> = rows.iter().collect();
    let first_of = |row: &Row| rows.iter().position(|other| other.workload == row.workload);
    order.sort_by_key(|row| first_of(row));
    for row in order {
        print!("{:<workloads$}  {:<targets$}", row.workload, row.target);
        for column in &columns {
            match row.figure(column) {
                Some(value) if value >= 100.0 => print!("  {value:>10.0}"),
                Some(value) => print!("  {value:>10.2}"),
                None => print!("  {:>10}", "-"),
            }
        }
        println!();
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
