//! `guest-image FOLDER`: builds the test VMs' image there and prints the three files.

use std::path::Path;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).context("usage: guest-image FOLDER")?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let image = hci_tests::guest::build(&sources, Path::new(&folder))?;
    for path in [image.kernel, image.initramfs, image.disk] {
        println!("{}", path.display());
    }
    Ok(())
}
