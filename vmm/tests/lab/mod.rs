//! Where the guests of a test run: a folder of their own, and a deadline for their end.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use vmm::{Boot, ExitReason, Vm, VmConfig};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Lab(TempDir);

impl Lab {
    /// `None` where there is no KVM.
    pub(crate) fn new() -> Option<Self> {
        if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            eprintln!("SKIPPED: /dev/kvm: {error}");
            return None;
        }
        Some(Self(tempfile::tempdir().unwrap()))
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file into the folder.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// A guest with nothing but memory and a console.
    pub(crate) fn config(&self, boot: Boot, vcpus: u8) -> VmConfig {
        VmConfig {
            name: "tiny".into(),
            id: uuid::Uuid::from_u128(1),
            vcpus,
            max_vcpus: None,
            cpu_model: Default::default(),
            memory_bytes: 32 << 20,
            max_memory_bytes: None,
            plugged_bytes: 0,
            boot,
            disks: vec![],
            nics: vec![],
            seed: None,
            agent_socket: None,
            balloon: None,
            vsock: None,
            console_socket: self.path("console.sock"),
            display_socket: None,
            backend_timeout_ms: 300,
        }
    }

    /// A client of the console.
    pub(crate) fn console(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("console.sock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }
}

/// [`Vm::wait`], with a deadline.
pub(crate) fn wait(vm: Vm) -> ExitReason {
    let (done, ended) = std::sync::mpsc::channel();
    let handle = vm.handle();
    std::thread::spawn(move || done.send(vm.wait()));
    ended.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("the guest does not end: {:?}", handle.status()))
}
