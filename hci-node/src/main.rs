//! Entry point of the `hci` executable; everything is in the library so that tests can reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    hci_node::cli::main()
}
