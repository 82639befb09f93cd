//! Measures storage and overlay beside the raw medium and the bare link: `bench --hci PATH --out DIR`. Prints tables and
//! writes `storage.json` and `network.json`. Needs root, iproute2, fio and iperf3.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use hci_tests::bench::{network, print_table, storage, write_json};
use hci_tests::native::scratch;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--hci", hci, "--out", out] => measure(Path::new(hci), Path::new(out)),
        // Child processes of the measurements.
        ["tap", socket] => network::run_tap(Path::new(socket)),
        ["echo", address] => network::run_echo(address.parse()?),
        ["round-trips", address] => network::run_round_trips(address.parse()?),
        _ => bail!("usage: bench --hci PATH_OF_EXECUTABLE --out DIRECTORY_FOR_RESULTS"),
    }
}

fn measure(hci: &Path, out: &Path) -> Result<()> {
    scratch::prepare()?;
    scratch::clean_up_on_signals()?;
    std::fs::create_dir_all(out)?;
    let out: PathBuf = std::fs::canonicalize(out)?;
    let rows = storage::measure(hci)?;
    write_json(&out.join("storage.json"), &rows)?;
    print_table("A volume with three replicas beside the raw medium (one copy, fio)", &rows);
    let rows = network::measure(hci)?;
    write_json(&out.join("network.json"), &rows)?;
    print_table("The overlay beside the bare link", &rows);
    println!("\nThe same as JSON is in {}", out.display());
    Ok(())
}
