//! Disk images from outside, read in a process that can do nothing else.
//!
//! An image is hostile input: its tables may point anywhere, refer to other files, or be made to overwhelm whoever
//! reads them. So the control process never looks into one. It opens the file and hands it to a worker, a process
//! without privileges (`hci image-worker`), which finds out the format and says through a pipe what the disk holds.
//! The worker may crash, hang or lie: that ends the import, with a reason, and nothing else.
//!
//! | module | it is |
//! |---|---|
//! | [`protocol`] | what the worker says, and the checks that its reader makes |
//! | [`worker`] | the process: formats, sandbox |
//! | [`reader`] | the parent's side: starts the worker, watches it, yields extents |
//! | [`writer`] | writing an exported disk down, raw or qcow2 |
//! | [`download`] | getting a file from a web server, over broken connections and restarts |
//! | [`room`] | room for such files on the node |
//! | [`sha256`] | the digest of streams and sources |
//! | [`boot_file`] | kernels and initramfs, which are only told apart by their first bytes |

pub mod boot_file;
pub mod download;
pub mod protocol;
pub mod reader;
pub mod room;
pub mod sha256;
pub mod worker;
pub mod writer;
