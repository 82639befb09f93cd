//! From an empty server to a node, and the tools around that: the installer, the image builder, and the lab.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`answer`] | the answer file of an unattended install |
//! | [`install`] | what `hci install` does on the server |
//! | [`image`] | builds the root image and the ISO, on the developer's machine |
//! | [`lab`] | real servers under QEMU, for the demo and the tests |
//!
//! Invariants:
//! - The installer writes to the one disk that the answer file names, and to that only when it is blank or named under
//!   `wipe`; everything is checked before the first write.
//! - No identity is in the image: machine id, host keys and node keys are made on the server.
//! - Two builds from the same inputs make the same files.
//! - Every wait in the lab has a limit, and its end shows the console's last lines.
//!
//! There are no threads of its own but the readers of a command's output.

pub mod answer;
pub mod image;
pub mod install;
pub mod lab;
