//! Where a node keeps its files: one place for the names that the processes of a node share.
//!
//! The state directory survives a reboot; the run directory need not. Both are given on the command line, so that
//! several nodes can run on one machine.

use std::path::{Path, PathBuf};

use crate::state::{ContentHash, DiskId, PortId, VmId, VolumeId};

/// What the names of a VMM's files begin with as long as another VMM runs the VM.
pub const SUCCESSOR: &str = "next-";

/// The two directories of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePaths {
    state: PathBuf,
    run: PathBuf,
}

impl NodePaths {
    /// Where a node keeps its files unless told otherwise.
    pub const DEFAULT_STATE: &'static str = "/var/lib/hci";
    /// Where a node keeps its sockets unless told otherwise.
    pub const DEFAULT_RUN: &'static str = "/run/hci";

    /// The paths under these two directories.
    pub fn new(state: impl Into<PathBuf>, run: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), run: run.into() }
    }

    /// What survives a reboot.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Sockets and records of running processes.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The node's key and certificates.
    pub fn identity(&self) -> PathBuf {
        self.state.join("identity")
    }

    /// What the data process keeps besides the disks.
    pub fn data(&self) -> PathBuf {
        self.state.join("data")
    }

    /// Where the disks of the pool are mounted.
    pub fn disks(&self) -> PathBuf {
        self.state.join("disks")
    }

    /// Where one disk of the pool is mounted.
    pub fn disk(&self, disk: DiskId) -> PathBuf {
        self.disks().join(disk.to_string())
    }

    /// Kernels and initramfs of all images.
    pub fn boot_files(&self) -> PathBuf {
        self.state.join("images")
    }

    /// One kernel or initramfs, named by its content.
    pub fn boot_file(&self, hash: ContentHash) -> PathBuf {
        self.boot_files().join(hash.to_string())
    }

    /// Socket on which the data process serves the control process.
    pub fn data_socket(&self) -> PathBuf {
        self.run.join("data.sock")
    }

    /// Socket on which the control process serves the data process.
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// The vhost-user-blk socket of a volume, in a directory that only the VMM of its VM sees.
    pub fn block_socket(&self, vm: VmId, volume: VolumeId) -> PathBuf {
        self.vm(vm).backends().join(socket_name('d', volume.0))
    }

    /// The vhost-user-net socket of a port, in a directory that only the VMM of its VM sees.
    pub fn port_socket(&self, vm: VmId, port: PortId) -> PathBuf {
        self.vm(vm).backends().join(socket_name('n', port.0))
    }

    /// Where the records of requests in flight are, which outlive a restart of the data process.
    pub fn inflight(&self) -> PathBuf {
        self.run.join("inflight")
    }

    /// The record of one volume's requests in flight.
    pub fn inflight_of(&self, volume: VolumeId) -> PathBuf {
        self.inflight().join(volume.to_string())
    }

    /// Where the directories of VMs are.
    pub fn vms(&self) -> PathBuf {
        self.run.join("vm")
    }

    /// The files of one VM's process.
    pub fn vm(&self, vm: VmId) -> VmPaths {
        VmPaths { dir: self.vms().join(vm.to_string()) }
    }
}

/// A socket's path has 107 bytes at most, so half of the id has to do. Among the few devices of one VM that is enough.
fn socket_name(kind: char, id: uuid::Uuid) -> String {
    let id = id.as_simple().to_string();
    format!("{kind}{}.sock", &id[..id.len() / 2])
}

/// The files of one VM's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths {
    dir: PathBuf,
}

impl VmPaths {
    /// The paths in this directory.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The directory. The VMM may make sockets in it; its records belong to root.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the data process makes the sockets of the VM's disks and NICs, those too that come while it runs.
    pub fn backends(&self) -> PathBuf {
        self.dir.join("dev")
    }

    /// What the VMM is to run.
    pub fn config(&self) -> PathBuf {
        self.dir.join("vmm.json")
    }

    /// Socket on which the VMM takes orders.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("vmm.sock")
    }

    /// Socket of the guest's serial console.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// Socket of the guest's screen, keyboard and pointer.
    pub fn display(&self) -> PathBuf {
        self.dir.join("display.sock")
    }

    /// Socket by which programs of the node connect to programs in the guest.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock.sock")
    }

    /// What stands for this file of the VMM in the VMM that is about to take its place.
    pub fn successor(&self, file: &Path) -> PathBuf {
        let mut name = std::ffi::OsString::from(SUCCESSOR);
        name.push(file.file_name().unwrap_or_default());
        self.dir.join(name)
    }

    /// All sockets that the VMM makes.
    pub fn made_sockets(&self) -> [PathBuf; 5] {
        [self.socket(), self.console(), self.agent(), self.display(), self.vsock()]
    }

    /// Socket of the guest agent's port.
    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// The seed disk that tells the guest's cloud-init who it is.
    pub fn seed(&self) -> PathBuf {
        self.dir.join("seed.iso")
    }

    /// What the guest's firmware keeps.
    pub fn variables(&self) -> PathBuf {
        self.dir.join("variables.fd")
    }

    /// What the VMM logs.
    pub fn log(&self) -> PathBuf {
        self.dir.join("vmm.log")
    }

    /// Who runs it; locked for as long as the process lives.
    pub fn pid(&self) -> PathBuf {
        self.dir.join("vmm.pid")
    }

    /// Where the VMM's own root directory is mounted, in its namespace; empty everywhere else.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// How the last run ended.
    pub fn exit(&self) -> PathBuf {
        self.dir.join("exit.json")
    }
}
