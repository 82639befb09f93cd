//! Entry point of the `hci` executable; everything is in the library so that tests can reach it.

use std::process::ExitCode;

/// Guests' requests are made of many short-lived buffers of all sizes: the C library's allocator takes a sixth of the time that a
/// small write takes, and gives memory back just to fault it in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    hci_node::cli::main()
}
