//! The `hci` executable.

fn main() -> anyhow::Result<()> {
    Ok(())
}
