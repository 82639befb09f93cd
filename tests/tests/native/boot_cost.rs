//! What the VMM costs a guest that boots does not grow unseen. Instructions are counted, not time: what else this machine does makes no difference, and
//! two runs differ by less than one in a hundred.

use anyhow::{Context, Result, ensure};
use hci_tests::bench::vmm;
use hci_tests::native::process::executable;

/// Most that a guest with a `vmlinux` may cost: millions of instructions from the start of the VMM to the guest's init, and MiB of memory beside the
/// guest's. Cloud Hypervisor takes 1,600 and 6.5 for a guest with fewer devices; the first is still to be reached.
const BOUNDS: [(&str, f64); 2] = [("boot_minsn", 1_675.0), ("pss_mib", 3.5)];

#[test]
fn a_guest_costs_no_more_than_it_may() -> Result<()> {
    let rows = vmm::measure(&executable()?)?;
    let row =
        rows.iter().find(|row| row.target() == "vmlinux").context("no guest with a vmlinux was measured")?;
    for (name, bound) in BOUNDS {
        let found = row.figure(name).with_context(|| format!("{name} was not measured"))?;
        println!("{name}: {found:.1}, may be {bound}");
        ensure!(found <= bound, "{name} is {found:.1}, and may be {bound} at most");
    }
    Ok(())
}
