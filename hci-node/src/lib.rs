//! The `hci` executable: every role of a node and the admin command line in one file.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`cli`] | the command line: parses, calls the API of a node, prints |

pub mod cli;
