//! The command line: a thin client of the API, and the entry points of the roles of a node.

use std::process::ExitCode;

/// Parses the arguments, runs the command and turns its outcome into an exit code.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
