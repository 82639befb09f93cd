//! `make bench-vmm`: what the VMM costs a guest that boots, in instructions.
//!
//! The guest runs in an emulated machine with KVM whose clock counts the instructions that are executed (QEMU's `-icount`): the machine
//! that this runs on and what else it does make no difference, and two runs differ by less than one in a hundred. All is counted, the
//! guest's kernel, the host's and the VMM. What an exit from the guest costs on real hardware is not in it. How long guests that move are paused is
//! measured by `make bench-migration`, and shown beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::Row;
use crate::guest;
use crate::initramfs::Initramfs;

/// How long the machine may run.
const PATIENCE_SECONDS: &str = "900";
/// What Linux' boot code is packed with, and who unpacks it.
const PACKERS: [(&[u8], &str); 4] = [
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x8b\x08", "gzip"),
];

/// Boots guests from `hci` and returns a row for each kind of kernel.
pub fn measure(hci: &Path) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let folder = folder.path();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/bench");
    let tree = guest::fetch_kernel(folder)?;
    let kernel = guest::kernel_of(&tree)?;
    let image = machine(folder, &sources, &tree, &kernel, hci)?;
    let output = Command::new("timeout")
        .arg(PATIENCE_SECONDS)
        .args(["qemu-system-x86_64", "-accel", "tcg", "-icount", "shift=0,sleep=off", "-M", "q35"])
        .args(["-cpu", "EPYC-Milan,+svm,+npt", "-smp", "1", "-m", "1536"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-append", "console=ttyS0 quiet panic=-1", "-kernel"])
        .arg(&kernel)
        .arg("-initrd")
        .arg(&image)
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "the machine ended with {}: {said}", output.status);
    let binary_mib = fs::metadata(hci)?.len() as f64 / f64::from(1 << 20);
    ["vmlinux", "bzImage"].into_iter().map(|kind| row(kind, &said, binary_mib)).collect()
}

fn row(kind: &str, said: &str, binary_mib: f64) -> Result<Row> {
    let mut rounds: Vec<[u64; 3]> = Vec::new();
    for line in said.lines().filter_map(|line| line.trim().strip_prefix("probe: ")) {
        let mut words = line.split_whitespace();
        if words.next() == Some(kind) {
            let figures = words.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
            rounds.push(figures.try_into().ok().with_context(|| format!("a strange line: {line}"))?);
        }
    }
    let median = |at: usize| -> Result<f64> {
        let mut all: Vec<u64> = rounds.iter().map(|round| round[at]).collect();
        all.sort_unstable();
        Ok(*all.get(all.len() / 2).with_context(|| format!("no guest with {kind} booted: {said}"))? as f64)
    };
    // A nanosecond is an instruction.
    let figures = vec![
        ("boot_minsn", median(1)? / 1e6),
        ("first_byte_minsn", median(0)? / 1e6),
        ("pss_mib", median(2)? / 1024.0),
        ("binary_mib", binary_mib),
    ];
    Ok(Row::new(kind, "direct boot", figures))
}

/// What one move of a guest took (`make bench-migration`).
#[derive(serde::Deserialize)]
struct Move {
    guest: String,
    #[serde(rename = "move")]
    way: String,
    migrate_pause_ms: f64,
}

/// The pauses of guests that moved, the median for each kind of guest and move.
pub fn moves(measured: &Path) -> Result<Vec<Row>> {
    let text = fs::read(measured)
        .with_context(|| format!("no {}: run make bench-migration first", measured.display()))?;
    let moves: Vec<Move> = serde_json::from_slice(&text)?;
    let mut kinds: BTreeMap<(String, String), Vec<f64>> = BTreeMap::new();
    for Move { guest, way, migrate_pause_ms } in moves {
        kinds.entry((way, guest)).or_default().push(migrate_pause_ms);
    }
    let row = |((way, guest), mut pauses): ((String, String), Vec<f64>)| {
        pauses.sort_by(f64::total_cmp);
        Row::new(&guest, &way, vec![("migrate_pause_ms", pauses[pauses.len() / 2])])
    };
    Ok(kinds.into_iter().map(row).collect())
}

/// Packs what the machine runs.
fn machine(folder: &Path, sources: &Path, tree: &Path, kernel: &Path, hci: &Path) -> Result<PathBuf> {
    let guest = Initramfs::new(&folder.join("guest"))?;
    guest.file(&sources.join("guest-init"), "init")?;
    let guest_image = folder.join("guest.img");
    guest.pack(&guest_image)?;

    let host = Initramfs::new(&folder.join("host"))?;
    host.program(hci)?;
    let probe = hci.with_file_name("vmm-probe");
    host.program(&probe)?;
    for module in ["irqbypass", "kvm", "kvm-amd"] {
        host.module(tree, module)?;
    }
    let vmlinux = folder.join("vmlinux");
    fs::write(&vmlinux, unpack(&fs::read(kernel)?)?)?;
    host.file(&vmlinux, "vmlinux")?;
    host.file(kernel, "bzImage")?;
    host.file(&guest_image, "guest.img")?;
    host.file(&sources.join("host-init"), "init")?;
    let image = folder.join("host.img");
    host.pack(&image)?;
    Ok(image)
}

/// The ELF kernel in a bzImage.
fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let packed = tempfile::NamedTempFile::new()?;
    for (magic, packer) in PACKERS {
        let found = image.windows(magic.len()).enumerate().filter(|(_, window)| *window == magic);
        for (at, _) in found {
            fs::write(packed.path(), &image[at..])?;
            let file = fs::File::open(packed.path())?;
            // What follows the packed kernel is no concern of the packer's: its complaint is not looked at.
            let unpacked = Command::new(packer)
                .arg("-dc")
                .stdin(file)
                .stderr(Stdio::null())
                .output()
                .with_context(|| format!("cannot start {packer}"))?
                .stdout;
            if unpacked.starts_with(b"\x7fELF") {
                return Ok(unpacked);
            }
        }
    }
    bail!("there is no kernel that lz4, xz, zstd or gzip unpack")
}
