//! Measures storage and overlay beside what they run on: `bench [--storage | --volume | --vmm] --hci PATH --out DIR`. Prints
//! tables and writes `storage.json` and `network.json`. Needs root, iproute2, fio and iperf3; with `--storage`, which
//! sets storage beside its peers, also qemu-storage-daemon and Ceph. `--volume` measures our volume alone, in memory, without and with compression: the quick look
//! while the data path is worked on.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use hci_tests::bench::storage::Targets;
use hci_tests::bench::{network, print_table, storage, vmm, write_json};
use hci_tests::native::scratch;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--hci", hci, "--out", out] => {
            measure_storage(Path::new(hci), Path::new(out), Targets::Ours)?;
            measure_network(Path::new(hci), Path::new(out))
        }
        ["--storage", "--hci", hci, "--out", out] => {
            measure_storage(Path::new(hci), Path::new(out), Targets::WithPeers)
        }
        ["--volume", "--hci", hci, "--out", out] => {
            measure_storage(Path::new(hci), Path::new(out), Targets::VolumeInMemory)
        }
        ["--vmm", "--hci", hci, "--out", out] => measure_vmm(Path::new(hci), Path::new(out)),
        // Child processes of the measurements.
        ["tap", socket] => network::run_tap(Path::new(socket)),
        ["echo", address] => network::run_echo(address.parse()?),
        ["round-trips", address] => network::run_round_trips(address.parse()?),
        _ => {
            bail!(
                "usage: bench [--storage | --volume | --vmm] --hci PATH_OF_EXECUTABLE --out DIRECTORY_FOR_RESULTS"
            )
        }
    }
}

/// The directory for results, made when it is not there.
fn prepare(out: &Path) -> Result<PathBuf> {
    scratch::prepare()?;
    scratch::clean_up_on_signals()?;
    std::fs::create_dir_all(out)?;
    Ok(std::fs::canonicalize(out)?)
}

fn measure_storage(hci: &Path, out: &Path, targets: Targets) -> Result<()> {
    let file = prepare(out)?.join("storage.json");
    let rows = storage::measure(hci, targets)?;
    write_json(&file, &rows)?;
    print_table("A volume with three replicas beside others on the same medium", &rows);
    println!("\nThe same as JSON is in {}", file.display());
    Ok(())
}

fn measure_vmm(hci: &Path, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out)?;
    let file = out.join("vmm.json");
    let mut rows = vmm::measure(hci)?;
    print_table("A guest that boots, in millions of instructions", &rows);
    let moves = vmm::moves(&out.join("migration.json"))?;
    print_table("A guest of 2 GiB that moves, in milliseconds", &moves);
    rows.extend(moves);
    write_json(&file, &rows)?;
    println!("\nThe same as JSON is in {}", file.display());
    Ok(())
}

fn measure_network(hci: &Path, out: &Path) -> Result<()> {
    let file = prepare(out)?.join("network.json");
    let rows = network::measure(hci)?;
    write_json(&file, &rows)?;
    print_table("The overlay beside the bare link", &rows);
    println!("\nThe same as JSON is in {}", file.display());
    Ok(())
}
